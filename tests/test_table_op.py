"""``fxpass::table``: derivatives, edges of the range, types, tracing, scripting, compiling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fxpass.algebra.piecewise import Grid, coefficients
from fxpass.ir import ops
from fxpass.ir.cost import costs
from fxpass.ir.legalize import legalize
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.testing.contract import build_program

pytestmark = pytest.mark.once

CHANNELS = 3
ORDERS = pytest.mark.parametrize("order", [3, 5])


def values(x: np.ndarray, number: int) -> list[np.ndarray]:
    """f, f', f'' of (2 - x/2)^6 sin(k x), which is zero with its derivatives at 4, for three k."""
    k = np.arange(1, CHANNELS + 1) + 0.5 * number
    x = x[:, None]
    e = [(2 - x / 2) ** 6, -3 * (2 - x / 2) ** 5, 7.5 * (2 - x / 2) ** 4]
    s = [np.sin(k * x), k * np.cos(k * x), -(k**2) * np.sin(k * x)]
    return [e[0] * s[0], e[1] * s[0] + e[0] * s[1], e[2] * s[0] + 2 * e[1] * s[1] + e[0] * s[2]]


def table(grid: Grid, tables: int = 1) -> Tensor:
    return torch.cat([torch.from_numpy(coefficients(grid, *values(grid.knots(), n))) for n in range(tables)], 1)


def grid(order: int, *, flat: bool = True, coarse: int = 0, cells: int = 60) -> Grid:
    return Grid(order, 0.5, 4.0, cells, coarse, flat)  # type: ignore[arg-type]


@ORDERS
@pytest.mark.parametrize("coarse", [0, 4])
def test_values_and_derivatives_of_several_tables(order: int, coarse: int) -> None:
    where = grid(order, flat=False, coarse=coarse)
    stored = table(where, 2)
    x = torch.linspace(0.5, 4.0, 501, dtype=torch.float64)[:-1]
    index = torch.arange(500) % 2
    both = zip(values(x.numpy(), 0), values(x.numpy(), 1), strict=True)
    exact = [np.where((index == 1)[:, None], b, a) for a, b in both]
    for derivative, tolerance in ((0, 1e-3), (1, 2e-2), (2, 2.0)):
        found = ops.table(x, index, stored, str(where), derivative).numpy()
        np.testing.assert_allclose(found, exact[derivative], atol=tolerance * (0.02 if order == 5 else 1))


@ORDERS
@pytest.mark.parametrize("coarse", [0, 4])
def test_gradients_of_every_order(order: int, coarse: int) -> None:
    where = grid(order, flat=False, coarse=coarse)
    stored = table(where)
    x = torch.tensor([-1.0, 0.7, 1.234, 3.9, 5.1, 6.0], dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ops.table(x, None, stored, str(where), 0)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    total = run(x).sum()
    for derivative in range(1, order + 2):
        (slope,) = torch.autograd.grad(total, x, create_graph=True)
        assert torch.equal(slope, ops.table(x, None, stored, str(where), derivative).sum(1))
        total = slope.sum()
    assert not slope.any()


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_at_and_beyond_the_cutoff(order: int, dtype: torch.dtype) -> None:
    where = grid(order)
    x = torch.tensor([4.0, 4.0000005, 5.0, 1e30, math.inf], dtype=dtype)
    for derivative in range(order + 2):
        found = ops.table(x, None, table(where).to(dtype), str(where), derivative)
        assert not found.any(), found


@ORDERS
@pytest.mark.parametrize("coarse", [0, 4])
def test_linear_outside_the_range(order: int, coarse: int) -> None:
    """Value and slope go on, where other implementations read past the end of the table."""
    where = grid(order, flat=False, coarse=coarse)
    stored, spec = table(where), str(where)
    for knot, away in ((where.start, -1.0), (where.last, 1.0)):
        at = torch.tensor([knot], dtype=torch.float64)
        inside = at - away * 1e-12
        value, slope = (ops.table(inside, None, stored, spec, k) for k in (0, 1))
        for distance in (0.0, 1e-9, 0.3, 50.0):
            x = at + away * distance
            torch.testing.assert_close(
                ops.table(x, None, stored, spec, 0), value + slope * away * distance, rtol=1e-9, atol=1e-9
            )
            torch.testing.assert_close(ops.table(x, None, stored, spec, 1), slope, rtol=1e-8, atol=1e-8)


def test_the_coarse_extension_is_looked_up_by_its_own_step() -> None:
    where = Grid(3, 0.5, 2.0, 50, 7)
    x = torch.linspace(2.0, where.last, 200, dtype=torch.float64)[:-1]
    error = (ops.table(x, None, table(where), str(where), 0).numpy() - values(x.numpy(), 0)[0]).__abs__().max()
    assert where.last > 4.0 and error < 0.02  # near 1 where only the fine grid is looked up


@ORDERS
def test_nan_stays_nan_and_reads_nothing_outside(order: int) -> None:
    for where in (grid(order), grid(order, flat=False, coarse=3)):
        stored = table(where, 2)
        for derivative in range(order + 2):
            x = torch.tensor([math.nan, 1.0], dtype=torch.float64)
            found = ops.table(x, torch.tensor([1, 1]), stored, str(where), derivative)
            assert found[0].isnan().all() and found[1].isfinite().all()


def test_extreme_numbers_read_nothing_outside() -> None:
    where = grid(5, flat=False, coarse=3)
    x = torch.tensor([-math.inf, -1e300, 1e300, math.inf], dtype=torch.float64)
    assert ops.table(x, torch.tensor([0, 1, 0, 1]), table(where, 2), str(where), 0).shape == (4, CHANNELS)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_any_number_of_rows(rows: int) -> None:
    where = grid(5)
    x = torch.full((rows,), 1.0, dtype=torch.float64, requires_grad=True)
    found = ops.table(x, None, table(where), str(where), 0)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert found.shape == (rows, CHANNELS) and slope.shape == (rows,)


@ORDERS
def test_float32_is_at_rounding_level(order: int) -> None:
    """Also for a step of 0.001, at which values at the knots in float32 would cost the slope three digits."""
    where = grid(order, cells=3500)
    stored = table(where)
    x = torch.linspace(0.6, 3.9, 20001, dtype=torch.float32)
    for derivative in (0, 1):
        exact = ops.table(x.double(), None, stored, str(where), derivative)
        found = ops.table(x, None, stored.float(), str(where), derivative)
        # rounding of x - 0.5 and its product with 1000 moves x by some 1e-7
        moved = 4e-7 * ops.table(x.double(), None, stored, str(where), derivative + 1).abs()
        assert ((found - exact).abs() <= 4e-7 * exact.abs().max() + moved).all()


def test_the_type_of_the_result_is_that_of_x() -> None:
    where = grid(5)
    x = torch.linspace(1, 3, 7, dtype=torch.float32, requires_grad=True)
    found = ops.table(x, None, table(where), str(where), 0)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert found.dtype == slope.dtype == torch.float32
    assert torch.equal(found, ops.table(x, None, table(where).float(), str(where), 0))
    half = x.detach().half()  # counts cells in float32
    same = ops.table(half.float(), None, table(where), str(where), 0)
    assert torch.equal(ops.table(half, None, table(where), str(where), 0), same)


@ORDERS
def test_op_is_registered_as_torch_wants_it(order: int) -> None:
    where = grid(order, coarse=2, flat=False)
    x = torch.linspace(0.2, 7.0, 9, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.table, (x, None, table(where), str(where), 0))
    torch.library.opcheck(ops.table, (x, torch.arange(9) % 2, table(where, 2), str(where), 1))


def table_program(where: Grid, dtype: torch.dtype = torch.float64) -> Program:
    inputs = (
        TensorSpec("x", ("edges",), dtype),
        TensorSpec("number", ("edges",), torch.int64, None, "", frozenset({"below:2"})),
    )

    def body(graph: torch.fx.Graph, x: torch.fx.Node, number: torch.fx.Node) -> dict[str, torch.fx.Node]:
        stored = graph.get_attr("stored")
        return {f"d{k}": graph.call_function(ops.table, (x, number, stored, str(where), k)) for k in (0, 1, 2)}

    return build_program(body, inputs, {"stored": table(where, 2).to(dtype)})


@pytest.mark.parametrize("flat", [True, False])
def test_legalised_it_is_plain_aten_that_scripts_and_exports(flat: bool) -> None:
    where = grid(5, flat=flat, coarse=0 if flat else 3)
    program = table_program(where)
    verify(program)
    legal = legalize(program)
    assert all("fxpass" not in str(n.target) for n in legal.graph.nodes if n.op == "call_function")
    module = legal.graph_module
    for node in module.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "overloadpacket"):
            node.target = node.target.overloadpacket
    module.recompile()
    scripted = torch.jit.script(module)
    dynamic = {0: torch.export.Dim.AUTO}
    inputs = (torch.linspace(0.1, 6.0, 12, dtype=torch.float64), torch.arange(12) % 2)
    exported = torch.export.export(legalize(program).graph_module, inputs, dynamic_shapes=(dynamic, dynamic)).module()
    for rows in (0, 1, 12):
        given = [t[:rows] for t in inputs]
        expected = program.graph_module(*given)
        for run in (scripted, *([exported] if rows == 12 else [])):
            for a, b in zip(run(*given), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.slow
def test_inductor_compiles_it_to_one_loop_over_rows() -> None:
    """The C++ that the inductor target makes of the legalised table: exact, for changing sizes, without a call back."""
    program = legalize(table_program(grid(5)))
    compiled = torch.compile(program.graph_module, dynamic=True, fullgraph=True)
    x = torch.linspace(0.1, 6.0, 24, dtype=torch.float64)
    for rows in (24, 7):
        given = (x[:rows], torch.arange(rows) % 2)
        for a, b in zip(compiled(*given), program.graph_module(*given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_autograd_of_the_legalised_table_is_its_derivative() -> None:
    """Training and Hessians run autograd over the lowered graph."""
    for where in (grid(5), grid(3, flat=False, coarse=3)):
        legal = legalize(table_program(where)).graph_module
        x = torch.linspace(0.1, 6.3, 40, dtype=torch.float64, requires_grad=True)
        value, slope, _ = legal(x, torch.zeros(40, dtype=torch.int64))
        (found,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(found, slope.sum(1), rtol=1e-10, atol=1e-10)


def test_cost_counts_the_rows_that_are_read() -> None:
    program = table_program(grid(5))
    found = {str(n.args[4]): c.at(edges=1000) for n, c in costs(program).items() if n.target is ops.table}
    assert found["0"].flops == 1000 * (2 * 6 * CHANNELS + 10)
    assert found["0"].bytes == 1000 * (7 * CHANNELS * 8 + 16) < 1000 * 1000
    assert found["1"].flops < found["0"].flops
