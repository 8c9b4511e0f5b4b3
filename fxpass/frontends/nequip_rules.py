"""Stand-ins for NequIP's own modules, in the form that the graph needs.

NequIP's modules read and write one dictionary.  In a trace its ``edge_index`` is the pair (receivers, senders) of
tensors [edges], ``edge_type_flat`` the pair of their types, and ``node_attrs`` is one-hot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.irreps import segments
from ..algebra.multilinear import parse_tensor_product
from ..capture.rules import RULES, Rule, TensorProductStandIn


class NeighbourNorm(nn.Module):
    """``AvgNumNeighborsNorm``: features over the root of the average number of neighbours, one number where it can."""

    def __init__(self, norm: Any, path: str) -> None:
        super().__init__()
        self.number = float(norm.norm_const) if norm.norm_shortcut else None
        self.norm_const = norm.norm_const

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        x = data["node_features"]
        factor = self.norm_const[data["atom_types"]] if self.number is None else self.number
        data["node_features"] = x * factor
        return data


class TypeEmbedding(nn.Module):
    """``NodeTypeEmbed`` that leaves ``node_attrs`` one-hot, which :func:`attributes_by_type` makes right."""

    def __init__(self, embed: Any, path: str) -> None:
        super().__init__()
        self.weight = embed.embed_module.weight
        self.set_features = embed.set_features

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        if self.set_features:
            data["node_features"] = torch.matmul(data["node_attrs"], self.weight)
        return data


class ScaleShift(nn.Module):
    """``PerTypeScaleShift``: energies of atoms times the scale of their type, plus its shift, in float64."""

    def __init__(self, module: Any, path: str) -> None:
        super().__init__()
        self.field, self.out_field, self.dtype = module.field, module.out_field, module.out_dtype
        self.scales = module.scales if module.has_scales else None
        self.shifts = module.shifts if module.has_shifts else None

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        def of(values: Tensor) -> Tensor:  # [atoms, 1] by type, or [1, 1] for all
            return values if values.shape[0] == 1 else values[data["atom_types"]]

        y = data[self.field].to(self.dtype)
        if self.scales is not None:
            y = y * of(self.scales)
        if self.shifts is not None:
            y = y + of(self.shifts)
        data[self.out_field] = y
        return data


class ScreenedNuclei(nn.Module):
    """``_ZBL``, energy of each edge, with a look-up of either nucleus by its type.

    Ziegler, Biersack and Littmark, The Stopping and Range of Ions in Matter (1985), with the constants of LAMMPS.
    """

    TERMS = ((0.02817, -0.20162), (0.28022, -0.40290), (0.50986, -0.94229), (0.18175, -3.19980))
    POWER, LENGTH = 0.23, 0.46850  # of nuclear charges; Angstrom

    def __init__(self, zbl: Any, path: str) -> None:
        super().__init__()

    def forward(
        self, Z: Tensor, r: Tensor, atom_types: Tensor, edge_index: tuple[Tensor, Tensor], qqr2exesquare: Tensor
    ) -> Tensor:
        first, second = (Z[atom_types[end]] for end in edge_index)
        x = (first.pow(self.POWER) + second.pow(self.POWER)) * r / self.LENGTH
        screening = sum(factor * torch.exp(rate * x) for factor, rate in self.TERMS)
        return qqr2exesquare * (first * second / r) * screening


NEQUIP_RULES: Mapping[str, Rule] = {
    **RULES,
    "nequip.nn.norm.AvgNumNeighborsNorm": NeighbourNorm,
    "nequip.nn.embedding.node.NodeTypeEmbed": TypeEmbedding,
    "nequip.nn.atomwise.PerTypeScaleShift": ScaleShift,
    "nequip.nn.pair_potential._ZBL": ScreenedNuclei,
}


def attributes_by_type(model: nn.Module) -> None:
    """Make self-connections of a prepared model take one-hot types in place of embedded ones, in place.

    A product with embedded types, sum_v W[u, v, w] E[t, v], is a product with one-hot types of weights that are
    multiplied out, W'[u, t, w].
    """
    embeddings = [module for module in model.modules() if isinstance(module, TypeEmbedding)]
    for block in model.modules():
        product = getattr(block, "sc", None)
        if isinstance(product, TensorProductStandIn):
            (embedding,) = embeddings
            block.sc = ProductByType(product, embedding)


class ProductByType(nn.Module):
    """A tensor product that takes one-hot types; its weights are multiplied out in the graph, as functions of both."""

    def __init__(self, product: TensorProductStandIn, embedding: TypeEmbedding) -> None:
        super().__init__()
        self.product, self.embedding = product, embedding
        tp, types = parse_tensor_product(product.spec), embedding.weight.shape[0]
        self.blocks, paths, at = [], [], 0
        for path in tp.paths:
            sizes, (first, *_) = tp.sizes(path), segments(tp.irreps2)[path.i2]
            self.blocks.append((path.weight, first, [sizes[c] for c in "uvw"]))
            paths.append(replace(path, i2=0, weight=at))
            at += sizes["u"] * types * sizes["w"]
        product.spec = str(replace(tp, irreps2=f"{types}x0e", paths=tuple(paths), weights=at))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        types, blocks = self.embedding.weight.double(), []
        for at, first, (u, v, w) in self.blocks:
            weight = self.product.weight.narrow(0, at, u * v * w).view(u, v, w)
            mixed = torch.einsum("uvw,tv->utw", weight.double(), types.narrow(1, first, v))
            blocks.append(mixed.to(weight.dtype).flatten())
        return self.product(x1, x2, torch.cat(blocks))
