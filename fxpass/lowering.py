"""From a program to a module that runs: fit for a target, lowered, inside the interface of its family."""

from __future__ import annotations

from collections.abc import Mapping
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
