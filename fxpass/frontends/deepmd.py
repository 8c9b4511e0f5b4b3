"""deepmd-kit (PyTorch backend): energy models of ``get_model``, files of ``dp --pt train`` and ``dp --pt freeze``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .._torch_compat import pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..capture.rules import qualified
from ..errors import Location, MissingExtraError, UnsupportedModelError
from ..ir import ops
from ..ir.program import Program, TensorSpec
from ..structures import SYMBOLS, Evaluation, Floats, Neighbours, Structure, neighbour_list
from .deepmd_interface import DeepmdInterface
from .deepmd_rules import PACKAGE, RULES, Fitting, counted_types, excluded_pairs, stand_in

MODEL = "deepmd.pt.model.model.ener_model.EnergyModel"
ATOMIC = "deepmd.pt.model.atomic_model.energy_atomic_model.DPEnergyAtomicModel"
FITTINGS = ("deepmd.pt.model.task.ener.EnergyFittingNet", "deepmd.pt.model.task.invar_fitting.InvarFitting")
DESCRIPTORS = (
    "se_a.DescrptSeA",
    "se_r.DescrptSeR",
    "se_t.DescrptSeT",
    "dpa1.DescrptDPA1",
    "se_atten_v2.DescrptSeAttenV2",
    "dpa2.DescrptDPA2",
    "dpa3.DescrptDPA3",
    "hybrid.DescrptHybrid",
)
PRECISIONS = (torch.float32, torch.float64)


def import_deepmd() -> ModuleType:
    """``deepmd.pt``, imported so that its wheels work with a torch other than the one they were built for.

    Their library of operators cannot be loaded there, and an import fails; for the time of this import deepmd-kit is
    told that it has none.  Training and evaluation do without, compressed models do not.  Call this before anything
    else imports ``deepmd.pt``.

    Raises:
        MissingExtraError: deepmd-kit, or a package that it needs, is not installed.
    """
    try:
        own: Any = importlib.import_module("deepmd.env")
        built = str(own.GLOBAL_CONFIG.get("pt_version", ""))
        if torch.__version__.partition("+")[0] == built:
            return importlib.import_module("deepmd.pt")
        folder, wheel = own.SHARED_LIB_DIR, own.GLOBAL_CONFIG.get("cibuildwheel", "0")
        own.SHARED_LIB_DIR, own.GLOBAL_CONFIG["cibuildwheel"] = Path(folder) / "none", "0"
        try:
            return importlib.import_module("deepmd.pt")
        finally:
            own.SHARED_LIB_DIR, own.GLOBAL_CONFIG["cibuildwheel"] = folder, wheel
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"deepmd-kit cannot be imported: {error.name} is not installed",
            hint='pip install "fxpass[deepmd]", then pip install --no-deps deepmd-kit==3.2.0',
        ) from error


class DeepmdFrontend:
    """Frontend for deepmd-kit; tested with the versions in ``tested``."""

    name: ClassVar[str] = "deepmd"
    extra: ClassVar[str] = "deepmd"
    tested: ClassVar[tuple[str, ...]] = ("3.2.0",)

    def recognises(self, model: Any) -> bool:
        return any(cls.__module__.startswith("deepmd.pt.model.") for cls in type(model).__mro__)

    def reads(self, path: str) -> bool:
        # keys of a checkpoint's state; or the method that a frozen model's script is asked for its configuration by
        return pickle_names(path, "model_params") or pickle_names(path, "model_def_script")

    def load(self, path: str) -> nn.Module:
        import_deepmd()
        from deepmd.pt.model.model import get_model

        if pickle_names(path, "model_def_script"):
            return _thawed(path, get_model)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        params = state["_extra_state"]["model_params"]
        if "model_dict" in params:
            heads = ", ".join(params["model_dict"])
            raise UnsupportedModelError(
                f"{path} holds a model with several heads: {heads}",
                hint="dp --pt freeze --head NAME, and optimise the frozen model of one of them",
            )
        model = get_model(params)
        weights = {name.removeprefix("model.Default."): value for name, value in state.items()}
        del weights["_extra_state"]
        return _filled(model, weights, path)

    def check(self, model: Any) -> None:
        found = metadata.version("deepmd-kit")
        if found not in self.tested:
            what = f"deepmd-kit {found} is not covered, only {', '.join(self.tested)}"
            raise _refused(what, "", model, f"pip install --no-deps deepmd-kit=={self.tested[-1]}")
        if qualified(type(model)) != MODEL:
            what = f"the model class {type(model).__name__} is not covered"
            raise _refused(what, "", model, "an EnergyModel, without spin, Hessian or pair tables")
        atomic = model.atomic_model
        if qualified(type(atomic)) != ATOMIC:
            raise _refused(f"the atomic model {type(atomic).__name__} is not covered", "atomic_model", atomic, ATOMIC)
        self._check_fitting(atomic.fitting_net)
        _check_descriptor("atomic_model.descriptor", atomic.descriptor)
        if len(set(atomic.type_map)) != len(atomic.type_map) or not atomic.type_map:
            raise _refused("its type_map is empty or names a type twice", "atomic_model", atomic, "one name a type")
        _numbers(model)

    def _check_fitting(self, fitting: Any) -> None:
        path = "atomic_model.fitting_net"
        if qualified(type(fitting)) not in FITTINGS:
            names = ", ".join(name.rpartition(".")[2] for name in FITTINGS)
            raise _refused(f"the fitting net {type(fitting).__name__} is not covered", path, fitting, f"one of {names}")
        for name in ("numb_fparam", "numb_aparam", "dim_case_embd"):
            if getattr(fitting, name):
                what = f"a fitting net with {name}={getattr(fitting, name)} is not covered"
                raise _refused(what, path, fitting, f"{name}=0")
        if fitting.prec not in PRECISIONS:
            raise _refused(f"the precision {fitting.precision} is not covered", path, fitting, "float32 or float64")

    def reference(self, model: Any) -> tuple[nn.Module, tuple[str, ...]]:
        replica = copy_model(model)
        return (replica.eval() if replica.training else replica), ()

    def capture(self, model: Any) -> Program:
        dtype, types = _dtype(model), len(model.atomic_model.type_map)
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("node_attrs", ("atoms", types), dtype, f"{types}x0e", "", frozenset({"one_hot"})),
            TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("num_atoms", ("graphs",), torch.int64),
        )
        outputs = tuple(TensorSpec(name, (), torch.float64, None, "eV") for name in ("energy", "atom_energy"))
        replica: Any = prepare(model, RULES).atomic_model
        replica.descriptor = stand_in(replica.descriptor, excluded_pairs(replica, types))
        counted = counted_types(replica, types)
        replica.fitting_net = Fitting(replica.fitting_net, replica.out_bias[0].detach(), counted)

        def run(vectors: Tensor, index: Tensor, hot: Tensor, batch: Tensor, counts: Tensor) -> list[Tensor]:
            single = replica.fitting_net(replica.descriptor(vectors, index, hot), hot)
            return [ops.scatter_sum(single, batch, counts.shape[0]), single]

        return capture(run, replica, inputs, outputs, example=lambda seed: _example(types, dtype, seed))

    def attributes(self, model: Any) -> dict[str, Any]:
        atomic = model.atomic_model
        return {
            "cutoff": float(model.get_rcut()),
            "numbers": _numbers(model),
            "molecules": True,  # networks of an inverse distance
            "type_map": list(atomic.type_map),
            "sel": [int(count) for count in model.get_sel()],
            "mixed_types": bool(model.mixed_types()),
            "message_passing": bool(model.has_message_passing()),
            "counted": counted_types(atomic, len(atomic.type_map)).int().tolist(),
            "model_def_script": str(model.get_model_def_script()),
            "dtype": str(_dtype(model)).removeprefix("torch."),
        }

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        return DeepmdInterface(energy, forces, attributes)

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        names = list(model.get_type_map())
        numbers = [SYMBOLS.index(name) for name in names]
        structure.check(numbers, neighbours)
        types = torch.tensor([[numbers.index(z) for z in structure.numbers]])
        coord = torch.from_numpy(structure.positions.copy()).unsqueeze(0)
        box = torch.from_numpy(_box(structure, float(model.get_rcut()))).view(1, 9) if any(structure.pbc) else None
        result = {name: value.detach().double() for name, value in model(coord, types, box).items()}
        virial = result["virial"].view(3, 3).numpy()
        return Evaluation(
            energy=float(result["energy"]),
            forces=result["force"][0].numpy(),
            stress=-0.5 * (virial + virial.T) / structure.volume if all(structure.pbc) else None,
            dtype=str(_dtype(model)).removeprefix("torch."),
        )


def _example(types: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """An atom of each of the first types, with a neighbour of each of them: no exclusion leaves it without any."""
    kinds = torch.arange(min(types, 6))
    index = torch.cartesian_prod(kinds, kinds).t().contiguous()
    vectors = torch.randn((index.shape[1], 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = (vectors / vectors.norm(dim=1, keepdim=True) * (1 + 0.1 * seed)).to(dtype)
    hot = nn.functional.one_hot(kinds, types).to(dtype)
    return [vectors, index, hot, torch.zeros_like(kinds), torch.tensor([len(kinds)])]


def _box(structure: Structure, cutoff: float) -> Floats:
    """A cell that is periodic along all three vectors, in which what is not has no neighbours across the border."""
    cell = structure.cell.copy()
    for axis in range(3):
        if not structure.pbc[axis]:
            others = [k for k in range(3) if k != axis and structure.pbc[k]]
            along = np.linalg.svd(cell[others])[2][-1] if others else np.eye(3)[axis]
            reach = structure.positions @ along
            cell[axis] = along * (reach.max() - reach.min() + 2 * cutoff)
            structure = Structure(structure.numbers, structure.positions, cell, _with(structure.pbc, axis))
    return cell


def _with(pbc: tuple[bool, bool, bool], axis: int) -> tuple[bool, bool, bool]:
    first, second, third = (periodic or k == axis for k, periodic in enumerate(pbc))
    return first, second, third


def _thawed(path: str, get_model: Any) -> nn.Module:
    """The model that a frozen one was made from, by the configuration and the weights in it."""
    try:
        script = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{path} is a frozen model that holds operators of deepmd-kit's library, as compressed models do",
            hint="the checkpoint (.pt) that it was frozen from, or the frozen model before dp compress",
        ) from error
    text = script.get_model_def_script()
    if not text:
        hint = "the checkpoint (.pt) that it was frozen from"
        raise UnsupportedModelError(f"{path} is a frozen model without its configuration", hint=hint)
    return _filled(get_model(json.loads(text)), script.state_dict(), path)


def _filled(model: nn.Module, weights: Mapping[str, Any], path: str) -> nn.Module:
    """``model`` with weights in place of random numbers.

    Raises:
        UnsupportedModelError: they are not those of this model.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    wrong = [name for name in {*shapes, *given} if name not in given or shapes.get(name) != given[name].shape]
    if wrong:
        compressed = any("compress" in name or "type_embd_data" in name for name in wrong)
        what = "a compressed model" if compressed else "weights of another model than its configuration"
        raise UnsupportedModelError(
            f"{path} holds {what}: {', '.join(sorted(wrong)[:3])} differ",
            hint="the model before dp compress; fxpass compresses it itself" if compressed else None,
        )
    model.load_state_dict(given, strict=False)
    return model.eval()


def _check_descriptor(path: str, descriptor: Any) -> None:
    kind = qualified(type(descriptor))
    if kind.removeprefix(f"{PACKAGE}.") not in DESCRIPTORS:
        choices = ", ".join(name.rpartition(".")[2] for name in DESCRIPTORS)
        what = f"the descriptor {type(descriptor).__name__} is not covered"
        raise _refused(what, path, descriptor, f"one of {choices}")
    if kind.endswith("DescrptHybrid"):
        for k, part in enumerate(descriptor.descrpt_list):
            _check_descriptor(f"{path}.descrpt_list.{k}", part)
        if any(list(part.get_sel()) != list(descriptor.get_sel()) for part in descriptor.descrpt_list):
            what = "a hybrid of descriptors with different sel is not covered"
            raise _refused(what, path, descriptor, "the same sel, and the same kind of it, in all of them")
        return
    compressed = ("compress", "geo_compress", "tebd_compress")
    if any(getattr(module, name, False) is True for module in descriptor.modules() for name in compressed):
        what = "a compressed descriptor is not covered: its tables are not what it was trained as"
        raise _refused(what, path, descriptor, "the model before dp compress; fxpass compresses it itself")
    if getattr(descriptor, "prec", torch.float64) not in PRECISIONS:
        raise _refused(f"the precision {descriptor.precision} is not covered", path, descriptor, "float32 or float64")
    if getattr(descriptor, "add_chg_spin_ebd", False):
        raise _refused("embeddings of charge and spin are not covered", path, descriptor, "add_chg_spin_ebd=False")
    for inner, module in descriptor.named_modules():
        where = f"{path}.{inner}" if inner else path
        if getattr(module, "use_dynamic_sel", False):
            what = "a number of neighbours that follows from the structure (use_dynamic_sel) is not covered"
            raise _refused(what, where, module, "use_dynamic_sel=False")
        if hasattr(module, "SiLUTFunction"):
            what = "an activation function of compiled TorchScript code is not covered"
            raise _refused(what, where, module, "deepmd.pt.utils.env.CUSTOM_OP_USE_JIT = False when the model is built")
    block = getattr(descriptor, "se_atten", None)
    if block is not None and not bool((block.mean == 0).all()):
        what = "a mean of the environment (set_davg_zero=False), which gives empty places the type of atom 0,"
        raise _refused(f"{what} is not covered", f"{path}.se_atten", block, "set_davg_zero=True")


def _numbers(model: Any) -> list[int]:
    """Atomic numbers by type; the names of types must be chemical symbols."""
    names = list(model.get_type_map())
    strange = [name for name in names if name not in SYMBOLS[1:]]
    if strange:
        what = f"the type names {', '.join(strange)} are no chemical symbols, and no structure can be made of them"
        raise UnsupportedModelError(what, hint="a model whose type_map holds chemical symbols")
    return [SYMBOLS.index(name) for name in names]


def _dtype(model: Any) -> torch.dtype:
    """The type that the descriptor computes in, of a model or its drop-in."""
    if not hasattr(model, "atomic_model"):
        return model.zero.dtype
    descriptor = model.atomic_model.descriptor
    return next(t.dtype for t in (*descriptor.parameters(), *descriptor.buffers()) if t.is_floating_point())


def _refused(what: str, path: str, module: nn.Module, hint: str) -> UnsupportedModelError:
    where = Location(module_path=path or "(model)", source=qualified(type(module)))
    return UnsupportedModelError(
        what, where=where, hint=f"{hint}; or register a frontend for it (entry point group fxpass.frontends)"
    )
