"""SevenNet (sevenn): ``AtomGraphSequential``, built from settings or from a checkpoint, of any number of modalities."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from math import log, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch_compat import pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..capture.rules import RULES, LinearStandIn, Rule, qualified
from ..errors import Location, MissingExtraError, StructureError, UnsupportedModelError
from ..ir.program import Program, TensorSpec
from ..structures import Evaluation, Neighbours, Structure, neighbour_list
from .base import dtype_of
from .sevennet_interface import SevenNetInterface

#: what a model may be made of
MODULES = (
    "EdgeEmbedding",
    "OnehotEmbedding",
    "IrrepsLinear",
    "SelfConnectionIntro",
    "SelfConnectionLinearIntro",
    "IrrepsConvolution",
    "SelfConnectionOutro",
    "EquivariantGate",
    "FCN_e3nn",
    "Rescale",
    "SpeciesWiseRescale",
    "ModalWiseRescale",
    "AtomReduce",
    "ForceStressOutputFromEdge",
    "_ModalInputPrepare",
)
PACKAGES = ("sevenn", "e3nn", "torch")  # less sevenn's helpers, which bring modules of accelerators
RADIAL = ("BesselBasis", "PolynomialCutoff", "XPLORCutoff")
#: what e3nn itself derives from classes with a rule, with the same ``forward``
DERIVED = tuple(f"e3nn.o3._tensor_product._sub.{name}TensorProduct" for name in ("FullyConnected", "Elementwise"))
#: class -> what its modules read, write and do, as sevenn's builder sets it and the drop-in knows it
SETTINGS = {
    "AtomGraphSequential": {"key_atomic_numbers": "atomic_numbers", "key_node_feature": "x", "key_grad": "edge_vec"},
    "IrrepsConvolution": {
        "key_x": "x",
        "key_filter": "edge_attr",
        "key_weight_input": "edge_embedding",
        "key_edge_idx": "edge_index",
    },
    "Rescale": {"key_input": "scaled_atomic_energy", "key_output": "atomic_energy"},
    "SpeciesWiseRescale": {
        "key_input": "scaled_atomic_energy",
        "key_output": "atomic_energy",
        "key_indices": "atom_type",
    },
    "ModalWiseRescale": {
        "key_input": "scaled_atomic_energy",
        "key_output": "atomic_energy",
        "key_atom_indices": "atom_type",
        "key_modal_indices": "modal_type",
    },
    "AtomReduce": {"key_input": "atomic_energy", "key_output": "inferred_total_energy", "reduce": "sum"},
    "ForceStressOutputFromEdge": {
        "key_edge": "edge_vec",
        "key_edge_idx": "edge_index",
        "key_energy": "inferred_total_energy",
        "key_force": "inferred_force",
        "key_stress": "inferred_stress",
        "key_atomic_virial": "inferred_atomic_virial",
        "key_cell_volume": "cell_volume",
    },
}
#: names by which sevenn knows the checkpoints that its wheel brings, without their first word, and their files
SHIPPED = {
    "0": "SEVENNET_0_11Jul2024",
    "0_11jul2024": "SEVENNET_0_11Jul2024",
    "0_11july2024": "SEVENNET_0_11Jul2024",
    "0_22may2024": "SEVENNET_0_22May2024",
    "l3i5": "SEVENNET_l3i5",
    "mf-0": "SEVENNET_MF_0",
}


class SevenNetFrontend:
    """Frontend for sevenn; tested with the versions in ``tested``."""

    name = "sevennet"
    extra = "sevennet"
    tested = ("0.13.0",)
    names = tuple(f"{first}-{rest}" for first in ("7net", "sevennet") for rest in SHIPPED)

    def recognises(self, model: Any) -> bool:
        own = ("sevenn.nn.sequential", "AtomGraphSequential")
        return any((cls.__module__, cls.__name__) == own for cls in type(model).__mro__)

    def reads(self, path: str) -> bool:
        return pickle_names(path, "E3_equivariant_model")

    def load(self, path: str) -> nn.Module:
        try:
            from sevenn import _const
            from sevenn.checkpoint import SevenNetCheckpoint
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{path} needs sevenn to be read, and {error.name} is not installed",
                hint='pip install "fxpass[sevennet]"',
            ) from error
        named = path.lower() in self.names and not Path(path).is_file()
        shipped = SHIPPED[path.lower().partition("-")[2]] if named else None
        checkpoint = SevenNetCheckpoint(getattr(_const, shipped) if shipped else path)
        return checkpoint.build_model().eval()

    def check(self, model: Any) -> None:
        try:
            found = metadata.version("sevenn")
        except metadata.PackageNotFoundError:  # a checkout on the path
            found = "without a version"
        if found.rpartition(".")[0] not in {version.rpartition(".")[0] for version in self.tested}:
            what = f"sevenn {found} is not covered, only {', '.join(self.tested)}"
            raise _refused(what, "", model, f"pip install sevenn=={self.tested[-1]}")
        if not model.type_map:
            raise _refused("a model without a type_map is not covered", "", model, "a model with the elements it knows")
        for path, module in model.named_modules():
            cls, hint = type(module), ""
            if path and "." not in path and not (cls.__name__ in MODULES and cls.__module__.startswith("sevenn.nn.")):
                hint = ", ".join(MODULES)
            elif path.endswith(("basis_function", "cutoff_function")) and cls.__name__ not in RADIAL:
                hint = ", ".join(RADIAL)
            elif qualified(cls) not in EXACT and any(qualified(base) in EXACT for base in cls.__mro__):
                hint = "the class itself, since one derived from it may compute something else"
            elif cls.__module__.partition(".")[0] not in PACKAGES or cls.__module__.endswith("_helper"):
                hint = "the e3nn form of the model"
            elif getattr(module, "is_parallel", False):
                hint = "the whole model, not a part of it for one of many processes"
            if hint:
                raise _refused(f"the module {cls.__name__} is not covered", path, module, hint)
            _check_settings(path, module, model)
        kinds = [type(module).__name__ for module in model]
        for kind in ("AtomReduce", "ForceStressOutputFromEdge"):
            if kinds.count(kind) != 1:
                raise _refused(f"it has {kinds.count(kind)} modules {kind}, not one", "", model, "a whole model")

    def reference(self, model: Any) -> tuple[nn.Module, tuple[str, ...]]:
        return copy_model(model), ()

    def capture(self, model: Any) -> Program:
        dtype, species = dtype_of(model), len(model.type_map)
        heads = max(len(_modals(model)), 1)
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("node_attrs", ("atoms", species), dtype, f"{species}x0e", "", frozenset({"one_hot"})),
            TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("head", ("graphs",), torch.int64, None, "", frozenset({f"below:{heads}", "head"})),
        )
        names = ("energy", "node_energy", "scaled_node_energy")
        outputs = tuple(TensorSpec(name, (), dtype, None, "eV") for name in names)
        replica: Any = prepare(_on_tensors(model), {**RULES, **OWN_RULES})

        def run(edge_vectors: Tensor, edge_index: Tensor, node_attrs: Tensor, batch: Tensor, head: Tensor) -> Any:
            data = {
                "edge_vec": -edge_vectors,  # sevenn's point from the receiver to the sender
                "edge_index": edge_index,
                "x": node_attrs,
                "node_attr": node_attrs,
                "batch": batch,
                "modal": head,
            }
            for module in replica:
                data = module(data)
            return [data[key].flatten() for key in ("inferred_total_energy", "atomic_energy", "scaled_atomic_energy")]

        return capture(run, replica, inputs, outputs)

    def attributes(self, model: Any) -> dict[str, Any]:
        modals = _modals(model)
        return {
            "cutoff": float(model.cutoff),
            "numbers": sorted(model.type_map, key=model.type_map.get),
            "heads": modals or ["Default"],
            "batched": bool(model.is_batch_data),
            "eval_type_map": bool(model.eval_type_map),
            "eval_modal_map": bool(model.eval_modal_map),
            "atomic_virial": any(getattr(module, "use_atomic_virial", False) for module in model),
            "dtype": str(dtype_of(model)).removeprefix("torch."),
        }

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        return SevenNetInterface(energy, forces, attributes)

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        original = isinstance(model, nn.Sequential)
        dtype = dtype_of(model)
        data = sevennet_graph(
            structure,
            sorted(model.type_map, key=model.type_map.get),
            float(model.cutoff),
            _modals(model) if original else list(model.modals) if model.multimodal else [],
            dtype,
            neighbours,
            batched=bool(model.is_batch_data if original else model._is_batch_data),
        )
        # its own forward knows float32 alone, and modalities by name in a graph class of its own
        own = not original or (dtype == torch.float32 and not _modals(model))
        result = model(data) if own else _by_modules(model, data, dtype)
        stress = None
        if all(structure.pbc):
            xx, yy, zz, xy, yz, zx = (-result["inferred_stress"].detach().double()).flatten().tolist()
            stress = np.array([[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]])
        return Evaluation(
            energy=float(result["inferred_total_energy"].detach()),
            forces=result["inferred_force"].detach().double().numpy(),
            stress=stress,
            dtype=str(dtype).removeprefix("torch."),
        )


def sevennet_graph(
    structure: Structure,
    numbers: list[int],
    cutoff: float,
    modals: list[str],
    dtype: torch.dtype,
    neighbours: Neighbours = neighbour_list,
    *,
    batched: bool = True,
) -> dict[str, Tensor]:
    """SevenNet's graph of one structure, for a model in batch mode or not; its head is its modality.

    Raises:
        StructureError: the structure is malformed, holds another species, or names no modality or an unknown one.
    """
    structure.check(numbers, neighbours)
    edges, units = neighbours(structure, cutoff)
    species = np.zeros(max(numbers) + 1, dtype=np.int64)
    species[numbers] = np.arange(len(numbers))
    vectors = structure.positions[edges[1]] - structure.positions[edges[0]] + units @ structure.cell
    data = {
        "atomic_numbers": torch.from_numpy(structure.numbers),
        "x": torch.from_numpy(species[structure.numbers]),
        "edge_index": torch.from_numpy(edges[::-1].copy()),
        "edge_vec": torch.from_numpy(-vectors).to(dtype),
        "cell_volume": torch.tensor([structure.volume] if batched else structure.volume, dtype=dtype),
        "num_atoms": torch.tensor([len(structure)] if batched else len(structure)),
    }
    if batched:
        data["batch"] = torch.zeros(len(structure), dtype=torch.int64)
    if modals:
        if structure.head not in modals:
            named = "names no modality" if structure.head is None else f"asks for the modality {structure.head!r}"
            raise StructureError(f"{structure.name} {named}", hint=f"as its head one of {', '.join(modals)}")
        number = modals.index(structure.head)
        data["modal_type"] = torch.tensor([number] if batched else number)
    return data


def _by_modules(model: Any, data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``model`` computes, its modules called one by one: one-hot numbers follow the type of the weights."""
    data["edge_vec"].requires_grad_(True)
    with torch.enable_grad():
        for module in model:
            data = module(data)
            if type(module).__name__ == "OnehotEmbedding":
                data = {k: v.to(dtype) if v.is_floating_point() and k != "edge_vec" else v for k, v in data.items()}
    return data


def _refused(what: str, path: str, module: nn.Module, choices: str) -> UnsupportedModelError:
    cls = type(module)
    where = Location(module_path=path or "(model)", source=f"{cls.__module__}.{cls.__qualname__}")
    return UnsupportedModelError(
        what, where=where, hint=f"{choices}; or register a frontend for it (entry point group fxpass.frontends)"
    )


def _check_settings(path: str, module: Any, model: Any) -> None:
    """Refuse what sevenn's builder never makes: other keys of the graph, and numbers that are not 0, 1, 2, ..."""
    kind = type(module).__name__
    for name, built in SETTINGS.get(kind, {}).items():
        value = getattr(module, name, built)
        if value != built:
            raise _refused(f"the {name} {value!r} of {kind} is not covered", path, module, f"{built!r}")
    if kind == "OnehotEmbedding":
        which = "modal_map" if module.key_x == "modal_type" else "type_map"
        numbers = sorted((getattr(model, which) or {}).values())
        if numbers != list(range(module.num_classes)):
            what = f"the {which} has the numbers {', '.join(map(str, numbers))} for {module.num_classes} classes"
            raise _refused(what, path, module, f"all from 0 to {module.num_classes - 1}, each once")


def _modals(model: Any) -> list[str]:
    """Names of the modalities between which a graph chooses, in order; empty where it cannot."""
    names = sorted(model.modal_map or [], key=lambda name: model.modal_map[name])
    return names if len(names) > 1 and _fixed(model) is None else []


def _fixed(model: Any) -> int | None:
    """The number of the only modality that ``prepare_modal_deploy`` left."""
    return next((int(m.modal_idx) for m in model if type(m).__name__ == "_ModalInputPrepare"), None)


# --- the model as a function of edge vectors, one-hot species and modalities


def _on_tensors(model: Any) -> nn.Sequential:
    """The energy of ``model`` as modules that read no size from a tensor, and take one-hot species as they are."""
    fixed = _fixed(model)
    chosen: dict[str, nn.Module] = {}
    for name, module in copy_model(model).named_children():
        kind = type(module).__name__
        if kind in ("OnehotEmbedding", "ForceStressOutputFromEdge", "_ModalInputPrepare"):
            continue
        if kind == "EdgeEmbedding":
            module = _EdgeEmbedding(module, float(model.cutoff))
        elif kind == "IrrepsConvolution":
            module = _Convolution(module)
        elif kind == "IrrepsLinear" and getattr(module, "num_modalities", 0) > 1:
            module = _ModalLinear(module, fixed, name)
        elif kind in ("SpeciesWiseRescale", "ModalWiseRescale"):
            module = _Rescale(module, fixed)
        elif kind == "AtomReduce":
            module = _Reduce(module)
        chosen[name] = module
    replica = nn.Sequential()
    for name, module in chosen.items():
        # a program's weights are named after it
        replica.add_module(name if name.isidentifier() else f"_{name}", module)
    return replica


Data = dict[str, Tensor]


class _EdgeEmbedding(nn.Module):
    """``EdgeEmbedding``, and nothing beyond the cutoff, where sevenn has no edges and its envelopes grow again."""

    def __init__(self, own: Any, cutoff: float) -> None:
        super().__init__()
        basis = own.basis_function
        if "coeffs" not in dict(basis.named_parameters()):
            coefficients = vars(basis).pop("coeffs")
            basis.register_buffer("coeffs", coefficients.clone())
        self.basis_function = basis
        self.cutoff_function = own.cutoff_function
        self.spherical = own.spherical
        self.cutoff = cutoff

    def forward(self, data: Data) -> Data:
        vectors = data["edge_vec"]
        lengths = torch.linalg.norm(vectors, dim=-1)
        envelope = self.cutoff_function(lengths) * (lengths < self.cutoff)
        data["edge_embedding"] = self.basis_function(lengths) * envelope.unsqueeze(-1)
        data["edge_attr"] = self.spherical(vectors)
        return data


class _Convolution(nn.Module):
    """``IrrepsConvolution`` over edges (sender, receiver)."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.convolution = own.convolution
        self.weight_nn = own.weight_nn
        learnt = own.denominator.requires_grad  # otherwise a number, which folds into linear maps
        self.denominator = own.denominator if learnt else float(own.denominator)

    def forward(self, data: Data) -> Data:
        x, sender, receiver = data["x"], data["edge_index"][0], data["edge_index"][1]
        messages = self.convolution(x[sender], data["edge_attr"], self.weight_nn(data["edge_embedding"]))
        total = messages.new_zeros((x.shape[0], messages.shape[1])).index_add(0, receiver, messages)
        data["x"] = total / self.denominator
        return data


class _ModalLinear(nn.Module):
    """``IrrepsLinear`` of features joined to a one-hot modality: a linear map, and a row of weights by modality."""

    def __init__(self, own: Any, fixed: int | None, path: str) -> None:
        super().__init__()
        linear, self.fixed, self.key = own.linear, fixed, own.key_output
        last = len(linear.irreps_in) - 1
        sizes = [prod(ins.path_shape) if ins.i_in >= 0 else 0 for ins in linear.instructions]
        features = sum(n for n, ins in zip(sizes, linear.instructions, strict=True) if ins.i_in != last)
        weight = linear.weight.detach()
        self.linear = LinearStandIn(_Features(linear, last, weight[:features].clone()), path)
        self.weight = nn.Parameter(weight[features:].clone())
        self.modalities = own.num_modalities
        self.scales = {ins.i_out: float(ins.path_weight) for ins in linear.instructions if ins.i_in == last}
        self.columns = [(mul, ir.dim) for mul, ir in linear.irreps_out]

    def forward(self, data: Data) -> Data:
        blocks, offset = [], 0
        for k, (channels, width) in enumerate(self.columns):
            if k in self.scales:
                size = self.modalities * channels
                block = self.weight.narrow(0, offset, size).reshape(self.modalities, channels)
                blocks.append(block * self.scales[k])
                offset += size
            else:
                blocks.append(self.weight.new_zeros((self.modalities, channels * width)))
        data[self.key] = self.linear(data["x"]) + _of_modality(torch.cat(blocks, dim=1), self.fixed, data)
        return data


class _Features:
    """The part of an ``e3nn.o3.Linear`` that does not read its last input irreps, as ``LinearStandIn`` reads it."""

    def __init__(self, linear: Any, last: int, weight: Tensor) -> None:
        self.instructions = [ins for ins in linear.instructions if ins.i_in != last]
        self.irreps_in, self.irreps_out = linear.irreps_in[:last], linear.irreps_out
        self.weight, self.bias = nn.Parameter(weight), linear.bias
        self.internal_weights = self.shared_weights = True


class _Rescale(nn.Module):
    """``SpeciesWiseRescale`` and ``ModalWiseRescale`` of one-hot species."""

    def __init__(self, own: Any, fixed: int | None) -> None:
        super().__init__()
        self.shift, self.scale, self.fixed = own.shift, own.scale, fixed

    def forward(self, data: Data) -> Data:
        data["atomic_energy"] = data["scaled_atomic_energy"] * self.each(self.scale, data) + self.each(self.shift, data)
        return data

    def each(self, table: Tensor, data: Data) -> Tensor:
        """The entry of each atom, [atoms, 1], of a table [species] or [modalities, species]."""
        species = data["node_attr"]
        if table.dim() == 2 and self.fixed is None:
            each = species @ table.t()
            return each[torch.arange(each.shape[0]), data["modal"][data["batch"]]].unsqueeze(1)
        row = table if table.dim() == 1 else table[self.fixed]
        return species @ row.unsqueeze(1)


def _of_modality(rows: Tensor, fixed: int | None, data: Data) -> Tensor:
    """The row of each atom's modality, [atoms, n], or the one row of all."""
    return rows[data["modal"][data["batch"]]] if fixed is None else rows[fixed]


class _Reduce(nn.Module):
    """``AtomReduce`` to as many structures as there are."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.constant = own.constant

    def forward(self, data: Data) -> Data:
        energies = data["atomic_energy"].squeeze(1)
        total = energies.new_zeros(data["modal"].shape[0]).index_add(0, data["batch"], energies)
        data["inferred_total_energy"] = total * self.constant
        return data


def _unscripted(module: Any, path: str) -> nn.Module:
    """``normalize2mom`` of a function that is compiled code (``ShiftedSoftPlus``), of which tracing sees no node."""
    if isinstance(module.f, torch.jit.ScriptFunction):
        name = str(module.f.name)
        if name != "ShiftedSoftPlus":
            raise _refused(f"the activation {name} is TorchScript code", path, module, "a Python function")
        module.f = _shifted_softplus
    return module


def _shifted_softplus(x: Tensor) -> Tensor:
    return nn.functional.softplus(x) - log(2.0)


OWN_RULES: Mapping[str, Rule] = {"e3nn.math._normalize_activation.normalize2mom": _unscripted}
#: a class derived from one of these is none of them, whatever it computes
EXACT = {"sevenn.nn.sequential.AtomGraphSequential", *RULES, *OWN_RULES, *DERIVED}
