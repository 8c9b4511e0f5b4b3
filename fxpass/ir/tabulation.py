"""Fitting tables to functions of one number per edge, with certified error bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..algebra.piecewise import (
    SLOPE_CONSTANT,
    VALUE_CONSTANT,
    Floats,
    Grid,
    Order,
    coefficients,
)
from ..errors import Location, UsageError
from .reference import table
from .scalar_functions import NotDifferentiable, ScalarFunction

SAFETY = 1.5  # between what is sampled at 4 points a cell and what is promised everywhere
ROUNDINGS = 32  # that a value is off by, at most; a slope by as many divided by the step
DENSE = 4  # samples a cell: at 1/4, 1/2 and 3/4 both errors of either order are within 3 % of their largest value
FAR = (50.0, 100.0)  # Angstrom; what is equal at both is constant beyond some cutoff
EXTENSION = 10.0  # a coarse grid goes on to this many times the end of the fine one
FLAT = 1e-13  # relative: what counts as equal in float64
JUMP = 1e-9  # relative: what counts as continuous
SMALL = 1e-12  # relative: a derivative at the cutoff that is rounding
BESIDE = 1e-13  # relative: how far from a kink its sides are taken
KINK = 1e-6  # relative: a jump of f'' that takes a knot


class NotTabulable(UsageError):
    """A function for which there is no table; says why, with numbers."""


@dataclass(frozen=True)
class Domain:
    """Where a function is tabulated.

    Attributes:
        start, end: of the fine grid, in the unit of the variable.
        reach: end of the coarse extension, 0 where there is none.
        flat: the function is constant beyond ``end``.
        cutoff: length in Angstrom beyond which it is constant; None where it never is.
        is_length: the variable is the length of the edge.
        kink: where the second derivative jumps, which takes a knot; None where it does nowhere.
    """

    start: float
    end: float
    reach: float
    flat: bool
    cutoff: float | None
    is_length: bool
    kink: float | None = None


@dataclass(frozen=True)
class Fit:
    """Tables of one function.

    Attributes:
        grid: with the certified bounds.
        coefficients: [order + 1, tables * grid.rows, channels], float64.
        value_error, slope_error: largest error at the sampled points of the fine grid.
        value_bounds, slope_bounds: [channels], certified bounds where ``x >= used`` (see :func:`fit`).
    """

    grid: Grid
    coefficients: Tensor
    value_error: float
    slope_error: float
    value_bounds: Floats
    slope_bounds: Floats


def domain(
    function: ScalarFunction, r_min: float, r_max: float | None = None, lengths: Tensor | None = None
) -> Domain:
    """The range of the variable that a table has to cover.

    Args:
        r_min: shortest edge, Angstrom.
        r_max: longest edge; by default the cutoff, which is where the function becomes constant, or if it never
            does, the longest of ``lengths``.
        lengths: of edges met in calibration, Angstrom.

    Raises:
        NotTabulable: no end in sight, a jump at the cutoff, or values that are not finite.
    """
    probe = torch.linspace(r_min, FAR[0], 4001, dtype=torch.float64)
    with torch.no_grad():
        variable = function.of_length(probe)[: len(probe)]
    is_length = bool(torch.allclose(variable, probe, rtol=1e-9, atol=0.0))
    cutoff = _cutoff(function, r_min)
    end = r_max if r_max is not None else cutoff
    if end is None and lengths is not None and len(lengths):
        end = float(lengths.max())
    if end is None or end <= r_min:
        raise _refused(function, "it is not constant beyond any cutoff, so that its range has no end", "r_max=")
    if is_length:
        return Domain(r_min, end, 0.0, cutoff is not None and cutoff <= end, cutoff, True, _kink(function, r_min, end))
    with torch.no_grad():
        inside = function.of_length(torch.linspace(r_min, end, 4001, dtype=torch.float64))
        closest = function.of_length(torch.tensor([r_min / 10, r_min], dtype=torch.float64))
    low, high = float(inside.min()), float(inside.max())
    if not float(closest[0].abs()) > 3 * float(closest[1].abs()):
        return Domain(low, high, 0.0, False, cutoff, False)
    shortest = max(r_min, float(lengths.min())) if lengths is not None and len(lengths) else max(r_min, 1.0)
    with torch.no_grad():
        met = function.of_length(torch.linspace(shortest, end, 4001, dtype=torch.float64))
    reach = max(EXTENSION * float(met.max()), float(closest[1]))
    return Domain(float(met.min()), float(met.max()), reach, False, cutoff, False)


def _refused(function: ScalarFunction, reason: str, hint: str = "") -> NotTabulable:
    return NotTabulable(reason, where=Location(node=function.name, module_path=function.module), hint=hint or None)


def _values(function: ScalarFunction, lengths: Tensor, number: int) -> Tensor:
    """Values [n, channels] of one table at edge lengths."""
    with torch.no_grad():
        x = function.of_length(lengths)[: len(lengths)]
        return function(x, torch.full((len(x),), number, dtype=torch.int64))


def _cutoff(function: ScalarFunction, r_min: float) -> float | None:
    """Length beyond which all tables of a function are constant, ``None`` where there is none.

    Searched on samples, halved down, and then taken to be the number in the graph just above, if there is one, or
    2 % more: close to its cutoff an envelope is smaller than rounding.
    """
    lengths = torch.cat([torch.linspace(r_min, 20.0, 2000), torch.linspace(20.0, FAR[0], 301)[1:]]).double()
    found = r_min
    for number in range(function.tables):
        far = _values(function, torch.tensor(FAR, dtype=torch.float64), number)
        values = _values(function, lengths, number)
        if not bool(values.isfinite().all() and far.isfinite().all()):
            at = float(lengths[~values.isfinite().all(1)].max()) if not bool(values.isfinite().all()) else FAR[0]
            raise _refused(function, f"it is not finite at the length {at:.3g} A")
        scale = float(values.abs().max()) or 1.0

        def differs(some: Tensor, far: Tensor = far, scale: float = scale) -> Tensor:
            return (some - far[:1]).abs().amax(1) > FLAT * scale

        if bool(differs(far).any()):
            return None
        moving = differs(values)
        if not bool(moving.any()):
            continue
        last = int(moving.nonzero().max())
        if last == len(lengths) - 1:
            return None
        low, high = float(lengths[last]), float(lengths[last + 1])
        for _ in range(40):
            middle = torch.tensor([(low + high) / 2], dtype=torch.float64)
            inside = bool(differs(_values(function, middle, number)))
            low, high = (float(middle), high) if inside else (low, float(middle))
        found = max(found, high)
    near = [c for c in function.literals() if found * (1 - 1e-9) <= c <= 1.02 * found]
    return min(near) if near else 1.02 * found


def _kink(function: ScalarFunction, start: float, end: float) -> float | None:
    """The number in the graph at which f'' jumps, as it does where an envelope is switched on; None if not just one.

    ``start`` and ``end`` themselves do not count: they are knots in any case.
    """
    near = [c for c in function.literals() if start * (1 + 1e-6) < c < end * (1 - 1e-6)]
    if not near:
        return None
    sides = np.array([[c * (1 - BESIDE), c * (1 + BESIDE)] for c in near]).flatten()
    curvature = _jet(function, sides, 0)[2]
    scale = float(np.abs(_jet(function, np.linspace(start, end, 201)[:-1], 0)[2]).max())
    jumps = np.abs(curvature[1::2] - curvature[::2]).max(axis=1) > KINK * scale
    kinks = [c for c, jump in zip(near, jumps, strict=True) if jump]
    return kinks[0] if len(kinks) == 1 else None


def fit(function: ScalarFunction, where: Domain, order: Order, step: float, used: float = 0.0) -> Fit:
    """Tables with the widest step that divides the range, ``step`` at most.

    Knots are values and derivatives by automatic differentiation in float64. With M the largest |f^(order+1)| that
    differences of f'' at ``DENSE`` points a cell show, the bounds are SAFETY times the larger of the interpolation
    error formula with M and the error at those points, and rounding.

    Args:
        used: variable from which on the bounds by channel hold; those in the grid hold from its start.

    Raises:
        NotTabulable: a jump at the cutoff, no derivative, or one that is not finite.
    """
    fitted = Grid.fitted(order, where.start, where.end, step, reach=where.reach, kink=where.kink)
    grid = replace(fitted, flat=where.flat)
    x = np.linspace(grid.start, grid.end, DENSE * grid.cells + 1)
    x[-1] = grid.end - 1e-14 * abs(grid.end)  # what a comparison with the cutoff leaves inside
    before = 0 if where.kink is None else round((where.kink - grid.start) / grid.step)  # cells
    if where.kink is not None:
        x[DENSE * before] = where.kink * (1 + BESIDE)  # the right side, whatever the comparison is
    _check_derivatives(function, grid)
    used_at = np.flatnonzero(x >= used)
    first = int(used_at[0]) if len(used_at) else 0
    first = min(first, len(x) - order - 2)
    blocks, value_errors, slope_errors, sizes = [], [], [], []
    for number in range(function.tables):
        dense = _jet(function, x, number)
        knots = [d[::DENSE].copy() for d in dense]
        if grid.flat:
            _close(function, knots, number)
        if grid.coarse:
            far = _jet(function, grid.knots()[grid.cells + 1 :], number)
            knots = [np.concatenate(pair) for pair in zip(knots, far, strict=True)]
        table_rows = coefficients(grid, *knots)
        spread = np.abs(np.diff(dense[2], n=order - 1, axis=0))
        if where.kink is not None:
            beside = _jet(function, np.array([where.kink * (1 - BESIDE)]), number)
            for knot, value in zip(knots, beside, strict=True):
                knot[before] = value[0]
            table_rows[:, before] = coefficients(grid, *knots)[:, before]  # of its cell; the first row is below all
            at, width = DENSE * before, order - 1
            left = np.concatenate([dense[2][at - width : at], beside[2]])
            spread[at - width] = np.abs(np.diff(left, n=width, axis=0))[0]
            spread[at - width + 1 : at] = 0.0  # differences across the kink
        rows = torch.from_numpy(table_rows)
        points = torch.from_numpy(x)
        errors = [(table(points, None, rows, str(grid), d).numpy() - dense[d])[:-1] for d in (0, 1)]
        spread /= (grid.step / DENSE) ** (order - 1)
        blocks.append(rows)
        value_errors.append((np.abs(errors[0]), VALUE_CONSTANT[order] * grid.step ** (order + 1) * spread))
        slope_errors.append((np.abs(errors[1]), SLOPE_CONSTANT[order] * grid.step**order * spread))
        sizes.append(np.abs(dense[0]))

    def bounds(errors: list[tuple[Floats, Floats]], start: int, per: float) -> Floats:
        rounding = ROUNDINGS * np.finfo(np.float64).eps * np.max([size[start:].max(0) for size in sizes], axis=0)
        found = np.max([np.maximum(a[start:].max(0), b[start:].max(0)) for a, b in errors], axis=0)
        return np.asarray(SAFETY * found + rounding / per)

    certified = replace(
        grid,
        value_bound=float(bounds(value_errors, 0, 1.0).max()),
        slope_bound=float(bounds(slope_errors, 0, grid.step).max()),
    )
    return Fit(
        certified,
        torch.cat(blocks, dim=1),
        float(max(a.max() for a, _ in value_errors)),
        float(max(a.max() for a, _ in slope_errors)),
        bounds(value_errors, first, 1.0),
        bounds(slope_errors, first, grid.step),
    )


def _jet(function: ScalarFunction, x: Floats, number: int) -> list[Floats]:
    """f, f' and f'' of one table, each [n, channels]."""
    points = torch.from_numpy(np.ascontiguousarray(x))
    try:
        found = function.jet(points, torch.full((len(points),), number, dtype=torch.int64), 2)
    except NotDifferentiable as error:
        raise _refused(function, error.what) from error
    for name, values in zip(("value", "first derivative", "second derivative"), found, strict=True):
        if not bool(values.isfinite().all()):
            at = float(points[~values.isfinite().all(1)].max())
            raise _refused(function, f"its {name} is not finite at {at:.4g}")
    return [values.numpy() for values in found]


def _check_derivatives(function: ScalarFunction, grid: Grid) -> None:
    """Compare derivatives with differences at a few points, since an op may have none, or a wrong one.

    Raises:
        NotTabulable: f' is not the derivative of f, or f'' not that of f'.
    """
    x = grid.start + (grid.end - grid.start) * np.array([0.137, 0.419, 0.533, 0.761, 0.883])
    h = 1e-5 * (grid.end - grid.start)
    low, here, high = (_jet(function, x + shift, 0) for shift in (-h, 0.0, h))
    for order in (1, 2):
        difference = (high[order - 1] - low[order - 1]) / (2 * h)
        scale = np.abs(here[order]).max() + np.abs(here[order - 1]).max() / (grid.end - grid.start)
        wrong = np.median(np.abs(difference - here[order]).max(1))  # a kink may be near one of the points
        if wrong > 1e-3 * scale:
            raise _refused(function, f"autograd's derivative {order} is off by {wrong:.1e} from differences")


def _close(function: ScalarFunction, knots: list[Floats], number: int) -> None:
    """Make the last knot join the constant beyond it, exactly; in place.

    Raises:
        NotTabulable: there is a jump.
    """
    beyond = _values(function, torch.tensor(FAR[:1], dtype=torch.float64), number).numpy()[0]
    scale = float(np.abs(knots[0]).max()) or 1.0
    jump = float(np.abs(knots[0][-1] - beyond).max())
    if jump > JUMP * scale:
        raise _refused(function, f"it jumps by {jump:.2e} at its cutoff, of values up to {scale:.2e}")
    knots[0][-1] = beyond
    for derivative in knots[1:]:
        small = np.abs(derivative[-1]) <= SMALL * (np.abs(derivative).max(0) + 1e-300)
        derivative[-1] = np.where(small, 0.0, derivative[-1])


def check(function: ScalarFunction, found: Fit, points: int, seed: int = 0) -> tuple[float, float]:
    """Largest error of value and slope at random points of the fine grid, over all tables and channels."""
    grid = found.grid
    generator = torch.Generator().manual_seed(seed)
    worst = (0.0, 0.0)
    for start in range(0, points, 8192):
        count = min(8192, points - start)
        x = torch.rand(count, dtype=torch.float64, generator=generator) * (grid.end - grid.start) + grid.start
        number = torch.randint(0, function.tables, (count,), generator=generator)
        exact = function.jet(x, number, 1)
        own = [table(x, number, found.coefficients, str(grid), d) for d in (0, 1)]
        errors = [float((a - b).abs().max()) for a, b in zip(exact, own, strict=True)]
        worst = (max(worst[0], errors[0]), max(worst[1], errors[1]))
    return worst


def checked(function: ScalarFunction, found: Fit, points: int = 4096) -> Fit:
    """``found`` with bounds that hold at random points too; they are widened where they did not."""
    value, slope = check(function, found, points)
    grid = found.grid
    if value > grid.value_bound or slope > grid.slope_bound:
        grid = replace(
            grid,
            value_bound=max(grid.value_bound, SAFETY * value),
            slope_bound=max(grid.slope_bound, SAFETY * slope),
        )
    return replace(found, grid=grid)


@dataclass(frozen=True)
class Curves:
    """How a table errs: data for reports, errors being the largest over tables and channels.

    Attributes:
        x: the variable, from the first to the last knot.
        value, slope: errors there.
        steps: widths of the fine grid.
        by_order: order -> (errors of value, errors of slope), one for each step.
    """

    x: list[float]
    value: list[float]
    slope: list[float]
    steps: list[float]
    by_order: dict[int, tuple[list[float], list[float]]]


def curves(
    function: ScalarFunction,
    grid: Grid,
    stored: Tensor,
    *,
    points: int = 400,
    steps: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02, 0.01),
) -> Curves:
    """Errors of a table against the variable, and those of orders 3 and 5 against the step.

    Args:
        stored: coefficients of the table, in any dtype, whose rounding counts.
        points: of the variable, in the middle of equal parts of the range.
        steps: in the unit of the variable.
    """
    x = grid.start + (grid.last - grid.start) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    value, slope = torch.zeros(points, dtype=torch.float64), torch.zeros(points, dtype=torch.float64)
    for number in range(function.tables):
        each = torch.full((points,), number, dtype=torch.int64)
        exact = function.jet(x, each, 1)
        own = [table(x, each, stored.double(), str(grid), d) for d in (0, 1)]
        value = torch.maximum(value, (own[0] - exact[0]).abs().amax(1))
        slope = torch.maximum(slope, (own[1] - exact[1]).abs().amax(1))
    where = Domain(grid.start, grid.end, 0.0, grid.flat, None, False, _kink(function, grid.start, grid.end))
    orders: tuple[Order, Order] = (3, 5)
    by_order = {}
    for order in orders:
        fits = [fit(function, where, order, step) for step in steps]
        by_order[int(order)] = [f.value_error for f in fits], [f.slope_error for f in fits]
    return Curves(x.tolist(), value.tolist(), slope.tolist(), list(steps), by_order)
