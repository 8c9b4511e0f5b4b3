"""What a compiled module is held against: the original, on its example and on inputs drawn like it at other sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch_compat import o3
from ..errors import FxpassError
from ..frontends.base import converted
from ..ir.program import Program
from ..judge import blamed
from ..lowering import legal
from ..passes import Exactness, Pass
from ..registry import Registry
from ..targets.base import Target
from ..verify.physics import random_rotation
from ..verify.receipt import Receipt, Row
from ..verify.tolerances import OWN_ERROR_FACTOR, Bound
from .example import Example
from .optimized import lower_function

#: relative to the largest element of a result: room for another order of summation, none for another constant
BOUNDS = {torch.float64: Bound(1e-13, 1e-10, ""), torch.float32: Bound(1e-7, 2e-5, "")}
#: of modules that were made in float32 and converted: e3nn rounds some of its constants to float32, and others not
ROUNDED = Bound(1e-13, 1e-6, "")
#: what the norm of a gradient may be off by in the dtype of the module, where rounding moves results over kinks
SLOPES = {torch.float32: 1e-3}
#: half precision is told from the original's own error alone
COARSE = Bound(1e-3, 2e-2, "")


#: what a result raises that cannot compute; anything else is a bug and passes
_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError, FxpassError),
)


@dataclass(frozen=True)
class Probe:
    """Inputs to compare on."""

    name: str
    tensors: tuple[Tensor, ...]
    differentiated: bool = False


@dataclass(frozen=True)
class FunctionJudge:
    """What the results for one module are held against.

    Attributes:
        module: the original, in evaluation mode.
        example: its arguments.
        facts: what the drop-in knows of it.
        eager: the target that derivatives are tested on in float64.
    """

    module: nn.Module
    example: Example
    facts: Mapping[str, Any]
    eager: Target

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.facts["dtype"])
        return found

    def bound(self, dtype: torch.dtype) -> Bound:
        """How far results of ``dtype`` may be off."""
        if dtype == torch.float64 and self._rounded():
            return ROUNDED
        return BOUNDS.get(dtype if dtype.is_floating_point else dtype.to_real(), COARSE)

    def _rounded(self) -> bool:
        """Whether all numbers of a float64 module are numbers of float32."""
        values = [t.detach() for t in (*self.module.parameters(), *self.module.buffers()) if t.dtype == torch.float64]
        return bool(values) and all(torch.equal(t, t.float().double()) for t in values)

    def probes(self) -> tuple[tuple[Probe, ...], tuple[str, ...]]:
        """Inputs at several sizes, also 1 and 0 where the original takes them; and what it does not take."""
        here = self.example.sizes
        wanted = [("fresh values", here), ("larger", {name: 2 * size + 3 for name, size in here.items()})]
        wanted += [(f"{name} = {size}", {**here, name: size}) for name in here for size in (1, 0)]
        probes, refused = [Probe("example", self.example.tensors, True)], []
        for seed, (name, sizes) in enumerate(wanted, start=1):
            tensors = tuple(self.example.drawn(sizes, seed))
            try:
                with torch.no_grad():
                    self.example.call(self.module, tensors)
            except Exception as error:  # the module is foreign code, which may raise anything
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                refused.append(f"not compared at {name}, which the module does not take: {reason}")
                continue
            probes.append(Probe(name, tensors, name == "larger"))
        if self._precise() is None:
            refused.append("compared in its own type alone, as the module does not compute in float64")
        return tuple(probes), tuple(refused)

    def receipt(self, interface: nn.Module, program: Program, probes: Sequence[Probe]) -> Receipt:
        """Compare values, gradients by the inputs and, where the module has irreps, symmetry.

        Values may be as far from the original in float64 as the table says, or twice as far as the original in its own
        dtype is.  Gradients are those of a sum of the results with random factors; they are tested in float64, where no
        rounding moves a result over a kink, and through ``interface`` itself by their norm.
        """
        reference = self._precise()
        exact = self.dtype == torch.float64
        wide = self.example.cast(torch.float64)
        twin: nn.Module | None = interface
        if not exact:
            twin = lower_function(program.cast(torch.float64), self.eager, self.facts) if reference else None
        rows: list[Row] = []
        for probe in probes:
            high = [_wide(t) for t in probe.tensors]
            with torch.no_grad():
                own = self.example.call(self.module, probe.tensors)
                right = wide.call(reference, high) if reference is not None else own
                try:
                    found = self.example.call(interface, probe.tensors)
                except _FAILURES as error:
                    rows.append(Row("values", probe.name, math.nan, 0.0, "", f"could not be computed: {error}"))
                    continue
            rows.append(self._compared("values", probe.name, found, right, own))
            mine = _gradients(self.example, self.module, probe.tensors) if probe.differentiated else None
            if not mine:
                continue
            if reference is not None and twin is not None:
                given, expected = _gradients(wide, twin, high), _gradients(wide, reference, high)
                limit = self.bound(self.dtype).relative
                rows.append(_gradient_row("gradient in float64", probe.name, given, expected, limit))
            if not exact:
                given = _gradients(self.example, interface, probe.tensors)
                rows.append(_gradient_row("gradient", probe.name, given, mine, SLOPES.get(self.dtype, COARSE.relative)))
        rows += self._symmetry(interface, probes[0])
        return Receipt(tuple(rows), self.facts["dtype"], Exactness.REASSOCIATES)

    def _precise(self) -> nn.Module | None:
        """The original in float64, or None where it computes in its own type alone."""
        if self.dtype == torch.float64:
            return self.module
        module, wide = converted(self.module, torch.float64).eval(), self.example.cast(torch.float64)
        try:
            with torch.no_grad():
                wide.call(module, wide.tensors)
        except Exception:  # as above: it may make tensors of a type of its own
            return None
        return module

    def _compared(
        self, check: str, name: str, found: Sequence[Tensor], right: Sequence[Tensor], own: Sequence[Tensor]
    ) -> Row:
        """One row for all results: the one that is nearest to its limit, relative to its largest element."""
        rows = []
        for label, a, b, mine in zip(self.example.outputs, found, right, own, strict=True):
            if a.shape != mine.shape or a.dtype != mine.dtype:
                note = f"{label} is {list(a.shape)} of {a.dtype}, not {list(mine.shape)} of {mine.dtype}"
                return Row(check, name, math.nan, 0.0, "", note)
            if not (a.is_floating_point() or a.is_complex()):
                rows.append(Row(check, name, float((a != mine).sum()), 0.0, "elements", label))
                continue
            bound, scale = self.bound(a.dtype), _largest(b)
            rounding = _distance(mine, b)
            limit = max(bound.limit(scale), OWN_ERROR_FACTOR * rounding)
            rows.append(Row(check, name, _distance(a, b), limit, "", f"{label}; original {rounding:.1e}"))
        return max(rows, key=lambda row: (not row.passed, row.used if row.limit else 0.0))

    def _symmetry(self, interface: nn.Module, probe: Probe) -> list[Row]:
        """Rotation and inversion of inputs and results, where the module says by which irreps they transform."""
        irreps = irreps_of(self.module, self.example)
        if irreps is None:
            return []
        into, out = irreps
        rows = []
        rotation = torch.tensor(random_rotation(np.random.default_rng(1)))
        for name, matrix in (("rotation", rotation), ("inversion", -torch.eye(3, dtype=torch.float64))):
            turned = [_turned(t, into.get(k), matrix) for k, t in enumerate(probe.tensors)]

            def error(module: nn.Module, at: Sequence[Tensor] = turned, by: Tensor = matrix) -> tuple[float, float]:
                with torch.no_grad():
                    here, there = self.example.call(module, probe.tensors), self.example.call(module, at)
                expected = [_turned(x, rep, by) for x, rep in zip(here, out, strict=True)]
                gaps = [_distance(a, b) for a, b in zip(there, expected, strict=True)]
                return max(gaps), max(map(_largest, here))

            value, scale = error(interface)
            limit = self.bound(self.dtype).limit(scale)
            if value > limit:  # a module that breaks a symmetry may go on breaking it
                limit = max(limit, OWN_ERROR_FACTOR * error(self.module)[0])
            rows.append(Row(name, probe.name, value, limit, ""))
        return rows

    def failure(
        self, receipt: Receipt, captured: Program, passes: Sequence[Pass], probes: Sequence[Probe], registry: Registry
    ) -> FxpassError:
        """The error for a failed receipt, with the first pass after which it fails."""
        bad = {row.structure for row in receipt.failures}
        suspects = [probe for probe in probes if probe.name in bad]

        @cache
        def is_good(program: Program) -> bool:
            interface = lower_function(legal(program, self.eager, registry).program, self.eager, self.facts)
            return self.receipt(interface, program, suspects).passed

        hint = "the pipeline without it, other example_inputs, or a module without branches on sizes"
        return blamed(receipt, captured, passes, is_good, hint)


def irreps_of(module: nn.Module, example: Example) -> tuple[dict[int, str], list[str]] | None:
    """Irreps of inputs by number and of each result, as e3nn's modules tell them; None where they do not fit."""
    first: Any = getattr(module, "irreps_in", None)
    if first is None:
        first = [getattr(module, name, None) for name in ("irreps_in1", "irreps_in2")]
    listed = list(first) if type(first) in (list, tuple) else [first]
    results = list(getattr(module, "irreps_outs", None) or [getattr(module, "irreps_out", None)])
    if not all(isinstance(irreps, o3().Irreps) for irreps in (*listed, *results)):
        return None
    if len(listed) > len(example.tensors) or len(results) != len(example.outputs):
        return None
    fits = all(t.dim() > 0 and t.shape[-1] == i.dim for t, i in zip(example.tensors, listed, strict=False))
    return ({k: str(i) for k, i in enumerate(listed)}, [str(i) for i in results]) if fits else None


def _turned(x: Tensor, irreps: str | None, matrix: Tensor) -> Tensor:
    if irreps is None:
        return x
    return (x.double() @ o3().Irreps(irreps).D_from_matrix(matrix).double().T).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _largest(x: Tensor) -> float:
    finite = x.detach().abs()[x.detach().isfinite()] if x.is_floating_point() or x.is_complex() else x.detach().abs()
    return float(finite.max()) if finite.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; elements that are the same on both sides, infinite or NaN, do not differ."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    if not a.numel():
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).max())


def _gradients(example: Example, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of a weighted sum of the results by every floating input; empty where the module has none."""
    try:
        return _differentiated(example, module, tensors)
    except RuntimeError:  # an op without a derivative
        return []


def _differentiated(example: Example, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    with torch.enable_grad():
        results = [r for r in example.call(module, leaves) if r.is_floating_point() and r.requires_grad]
        if not results or not any(leaf.requires_grad for leaf in leaves):
            return []
        generator = torch.Generator().manual_seed(7)
        factors = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
        by = [leaf for leaf in leaves if leaf.requires_grad]
        total = sum((r * f).sum() for r, f in zip(results, factors, strict=True))
        return list(torch.autograd.grad(total, by, materialize_grads=True))  # type: ignore[arg-type]


def _gradient_row(check: str, name: str, found: Sequence[Tensor], right: Sequence[Tensor], relative: float) -> Row:
    """The norm of the difference, relative to that of the gradient."""
    if len(found) != len(right):
        return Row(check, name, math.nan, relative, "", "the result has no gradient")

    def norm(values: Sequence[Tensor]) -> float:
        return math.sqrt(sum(float(x.double().square().sum()) for x in values))

    gap = norm([a.double() - b.double() for a, b in zip(found, right, strict=True)])
    scale = norm(right)
    return Row(check, name, gap / scale if scale else gap, relative, "", "relative to the norm of the gradient")
