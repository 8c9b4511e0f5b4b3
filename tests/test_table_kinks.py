"""Tables of functions whose second derivative jumps, as where an XPLOR envelope sets in: a knot is put there."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from fxpass.algebra.piecewise import PARTS, Grid, parse_grid
from fxpass.errors import UsageError
from fxpass.ir import ops
from fxpass.ir.scalar_functions import scalar_functions
from fxpass.ir.tabulation import NotTabulable, check, domain, fit
from fxpass_passes.tabulate import Tabulate
from table_models import CUTOFF, Bessel, Pairs, program

pytestmark = pytest.mark.once


def xplor(r: Tensor, on: float) -> Tensor:
    """1 up to ``on``, and from there to 0 at the cutoff; its second derivative jumps at both."""
    a, b, c = r * r, on * on, CUTOFF * CUTOFF
    return torch.where(r < on, 1.0, (c - a) ** 2 * (c + 2 * a - 3 * b) / (c - b) ** 3) * (r < CUTOFF)


class Xplor(Bessel):
    on = 3.3

    def radial(self, r: Tensor) -> Tensor:
        return self.net(torch.sin(self.k * r) / r * xplor(r, self.on))


@pytest.mark.parametrize("on", [3.0, 3.3, 1.7])
@pytest.mark.parametrize("order", [3, 5])
def test_errors_fall_as_if_there_were_no_kink(on: float, order: Literal[3, 5]) -> None:
    (function,) = scalar_functions(program(Pairs(lambda r: torch.sin(2 * r) * xplor(r, on)), samples=0))
    where = domain(function, 0.5)
    assert where.kink == on and where.cutoff == CUTOFF
    errors = []
    for step in (0.1, 0.05):
        found = fit(function, where, order, step)
        value, slope = check(function, found, 8192)
        assert value <= found.grid.value_bound and slope <= found.grid.slope_bound
        errors.append((value, slope, found.grid))
    (coarse, steep, one), (fine, shallow, two) = errors
    ratio = one.step / two.step
    assert ratio > 1.5
    assert coarse / fine > 0.6 * ratio ** (order + 1) and steep / shallow > 0.6 * ratio**order


def test_a_network_behind_such_an_envelope_is_tabulated_within_the_budget() -> None:
    outcome = Tabulate().apply(program(Xplor()))
    assert outcome.modified
    (table,) = outcome.program.graph.find_nodes(op="call_function", target=ops.table)
    grid = parse_grid(str(table.args[3]))
    knots = grid.knots()
    assert grid.start <= 0.3 and abs(knots - Xplor.on).min() < 1e-12 and knots[-1] == CUTOFF


def test_grids_with_a_knot_at_a_kink() -> None:
    grid = Grid.fitted(5, 0.3, 5.0, 0.04, kink=4.5)
    assert grid.step == 0.03125 and grid.end == 5.0
    assert 0.3 - grid.step < grid.start <= 0.3 and 4.5 in grid.knots()
    wide = Grid.fitted(3, 0.3, 5.0, 10.0, kink=4.9)
    assert wide.start > 0 and abs(wide.knots() - 4.9).min() < 1e-12


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-5, 1e-3])
def test_a_kink_next_to_the_end_takes_no_knot(gap: float) -> None:
    assert Grid.fitted(5, 0.3, 5.0, 0.04, kink=5.0 - gap) == Grid.fitted(5, 0.3, 5.0, 0.04)
    assert Grid.fitted(5, 0.3, 5.0, 10.0, kink=5.0 - 2e-3).cells < PARTS


def test_an_envelope_that_ends_where_it_sets_in_is_no_table() -> None:
    on = CUTOFF - 1e-5
    (function,) = scalar_functions(program(Pairs(lambda r: torch.sin(2 * r) * xplor(r, on)), samples=0))
    where = domain(function, 0.5)
    assert where.kink == on
    with pytest.raises(NotTabulable, match="jumps by"):
        fit(function, where, 5, 0.05)


@pytest.mark.parametrize("start", [0.0, -1.0, 1e-9])
def test_a_grid_with_a_knot_at_a_kink_begins_above_0(start: float) -> None:
    with pytest.raises(UsageError, match=r"a knot at 4\.5 cannot begin at"):
        Grid.fitted(5, start, 5.0, 0.04, kink=4.5)


def test_smooth_functions_have_no_kink_though_they_hold_numbers() -> None:
    (function,) = scalar_functions(program(Pairs(lambda r: torch.exp(-2.0 * (r - 3.0) ** 2)), samples=0))
    assert domain(function, 0.5, 4.0).kink is None
    (switched,) = scalar_functions(program(Bessel(), samples=0))
    assert domain(switched, 0.5).kink is None


def test_of_two_kinks_none_is_a_knot() -> None:
    (function,) = scalar_functions(program(Pairs(lambda r: torch.sin(r) * (xplor(r, 2.0) + xplor(r, 3.0))), samples=0))
    assert domain(function, 0.5).kink is None
