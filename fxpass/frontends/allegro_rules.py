"""Stand-ins for Allegro's own modules: its tensor track as tensor products in e3nn's layout.

Allegro keeps a feature of each edge as [edges, channels, components of all irreps] and multiplies by tensors of size
channels x components^3.  Here each irrep is a segment, [channels, 2l+1] in a row.  A first layer multiplies weighted
spherical harmonics by the environment of the edge's centre: a tensor product of the environment with the harmonics,
whose weights, like all that comes before the layers, are functions of the distance and the types at the two ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.irreps import segments
from ..algebra.multilinear import Path, TensorProduct
from ..capture.rules import Rule, SphericalHarmonicsStandIn
from ..errors import Location, UnsupportedModelError
from ..ir import ops
from .nequip_rules import NEQUIP_RULES, NeighbourNorm


def added(terms: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


class Network(nn.Module):
    """``ScalarMLPFunction`` with its weights cut by the parts that it reads, and by those that are read of it.

    Allegro concatenates what it reads and slices what comes out.  Apart, what depends on the distance alone is seen to
    do so: the features of two bodies until after their product, and the weights of harmonics.

    Args:
        columns: for each result, the columns of the network's result that it has.
    """

    def __init__(self, network: Any, columns: Sequence[Tensor]) -> None:
        super().__init__()
        self.mlp, self.columns = network.mlp, list(columns)
        self.deep = not isinstance(network.mlp, nn.Sequential)  # a product of matrices

    def forward(self, *parts: Tensor) -> list[Tensor]:
        if self.deep:
            last, bias = torch.linalg.multi_dot(list(self.mlp.weights)) * self.mlp.alpha, None
        else:
            *inner, end = list(self.mlp)
            for layer, activation in zip(inner[::2], inner[1::2], strict=True):
                parts = (activation(_times(parts, layer.weight * layer.alpha, layer.bias)),)
            last, bias = end.weight * end.alpha, end.bias
        return [
            _times(parts, last.index_select(1, chosen), None if bias is None else bias.index_select(0, chosen))
            for chosen in self.columns
        ]


def _times(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Parts side by side times weights, plus a bias."""
    rows = weight.split([part.shape[1] for part in parts])
    y = added([torch.mm(part, block) for part, block in zip(parts, rows, strict=True)])
    return y if bias is None else y + bias


class FieldNetwork(nn.Module):
    """``ScalarMLP``: a network from one field to another; a field may hold a tuple of parts."""

    def __init__(self, module: Any, path: str) -> None:
        super().__init__()
        self.field, self.out_field = module.field, module.out_field
        self.network = Network(module.mlp_module, [torch.arange(module.mlp_module.dims[-1])])

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        x = data[self.field]
        (data[self.out_field],) = self.network(*(x if isinstance(x, tuple) else (x,)))
        return data


class TensorEmbedding(nn.Module):
    """``TwoBodySphericalHarmonicTensorEmbed`` that leaves the harmonics' weights apart from them."""

    def __init__(self, module: Any, path: str) -> None:
        super().__init__()
        self.scalars = module.scalar_embedding_in_field
        self.basis, self.weights = module.tensor_basis_out_field, module.tensor_embedding_out_field
        self.sh = SphericalHarmonicsStandIn(module.sh, path)
        self.linear = Network(module.env_embed_linear, [_columns(module._edge_weighter)])
        self.alpha = float(module._edge_weighter.alpha)
        self.dtype = module._output_dtype

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        data[self.basis] = self.sh(data["edge_vectors"]).to(self.dtype)
        (weights,) = self.linear(data[self.scalars])
        data[self.weights] = weights * self.alpha
        return data


class AllegroLayers(nn.Module):
    """``Allegro_Module`` by ``fxpass::tensor_product``; the result is the tuple of scalars that it concatenates."""

    def __init__(self, module: Any, path: str) -> None:
        super().__init__()
        self.basis, self.weights = module.tensor_basis_in_field, module.tensor_features_in_field
        self.scalars, self.out_field = module.scalar_in_field, module.scalar_out_field
        self.channels = module.num_tensor_features
        self.norm = NeighbourNorm(module.avg_num_neighbors_norm, path)
        harmonics = module.tps[0].irreps_in2
        if module.tps[0].irreps_in1 != harmonics:
            raise UnsupportedModelError(
                f"a first layer that reads {module.tps[0].irreps_in1} of {harmonics} is not covered",
                where=Location(module_path=path),
                hint="a model made by allegro.model.AllegroModel",
            )
        weigher = module._env_weighter
        self.environment = str(_environment(str(harmonics), self.channels, float(weigher.alpha)))
        own = torch.arange(module.num_scalar_features)
        columns = [own, module.num_scalar_features + _columns(weigher)]
        self.projection = Network(module.first_layer_env_embed_projection, columns)
        *latents, last = module.latents
        self.latents = nn.ModuleList([*(Network(latent, columns) for latent in latents), Network(last, [own])])
        self.first = str(_first(module.tps[0], self.channels))
        channel = torch.arange(self.channels)
        first = [irrep * self.channels + channel for irrep, _, _ in _instructions(module.tps[0])]
        self.register_buffer("first_columns", torch.cat(first))
        self.first_weights = module.tps[0].weights
        self.products = nn.ModuleList(
            ScalarProducts(tp, self.channels) if str(tp.irreps_out) == "1x0e" else Products(tp, self.channels)
            for tp in module.tps[1:]
        )

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        receiver, _ = data["edge_index"]
        y, atoms = data[self.basis], data["atom_types"].shape[0]
        scalars, *rest = self.projection(data[self.scalars])
        found = [scalars]
        ones = y.new_ones((atoms, self.channels))
        features = y
        for layer, network in enumerate(self.latents):
            (weights,) = rest
            harmonics = ops.tensor_product(ops.gather(ones, receiver), y, weights, None, self.environment, "out")
            data["node_features"] = ops.scatter_sum(harmonics, receiver, atoms)
            near = self.norm(data)["node_features"]
            if layer == 0:
                weights = data[self.weights].index_select(1, self.first_columns)
                weights = weights * _by_path(self.first_weights, self.channels)
                features = ops.tensor_product(ops.gather(near, receiver), y, weights, None, self.first, "out")
                # one edge to a sum: with it this is a convolution, to whoever looks for one
                edges = torch.arange(y.shape[0], device=y.device)
                features = ops.scatter_sum(features, edges, y.shape[0])
            else:
                features = self.products[layer - 1](features, near, receiver)
            scalars, *rest = network(*found, features[:, : self.channels])
            found.append(scalars)
        data[self.out_field] = tuple(found)
        return data


class Products(nn.Module):
    """A later ``Contracter``: features of edges times the environments of their centres, channel by channel."""

    def __init__(self, tp: Any, channels: int) -> None:
        super().__init__()
        self.spec = str(_product(tp, channels))
        self.weights, self.channels = tp.weights, channels

    def forward(self, features: Tensor, near: Tensor, receiver: Tensor) -> Tensor:
        weights = _by_path(self.weights, self.channels)
        return ops.tensor_product(features, ops.gather(near, receiver), weights, None, self.spec, "out")


class ScalarProducts(nn.Module):
    """The last ``Contracter``, whose results are scalars: scalar products, weighted at the atoms, fewer than edges."""

    def __init__(self, tp: Any, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weights = tp.weights
        spans, rows = {}, {}
        for n, (i1, i2, _) in enumerate(_instructions(tp)):
            start, _, l, _ = segments(_many(str(tp.irreps_in2), channels))[i2]
            spans[i1] = (start, channels * (2 * l + 1))
            rows[i1] = (n, _norm(tp, 0) / sqrt(2 * l + 1), 2 * l + 1)
        first = segments(_many(str(tp.irreps_in1), channels))
        self.spans = [spans[i] for i in sorted(spans)]  # of the environment, in the order of the features
        self.parts = [(first[i][0], 2 * first[i][2] + 1) for i in sorted(spans)]
        self.rows = [rows[i] for i in sorted(spans)]  # of the weights, with a factor and the number of components

    def forward(self, features: Tensor, near: Tensor, receiver: Tensor) -> Tensor:
        weights = _by_path(self.weights, self.channels).view(-1, self.channels)
        factors = torch.cat([(weights[n] * by).repeat_interleave(components) for n, by, components in self.rows])
        weighted = torch.cat([near.narrow(1, *span) for span in self.spans], dim=1) * factors
        gathered, at, sums = ops.gather(weighted, receiver), 0, []
        for start, components in self.parts:
            width = self.channels * components
            both = features.narrow(1, start, width) * gathered.narrow(1, at, width)
            sums.append(both.unflatten(1, (self.channels, components)).sum(-1))
            at += width
        return added(sums)


def _instructions(tp: Any) -> list[tuple[int, int, int]]:
    """Paths of a ``Contracter``, in the order of its weights."""
    if tp.instructions is not None:
        return list(tp.instructions)
    return [
        (i1, i2, io)
        for io, (_, out) in enumerate(tp.irreps_out)
        for i1, (_, first) in enumerate(tp.irreps_in1)
        for i2, (_, second) in enumerate(tp.irreps_in2)
        if out in first * second
    ]


def _by_path(weights: Tensor, channels: int) -> Tensor:
    """Weights of a ``Contracter``, [paths * channels], from [channels, paths] or [paths]."""
    return weights.reshape(-1, weights.shape[-1]).expand(channels, -1).t().flatten()


def _columns(weigher: Any) -> Tensor:
    """For each irrep, the columns of its channels among weights [channels * irreps], or [channels] shared by all."""
    channel, irreps = torch.arange(weigher.multiplicity_out), weigher._num_irreps
    if not weigher.weight_individual_irreps:
        return channel.repeat(irreps)
    return torch.cat([channel * irreps + k for k in range(irreps)])


def _many(irreps: str, channels: int) -> str:
    return "+".join(f"{channels}x{l}{'e' if p == 1 else 'o'}" for _, _, l, p in segments(irreps))


def _environment(harmonics: str, channels: int, alpha: float) -> TensorProduct:
    """Harmonics times weights for each channel, as a product with the number one, which each channel has."""
    degrees = [l for _, _, l, _ in segments(harmonics)]
    paths = tuple(Path(0, k, k, "uvu", k * channels, alpha * sqrt(2 * l + 1)) for k, l in enumerate(degrees))
    weights = len(paths) * channels
    return TensorProduct(f"{channels}x0e", harmonics, _many(harmonics, channels), paths, weights, shared=False)


def _first(tp: Any, channels: int) -> TensorProduct:
    """A ``Contracter`` of weighted harmonics with environments as a product of environments with the harmonics.

    Exchanging two operands multiplies Clebsch-Gordan coefficients by (-1)^(l1 + l2 + l).
    """
    paths = []
    for n, (i1, i2, io) in enumerate(_instructions(tp)):
        l1, l2, l = (irreps[k].ir.l for irreps, k in ((tp.irreps_in1, i1), (tp.irreps_in2, i2), (tp.irreps_out, io)))
        paths.append(Path(i2, i1, io, "uvu", n * channels, (-1.0) ** (l1 + l2 + l) * _norm(tp, l)))
    near, out = _many(str(tp.irreps_in2), channels), _many(str(tp.irreps_out), channels)
    weights = len(paths) * channels
    return TensorProduct(near, str(tp.irreps_in1), out, tuple(paths), weights, shared=False, rounding=_rounding(tp))


def _product(tp: Any, channels: int) -> TensorProduct:
    """A ``Contracter`` of features of edges with environments, channel by channel, with weights that edges share."""
    paths = []
    for n, (i1, i2, io) in enumerate(_instructions(tp)):
        paths.append(Path(i1, i2, io, "uuu", n * channels, _norm(tp, tp.irreps_out[io].ir.l)))
    one, two, out = (_many(str(irreps), channels) for irreps in (tp.irreps_in1, tp.irreps_in2, tp.irreps_out))
    return TensorProduct(one, two, out, tuple(paths), len(paths) * channels, shared=True, rounding=_rounding(tp))


def _norm(tp: Any, l: int) -> float:
    return 1.0 if tp.irrep_normalization is None else sqrt(2 * l + 1)


def _rounding(tp: Any) -> str:
    """``"float32"`` where the stored Clebsch-Gordan coefficients went through float32."""
    values = tp.w3j.double()
    return "float32" if torch.equal(values.float().double(), values) else "float64"


ALLEGRO_RULES: Mapping[str, Rule] = {
    **NEQUIP_RULES,
    "nequip.nn.mlp.ScalarMLP": FieldNetwork,
    "allegro.nn.tensorembed.TwoBodySphericalHarmonicTensorEmbed": TensorEmbedding,
    "allegro.nn._allegro.Allegro_Module": AllegroLayers,
}
