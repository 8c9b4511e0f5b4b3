"""The target ``triton``: refused without a GPU; what can be seen of it on a machine that has none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fxpass
from fxpass.errors import LoweringError, MissingExtraError
from fxpass.ir.program import Program
from fxpass.models import Settings, build
from fxpass.registry import TARGETS, default_registry
from fxpass.targets import triton as room
from fxpass.targets.native import FUSED

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def program() -> Program:
    model = build(Settings((1, 8), (-1.0, -2.0), 4.0, "3x0e+2x1o", 1, 1, 3, 4))
    return fxpass.run_passes(fxpass.capture(model), f"exact,{FUSED}").program


def test_it_is_a_shipped_target() -> None:
    assert "triton" in default_registry().names(TARGETS)
    assert default_registry().target("triton") is room.TritonTarget


def test_without_a_gpu_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "load_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("fxpass.subjects.copy_model", None)  # where work begins
    with pytest.raises(LoweringError, match=r"needs a CUDA device, and torch sees none\. Try: the target native"):
        fxpass.optimize(build(Settings((1, 8), (-1.0, -2.0))), target="triton")


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise MissingExtraError("Triton is not installed", hint='pip install "fxpass[triton]"')

    monkeypatch.setattr(room, "load_triton", absent)
    with pytest.raises(MissingExtraError, match=r"fxpass\[triton\]"):
        default_registry().target("triton")()


def test_everything_that_a_program_holds_or_makes_moves(program: Program) -> None:
    away, given = torch.device("meta"), program.copy()
    output = given.graph.output_node()
    with given.graph.inserting_before(output):
        given.graph.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device("cpu")})
    moved = room._moved(given, away)
    weights = [*moved.graph_module.parameters(), *moved.graph_module.buffers()]
    assert weights and all(t.device == away for t in weights)
    made = [n.kwargs["device"] for n in moved.graph.nodes if "device" in n.kwargs]
    assert made and set(made) == {away}
    kept = [*program.graph_module.parameters(), *program.graph_module.buffers()]
    assert all(t.device.type == "cpu" for t in kept)


def test_every_semantic_op_has_a_kernel_or_a_sort(program: Program) -> None:
    chosen, manifest = room._choices(program)
    assert chosen.keys() == {row.node for row in manifest} and not any(row.reason for row in manifest)
    names = {row.op: row.kernel for row in manifest}
    assert names["rows_by"] == "torch.sort" and names["convolution"].startswith("convolution_")
    assert names.keys() >= {"polynomial", "linear", "convolution", "convolution_gradient", "rows_by"}


# --- benchmarks/gpu.py


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("models", "gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("gpu")


def test_the_benchmark_refuses_without_a_gpu(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "rows.json")]) == 2
    assert "needs a CUDA device, and torch sees none" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.mace
def test_the_benchmark_measures_by_turns_and_names_what_is_not_there(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mace_models import build as build_mace

    monkeypatch.setitem(sys.modules, "triton", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "cuequivariance" else find_spec(n))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    torch.save(build_mace(layers=1, l_max=1, dtype=torch.float32), tmp_path / "tiny.model")
    words = ["--models", str(tmp_path / "tiny.model"), "--atoms", "1", "4", "--repeat", "3"]
    options = gpu.parse([*words, "--candidates", gpu.EAGER, "cuEquivariance", "fxpass"])
    rows = list(gpu.measure(options.models[0], options, torch.device("cpu")))
    absent, timed = rows[:2], rows[2:]
    assert [row.candidate for row in absent] == ["cuEquivariance", "fxpass"]
    assert "cuequivariance is not installed" in absent[0].note and "Triton is not installed" in absent[1].note
    assert [(row.candidate, row.atoms, row.ratio) for row in timed] == [(gpu.EAGER, 1, 1.0), (gpu.EAGER, 4, 1.0)]
    assert all(0 < row.fastest <= row.median and 0 <= row.force_error < 1e-3 for row in timed)
    assert all(gpu.line(row) for row in rows)
