"""Piecewise polynomials on a uniform grid: the functions behind ``fxpass::table``.

A table is a list of polynomials, one row for each cell of the grid, in the variable u = (x - x_l) / step, which runs
from 0 to 1: coefficients are then of the size of the function and survive rounding to float32.  Order 3 matches
value and first derivative at both knots of a cell (cubic Hermite), order 5 the second derivative too.

Rows are, from first to last: one below the range, the cells of the range, the cells of a coarse extension, one
above.  Rows outside continue the function linearly, or hold its constant, so no look-up is ever out of range.

Error bounds: G. Birkhoff and A. Priver, J. Math. and Phys. 46, 440 (1967); P. Ciarlet, M. Schultz and R. Varga,
Numer. Math. 9, 394 (1967).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil, floor, isfinite, log2, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Floats = npt.NDArray[np.float64]
Order = Literal[3, 5]

STEP_BITS = 14  # of the step: times a number of cells below 2^10 they fit into the 24 of float32
COARSE = 10  # steps of the coarse extension are this many times wider
PARTS = 1 << 12  # of the range: a kink less than one of them before the end is at the end

#: order -> c with |f - p| <= c step^(order+1) max |f^(order+1)|
VALUE_CONSTANT = {3: 1 / 384, 5: 1 / 46080}
#: order -> c with |f' - p'| <= c step^order max |f^(order+1)|
SLOPE_CONSTANT = {3: sqrt(3) / 216, 5: sqrt(5) / 30000}


@dataclass(frozen=True)
class Grid:
    """Where the knots of a table are, and what is beyond them.

    Attributes:
        order: 3 or 5.
        start, end: first and last knot of the fine grid.
        cells: number of steps between them.
        coarse: number of steps, ``COARSE`` times as wide, of the extension beyond ``end``.
        flat: beyond the last knot the function is constant; x is cut off there, so that an infinite x is no NaN.
        value_bound, slope_bound: certified bounds of the error of value and of derivative by x within the fine
            grid, at float64; 0 where nobody certified any.
    """

    order: Order
    start: float
    end: float
    cells: int
    coarse: int = 0
    flat: bool = False
    value_bound: float = 0.0
    slope_bound: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in VALUE_CONSTANT:
            raise UsageError(f"There are no tables of order {self.order}.", hint="3 or 5.")
        if not (isfinite(self.start) and isfinite(self.end) and self.start < self.end and self.cells > 0):
            raise UsageError(f"A table cannot run from {self.start:g} to {self.end:g} in {self.cells} cells.")

    @classmethod
    def fitted(
        cls, order: Order, start: float, end: float, step: float, *, reach: float = 0.0, kink: float | None = None
    ) -> Grid:
        """The grid to exactly ``end`` with the widest step that divides the range, ``step`` at most.

        The step is rounded up to ``STEP_BITS`` bits, and the grid begins that little before ``start``: multiples of
        the step are then exact in float32, and so is what is left of x within its cell.

        With ``reach`` above ``end`` a coarse extension goes on from there to ``reach`` or just beyond.  With a
        ``kink`` between the ends there is a knot at it, a power of two of steps before ``end``, and the grid begins up
        to a step before ``start``; the step is then not rounded.  Next to ``end``, less than a step and less than
        1 / ``PARTS`` of the range before it, a kink takes no knot.

        Raises:
            UsageError: an empty range, a step that is no positive number, or a kink and a ``start`` as close to 0.
        """
        if not (isfinite(step) and step > 0):
            raise UsageError(f"A table cannot have the step {step}.", hint="a positive number.")
        least = min(step, (end - start) / PARTS)  # what is narrower would set the width of all cells
        if kink is not None and end - kink >= least:
            if start < least:
                raise UsageError(f"A table with a knot at {kink:g} cannot begin at {start:g}.", hint="further above 0.")
            return cls._with_knot(order, start, end, step, kink)
        cells = max(1, ceil((end - start) / step * (1 - 1e-9)))  # 5.0 / 0.01 is 500 cells, whatever it rounds to
        width = (end - start) / cells
        unit = 2.0 ** (floor(log2(width)) - STEP_BITS + 1) if width > 0 else 1.0
        grid = cls(order, end - cells * ceil(width / unit) * unit, end, cells)
        coarse = ceil((reach - end) / (COARSE * grid.step) * (1 - 1e-9)) if reach > end else 0
        return replace(grid, coarse=coarse)

    @classmethod
    def _with_knot(cls, order: Order, start: float, end: float, step: float, kink: float) -> Grid:
        after = 1
        while True:
            width = (end - kink) / after
            before = ceil((kink - start) / width * (1 - 1e-9))
            if width <= step * (1 + 1e-9) and kink - before * width > start / 2:  # lengths are positive
                return cls(order, kink - before * width, end, before + after)
            after *= 2

    @property
    def step(self) -> float:
        return (self.end - self.start) / self.cells

    @property
    def last(self) -> float:
        """The last knot of all."""
        return self.end + self.coarse * COARSE * self.step

    @property
    def rows(self) -> int:
        """Rows of one table: cells, and one on either side."""
        return self.cells + self.coarse + 2

    def knots(self) -> Floats:
        """All knots, [cells + coarse + 1]; the ends are exact."""
        fine = self.start + np.arange(self.cells + 1) * ((self.end - self.start) / self.cells)
        fine[-1] = self.end
        return np.concatenate([fine, self.end + np.arange(1, self.coarse + 1) * (COARSE * self.step)])

    def steps(self) -> Floats:
        """Width of each cell, [cells + coarse]."""
        return np.repeat([self.step, COARSE * self.step], [self.cells, self.coarse])

    def __str__(self) -> str:
        numbers = (self.start, self.end, self.cells, self.coarse, self.value_bound, self.slope_bound)
        return f"{self.order}|{'flat' if self.flat else 'linear'}|" + "|".join(map(repr, numbers))


@cache
def parse_grid(text: str) -> Grid:
    """Inverse of ``str(Grid)``."""
    order, beyond, start, end, cells, coarse, value, slope = text.split("|")
    known: Order = 3 if order == "3" else 5
    return Grid(
        known, float(start), float(end), int(cells), int(coarse), beyond == "flat", float(value), float(slope)
    )


def hermite(order: Order, steps: Floats, values: Floats, slopes: Floats, curvatures: Floats | None) -> Floats:
    """Coefficients of u^0 ... u^order in every cell.

    Args:
        steps: [cells].
        values, slopes, curvatures: f, f' and f'' at the knots, [cells + 1, channels]; order 3 needs no f''.

    Returns:
        [order + 1, cells, channels].
    """
    d = steps[:, None]
    y, rise = values[:-1], np.diff(values, axis=0)
    left, right = slopes[:-1] * d, slopes[1:] * d
    if order == 3:
        return np.stack([y, left, 3 * rise - right - 2 * left, right + left - 2 * rise])
    assert curvatures is not None
    bent, bends = curvatures[:-1] * d**2, curvatures[1:] * d**2
    return np.stack(
        [
            y,
            left,
            bent / 2,
            10 * rise - 4 * right - 6 * left + (bends - 3 * bent) / 2,
            -15 * rise + 7 * right + 8 * left + (3 * bent - 2 * bends) / 2,
            6 * rise - 3 * (right + left) + (bends - bent) / 2,
        ]
    )


def coefficients(grid: Grid, values: Floats, slopes: Floats, curvatures: Floats | None) -> Floats:
    """The rows of one table from f, f' and f'' at ``grid.knots()``, each [knots, channels].

    Returns:
        [order + 1, grid.rows, channels].  The first row continues the first cell linearly, in u from the knot one
        step below it; the last row continues the last cell from the last knot, with slope 0 where the grid is flat.
    """
    steps = grid.steps()
    inside = hermite(grid.order, steps, values, slopes, curvatures)
    below, above = np.zeros_like(inside[:, :1]), np.zeros_like(inside[:, :1])
    below[0, 0], below[1, 0] = values[0] - slopes[0] * steps[0], slopes[0] * steps[0]
    above[0, 0] = values[-1]
    if not grid.flat:
        above[1, 0] = slopes[-1] * steps[-1]
    return np.concatenate([below, inside, above], axis=1)
