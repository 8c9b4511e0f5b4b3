"""The result of ``optimize``: a drop-in for the original model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from . import package
from .derivatives import Derivatives
from .errors import UsageError
from .ir.program import Program
from .lowering import Lowered
from .report import Report
from .targets.ase import calculator
from .targets.base import ManifestRow, manifest

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

    from .frontends.base import Frontend
    from .targets.base import Target

Rebuild = Callable[[torch.dtype, torch.device], "Optimized"]

#: warning of a model that was loaded without help of the lowered program of its file
LOWERED_ANEW = (
    "this file holds no program that was lowered by this fxpass with this torch, so it was lowered anew, which takes "
    "time at every load; save it again"
)


class Optimized(nn.Module):
    """An optimised model: call it as the original, with the original's arguments and outputs.

    Attributes:
        lowered: what ``program`` was lowered to, after the passes of the target; a file without it is slower to load.
        report: what every pass did, timings, and the receipt.
        interface: the family's own ``forward`` over the lowered programs.
        frontend: the family.
        target: what the program was lowered to.
        facts: what the family's drop-in knows of the model (species, cutoff in Angstrom, heads, ...).

    Other attributes are the interface's, so code that reads ``model.r_max`` goes on working.
    """

    def __init__(
        self,
        interface: nn.Module,
        program: Program,
        report: Report,
        frontend: Frontend,
        target: Target,
        facts: dict[str, Any],
        rebuild: Rebuild | None,
        *,
        lowered: Lowered | None = None,
        check: Callable[[Program], None] | None = None,
    ) -> None:
        super().__init__()
        self.interface = interface
        self._program, self._check = program, check
        self.lowered = lowered
        self.report = report
        self.frontend = frontend
        self.target = target
        self.facts = facts
        self.rebuild = rebuild
        self.forward = interface.forward  # the original's signature, for people and for inspect
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("interface"), name)

    @property
    def program(self) -> Program:
        """The optimised program, before it was lowered to the target.

        Raises:
            PackageError: the model was loaded from a file whose program is damaged; only what runs is verified then.
        """
        if self._check is not None:
            self._check(self._program)
            self._check = None
        return self._program

    @property
    def graph_module(self) -> fx.GraphModule:
        """The optimised graph with its semantic ops, to look at and to run (canonical inputs, see ``program``)."""
        return self.program.graph_module

    @property
    def manifest(self) -> tuple[ManifestRow, ...]:
        """What runs each semantic op of the lowered programs: a kernel, or its reference and why."""
        return manifest(self.interface)

    @property
    def kernels(self) -> dict[str, str]:
        """Source of every generated kernel, by name."""
        found = (getattr(module, "sources", {}) for module in self.interface.modules())
        return {name: text for sources in found for name, text in sources.items()}

    def calculator(self, *, head: str | None = None, skin: float = 0.5) -> Calculator:
        """An ASE calculator with energy, free_energy, forces and, for periodic cells, stress.

        Args:
            head: the head to evaluate, of a multi-head model.
            skin: Angstrom; pairs of atoms are listed anew only where an atom has moved further than half of it
                (:class:`fxpass.structures.VerletList`).  Results do not depend on it, in any bit.

        Raises:
            MissingExtraError: ASE is not installed.
            UsageError: a skin that is no length.
        """
        return calculator(partial(self.frontend.evaluate, self), self.facts["cutoff"], head=head, skin=skin)

    def derivatives(self, *, dtype: torch.dtype | None = None, memory: int = 2**30) -> Derivatives:
        """Stress, virials, Hessians, elastic constants, Jacobians and more: :class:`fxpass.derivatives.Derivatives`.

        Keep what this returns: each kind of derivative is traced once for it.

        Args:
            dtype: to compute derivatives in; that of the model if None.
            memory: bytes that may be kept of a structure between directions of a Hessian.

        Raises:
            UsageError: the memory is negative, or the type is none to compute in.
        """
        return Derivatives(self.program, self.frontend, self.facts, dtype=dtype, memory=memory)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model to ``path``: a data-only package, or a TorchScript file for that target.

        Raises:
            UsageError: the file exists (and ``overwrite`` is not given) or cannot be written.
        """
        script = self.target.portable(self.interface)
        lowered = self.lowered if script is None else None
        warnings = tuple(warning for warning in self.report.warnings if warning != LOWERED_ANEW)
        report = replace(self.report, warnings=warnings)
        saved = package.Saved(self._program, self.frontend.name, self.facts, report, lowered, script)
        package.save(saved, Path(path), overwrite=overwrite)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Optimized:
        """Moves and casts: another dtype or device is another program, so it is built again, not converted."""
        own = next(s.dtype for s in self._program.inputs if s.dtype.is_floating_point)
        here = next((t.device for t in self.interface.buffers()), torch.device("cpu"))
        probe = fn(torch.zeros((), dtype=own, device=here))
        if probe.dtype == own and probe.device == here:
            return self
        if self.rebuild is None:
            raise UsageError(
                f"this model was loaded from a file made for {own} on {here}, and cannot become {probe.dtype} there",
                hint="optimise the original checkpoint in that dtype and save it again",
            )
        self._become(self.rebuild(probe.dtype, probe.device))
        return self

    def _become(self, new: Optimized) -> None:
        self.interface, self.forward = new.interface, new.interface.forward
        self._program, self._check, self.lowered = new._program, new._check, new.lowered
        self.report, self.facts = new.report, new.facts
