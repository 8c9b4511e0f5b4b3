"""A pass from a package of its own is as good as a shipped one: listed, explained, run by name, held by the contract.

``plugin_example/`` is built and installed as a stranger's package would be, into a fresh environment.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, FreshEnvironment, build_wheel

PLUGIN = ROOT / "tests" / "plugin_example"
NAME = "fuse-scalar-multiplies"


@pytest.fixture(scope="module")
def installed(
    fresh_environment: FreshEnvironment, fxpass_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> FreshEnvironment:
    fresh_environment.install(fxpass_wheel)
    fresh_environment.install(build_wheel(PLUGIN, tmp_path_factory.mktemp("plugin")))
    return fresh_environment


def fxpass_json(environment: FreshEnvironment, *arguments: str) -> Any:
    done = environment.run("fxpass", *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_listed_with_its_provider(installed: FreshEnvironment) -> None:
    listed = {entry["name"]: entry for entry in fxpass_json(installed, "passes")["passes"]}
    assert listed[NAME]["provider"].split()[0] == "fxpass-plugin-example"
    assert listed["dead-code"]["provider"].split()[0] == "fxpass"


def test_explained(installed: FreshEnvironment) -> None:
    done = installed.run("fxpass", "explain", NAME)
    assert done.returncode == 0, done.stderr
    assert "Merges multiplications by one number after the other into one." in done.stdout
    assert "Holds when" in done.stdout


@pytest.mark.mace
def test_runs_by_name_in_a_diff(installed: FreshEnvironment, alloy_model_path: Path) -> None:
    steps = fxpass_json(installed, "diff", str(alloy_model_path), "-p", NAME)["passes"]
    assert [step["name"] for step in steps] == [NAME]


@pytest.mark.mace
@pytest.mark.slow
def test_runs_by_name_in_optimize(installed: FreshEnvironment, alloy_model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.fxp"
    report = fxpass_json(installed, "optimize", str(alloy_model_path), "-o", str(out), "-p", f"exact,{NAME}")
    assert NAME in [step["name"] for step in report["passes"]]
    assert out.exists()


def test_held_by_the_contract(installed: FreshEnvironment, tmp_path: Path) -> None:
    """The plugin's own tests, which are what its author would write, pass against the installed wheel."""
    shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    done = installed.run("python", "-m", "pytest", "-v", "--rootdir", str(tmp_path), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_keeps_the_contract PASSED" in done.stdout


def test_comes_from_the_plugin_alone() -> None:
    """Where only fxpass is installed, as here, nothing registers the name."""
    assert entry_points(group="fxpass.passes", name="dead-code")
    assert not entry_points(group="fxpass.passes", name=NAME)
