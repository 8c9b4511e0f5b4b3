"""``SmallPotential``'s own ``forward`` over lowered programs; needs no e3nn, and scripts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..edges import Edges
from ..models import edge_vectors, one_hot_species
from .energy_interface import over_volume, per_graph


class BundledInterface(nn.Module):
    """``forward`` of ``SmallPotential``: the same arguments, the same outputs.

    The programs take (edge_vectors, edge_index, species, batch, cell) and return energy and node_energy, and
    ``forces_program`` g = dE/d(edge vector) after them.  Forces are the sum of g over edges sent minus the sum
    over edges received, and dE/dstrain is the sum of r (x) g over the edges, symmetrised.
    ``attributes["assumptions"]`` say which edges the programs take and in which order (:class:`fxpass.edges.Edges`).
    """

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        self.energy_program = energy
        self.forces_program = forces
        self.cutoff: float = attributes["cutoff"]
        self.edges = Edges(attributes["cutoff"], attributes.get("assumptions", ()))
        self.register_buffer("atomic_numbers", torch.tensor(attributes["numbers"]))
        # the first number of all: hosts take its type for that of the model
        self.register_buffer("r_max", torch.tensor(self.cutoff, dtype=getattr(torch, attributes["dtype"])))

    def forward(
        self,
        data: dict[str, Tensor],
        compute_forces: bool = True,
        compute_stress: bool = False,
        training: bool = False,
    ) -> dict[str, Tensor]:
        """Evaluate a batch; arguments, outputs, shapes and units are those of ``SmallPotential.forward``.

        Raises:
            ValueError: an atomic number that the model does not know.
            RuntimeError: an edge shorter than the programs were made for.
        """
        if training:
            result = self._evaluate(data, compute_forces, compute_stress)
        else:
            with torch.no_grad():
                result = self._evaluate(data, compute_forces, compute_stress)
        return result

    def _evaluate(self, data: dict[str, Tensor], compute_forces: bool, compute_stress: bool) -> dict[str, Tensor]:
        positions, batch, cell = data["positions"], data["batch"], data["cell"]
        species = one_hot_species(data["numbers"], self.atomic_numbers, positions.dtype)  # type: ignore[arg-type]
        vectors = edge_vectors(positions, self.edges.readable(data["edge_index"]), data["shifts"])
        vectors, index, _ = self.edges(vectors, data["edge_index"], positions.size(0))
        species, graph, cells = self.edges.with_dummy(species, batch, cell)
        if not (compute_forces or compute_stress):
            energies: list[Tensor] = self.energy_program(vectors, index, species, graph, cells)
            energies = self.edges.without_dummy(energies)
            return {"energy": energies[0], "node_energy": energies[1]}
        values: list[Tensor] = self.forces_program(vectors, index, species, graph, cells)
        energies = self.edges.without_dummy(values[:2])
        result = {"energy": energies[0], "node_energy": energies[1]}
        gradient, index = self.edges.settled(values[2], index, positions.size(0))
        if compute_forces:
            result["forces"] = self.edges.forces(gradient, index, positions)
        if compute_stress:
            total = per_graph(vectors, gradient, batch.index_select(0, index[0]), cell)
            result["stress"] = over_volume(0.5 * (total + total.transpose(1, 2)), cell)
        return result
