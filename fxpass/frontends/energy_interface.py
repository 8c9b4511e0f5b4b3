"""Potentials from energy functions: by autograd on the function itself, and over lowered programs, which scripts."""

from __future__ import annotations

import inspect
import math
import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..edges import Edges
from ..errors import Location, UnsupportedModelError, UsageError
from ..models import one_hot_species
from ..structures import SYMBOLS

#: what an energy function may take, by name
ARGUMENTS = ("edge_vectors", "edge_index", "node_attrs", "species", "batch", "cell", "positions")
#: inputs of the programs, in order
INPUTS = ("edge_vectors", "edge_index", "node_attrs", "batch", "cell", "positions")
#: Angstrom, where a function takes no edges: how far apart probe structures are made
NO_CUTOFF = 4.0
#: what an energy function must take one of: all else does not change when atoms move
MOVING = {"edge_vectors", "positions"}
#: what attributes of no use make torch and Python raise when they are read
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
SINGLE = "the energy function returns one total energy, so it takes one structure at a time"


class Potential(nn.Module):
    """Energy, forces and stress of an energy function, by autograd: what its drop-in is held against.

    Args:
        energy: a module whose ``forward`` takes some of ``ARGUMENTS`` and returns an energy in eV; see
            ``docs/families/energy_functions.md``.

    Attributes:
        numbers: atomic numbers that it knows.
        cutoff: length from which on it needs no edges, Angstrom.

    Raises:
        UnsupportedModelError: arguments, ``numbers``, ``cutoff`` or ``atoms`` of the module that make no sense.
    """

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        check_attributes(energy)
        self.energy = energy
        self.arguments = argument_names(energy)
        self.numbers = numbers_of(energy)
        self.cutoff = cutoff_of(energy)

    def forward(
        self,
        data: dict[str, Tensor],
        compute_forces: bool = True,
        compute_stress: bool = False,
        training: bool = False,
    ) -> dict[str, Tensor]:
        """Evaluate a batch of structures.

        Args:
            data: ``numbers`` [atoms]; ``positions`` [atoms, 3] and ``cell`` [graphs, 3, 3] in Angstrom, with zeros
                for vectors that are not periodic; ``edge_index`` [2, edges] (sender, receiver); ``shifts`` [edges, 3]
                in Angstrom, such that ``positions[receiver] - positions[sender] + shift`` is the vector of an edge;
                ``batch`` [atoms], the structure of each atom.  ``fxpass.frontends.energy.batch_of`` makes it.
            compute_forces: adds ``forces`` to the result.
            compute_stress: adds ``stress`` and ``virial`` to the result.
            training: the result carries an autograd graph.

        Returns:
            ``energy`` [graphs] in eV; ``node_energy`` [atoms] where the function gives it; ``forces`` [atoms, 3] in
            eV/Angstrom; ``virial`` [graphs, 3, 3] in eV, -dE/dstrain; ``stress`` [graphs, 3, 3] in eV/Angstrom^3,
            dE/dstrain over the volume (not finite where a cell has no volume).

        Raises:
            ValueError: an atomic number that the function does not know, or more structures than it can tell apart.
        """
        positions, index, batch, cell = data["positions"], data["edge_index"], data["batch"], data["cell"]
        atoms = atoms_of(self.energy)
        if atoms and atoms != len(positions):
            raise ValueError(f"the energy function is for {atoms} atoms")
        known = torch.tensor(self.numbers, device=positions.device)
        attrs = one_hot_species(data["numbers"], known, positions.dtype)
        with torch.set_grad_enabled(training or compute_forces or compute_stress):
            displacement = torch.zeros_like(positions, requires_grad=True)
            strain = torch.zeros_like(cell, requires_grad=True)
            deform = torch.eye(3, dtype=cell.dtype, device=cell.device) + 0.5 * (strain + strain.transpose(1, 2))
            moved = torch.bmm((positions + displacement).unsqueeze(1), deform[batch]).squeeze(1)
            vectors = positions[index[1]] - positions[index[0]] + data["shifts"]
            vectors = vectors + displacement[index[1]] - displacement[index[0]]
            vectors = torch.bmm(vectors.unsqueeze(1), deform[batch[index[0]]]).squeeze(1)
            inputs = dict(zip(INPUTS, (vectors, index, attrs, batch, cell @ deform, moved), strict=True))
            value = called(self.energy, self.arguments, inputs)
            per = "total" if value.dim() == 0 else "atom" if value.shape[0] == len(batch) else "graph"
            if per == "atom" and len(batch) == len(cell) and "cell" in self.arguments:  # another cell adds no atom
                with torch.no_grad():
                    more = called(self.energy, self.arguments, {**inputs, "cell": torch.cat([cell, cell[:1]])})
                per = "atom" if more.shape[0] == len(batch) else "graph"
            values = energies(value, per, batch, len(cell))
            result = dict(zip(("energy", "node_energy"), values, strict=False))
            if value.dim() == 0 and len(cell) > 1:
                raise ValueError(SINGLE)
            if compute_forces or compute_stress:
                by = [displacement, strain]
                total, slopes = values[0].sum(), [torch.zeros_like(t) for t in by]
                if total.requires_grad:  # otherwise it depends on nothing, as without edges
                    slopes = list(torch.autograd.grad(total, by, create_graph=training, materialize_grads=True))
                if compute_forces:
                    result["forces"] = -slopes[0]
                if compute_stress:
                    result["virial"] = -slopes[1]
                    result["stress"] = over_volume(slopes[1], cell)
        return result if training else {name: value.detach() for name, value in result.items()}


def check_attributes(energy: Any) -> None:
    """Refuse a module whose arguments or attributes are not those of an energy function.

    Raises:
        UnsupportedModelError: names what it found, and what belongs there.
    """
    if not isinstance(energy, nn.Module):
        raise UnsupportedModelError(f"a {type(energy).__name__} is no energy function", hint="a torch.nn.Module")
    names = argument_names(energy)
    unknown = [name for name in names if name not in ARGUMENTS]
    if unknown or MOVING.isdisjoint(names):
        what = f"its forward takes {', '.join(unknown)}" if unknown else "its forward takes nothing that moves"
        raise refused(what, energy, f"edge_vectors or positions, and others of {', '.join(ARGUMENTS)}")
    numbers_of(energy)
    if not any(t.is_floating_point() for t in chain(energy.parameters(), energy.buffers())):
        raise refused("nothing says which type it computes in", energy, "constants as parameters or buffers")
    if {"edge_vectors", "edge_index"} & set(names) and getattr(energy, "cutoff", None) is None:
        raise refused("it takes edges and has no cutoff", energy, "self.cutoff = 6.0, in Angstrom")
    cutoff_of(energy)
    atoms_of(energy)


def numbers_of(energy: Any) -> list[int]:
    """Atomic numbers that an energy function knows."""
    given = getattr(energy, "numbers", None)
    try:
        found = [operator.index(z) for z in given]  # type: ignore[union-attr]
    except UNREADABLE:
        found = []
    if not found or len(set(found)) < len(found) or not all(0 <= z < len(SYMBOLS) for z in found):
        raise refused(f"its numbers are {given}", energy, "atomic numbers, each once: (1, 8)")
    return found


def cutoff_of(energy: Any) -> float:
    """Length from which on an energy function needs no edges, Angstrom; ``NO_CUTOFF`` where it has none."""
    given = getattr(energy, "cutoff", None)
    try:
        found = NO_CUTOFF if given is None else float(given)
    except UNREADABLE:
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise refused(f"its cutoff is {given}", energy, "a positive length, in Angstrom")
    return found


def atoms_of(energy: Any) -> int:
    """The only number of atoms that an energy function is for; 0 for any."""
    given = getattr(energy, "atoms", None)
    try:
        found = 0 if given is None else operator.index(given)
    except UNREADABLE:
        found = -1
    if found < 0 or (given is not None and found == 0) or isinstance(given, bool):
        raise refused(f"its atoms are {given}", energy, "the number of atoms that it is for, or no such attribute")
    return found


def refused(what: str, energy: Any, hint: str) -> UnsupportedModelError:
    """The error for a module that is no energy function."""
    cls = type(energy)
    where = Location(module_path="(model)", source=f"{cls.__module__}.{cls.__qualname__}")
    return UnsupportedModelError(f"this energy function is not covered: {what}", where=where, hint=hint)


def argument_names(energy: nn.Module) -> list[str]:
    """Names of the arguments of ``energy.forward``."""
    return list(inspect.signature(energy.forward).parameters)


def called(energy: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> Tensor:
    """What ``energy`` returns for the inputs (``INPUTS``) that it asks for."""
    if "species" in names:
        inputs = {**inputs, "species": inputs["node_attrs"].argmax(1)}
    value: Tensor = energy(**{name: inputs[name] for name in names})
    return value


def energies(value: Tensor, per: str, batch: Tensor, graphs: int) -> list[Tensor]:
    """Energies of structures [graphs], and of atoms [atoms] where the function gives them.

    Args:
        value: what the function returned, one for each ``per``, with a trailing dimension of 1 or without.
        per: ``"atom"``, ``"graph"``, or ``"total"`` for a number without dimensions.
    """
    flat = value.reshape(-1) if value.dim() != 1 else value
    if per == "atom":
        return [flat.new_zeros(graphs).index_add(0, batch, flat), flat]
    return [flat]


class EnergyInterface(nn.Module):
    """``forward`` of :class:`Potential` over lowered programs: the same arguments, the same outputs.

    The programs take ``INPUTS`` and return the energy and, where there is one, node_energy; ``forces_program`` after
    them p = dE/d(positions) and q = dE/d(cell), where the function takes these, and g = dE/d(edge vector).  Forces are
    the sum of g over edges sent minus the sum over edges received, minus p; dE/dstrain is the sum of r (x) g over
    edges, x (x) p over atoms and c (x) q over cell vectors, symmetrised.  ``attributes["assumptions"]`` say which edges
    the programs take and in which order (:class:`fxpass.edges.Edges`).
    """

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        self.energy_program = energy
        self.forces_program = forces
        self.cutoff: float = attributes["cutoff"]
        self.edges = Edges(attributes["cutoff"], attributes.get("assumptions", ()))
        self.arguments: list[str] = list(attributes["arguments"])
        self.numbers: list[int] = list(attributes["numbers"])
        self.values: int = 2 if attributes["per"] == "atom" else 1
        self.by_cell: int = self.values if "cell" in self.arguments else 0  # where its gradient is; 0 for none
        self.by_positions: int = self.values + int("cell" in self.arguments) if "positions" in self.arguments else 0
        self.single: bool = attributes["per"] == "total"
        self.atoms: int = attributes.get("atoms", 0)  # 0 for any number
        if self.edges.mask and (self.single or self.atoms > 0):
            raise UsageError(
                "masked edges belong to one more atom in one more structure, and the energy function takes no more",
                hint="preserve-sparsity{beyond_cutoff=drop}, or a function of any atoms that returns their energies",
            )
        self.register_buffer("atomic_numbers", torch.tensor(self.numbers))
        # the first number of all: hosts take its type for that of the model
        self.register_buffer("r_max", torch.tensor(self.cutoff, dtype=getattr(torch, attributes["dtype"])))

    def forward(
        self,
        data: dict[str, Tensor],
        compute_forces: bool = True,
        compute_stress: bool = False,
        training: bool = False,
    ) -> dict[str, Tensor]:
        """Evaluate a batch; arguments, outputs, shapes and units are those of ``Potential.forward``.

        Raises:
            ValueError: an atomic number that the function does not know, or more structures than it can tell apart.
            RuntimeError: an edge shorter than the programs were made for.
        """
        if self.single and data["cell"].size(0) > 1:
            raise ValueError("the energy function returns one total energy, so it takes one structure at a time")
        if self.atoms > 0 and data["positions"].size(0) != self.atoms:
            raise ValueError(f"the energy function is for {self.atoms} atoms")
        if training:
            result = self._evaluate(data, compute_forces, compute_stress)
        else:
            with torch.no_grad():
                result = self._evaluate(data, compute_forces, compute_stress)
        return result

    def _evaluate(self, data: dict[str, Tensor], compute_forces: bool, compute_stress: bool) -> dict[str, Tensor]:
        positions, batch, cell = data["positions"], data["batch"], data["cell"]
        atoms = positions.size(0)
        attrs = one_hot_species(data["numbers"], self.atomic_numbers, positions.dtype)  # type: ignore[arg-type]
        vectors = self.edges.vectors(positions, self.edges.readable(data["edge_index"]), data["shifts"])
        vectors, index, _ = self.edges(vectors, data["edge_index"], atoms)
        attrs, graph, cells = self.edges.with_dummy(attrs, batch, cell)
        places = torch.cat([positions, torch.zeros_like(positions[:1])]) if self.edges.mask else positions
        if compute_forces or compute_stress:
            values: list[Tensor] = self.forces_program(vectors, index, attrs, graph, cells, places)
        else:
            values = self.energy_program(vectors, index, attrs, graph, cells, places)
        result: dict[str, Tensor] = {}
        found = self.edges.without_dummy(values[: self.values])
        result["energy"] = found[0]
        if self.values == 2:
            result["node_energy"] = found[1]
        if compute_forces or compute_stress:
            gradient, index = self.edges.settled(values[-1], index, atoms)
            if compute_forces:
                forces = self.edges.forces(gradient, index, positions)
                if self.by_positions > 0:
                    forces = forces - values[self.by_positions].narrow(0, 0, atoms)
                result["forces"] = forces
            if compute_stress:
                slope = per_graph(vectors, gradient, batch.index_select(0, index[0]), cell)
                if self.by_positions > 0:
                    slope = slope + per_graph(positions, values[self.by_positions].narrow(0, 0, atoms), batch, cell)
                if self.by_cell > 0:
                    slope = slope + torch.bmm(cell.transpose(1, 2), values[self.by_cell].narrow(0, 0, cell.size(0)))
                slope = 0.5 * (slope + slope.transpose(1, 2))
                result["virial"] = -slope
                result["stress"] = over_volume(slope, cell)
        return result


def per_graph(vectors: Tensor, gradient: Tensor, graph: Tensor, like: Tensor) -> Tensor:
    """Sums of vector (x) gradient over the rows of each graph, [graphs, 3, 3]."""
    if like.size(0) == 1:
        return torch.matmul(vectors.t(), gradient).unsqueeze(0)
    outer = vectors.unsqueeze(2) * gradient.unsqueeze(1)
    return torch.zeros_like(like).index_add(0, graph, outer)


def over_volume(slope: Tensor, cell: Tensor) -> Tensor:
    """dE/dstrain [graphs, 3, 3] over the volumes of cells: stress; not finite where a cell has no volume."""
    return slope / torch.linalg.det(cell).abs().view(-1, 1, 1)
