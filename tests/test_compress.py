"""``fxpass compress``: its file, its report and plot, its defaults, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import fxpass
from fxpass.algebra.piecewise import parse_grid
from fxpass.cli.compress import BEFORE, _pipeline
from fxpass.cli.main import _parse, main
from fxpass.errors import MissingExtraError, UsageError
from fxpass.ir import ops
from fxpass.pipeline import resolve
from fxpass.registry import default_registry
from fxpass.render.tables import table_plot, table_png
from fxpass_passes.tabulate import Tabulate

pytestmark = pytest.mark.once


def tabulate(*words: str) -> Tabulate:
    arguments = _parse(["compress", "example:small", "-s", "x.fxp", *words])
    assert arguments is not None
    text = _pipeline(arguments)
    assert text.startswith(BEFORE)
    (found,) = (p for p in resolve(text, default_registry()) if isinstance(p, Tabulate))
    return found


def test_defaults_are_those_of_existing_compressors() -> None:
    assert tabulate() == Tabulate(dx=0.01, order=3)
    assert tabulate("-d", "0.02", "-o", "5") == Tabulate(dx=0.02, order=5)


def test_with_a_budget_the_step_is_searched() -> None:
    assert tabulate("--budget", "1 meV/A") == Tabulate(dx="auto", order=5)
    assert tabulate("--budget", "1 meV/A", "-o", "3") == Tabulate(dx="auto", order=3)
    assert tabulate("--budget", "1 meV/A", "-d", "0.05") == Tabulate(dx=0.05, order=3)


@pytest.mark.slow
def test_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot, report = (tmp_path / name for name in ("small.fxp", "tables.svg", "tables.json"))
    words = ["compress", "example:small", "-d", "0.03", "-o", "5", "-s", str(out), "--no-verify"]
    assert main([*words, "--plot", str(plot), "--report", str(report)]) == 0
    told = capsys.readouterr().out
    assert "order" in told and "kB" in told
    data = json.loads(report.read_text())
    assert len(data["tables"]) == 2 and data["bytes"] == out.stat().st_size
    loaded = fxpass.load(out)
    nodes = [n for n in loaded.program.graph.nodes if n.target is ops.table and n.args[4] == 0]
    for row, node in zip(data["tables"], nodes, strict=True):
        grid = parse_grid(str(node.args[3]))
        assert (row["order"], row["step"], row["knots"]) == (5, grid.step, grid.cells + 1)
        assert 0 < row["step"] < 0.03 and row["module"]
        assert 0 < row["value_error"] <= row["value_bound"] + 1e-6  # the model is float32
        by_order = row["curves"]["by_order"]
        assert by_order["5"]["slope"][-1] < by_order["3"]["slope"][-1] < by_order["3"]["slope"][0]
        assert len(row["curves"]["x"]) == len(row["curves"]["slope"]) == 400
    svg = plot.read_text()
    ElementTree.fromstring(svg)
    assert svg.count("<svg") == 3 and "order 3" in svg and "Error of the tables against distance" in svg


ROW: dict[str, Any] = {
    "module": "net",
    "node": "mm",
    "curves": {
        "x": [1.0, 2.0],
        "value": [0.0, 1e-9],
        "slope": [1e-8, 0.0],
        "steps": [0.1, 0.01],
        "by_order": {"3": {"value": [1.0, 0.1], "slope": [1.0, 0.1]}, "5": {"value": [0.1, 1e-9], "slope": [1, 1e-9]}},
    },
}


def test_plots_of_two_tables_of_one_module() -> None:
    svg = table_plot([ROW, {**ROW, "node": "tanh"}]).decode()
    ElementTree.fromstring(svg)
    assert "net mm, order 3" in svg and "net tanh" in svg


def test_a_png_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        table_png([ROW])


def test_without_tables_there_is_nothing_to_plot() -> None:
    with pytest.raises(UsageError, match="nothing to plot"):
        table_plot([])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-d", "0"], "'0' is not a positive number"),
        (["-d", "nan"], "'nan' is not a positive number"),
        (["-o", "4"], "invalid choice"),
        (["--plot", "errors.pdf"], "neither .svg nor .png"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / w) if w.endswith("pdf") else w for w in words]
    assert main(["compress", "example:small", "-s", str(tmp_path / "x.fxp"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_exists_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-s", "--report"):
        path = tmp_path / f"taken{option}"
        path.write_text("mine")
        words = ["-s", str(tmp_path / "free.fxp")] if option != "-s" else []
        assert main(["compress", "example:small", *words, option, str(path)]) == 2
        assert "exists" in capsys.readouterr().err and path.read_text() == "mine"
