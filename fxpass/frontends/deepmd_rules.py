"""Descriptors of deepmd-kit as sums over edges, and any other of them on neighbours padded to a fixed number.

deepmd-kit lists the neighbours of an atom in a row of fixed width (``sel``), filled up with empty places.  In an empty
place the environment matrix is what a neighbour beyond the cutoff would give, which is not zero where the statistics
have a mean.  So a sum over places is a sum over edges, plus what an empty place gives times the number of them.

Edge vectors run from the neighbour (the sender) to the centre (the receiver), against those of deepmd-kit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.multilinear import Path, TensorProduct
from ..capture.rules import qualified
from ..ir import ops
from ..ir.grouped import linear_by_species

PACKAGE = "deepmd.pt.model.descriptor"


class Dense(nn.Module):
    """``MLPLayer``: one product of matrices whatever the number of dimensions, with no size of a batch in the graph."""

    def __init__(self, layer: Any, path: str = "") -> None:
        super().__init__()
        self.matrix, self.bias, self.idt = layer.matrix, layer.bias, layer.idt
        self.activate, self.resnet, self.prec = layer.activate, layer.resnet, layer.prec
        self.num_in, self.num_out = layer.num_in, layer.num_out

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in the type of ``x``."""
        narrow = x.to(self.prec)
        rows = narrow if x.dim() == 2 else narrow.flatten(0, -2)
        y = torch.mm(rows, self.matrix) if self.bias is None else torch.addmm(self.bias, rows, self.matrix)
        y = self.activate(y)
        if self.idt is not None:
            y = y * self.idt
        if self.resnet and self.num_in == self.num_out:
            y = y + rows
        elif self.resnet and 2 * self.num_in == self.num_out:
            y = y + torch.cat([rows, rows], dim=-1)
        return (y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])).to(x.dtype)


RULES = {"deepmd.pt.model.network.mlp.MLPLayer": Dense}


class ByType(nn.Module):
    """Networks of one shape, one for each type: every atom goes through the network of its own type alone."""

    def __init__(self, networks: Any) -> None:
        super().__init__()
        self.layers = [network.layers for network in networks]

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        """[atoms, inputs] and types [atoms] -> [atoms, outputs]."""
        for same in zip(*self.layers, strict=True):
            first: Any = same[0]
            weight = torch.stack([layer.matrix for layer in same])
            y = linear_by_species(x, weight, kinds, False)
            if first.bias is not None:
                y = y + ops.gather(torch.stack([layer.bias for layer in same]), kinds)
            y = first.activate(y)
            if first.idt is not None:
                y = y * ops.gather(torch.stack([layer.idt for layer in same]), kinds)
            if first.resnet and first.num_in == first.num_out:
                y = y + x
            elif first.resnet and 2 * first.num_in == first.num_out:
                y = y + torch.cat([x, x], dim=-1)
            x = y
        return x


class Fitting(nn.Module):
    """``EnergyFittingNet``: a network for each type of atom, or one for all; less the vacuum's energy, plus a bias.

    Args:
        fitting: the module.
        out_bias: [types, 1], the energy that the model adds to an atom of each type.
        counted: [types], 0 where atoms have no energy.
    """

    def __init__(self, fitting: Any, out_bias: Tensor, counted: Tensor) -> None:
        super().__init__()
        self.networks = fitting.filter_layers.networks
        self.by_type = None if len(self.networks) == 1 else ByType(self.networks)
        self.prec: torch.dtype = fitting.prec
        vacuum = fitting.remove_vaccum_contribution
        kept = [vacuum is None or (len(vacuum) > k and not vacuum[k]) for k in range(len(self.networks))]
        self.from_vacuum = [not one for one in kept]
        self.bias = nn.Buffer(fitting.bias_atom_e.detach())
        self.included = nn.Buffer((_counted(fitting.emask, fitting.ntypes) * counted).unsqueeze(1))
        self.out_bias = nn.Buffer((out_bias.double().view(-1) * counted).unsqueeze(1))

    def forward(self, columns: Tensor, hot: Tensor) -> Tensor:
        """Invariants [atoms, columns] and one-hot types -> energies [atoms], float64."""
        x, here = columns.to(self.prec), hot.to(self.prec)
        y = self.networks[0](x) if self.by_type is None else self.by_type(x, torch.argmax(hot, dim=1))
        y = y + here @ self.bias.to(self.prec)
        if any(self.from_vacuum):
            nothing = x.new_zeros((1, columns.shape[1]))
            empty = torch.cat([network(nothing) for network in self.networks])
            empty = empty * empty.new_tensor(self.from_vacuum).unsqueeze(1)
            y = y - (empty if self.by_type is None else here @ empty)
        y = y * (here @ self.included.to(self.prec))
        return (y.to(torch.float64) + hot.to(torch.float64) @ self.out_bias).squeeze(1)


class EdgeSum(nn.Module):
    """What the sums of all descriptors share: environment, exclusions, and the product of networks and environment.

    With s the smooth inverse distance and R = (s, s x/r, s y/r, s z/r), normalised by the type of the centre, an atom
    has the matrix of 4 components sum_j R_ij (x) G(s_ij), where G is an embedding network that may depend on the types
    of both ends (Zhang et al., NeurIPS 2018, Eq. 5-7).

    Args:
        block: the module with the descriptor's networks and statistics.
        excluded: pairs of types whose edges the whole model leaves out.
    """

    def __init__(self, block: Any, excluded: Tensor) -> None:
        super().__init__()
        self.types: int = block.ntypes
        self.rcut, self.rcut_smth = float(block.rcut), float(block.rcut_smth)
        self.protection = float(block.env_protection)
        self.places: int = block.nnei
        self.channels: int = block.filter_neuron[-1]
        self.mean = nn.Buffer(_same_rows_once(block.mean[:, 0].detach()))  # [types or 1, components]
        self.deviation = nn.Buffer(_same_rows_once(block.stddev[:, 0].detach()))
        own = _included(block.emask, self.types)
        self.own = _unless_all(own, self.mean.dtype)
        self.whole = _unless_all(excluded, self.mean.dtype)
        self.both = _unless_all(own * excluded, self.mean.dtype)
        columns = "+".join([f"{self.channels}x0e"] * 4)
        paths = tuple(Path(0, k, k, "uvu", 0, 1.0) for k in range(4))
        first, second = f"{self.channels}x0e", "+".join(["1x0e"] * 4)
        self.spec = str(TensorProduct(first, second, columns, paths, self.channels, shared=False))

    def ends(self, hot: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot types of centres and neighbours, [edges, types]."""
        return ops.gather(hot, index[1]), ops.gather(hot, index[0])

    def environment(self, vectors: Tensor, centre: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised s [edges, 1], its vector [edges, 3] (empty for one component), and the switch [edges, 1]."""
        length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True) + self.protection
        bare = length - self.protection if self.protection else length
        u = (bare.clamp(self.rcut_smth, self.rcut) - self.rcut_smth) / (self.rcut - self.rcut_smth)
        switch = u * u * u * (-6 * u * u + 15 * u - 10) + 1
        mean, deviation = self.of_centre(self.mean, centre), self.of_centre(self.deviation, centre)
        s = (switch / length - mean[:, :1]) / deviation[:, :1]
        if components == 1:
            return s, s[:, :0], switch
        return s, -vectors * (switch / (length * length)) / deviation[:, 1:2], switch

    def of_centre(self, table: Tensor, centre: Tensor) -> Tensor:
        """Rows of a table by type; the same row for all edges where types do not differ in it."""
        return table if table.shape[0] == 1 else centre @ table

    def included(self, table: Tensor | None, centre: Tensor, neighbour: Tensor) -> Tensor | None:
        """1 for edges [edges, 1] between types that interact, else 0; None where all do."""
        return None if table is None else ((centre @ table) * neighbour).sum(1, keepdim=True)

    def matrix(self, s: Tensor, direction: Tensor, g: Tensor, index: Tensor, atoms: int) -> Tensor:
        """sum_j R_ij (x) G_ij, [atoms, 4, channels]."""
        one = s.new_ones((atoms, self.channels))
        y = torch.cat([s, direction], dim=1)
        messages = ops.tensor_product(ops.gather(one, index[0]), y, g, None, self.spec, "out")
        return ops.scatter_sum(messages, index[1], atoms).view(-1, 4, self.channels)

    def invariants(self, matrix: Tensor, axis: int) -> Tensor:
        """Products of components, summed: [atoms, channels * axis]."""
        matrix = matrix / self.places
        return torch.bmm(matrix.transpose(1, 2), matrix[:, :, :axis]).flatten(1)


class SmoothEdition(EdgeSum):
    """``DescrptSeA`` (se_e2_a): a network for each type of neighbour, or for each pair of types."""

    def __init__(self, descriptor: Any, excluded: Tensor) -> None:
        block = descriptor.sea
        super().__init__(block, excluded)
        self.networks = block.filter_layers.networks
        self.one_side: bool = block.type_one_side
        self.axis: int = block.axis_neuron
        self.sel = nn.Buffer(torch.tensor(block.sel, dtype=self.mean.dtype))
        self.centred = bool((self.mean == 0).all())

    def forward(self, vectors: Tensor, index: Tensor, hot: Tensor) -> Tensor:
        """Edge vectors [edges, 3], (sender, receiver) and one-hot types [atoms, types] -> [atoms, columns]."""
        atoms = hot.shape[0]
        centre, neighbour = self.ends(hot, index)
        s, direction, _ = self.environment(vectors, centre, 4)
        whole = self.included(self.whole, centre, neighbour)
        own = self.included(self.both, centre, neighbour)
        if own is not None:
            s, direction = s * own, direction * own
        matrix = self.matrix(s, direction, self.embedded(s, centre, neighbour), index, atoms)
        if not self.centred:
            listed = neighbour if whole is None else neighbour * whole
            empty = self.sel - ops.scatter_sum(listed, index[1], atoms)
            first = matrix[:, 0] + self.of_empty_places(hot, empty)
            matrix = torch.cat([first.unsqueeze(1), matrix[:, 1:]], dim=1)
        return self.invariants(matrix, self.axis)

    def network(self, neighbour: int, centre: int) -> Any:
        return self.networks[neighbour if self.one_side else neighbour * self.types + centre]

    def embedded(self, s: Tensor, centre: Tensor, neighbour: Tensor) -> Tensor:
        """G [edges, channels] of the network that belongs to the types of each edge."""
        if self.types == 1:
            return self.networks[0](s)
        total: Any = 0
        for k in range(self.types):
            mine = neighbour[:, k : k + 1]
            if self.one_side:
                total = total + mine * self.networks[k](s)
                continue
            for c in range(self.types):
                total = total + mine * centre[:, c : c + 1] * self.network(k, c)(s)
        return total

    def of_empty_places(self, hot: Tensor, empty: Tensor) -> Tensor:
        """What ``empty`` [atoms, types] places for neighbours add to the first component, [atoms, channels]."""
        s = (-self.mean[:, :1] / self.deviation[:, :1]).expand(self.types, 1)  # of the centre
        total: Any = 0
        for k in range(self.types):
            each = torch.cat([s[c : c + 1] * self.network(k, c)(s[c : c + 1]) for c in range(self.types)])
            total = total + empty[:, k : k + 1] * (hot @ each)
        return total


class RadialEdition(EdgeSum):
    """``DescrptSeR`` (se_e2_r): sums of embedding networks, one for each type of neighbour."""

    def __init__(self, descriptor: Any, excluded: Tensor) -> None:
        super().__init__(descriptor, excluded)
        self.networks = descriptor.filter_layers.networks
        self.sel = list(descriptor.sel)
        paths = (Path(0, 0, 0, "uvu", 0, 1.0),)
        columns = f"{self.channels}x0e"
        self.spec = str(TensorProduct(columns, "1x0e", columns, paths, self.channels, shared=False))

    def forward(self, vectors: Tensor, index: Tensor, hot: Tensor) -> Tensor:
        """Edge vectors [edges, 3], (sender, receiver) and one-hot types [atoms, types] -> [atoms, channels]."""
        atoms = hot.shape[0]
        centre, neighbour = self.ends(hot, index)
        s, _, _ = self.environment(vectors, centre, 1)
        own = self.included(self.own, centre, neighbour)
        if own is not None:
            s = s * own
        nowhere = -self.mean[:, :1] / self.deviation[:, :1]
        beyond = self.of_centre(nowhere, centre)
        nowhere = nowhere.expand(self.types, 1)
        g: Any = 0
        full: Any = 0
        for k, network in enumerate(self.networks):
            more = network(s) - network(beyond)
            g = g + (more if self.types == 1 else neighbour[:, k : k + 1] * more)
            full = full + self.sel[k] * network(nowhere)
        whole = self.included(self.whole, centre, neighbour)
        if whole is not None:
            g = g * whole
        one = s.new_ones((atoms, self.channels))
        y = torch.ones_like(s)
        messages = ops.tensor_product(ops.gather(one, index[0]), y, g, None, self.spec, "out")
        total = hot @ full + ops.scatter_sum(messages, index[1], atoms)
        return total / self.places / 5.0  # deepmd-kit's own scale


class TypeEmbedded(EdgeSum):
    """``DescrptDPA1`` (se_atten, se_atten_v2) without attention: one network, which types enter as embeddings."""

    def __init__(self, descriptor: Any, excluded: Tensor) -> None:
        block = descriptor.se_atten
        super().__init__(block, excluded)
        self.network = block.filter_layers.networks[0]
        self.strip = block.filter_layers_strip.networks[0] if block.tebd_input_mode == "strip" else None
        self.embedding = descriptor.type_embedding
        self.one_side: bool = block.type_one_side
        self.smooth: bool = block.smooth
        self.axis: int = block.axis_neuron
        self.joined: bool = descriptor.concat_output_tebd

    def forward(self, vectors: Tensor, index: Tensor, hot: Tensor) -> Tensor:
        """Edge vectors [edges, 3], (sender, receiver) and one-hot types [atoms, types] -> [atoms, columns]."""
        centre, neighbour = self.ends(hot, index)
        s, direction, switch = self.environment(vectors, centre, 4)
        included = self.included(self.both, centre, neighbour)
        if included is not None:
            s, direction, switch = s * included, direction * included, switch * included
        embeddings = self.embedding.get_full_embedding(vectors.device)[: self.types]
        types = [neighbour @ embeddings] if self.one_side else [neighbour @ embeddings, centre @ embeddings]
        if self.strip is None:
            g = self.network(torch.cat([s, *types], dim=1))
        else:
            gate = self.strip(torch.cat(types, dim=1))
            bare = self.network(s)
            g = bare * (gate * switch if self.smooth else gate) + bare
        invariants = self.invariants(self.matrix(s, direction, g, index, hot.shape[0]), self.axis)
        return torch.cat([invariants, hot @ embeddings], dim=1) if self.joined else invariants


class Padded(nn.Module):
    """Any descriptor as it is, on rows of neighbours made of the edges.

    Its atoms sit at the origin, and every place of a row has an atom of its own, at the end of the edge that is in it
    or at the origin where there is none; so differences of positions are edge vectors, exactly.  Places are filled as
    deepmd-kit fills them: by type where the descriptor keeps types apart, and the nearest first.
    """

    def __init__(self, descriptor: Any, excluded: Tensor) -> None:
        super().__init__()
        self.descriptor = descriptor
        sel = list(descriptor.get_sel())
        self.types: int = descriptor.get_ntypes()
        self.apart: bool = not descriptor.mixed_types()
        self.places = sum(sel)
        self.first = nn.Buffer(torch.tensor([sum(sel[:k]) for k in range(len(sel))]))
        self.whole = _unless_all(excluded, torch.int64)

    def forward(self, vectors: Tensor, index: Tensor, hot: Tensor) -> Tensor:
        """Edge vectors [edges, 3], (sender, receiver) and one-hot types [atoms, types] -> [atoms, columns]."""
        neighbour, centre = index
        atoms, places = hot.shape[0], self.places
        kinds = torch.argmax(hot, dim=1)
        row = centre * self.types + kinds[neighbour] if self.apart else centre
        near = torch.argsort(torch.linalg.vector_norm(vectors.detach(), dim=1), stable=True)
        order = near[torch.argsort(row[near], stable=True)]
        ranks = torch.arange(index.shape[1], device=row.device)
        rows = atoms * self.types if self.apart else atoms
        counts = ops.scatter_sum(torch.ones_like(row), row, rows)
        rank = torch.zeros_like(row).index_put([order], ranks) - (counts.cumsum(0) - counts)[row]
        place = centre * places + rank + (self.first[kinds[neighbour]] if self.apart else 0)
        filled = torch.ones_like(row)
        if self.whole is not None:
            filled = self.whole.view(-1)[kinds[centre] * self.types + kinds[neighbour]]
        occupied = ops.scatter_sum(filled, place, atoms * places)
        numbers = atoms + torch.arange(atoms * places, device=row.device)
        nlist = torch.where(occupied > 0, numbers, -1).view(1, -1, places)
        ghosts = ops.scatter_sum(-vectors, place, atoms * places)
        owners = ops.scatter_sum(neighbour, place, atoms * places)
        mapping = torch.cat([torch.arange(atoms, device=row.device), owners])
        positions = torch.cat([vectors.new_zeros((atoms, 3)), ghosts])
        types = kinds[mapping].unsqueeze(0)
        result = self.descriptor(positions.unsqueeze(0), types, nlist, mapping=mapping.unsqueeze(0))
        return result[0].squeeze(0)


class Together(nn.Module):
    """``DescrptHybrid``: the columns of several descriptors side by side."""

    def __init__(self, descriptor: Any, excluded: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(stand_in(part, excluded) for part in descriptor.descrpt_list)

    def forward(self, vectors: Tensor, index: Tensor, hot: Tensor) -> Tensor:
        """Edge vectors [edges, 3], (sender, receiver) and one-hot types [atoms, types] -> [atoms, columns]."""
        return torch.cat([part(vectors, index, hot) for part in self.parts], dim=1)


def stand_in(descriptor: Any, excluded: Tensor) -> nn.Module:
    """A descriptor as a function of (edge vectors, index, one-hot types): a sum over edges where it is one.

    Args:
        excluded: [types, types], 0 for pairs whose edges the model leaves out.
    """
    kind = qualified(type(descriptor))
    if kind == f"{PACKAGE}.hybrid.DescrptHybrid":
        return Together(descriptor, excluded)
    if kind == f"{PACKAGE}.se_a.DescrptSeA" and uniform(descriptor.sea):
        return SmoothEdition(descriptor, excluded)
    if kind == f"{PACKAGE}.se_r.DescrptSeR" and uniform(descriptor):
        return RadialEdition(descriptor, excluded)
    if hasattr(descriptor, "se_atten"):
        block = descriptor.se_atten
        if block.attn_layer == 0 and block.lmax == 1 and uniform(block):
            return TypeEmbedded(descriptor, excluded)
    return Padded(descriptor, excluded)


def uniform(block: Any) -> bool:
    """Whether a block's statistics depend on the type of the centre alone, as deepmd-kit makes them."""
    mean, deviation = block.mean, block.stddev
    same = bool((mean == mean[:, :1]).all()) and bool((deviation == deviation[:, :1]).all())
    return same and bool((mean[..., 1:] == 0).all()) and bool((deviation[..., 1:] == deviation[..., 1:2]).all())


def _same_rows_once(table: Tensor) -> Tensor:
    return table[:1] if bool((table == table[:1]).all()) else table


def _unless_all(table: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if bool((table == 1).all()) else nn.Buffer(table.to(dtype))


def _included(mask: Any, types: int) -> Tensor:
    """1 for pairs of types [centre, neighbour] that interact, else 0, of a ``PairExcludeMask`` or None."""
    if mask is None or mask.no_exclusion:
        return torch.ones(types, types)
    return mask.type_mask.view(types + 1, types + 1)[:types, :types].clone()


def _counted(mask: Any, types: int) -> Tensor:
    """1 for types whose atoms have an energy, else 0, of an ``AtomExcludeMask`` or None."""
    return torch.ones(types, dtype=torch.float64) if mask is None else mask.get_type_mask().double()


def counted_types(atomic: Any, types: int) -> Tensor:
    """1 for types whose atoms have an energy in the whole model, else 0, float64."""
    return _counted(atomic.atom_excl, types)


def excluded_pairs(atomic: Any, types: int) -> Tensor:
    """1 for pairs of types that the whole model lets interact, else 0."""
    return _included(atomic.pair_excl, types)
