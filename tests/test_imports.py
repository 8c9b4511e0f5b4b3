"""Imports run one way (docs/architecture.md), and stay within what is public.

The imports are read from the syntax trees, so those inside functions and under ``TYPE_CHECKING`` count.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room imports from the rows above its own; within a row imports must not form a circle.
ORDER = (
    {"errors", "_torch_compat"},
    {"algebra", "edges", "neighbours"},
    {"ir"},
    {"rewrite", "passes", "kernels"},
    {"registry", "pipeline", "structures", "models"},
    {"capture"},
    {"runner", "verify", "instruments"},
    {"report"},
    {"render", "frontends", "targets", "jit"},
    {"package", "calibration", "lowering", "judge", "derivatives"},
    {"optimized"},
    {"committee", "functions", "opening"},
    {"compilation", "subjects", "loading"},
    {"api"},
    {"cli", "testing", "training"},
    {"fxpass", "__main__"},  # the public names, and ``python -m fxpass``
)
ROW = {room: row for row, rooms in enumerate(ORDER) for room in rooms}
# A family is known only to its frontend, a target only to its lowering: nobody else imports what entry points name.
PLUGGED = [
    f"{value.split(':')[0]}."
    for group in ("fxpass.frontends", "fxpass.targets")
    for value in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group].values()
]
# What a pass is made from. It knows no family and no target, and draws nothing.
FOR_PASSES = {
    *("errors", "edges", "algebra", "ir", "kernels", "rewrite", "passes", "registry", "pipeline", "capture", "verify")
}


@dataclass(frozen=True)
class Use:
    """One imported or referenced dotted name, and where."""

    name: str
    where: str


def sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """Dotted module name and file of every module of the package in ``folder``."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        yield ".".join(parts), path


def imports(module: str, path: Path) -> list[Use]:
    """Every name that ``module`` imports, relative imports resolved; ``from a import b`` gives ``a.b``."""
    uses = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        uses += [Use(name, f"{path}:{node.lineno}") for name in names]
    return uses


def room_of(name: str, rooms: set[str]) -> str:
    """The room of a dotted name in fxpass: ``fxpass.ir.program`` -> ``ir``; ``fxpass`` for its public names."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in rooms else "fxpass"


def backward_imports(package: Path) -> list[str]:
    """Imports of fxpass that run against ``ORDER``, that form a circle, or that reach a frontend or target."""
    modules = list(sources(package))
    rooms = {name.split(".")[1] for name, _ in modules} - {"__init__"}
    wrong = [f"{package}: place {room} in ORDER and in docs/architecture.md" for room in sorted(rooms - set(ROW))]
    edges: dict[str, set[str]] = {room: set() for room in ROW}
    for module, path in modules:
        here = room_of(module, rooms)
        for use in imports(module, path):
            if use.name.split(".")[0] == "fxpass_passes":
                wrong.append(f"{use.where}: fxpass imports {use.name}")
            if use.name.split(".")[0] != "fxpass":
                continue
            there = room_of(use.name, rooms)
            if there == here or not {here, there} <= set(ROW):
                continue
            edges[here].add(there)
            plugged = any(f"{use.name}.".startswith(name) for name in PLUGGED)
            if ROW[there] > ROW[here] or (plugged and here != "fxpass"):
                wrong.append(f"{use.where}: {here} imports {use.name}")
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as circle:
        wrong.append(f"{package}: rooms import one another in a circle: {' -> '.join(circle.args[1])}")
    return wrong


def foreign_to_passes(package: Path) -> list[str]:
    """Imports of the shipped passes that a stranger's pass could not or should not make."""
    rooms = FOR_PASSES | set(ROW)
    return [
        f"{use.where}: a pass imports {use.name}"
        for module, path in sources(package)
        for use in imports(module, path)
        if use.name.split(".")[0] == "fxpass"
        and (
            room_of(use.name, rooms) not in FOR_PASSES | {"fxpass"}
            or any(part.startswith("_") for part in use.name.split("."))
        )
    ]


def private_torch(module: str, path: Path) -> list[str]:
    """Names of torch in ``path`` that are private or experimental, imported or reached through attributes."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    uses = imports(module, path)
    bound = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        chain, value = [], node
        while isinstance(value, ast.Attribute):
            chain.append(value.attr)
            value = value.value
        if chain and isinstance(value, ast.Name) and value.id in bound:
            uses.append(Use(".".join([bound[value.id], *reversed(chain)]), f"{path}:{value.lineno}"))
    private = re.compile(r"torch\.(?!ops\.)(?:.*\.)?_(?!_)|torch\.fx\.experimental(?:\.|$)")
    return [f"{use.where}: {use.name}" for use in uses if private.match(use.name)]


def test_fxpass_imports_one_way() -> None:
    wrong = backward_imports(ROOT / "fxpass")
    assert not wrong, "\n".join(wrong)


def test_the_order_is_the_documented_one() -> None:
    text = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    found = re.search(r"Imports run one way: `([^`]+)`", text)
    assert found is not None
    documented = [row.strip().split(", ") for row in found[1].split("<-")]
    rows = [{ROW[room] for room in row} for row in documented]
    assert all(len(row) == 1 for row in rows)
    places = [row.pop() for row in rows]
    assert places == sorted(set(places))


def test_shipped_passes_use_only_what_a_plugin_may_use() -> None:
    wrong = foreign_to_passes(ROOT / "passes" / "fxpass_passes")
    assert not wrong, "\n".join(wrong)


def test_private_torch_only_in_torch_compat() -> None:
    modules = [
        *sources(ROOT / "fxpass"),
        *sources(ROOT / "passes" / "fxpass_passes"),
        *sources(ROOT / "examples"),
        *sources(ROOT / "benchmarks"),
    ]
    assert len(modules) > 10
    wrong = [use for name, path in modules if name != "fxpass._torch_compat" for use in private_torch(name, path)]
    assert not wrong, "\n".join(wrong)


# The checks above find what they look for.


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"ir/a.py": "from ..api import optimize"}, "ir imports fxpass.api.optimize"),
        ({"ir/a.py": "def f():\n    import fxpass.cli.main"}, "ir imports fxpass.cli.main"),
        ({"runner.py": "from . import render"}, "runner imports fxpass.render"),
        ({"errors.py": "from fxpass import optimize"}, "errors imports fxpass.optimize"),
        ({"api.py": "import fxpass_passes.presets"}, "fxpass imports fxpass_passes.presets"),
        ({"api.py": "from .frontends import mace"}, "api imports fxpass.frontends.mace"),
        ({"api.py": "from .frontends.mace import X"}, "api imports fxpass.frontends.mace.X"),
        ({"passes.py": "from .rewrite import Rule", "rewrite/a.py": "from ..passes import Pass"}, "in a circle"),
        ({"attic.py": ""}, "place attic in ORDER"),
    ],
)
def test_a_backward_import_is_found(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    rooms = {"ir/__init__.py": "", "api.py": "", "cli/main.py": "", "render/__init__.py": "", "frontends/mace.py": ""}
    wrong = backward_imports(write(tmp_path / "fxpass", rooms | files))
    assert any(complaint in line for line in wrong), wrong


def test_a_forward_import_is_not_held_against_anyone(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .api import optimize",
        "api.py": "from .frontends import Frontend\nfrom .ir.program import Program",
        "frontends/base.py": "from ..runner import Report",
        "runner.py": "",
        "frontends/__init__.py": "from .base import Frontend",
        "verify/a.py": "from ..ir.program import Program",
        "render/a.py": "from ..verify.a import Receipt",
        "cli/a.py": "from ..frontends.base import Frontend",
        "frontends/mace.py": "from . import Frontend\nfrom .plain import helper",
        "frontends/plain.py": "import torch",
        "ir/program.py": "from .. import errors",
        "errors.py": "",
    }
    assert backward_imports(write(tmp_path / "fxpass", files)) == []


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("from fxpass.ir.program import Program", True),
        ("from fxpass import Pass", True),
        ("from fxpass import _torch_compat", False),
        ("from fxpass._torch_compat import retrace", False),
        ("from fxpass.ir.program import _flat", False),
        ("from fxpass.frontends import Frontend", False),
        ("from fxpass import cli", False),
    ],
)
def test_what_a_pass_may_import(tmp_path: Path, line: str, allowed: bool) -> None:
    assert (foreign_to_passes(write(tmp_path / "fxpass_passes", {"a.py": line})) == []) is allowed


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("import torch\ntorch.ops.aten._to_copy.default", False),
        ("import torch\ntorch.__version__", False),
        ("from torch import fx\nfx.Graph()", False),
        ("import torch._subclasses", True),
        ("from torch import _C", True),
        ("from torch.fx.experimental.proxy_tensor import make_fx", True),
        ("import torch\ntorch._C._jit_flush()", True),
        ("from torch import fx\nfx._symbolic_trace", True),
        ("import torch.fx as tfx\ntfx.experimental.symbolic_shapes", True),
    ],
)
def test_a_private_name_of_torch_is_found(tmp_path: Path, text: str, private: bool) -> None:
    path = write(tmp_path, {"a.py": text}) / "a.py"
    assert bool(private_torch("a", path)) is private


def test_import_is_light() -> None:
    """``import fxpass`` loads no optional package, no compiler and no test tool."""
    theirs = "import sys, torch._dynamo; theirs = set(sys.modules)"  # torch looks for triton by importing it
    code = f"{theirs}; import fxpass; fxpass.optimize; print(*{{n.split('.')[0] for n in set(sys.modules) - theirs}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"ase", "mace", "nequip", "sevenn", "schnetpack", "deepmd", "triton", "pytest", "fxpass_passes"}
    assert heavy & set(done.stdout.split()) == set()
