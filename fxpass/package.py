"""Saved models: a data-only package, or a TorchScript file that says so.

A package is a zip archive of ``package.json`` (format, family, facts, target, report), ``program.json``
(the graph as data), ``weights.npz`` (no pickle) and ``digest.json``.  ``lowered.json`` and ``lowered.npz`` are the
program as its target runs it, and save time at loading.  Loading runs no code that a package carries: graphs may
only name ATen ops and fxpass's own.
"""

from __future__ import annotations

import hashlib
import io
import json
import keyword
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import fx, nn

from ._torch_compat import OpOverload
from .errors import PackageError, UsageError
from .ir.program import Program, TensorSpec
from .ir.verifier import ARITHMETIC
from .lowering import Lowered
from .report import Report
from .verify.receipt import Receipt

FORMAT = 1
MEMBERS = ("package.json", "program.json", "weights.npz")
LOWERED_FROM = ("program.json", "weights.npz")
INSIDE_SCRIPT = "fxpass.zip"
#: what zipfile, json, numpy and fx raise on members that are not what save wrote
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)
_FUNCTIONS = {f"{f.__module__.lstrip('_')}.{f.__name__}": f for f in ARITHMETIC}
#: string arguments of ATen ops that select a formula; any other string could name a file
_STRINGS = frozenset({"rounding_mode", "approximate", "reduce", "indexing", "spec", "wrt", "grid"})


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a file that could not be written at its end.

    Raises:
        UsageError: the file exists and ``overwrite`` is false, or the folder cannot be written to.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists and is left as it is", hint="another name, or --overwrite (overwrite=True)")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="the name of a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        what = f"{path} cannot be written: {error.strerror}"
        raise UsageError(what, hint="a folder that exists and is writable") from error


def write_new(path: Path, write: Callable[[IO[bytes]], None], *, overwrite: bool) -> None:
    """Write a file all at once: to a temporary file beside it, then renamed.

    Raises:
        UsageError: the file exists and ``overwrite`` is false, or the folder cannot be written to.
    """
    check_new(path, overwrite=overwrite)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        program: the optimised program.
        family: name of the frontend.
        facts: what the family's drop-in knows of the model.
        report: what the passes did, and the receipt; names the target.
        lowered: what the program was lowered to, where the file holds it.
        script: the drop-in itself, where the file is TorchScript.
    """

    program: Program
    family: str
    facts: dict[str, Any]
    report: Report
    lowered: Lowered | None = None
    script: nn.Module | None = None


def save(saved: Saved, path: Path, *, overwrite: bool = False) -> None:
    """Write a package to ``path``; where there is a script, a TorchScript file with the package inside."""
    data = _pack(saved)
    if saved.script is not None:
        buffer = io.BytesIO()
        torch.jit.save(saved.script, buffer, _extra_files={INSIDE_SCRIPT: data})
        data = buffer.getvalue()

    def write(file: IO[bytes]) -> None:
        file.write(data)

    write_new(path, write, overwrite=overwrite)


def is_package(path: Path) -> bool:
    """Whether the file looks like one that :func:`save` wrote; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return any(name == "package.json" or name.endswith(f"/extra/{INSIDE_SCRIPT}") for name in names)


def load(path: Path) -> Saved:
    """What :func:`save` wrote, ready to run; the code of a TorchScript file is loaded.

    Raises:
        PackageError: not a saved model, truncated, altered, or of a newer format.
    """
    saved = read(path)
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith(f"/extra/{INSIDE_SCRIPT}") for name in archive.namelist()):
            return saved
    try:
        return replace(saved, script=torch.jit.load(str(path), map_location="cpu"))
    except RuntimeError as error:
        what = f"{path} is damaged: {_reason(error)}"
        raise PackageError(what, hint="save the model again") from error


def read(path: Path) -> Saved:
    """What a file that :func:`save` wrote says, without its script.  Nothing in it is run.

    Raises:
        PackageError: not a saved model, truncated, altered, or of a newer format.
    """
    if not path.is_file():
        raise PackageError(f"there is no file {path}", hint="check the path")
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = [name for name in archive.namelist() if name.endswith(f"/extra/{INSIDE_SCRIPT}")]
            if inside:
                data = archive.read(inside[0])
        return _unpack(data)
    except PackageError as error:
        raise PackageError(f"{path}: {error.what}", hint=error.hint or "save the model again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        what = f"{path} is not a saved fxpass model, or it is truncated ({_reason(error)})"
        raise PackageError(what, hint="save the model again") from error
    except _DAMAGE as error:
        what = f"{path} is damaged: {type(error).__name__}: {_reason(error)}"
        raise PackageError(what, hint="save the model again") from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _pack(saved: Saved) -> bytes:
    facts = {
        "format": FORMAT,
        "family": saved.family,
        "facts": saved.facts,
        "report": saved.report.to_json(),
    }
    members = {
        "package.json": json.dumps(facts, indent=1).encode(),
        "program.json": json.dumps(program_to_json(saved.program)).encode(),
        "weights.npz": _weights(saved.program),
    }
    if saved.lowered is not None:
        lowered = {
            "of": _digests({name: members[name] for name in LOWERED_FROM}),
            "made_by": saved.lowered.made_by,
            "program": program_to_json(saved.lowered.program),
        }
        members["lowered.json"] = json.dumps(lowered).encode()
        members["lowered.npz"] = _weights(saved.lowered.program, known=saved.program)
    digest = _digests(members)
    members["digest.json"] = json.dumps(digest).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return buffer.getvalue()


def _unpack(data: bytes) -> Saved:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    digest = json.loads(members.pop("digest.json", b"null"))
    missing = [name for name in (*MEMBERS, *(digest or ())) if name not in members]
    if missing or digest is None:
        raise PackageError(f"the file is not a saved fxpass model: it holds no {(*missing, 'digest.json')[0]}")
    for name, found in _digests(members).items():
        if digest.get(name) != found:
            raise PackageError(f"the file was altered after it was saved: {name} differs from its digest")
    facts = json.loads(members["package.json"])
    if facts["format"] > FORMAT:
        raise PackageError(
            f"the file has format {facts['format']}, this fxpass reads up to {FORMAT}", hint="pip install -U fxpass"
        )
    weights = _arrays(members["weights.npz"])
    program = program_from_json(json.loads(members["program.json"]), weights)
    report = Report.from_json(facts["report"], read_receipt=Receipt.from_json)
    return Saved(program, facts["family"], facts["facts"], report, _unpack_lowered(members, program, weights))


def _unpack_lowered(members: dict[str, bytes], program: Program, weights: dict[str, np.ndarray]) -> Lowered | None:
    """What the file says that ``program`` was lowered to, if it says so of this program."""
    if "lowered.json" not in members:
        return None
    data = json.loads(members["lowered.json"])
    if data["of"] != _digests({name: members[name] for name in LOWERED_FROM}):
        return None
    lowered = program_from_json(data["program"], {**weights, **_arrays(members["lowered.npz"])})
    if (lowered.inputs, lowered.outputs) != (program.inputs, program.outputs):
        raise PackageError("the program and what it was lowered to have other inputs or outputs")
    return Lowered(lowered, data["made_by"])


def _digests(members: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(member).hexdigest() for name, member in members.items()}


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _weights(program: Program, known: Program | None = None) -> bytes:
    """An archive of the weights, of those alone that are not the same memory under the same name in ``known``."""
    arrays = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensor = getattr(program.graph_module, name).detach()
        if known is None or not _same_memory(tensor, getattr(known.graph_module, name, None)):
            tensor = tensor.cpu()
            arrays[name] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _same_memory(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    if b is None or (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


# --- programs as data


def program_to_json(program: Program) -> dict[str, Any]:
    """The graph, its interface and its metadata as JSON values; weights are referred to by name."""
    return {
        "stage": program.stage,
        "energy": program.energy,
        "assumptions": list(program.assumptions),
        "inputs": [_spec_to_json(s) for s in program.inputs],
        "outputs": [_spec_to_json(s) for s in program.outputs],
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "target": _target_name(node),
                "args": _encode(node.args),
                "kwargs": _encode(dict(node.kwargs)),
                "custom": node.meta.get("custom", {}).get("fxpass", {}),
            }
            for node in program.graph.nodes
        ],
        "dtypes": {
            str(n.target): str(getattr(program.graph_module, str(n.target)).dtype).removeprefix("torch.")
            for n in program.graph.find_nodes(op="get_attr")
        },
    }


def program_from_json(data: dict[str, Any], arrays: dict[str, np.ndarray]) -> Program:
    """Inverse of :func:`program_to_json`.

    Raises:
        PackageError: the graph names something that is neither an ATen op, nor fxpass's, nor size arithmetic,
            or an input, a weight or a keyword by what is not a name.
    """
    root = nn.Module()
    for name, dtype in data["dtypes"].items():
        tensor = torch.from_numpy(arrays[name])
        if dtype == "bfloat16":
            tensor = tensor.view(torch.bfloat16)
        root.register_buffer(name, tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in data["nodes"]:
        args, kwargs = _decode(row["args"], nodes), _decode(row["kwargs"], nodes)
        if row["op"] not in ("placeholder", "get_attr", "call_function", "output"):
            raise PackageError(f"the package holds a node of kind {row['op']!r}, which programs do not have")
        target = _resolve(row["target"]) if row["op"] == "call_function" else _identifier(row["target"])
        if row["op"] == "output":
            args = [tuple(args[0])]
        node = graph.create_node(row["op"], target, tuple(args), kwargs, name=row["name"])
        node.meta["custom"] = {"fxpass": row["custom"]} if row["custom"] else {}
        nodes[row["name"]] = node
    return Program(
        fx.GraphModule(root, graph, class_name="Program"),
        tuple(_spec_from_json(s) for s in data["inputs"]),
        tuple(_spec_from_json(s) for s in data["outputs"]),
        stage=data["stage"],
        energy=data["energy"],
        assumptions=tuple(data["assumptions"]),
    )


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dims": list(spec.dims),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "irreps": spec.irreps,
        "unit": spec.unit,
        "properties": sorted(spec.properties),
    }


def _spec_from_json(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(
        data["name"],
        tuple(data["dims"]),
        getattr(torch, data["dtype"]),
        data["irreps"],
        data["unit"],
        frozenset(data["properties"]),
    )


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return str(node.target)
    if callable(node.target):
        return f"{node.target.__module__.lstrip('_')}.{node.target.__name__}"
    return str(node.target)


def _resolve(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace not in ("aten", "fxpass"):
        raise PackageError(f"the package names {name}, which is neither an ATen op nor fxpass's", hint="save it again")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if any(str(a.type) in ("str", "Optional[str]") and a.name not in _STRINGS for a in op._schema.arguments):
        raise PackageError(f"the package names {name}, which a program never calls", hint="save it again")
    return op


def _identifier(name: Any) -> str:
    """``name``, which becomes part of the source code of the graph module."""
    if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name):
        raise PackageError(f"the package names {name!r}, which is not a name")
    return name


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not np.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PackageError(f"a graph argument of type {type(value).__name__} cannot be saved")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "dict":
        return {_identifier(k): _decode(v, nodes) for k, v in content.items()}
    if kind == "torch":
        found = getattr(torch, content)
        if not isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
            raise PackageError(f"the package names torch.{content}, which a program never does")
        return found
    if kind == "device":
        return torch.device(content)
    if kind == "float":
        return float(content)
    raise PackageError(f"the package holds an argument of kind {kind!r}")
