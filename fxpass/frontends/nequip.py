"""NequIP (nequip): ``GraphModel`` of the builders ``NequIPGNNModel`` and ``FullNequIPGNNModel``, built or packaged."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.package.package_importer import PackageImporter

from .._torch_compat import pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..capture.rules import Rule, qualified
from ..errors import Location, MissingExtraError, UnsupportedModelError
from ..ir.program import Program, TensorSpec
from ..structures import SYMBOLS, Evaluation, Neighbours, Structure, neighbour_list
from .nequip_interface import NequipInterface
from .nequip_rules import NEQUIP_RULES, attributes_by_type

MODELS = ("nequip.nn.graph_model.GraphModel", "nequip.nn.compile.CompileGraphModel")
#: modules on the way from edges to energies that the frontend covers
COMMON = (
    "nequip.nn._graph_mixin.SequentialGraphNetwork",
    "nequip.nn.embedding._edge.EdgeLengthNormalizer",
    "nequip.nn.embedding._edge.BesselEdgeLengthEncoding",
    "nequip.nn.embedding._edge.AddRadialCutoffToData",
    "nequip.nn.mlp.ScalarMLP",
    "nequip.nn.atomwise.PerTypeScaleShift",
    "nequip.nn.atomwise.AtomwiseReduce",
    "nequip.nn.pair_potential.ZBL",
)
LAYERS = (
    "nequip.nn.embedding.node.NodeTypeEmbed",
    "nequip.nn.embedding._edge.SphericalHarmonicEdgeAttrs",
    "nequip.nn.misc.ApplyFactor",
    "nequip.nn.convnetlayer.ConvNetLayer",
)
#: by the end of its name, what computes products of tensors; accelerated forms of it have another name
PRODUCTS = {
    "TensorProductScatter": "nequip.nn._tp_scatter_base.TensorProductScatter",
    "Contracter": "allegro.nn._strided._contract.Contracter",
}
GHOSTS = "nequip.nn._ghost_exchange_lmp_mliap.LAMMPSMLIAPGhostExchangeModule"
#: packages whose modules are traced; code of others could change what a stand-in leaves out
PACKAGES = ("nequip", "allegro", "e3nn", "torch")
#: subclasses of what has a rule that compute the same
DERIVED = (
    "e3nn.o3._tensor_product._sub.FullyConnectedTensorProduct",
    "e3nn.o3._tensor_product._sub.ElementwiseTensorProduct",
)


class NequipFrontend:
    """Frontend for nequip; tested with the versions in ``tested``."""

    name: ClassVar[str] = "nequip"
    extra: ClassVar[str] = "nequip"
    tested: ClassVar[tuple[str, ...]] = ("0.19.1",)
    covered: ClassVar[tuple[str, ...]] = (*COMMON, *LAYERS)
    rules: ClassVar[Mapping[str, Rule]] = NEQUIP_RULES
    package: ClassVar[str] = "nequip"

    def recognises(self, model: Any) -> bool:
        return is_graph_model(model) and not holds_allegro(model)

    def reads(self, path: str) -> bool:
        return kind_of_file(path) == self.name

    def load(self, path: str) -> nn.Module:
        try:
            from nequip.model.saved_models.load_utils import load_saved_model
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{path} needs nequip to be loaded, and {error.name} is not installed",
                hint=f'pip install "fxpass[{self.extra}]"',
            ) from error
        models = load_saved_model(path, model_key=None)
        if len(models) != 1:
            raise UnsupportedModelError(
                f"{path} holds {len(models)} models: {', '.join(models)}",
                hint="load one with nequip's load_saved_model(path, model_key=NAME) and optimise that",
            )
        (model,) = models.values()
        return model.eval()

    def check(self, model: Any) -> None:
        check_version(type(self), model)
        if _kind(model) not in MODELS:
            what = f"the model class {type(model).__name__}, which derives from GraphModel, is not covered"
            raise _refused(what, "", model, "a GraphModel")
        output = model.model
        if _kind(output) != "nequip.nn.grad_output.ForceStressOutput":
            what = f"the output module {type(output).__name__} is not covered"
            raise _refused(what, "model", output, "ForceStressOutput")
        if not output.do_derivatives:
            hint = "apply nequip's modifier enable_ForceStressOutput first"
            raise _refused("it computes no forces (do_derivatives=False)", "model", output, hint)
        _check_steps(output.func, "model.func", self.covered)
        for path, module in model.named_modules():
            kind = _kind(module)
            if any(kind.endswith(name) and kind != plain for name, plain in PRODUCTS.items()):
                what = f"the accelerated tensor product {type(module).__name__} is not covered"
                raise _refused(what, path, module, "the model without this accelerator, which fxpass replaces")
            if kind == GHOSTS:
                what = "the exchange of ghost atoms with LAMMPS is not covered"
                raise _refused(what, path, module, "the model without the modifier enable_LAMMPSMLIAPGhostExchange")
            bases = [qualified(cls) for cls in type(module).__mro__[1:]]
            derived = kind not in self.rules and any(base in self.rules for base in bases)
            if kind.partition(".")[0] not in PACKAGES or (derived and kind not in DERIVED):
                what = f"the class {type(module).__name__} is not covered: it may compute something else"
                raise _refused(what, path, module, "the modules that nequip's builders make")
            if getattr(module, "do_categorical_graph_field_embed", False):
                fields = ", ".join(module.categorical_graph_field_embed_modules)
                what = f"an embedding of fields of the whole graph ({fields}) is not covered"
                raise _refused(what, path, module, "a model without categorical_graph_field_embed")
        if not model.type_names:
            raise _refused("it has no type names", "", model, "a model made by one of nequip's builders")
        _numbers(model)

    def reference(self, model: Any) -> tuple[nn.Module, tuple[str, ...]]:
        return copy_model(model).eval(), ()

    def capture(self, model: Any) -> Program:
        dtype, types = model.model_dtype, len(model.type_names)
        given = torch.float64 if _precise(model) else dtype
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), given, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("node_attrs", ("atoms", types), dtype, f"{types}x0e", "", frozenset({"one_hot"})),
            TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("num_atoms", ("graphs",), torch.int64),
        )
        names = ("total_energy", "atomic_energy")
        outputs = tuple(TensorSpec(name, (), torch.float64, None, "eV") for name in names)
        replica: Any = prepare(model, self.rules)
        attributes_by_type(replica)
        steps = replica.model.func

        def run(edge_vectors: Tensor, edge_index: Tensor, node_attrs: Tensor, batch: Tensor, num_atoms: Tensor) -> Any:
            sender, receiver = edge_index[0], edge_index[1]
            kinds = torch.argmax(node_attrs, 1)
            data = {
                "edge_vectors": -edge_vectors.to(dtype),  # theirs run from the receiver to the sender
                "edge_lengths": torch.linalg.norm(edge_vectors, dim=1, keepdim=True),
                "edge_index": (receiver, sender),
                "edge_type_flat": (kinds[receiver], kinds[sender]),
                "atom_types": kinds,
                "node_attrs": node_attrs,
                "batch": batch,
                "num_atoms": num_atoms,
            }
            result = steps(data)
            return [result[name] for name in names]

        return capture(run, replica, inputs, outputs, energy="total_energy")

    def attributes(self, model: Any) -> dict[str, Any]:
        dtype = str(model.model_dtype).removeprefix("torch.")
        return {
            "cutoff": float(model.metadata["r_max"]),
            "numbers": _numbers(model),
            "type_names": list(model.type_names),
            "metadata": {**model.metadata, "model_dtype": dtype},
            "inputs": [name for name in model.model_input_fields if name != "lmp_mliap_data"],
            "dtype": dtype,
            "precise_vectors": _precise(model),
        }

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        return NequipInterface(energy, forces, attributes)

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        numbers = _numbers(model)
        structure.check(numbers, neighbours)
        edges, units = neighbours(structure, float(model.metadata["r_max"]))
        data = {
            "pos": torch.from_numpy(structure.positions.copy()),
            "atom_types": torch.tensor([numbers.index(z) for z in structure.numbers]),
            "edge_index": torch.from_numpy(edges[::-1].copy()),  # theirs has receivers first, and their vectors
        }
        if any(structure.pbc):
            data["cell"] = torch.from_numpy(structure.cell.copy()).unsqueeze(0)
            data["edge_cell_shift"] = torch.from_numpy(-units)  # run from there
        result = model(data)
        return Evaluation(
            energy=float(result["total_energy"].detach()),
            forces=result["forces"].detach().double().numpy(),
            stress=result["stress"][0].detach().double().numpy() if all(structure.pbc) else None,
            dtype=str(_dtype(model)).removeprefix("torch."),
        )


def is_graph_model(model: Any) -> bool:
    return any(qualified(cls) == "nequip.nn.graph_model.GraphModel" for cls in type(model).__mro__)


def holds_allegro(model: nn.Module) -> bool:
    return any(_kind(module).startswith("allegro.") for module in model.modules())


def kind_of_file(path: str) -> str | None:
    """``"nequip"`` or ``"allegro"`` where a file is a package or checkpoint of nequip's; nothing in it is run."""
    if path.endswith(".nequip.zip"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.partition("/")[2] for name in archive.namelist()]
        except (zipfile.BadZipFile, OSError):
            return None
        if "model/package_metadata.txt" not in names:
            return None
        return "allegro" if any(name.startswith("allegro/") for name in names) else "nequip"
    # what NequIP's training writes of itself and its own loader asks for; keys, so that values can say anything
    if not all(pickle_names(path, _pickled(key)) for key in ("info_dict", "training_module", "num_datasets")):
        return None
    return "allegro" if pickle_names(path, "\0\0\0allegro.model.") else "nequip"  # a builder, at the start of a string


def _pickled(text: str) -> str:
    """A whole string of less than 128 characters as pickle writes it (BINUNICODE)."""
    return f"X{chr(len(text))}\0\0\0{text}"


def check_version(frontend: type[NequipFrontend], model: Any) -> None:
    """Refuse another version of the frontend's package than it is tested with: of the code that ``model`` runs."""
    importer = type(model).forward.__globals__.get("__loader__")
    wanted = f"{frontend.package} {' or '.join(frontend.tested)}"
    if isinstance(importer, PackageImporter):  # a .nequip.zip brings its own
        recorded = importer.load_text("model", "package_metadata.txt")
        line = re.search(rf"^  {frontend.name}: (\d\S*)$", recorded, re.MULTILINE)
        found = line[1] if line else "of no recorded version, in the model's package,"
        hint = f"a model packaged by {wanted}"
    else:
        try:
            found, hint = metadata.version(frontend.package), wanted
        except metadata.PackageNotFoundError:
            found, hint = "of no known version", f'pip install "fxpass[{frontend.extra}]", for {wanted}'
    if found.rpartition(".")[0] not in {version.rpartition(".")[0] for version in frontend.tested}:
        raise _refused(f"{frontend.package} {found} is not covered", "", model, hint)


def _kind(module: nn.Module) -> str:
    return qualified(type(module))


def _check_steps(steps: nn.Module, path: str, covered: tuple[str, ...]) -> None:
    """Refuse a step of the model that the frontend does not know."""
    for name, step in steps.named_children():
        kind = _kind(step)
        if kind not in covered:
            known = ", ".join(sorted(name.rpartition(".")[2] for name in covered))
            what = f"the module {type(step).__name__} is not covered"
            raise _refused(what, f"{path}.{name}", step, f"one of {known}")
        if kind == COMMON[0]:
            _check_steps(step, f"{path}.{name}", covered)


def _numbers(model: Any) -> list[int]:
    """Atomic numbers by type; the names of types must be chemical symbols."""
    strange = [name for name in model.type_names if name not in SYMBOLS[1:]]
    if strange:
        what = f"the type names {', '.join(strange)} are no chemical symbols, and no structure can be made of them"
        raise UnsupportedModelError(what, hint="a model whose type_names are chemical symbols")
    return [SYMBOLS.index(name) for name in model.type_names]


def _precise(model: Any) -> bool:
    """Whether a program takes edge vectors in float64: for a pair potential, which NequIP computes in float64."""
    return any(_kind(module) == "nequip.nn.pair_potential.ZBL" for module in model.modules())


def _dtype(model: Any) -> torch.dtype:
    """The type of the weights, of a model or its drop-in."""
    return model.zero.dtype if hasattr(model, "zero") else model.model_dtype


def _refused(what: str, path: str, module: nn.Module, hint: str) -> UnsupportedModelError:
    where = Location(module_path=path or "(model)", source=_kind(module))
    return UnsupportedModelError(
        what, where=where, hint=f"{hint}; or register a frontend for it (entry point group fxpass.frontends)"
    )
