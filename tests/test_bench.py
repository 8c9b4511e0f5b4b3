"""What benchmarks measure: turns, memory, peaks; ``fxpass bench``; ``benchmarks/speed.py`` on a small model."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from fxpass.cli import bench, main
from fxpass.cli.measure import Peaks, by_turns, crystal, peak_memory, threads
from fxpass.ir.cost import Amount
from fxpass.structures import Neighbours, Structure, neighbour_list

pytestmark = pytest.mark.once

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


# --- measurements


def test_calls_take_turns() -> None:
    seen: list[str] = []
    taken = by_turns({name: lambda n=name: seen.append(n) for name in "ab"}, 4)
    assert "".join(seen) == 6 * "ab"  # two rounds to warm up
    assert {name: len(values) for name, values in taken.items()} == {"a": 4, "b": 4}
    assert all(value >= 0 for values in taken.values() for value in values)


def test_time_limits_rounds_but_not_below_three() -> None:
    assert len(by_turns({"a": lambda: None}, 10, seconds=0.0)["a"]) == 3
    assert len(by_turns({"a": lambda: None}, 2, seconds=0.0)["a"]) == 2


def test_peak_memory_is_the_largest_sum_of_what_is_alive() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(250_000)  # 1 MB
        b = a + 1
        del a
        c = torch.ones(500_000)  # 2 MB
        return b.sum() + c.sum()

    kept = torch.ones(1_000_000)
    assert 3e6 <= peak_memory(call) < 3.001e6
    assert 4e6 <= peak_memory(lambda: kept + 1) < 4.001e6  # what was there before does not count
    assert peak_memory(lambda: None) == 0


def test_a_bound_is_the_slower_of_two() -> None:
    peaks = Peaks(flops=10.0, bandwidth=4.0, dtype="float32")
    assert peaks.bound(Amount(flops=100.0, bytes=8.0)) == 10.0
    assert peaks.bound(Amount(flops=10.0, bytes=80.0)) == 20.0


def test_peaks_are_of_a_computer() -> None:
    peaks = Peaks.measure(torch.float64, side=128, mebibytes=1)
    assert 1e8 < peaks.flops < 1e14 and 1e8 < peaks.bandwidth < 1e13
    assert peaks.dtype == "float64"


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_one_atom_has_all_neighbours_of_fcc() -> None:
    structure = crystal(1, [29], 5.0, nearest=2.6)
    structure.check()
    edges, _ = neighbour_list(structure, 5.0)
    assert len(structure) == 1 and edges.shape[1] == 12 + 6 + 24  # the next shell is at 5.2 Angstrom


# --- fxpass bench


def test_tables_show_what_was_asked_for() -> None:
    first = bench.Timing("s", 2, 6, "energy and forces", (9e-3, 3e-3, 4e-3), (1e-3, 8e-3, 2e-3), "exact", "eager", 2)
    plain = text(bench.timing_table([first], 3))
    assert "2.00x" in plain and "4.00 ms" in plain and "1000.0" in plain  # microseconds an atom
    assert "memory" not in plain and "bound" not in plain
    full = text(bench.timing_table([replace(first, memory=(8_000_000, 500_000), bound=1e-3)], 3))
    assert "8.0 -> 0.5 MB" in full and "50%" in full
    steps = [bench.Step("captured", 4e-3, (8e-3,)), bench.Step("some-pass", 1e-3, (4e-3,))]
    shown = text(bench.steps_table(steps)).splitlines()[-1].split()
    assert shown == ["some-pass", "1.00", "ms", "4.00x", "4.00", "ms", "2.00x"]


def text(table: Any) -> str:
    screen = Console(width=200)
    with screen.capture() as capture:
        screen.print(table)
    return capture.get()


@pytest.mark.slow
def test_several_results_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--presets", "dead-code", "--atoms", "1", "4", "--threads", "1", "--repeat", "3", "--no-verify"]
    flags = ["--memory", "--roofline", "--each-pass", "--json"]
    assert main(["bench", "example:small", "-p", "dead-irreps", *words, *flags]) == 0
    done = json.loads(capsys.readouterr().out)
    rows = [(row["atoms"], row["threads"], row["passes"], row["target"]) for row in done["timings"]]
    assert rows == [(atoms, 1, passes, "eager") for atoms in (1, 4) for passes in ("dead-irreps", "dead-code")]
    for row in done["timings"]:
        original, optimised = (row["seconds"][name]["median"] for name in ("original", "optimised"))
        assert row["ratio"] == pytest.approx(original / optimised)
        assert row["memory"]["original"] > row["memory"]["optimised"] > 0
        assert 0 < row["bound"] < 1
    steps = {step["pass"]: step for step in done["each_pass"]}
    assert next(iter(steps)) == "captured"
    assert steps["dead-irreps"]["expected"] < 0.95 * steps["captured"]["expected"]
    assert all(step["median"] > 0 for step in steps.values())


class Parts:
    """A family that calls the parts of a ``Sequential`` by itself, and everything else as it is."""

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Tensor:
        data = {"edges": torch.tensor(neighbours(structure, 3.0)[0])}
        for part in model if isinstance(model, torch.nn.Sequential) else [model]:
            data = part(data)
        return data["edges"]


class Shift(torch.nn.Module):
    """Writes into what it is given, as some models do."""

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        data["edges"] += 1
        return data


def test_models_that_their_family_runs_part_by_part_are_timed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, family = crystal(4, [29], 3.0), Parts()
    parts, one = torch.nn.Sequential(Shift(), Shift()), Shift()
    edges = family.evaluate(torch.nn.Sequential(), structure)
    for modules, whole in (({"a": one, "b": one}, False), ({"a": parts, "b": one}, True)):
        calls, told = bench.calls_of(modules, family, structure)  # type: ignore[arg-type]
        assert told is whole
        for _ in range(2):
            found = calls["b"]()
            assert torch.equal(found if whole else found["edges"], edges + 1)  # type: ignore[call-overload,index]
    assert torch.equal(calls["a"](), edges + 2)  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "neighbour_list", None)
    calls["a"]()  # lists are made once


def test_atoms_move_from_call_to_call() -> None:
    """What a drop-in keeps for equal positions would make it look faster than it is in dynamics."""
    structure, seen = crystal(4, [29], 3.0), []

    class Family:
        def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Any:
            return model(torch.from_numpy(structure.positions.copy()))

    class Model(torch.nn.Module):
        def forward(self, positions: Tensor) -> Tensor:
            seen.append(positions)
            return positions

    call = bench.call_of(Model(), Family(), structure)  # type: ignore[arg-type]
    seen.clear()
    for _ in range(3):
        call()
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert 1e-4 < float((seen[0] - seen[1]).abs().max()) < 1e-2


@pytest.mark.sevenn
def test_modalities_in_float64(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """SevenNet's own ``forward`` knows neither, so its modules are called one by one."""
    from test_sevennet import MODAL
    from test_sevennet import build as sevennet

    model = sevennet(**MODAL, num_convolution_layer=1, channel=2, lmax=1)
    monkeypatch.setattr(bench.options, "find_model", lambda _: model)
    words = ["bench", "some.pth", "-p", "dead-code", "--atoms", "4", "--repeat", "1", "--no-verify", "--json"]
    assert main(words) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["dtype"] == "float64"
    (row,) = done["timings"]
    assert row["computes"] == "energy, forces, stress, from the structure on" and row["ratio"] > 0


# --- benchmarks/speed.py


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("models", "speed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("speed")


@pytest.mark.mace
def test_the_benchmark_measures_what_it_says(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mace_models import build

    torch.save(build(layers=1, l_max=1, dtype=torch.float32), tmp_path / "tiny.model")
    out, picture = tmp_path / "rows.json", tmp_path / "plot.svg"
    words = ["--models", str(tmp_path / "tiny.model"), "--presets", "fold-constants", "--targets", "eager", "gone"]
    words += ["--atoms", "1", "4", "--threads", "1", "--repeat", "3", "--json", str(out), "--plot", str(picture)]
    assert speed.main(words) == 0
    shown = capsys.readouterr().out
    assert "fxpass fold-constants, gone: " in shown and "there is no target 'gone'" in shown.replace("\n", " ")
    data = json.loads(out.read_text())
    rows: list[dict[str, Any]] = [row for row in data["rows"] if not row["note"]]
    names = ("eager model", "fxpass fold-constants, eager")
    assert [(row["candidate"], row["atoms"]) for row in rows] == [(name, n) for n in (1, 4) for name in names]
    for original, ours in zip(rows[::2], rows[1::2], strict=True):
        assert original["ratio"] == 1.0
        assert ours["ratio"] == pytest.approx(original["median"] / ours["median"])
        assert min(original["memory"], ours["memory"], ours["flops"], ours["bytes"]) > 0
        assert ours["step"] > 0 and original["step"] > 0  # a step is more than a call, but no test compares times
        assert ours["compile"] > 0 and 0 < ours["bound"] < 1
        assert max(ours["energy_error"], original["force_error"], ours["force_error"]) < 1e-4
    assert rows[2]["force_error"] > 0  # in float32, against float64
    assert picture.read_text().startswith("<svg")


@pytest.mark.mace
def test_the_random_models_are_of_the_sizes_they_are_named_for(speed: ModuleType) -> None:
    models = importlib.import_module("models")
    small = models.Size("4x0e+4x1o", l_max=1, correlation=2)
    model: Any = models.build(small, torch.float64)
    assert next(model.parameters()).dtype == torch.float64 and torch.get_default_dtype() == torch.float32
    data = speed.batch(model, speed.crystal(108, models.NUMBERS, models.CUTOFF, models.NEAREST))
    assert 4500 < data["edge_index"].shape[1] < 4700
    forces = model(data)["forces"]
    assert 0.01 < float(forces.abs().max()) < 100
    assert np.allclose(forces.detach().sum(0), 0, atol=1e-9)


@pytest.mark.mace
def test_an_unknown_compiler_is_refused(speed: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.parse(["--compilers", "gcc"])
    assert "there is no compiler 'gcc'" in capsys.readouterr().err
    assert speed.parse(["--compilers", "all"]).chosen_compilers == speed.COMPILERS
