"""What all tests share.

Nothing here skips a test.  Tests marked ``mace`` or ``gpu`` are deselected only by ``-m`` (``run_tests.py``
passes it where they cannot run), and the terminal says how many were.  So a module with such tests imports
the optional package inside them, not at its top.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from ase import Atoms

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # trained model and data, where a checkout has them beside it
ALLOY = {28: 3.52, 29: 3.61, 46: 3.89, 47: 4.09, 79: 4.08}  # Ni Cu Pd Ag Au: fcc lattice constants in Angstrom
collect_ignore = ["plugin_example"]  # a project of its own; test_plugin_example.py runs its tests where it is installed
DESELECTED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[DESELECTED] = 0


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    items[0].config.stash[DESELECTED] += len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # an xdist worker: it selects, the controller reports
    if output is not None:
        output["deselected"] = session.config.stash[DESELECTED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", 0)  # the same in every worker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[DESELECTED]:
        terminalreporter.write_line(f"{config.stash[DESELECTED]} tests deselected by -m {config.option.markexpr!r}")


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """Gives every test float32 as torch's default; mace-torch's calculator changes it and leaves it changed."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def alloy_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a float32 ScaleShiftMACE for Ni Cu Pd Ag Au: the trained one, or one of its shape at random."""
    trained = SHARED / "models" / "alloy.model"
    if trained.is_file():
        return trained
    path = tmp_path_factory.mktemp("models") / "alloy.model"
    torch.save(random_alloy_model(), path)
    return path


def random_alloy_model() -> torch.nn.Module:
    """The architecture of the trained alloy model with random weights, always the same ones."""
    from mace import modules  # before e3nn: e3nn 0.4.4 alone does not import on this torch

    # isort: split
    from e3nn import o3

    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return modules.ScaleShiftMACE(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=2,
            num_elements=len(ALLOY),
            hidden_irreps=o3.Irreps("32x0e + 32x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.array([[0.25, 0.01, -0.01, 0.37, 0.36]], dtype=np.float32),
            avg_num_neighbors=38.5,
            atomic_numbers=list(ALLOY),
            correlation=3,
            gate=torch.nn.functional.silu,
            radial_type="bessel",
            atomic_inter_scale=[50.0],  # makes forces of random weights as large as real ones, some eV/Angstrom
            atomic_inter_shift=0.0,
            heads=["Default"],
        )


@pytest.fixture(scope="session")
def alloy_structures() -> list[Atoms]:
    """Four periodic 32-atom random fcc alloys of Ni Cu Pd Ag Au at 300 to 1,500 K: reference frames or rattled."""
    from ase.io import read

    frames = SHARED / "data" / "alloy_test.xyz"
    if frames.is_file():
        return read(frames, index="::13")
    return [random_alloy(seed) for seed in range(4)]


def random_alloy(seed: int) -> Atoms:
    """A 2x2x2 cubic fcc cell (32 atoms) with random species, at their mean lattice constant, rattled by 0.1 A."""
    from ase.build import bulk

    rng = np.random.default_rng(seed)
    species = rng.choice(list(ALLOY), size=32)
    atoms = bulk("Cu", "fcc", a=float(np.mean([ALLOY[z] for z in species])), cubic=True).repeat(2)
    atoms.numbers = species
    atoms.positions += rng.normal(scale=0.1, size=(32, 3))
    return atoms


@dataclass(frozen=True)
class FreshEnvironment:
    """A new virtual environment that also sees the packages of the one the tests run in, torch above all.

    What is installed into it comes first, and its distributions are real ones with real entry points.
    """

    folder: Path

    @property
    def scripts(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def install(self, wheel: Path) -> None:
        pip("--python", str(self.scripts / "python"), "install", "--no-deps", "--no-index", str(wheel))

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a console script of this environment in its folder, far from the checkout."""
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.scripts / script), *arguments]
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True)


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def fresh_environment(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # addsitedir, not a bare path: it also follows the .pth file of an editable fxpass.
    (own / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return FreshEnvironment(folder)


@pytest.fixture(scope="session")
def fxpass_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("fxpass"))


def build_wheel(source: Path, into: Path) -> Path:
    """Build the project in ``source`` from a copy, without network, and return the one wheel this makes."""
    copy = into / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__"))
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(into / "wheels"), str(copy))
    (wheel,) = (into / "wheels").glob("*.whl")
    return wheel
