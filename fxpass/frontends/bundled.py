"""The small potential that fxpass ships (``fxpass.models``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.capture import capture, prepare
from ..errors import Location, UnsupportedModelError
from ..ir.program import Program, TensorSpec
from ..models import SmallPotential, collate, load
from ..structures import Evaluation, Neighbours, Structure, neighbour_list
from .base import dtype_of
from .bundled_interface import BundledInterface


class BundledFrontend:
    """Frontend for ``fxpass.models.SmallPotential``, with any settings and weights."""

    name = "equivariant"
    extra = ""
    tested = ()

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, SmallPotential)

    def reads(self, path: str) -> bool:
        return Path(path).suffix == ".npz"

    def load(self, path: str) -> nn.Module:
        return load(path)

    def check(self, model: nn.Module) -> None:
        if type(model) is not SmallPotential:  # a subclass may compute anything
            cls = type(model)
            raise UnsupportedModelError(
                f"the model class {cls.__qualname__} derives from SmallPotential and is not covered",
                where=Location(module_path="(model)", source=f"{cls.__module__}.{cls.__qualname__}"),
                hint="register a frontend for it (entry point group fxpass.frontends)",
            )

    def reference(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return copy.deepcopy(model), ()

    def capture(self, model: Any) -> Program:
        dtype, species = dtype_of(model), len(model.atomic_numbers)
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("species", ("atoms", species), dtype, f"{species}x0e", "", frozenset({"one_hot"})),
            TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("cell", ("graphs", 3, 3), dtype, None, "Angstrom"),
        )
        outputs = (TensorSpec("energy", (), dtype, None, "eV"), TensorSpec("node_energy", (), dtype, None, "eV"))
        replica: Any = prepare(model)

        def run(edge_vectors: Tensor, edge_index: Tensor, species: Tensor, batch: Tensor, cell: Tensor) -> list[Tensor]:
            return list(replica.energies(edge_vectors, edge_index, species, batch, cell.shape[0]))

        return capture(run, replica, inputs, outputs)

    def attributes(self, model: Any) -> dict[str, Any]:
        return {
            "cutoff": model.cutoff,
            "numbers": model.atomic_numbers.tolist(),
            "dtype": str(dtype_of(model)).removeprefix("torch."),
        }

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        return BundledInterface(energy, forces, attributes)

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        dtype, periodic = dtype_of(model), all(structure.pbc)
        data = collate([structure], model.atomic_numbers.tolist(), model.cutoff, dtype, neighbours)
        result = model(data, compute_stress=periodic)
        return Evaluation(
            energy=float(result["energy"][0]),
            forces=result["forces"].double().numpy(),
            stress=result["stress"][0].double().numpy() if periodic else None,
            dtype=str(dtype).removeprefix("torch."),
        )
