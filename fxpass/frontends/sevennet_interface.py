"""SevenNet's own ``forward`` over lowered programs; needs neither sevenn nor e3nn, and scripts."""

# TorchScript reads the annotations.
# ruff: noqa: RUF012, UP006, UP035, UP045

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..edges import Edges

#: of a structure without a cell, as sevenn divides by it, Angstrom^3
LEAST_VOLUME = 1e-3


class SevenNetInterface(nn.Module):
    """``forward`` of ``AtomGraphSequential``: it takes the same graph, and adds the same results to it.

    The two programs take (edge_vectors, edge_index, node_attrs, batch, head) and return energy, node_energy and
    scaled_node_energy, and for ``forces_program`` dE/d(edge vector) after them.  SevenNet's edges run from
    ``edge_index[0]``, which receives, to ``edge_index[1]``, which sends: the program's edges are those turned round.
    ``attributes["assumptions"]`` say which edges the programs take and in which order (:class:`fxpass.edges.Edges`).

    Attributes:
        cutoff: Angstrom.
        type_map: atomic number -> species.
        modal_map: modality -> its number; None where the model has no choice of modality.
        eval_type_map: species are looked up by ``atomic_numbers``; otherwise they are ``x``.
        eval_modal_map: modalities are looked up by ``data_modality``, where there is one; otherwise they are
            ``modal_type``.
        is_batch_data: the graph is a batch, with ``batch`` and a structure's number for every result; otherwise it is
            one structure and has no ``batch``.
    """

    __jit_unused_properties__ = ["is_batch_data"]

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        numbers: List[int] = attributes["numbers"]
        self.energy_program = energy
        self.forces_program = forces
        self.edges = Edges(attributes["cutoff"], attributes.get("assumptions", ()))
        self.cutoff: float = attributes["cutoff"]
        self.type_map: Dict[int, int] = {number: k for k, number in enumerate(numbers)}
        self.modals: List[str] = list(attributes["heads"])  # TorchScript knows no type of an empty list
        self.multimodal: bool = len(self.modals) > 1
        modal_map = {name: k for k, name in enumerate(self.modals)}
        self.modal_map: Optional[Dict[str, int]] = modal_map if self.multimodal else None
        self.eval_modal_map: bool = self.multimodal and attributes.get("eval_modal_map", True)
        self.species: int = len(numbers)
        self.eval_type_map: bool = attributes["eval_type_map"]
        self.atomic_virial: bool = attributes["atomic_virial"]
        self.least_volume: float = LEAST_VOLUME
        self._is_batch_data: bool = attributes["batched"]
        species = torch.full([max(numbers) + 1], -1, dtype=torch.int64)
        species[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.register_buffer("species_of_number", species)
        # the first number of all: hosts take its type for that of the model
        self.register_buffer("r_max", torch.tensor(self.cutoff, dtype=getattr(torch, attributes["dtype"])))

    @property
    def is_batch_data(self) -> bool:
        return self._is_batch_data

    @torch.jit.unused
    def set_is_batch_data(self, flag: bool) -> None:
        """Whether the graphs to come are batches."""
        self._is_batch_data = flag

    @torch.jit.unused
    def sequential(self) -> nn.Module:
        """This as an ``AtomGraphSequential``, for whatever asks for one, such as ``SevenNetCalculator``.

        Raises:
            ModuleNotFoundError: sevenn is not installed.
        """
        from sevenn.nn.sequential import AtomGraphSequential

        own = AtomGraphSequential(
            {"fxpass": self}, self.cutoff, self.type_map, self.modal_map, eval_modal_map=self.eval_modal_map
        )
        own.set_is_batch_data(self._is_batch_data)
        return own.eval()

    def forward(self, input: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Evaluate a graph.

        Args:
            input: an ``AtomGraphData`` or a dictionary with ``atomic_numbers`` [atoms], ``edge_index`` [2, edges],
                ``edge_vec`` [edges, 3] (Angstrom, from ``edge_index[0]`` to ``edge_index[1]``), ``cell_volume``
                (Angstrom^3) and, of a batch, ``batch`` [atoms]; of a model with modalities ``data_modality``, a name
                or one for every structure, or ``modal_type``, their numbers.

        Returns:
            ``input`` with ``atom_type`` [atoms], ``scaled_atomic_energy`` and ``atomic_energy`` [atoms, 1],
            ``inferred_total_energy`` (all eV), ``inferred_force`` [atoms, 3] (eV/Angstrom), ``inferred_stress``
            (eV/Angstrom^3; xx, yy, zz, xy, yz, zx; compression is positive) and, where the model was asked for it,
            ``inferred_atomic_virial`` [atoms, 6] (eV).  In training mode they carry an autograd graph.

        Raises:
            RuntimeError: an element that the model does not know, not one modality for every structure where there
                is a choice, or an edge shorter than the programs were made for.
        """
        species = self._species(input)
        given = input["edge_vec"]
        index = input["edge_index"]
        atoms = species.size(0)
        if self._is_batch_data:
            batch = input["batch"]
            graphs = int(batch.max()) + 1
        else:
            batch = torch.zeros_like(species)
            graphs = 1
        head = self._head(input, graphs, species)
        if self.training:
            if not given.requires_grad:
                given.requires_grad_(True)
            values, gradient, vectors, turned = self._run(given, index, species, batch, head)
        else:
            with torch.no_grad():
                values, gradient, vectors, turned = self._run(given.detach(), index, species, batch, head)
        gradient, turned = self.edges.settled(gradient, turned, atoms)

        energy = values[0]
        outer = torch.stack(
            [
                vectors[:, 0] * gradient[:, 0],
                vectors[:, 1] * gradient[:, 1],
                vectors[:, 2] * gradient[:, 2],
                vectors[:, 0] * gradient[:, 1],
                vectors[:, 1] * gradient[:, 2],
                vectors[:, 2] * gradient[:, 0],
            ],
            dim=1,
        )
        volume = input["cell_volume"].clamp(min=self.least_volume)
        if self._is_batch_data:
            empty = torch.zeros([graphs, 6], dtype=outer.dtype, device=outer.device)
            total = empty.index_add(0, batch.index_select(0, turned[0]), outer)
        else:
            energy, total = energy[0], outer.sum(0)
        input["atom_type"] = species
        input["scaled_atomic_energy"] = values[2].unsqueeze(1)
        input["atomic_energy"] = values[1].unsqueeze(1)
        input["inferred_total_energy"] = energy
        input["inferred_force"] = self.edges.forces(gradient, turned, given.new_zeros([atoms, 3]))
        input["inferred_stress"] = -total / volume.unsqueeze(-1)
        if self.atomic_virial:  # sevenn gives all of an edge to its sender
            none = torch.zeros([atoms, 6], dtype=outer.dtype, device=outer.device)
            input["inferred_atomic_virial"] = -none.index_add(0, turned[0], outer)
        return input

    def _run(
        self, edge_vec: Tensor, edge_index: Tensor, species: Tensor, batch: Tensor, head: Tensor
    ) -> Tuple[List[Tensor], Tensor, Tensor, Tensor]:
        """Energies, dE/d(edge vector), and the edges that these are of: vectors and (sender, receiver)."""
        one_hot = torch.nn.functional.one_hot(species, self.species).to(edge_vec.dtype)
        vectors, index, _ = self.edges(-edge_vec, edge_index.flip(0), species.size(0))
        attrs, graph, heads = self.edges.with_dummy(one_hot, batch, head)
        values: List[Tensor] = self.forces_program(vectors, index, attrs, graph, heads)
        return self.edges.without_dummy(values[:-1]), values[-1], vectors, index

    def _species(self, input: Dict[str, Tensor]) -> Tensor:
        if not self.eval_type_map:
            return input["x"]
        numbers = input["atomic_numbers"]
        table: Tensor = self.species_of_number  # type: ignore[assignment]
        known = (numbers >= 0) & (numbers < table.size(0))
        species = table.index_select(0, torch.where(known, numbers, 0))
        if not bool((known & (species >= 0)).all()):
            raise RuntimeError("fxpass: the graph holds an atomic number that the model does not know")
        return species

    def _head(self, input: Dict[str, Tensor], graphs: int, like: Tensor) -> Tensor:
        """The modality of each structure, [graphs]."""
        if not self.multimodal:
            return torch.zeros([graphs], dtype=like.dtype, device=like.device)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._name_to_number(input)
        if "modal_type" not in input:
            key = "data_modality" if self.eval_modal_map else "modal_type"
            raise RuntimeError(f"fxpass: the graph names no modality ({key}); one of {self.modals}")
        head = input["modal_type"].reshape(-1)
        if head.size(0) != graphs:
            raise RuntimeError(f"fxpass: the graph names {head.size(0)} modalities for {graphs} structures")
        if not bool(((head >= 0) & (head < len(self.modals))).all()):
            raise RuntimeError(f"fxpass: the graph has a modal_type that is none of the model's: {self.modals}")
        return head

    @torch.jit.unused
    def _name_to_number(self, input: Any) -> None:
        """Puts ``modal_type`` where ``data_modality`` has names, which TorchScript cannot hold."""
        if not self.eval_modal_map or "data_modality" not in input:
            return
        named = input["data_modality"]
        named = [named] if isinstance(named, str) else list(named)
        unknown = [name for name in named if name not in self.modals]
        if unknown:
            raise RuntimeError(f"fxpass: the model has no modality {unknown[0]!r}; one of {self.modals}")
        numbers = [self.modals.index(name) for name in named]
        input["modal_type"] = torch.tensor(numbers if self._is_batch_data or len(numbers) != 1 else numbers[0])
