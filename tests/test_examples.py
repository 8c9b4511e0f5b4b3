"""Every example runs, as a user runs it, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conftest import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    """Run an example in an empty folder on one thread; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_examples_are_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'run("{path.name}"' not in text] == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_options_in_docstrings_exist(path: Path) -> None:
    """The commands at the top of each example use options that it has."""
    text = path.read_text(encoding="utf-8")
    commands = [line for line in text.split('"""')[1].splitlines() if line.startswith("    python examples/")]
    assert commands
    for command in commands:
        assert command.split()[1] == f"examples/{path.name}"
        assert all(f'"{option}"' in text for option in re.findall(r"--[\w-]+", command))


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    printed = run("quickstart.py", "--steps", "30", "--plot", "energy.svg", cwd=tmp_path)
    assert "capture → fold-constants" in printed  # the diffs
    assert "Receipt passed" in printed
    (original,), (optimised,) = (
        re.findall(rf"^{name}: total energy within ([\d.]+) meV/atom", printed, re.MULTILINE)
        for name in ("original", "optimised")
    )
    assert float(original) < 0.5 and float(optimised) < 0.5
    picture = ElementTree.parse(tmp_path / "energy.svg").getroot()
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["energy.svg"]


@pytest.mark.slow
def test_write_a_pass(tmp_path: Path) -> None:
    printed = run("write_a_pass.py", cwd=tmp_path)
    rows = re.findall(r"^ *scale-weights .*\n.*", printed, re.MULTILINE)
    assert rows and "2 × scale-matrix" in rows[0] and "2 × scale-linear" in rows[0]
    assert "scale-weights/scale-matrix: factor of" in printed  # why it did not fire elsewhere
    assert "receipt passed" in printed


@pytest.mark.slow
def test_inspect_pipeline(tmp_path: Path) -> None:
    printed = run("inspect_pipeline.py", "--limit", "2", "--atoms", "32", cwd=tmp_path)
    assert "fxpass.tensor_product" in printed
    assert "differentiate" in printed
    flops = [float(value) for value in re.findall(r"([\d.]+) MFLOP", printed)]
    assert len(flops) == 2 and flops[1] > flops[0]  # energy only, then forces too
    assert "= fxpass.scatter_sum(" in printed


@pytest.mark.slow
def test_train_small_potential(tmp_path: Path) -> None:
    small = ("--batches", "2", "--batch-size", "3", "--epochs", "2")
    printed = run("train_small_potential.py", "--output", "new.npz", *small, cwd=tmp_path)
    first, last = (float(value) for value in re.findall(r"loss ([\d.]+)", printed))
    assert last < first
    from fxpass.models import load

    assert load(tmp_path / "new.npz").settings.numbers == (29, 47, 79)


@pytest.mark.mace
@pytest.mark.slow
def test_mace_ase(tmp_path: Path) -> None:
    printed = run("mace_ase.py", "--steps", "5", "--cells", "1", cwd=tmp_path)
    assert "receipt passed" in printed
    errors = re.findall(r"off by (\S+) eV/atom and (\S+) eV/A", printed)
    assert len(errors) == 3
    # the budget of the default preset, whose tables move forces by 1e-6 eV/A at most
    assert all(float(energy) < 1e-7 and float(force) < 1e-6 for energy, force in errors)
    assert len(re.findall(r"NVE energy within [\d.]+ meV/atom", printed)) == 2


@pytest.mark.slow
def test_deformable_attention(tmp_path: Path) -> None:
    printed = run("deformable_attention.py", "--queries", "20", "--output", "layer.pt", cwd=tmp_path)
    (baked,) = re.findall(r"torch\.jit\.trace: off by ([\d.]+), silently", printed)
    assert float(baked) > 0.3
    assert re.findall(r"refused, (\w+):", printed) == ["FrozenTraceError", "CaptureError"]
    assert "result on cpu, sample 0: off by" in printed
    (error,) = re.findall(r"layer\.pt: off by (\S+) on 20 queries", printed)
    assert float(error) < 1e-12


@pytest.mark.mace
@pytest.mark.slow
def test_fine_tune_mace(tmp_path: Path) -> None:
    printed = run("fine_tune_mace.py", "--steps", "12", "--output", "tuned.model", cwd=tmp_path)
    first, *_, last, original = (float(value) for value in re.findall(r"loss ([\d.]+)", printed))
    assert last < first and original < first
    assert (tmp_path / "tuned.model").is_file()


@pytest.mark.slow
def test_classical_force_field(tmp_path: Path) -> None:
    pytest.importorskip("ase")
    printed = run("classical_force_field.py", "--molecules", "3", "--steps", "20", "--target", "eager", cwd=tmp_path)
    assert "receipt passed" in printed
    original, optimised = re.findall(r"^(?:original|optimised): (-?[\d.]+) eV", printed, re.MULTILINE)
    assert original == optimised
    (drift,) = re.findall(r"total energy within ([\d.]+) meV/atom", printed)
    assert float(drift) < 5
    ((start, found, true),) = re.findall(r"bonds of (\S+) became (\S+) eV/A\^2, the reference has (\S+)", printed)
    assert float(start) == pytest.approx(0.8 * float(true), rel=1e-4) and float(found) == pytest.approx(float(true))


@pytest.mark.slow
def test_plain_deep_potential(tmp_path: Path) -> None:
    printed = run("plain_deep_potential.py", "--step", "0.02", "--cells", "2", cwd=tmp_path)
    found = re.findall(r"^(\w+, order \d): largest force error (\S+) eV/A", printed, re.MULTILINE)
    errors = {name: float(error) for name, error in found}
    assert errors["command, order 3"] == errors["Python, order 3"]
    assert errors["Python, order 5"] < 0.01 * errors["Python, order 3"] < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed.fxp", "model.pt"]


@pytest.mark.slow
def test_phonons(tmp_path: Path) -> None:
    printed = run("phonons.py", "--cells", "3", "--plot", "bands.svg", cwd=tmp_path)
    within = r"force constants within (\S+) eV/Angstrom\^2 of finite displacements, largest (\S+)"
    ((off, largest),) = re.findall(within, printed)
    assert float(off) < 1e-4 * float(largest)
    (change,) = re.findall(r"squared frequencies within (\S+) THz\^2", printed)
    assert float(change) < 1e-2
    assert len(re.findall(r"THz$", printed, re.MULTILINE)) == 6  # corners of the zone
    assert ElementTree.parse(tmp_path / "bands.svg").getroot().findall(".//{http://www.w3.org/2000/svg}polyline")
