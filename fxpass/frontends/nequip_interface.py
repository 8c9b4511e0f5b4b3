"""The ``forward`` of NequIP's models over lowered programs; needs neither nequip nor e3nn, and scripts."""

# TorchScript reads the annotations.
# ruff: noqa: UP006, UP035

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..edges import Edges


class NequipInterface(nn.Module):
    """``forward`` of ``GraphModel``: an ``AtomicDataDict`` in, the same keys and the model's predictions out.

    NequIP's ``edge_index`` has centres in row 0 and neighbours in row 1, and its vectors run from centre to neighbour:
    messages go the other way, so centres are receivers.  The two programs take (edge_vectors, edge_index, node_attrs,
    batch, num_atoms), with r_ij = r_receiver - r_sender + shift in the type of the weights, or in float64 for a pair
    potential, which NequIP adds in float64.  They return a tuple: total and atomic energies, and for
    ``forces_program`` g_ij = dE/dr_ij after them.  Forces are the sum of g over edges sent minus the sum over edges
    received, and dE/d(strain) is sum r_ij (x) g_ij, symmetrised.  Both are summed in the type of the positions.
    """

    zero: Tensor  # of the type of the weights
    origin: Tensor  # of the type in which programs take edge vectors

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        self.forces_program = forces  # forces are always asked for, so ``energy`` is not
        self.edges = Edges(attributes["cutoff"], attributes.get("assumptions", ()))
        self.type_names: List[str] = list(attributes["type_names"])
        self.metadata: Dict[str, str] = dict(attributes["metadata"])
        self.types: int = len(self.type_names)
        self.kept: List[str] = list(attributes["inputs"])
        dtype = getattr(torch, attributes["dtype"])
        self.register_buffer("zero", torch.zeros((), dtype=dtype), persistent=False)
        given = torch.float64 if attributes["precise_vectors"] else dtype
        self.register_buffer("origin", torch.zeros((), dtype=given), persistent=False)

    def forward(self, data: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Evaluate one frame, or a batch (``batch`` [atoms] and ``num_atoms`` [frames]).

        Args:
            data: atom_types [atoms] and edge_index [2, edges] int64; pos [atoms, 3] and, where there is a cell, cell
                [frames, 3, 3] and edge_cell_shift [edges, 3] (Angstrom, Angstrom, whole numbers); or edge_vectors
                [edges, 3] (Angstrom, centre to neighbour) in place of positions.

        Returns:
            What was given of the model's inputs, and: total_energy [frames, 1] and atomic_energy [atoms, 1] in eV;
            forces [atoms, 3] in eV/Angstrom, virial [frames, 3, 3] in eV, stress [frames, 3, 3] in eV/Angstrom^3, empty
            without a cell and NaN for one without a volume.  For given edge_vectors: edge_forces [edges, 3],
            dE/d(edge vector) in eV/Angstrom, in place of the latter.

        Raises:
            RuntimeError: ``lmp_mliap_data`` (the ML-IAP interface exchanges features between ranks inside the model,
                which a compiled program does not do), a type that the model does not know, or an edge shorter than
                the programs were made for.
        """
        if "lmp_mliap_data" in data:
            raise RuntimeError("fxpass: lmp_mliap_data is not covered; use the original model there")
        result: Dict[str, Tensor] = {}
        for name in self.kept:
            if name in data:
                result[name] = data[name]
        types = data["atom_types"].view(-1)
        if types.numel() > 0 and (int(types.min()) < 0 or int(types.max()) >= self.types):
            raise RuntimeError(f"fxpass: atom_types must be below {self.types}, the number of types of this model")
        attrs = torch.nn.functional.one_hot(types, self.types).to(self.zero.dtype)
        if "batch" in data and "num_atoms" in data:  # one alone says nothing to NequIP either
            counts = data["num_atoms"].view(-1)
        else:
            counts = torch.full([1], types.size(0), dtype=torch.int64, device=types.device)
        batch = data["batch"].view(-1) if "batch" in data else torch.zeros_like(types)

        index = data["edge_index"].flip(0)
        readable = self.edges.readable(index)
        whole = "edge_vectors" not in data
        vectors = self._vectors(data, readable, batch) if whole else -data["edge_vectors"]
        precise, index, order = self.edges(vectors, index, types.size(0))
        vectors = precise.to(self.origin.dtype)
        if self.training:
            values, gradient = self._run(vectors, index, attrs, batch, counts)
        else:
            with torch.no_grad():
                values, gradient = self._run(vectors.detach(), index, attrs, batch, counts)
        result["total_energy"] = values[0]
        result["atomic_energy"] = values[1]
        gradient, index = self.edges.settled(gradient.to(precise.dtype), index, types.size(0))
        if whole:
            result["forces"] = self.edges.forces(gradient, index, data["pos"])
            strain = self._strain(precise, gradient, index, batch, counts.size(0))
            result["virial"] = -strain
            result["stress"] = self._stress(strain, data)
        else:
            result["edge_forces"] = self.edges.restored(-gradient, order, data["edge_index"].size(1))
        return result

    def _run(
        self, vectors: Tensor, index: Tensor, attrs: Tensor, batch: Tensor, counts: Tensor
    ) -> Tuple[List[Tensor], Tensor]:
        attrs, batch, counts = self.edges.with_dummy(attrs, batch, counts)
        values: List[Tensor] = self.forces_program(vectors, index, attrs, batch, counts)
        return self.edges.without_dummy(values[:-1]), values[-1]

    def _vectors(self, data: Dict[str, Tensor], index: Tensor, batch: Tensor) -> Tensor:
        """r_receiver - r_sender + shift, [edges, 3]; the shift of NequIP belongs to the sender, its neighbour."""
        pos = data["pos"]
        if "cell" not in data:
            return pos.index_select(0, index[1]) - pos.index_select(0, index[0])
        cell, units = data["cell"].view(-1, 3, 3), -data["edge_cell_shift"].to(pos.dtype)
        if cell.size(0) == 1:
            return self.edges.vectors(pos, index, torch.matmul(units, cell[0]))
        own = cell.index_select(0, batch.index_select(0, index[1]))
        return self.edges.vectors(pos, index, torch.bmm(units.unsqueeze(1), own).squeeze(1))

    def _strain(self, vectors: Tensor, gradient: Tensor, index: Tensor, batch: Tensor, frames: int) -> Tensor:
        """dE/d(strain) in eV, [frames, 3, 3]."""
        if frames == 1:
            total = torch.matmul(vectors.t(), gradient).unsqueeze(0)
        else:
            outer = vectors.unsqueeze(2) * gradient.unsqueeze(1)
            empty = torch.zeros((frames, 3, 3), dtype=vectors.dtype, device=vectors.device)
            total = empty.index_add(0, batch.index_select(0, index[1]), outer)
        return 0.5 * (total + total.transpose(1, 2))

    def _stress(self, strain: Tensor, data: Dict[str, Tensor]) -> Tensor:
        if "cell" not in data:
            return self.zero.new_empty([0])
        volume = torch.linalg.det(data["cell"].view(-1, 3, 3)).abs().view(-1, 1, 1)
        return torch.where(volume > 0, strain / volume, torch.full_like(strain, float("nan")))
