"""schnetpack: ``NeuralNetworkPotential`` with SchNet, PaiNN or SO3net, ``Atomwise`` energies, forces and stress."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import takewhile
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.utils.data.dataloader
from torch import Tensor, nn

from .._torch_compat import load_pickle, pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..errors import Location, MissingExtraError, UnsupportedModelError
from ..ir import ops
from ..ir.program import Program, TensorSpec
from ..structures import Evaluation, Neighbours, Structure, neighbour_list
from .base import dtype_of
from .schnetpack_interface import SchNetPackInterface
from .schnetpack_layers import REPRESENTATIONS, ZBLStandIn

MODEL = "schnetpack.model.base.NeuralNetworkPotential"
INPUTS = {"schnetpack.atomistic.distances.PairwiseDistances", "schnetpack.atomistic.response.Strain"}
ATOMWISE = "schnetpack.atomistic.atomwise.Atomwise"
AGGREGATION = "schnetpack.atomistic.aggregation.Aggregation"
ZBL = "schnetpack.atomistic.nuclear_repulsion.ZBLRepulsionEnergy"
FORCES = "schnetpack.atomistic.response.Forces"
OUTPUTS = {ATOMWISE, AGGREGATION, ZBL, FORCES}
CASTS = {f"schnetpack.transform.casting.{name}" for name in ("CastMap", "CastTo32", "CastTo64")}
CAST_PAIRS = {("float32", "float64"), ("float64", "float32")}
OFFSETS = {f"schnetpack.transform.atomistic.{name}" for name in ("AddOffsets", "RemoveOffsets")}
SCALE = "schnetpack.transform.atomistic.ScaleProperty"
POSTPROCESSORS = {*CASTS, *OFFSETS, SCALE}
#: cutoff function -> its attribute that holds the length from which on it is zero
CUTOFFS = {f"schnetpack.nn.cutoff.{name}": "cutoff" for name in ("CosineCutoff", "MollifierCutoff")}
ZBL_CUTOFFS = {**CUTOFFS, "schnetpack.nn.cutoff.SwitchFunction": "switch_off"}
EMBEDDINGS = {"torch.nn.modules.sparse.Embedding", "schnetpack.nn.embedding.NuclearEmbedding"}
#: what the blocks of representations are made of
BLOCKS = {
    "schnetpack.representation.schnet.SchNetInteraction",
    "schnetpack.representation.painn.PaiNNInteraction",
    "schnetpack.representation.painn.PaiNNMixing",
    "schnetpack.nn.so3.SO3Convolution",
    "schnetpack.nn.so3.SO3ParametricGatedNonlinearity",
    "torch.nn.modules.linear.Linear",
}

UNITS = (
    "a schnetpack model does not say its units: energies are taken to be in eV and lengths in Angstrom; in other units "
    "budgets and the receipt are in those, and calculators must be told (SpkCalculator has energy_unit)"
)


def import_schnetpack() -> ModuleType:
    """``schnetpack``, imported so that version 2.1.1 works with torch 2.13, where a plain import fails.

    It imports a type variable, ``T_co``, from ``torch.utils.data.dataloader``, which has it under another name now;
    one is put there for the time of the import.  Call this before anything else imports schnetpack.

    Raises:
        MissingExtraError: schnetpack, or a package that it needs, is not installed.
    """
    loader: Any = torch.utils.data.dataloader
    missing = not hasattr(loader, "T_co")
    if missing:
        loader.T_co = TypeVar("T_co", covariant=True)
    try:
        return importlib.import_module("schnetpack")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"schnetpack cannot be imported: {error.name} is not installed",
            hint='pip install "fxpass[schnetpack]", then pip install --no-deps schnetpack==2.1.1',
        ) from error
    finally:
        if missing:
            del loader.T_co


class SchNetPackFrontend:
    """Frontend for schnetpack; tested with the versions in ``tested``."""

    name = "schnetpack"
    extra = "schnetpack"
    tested = ("2.1.1",)

    def recognises(self, model: Any) -> bool:
        return any(cls.__module__.partition(".")[0] == "schnetpack" for cls in type(model).__mro__)

    def reads(self, path: str) -> bool:
        return pickle_names(path, "cschnetpack.model.base\n")  # as a pickle names the module of a class

    def load(self, path: str) -> nn.Module:
        import_schnetpack()  # unpickling needs its classes
        model = load_pickle(path)
        if not isinstance(model, nn.Module) or not self.recognises(model):
            raise UnsupportedModelError(
                f"{path} holds a {type(model).__name__}, not a schnetpack model",
                hint="the file best_model of spktrain, or another that torch.save wrote of a model",
            )
        return model.eval()

    def check(self, model: Any) -> None:
        found = metadata.version("schnetpack")
        if found not in self.tested:
            what = f"schnetpack {found} is not covered, only {', '.join(self.tested)}"
            raise _refused(what, "", model, f"pip install schnetpack=={self.tested[-1]}")
        if name_of(model) != MODEL:
            hint = "its attribute model" if hasattr(model, "model") else MODEL
            raise _refused(f"the model class {type(model).__name__} is not covered", "", model, hint)
        self._check_representation(model.representation)
        for kind, known in (("input", INPUTS), ("output", OUTPUTS)):
            for path, module in getattr(model, f"{kind}_modules").named_children():
                _known(f"the {kind} module", f"{kind}_modules.{path}", module, known)
        for path, module in model.postprocessors.named_children():
            _known("the postprocessor", f"postprocessors.{path}", module, POSTPROCESSORS)
            if name_of(module) in CASTS and not set(module.type_map.items()) <= CAST_PAIRS:
                what = f"a cast of {module.type_map} is not covered"
                raise _refused(what, f"postprocessors.{path}", module, "float32 and float64")
        self._check_outputs(model)
        self._check_derivatives(model)

    def _check_representation(self, representation: Any) -> None:
        _known("the representation", "representation", representation, REPRESENTATIONS)
        if len(representation.electronic_embeddings):
            path, module = "representation.electronic_embeddings.0", representation.electronic_embeddings[0]
            what = "embeddings of total charge and spin (electronic_embeddings) are not covered"
            raise _refused(what, path, module, "a model without electronic_embeddings")
        _known("the cutoff", "representation.cutoff_fn", representation.cutoff_fn, CUTOFFS)
        _known("the nuclear embedding", "representation.embedding", representation.embedding, EMBEDDINGS)
        for name in ("interactions", "mixing", "so3convs", "gatings", "mixings1", "mixings2", "mixings3"):
            for path, module in getattr(representation, name, nn.ModuleList()).named_children():
                _known("the block", f"representation.{name}.{path}", module, BLOCKS)

    def _check_outputs(self, model: Any) -> None:
        """Every output is one value, of edges that the representation sees too."""
        cutoff = _reach(model.representation.cutoff_fn)
        offsets = {module._property for module in model.postprocessors if name_of(module) in OFFSETS}
        seen: set[str] = set()
        for name, module in model.output_modules.named_children():
            path, keys = f"output_modules.{name}", set(_keys(module))
            if keys & seen:
                what = f"the output {min(keys & seen)!r}, which a module before it computes too, is not covered"
                raise _refused(what, path, module, "another output key for one of them")
            seen |= keys
            if name_of(module) == ZBL:
                self._check_zbl(path, module, cutoff)
            elif getattr(module, "aggregation_mode", "") is None and len(keys) == 2 and keys & offsets:
                what = f"{' and '.join(sorted(keys))} are one tensor, and offsets of one in both are not covered"
                raise _refused(what, path, module, "one name for output_key and per_atom_output_key")

    def _check_zbl(self, path: str, zbl: Any, cutoff: float) -> None:
        hint = f"ZBLRepulsionEnergy(..., cutoff_fn=CosineCutoff({cutoff:g})), or a shorter one"
        if zbl.cutoff_fn is None:
            what = "a repulsion without cutoff_fn, which neighbours beyond the representation's cutoff add to,"
            raise _refused(f"{what} is not covered", path, zbl, hint)
        _known("the cutoff", f"{path}.cutoff_fn", zbl.cutoff_fn, ZBL_CUTOFFS)
        if _reach(zbl.cutoff_fn) > cutoff:
            what = f"a repulsion to {_reach(zbl.cutoff_fn):g}, beyond the representation's cutoff of {cutoff:g},"
            raise _refused(f"{what} is not covered", path, zbl, hint)

    def _check_derivatives(self, model: Any) -> None:
        inputs = [name_of(module).rpartition(".")[2] for module in model.input_modules]
        forces = [module for module in model.output_modules if name_of(module) == FORCES]
        if inputs.count("PairwiseDistances") != 1 or inputs[-1] != "PairwiseDistances":
            what = f"the input modules {', '.join(inputs) or '(none)'} do not end in one PairwiseDistances"
            raise _refused(what, "input_modules", model.input_modules, "[PairwiseDistances()], or Strain() before it")
        if len(forces) != 1 or not forces[0].calc_forces:
            what = f"it has {len(forces)} modules Forces, not one that computes forces"
            raise _refused(what, "output_modules", model.output_modules, "an energy model with Forces()")
        (module,) = forces
        if module.calc_stress and "Strain" not in inputs:
            what = "Forces(calc_stress=True) needs the input module Strain, without which its energy has no strain"
            raise _refused(what, "output_modules", module, "input_modules=[Strain(), PairwiseDistances()]")
        before = takewhile(lambda m: m is not module, model.output_modules)
        energies = [m.output_key for m in before if name_of(m) in (AGGREGATION, ZBL) or _is_energy(m)]
        if module.energy_key not in energies:
            what = f"no output module before Forces computes one {module.energy_key!r} a system to take the gradient of"
            raise _refused(what, "output_modules", module, f"energy_key= one of {', '.join(energies) or '(none)'}")

    def reference(self, model: Any) -> tuple[nn.Module, tuple[str, ...]]:
        replica = copy_model(model)
        # not where it is evaluated already: NuclearEmbedding would sum its parts again
        return (replica.eval() if replica.training else replica), (UNITS,)

    def capture(self, model: Any) -> Program:
        dtype, facts = dtype_of(model), self.attributes(model)
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("atomic_numbers", ("atoms",), torch.int64, None, "", frozenset({f"below:{facts['species']}"})),
            TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("n_atoms", ("graphs",), dtype),
        )
        energy = facts["energy_key"]
        outputs = tuple(TensorSpec(n, (), dtype, None, "eV" if n == energy else "") for n in facts["outputs"])
        replica: Any = prepare(model, {**REPRESENTATIONS, ZBL: ZBLStandIn})

        def run(vectors: Tensor, index: Tensor, numbers: Tensor, batch: Tensor, counts: Tensor) -> list[Tensor]:
            neighbour, centre = index
            features = replica.representation(numbers, vectors, centre, neighbour)
            values: dict[str, Tensor] = {}
            for module, original in zip(replica.output_modules, model.output_modules, strict=True):
                kind = name_of(original)
                if kind == ATOMWISE:
                    values |= _atomwise(module, features, batch, counts)
                elif kind == ZBL:
                    single = module(numbers, vectors, centre, neighbour)
                    values[original.output_key] = ops.scatter_sum(single, batch, counts.shape[0])
                elif kind == AGGREGATION:
                    values[module.output_key] = torch.stack([values[key] for key in module.keys]).sum(0)
            return [values[name] for name in facts["outputs"]]

        return capture(run, replica, inputs, outputs, energy=energy)

    def attributes(self, model: Any) -> dict[str, Any]:
        (forces,) = (module for module in model.output_modules if name_of(module) == FORCES)
        species = _species(model.representation.embedding)
        keys = [key for module in model.output_modules if name_of(module) != FORCES for key in _keys(module)]
        return {
            "kind": type(model.representation).__name__,
            "cutoff": _reach(model.representation.cutoff_fn),
            "numbers": list(range(1, species)),
            "species": species,
            "outputs": list(dict.fromkeys(keys)),
            "model_outputs": list(model.model_outputs),
            "required_derivatives": list(model.required_derivatives),
            "energy_key": forces.energy_key,
            "force_key": forces.force_key,
            "stress_key": forces.stress_key if forces.calc_stress else "",
            "postprocessors": [_postprocessor(module) for module in model.postprocessors],
            "do_postprocessing": bool(model.do_postprocessing),
            "input_dtype_str": str(model.input_dtype_str),
            "spk_version": str(getattr(model, "spk_version", "")),
            "dtype": str(dtype_of(model)).removeprefix("torch."),
        }

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        return SchNetPackInterface(energy, forces, attributes)

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        if hasattr(model, "representation"):
            facts = self.attributes(model)
        else:  # the drop-in
            facts = {name: getattr(model, name) for name in ("species", "energy_key", "force_key", "stress_key")}
            facts["cutoff"] = model.edges.cutoff
        data = schnetpack_batch([structure], range(1, facts["species"]), facts["cutoff"], dtype_of(model), neighbours)
        result = {name: value.detach().double().numpy() for name, value in model(data).items()}
        stress = facts["stress_key"] if all(structure.pbc) else ""
        return Evaluation(
            energy=float(result[facts["energy_key"]][0]),
            forces=result[facts["force_key"]],
            stress=result[stress][0] if stress else None,
            dtype=str(dtype_of(model)).removeprefix("torch."),
        )


def schnetpack_batch(
    structures: Sequence[Structure],
    numbers: Sequence[int],
    cutoff: float,
    dtype: torch.dtype,
    neighbours: Neighbours = neighbour_list,
) -> dict[str, Tensor]:
    """schnetpack's inputs for a batch of structures, as its ``AtomsConverter`` makes them.

    Returns:
        by schnetpack's keys: positions [atoms, 3], cell [graphs, 3, 3] and offsets [edges, 3] in Angstrom; pbc
        [graphs, 3]; atomic numbers and number of the system [atoms]; idx_i (centre) and idx_j (neighbour) [edges];
        number of atoms [graphs].

    Raises:
        StructureError: a structure is malformed or holds another species.
    """
    rows: dict[str, list[np.ndarray]] = {}
    first = 0
    for k, structure in enumerate(structures):
        structure.check(numbers, neighbours)
        (sender, receiver), units = neighbours(structure, cutoff)
        one = {
            "_atomic_numbers": structure.numbers,
            "_positions": structure.positions,
            "_cell": structure.cell[None],
            "_pbc": np.array([structure.pbc]),
            "_offsets": -(units @ structure.cell),
            "_idx_i": receiver + first,
            "_idx_j": sender + first,
            "_idx_m": np.full(len(structure), k),
            "_n_atoms": np.array([len(structure)]),
        }
        for name, value in one.items():
            rows.setdefault(name, []).append(value)
        first += len(structure)
    made = {name: torch.from_numpy(np.concatenate(values)) for name, values in rows.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


def _atomwise(module: Any, features: Tensor, batch: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """What an ``Atomwise`` computes, by output key: for each atom, and for each system."""
    single = module.outnet(features)
    values = {} if module.per_atom_output_key is None else {module.per_atom_output_key: single}
    total = single
    if module.aggregation_mode is not None:
        total = ops.scatter_sum(single, batch, counts.shape[0]).squeeze(-1)
        if module.aggregation_mode == "avg":
            total = total / counts
    return {**values, module.output_key: total}


def _is_energy(module: Any) -> bool:
    return name_of(module) == ATOMWISE and module.n_out == 1 and module.aggregation_mode is not None


def _keys(module: Any) -> list[str]:
    """Outputs of an output module, in the order in which :func:`_atomwise` gives them."""
    if name_of(module) == FORCES:
        return [module.force_key, *([module.stress_key] if module.calc_stress else [])]
    return [key for key in (getattr(module, "per_atom_output_key", None), module.output_key) if key is not None]


def _reach(cutoff_fn: Any) -> float:
    """Length from which on a cutoff function is zero."""
    return float(getattr(cutoff_fn, ZBL_CUTOFFS[name_of(cutoff_fn)]))


def _postprocessor(module: Any) -> dict[str, Any]:
    """A postprocessor as data; numbers with the type in which the model keeps them."""

    def stored(tensor: Tensor) -> dict[str, Any]:
        return {"values": tensor.tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}

    name = name_of(module)
    if name in CASTS:
        return {"kind": "CastMap", "type_map": dict(module.type_map)}
    if name == SCALE:
        keys = {"input_key": module.input_key, "output_key": module.output_key}
        return {"kind": "ScaleProperty", **keys, "scale": stored(module.scale)}
    kind = type(module).__name__
    verb = kind.removesuffix("Offsets").lower()
    return {
        "kind": kind,
        "property": module._property,
        "is_extensive": bool(module.is_extensive),
        "mean": stored(module.mean) if getattr(module, f"{verb}_mean") else None,
        "atomref": stored(module.atomref) if getattr(module, f"{verb}_atomrefs") else None,
    }


def _species(embedding: Any) -> int:
    """Atomic numbers below it have an embedding."""
    table = embedding.weight if isinstance(embedding, nn.Embedding) else embedding.element_embedding
    return int(table.shape[0])


def name_of(module: Any) -> str:
    """Qualified name of a module's class; a class of which something derives is not that class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _known(what: str, path: str, module: Any, known: Any) -> None:
    if name_of(module) not in known:
        choices = ", ".join(sorted(name.rpartition(".")[2] for name in known))
        raise _refused(f"{what} {type(module).__name__} is not covered", path, module, f"one of {choices}")


def _refused(what: str, path: str, module: Any, hint: str) -> UnsupportedModelError:
    where = Location(module_path=path or "(model)", source=name_of(module))
    return UnsupportedModelError(
        what, where=where, hint=f"{hint}; or register a frontend for it (entry point group fxpass.frontends)"
    )
