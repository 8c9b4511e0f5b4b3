"""``fxpass doctor``: is this installation fit for work?"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from rich.table import Table
from rich.text import Text

from .._torch_compat import TESTED_E3NN, TESTED_TORCH, o3
from ..errors import KernelError, UsageError
from ..kernels.build import find_compiler, try_compiler
from ..registry import FRONTENDS, PASSES, PRESETS, TARGETS, Registry, default_registry
from .answer import Answer
from .options import Commands

EXAMPLES = """
fxpass doctor
fxpass doctor --json
"""

OLDEST_PYTHON = (3, 10)
COMPILERS = ("g++", "c++", "clang++")
STYLES = {"ok": "green", "note": "yellow", "FAILED": "bold red"}


@dataclass(frozen=True)
class Check:
    """One line: ``state`` is ``"ok"``, ``"note"`` (something optional is not there) or ``"FAILED"``."""

    name: str
    state: str
    found: str
    hint: str = ""


def add_to(commands: Commands) -> None:
    """Add the command of this file."""
    commands.add(
        "doctor",
        doctor,
        "check the installation: versions, optional packages, plugins, compiler, threads",
        more="Exits with 1 if something essential is off.",
        examples=EXAMPLES,
    )


def doctor(arguments: argparse.Namespace) -> Answer:
    checks = [*_versions(), *_extras(), *_plugins(), _compiler(), _threads()]
    failed = [check.name for check in checks if check.state == "FAILED"]
    table = Table.grid(padding=(0, 2))
    for check in checks:
        hint = f"  Try: {check.hint}" if check.hint else ""
        table.add_row(Text(check.state, STYLES[check.state]), Text(check.name), Text(f"{check.found}{hint}"))
    verdict = f"Essential, and off: {', '.join(failed)}." if failed else "Everything essential is in order."
    data = {"passed": not failed, "checks": [asdict(check) for check in checks]}
    return Answer(data, (table, Text(verdict, "bold")), code=1 if failed else 0)


def _versions() -> Iterator[Check]:
    python = platform.python_version()
    old = sys.version_info < OLDEST_PYTHON
    yield Check("python", "FAILED" if old else "ok", python, "Python 3.10 or later" if old else "")
    yield _version("torch", TESTED_TORCH)
    yield _version("e3nn", TESTED_E3NN)
    try:
        o3()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        hint = f'pip install "e3nn=={TESTED_E3NN[-1]}.*"'
        yield Check("import of e3nn", "FAILED", f"{type(error).__name__}: {error}", hint)
    for name in ("numpy", "sympy", "rich"):
        yield Check(name, "ok", metadata.version(name))


def _version(name: str, tested: tuple[str, ...]) -> Check:
    """A package whose release series must be a tested one."""
    found = metadata.version(name)
    series = [".".join(version.split(".")[:2]) for version in tested]
    if ".".join(found.split(".")[:2]) in series:
        return Check(name, "ok", f"{found} (tested: {', '.join(tested)})")
    hint = f'pip install "{name}=={series[-1]}.*"'
    return Check(name, "FAILED", f"{found} is not of a tested series ({', '.join(series)})", hint)


def _extras() -> Iterator[Check]:
    """The optional packages, by extra; the pip line for those that are absent."""
    extras: dict[str, list[str]] = {}
    for requirement in (installed("fxpass") and metadata.requires("fxpass")) or []:
        if found := re.match(r"""([\w.-]+).*;.*extra == ["'](\w+)["']""", requirement):
            extras.setdefault(found[2], []).append(found[1])
    extras.pop("dev", None)
    for extra, packages in sorted(extras.items()):
        missing = [name for name in packages if installed(name) is None]
        versions = ", ".join(f"{name} {installed(name) or 'absent'}" for name in packages)
        hint = f'pip install "fxpass[{extra}]"' if missing else ""
        yield Check(f"extra {extra}", "note" if missing else "ok", versions, hint)


def installed(package: str) -> str | None:
    """Version of an installed package, ``None`` where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plugins() -> Iterator[Check]:
    """What is registered, and what of it is broken; of fxpass's own nothing may be."""
    try:
        registry = default_registry()
    except UsageError as error:
        yield Check("fxpass", "FAILED", error.what, error.hint or "")
        return
    for label, group in (("passes", PASSES), ("presets", PRESETS), ("frontends", FRONTENDS), ("targets", TARGETS)):
        yield from _registered(label, group, registry)


def _registered(label: str, group: str, registry: Registry) -> Iterator[Check]:
    listing = registry.listing(group)
    usable = [listed.entry for listed in listing if listed.problem is None]
    foreign = ", ".join(f"{entry.name} of {entry.origin}" for entry in usable if entry.provider != "fxpass")
    names = ", ".join(entry.name for entry in usable)
    yield Check(label, "ok", f"{names}; not fxpass's own: {foreign}" if foreign else names)
    for listed in listing:
        if listed.problem is not None:
            state = "FAILED" if listed.entry.provider == "fxpass" else "note"
            yield Check(f"{listed.entry.kind} {listed.entry.name}", state, listed.problem)


def _compiler() -> Check:
    """Whether a kernel can be built; the trial is made once and kept."""
    name, hint = "C++ compiler", "a package such as g++ or clang"
    paths = list(filter(None, map(shutil.which, COMPILERS)))
    if not paths:
        return Check(name, "note", "absent, the targets native and inductor need one", hint)
    try:
        found = find_compiler() or try_compiler(paths[0])  # the second says why there is none
    except KernelError as error:
        return Check(name, "note", f"none builds a kernel for the target native: {error.what}", hint)
    return Check(name, "ok", f"{found.path}, {found.version}")


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> Check:
    threads, available = torch.get_num_threads(), cores()
    found = f"{threads} on {available} cores"
    if threads > available:
        return Check("threads", "note", found, f"OMP_NUM_THREADS={available}")
    return Check("threads", "ok", found)
