"""deepmd-kit's own ``forward`` over lowered programs; needs no deepmd-kit, and scripts."""

# TorchScript reads the annotations.
# ruff: noqa: UP006, UP035, UP045

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..edges import Edges
from ..neighbours import Pairs
from .deepmd_neighbours import nearest_only


class DeepmdInterface(nn.Module):
    """``forward`` and ``forward_lower`` of ``EnergyModel``: positions, types and a box -> its dictionary of results.

    The two programs take (edge_vectors, edge_index, node_attrs, batch, num_atoms) and return the energies of frames
    and of atoms, and for ``forces_program`` dE/d(edge vector) after them.  Edges run from the neighbour to the centre.
    ``attributes["assumptions"]`` say which edges the programs take and in which order (:class:`fxpass.edges.Edges`).

    Where an atom has more neighbours than ``sel`` has places, the nearest are kept, as in the original: first of all
    types together, then of each type where the model keeps types apart.

    Attributes:
        rcut: Angstrom.
        sel: places for neighbours, by type or of all types together.
        counted: by type, 1 where atoms have an energy and 0 where the model leaves it out.
    """

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        self.forces_program = forces  # forces are always asked for, so ``energy`` is not
        self.rcut: float = attributes["cutoff"]
        self.edges = Edges(self.rcut, attributes.get("assumptions", ()))
        self.pairs = Pairs(self.rcut)
        self.type_map: List[str] = list(attributes["type_map"])
        self.types: int = len(self.type_map)
        self.sel: List[int] = list(attributes["sel"])
        self.mixed: bool = attributes["mixed_types"]
        self.message_passing: bool = attributes["message_passing"]
        self.model_def_script: str = attributes["model_def_script"]
        self.register_buffer("zero", torch.zeros((), dtype=getattr(torch, attributes["dtype"])), persistent=False)
        self.register_buffer("counted", torch.tensor(attributes["counted"], dtype=torch.int32), persistent=False)

    @torch.jit.export
    def get_rcut(self) -> float:
        """Cutoff, Angstrom."""
        return self.rcut

    @torch.jit.export
    def get_type_map(self) -> List[str]:
        """Names of the types."""
        return self.type_map

    @torch.jit.export
    def get_ntypes(self) -> int:
        """Number of types."""
        return self.types

    @torch.jit.export
    def get_sel(self) -> List[int]:
        """Places for neighbours."""
        return self.sel

    @torch.jit.export
    def get_nsel(self) -> int:
        """All places for neighbours."""
        return sum(self.sel)

    @torch.jit.export
    def get_nnei(self) -> int:
        """All places for neighbours."""
        return sum(self.sel)

    @torch.jit.export
    def mixed_types(self) -> bool:
        """Whether neighbours of all types share their places."""
        return self.mixed

    @torch.jit.export
    def has_message_passing(self) -> bool:
        """Whether atoms beyond the cutoff matter."""
        return self.message_passing

    @torch.jit.export
    def get_dim_fparam(self) -> int:
        """Number of parameters of a frame."""
        return 0

    @torch.jit.export
    def get_dim_aparam(self) -> int:
        """Number of parameters of an atom."""
        return 0

    @torch.jit.export
    def is_aparam_nall(self) -> bool:
        """Whether ghost atoms have parameters."""
        return False

    @torch.jit.export
    def get_model_def_script(self) -> str:
        """The model's configuration, JSON."""
        return self.model_def_script

    @torch.jit.export
    def model_output_type(self) -> List[str]:
        """What the model predicts."""
        return ["energy"]

    @torch.jit.export
    def get_sel_type(self) -> List[int]:
        """Types that have an energy."""
        chosen: List[int] = []
        counted: Tensor = self.counted  # type: ignore[assignment]
        for k in range(self.types):
            if int(counted[k]) == 1:
                chosen.append(k)
        return chosen

    def forward(
        self,
        coord: Tensor,
        atype: Tensor,
        box: Optional[Tensor] = None,
        fparam: Optional[Tensor] = None,
        aparam: Optional[Tensor] = None,
        do_atomic_virial: bool = False,
        charge_spin: Optional[Tensor] = None,
    ) -> Dict[str, Tensor]:
        """Evaluate frames of equally many atoms.

        Args:
            coord: [frames, atoms, 3] or [frames, atoms * 3], Angstrom.
            atype: [frames, atoms] int64; negative ones are no atoms.
            box: [frames, 9] or [frames, 3, 3], cell vectors as rows, Angstrom; None without periodicity.
            do_atomic_virial: whether ``atom_virial`` is wanted.

        Returns:
            energy [frames, 1] in eV, float64; atom_energy [frames, atoms, 1]; force [frames, atoms, 3] in eV/Angstrom;
            virial [frames, 9] in eV, float64; mask [frames, atoms], int32, 0 for what has no energy; and atom_virial
            [frames, atoms, 9] in eV where it was asked for.

        Raises:
            RuntimeError: fparam, aparam or charge_spin for a model that has none; a type that the model does not know;
                atomic virials of a model with message passing; an edge shorter than the programs were made for;
                positions or cell vectors that are not finite.
        """
        self._refuse(fparam, aparam, charge_spin, do_atomic_virial, atype)
        if not bool(torch.isfinite(coord).all()) or (box is not None and not bool(torch.isfinite(box).all())):
            raise RuntimeError("fxpass: positions or cell vectors are not finite")
        atype = atype.to(torch.int64)
        frames, atoms = atype.size(0), atype.size(1)
        given = coord.view(frames, atoms, 3)
        positions = given.to(torch.float64)
        flat = positions.reshape(-1, 3)
        vectors: List[Tensor] = []
        indices: List[Tensor] = []
        for k in range(frames):
            real = (atype[k] >= 0).nonzero().flatten()
            cell: Optional[Tensor] = None
            if box is not None:
                cell = box[k].view(3, 3).to(torch.float64)
            index, own = self.pairs(positions[k].index_select(0, real), cell)
            vectors.append(own)
            if real.size(0) < atoms:
                index = real.index_select(0, index.flatten()).view(2, -1)
            indices.append(index + k * atoms if k > 0 else index)
        batch = torch.arange(frames, device=atype.device).repeat_interleave(atoms)
        own, index = (vectors[0], indices[0]) if frames == 1 else (torch.cat(vectors), torch.cat(indices, 1))
        found = self._evaluate(own, index, atype, batch)
        energies, single, gradient, kept, index, _ = found
        gradient = gradient.to(torch.float64)
        kept = kept.to(torch.float64)
        if frames == 1:
            total = self.edges.virial(gradient, kept).unsqueeze(0)
        else:
            none = torch.zeros([frames, 3, 3], dtype=kept.dtype, device=kept.device)
            outer = -gradient.unsqueeze(2) * kept.unsqueeze(1)
            total = none.index_add(0, batch.index_select(0, index[1]), outer)
        mask = self._mask(atype)
        results = {
            "atom_energy": single.view(frames, atoms, 1).to(coord.dtype),
            "energy": energies.view(frames, 1),
            "force": self.edges.forces(gradient, index, flat).view(frames, atoms, 3).to(coord.dtype),
            "virial": total.view(frames, 9),
            "mask": mask,
        }
        if do_atomic_virial:  # deepmd-kit gives all of a pair to the neighbour
            none = torch.zeros([frames * atoms, 3, 3], dtype=kept.dtype, device=kept.device)
            each = none.index_add(0, index[0], -gradient.unsqueeze(2) * kept.unsqueeze(1))
            results["atom_virial"] = each.view(frames, atoms, 9).to(coord.dtype)
        return results

    @torch.jit.export
    def forward_lower(
        self,
        extended_coord: Tensor,
        extended_atype: Tensor,
        nlist: Tensor,
        mapping: Optional[Tensor] = None,
        fparam: Optional[Tensor] = None,
        aparam: Optional[Tensor] = None,
        do_atomic_virial: bool = False,
        comm_dict: Optional[Dict[str, Tensor]] = None,
        charge_spin: Optional[Tensor] = None,
    ) -> Dict[str, Tensor]:
        """Evaluate with a given list of neighbours, as MD codes do; one frame of local atoms and their ghosts.

        Args:
            extended_coord: [1, all, 3], Angstrom, local atoms first.
            extended_atype: [1, all] int64.
            nlist: [1, local, neighbours] int64, numbers of ``extended_coord``, -1 for none.
            mapping: [1, all] int64, the local atom of each; a model with message passing needs it.

        Returns:
            As ``forward``, with ``extended_force`` [1, all, 3] and ``extended_virial`` [1, all, 9] in place of force
            and atom_virial.

        Raises:
            RuntimeError: as in ``forward``; more than one frame; parallel message passing (``comm_dict``).
        """
        self._refuse(fparam, aparam, charge_spin, do_atomic_virial, extended_atype)
        if not bool(torch.isfinite(extended_coord).all()):
            raise RuntimeError("fxpass: positions are not finite")
        extended_atype = extended_atype.to(torch.int64)
        if extended_atype.size(0) != 1:
            raise RuntimeError("fxpass: forward_lower takes one frame")
        if self.message_passing and (comm_dict is not None or mapping is None):
            raise RuntimeError("fxpass: a model with message passing needs mapping, and runs in one process")
        local, total = nlist.size(1), extended_atype.size(1)
        where = extended_coord.view(total, 3).to(torch.float64)
        neighbours = nlist[0]
        valid = neighbours >= 0
        centre = torch.arange(local, device=nlist.device).unsqueeze(1).expand_as(neighbours)[valid]
        ghost = neighbours[valid]
        vectors = where.index_select(0, centre) - where.index_select(0, ghost)
        near = torch.linalg.vector_norm(vectors.detach(), dim=1) < self.rcut
        vectors, centre, ghost = vectors[near], centre[near], ghost[near]
        # without messages a ghost is an atom like another, that no edge ends at
        kinds = extended_atype
        sender = ghost
        if self.message_passing and mapping is not None:
            sender = mapping[0].index_select(0, ghost)
            kinds = extended_atype[:, :local]
        batch = torch.zeros([kinds.size(1)], dtype=torch.int64, device=nlist.device)
        index = torch.stack([sender, centre])
        _, single, gradient, kept, index, chosen = self._evaluate(vectors, index, kinds, batch)
        ghost = ghost.index_select(0, chosen)
        gradient, kept = gradient.to(torch.float64), kept.to(torch.float64)
        force = torch.zeros_like(where).index_add(0, ghost, gradient).index_add(0, index[1], -gradient)
        outer = -gradient.unsqueeze(2) * kept.unsqueeze(1)
        single = single[:local]
        results = {
            "atom_energy": single.view(1, local, 1).to(extended_coord.dtype),
            "energy": single.sum().view(1, 1),
            "extended_force": force.unsqueeze(0).to(extended_coord.dtype),
            "virial": outer.sum(0).view(1, 9),
            "mask": self._mask(extended_atype[:, :local]),
        }
        if do_atomic_virial:
            none = torch.zeros([total, 3, 3], dtype=outer.dtype, device=outer.device)
            results["extended_virial"] = none.index_add(0, ghost, outer).view(1, total, 9).to(extended_coord.dtype)
        return results

    def _mask(self, atype: Tensor) -> Tensor:
        counted: Tensor = self.counted  # type: ignore[assignment]
        return counted.index_select(0, atype.clamp(min=0).flatten()).view_as(atype) * (atype >= 0).to(torch.int32)

    def _refuse(
        self,
        fparam: Optional[Tensor],
        aparam: Optional[Tensor],
        charge_spin: Optional[Tensor],
        do_atomic_virial: bool,
        atype: Tensor,
    ) -> None:
        if fparam is not None or aparam is not None or charge_spin is not None:
            raise RuntimeError("fxpass: this model has no fparam, aparam or charge_spin")
        if do_atomic_virial and self.message_passing:
            raise RuntimeError("fxpass: atomic virials of a model with message passing are not covered")
        if atype.numel() > 0 and int(atype.max()) >= self.types:
            raise RuntimeError(f"fxpass: atom types must be below {self.types}, the number of types of this model")

    def _evaluate(
        self, vectors: Tensor, index: Tensor, atype: Tensor, batch: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Energies of frames and of atoms, dE/d(edge vector), and the edges it is of.

        They are vectors [edges, 3], index [2, edges], and their numbers among those given.
        """
        zero: Tensor = self.zero  # type: ignore[assignment]
        kinds = atype.clamp(min=0).flatten()
        atoms, frames = kinds.size(0), atype.size(0)
        chosen = nearest_only(vectors, index, kinds, atoms, self.sel, self.mixed)
        if chosen.size(0) < index.size(1):
            vectors, index = vectors.index_select(0, chosen), index.index_select(1, chosen)
        vectors, index, order = self.edges(vectors, index, atoms)
        if order is not None:
            chosen = chosen.index_select(0, order)
        real = (atype >= 0).flatten()
        attrs = torch.nn.functional.one_hot(kinds, self.types).to(zero.dtype)
        counts = torch.full([frames], atype.size(1), dtype=torch.int64, device=atype.device)
        narrow = vectors.to(zero.dtype)
        if self.training:
            values, gradient = self._run(narrow, index, attrs, batch, counts)
        else:
            with torch.no_grad():
                values, gradient = self._run(narrow.detach(), index, attrs, batch, counts)
        gradient, index = self.edges.settled(gradient, index, atoms)
        energies, single = values[0], values[1]
        if not bool(real.all()):
            single = torch.where(real, single, 0.0)
            energies = torch.zeros_like(energies).index_add(0, batch, single)
        return energies, single, gradient, vectors, index, chosen

    def _run(
        self, vectors: Tensor, index: Tensor, attrs: Tensor, batch: Tensor, counts: Tensor
    ) -> Tuple[List[Tensor], Tensor]:
        attrs, batch, counts = self.edges.with_dummy(attrs, batch, counts)
        values: List[Tensor] = self.forces_program(vectors, index, attrs, batch, counts)
        return self.edges.without_dummy(values[:-1]), values[-1]
