"""Run all checks and all tests of fxpass: ``python run_tests.py``.

Needs nothing but Python 3.11.  Makes the two environments that the tests need (mace-torch pins
e3nn 0.4.4; other families need e3nn 0.6; one environment cannot hold both), then runs ruff, mypy
and, in each environment, pytest.  Exits with 1 when anything failed.

    python run_tests.py                          everything
    python run_tests.py --env mace               one environment
    python run_tests.py --long                   all variants of all families too
    python run_tests.py -- tests/test_ir.py -x   arguments after -- go to pytest
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
NOTHING_COLLECTED = 5  # pytest's exit code; of two calls of it one has none of the tests that were asked for
#: markers of the families whose packages need e3nn 0.6
FAMILIES = ("nequip", "sevenn", "schnetpack", "deepmd")


@dataclass(frozen=True)
class Environment:
    """One environment: what pip installs after torch, and which tests run in it.

    Attributes:
        alone: what is installed after that without its own requirements, because it asks for another torch.
        lacks: markers whose tests do not run in it.
        apart: marker of tests that run in processes of their own, after the others: their package changes torch's
            defaults for the whole process.
    """

    name: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    apart: str = ""

    @property
    def installs(self) -> list[list[str]]:
        """Arguments of pip, one call after the other; torch first: what follows must take this version."""
        alone = [["--no-deps", *self.alone]] if self.alone else []
        return [[TORCH], list(self.requirements), *alone]


ENVIRONMENTS = (
    Environment("mace", ("-e", ".[mace,triton,dev]"), lacks=FAMILIES),
    Environment(
        "e3nn06",
        ("-e", ".[ase,dev,nequip,allegro,sevennet,schnetpack,deepmd]", "e3nn>=0.6,<0.7"),
        alone=("schnetpack==2.1.1", "deepmd-kit==3.2.0"),
        lacks=("mace", "once", "triton"),
        apart="nequip",
    ),
)


@dataclass(frozen=True)
class Step:
    """One line of the summary."""

    name: str
    ok: bool
    seconds: float
    note: str = ""


def run(
    name: str, command: list[str], *, env: dict[str, str] | None = None, note: str = "", fine: tuple[int, ...] = (0,)
) -> Step:
    """Run ``command`` in the repository root with its output on this terminal."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    return Step(name, code in fine, time.monotonic() - start, note if code in fine else f"exit code {code}")


def fingerprint(environment: Environment) -> str:
    """Changes with everything that an environment is made from: interpreter, checkout, requirements, entry points."""
    import tomllib  # Python 3.11; checked in main

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    made_from = {
        "python": [sys.version, sys.base_prefix],
        "root": str(ROOT),
        "requirements": environment.installs,
        "pyproject": [project["build-system"], project["project"], project["tool"]["setuptools"]],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(environment: Environment, folder: Path) -> Step | None:
    """Make the environment, or return ``None`` where a finished one with the same fingerprint is there.

    The fingerprint is written last, so an environment that was interrupted half-way is made again.
    """
    record, wanted, python = folder / "fxpass-fingerprint", fingerprint(environment), str(python_of(folder))
    if record.is_file() and record.read_text() == wanted and Path(python).exists():
        return None
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for arguments in environment.installs:
        step = run(f"{environment.name}: install", [python, "-m", "pip", "install", *arguments])
        if not step.ok:
            return step
    record.write_text(wanted)
    return Step(f"{environment.name}: install", True, time.monotonic() - start)


def test(environment: Environment, folder: Path, arguments: list[str], *, long: bool, apart: bool) -> Step:
    """Run pytest; tests that cannot run here are deselected by marker, and the summary says so."""
    python = str(python_of(folder))
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("-m", default="")
    chosen, others = own.parse_known_args(arguments)

    cuda = subprocess.run([python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"])
    lacks = environment.lacks if cuda.returncode == 0 else (*environment.lacks, "gpu")
    lacks = lacks if long else (*lacks, "long")
    wanted = [f"({chosen.m})"] if chosen.m else []
    if environment.apart:
        wanted += [environment.apart if apart else f"not {environment.apart}"]
    markers = " and ".join([*wanted, *(f"not {marker}" for marker in lacks)])
    workers = str(min((os.cpu_count() or 1) + 1, 4))  # one more than cores: they often wait for a compiler
    return run(
        f"{environment.name}: pytest" + (f", {environment.apart}" if apart else ""),
        [python, "-m", "pytest", "-n", workers, *others, *(["-m", markers] if markers else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the workers share the cores
        note=f"deselected: tests marked {', '.join(lacks)}" if lacks else "",
        fine=(0, NOTHING_COLLECTED) if environment.apart else (0,),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=[e.name for e in ENVIRONMENTS], help="only this environment")
    parser.add_argument("--long", action="store_true", help="also tests of further variants, marked long")
    parser.add_argument("--envs", type=Path, default=ROOT / ".envs", metavar="DIR", help="where environments are kept")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        parser.error(f"the tests run on Python 3.11 or newer, and this is {sys.version.split()[0]}")

    steps: list[Step] = []
    linted = False
    for environment in ENVIRONMENTS:
        if arguments.env not in (None, environment.name):
            continue
        folder = arguments.envs.resolve() / environment.name
        prepared = prepare(environment, folder)
        if prepared:
            steps.append(prepared)
            if not prepared.ok:
                continue
        if not linted:
            python = str(python_of(folder))
            steps.append(run("ruff", [python, "-m", "ruff", "check", "."]))
            steps.append(run("mypy", [python, "-m", "mypy"]))
            linted = True
        for apart in (False, True) if environment.apart else (False,):
            steps.append(test(environment, folder, arguments.pytest, long=arguments.long, apart=apart))

    print("\n== summary")
    for step in steps:
        print(f"{'ok' if step.ok else 'FAILED':7}{step.name:24}{step.seconds:7.0f} s  {step.note}".rstrip())
    return 0 if all(step.ok for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
