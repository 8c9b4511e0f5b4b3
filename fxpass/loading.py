"""From what a file holds to the drop-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .errors import PackageError, PassError
from .frontends.base import Frontend
from .functions import FAMILY, OptimizedFunction, lower_function
from .ir.program import Program
from .ir.verifier import verify
from .lowering import Lowered, fingerprint, legal, lower
from .optimized import LOWERED_ANEW, Optimized
from .package import Saved
from .registry import Registry, default_registry
from .targets.base import Target


def assemble(saved: Saved, path: Path) -> Optimized:
    """The drop-in of what was read from ``path``.

    What runs is verified here: the lowered program of the file, where this fxpass would lower to the same, or what the
    program is lowered to anew, which the report then says.  The program itself is verified when it is asked for.

    Raises:
        PackageError: the file is damaged.
        LoweringError: the target cannot carry the program here.
    """
    registry = default_registry()
    backend: Target = registry.target(saved.report.target)()
    function = saved.program.stage == "function"
    family: Frontend = FAMILY if function else registry.frontend(saved.family)()  # type: ignore[assignment]
    report, lowered, interface = saved.report, None, saved.script
    if interface is None:
        with _reading(path):
            lowered = _lowered(saved, backend, registry)
            interface = _drop_in(saved, lowered.program, backend, family)
        if lowered is not saved.lowered:
            report = replace(report, warnings=(*report.warnings, LOWERED_ANEW))
    made = OptimizedFunction if function else Optimized
    check = partial(_verified, path=path)
    return made(interface, saved.program, report, family, backend, saved.facts, None, lowered=lowered, check=check)


def _lowered(saved: Saved, backend: Target, registry: Registry) -> Lowered:
    """What the file holds, if the same would be made here; verified."""
    kept, made_by = saved.lowered, fingerprint(backend, registry)
    if kept is not None and kept.made_by == made_by:
        verify(kept.program)
        return kept
    verify(saved.program)
    return Lowered(legal(saved.program, backend, registry).program, made_by)


def _drop_in(saved: Saved, program: Program, backend: Target, family: Frontend) -> nn.Module:
    if saved.program.stage == "function":
        return lower_function(program, backend, saved.facts)
    return lower(program, backend, family, saved.facts)


def _verified(program: Program, path: Path) -> None:
    with _reading(path):
        verify(program)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What does not verify is the file's fault: it verified when it was saved."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except PassError as error:
        what = f"{path} is damaged: {error.what}"
        raise PackageError(what, where=error.where, hint="save the model again") from error
