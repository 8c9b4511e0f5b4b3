"""``SmallPotential``'s own ``forward`` over lowered programs; needs no e3nn, and scripts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import edge_vectors, one_hot_species


class BundledInterface(nn.Module):
    """``forward`` of ``SmallPotential``: the same arguments, the same outputs.

    The programs take (edge_vectors, edge_index, species, batch, cell) and return energy and node_energy, and
    ``forces_program`` g = dE/d(edge vector) after them.  Forces are the sum of g over edges sent minus the sum
    over edges received, and dE/dstrain is the sum of r (x) g over the edges, symmetrised.
    """

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        self.energy_program = energy
        self.forces_program = forces
        self.cutoff: float = attributes["cutoff"]
        self.register_buffer("atomic_numbers", torch.tensor(attributes["numbers"]))

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
        """
        if training:
            result = self._evaluate(data, compute_forces, compute_stress)
        else:
            with torch.no_grad():
                result = self._evaluate(data, compute_forces, compute_stress)
        return result

    def _evaluate(self, data: dict[str, Tensor], compute_forces: bool, compute_stress: bool) -> dict[str, Tensor]:
        positions, index, batch, cell = data["positions"], data["edge_index"], data["batch"], data["cell"]
        species = one_hot_species(data["numbers"], self.atomic_numbers, positions.dtype)  # type: ignore[arg-type]
        vectors = edge_vectors(positions, index, data["shifts"])
        if not (compute_forces or compute_stress):
            energies: list[Tensor] = self.energy_program(vectors, index, species, batch, cell)
            return {"energy": energies[0], "node_energy": energies[1]}
        values: list[Tensor] = self.forces_program(vectors, index, species, batch, cell)
        result = {"energy": values[0], "node_energy": values[1]}
        gradient = values[2]
        if compute_forces:
            sent = torch.zeros_like(positions).index_add(0, index[0], gradient)
            result["forces"] = sent.index_add(0, index[1], gradient, alpha=-1)
        if compute_stress:
            outer = vectors.unsqueeze(2) * gradient.unsqueeze(1)
            total = torch.zeros_like(cell).index_add(0, batch.index_select(0, index[0]), outer)
            volume = torch.linalg.det(cell).abs().view(-1, 1, 1)
            result["stress"] = 0.5 * (total + total.transpose(1, 2)) / volume
        return result
