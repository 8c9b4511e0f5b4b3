"""Saved models: data alone, the same bits after loading, and one paragraph about every file that is not one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

import fxpass
from fxpass import package
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify as verify_program
from fxpass.lowering import fingerprint
from fxpass.models import Settings, build, collate
from fxpass.registry import default_registry
from fxpass.structures import probe_structures

pytestmark = pytest.mark.once

NUMBERS, CUTOFF = (6, 8, 14), 4.5
PROBES = probe_structures(NUMBERS, CUTOFF)
SETTINGS = Settings(
    numbers=NUMBERS,
    atomic_energies=(0.5, -1.0, 0.25),
    cutoff=CUTOFF,
    features="2x0e+2x1o",
    max_degree=1,
    layers=1,
    radial_functions=3,
    radial_neurons=4,
)


def optimised(dtype: torch.dtype) -> fxpass.Optimized:
    return fxpass.optimize(build(SETTINGS, dtype), "fold-constants,dead-code", verify=False)


@pytest.fixture(scope="module")
def result() -> fxpass.Optimized:
    """In float32, with a receipt."""
    return fxpass.optimize(build(SETTINGS), "fold-constants,dead-code")


@pytest.fixture(scope="module")
def whole(result: fxpass.Optimized, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.fxp"
    result.save(path)
    return path.read_bytes()


def batch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return collate(PROBES, NUMBERS, CUTOFF, dtype)


def assert_same_bits(found: fxpass.Optimized, expected: fxpass.Optimized, dtype: torch.dtype) -> None:
    for options in ({"compute_stress": True}, {"compute_forces": False}):
        ours, theirs = found(batch(dtype), **options), expected(batch(dtype), **options)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == dtype
            assert ours[name].numpy().tobytes() == value.numpy().tobytes(), name


# The way there and back


def test_a_loaded_model_gives_the_same_bits(result: fxpass.Optimized, tmp_path: Path) -> None:
    path = tmp_path / "model.fxp"
    result.save(path)
    loaded = fxpass.load(str(path))
    assert_same_bits(loaded, result, torch.float32)
    assert loaded.report == result.report
    assert loaded.report.receipt is not None and loaded.report.receipt.passed
    assert loaded.report.receipt == result.report.receipt
    assert loaded.facts == result.facts
    assert isinstance(loaded.graph_module, fx.GraphModule)
    assert loaded.graph_module.code == result.graph_module.code
    for ours, theirs in zip(loaded.program.graph.nodes, result.program.graph.nodes, strict=True):
        assert ours.meta.get("custom", {}) == theirs.meta.get("custom", {})  # where a node comes from
    assert loaded.program.inputs == result.program.inputs
    assert loaded.program.outputs == result.program.outputs
    assert loaded.program.assumptions == result.program.assumptions

    loaded.save(tmp_path / "again.fxp")
    assert members((tmp_path / "again.fxp").read_bytes()) == members(path.read_bytes())


def test_float64_too(tmp_path: Path) -> None:
    double = optimised(torch.float64)
    double.save(tmp_path / "model.fxp")
    assert_same_bits(fxpass.load(tmp_path / "model.fxp"), double, torch.float64)


def test_a_loaded_model_is_verified_against_its_original(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.fxp"
    path.write_bytes(whole)
    loaded = fxpass.load(path)
    assert fxpass.verify(loaded, build(SETTINGS)).passed
    assert not fxpass.verify(loaded, build(SETTINGS, seed=1)).passed


def test_another_dtype_is_refused_with_advice(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.fxp"
    path.write_bytes(whole)
    loaded = fxpass.load(path)
    assert loaded.float() is loaded
    assert loaded.to("cpu") is loaded
    for convert in (loaded.double, lambda: loaded.to(torch.float64), loaded.half):
        with pytest.raises(fxpass.UsageError, match=r"loaded from a file made for torch\.float32") as found:
            convert()
        assert "original checkpoint" in str(found.value.hint)
    assert_same_bits(loaded, fxpass.load(path), torch.float32)  # nothing was half converted


@pytest.mark.mace
def test_a_mace_model_loads_without_mace(tmp_path: Path) -> None:
    from fxpass.frontends.mace import mace_batch
    from mace_models import build as build_mace

    original = fxpass.optimize(build_mace(l_max=1, layers=1, correlation=2), "exact", verify=False)
    original.save(tmp_path / "model.fxp")
    data = mace_batch(PROBES, NUMBERS, CUTOFF, ["Default"], torch.float64)
    torch.save(data, tmp_path / "data.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT_MACE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    expected = original(data, compute_stress=True)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert value is found[name] is None or torch.equal(found[name], value), name


WITHOUT_MACE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mace", "ase", "matscipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import fxpass

torch.set_num_threads(1)
model = fxpass.load("model.fxp")
torch.save(model(torch.load("data.pt"), compute_stress=True), "found.pt")
"""


# What is in a file


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(data: bytes, *, sealed: bool = True, **changed: Callable[[Any], Any]) -> bytes:
    """The package with members changed as JSON values, ``sealed`` with fitting digests, as a forger would."""
    parts = members(data)
    for stem, change in changed.items():
        parts[f"{stem}.json"] = json.dumps(change(json.loads(parts[f"{stem}.json"]))).encode()
    if sealed:
        digest = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items() if name != "digest.json"}
        parts["digest.json"] = json.dumps(digest).encode()
    return archived(parts)


def archived(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return buffer.getvalue()


def test_a_package_is_data_alone(whole: bytes) -> None:
    parts = members(whole)
    assert parts.keys() == {"digest.json", "lowered.json", "lowered.npz", "package.json", "program.json", "weights.npz"}
    assert json.loads(parts["package.json"])["report"]["versions"]["torch"] == torch.__version__
    with zipfile.ZipFile(io.BytesIO(parts["weights.npz"])) as weights:
        names = weights.namelist()
    assert names and all(name.endswith(".npy") for name in names)
    arrays = np.load(io.BytesIO(parts["weights.npz"]), allow_pickle=False)
    assert all(arrays[name].dtype.kind in "fiub" for name in arrays.files)
    targets = {node["target"] for node in json.loads(parts["program.json"])["nodes"] if node["op"] == "call_function"}
    assert all(name.partition(".")[0] in ("aten", "fxpass", "operator") for name in targets)


def test_is_package_looks_at_names_alone(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.fxp"
    assert not package.is_package(path)
    path.write_bytes(whole)
    assert package.is_package(path)
    path.write_bytes(b"garbage")
    assert not package.is_package(path)
    torch.save({"weights": torch.zeros(3)}, path)
    assert not package.is_package(path)


def test_every_kind_of_argument_and_weight_survives() -> None:
    aten = torch.ops.aten
    root = torch.nn.Module()
    root.register_buffer("brain", torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16))
    root.register_buffer("mask", torch.tensor([True, False, True]))
    root.register_buffer("short", torch.tensor([0.1], dtype=torch.float16))
    graph = fx.Graph()
    x = graph.placeholder("x")
    wide = graph.call_function(aten._to_copy.default, (graph.get_attr("brain"),), {"dtype": torch.float64})
    small = graph.call_function(aten._to_copy.default, (graph.get_attr("short"),), {"dtype": torch.float64})
    size = graph.call_function(aten.sym_size.int, (x, 0))
    low = graph.call_function(
        aten.full.default,
        ([size, 3], -float("inf")),
        {"dtype": torch.float64, "device": torch.device("cpu"), "layout": torch.strided, "pin_memory": False},
    )
    chosen = graph.call_function(aten.where.self, (graph.get_attr("mask"), x, low))
    clamped = graph.call_function(aten.clamp.default, (chosen, None, 1e300))
    copied = graph.call_function(aten.clone.default, (clamped,), {"memory_format": torch.contiguous_format})
    summed = graph.call_function(aten.sum.dim_IntList, (copied, [1], False))
    summed.meta["custom"] = {"fxpass": {"module": "readout", "source": "model.py:7"}}
    scaled = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mul.Tensor, (wide, x)), small))
    graph.output((summed, scaled))
    program = Program(
        fx.GraphModule(root, graph),
        (TensorSpec("x", ("atoms", 3), torch.float64, "1x1o", "Angstrom", frozenset({"one", "two"})),),
        (TensorSpec("energy", ("atoms",), torch.float64), TensorSpec("y", ("atoms", 3), torch.float64)),
        assumptions=("x is small",),
    )
    verify_program(program)
    arrays = np.load(io.BytesIO(package._weights(program)), allow_pickle=False)
    data = json.loads(json.dumps(package.program_to_json(program)))
    again = package.program_from_json(data, {name: arrays[name] for name in arrays.files})
    verify_program(again)
    assert (again.inputs, again.outputs, again.assumptions) == (program.inputs, program.outputs, program.assumptions)
    for ours, theirs in zip(again.graph.nodes, program.graph.nodes, strict=True):
        assert (ours.op, ours.name, ours.target) == (theirs.op, theirs.name, theirs.target)
        assert repr((ours.args, ours.kwargs)) == repr((theirs.args, theirs.kwargs)).replace("(3,)", "[3]")
        assert ours.meta.get("custom", {}) == theirs.meta.get("custom", {})
    for name, buffer in program.graph_module.named_buffers():
        other = again.graph_module.get_buffer(name)
        assert other.dtype == buffer.dtype and torch.equal(other, buffer)
    positions = torch.randn(5, 3, dtype=torch.float64)
    for ours, theirs in zip(again.graph_module(positions), program.graph_module(positions), strict=True):
        assert torch.equal(ours, theirs)


# What is not one


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Writes bytes to a file that must not load, and that must still be there; returns the message."""

    def check(data: bytes, *says: str) -> str:
        path = tmp_path / "model.fxp"
        path.write_bytes(data)
        with pytest.raises(fxpass.PackageError) as found:
            fxpass.load(path)
        text = str(found.value)
        assert "model.fxp" in text
        assert "\n" not in text
        assert found.value.hint
        for word in says:
            assert word in text, text
        assert os.listdir(tmp_path) == ["model.fxp"]
        assert path.read_bytes() == data
        return text

    return check


Refused = Callable[..., str]


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.fxp", tmp_path):
        with pytest.raises(fxpass.PackageError, match="there is no file"):
            fxpass.load(path)


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"PK\x03\x04" + bytes(100), pickle.dumps({"a": 1})])
def test_something_else(refused: Refused, data: bytes) -> None:
    refused(data, "not a saved fxpass model")


def test_a_checkpoint_is_not_unpickled(refused: Refused) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("unpickled",)

    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    refused(buffer.getvalue(), "not a saved fxpass model")
    refused(pickle.dumps(Bomb()), "not a saved fxpass model")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.1, 0.001])
def test_a_truncated_file(refused: Refused, whole: bytes, share: float) -> None:
    refused(whole[: int(share * len(whole))], "not a saved fxpass model, or it is truncated")


@pytest.mark.parametrize(
    "name", ["package.json", "program.json", "weights.npz", "digest.json", "lowered.json", "lowered.npz"]
)
def test_a_missing_member(refused: Refused, whole: bytes, name: str) -> None:
    parts = members(whole)
    del parts[name]
    refused(archived(parts), f"holds no {name}")


@pytest.mark.parametrize("name", ["package.json", "program.json", "weights.npz", "lowered.json", "lowered.npz"])
def test_a_flipped_byte_in_a_member(refused: Refused, whole: bytes, name: str) -> None:
    """Compressed again, so that the archive's own checksum is right."""
    parts = members(whole)
    middle = len(parts[name]) // 2
    parts[name] = parts[name][:middle] + bytes([parts[name][middle] ^ 1]) + parts[name][middle + 1 :]
    refused(archived(parts), "altered", name)


def test_a_flipped_byte_anywhere(whole: bytes, tmp_path: Path) -> None:
    """Either the file is refused, or the flip hit what the archive does not use: then nothing has changed."""
    path = tmp_path / "model.fxp"
    path.write_bytes(whole)
    good = package.read(path)
    rng = random.Random(0)
    refusals = 0
    edges = [*range(64), *(len(whole) - k for k in range(1, 300))]  # headers, and the directory at the end
    for at in [*edges, *rng.sample(range(len(whole)), 150)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            found = package.read(path)
        except fxpass.PackageError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        assert package.program_to_json(found.program) == package.program_to_json(good.program)
        assert found.facts == good.facts and found.report == good.report
        for name, weight in good.program.graph_module.named_buffers():
            assert torch.equal(found.program.graph_module.get_buffer(name), weight)
    assert refusals > 300


def test_a_newer_format(refused: Refused, whole: bytes) -> None:
    newer = rewritten(whole, package=lambda data: {**data, "format": package.FORMAT + 1})
    assert f"reads up to {package.FORMAT}" in refused(newer, f"format {package.FORMAT + 1}")


def test_members_that_say_something_else(refused: Refused, whole: bytes) -> None:
    for broken in (None, [], {}, "text", 7):
        refused(rewritten(whole, package=lambda _, value=broken: value))
        refused(rewritten(whole, program=lambda _, value=broken: value))
    for key in ("format", "family", "facts", "report"):
        refused(rewritten(whole, package=lambda data, key=key: {k: v for k, v in data.items() if k != key}), key)
    for key in ("nodes", "inputs", "outputs", "stage", "energy", "dtypes"):
        refused(rewritten(whole, program=lambda data, key=key: {k: v for k, v in data.items() if k != key}), key)
    parts = members(whole)
    weights = io.BytesIO()
    np.savez(weights, **{"weight": np.array([{"pickled": "object"}], dtype=object)})
    parts["weights.npz"] = weights.getvalue()
    refused(rewritten(archived(parts)))


# A forged package must not run anything


def forged(whole: bytes, change: Callable[[list[dict[str, Any]]], None]) -> bytes:
    """The package with its nodes changed and its digests made to fit."""

    def edit(program: dict[str, Any]) -> dict[str, Any]:
        change(program["nodes"])
        return program

    return rewritten(whole, program=edit)


def first(nodes: list[dict[str, Any]], op: str) -> dict[str, Any]:
    return next(node for node in nodes if node["op"] == op)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "torch.load",
        "operator.methodcaller",
        "prims.add.default",
        "aten.from_file.default",  # reads a file of any name
        "aten.from_file.out",
        "aten.no_such_op.default",
        "aten.add.no_such_overload",
        "aten.add",
        "aten.__class__.__name__",
        "fxpass",
        "",
    ],
)
def test_a_foreign_op_is_refused(refused: Refused, whole: bytes, target: str) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        node = first(nodes, "call_function")
        node["target"], node["args"], node["kwargs"] = target, ["touch ran"], {"dict": {}}

    refused(forged(whole, change))


@pytest.mark.parametrize("op", ["call_module", "call_method", "placeholder_", ""])
def test_a_foreign_node_is_refused(refused: Refused, whole: bytes, op: str) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        first(nodes, "call_function")["op"] = op

    refused(forged(whole, change), "node of kind")


INJECTED = "__import__('os').mkdir('injected')"


@pytest.mark.parametrize("op", ["placeholder", "get_attr"])
@pytest.mark.parametrize(
    "text", [f"x={INJECTED}", f"x, y={INJECTED}", f"x\n{INJECTED}", f'a"), {INJECTED}, getattr(self, "b', "1x", "class"]
)
def test_names_become_no_code(
    refused: Refused, whole: bytes, op: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fx prints names of inputs and weights into Python source and runs it."""
    monkeypatch.chdir(tmp_path)

    def change(nodes: list[dict[str, Any]]) -> None:
        first(nodes, op)["target"] = text

    refused(forged(whole, change))  # looks that the folder holds the file alone


def test_keywords_become_no_code(
    refused: Refused, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(nodes: list[dict[str, Any]]) -> None:
        first(nodes, "call_function")["kwargs"] = {"dict": {f"x={INJECTED}, y": 1}}

    refused(forged(whole, change))


@pytest.mark.parametrize(
    "value",
    [{"torch": "load"}, {"torch": "none"}, {"device": "none"}, {"object": 1}, {"node": "later"}, {"a": 1, "b": 2}],
    ids=str,
)
def test_an_argument_of_no_known_kind(refused: Refused, whole: bytes, value: dict[str, Any]) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        first(nodes, "call_function")["args"] = [value]

    refused(forged(whole, change))


# The lowered program of a file


def edited(path: Path, **changed: Callable[[Any], Any]) -> None:
    """The package with members changed, and what the lowered program says of them and all digests made to fit."""
    parts = members(rewritten(path.read_bytes(), **changed))
    digest = json.loads(parts["digest.json"])
    lowered = json.loads(parts["lowered.json"])
    lowered["of"] = {name: digest[name] for name in lowered["of"]}
    path.write_bytes(rewritten(archived(parts), lowered=lambda _: lowered))


def misfit(program: dict[str, Any]) -> dict[str, Any]:
    """A program whose first product is one of tensors that do not fit."""
    vectors = next(node for node in program["nodes"] if node["name"] == "edge_vectors")
    called = next(node for node in program["nodes"] if node["op"] == "call_function")
    called["target"], called["kwargs"] = "aten.mm.default", {"dict": {}}
    called["args"] = [{"node": vectors["name"]}, {"node": vectors["name"]}]
    return program


@pytest.fixture
def saved(whole: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.fxp"
    path.write_bytes(whole)
    return path


def test_loading_lowers_nothing(result: fxpass.Optimized, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpass.loading.legal", None)
    loaded = fxpass.load(saved)
    assert_same_bits(loaded, result, torch.float32)
    assert loaded.report.warnings == ()
    assert loaded.lowered is not None and result.lowered is not None
    assert loaded.lowered.program.graph_module.code == result.lowered.program.graph_module.code
    assert_same_bits(loaded.to(torch.float32), result, torch.float32)


@pytest.mark.parametrize("stale", ["made elsewhere", "another program", "none"])
def test_what_was_lowered_otherwise_is_lowered_anew(
    result: fxpass.Optimized, whole: bytes, saved: Path, tmp_path: Path, stale: str
) -> None:
    if stale == "made elsewhere":
        edited(saved, lowered=lambda lowered: {**lowered, "made_by": "another fxpass"})
    elif stale == "another program":
        saved.write_bytes(rewritten(whole, program=lambda program: {**program, "assumptions": ["x"]}))
    else:
        parts = {name: part for name, part in members(whole).items() if not name.startswith("lowered")}
        saved.write_bytes(rewritten(archived(parts)))
    loaded = fxpass.load(saved)
    assert_same_bits(loaded, result, torch.float32)
    (warning,) = loaded.report.warnings
    assert "lowered anew" in warning and "save it again" in warning
    loaded.save(tmp_path / "again.fxp")
    again = fxpass.load(tmp_path / "again.fxp")
    assert again.report.warnings == ()
    assert_same_bits(again, result, torch.float32)


def test_a_forged_lowered_program_is_refused(refused: Refused, whole: bytes) -> None:
    def change(**parts: Any) -> bytes:
        return rewritten(whole, lowered=lambda lowered: {**lowered, "program": {**lowered["program"], **parts}})

    program = json.loads(members(whole)["lowered.json"])["program"]
    nodes = [{**node, "target": "os.system"} if node["op"] == "call_function" else node for node in program["nodes"]]
    refused(change(nodes=nodes), "neither an ATen op")
    refused(change(inputs=program["inputs"][:-1]), "other inputs or outputs")
    refused(change(nodes=misfit(program)["nodes"]), "damaged")


def test_a_forged_program_is_refused_when_it_is_asked_for(result: fxpass.Optimized, saved: Path) -> None:
    """What runs is the lowered program, so this one is not looked at before."""
    edited(saved, program=misfit)
    loaded = fxpass.load(saved)
    assert_same_bits(loaded, result, torch.float32)
    for _ in range(2):
        with pytest.raises(fxpass.PackageError, match=r"model\.fxp is damaged"):
            _ = loaded.program


def test_a_module_that_was_converted_is_saved_as_it_is_now(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    module = fxpass.optimize(torch.nn.Linear(3, 2), [], example_inputs=(x,), verify=False).double()
    module.save(tmp_path / "model.fxp")
    loaded = fxpass.load(tmp_path / "model.fxp")
    assert loaded.report == module.report
    assert torch.equal(loaded(x.double()), module(x.double()))


def test_a_fingerprint_is_of_code_and_target() -> None:
    registry = default_registry()
    one, other = (fingerprint(registry.target(name)(), registry) for name in ("eager", "inductor"))
    assert one != other and one == fingerprint(registry.target("eager")(), registry)


# Writing


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_file_is_left_as_it_is(result: fxpass.Optimized, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.fxp"
    path.write_bytes(b"precious")
    with pytest.raises(fxpass.UsageError, match="exists and is left as it is") as found:
        result.save(path)
    assert "overwrite=True" in str(found.value.hint)
    assert listing(tmp_path) == {"model.fxp": b"precious"}
    result.save(path, overwrite=True)
    assert listing(tmp_path).keys() == {"model.fxp"}
    assert members(path.read_bytes()) == members(whole)


def test_a_place_that_cannot_be_written(result: fxpass.Optimized, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    for path in (tmp_path / "gone" / "model.fxp", tmp_path / "file" / "model.fxp"):
        with pytest.raises(fxpass.UsageError, match="cannot be written") as found:
            result.save(path)
        assert found.value.hint
    with pytest.raises(fxpass.UsageError, match="is a folder"):
        result.save(tmp_path, overwrite=True)
    assert listing(tmp_path) == {"file": b"precious"}


def test_a_save_that_fails_half_way_leaves_nothing(
    result: fxpass.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.fxp"
    path.write_bytes(b"precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(path, overwrite=True)
    assert listing(tmp_path) == {"model.fxp": b"precious"}
