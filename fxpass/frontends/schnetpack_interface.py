"""``NeuralNetworkPotential``'s own ``forward`` over lowered programs; needs no schnetpack, and scripts."""

# TorchScript reads the annotations and knows no strict zip.
# ruff: noqa: B905, UP006, UP035

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..edges import Edges


class Cast(nn.Module):
    """``CastTo64``, ``CastTo32``, and a ``CastMap`` between float32 and float64."""

    def __init__(self, spec: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.widens: bool = spec["type_map"].get("float32") == "float64"
        self.narrows: bool = spec["type_map"].get("float64") == "float32"

    def forward(self, results: Dict[str, Tensor], inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
        cast: Dict[str, Tensor] = {}
        for name, value in results.items():
            if self.widens and value.dtype == torch.float32:
                value = value.to(torch.float64)
            elif self.narrows and value.dtype == torch.float64:
                value = value.to(torch.float32)
            cast[name] = value
        return cast


class Offsets(nn.Module):
    """``AddOffsets``; and ``RemoveOffsets``, which takes the references of all atoms of a batch from every system."""

    def __init__(self, spec: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.property: str = spec["property"]
        self.add: bool = spec["kind"] == "AddOffsets"
        self.with_mean: bool = spec["mean"] is not None
        self.with_atomrefs: bool = spec["atomref"] is not None
        self.is_extensive: bool = spec["is_extensive"]
        self.mean = nn.Buffer(_stored(spec["mean"] or ZERO, dtype))
        self.atomref = nn.Buffer(_stored(spec["atomref"] or ZERO, dtype))

    def forward(self, results: Dict[str, Tensor], inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
        value = results[self.property]
        if self.with_mean:
            mean = self.mean * inputs["_n_atoms"] if self.is_extensive else self.mean
            value = (value + mean if self.add else value - mean).to(value.dtype)
        if self.with_atomrefs:
            single = self.atomref[inputs["_atomic_numbers"]]
            if self.add:
                graphs = int(inputs["_idx_m"][-1]) + 1
                zero = torch.zeros([graphs], dtype=single.dtype, device=single.device)
                total = zero.index_add(0, inputs["_idx_m"], single)
                if not self.is_extensive:
                    total = total / inputs["_n_atoms"]
                value = (value + total).to(value.dtype)
            else:
                value = (value - single.sum()).to(value.dtype)
        results[self.property] = value
        return results


class Scale(nn.Module):
    """``ScaleProperty``."""

    def __init__(self, spec: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_key: str = spec["input_key"]
        self.output_key: str = spec["output_key"]
        self.scale = nn.Buffer(_stored(spec["scale"], dtype))

    def forward(self, results: Dict[str, Tensor], inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
        results[self.output_key] = results[self.input_key] * self.scale
        return results


POSTPROCESSORS = {"CastMap": Cast, "AddOffsets": Offsets, "RemoveOffsets": Offsets, "ScaleProperty": Scale}
ZERO = {"values": [0.0], "dtype": "float32"}


def _stored(numbers: Any, dtype: torch.dtype) -> Tensor:
    """Numbers in the type that the model keeps them in; in float64 where all is computed in it."""
    own = dtype if dtype == torch.float64 else getattr(torch, numbers["dtype"])
    return torch.tensor(numbers["values"], dtype=own)


class SchNetPackInterface(nn.Module):
    """``forward`` of ``NeuralNetworkPotential``: a dictionary of schnetpack's inputs -> the model's outputs.

    The two programs take (edge_vectors, edge_index, atomic_numbers, batch, n_atoms) and return a tuple: the outputs
    named in ``names``, and for ``forces_program`` dE/d(edge vector) after them.  With g_ij = dE/dr_ij and r_ij = r_i -
    r_j - offset, j being the neighbour, forces are the sum of g over edges sent minus the sum over edges received, and
    the stress is sum g_ij (x) r_ij over the volume.  ``attributes["assumptions"]`` say which edges the programs take
    and in which order (:class:`fxpass.edges.Edges`).

    Attributes:
        do_postprocessing: whether ``postprocessors`` run, as in the original.
    """

    def __init__(self, energy: nn.Module, forces: nn.Module, attributes: Any) -> None:
        super().__init__()
        dtype = getattr(torch, attributes["dtype"])
        self.energy_program = energy
        self.forces_program = forces
        self.edges = Edges(attributes["cutoff"], attributes.get("assumptions", ()))
        self.names: List[str] = list(attributes["outputs"])
        self.model_outputs: List[str] = list(attributes["model_outputs"])
        self.required_derivatives: List[str] = list(attributes["required_derivatives"])
        self.energy_key: str = attributes["energy_key"]
        self.force_key: str = attributes["force_key"]
        self.stress_key: str = attributes["stress_key"]
        self.species: int = attributes["species"]
        self.spk_version: str = attributes["spk_version"]
        self.input_dtype_str: str = attributes["input_dtype_str"]
        self.do_postprocessing: bool = attributes["do_postprocessing"]
        specs = attributes["postprocessors"]
        self.postprocessors = nn.ModuleList([POSTPROCESSORS[spec["kind"]](spec, dtype) for spec in specs])
        self.register_buffer("cutoff", torch.tensor(attributes["cutoff"], dtype=dtype))

    def forward(self, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Evaluate a batch as made by schnetpack's ``AtomsConverter`` or ``AtomsLoader``; units are the model's.

        In training mode the results carry an autograd graph by positions.

        Raises:
            RuntimeError: an atomic number that the model has no embedding for, or an edge shorter than the programs
                were made for.
        """
        positions, numbers, batch = inputs["_positions"], inputs["_atomic_numbers"], inputs["_idx_m"]
        low, high = torch.aminmax(numbers)
        if int(low) < 0 or int(high) >= self.species:
            raise RuntimeError(f"fxpass: atomic numbers must be below {self.species}, and not negative")
        graphs = int(batch[-1]) + 1
        index = torch.stack([inputs["_idx_j"], inputs["_idx_i"]]).to(torch.int64)
        record = self.training
        if record:
            positions.requires_grad_(True)
        given = self.edges.readable(index)
        vectors = positions.index_select(0, given[1]) - positions.index_select(0, given[0]) - inputs["_offsets"]
        if self.cutoff.dtype == torch.float64:
            vectors = vectors.to(torch.float64)  # narrower inputs become so in the original's first layer
        vectors, index, _ = self.edges(vectors, index, positions.size(0))
        counts = inputs["_n_atoms"] if "_n_atoms" in inputs else torch.bincount(batch, minlength=graphs)
        counts = counts.to(vectors.dtype)
        if record:
            values, gradient = self._run(vectors, index, numbers, batch, counts)
        else:
            with torch.no_grad():
                values, gradient = self._run(vectors.detach(), index, numbers, batch, counts)

        results: Dict[str, Tensor] = {}
        for name, value in zip(self.names, values):
            results[name] = value
        gradient, index = self.edges.settled(gradient, index, positions.size(0))
        results[self.force_key] = self.edges.forces(gradient, index, positions.to(gradient.dtype)).to(positions.dtype)
        if self.stress_key != "":
            results[self.stress_key] = self._stress(vectors, gradient, index, batch, inputs["_cell"], graphs)
        if self.do_postprocessing:
            for postprocessor in self.postprocessors:
                results = postprocessor(results, inputs)
        outputs: Dict[str, Tensor] = {}
        for name in self.model_outputs:
            outputs[name] = results[name]
        return outputs

    def _run(
        self, vectors: Tensor, index: Tensor, numbers: Tensor, batch: Tensor, counts: Tensor
    ) -> Tuple[List[Tensor], Tensor]:
        species, batch, counts = self.edges.with_dummy(numbers.unsqueeze(1), batch, counts)
        values: List[Tensor] = self.forces_program(vectors, index, species.squeeze(1), batch, counts)
        return self.edges.without_dummy(values[:-1]), values[-1]

    def _stress(
        self, vectors: Tensor, gradient: Tensor, index: Tensor, batch: Tensor, cell: Tensor, graphs: int
    ) -> Tensor:
        """dE/d(strain) over the volume, [graphs, 3, 3], as ``Forces`` has it: not symmetrised."""
        if graphs == 1:
            total = torch.matmul(gradient.t(), vectors).unsqueeze(0)
        else:
            outer = gradient.unsqueeze(2) * vectors.unsqueeze(1)
            empty = torch.zeros((graphs, 3, 3), dtype=vectors.dtype, device=vectors.device)
            total = empty.index_add(0, batch.index_select(0, index[1]), outer)
        volume = (cell[:, 0] * torch.cross(cell[:, 1], cell[:, 2], dim=1)).sum(1)
        return total.to(cell.dtype) / volume.view(-1, 1, 1)
