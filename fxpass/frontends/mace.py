"""MACE (mace-torch): ``MACE`` and ``ScaleShiftMACE`` with every interaction block and readout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch_compat import load_pickle, pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..capture.rules import ChebyshevStandIn
from ..errors import Location, MissingExtraError, StructureError, UnsupportedModelError
from ..ir.program import Program, TensorSpec
from ..structures import Evaluation, Neighbours, Structure, neighbour_list
from .base import dtype_of
from .mace_interface import MaceInterface

#: model class -> outputs that its energy program returns, and the one forces are the derivative of
MODELS = {
    "MACE": (("energy", "node_energy", "contributions", "node_feats"), "energy"),
    "ScaleShiftMACE": (("energy", "node_energy", "interaction_energy", "node_feats"), "interaction_energy"),
}
UNITS = {"energy": "eV", "node_energy": "eV", "contributions": "eV", "interaction_energy": "eV"}
INTERACTIONS = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticAttResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock",
)
READOUTS = (
    "LinearReadoutBlock",
    "NonLinearReadoutBlock",
    "NonLinearBiasReadoutBlock",
    "GeneralNonLinearBiasReadoutBlock",
)


#: packages whose modules are not e3nn's
FOREIGN = ("cuequivariance", "openequivariance", "mace.modules.lora")

CHEBYSHEV = (
    "the original's forces are not the gradient of its energy: torch has no derivative for the Chebyshev basis and "
    "takes it for a constant; the optimised model returns the same energy with its true forces"
)


class MaceFrontend:
    """Frontend for mace-torch; tested with the versions in ``tested``."""

    name = "mace"
    extra = "mace"
    tested = ("0.3.16",)

    def recognises(self, model: Any) -> bool:
        return any(cls.__module__.startswith("mace.modules") for cls in type(model).__mro__)

    def reads(self, path: str) -> bool:
        return pickle_names(path, "mace.modules")

    def load(self, path: str) -> nn.Module:
        try:
            import mace.modules  # noqa: F401  unpickling needs its classes
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{path} needs mace-torch to be unpickled, and {error.name} is not installed",
                hint='pip install "fxpass[mace]"',
            ) from error
        model = load_pickle(path)
        if not isinstance(model, nn.Module) or not self.recognises(model):
            raise UnsupportedModelError(
                f"{path} holds a {type(model).__name__}, not a MACE model", hint="a file saved by mace_run_train"
            )
        return model

    def check(self, model: Any) -> None:
        kind = type(model).__name__
        if kind not in MODELS:
            raise _refused(f"the model class {kind} is not covered", "", model, f"one of {', '.join(MODELS)}")
        for path, module in model.named_modules():
            if any(part in type(module).__module__ for part in FOREIGN):
                raise _refused(f"{type(module).__name__} is not covered", path, module, "the e3nn form of the model")
        for name, known in (("interactions", INTERACTIONS), ("readouts", READOUTS)):
            for path, module in getattr(model, name).named_children():
                if type(module).__name__ not in known:
                    what = f"the {name[:-1]} block {type(module).__name__} is not covered"
                    raise _refused(what, f"{name}.{path}", module, f"one of {', '.join(known)}")
                config = getattr(module, "cueq_config", None)
                if config is not None and config.enabled:
                    raise _refused("a cuEquivariance block is not covered", f"{name}.{path}", module, "its e3nn form")
        if hasattr(model, "joint_embedding"):
            what = "embeddings of additional features (embedding_specs) are not covered"
            raise _refused(what, "joint_embedding", model.joint_embedding, "a model without embedding_specs")
        basis = model.radial_embedding.bessel_fn
        if type(basis).__name__ not in ("BesselBasis", "GaussianBasis", "ChebychevBasis"):
            what = f"the radial basis {type(basis).__name__} is not covered"
            raise _refused(what, "radial_embedding.bessel_fn", basis, "")

    def reference(self, model: Any) -> tuple[nn.Module, tuple[str, ...]]:
        replica: Any = copy_model(model)
        basis = replica.radial_embedding.bessel_fn
        if type(basis).__name__ != "ChebychevBasis":
            return replica, ()
        replica.radial_embedding.bessel_fn = ChebyshevStandIn(basis, "radial_embedding.bessel_fn")
        return replica, (CHEBYSHEV,)

    def capture(self, model: Any) -> Program:
        names, energy = MODELS[type(model).__name__]
        dtype = dtype_of(model)
        species = len(model.atomic_numbers)
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("node_attrs", ("atoms", species), dtype, f"{species}x0e", "", frozenset({"one_hot"})),
            TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("head", ("graphs",), torch.int64, None, "", frozenset({f"below:{len(_heads(model))}", "head"})),
        )
        outputs = tuple(TensorSpec(name, (), dtype, None, UNITS.get(name, "")) for name in names)
        replica = prepare(model)
        forward = _forward_on_vectors(replica)

        def run(edge_vectors: Tensor, edge_index: Tensor, node_attrs: Tensor, batch: Tensor, head: Tensor) -> Any:
            data = {
                "vectors": edge_vectors,
                "edge_index": edge_index,
                "node_attrs": node_attrs,
                "batch": batch,
                "head": head,
            }
            result = forward(replica, data, compute_force=False)
            return [result[name] for name in names]

        return capture(run, replica, inputs, outputs, energy=energy)

    def attributes(self, model: Any) -> dict[str, Any]:
        return {
            "kind": type(model).__name__,
            "cutoff": float(model.r_max),
            "numbers": [int(z) for z in model.atomic_numbers],
            "heads": _heads(model),
            "num_interactions": int(model.num_interactions),
            "atomic_energies": torch.atleast_2d(model.atomic_energies_fn.atomic_energies).double().tolist(),
            "dtype": str(dtype_of(model)).removeprefix("torch."),
        }

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        names, _ = MODELS[attributes["kind"]]
        return MaceInterface(energy, forces, attributes, list(names))

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        numbers, heads, dtype = model.atomic_numbers.tolist(), _heads(model), dtype_of(model)
        data = mace_batch([structure], numbers, float(model.r_max), heads, dtype, neighbours)
        periodic = all(structure.pbc)
        result = model(data, compute_stress=periodic)
        return Evaluation(
            energy=float(result["energy"][0].detach()),
            forces=result["forces"].detach().double().numpy(),
            stress=result["stress"][0].detach().double().numpy() if periodic else None,
            dtype=str(dtype).removeprefix("torch."),
        )


def _refused(what: str, path: str, module: nn.Module, hint: str) -> UnsupportedModelError:
    cls = type(module)
    hint = f"{hint}; or " if hint else ""
    where = Location(module_path=path or "(model)", source=f"{cls.__module__}.{cls.__qualname__}")
    return UnsupportedModelError(
        what, where=where, hint=f"{hint}register a frontend for it (entry point group fxpass.frontends)"
    )


def _heads(model: Any) -> list[str]:
    return list(getattr(model, "heads", None) or ["Default"])


def _forward_on_vectors(model: Any) -> FunctionType:
    """The model's own ``forward`` with edge vectors as its input.

    ``prepare_graph`` is where ``forward`` turns positions into edge vectors and reads sizes as Python
    ints.  The same code object runs here with other globals, in which ``prepare_graph`` passes the given
    vectors and symbolic sizes through; neither the model nor its package is touched.
    """
    from mace.modules.utils import GraphContext, InteractionKwargs

    def prepare_graph(data: dict[str, Tensor], **_flags: bool) -> GraphContext:
        vectors, batch = data["vectors"], data["batch"]
        atoms, graphs = batch.shape[0], data["head"].shape[0]
        return GraphContext(
            is_lammps=False,
            num_graphs=graphs,
            num_atoms_arange=torch.arange(atoms, device=vectors.device),
            displacement=None,
            positions=vectors.new_zeros((atoms, 3)),
            vectors=vectors,
            lengths=torch.linalg.norm(vectors, dim=-1, keepdim=True),
            cell=vectors.new_zeros((graphs, 3, 3)),
            node_heads=data["head"][batch],
            interaction_kwargs=InteractionKwargs(None, (0, 0)),
        )

    own = inspect.unwrap(type(model).forward)
    shared = {**own.__globals__, "prepare_graph": prepare_graph}
    forward = FunctionType(own.__code__, shared, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def mace_batch(
    structures: Sequence[Structure],
    numbers: Sequence[int],
    cutoff: float,
    heads: Sequence[str],
    dtype: torch.dtype,
    neighbours: Neighbours = neighbour_list,
) -> dict[str, Tensor]:
    """MACE's data dict for a batch of structures.

    Returns:
        positions [atoms, 3] and cell [3 graphs, 3] in Angstrom, edge_index [2, edges] (sender,
        receiver), shifts and unit_shifts [edges, 3], node_attrs [atoms, species] one-hot, batch [atoms],
        ptr [graphs + 1], head [graphs].

    Raises:
        StructureError: a structure is malformed, holds another species, or names an unknown head.
    """
    parts: dict[str, list[np.ndarray]] = {k: [] for k in ("positions", "cell", "edges", "units", "shifts", "species")}
    ptr = [0]
    chosen = []
    for structure in structures:
        structure.check(numbers, neighbours)
        if structure.head is not None and structure.head not in heads:
            raise StructureError(
                f"{structure.name} asks for the head {structure.head!r}", hint=f"one of {', '.join(heads)}"
            )
        edges, units = neighbours(structure, cutoff)
        parts["positions"].append(structure.positions)
        parts["cell"].append(structure.cell)
        parts["edges"].append(edges + ptr[-1])
        parts["units"].append(units)
        parts["shifts"].append(units @ structure.cell)
        parts["species"].append(np.searchsorted(np.sort(numbers), structure.numbers))
        chosen.append(heads.index(structure.head) if structure.head is not None else 0)
        ptr.append(ptr[-1] + len(structure.numbers))
    order = np.argsort(np.asarray(numbers))
    species = torch.from_numpy(order[np.concatenate(parts["species"])])
    tensor = {k: torch.from_numpy(np.concatenate(parts[k])) for k in ("positions", "cell", "units", "shifts")}
    return {
        "positions": tensor["positions"].to(dtype),
        "cell": tensor["cell"].to(dtype),
        "edge_index": torch.from_numpy(np.concatenate(parts["edges"], axis=1)),
        "unit_shifts": tensor["units"].to(dtype),
        "shifts": tensor["shifts"].to(dtype),
        "node_attrs": nn.functional.one_hot(species, len(numbers)).to(dtype),
        "batch": torch.repeat_interleave(torch.arange(len(structures)), torch.tensor(ptr).diff()),
        "ptr": torch.tensor(ptr),
        "head": torch.tensor(chosen),
    }
