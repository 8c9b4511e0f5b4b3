"""MACE's own ``forward`` over lowered programs; needs neither mace-torch nor e3nn, and scripts."""

# TorchScript reads the annotations and knows no strict zip.
# ruff: noqa: B905, UP006, UP035, UP045

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..edges import Edges


class AtomicEnergies(nn.Module):
    """Energy of isolated atoms, eV: one-hot [atoms, species] -> [atoms, heads]."""

    def __init__(self, energies: Tensor) -> None:
        super().__init__()
        self.atomic_energies = nn.Parameter(energies, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.atomic_energies.t().to(x.dtype))


class MaceInterface(nn.Module):
    """``forward`` of ``MACE`` and ``ScaleShiftMACE``: the same arguments, the same outputs.

    The two programs take (edge_vectors, edge_index, node_attrs, batch, head) and return a tuple: the
    outputs named in ``names``, and for ``forces_program`` dE/d(edge vector) after them.  With
    g_ij = dE/dr_ij and r_ij = r_receiver - r_sender + shift, forces are the sum of g over edges sent minus
    the sum over edges received, and the virial is sum r_ij (x) g_ij, symmetrised.  ``attributes["assumptions"]``
    say which edges the programs take and in which order (:class:`fxpass.edges.Edges`).
    """

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any, names: List[str]) -> None:
        super().__init__()
        dtype = getattr(torch, attributes["dtype"])
        # first of all parameters: hosts take the type of the first for that of the model
        self.atomic_energies_fn = AtomicEnergies(torch.tensor(attributes["atomic_energies"], dtype=dtype))
        self.energy_program = energy
        self.forces_program = forces
        self.edges = Edges(attributes["cutoff"], attributes.get("assumptions", ()))
        self.names: List[str] = names
        self.species: int = len(attributes["numbers"])
        self.heads: List[str] = list(attributes["heads"])
        self.interaction: bool = "interaction_energy" in names
        self.register_buffer("r_max", torch.tensor(attributes["cutoff"], dtype=dtype))
        self.register_buffer("atomic_numbers", torch.tensor(attributes["numbers"], dtype=torch.int64))
        self.register_buffer("num_interactions", torch.tensor(attributes["num_interactions"]))

    def forward(
        self,
        data: Dict[str, Tensor],
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        compute_displacement: bool = False,
        compute_hessian: bool = False,
        compute_edge_forces: bool = False,
        compute_atomic_stresses: bool = False,
        lammps_mliap: bool = False,
    ) -> Dict[str, Optional[Tensor]]:
        """Evaluate a batch; arguments, outputs, shapes and units are MACE's.

        With ``training`` (or ``compute_hessian``) the outputs carry an autograd graph.

        Raises:
            RuntimeError: ``lammps_mliap`` (the ML-IAP interface exchanges features between ranks inside
                the model, which a compiled program does not do), species attributes that are not one-hot, or an edge
                shorter than the programs were made for.
        """
        if lammps_mliap:
            raise RuntimeError("fxpass: lammps_mliap=True is not covered; use the original model there")
        positions = data["positions"]
        attrs = data["node_attrs"]
        if attrs.size(1) != self.species or not torch.equal(attrs.amax(dim=1), attrs.sum(dim=1)):
            raise RuntimeError("fxpass: node_attrs must be one-hot over the model's species")
        batch, given = data["batch"], self.edges.readable(data["edge_index"])
        graphs = data["ptr"].numel() - 1
        head = data["head"] if "head" in data else torch.zeros(graphs, dtype=torch.int64, device=batch.device)
        derive = compute_force or compute_virials or compute_stress or compute_hessian or compute_edge_forces
        derive = derive or (compute_atomic_stresses and self.interaction)
        record = training or compute_hessian
        if record:
            positions.requires_grad_(True)

        displacement = torch.zeros((graphs, 3, 3), dtype=positions.dtype, device=positions.device)
        shifts = data["shifts"]
        strained = positions
        if compute_virials or compute_stress or compute_displacement:
            cell = data["cell"].view(-1, 3, 3)
            if "displacement" in data:
                displacement = data["displacement"]
                strain = 0.5 * (displacement + displacement.transpose(-1, -2))
                strained = positions + torch.bmm(positions.unsqueeze(1), strain[batch]).squeeze(1)
                cell = cell + torch.matmul(cell, strain)
            shifts = self._shifts(data["unit_shifts"], cell, batch, given)
        vectors = self.edges.vectors(strained, given, shifts)
        vectors, index, order = self.edges(vectors, data["edge_index"], positions.size(0))

        if record:
            values, gradient = self._run(derive, vectors, index, attrs, batch, head)
        else:
            with torch.no_grad():
                values, gradient = self._run(derive, vectors.detach(), index, attrs, batch, head)

        result: Dict[str, Optional[Tensor]] = {}
        for name, value in zip(self.names, values):
            result[name] = value
        for name in ("forces", "edge_forces", "virials", "stress", "atomic_virials", "atomic_stresses", "hessian"):
            result[name] = None
        result["displacement"] = displacement
        if gradient is not None:
            gradient, index = self.edges.settled(gradient, index, positions.size(0))
            tensors = compute_virials or compute_stress
            if compute_force or tensors:
                forces = self.edges.forces(gradient, index, positions)
                if tensors and "displacement" in data:  # chain rule through strained positions
                    strain = 0.5 * (displacement + displacement.transpose(-1, -2))
                    forces = forces + torch.bmm(forces.unsqueeze(1), strain[batch].transpose(1, 2)).squeeze(1)
                result["forces"] = forces
            if tensors:
                unstrained = vectors
                if "displacement" in data:
                    unstrained = positions.index_select(0, given[1]) - positions.index_select(0, given[0])
                    cell = data["cell"].view(-1, 3, 3)
                    unstrained = unstrained + self._shifts(data["unit_shifts"], cell, batch, given)
                    if order is not None:
                        unstrained = unstrained.index_select(0, order)
                cell = data["cell"]
                virials, stress = self._virials(unstrained, gradient, index, batch, cell, graphs, compute_stress)
                result["virials"] = virials
                result["stress"] = stress
            if compute_edge_forces or (compute_atomic_stresses and self.interaction):
                result["edge_forces"] = self.edges.restored(gradient, order, given.size(1))
                if compute_atomic_stresses:
                    per_atom = self._atomic_virials(vectors, gradient, index, positions.size(0), batch, data["cell"])
                    result["atomic_virials"] = per_atom[0]
                    result["atomic_stresses"] = per_atom[1]
            if compute_hessian and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                result["hessian"] = self._hessian(result["forces"], positions)
        return result

    def _run(
        self, derive: bool, vectors: Tensor, index: Tensor, attrs: Tensor, batch: Tensor, head: Tensor
    ) -> Tuple[List[Tensor], Optional[Tensor]]:
        attrs, batch, head = self.edges.with_dummy(attrs, batch, head)
        if not derive:
            energies: List[Tensor] = self.energy_program(vectors, index, attrs, batch, head)
            return self.edges.without_dummy(energies), None
        values: List[Tensor] = self.forces_program(vectors, index, attrs, batch, head)
        return self.edges.without_dummy(values[:-1]), values[-1]

    def _shifts(self, unit_shifts: Tensor, cell: Tensor, batch: Tensor, index: Tensor) -> Tensor:
        """Shifts [edges, 3] in Angstrom of shifts in units of the cell vectors [graphs, 3, 3]."""
        if cell.size(0) == 1:
            return torch.matmul(unit_shifts, cell[0])
        edge_cell = cell.index_select(0, batch.index_select(0, index[0]))
        return torch.bmm(unit_shifts.unsqueeze(1), edge_cell).squeeze(1)

    def _virials(
        self,
        vectors: Tensor,
        gradient: Tensor,
        index: Tensor,
        batch: Tensor,
        cell: Tensor,
        graphs: int,
        compute_stress: bool,
    ) -> Tuple[Tensor, Tensor]:
        """Virials (eV) and stress (eV/Angstrom^3), [graphs, 3, 3]; stress is zero where not asked for."""
        if graphs == 1:
            total = torch.matmul(vectors.t(), gradient).unsqueeze(0)
        else:
            outer = vectors.unsqueeze(2) * gradient.unsqueeze(1)
            empty = torch.zeros((graphs, 3, 3), dtype=vectors.dtype, device=vectors.device)
            total = empty.index_add(0, batch.index_select(0, index[0]), outer)
        total = 0.5 * (total + total.transpose(1, 2))
        stress = torch.zeros_like(total)
        if compute_stress:
            volume = torch.linalg.det(cell.view(-1, 3, 3)).abs()
            stress = total / volume.view(-1, 1, 1)
            stress = torch.where(torch.abs(stress) < 1e10, stress, torch.zeros_like(stress))
        return -1 * total, stress

    def _atomic_virials(
        self, vectors: Tensor, gradient: Tensor, index: Tensor, atoms: int, batch: Tensor, cell: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Per-atom virials (eV) and stresses (eV/Angstrom^3), [atoms, 3, 3]: half of each edge to either end."""
        outer = gradient.unsqueeze(2) * vectors.unsqueeze(1)
        empty = torch.zeros((atoms, 3, 3), dtype=vectors.dtype, device=vectors.device)
        total = (empty.index_add(0, index[0], outer) + empty.index_add(0, index[1], outer)) / 2
        total = (total + total.transpose(1, 2)) / 2
        volume = torch.linalg.det(cell.view(-1, 3, 3)).abs()
        stress = total / volume.index_select(0, batch).view(-1, 1, 1)
        stress = torch.where(torch.abs(stress) < 1e10, stress, torch.zeros_like(stress))
        return -1 * total, stress

    @torch.jit.unused
    def _hessian(self, forces: Optional[Tensor], positions: Tensor) -> Tensor:
        """-dF/dr, [3 atoms, atoms, 3], eV/Angstrom^2, one row at a time."""
        assert forces is not None
        rows = [
            torch.autograd.grad(-component, positions, retain_graph=True)[0] for component in forces.reshape(-1)
        ]
        return torch.stack(rows)
