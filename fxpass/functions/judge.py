"""What a compiled module is held against: the original, on its example and on inputs drawn like it at other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

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
from ..verify.tolerances import OWN_ERROR_FACTOR
from .example import Example
from .optimized import lower_function
from .rounding import Run, is_inexact, scales

#: relative to the terms that an element is made of: room for another order of summation, none for another constant
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5}
#: of modules that were made in float32 and converted: e3nn rounds some of its constants to float32, and others not
ROUNDED = 1e-6
#: what the norm of a gradient may be off by in the dtype of the module, where rounding moves results over kinks
SLOPES = {torch.float32: 1e-3}
#: half precision is told from the original's own error alone
COARSE = 2e-2
#: types that a program in float64 does without, and the original in float64 may not
_HALF = (torch.float16, torch.bfloat16)

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

    def bound(self, dtype: torch.dtype) -> float:
        """How far elements of results of ``dtype`` may be off, relative to the terms that they are made of."""
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
        sloped, refused = self._sloped()
        probes = [Probe("example", self.example.tensors, sloped)]
        for seed, (name, sizes) in enumerate(wanted, start=1):
            tensors = tuple(self.example.drawn(sizes, seed))
            try:
                with torch.no_grad():
                    self.example.call(self.module, tensors)
            except Exception as error:  # the module is foreign code, which may raise anything
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                refused.append(f"not compared at {name}, which the module does not take: {reason}")
                continue
            probes.append(Probe(name, tensors, sloped and name == "larger"))
        if self._precise() is None:
            refused.append("compared in its own type alone, as the module does not compute the same in float64")
        return tuple(probes), tuple(refused)

    def _sloped(self) -> tuple[bool, list[str]]:
        """Whether the original has gradients that can be compared, and what the user must be told where it has none."""
        results = self.example.call(self.module, self.example.tensors)
        if not any(map(is_inexact, self.example.tensors)) or not any(map(is_inexact, results)):
            return False, []  # whole numbers have none
        try:
            found = _gradients(self.example, self.module, self.example.tensors)
        except Exception as error:  # as above
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return False, [f"gradients are not compared, as the original has none: {reason}"]
        return bool(found), [] if found else [
            "gradients are not compared, as the original has none: its results are cut from its inputs"
        ]

    def receipt(self, interface: nn.Module, program: Program, probes: Sequence[Probe]) -> Receipt:
        """Compare values, gradients by the inputs and, where the module has irreps, symmetry.

        Every element has a limit of its own.  It scales with the size of the terms that the element is made of, which
        is how far noise in all that the original computes moves it (:mod:`fxpass.functions.rounding`): fill values
        such as -1e9 hide nothing, and sums whose terms cancel raise no alarm.  An element may be as far from the
        original in float64 as the table says, or twice as far as the original in its own dtype is.  Gradients are those
        of a sum of the results with random factors; they are tested in float64, where no rounding moves a result over
        a kink, and through ``interface`` itself by the norm of each.
        """
        reference = self._precise()
        exact = self.dtype == torch.float64
        wide = self.example.cast(torch.float64)
        twin: nn.Module | None = interface
        if not exact:
            twin = lower_function(program.cast(torch.float64), self.eager, self.facts) if reference else None
        mixed = not exact and self.dtype not in _HALF and any(_type(node) in _HALF for node in program.graph.nodes)
        rows: list[Row] = []
        for probe in probes:
            original, example, given = self.module, self.example, probe.tensors
            if reference is not None:
                original, example, given = reference, wide, tuple(map(_wide, probe.tensors))
            with torch.no_grad():
                own = self.example.call(self.module, probe.tensors)
                right = example.call(original, given)
                try:
                    found = self.example.call(interface, probe.tensors)
                except _FAILURES as error:
                    rows.append(_lost("values", probe, error))
                    continue
                sizes, remark = _sizes(example.call, original, given)
                row = self._values(probe, found, right, own, sizes)
                rows.append(replace(row, note=row.note + remark))
            if not probe.differentiated:
                continue
            slopes = partial(_gradients, example)
            expected, (sizes, remark) = slopes(original, given), _sizes(slopes, original, given)
            if mixed:
                remark += "; not compared in float64, as some of it computes in half precision"
            elif reference is not None and twin is not None:
                row = self._slopes(probe, partial(_gradients, wide, twin, given), expected, sizes)
                rows.append(replace(row, note=row.note + remark))
            if not exact:
                row = self._norms(probe, partial(_gradients, self.example, interface, probe.tensors), sizes)
                rows.append(replace(row, note=row.note + remark))
        rows += self._symmetry(interface, probes[0])
        return Receipt(tuple(rows), self.facts["dtype"], Exactness.REASSOCIATES)

    def _precise(self) -> nn.Module | None:
        """The original in float64, or None where it computes in its own type alone, or something else in float64."""
        if self.dtype == torch.float64:
            return self.module
        given = (*self.example.tensors, *self.module.parameters(), *self.module.buffers())
        if any(t.is_complex() for t in given):  # torch converts these to real ones
            return None
        module, wide = converted(self.module, torch.float64).eval(), self.example.cast(torch.float64)
        try:
            with torch.no_grad():
                right = wide.call(module, wide.tensors)
                own = self.example.call(self.module, self.example.tensors)
        except Exception:  # as above: it may make tensors of a type of its own
            return None
        pairs = [(a, b) for a, b in zip(own, right, strict=True) if is_inexact(b)]
        return module if all(a.shape == b.shape and _alike(a, b) for a, b in pairs) else None

    def _values(
        self,
        probe: Probe,
        found: Sequence[Tensor],
        right: Sequence[Tensor],
        own: Sequence[Tensor],
        sizes: Sequence[Tensor],
    ) -> Row:
        """One row for all results: the element that is nearest to its limit."""
        rows = []
        for label, a, b, mine, size in zip(self.example.outputs, found, right, own, sizes, strict=True):
            if a.shape != mine.shape or a.dtype != mine.dtype:
                note = f"{label} is {list(a.shape)} of {a.dtype}, not {list(mine.shape)} of {mine.dtype}"
                return Row("values", probe.name, math.nan, 0.0, "", note)
            if a.is_floating_point() or a.is_complex():
                rows.append(_worst("values", probe, label, a, b, size, self.bound(a.dtype), a.dtype, _gaps(mine, b)))
            else:
                rows.append(Row("values", probe.name, float((a != mine).sum()), 0.0, "elements", label))
        return _nearest(rows)

    def _slopes(
        self, probe: Probe, compute: Callable[[], list[Tensor]], right: Sequence[Tensor], sizes: Sequence[Tensor]
    ) -> Row:
        """One row for all gradients in float64, as for values."""
        check = "gradient in float64"
        try:
            found = compute()
        except _FAILURES as error:
            return _lost(check, probe, error)
        if len(found) != len(right):
            return Row(check, probe.name, math.nan, 0.0, "", "the result has no gradient")
        labels = [spec.name for spec, t in zip(self.example.specs, self.example.tensors, strict=True) if is_inexact(t)]
        bound = self.bound(self.dtype)  # of which the constants may be rounded
        rows = [
            _worst(check, probe, f"by {label}", a, b, size, bound, self.dtype)
            for label, a, b, size in zip(labels, found, right, sizes, strict=True)
        ]
        return _nearest(rows)

    def _norms(self, probe: Probe, compute: Callable[[], list[Tensor]], sizes: Sequence[Tensor]) -> Row:
        """One row for all gradients in the dtype of the module: the norm of a difference, relative to its terms."""
        check, limit = "gradient", SLOPES.get(self.dtype, COARSE)
        try:
            found = compute()
        except _FAILURES as error:
            return _lost(check, probe, error)
        right = _gradients(self.example, self.module, probe.tensors)
        if len(found) != len(right):
            return Row(check, probe.name, math.nan, limit, "", "the result has no gradient")
        shares = [0.0]
        for a, b, size in zip(found, right, sizes, strict=True):
            gap, scale = _norm(_gaps(a, b)), _norm(size)
            shares.append(gap / scale if scale else gap)
        # max of Python passes over NaN
        return Row(check, probe.name, float(torch.tensor(shares).max()), limit, "", "relative to the norm of its terms")

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
            with torch.no_grad():
                here, there = (_sizes(self.example.call, self.module, at)[0] for at in (probe.tensors, turned))
            sizes = [a + _turned(b, rep, matrix, largest=True) for a, b, rep in zip(there, here, out, strict=True)]

            def worst(
                module: nn.Module,
                at: Sequence[Tensor] = turned,
                by: Tensor = matrix,
                name: str = name,
                sizes: Sequence[Tensor] = sizes,
            ) -> Row:
                with torch.no_grad():
                    here, there = self.example.call(module, probe.tensors), self.example.call(module, at)
                expected = [_turned(x, rep, by) for x, rep in zip(here, out, strict=True)]
                bound, labels = self.bound(self.dtype), self.example.outputs
                given = zip(labels, there, expected, sizes, strict=True)
                rows = [_worst(name, probe, label, a, b, size, bound, a.dtype) for label, a, b, size in given]
                return _nearest(rows)

            row = worst(interface)
            if not row.passed:  # a module that breaks a symmetry may go on breaking it
                row = replace(row, limit=row.limit * max(1.0, OWN_ERROR_FACTOR * worst(self.module).used))
            rows.append(row)
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
        if all(row.check.startswith("gradient") for row in receipt.failures):
            hint = "x.detach() in forward in place of torch.no_grad, which no program records; the pipeline without it"
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


def _turned(x: Tensor, irreps: str | None, matrix: Tensor, *, largest: bool = False) -> Tensor:
    """``x`` under a rotation or the inversion, or the ``largest`` that elements of sizes ``x`` may be after it."""
    if irreps is None:
        return x
    turn = o3().Irreps(irreps).D_from_matrix(matrix).double()
    return (x.double() @ (turn.abs() if largest else turn).T).to(x.dtype)


def _type(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _norm(x: Tensor) -> float:
    return float(x.double().square().sum().sqrt())


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Differences; elements that are the same on both sides, infinite or NaN, do not differ."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())


def _sizes(run: Run, module: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], str]:
    """Sizes of terms, and what a row must say where they are none: the largest element stands for them."""
    try:
        return scales(run, module, inputs), ""
    except Exception as error:  # the module is foreign code, which may refuse noise
        found = [t.detach().abs() for t in run(module, inputs)]
        largest = [torch.where(t.isfinite(), t, 0.0).max() if t.numel() else 0.0 for t in found]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sizes = [torch.zeros_like(t, dtype=torch.float64) + most for t, most in zip(found, largest, strict=True)]
        return sizes, f"; held to the largest element, as the original does not run with noise: {reason}"


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether most elements differ by no more than half precision may."""
    sizes = b.abs().double()
    shares = (_gaps(a, b) / sizes)[(sizes > 0) & sizes.isfinite()]
    return not shares.numel() or float(shares.median()) < 0.1


def _worst(
    check: str,
    probe: Probe,
    label: str,
    found: Tensor,
    right: Tensor,
    sizes: Tensor,
    bound: float,
    dtype: torch.dtype,
    own: Tensor | None = None,
) -> Row:
    """The element nearest to its limit.

    Args:
        found: the result.
        right: what it should be.
        sizes: of the terms that each element is made of.
        bound: relative to that size.
        dtype: of the result.
        own: errors of the original in that dtype.  Elements other than the same may have them too.
    """
    if not found.numel():
        return Row(check, probe.name, 0.0, 0.0, "", label)
    gaps, sizes = _gaps(found, right).reshape(-1), sizes.detach().reshape(-1).double()
    tiny = torch.finfo(dtype).tiny
    limits = (bound * sizes).clamp(min=tiny)
    note = label
    if own is not None:
        own = own.reshape(-1)
        shares = (own / sizes)[(sizes > 0) & (own > tiny)]
        share = float(shares.kthvalue(math.ceil(0.99 * shares.numel())).values) if shares.numel() else 0.0
        limits = torch.maximum(limits, OWN_ERROR_FACTOR * torch.maximum(own, share * sizes))
    worst = int((gaps / limits).nan_to_num(nan=math.inf).argmax())
    note += f"[{worst}] of terms of size {float(sizes[worst]):.1e}"
    if own is not None:
        note += f"; original {float(own[worst]):.1e}"
    lost = int((limits >= right.detach().abs().reshape(-1).nan_to_num(posinf=0.0).max()).sum())
    if lost and bool(sizes.any()):
        note += f"; {lost} of {len(limits)} elements are rounding alone in the original"
    return Row(check, probe.name, float(gaps[worst]), float(limits[worst]), "", note)


def _nearest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: (not row.passed, row.used if row.limit else 0.0))


def _lost(check: str, probe: Probe, error: Exception) -> Row:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return Row(check, probe.name, math.nan, 0.0, "", f"could not be computed: {reason}")


def _gradients(example: Example, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of a weighted sum of the results by every floating or complex input; empty where there are none.

    Those of complex results are of both parts, with factors of their own.

    Raises:
        RuntimeError: an op has no derivative.
    """
    leaves = [t.detach().clone() for t in tensors]
    by = [leaf.requires_grad_() for leaf in leaves if is_inexact(leaf)]
    with torch.enable_grad():
        generator = torch.Generator().manual_seed(7)
        terms = []
        for result in example.call(module, leaves):
            parts = (result.real, result.imag) if result.is_complex() else (result,)
            for part in parts if is_inexact(result) else ():
                factors = torch.randn(part.shape, generator=generator, dtype=torch.float64)
                if part.requires_grad:
                    terms.append((part * factors.to(part.dtype)).sum())
        return list(torch.autograd.grad(terms, by, materialize_grads=True)) if terms and by else []
