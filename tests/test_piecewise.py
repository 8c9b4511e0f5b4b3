"""Piecewise polynomials: formulas, grids and their text form, convergence and error constants."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

from fxpass.algebra.piecewise import SLOPE_CONSTANT, VALUE_CONSTANT, Floats, Grid, coefficients, hermite, parse_grid
from fxpass.errors import UsageError

pytestmark = pytest.mark.once

X = sympy.Symbol("x")
FUNCTION = sympy.sin(3 * X) / X * (1 - X / 5) ** 6


def derivative(order: int, x: Floats) -> Floats:
    return np.asarray(sympy.lambdify(X, sympy.diff(FUNCTION, X, order), "numpy")(x))[:, None]


def evaluate(grid: Grid, x: Floats, order: int = 0) -> Floats:
    """Value or derivative of the table of FUNCTION by numpy alone."""
    rows = coefficients(grid, *(derivative(k, grid.knots()) for k in range(3)))
    cell = np.minimum(((x - grid.start) / grid.step).astype(int), grid.cells - 1)
    u = (x - grid.knots()[cell]) / grid.step
    polynomials = [np.polynomial.Polynomial(c) for c in rows[:, 1:-1, 0].T]
    return np.array([polynomials[c].deriv(order)(v) for c, v in zip(cell, u, strict=True)]) / grid.step**order


@pytest.mark.parametrize("order", [3, 5])
def test_formulas_are_the_published_ones(order: int) -> None:
    """Against the formulas in powers of t = x - x_l (SEEDS notation: h, D, y, y', y'')."""
    rng = np.random.default_rng(0)
    y, z, s = (rng.normal(size=(2, 4)) for _ in range(3))
    D, h = 0.3, y[1] - y[0]
    if order == 3:
        published = [y[0], z[0], (3 * h - (z[1] + 2 * z[0]) * D) / D**2, ((z[1] + z[0]) * D - 2 * h) / D**3]
    else:
        published = [
            y[0],
            z[0],
            s[0] / 2,
            (20 * h - (8 * z[1] + 12 * z[0]) * D + (s[1] - 3 * s[0]) * D**2) / (2 * D**3),
            (-30 * h + (14 * z[1] + 16 * z[0]) * D + (3 * s[0] - 2 * s[1]) * D**2) / (2 * D**4),
            (12 * h - 6 * (z[1] + z[0]) * D + (s[1] - s[0]) * D**2) / (2 * D**5),
        ]
    own = hermite(order, np.array([D]), y, z, s)[:, 0] / D ** np.arange(order + 1)[:, None]  # type: ignore[arg-type]
    np.testing.assert_allclose(own, published, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("order", "matching"), [(3, 2), (5, 3)])
def test_derivatives_match_at_knots(order: int, matching: int) -> None:
    grid = Grid(order, 0.5, 4.0, 17)  # type: ignore[arg-type]
    knots = grid.knots()
    for k in range(matching):
        for shift in (0.0, -1e-9):
            x = knots[1:-1] + shift
            np.testing.assert_allclose(evaluate(grid, x, k), derivative(k, x)[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [3, 5])
def test_errors_fall_as_they_must_and_stay_below_the_formula(order: int) -> None:
    x = np.linspace(0.6, 4.9, 3001)
    largest = np.abs(derivative(order + 1, np.linspace(0.5, 5.0, 20001))).max()
    previous: list[float] = []
    for cells in (40, 80, 160):
        grid = Grid(order, 0.5, 5.0, cells)  # type: ignore[arg-type]
        errors = [float(np.abs(evaluate(grid, x, k) - derivative(k, x)[:, 0]).max()) for k in (0, 1)]
        assert errors[0] <= VALUE_CONSTANT[order] * grid.step ** (order + 1) * largest
        assert errors[1] <= SLOPE_CONSTANT[order] * grid.step**order * largest
        if previous:
            assert np.log2(previous[0] / errors[0]) == pytest.approx(order + 1, abs=0.35)
            assert np.log2(previous[1] / errors[1]) == pytest.approx(order, abs=0.35)
        previous = errors


@pytest.mark.parametrize("step", [0.03, 0.07, 0.1, 0.01, 1.7, 100.0])
def test_a_step_that_does_not_divide_the_range_is_made_smaller(step: float) -> None:
    grid = Grid.fitted(3, 0.3, 5.0, step)
    knots = grid.knots()
    assert 0.3 * (1 - 2e-3) < knots[0] <= 0.3 and knots[-1] == 5.0 and len(knots) == grid.cells + 1
    assert grid.step <= step * (1 + 2.0**-13)
    assert grid.cells == 1 or (5.0 - 0.3) / (grid.cells - 1) > step
    # multiples of the step, and what is left of a float32 number within its cell, are exact in float32
    short = np.float32(grid.step)
    assert float(short) == grid.step
    for cell in range(min(grid.cells, 1000)):
        assert float(np.float32(cell) * short) == cell * grid.step


def test_a_step_that_divides_the_range_is_kept() -> None:
    assert Grid.fitted(5, 0.0, 5.0, 0.01).cells == 500
    assert Grid.fitted(5, 0.3, 5.0, 0.1).cells == 47


def test_the_coarse_extension_reaches_far_enough_in_tenfold_steps() -> None:
    grid = Grid.fitted(3, 0.0, 1.0, 0.03, reach=10.0)
    assert grid.last >= 10.0 and grid.last - 10 * grid.step < 10.0
    np.testing.assert_allclose(np.diff(grid.knots())[grid.cells :], 10 * grid.step, rtol=1e-9)
    np.testing.assert_allclose(np.diff(grid.knots()), grid.steps(), rtol=1e-9)
    assert grid.rows == len(grid.steps()) + 2


def test_grids_survive_their_text() -> None:
    for grid in (Grid(5, 0.1 + 0.2, 5.0, 7, 3, False, 1e-9, 2.5e-8), Grid(3, -1.0, 1e-3, 1, flat=True)):
        assert parse_grid(str(grid)) == grid


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grid(4, 0.0, 1.0, 3), "order 4"),
        (lambda: Grid(3, 1.0, 1.0, 3), "1 to 1"),
        (lambda: Grid(3, 0.0, float("inf"), 3), "inf"),
        (lambda: Grid.fitted(3, 0.0, 1.0, 0.0), "step 0.0"),
        (lambda: Grid.fitted(3, 0.0, 1.0, float("nan")), "step nan"),
    ],
)
def test_bad_grids_are_refused(make: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()  # type: ignore[operator]
