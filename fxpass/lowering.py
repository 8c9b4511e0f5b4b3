"""From a program to a module that runs: fit for a target, lowered, inside the interface of its family."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from .frontends.base import Frontend
from .ir.ops import SEMANTIC
from .ir.program import Program
from .ir.verifier import verify
from .pipeline import resolve
from .registry import Registry
from .runner import RunResult, run
from .targets.base import Finishes, Target
from .targets.geometry import lower_both


@dataclass(frozen=True)
class Lowered:
    """What a program became for its target.

    Attributes:
        program: fit for the target.
        made_by: the :func:`fingerprint` of what made it so.
    """

    program: Program
    made_by: str


def legal(program: Program, target: Target, registry: Registry) -> RunResult:
    """``program`` made fit for ``target``.

    It is verified after each pass while it has semantic ops, and then once, at the end: in ATen it is ten times larger.
    """

    def check(program: Program) -> None:
        if any(n.target in SEMANTIC for n in program.graph.nodes):
            verify(program)

    result = run(program, resolve(target.pipeline, registry), check=check)
    verify(result.program)
    return result


def fingerprint(target: Target, registry: Registry) -> str:
    """Another one wherever :func:`legal` could make another program of the same one.

    It covers the source of fxpass, of the passes and of the target, the versions of torch and e3nn, and the target's
    pipeline, which depends on the machine.  Kernels are not in what it makes: they are found or built when it is bound.
    """
    pipeline = resolve(target.pipeline, registry)
    digest = hashlib.sha256(repr((target.name, target.pipeline)).encode())
    for package in ("torch", "e3nn"):
        digest.update(metadata.version(package).encode())
    for root in sorted({type(part).__module__.partition(".")[0] for part in (registry, target, *pipeline)}):
        digest.update(_source(root))
    return digest.hexdigest()


@cache  # of the code that was imported: what becomes of the files later does not matter
def _source(root: str) -> bytes:
    """Digest of the Python files of an imported package or module."""
    module, digest = sys.modules[root], hashlib.sha256()
    found = [sorted(Path(folder).rglob("*.py")) for folder in getattr(module, "__path__", ())]
    for path in chain(*found) if found else [Path(str(module.__file__))]:
        digest.update(path.read_bytes())
    return digest.digest()


def lower(program: Program, target: Target, frontend: Frontend, facts: Mapping[str, Any]) -> nn.Module:
    """The drop-in of a force program that is fit for ``target``: a module with the family's ``forward``.

    Args:
        facts: what ``frontend.attributes`` told about the model.

    Raises:
        LoweringError: the target cannot carry the program.
    """
    energy, forces = lower_both(program, target)
    interface = frontend.interface(energy, forces, {**facts, "assumptions": list(program.assumptions)})
    if isinstance(target, Finishes):
        target.finish(interface)
    interface.eval()
    return interface
