"""What gets installed: the wheel, the entry points, and what a checkout without them says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from conftest import ROOT, FreshEnvironment

pytestmark = pytest.mark.once

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUPS: dict[str, dict[str, str]] = PROJECT["entry-points"]


def test_wheel_holds_both_packages_and_nothing_else(fxpass_wheel: Path) -> None:
    roots = {"fxpass": ROOT, "fxpass_passes": ROOT / "passes"}
    wanted = {
        path.relative_to(parent).as_posix()
        for package, parent in roots.items()
        for path in (parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with ZipFile(fxpass_wheel) as archive:
        held = set(archive.namelist())
    metadata = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    assert held - metadata == wanted
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_wheel_works_on_its_own(fxpass_wheel: Path, fresh_environment: FreshEnvironment) -> None:
    """From the wheel, far from the checkout, the command lists every shipped pass with fxpass as provider."""
    fresh_environment.install(fxpass_wheel)
    where = fresh_environment.run("python", "-c", "import fxpass, fxpass_passes; print(fxpass.__file__)")
    assert str(fresh_environment.folder) in where.stdout, where.stderr
    done = fresh_environment.run("fxpass", "passes", "--json")
    assert done.returncode == 0, done.stderr
    providers = {entry["name"]: entry["provider"] for entry in json.loads(done.stdout)["passes"]}
    assert set(GROUPS["fxpass.passes"]) <= set(providers)
    assert {providers[name].split()[0] for name in GROUPS["fxpass.passes"]} == {"fxpass"}


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_installed_entry_points_are_the_declared_ones(group: str) -> None:
    """Fails after an entry point was added until ``pip install -e .`` (or ``run_tests.py``) has run again."""
    installed = {e.name: e.value for e in entry_points(group=group) if e.dist and e.dist.name == "fxpass"}
    assert installed == GROUPS[group]


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in sorted(GROUPS) for name in GROUPS[group]])
def test_every_entry_point_loads(group: str, name: str) -> None:
    (entry,) = entry_points(group=group, name=name)
    loaded = entry.load()
    if group == "fxpass.passes":
        assert loaded.name == name


def test_a_bare_checkout_says_so(tmp_path: Path) -> None:
    """Sources on the path, nothing installed: no entry points, so no passes, and an error instead of an empty list."""
    for package in ("fxpass", "passes"):
        shutil.copytree(ROOT / package, tmp_path / "checkout" / package)
    packages = tmp_path / "site-packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "fxpass" not in path.name:
            (packages / path.name).symlink_to(path)
    search = [tmp_path / "checkout", tmp_path / "checkout" / "passes", packages]
    code = "import sys; from fxpass.cli import main; sys.argv = ['fxpass', 'passes']; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: no site-packages but those on PYTHONPATH
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
