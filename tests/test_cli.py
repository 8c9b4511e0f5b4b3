"""The command line: what each command answers, on which stream, and with which exit code."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

import fxpass
from fxpass.api import capture
from fxpass.cli import bench, catalogue, doctor, main
from fxpass.cli import optimize as optimize_commands
from fxpass.cli.main import build_parser
from fxpass.models import build, save, small_potential
from fxpass.structures import neighbour_list

pytestmark = pytest.mark.once

MODEL = "example:small"
CHEAP = "fold-constants,dead-code"
COMMANDS = build_parser()[1].parsers


@dataclass(frozen=True)
class Run:
    """One command: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Fxpass = Callable[..., Run]


@pytest.fixture
def fxpass_(capsys: pytest.CaptureFixture[str]) -> Fxpass:
    """Runs a command in this process."""

    def run(*words: str) -> Run:
        capsys.readouterr()
        code = main(words)
        return Run(code, *capsys.readouterr())

    return run


def process(
    *words: str, code: str = "import sys; from fxpass.cli import main; sys.exit(main())", **options: Any
) -> Run:
    """Runs a command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **options)
    return Run(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Saved:
    """A result on disk, and what ``fxpass optimize --json`` said about it."""

    path: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    path = tmp_path_factory.mktemp("saved") / "small.fxp"
    parser, _ = build_parser()
    arguments = parser.parse_args(["optimize", MODEL, "-o", str(path), "--dump", str(path.parent / "graphs")])
    return Saved(path, dict(optimize_commands.optimize(arguments).data))


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_in_examples(fxpass_: Fxpass, name: str) -> None:
    told = fxpass_(name, "--help")
    assert (told.code, told.err) == (0, "")
    assert examples(told.out)


def examples(help: str) -> list[str]:
    """The lines under the last heading, ``examples:``."""
    lines = [line.strip() for line in help.partition("\nexamples:\n")[2].splitlines()]
    assert all(line.startswith("fxpass ") for line in lines)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_examples_run_as_they_stand(
    fxpass_: Fxpass, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in examples(fxpass_(name, "--help").out):
        done = fxpass_(*shlex.split(line)[1:])
        assert done.code == 0, f"{line}\n{done.err}"
        assert done.out


def test_no_command_prints_the_help(fxpass_: Fxpass) -> None:
    told = fxpass_()
    assert told.code == 0
    assert all(name in told.out for name in COMMANDS)


def test_version(fxpass_: Fxpass) -> None:
    assert fxpass_("--version").out == f"fxpass {fxpass.__version__}\n"


# --- streams and exit codes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimise", MODEL], "'optimize'"),
        (["pases"], "'passes'"),
        (["passes", "--jsn"], "'--json'"),
        (["diff", MODEL, "--pases", "x"], "'--passes'"),
        (["--verison"], "fxpass --help"),
        (["optimize", MODEL], "-o"),
        (["explain"], "PASS"),
        (["bench", MODEL, "--repeat", "0"], "positive"),
        (["inspect", MODEL, "--at", "atoms"], "atoms=108"),
        (["inspect", "example:smal"], "'example:small'"),
    ],
)
def test_wrong_usage(fxpass_: Fxpass, words: list[str], told: str) -> None:
    done = fxpass_(*words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert done.err.startswith("error: ")
    assert "Try: " in done.err


def test_an_error_is_json_too(fxpass_: Fxpass) -> None:
    done = fxpass_("explain", "dead-cod", "--json")
    assert done.code == done.data["error"]["exit_code"] == 2
    assert done.data["error"]["type"] == "PipelineError"
    assert "'dead-code'" in done.data["error"]["what"]
    assert done.data["error"]["what"] in done.err


def test_wrong_usage_is_json_too(fxpass_: Fxpass) -> None:
    done = fxpass_("optimize", MODEL, "--json")
    assert done.code == 2
    assert done.data["error"]["type"] == "UsageError"


def test_an_interrupt_is_no_traceback(fxpass_: Fxpass, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "default_registry", interrupted)
    done = fxpass_("passes")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


def test_what_others_print_does_not_reach_stdout() -> None:
    """Neither what Python code prints, nor what C code writes, nor what child processes do."""
    code = """
import os, subprocess, sys
from fxpass.cli import catalogue, main
registry = catalogue.default_registry
def noisy():
    print("from python")
    os.write(1, b"from c\\n")
    subprocess.run(["echo", "from a child"])
    return registry()
catalogue.default_registry = noisy
sys.exit(main(["passes", "--json"]))
"""
    done = process(code=code)
    assert done.code == 0
    assert "dead-code" in [entry["name"] for entry in done.data["passes"]]
    assert sorted(done.err.splitlines()) == ["from a child", "from c", "from python"]


@pytest.mark.mace
def test_a_pickle_is_announced_once_and_stdout_stays_pure(alloy_model_path: Path) -> None:
    done = process("inspect", str(alloy_model_path), "--json")
    assert done.code == 0, done.err
    assert done.data["family"] == "mace"
    assert done.err.count("pickle") == 1


def test_a_result_is_no_pickle(saved: Saved) -> None:
    """And no bar is drawn into a pipe."""
    done = process("inspect", str(saved.path), "--json")
    assert (done.code, done.err) == (0, "")
    assert done.data["kind"] == "result"


def test_a_reader_who_leaves_is_no_error() -> None:
    code = "import sys; from fxpass.cli import main; sys.exit(main(['passes']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_colours_on_a_terminal_only(fxpass_: Fxpass) -> None:
    plain = fxpass_("passes").out
    assert "\x1b" not in plain
    assert not any(line.endswith(" ") for line in plain.splitlines())

    ours, theirs = os.openpty()
    code = "import sys; from fxpass.cli import main; sys.exit(main(['passes']))"
    environ = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environ) as child:
        os.close(theirs)
        drawn = os.read(ours, 4096)
        assert child.wait() == 0
    os.close(ours)
    assert b"\x1b[" in drawn


# --- passes, explain, doctor


def test_passes(fxpass_: Fxpass) -> None:
    listed = fxpass_("passes", "--json").data
    passes = {entry["name"]: entry for entry in listed["passes"]}
    assert passes["dead-code"] == {
        "name": "dead-code",
        "provider": f"fxpass {fxpass.__version__}",
        "problem": None,
        "exactness": "exact",
        "summary": "Removes nodes that reach no output, and weights that no node reads.",
    }
    presets = {entry["name"]: entry["pipeline"] for entry in listed["presets"]}
    assert "dead-code" in presets["default"]
    assert "torchscript" in [entry["name"] for entry in listed["targets"]]

    text = fxpass_("passes").out
    for entries in listed.values():
        for entry in entries:
            assert any(line.split()[:2] == [entry["name"], "fxpass"] for line in text.splitlines())


def test_explain_a_pass(fxpass_: Fxpass) -> None:
    told = fxpass_("explain", "specialize-heads", "--json").data
    assert told["exactness"] in ("exact", "reassociates")
    assert Path(told["file"]).name == "specialize_heads.py"
    assert {key: told["options"][0][key] for key in ("name", "required")} == {"name": "head", "required": False}

    text = fxpass_("explain", "specialize-heads").out
    assert "\nBefore / After:\n" in text
    assert "\nHolds when:" in text
    assert "\nKeeps:" in text
    assert "Options:\n  head: " in text
    assert told["file"] in text


def test_explain_a_preset(fxpass_: Fxpass) -> None:
    told = fxpass_("explain", "default", "--json").data
    assert told["kind"] == "preset"
    names = [name.partition("{")[0] for name in told["pipeline"].split(",")]
    assert "differentiate" in names
    assert [line.strip() for line in fxpass_("explain", "default").out.splitlines()[1:]] == told["pipeline"].split(",")


def test_doctor(fxpass_: Fxpass) -> None:
    told = fxpass_("doctor", "--json")
    assert (told.code, told.data["passed"]) == (0, True)
    checks = {check["name"]: check for check in told.data["checks"]}
    assert torch.__version__ in checks["torch"]["found"]
    for name in ("python", "torch", "e3nn", "passes", "targets", "frontends", "C++ compiler", "threads"):
        assert name in checks
    mace = checks["extra mace"]
    assert mace["state"] == "ok" or mace["hint"] == 'pip install "fxpass[mace]"'


def test_doctor_fails_where_something_essential_is_off(fxpass_: Fxpass, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TESTED_TORCH", ("1.4.0",))
    told = fxpass_("doctor")
    assert told.code == 1
    assert 'Try: pip install "torch==1.4.*"' in told.out
    assert "Essential, and off: torch." in told.out


def test_doctor_tells_that_fxpass_is_not_installed(fxpass_: Fxpass, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    told = fxpass_("doctor", "--json")
    (failed,) = [check for check in told.data["checks"] if check["state"] == "FAILED"]
    assert told.code == 1
    assert "not installed" in failed["found"]
    assert "pip install" in failed["hint"]


# --- optimize, verify, inspect


def test_optimize_writes_a_result_that_loads(saved: Saved) -> None:
    assert saved.path.stat().st_size == saved.report["bytes"]
    assert "dead-code" in [step["name"] for step in saved.report["passes"]]
    assert saved.report["receipt"]["passed"]
    result = fxpass.load(saved.path)
    assert result.report.to_json() == {key: saved.report[key] for key in result.report.to_json()}


def test_optimize_dumps_every_graph_that_changed(saved: Saved) -> None:
    graphs = sorted(path.name for path in (saved.path.parent / "graphs").iterdir())
    assert graphs[0] == "00-captured.txt"
    assert "report.json" in graphs
    assert any(name.endswith("-differentiate.txt") for name in graphs)


def test_verify_passes_for_the_original(saved: Saved) -> None:
    """In a process that has built no model before it loads the result."""
    done = process("verify", str(saved.path), "--against", MODEL, "--json")
    assert done.code == 0, done.err
    assert done.data["passed"]
    assert {row["check"] for row in done.data["rows"]} >= {"energy", "forces", "stress", "rotation", "closed loop"}


def test_verify_fails_for_another_model(fxpass_: Fxpass, saved: Saved, tmp_path: Path) -> None:
    save(build(small_potential().settings, seed=1), tmp_path / "other.npz")
    structures = tmp_path / "md.xyz"
    structures.write_text("2\n\nCu 0 0 0\nAu 0 0 2.6\n3\n\nCu 0 0 0\nAu 0 0 2.6\nAg 0 2.6 0\n")
    words = ["--against", str(tmp_path / "other.npz"), "--structures", f"{structures}@1"]
    done = fxpass_("verify", str(saved.path), *words)
    assert done.code == 1
    assert "FAILED" in done.out
    assert "md.xyz[1]" in done.out
    assert "md.xyz[0]" not in done.out


def test_inspect_a_model(fxpass_: Fxpass) -> None:
    done = fxpass_("inspect", MODEL, "--at", "atoms=7,edges=90", "--json").data
    program = capture(small_potential())
    cost = fxpass.program_cost(program).at(atoms=7, edges=90, graphs=1)
    assert done["graph"]["at"] == {"atoms": 7, "edges": 90, "graphs": 1, "flops": cost.flops, "bytes": cost.bytes}
    assert done["graph"]["node_count"] == len(program.graph.nodes)
    calls = sum(node.op == "call_function" for node in program.graph.nodes)
    assert sum(row["count"] for row in done["graph"]["ops"]) == calls
    assert done["facts"]["numbers"] == [29, 47, 79]
    assert "nodes" not in done["graph"]


def test_inspect_prints_ops_irreps_and_cost(fxpass_: Fxpass) -> None:
    text = fxpass_("inspect", MODEL, "--at", "atoms=7").out
    assert "fxpass.tensor_product" in text
    assert "16x0e" in text
    assert "species Cu Ag Au" in text
    assert "·edges" in text
    assert "atoms = 7" in text


def test_inspect_prints_the_whole_graph(fxpass_: Fxpass, saved: Saved) -> None:
    result = fxpass.load(saved.path)
    text = fxpass_("inspect", str(saved.path), "--graph").out
    assert all(f"    {node.name}: " in text for node in result.graph_module.graph.nodes if node.op == "call_function")
    nodes = fxpass_("inspect", str(saved.path), "--graph", "--json").data["graph"]["nodes"]
    assert len(nodes) == len(result.graph_module.graph.nodes)


def test_inspect_a_result_tells_how_it_was_made(fxpass_: Fxpass, saved: Saved) -> None:
    done = fxpass_("inspect", str(saved.path), "--json").data
    assert done["kind"] == "result"
    assert done["report"] == {key: saved.report[key] for key in done["report"]}
    assert done["graph"]["stage"] == "forces"
    text = fxpass_("inspect", str(saved.path)).out
    assert "Receipt passed" in text
    assert "eager" in text
    assert "differentiate" in text


# --- diff


def test_diff(fxpass_: Fxpass, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    done = fxpass_("diff", MODEL, "-p", f"{CHEAP},differentiate", "--html", str(page), "--json").data
    fold, dead, differentiate = done["passes"]
    assert [fold["name"], dead["name"], differentiate["name"]] == ["fold-constants", "dead-code", "differentiate"]
    assert fold["nodes_before"] == fold["diff"]["nodes_before"] > fold["diff"]["nodes_after"] == fold["nodes_after"]
    for before, after in ((fold, dead), (dead, differentiate)):
        assert before["diff"]["nodes_after"] == after["diff"]["nodes_before"]
        assert before["diff"]["flops"][1] == after["diff"]["flops"][0]
    assert any(part["unchanged"] for part in fold["diff"]["modules"])
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "fold-constants" in page.read_text()


def test_diff_shows_modules_and_refusals(fxpass_: Fxpass) -> None:
    text = fxpass_("diff", MODEL, "-p", "fold-constants,specialize-species", "--limit", "1").out
    assert "capture → fold-constants" in text
    assert "layers.0.radial" in text
    assert "unchanged" in text
    assert "more" in text
    assert "Why a rule did not fire" in text


# --- bench


def test_bench(fxpass_: Fxpass) -> None:
    threads = torch.get_num_threads()
    words = ["--atoms", "4", "--repeat", "3", "--threads", "2", "-p", CHEAP, "--no-verify", "--json"]
    done = fxpass_("bench", MODEL, *words).data
    (timing,) = done["timings"]
    assert (timing["atoms"], timing["computes"]) == (4, "energy, forces, stress")
    assert timing["edges"] == neighbour_list(bench.crystal(4, [29, 47, 79], 5.0), 5.0)[0].shape[1]
    seconds = timing["seconds"]
    assert timing["ratio"] == pytest.approx(seconds["original"]["median"] / seconds["optimised"]["median"])
    assert done["machine"]["threads"] == 2
    assert not done["verified"]
    assert [entry["stage"] for entry in done["stages"]] == ["capture", "calibration", "passes", "lower to eager"]
    assert torch.get_num_threads() == threads


def test_a_timing_is_a_median() -> None:
    timing = bench.Timing("s", 1, 0, "energy and forces", (9.0, 3.0, 4.0), (1.0, 8.0, 2.0))
    assert timing.ratio == median((3.0, 4.0, 9.0)) / median((1.0, 2.0, 8.0)) == 2.0


@pytest.mark.parametrize("wanted", [1, 4, 5, 32, 100, 108, 500])
def test_the_crystal_has_about_as_many_atoms_as_asked_for(wanted: int) -> None:
    crystal = bench.crystal(wanted, [29, 79], 5.0)
    assert wanted <= len(crystal) < 1.5 * wanted + 4
    crystal.check([29, 79])
    edges, _ = neighbour_list(crystal, 3.0)
    assert np.bincount(edges[1]).min() > 6  # of the twelve nearest neighbours of fcc
