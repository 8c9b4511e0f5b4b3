"""FLOPs and bytes: each family of ops by hand, whole programs against a count at fixed sizes and against torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fxpass.errors import UsageError
from fxpass.ir.cost import (
    ATOMS,
    EDGES,
    GRAPHS,
    Cost,
    SizeNames,
    costs,
    einsum_flops,
    node_cost,
    parse,
    pretty,
    program_cost,
)
from fxpass.ir.program import Dim, Program, TensorSpec

pytestmark = pytest.mark.once

HINTS = {"atoms": 7, "edges": 23, "graphs": 3, "graphs+1": 4}  # all different, so that no two become one symbol


def trace(function: Callable[..., object], *dims: Sequence[Dim], mode: str = "symbolic", **sizes: int) -> Program:
    """``function`` of one tensor for each of ``dims`` as a program; a trailing ``"int"`` makes it an index."""
    hints = HINTS | sizes
    specs, examples = [], []
    for n, shape in enumerate(dims):
        index = shape[-1:] == ("int",)
        shape = tuple(shape[:-1] if index else shape)
        extents = [hints[d] if isinstance(d, str) else d for d in shape]
        dtype = torch.int64 if index else torch.float32
        examples.append(torch.zeros(extents, dtype=dtype))
        specs.append(TensorSpec(f"x{n}", shape, dtype))
    graph_module = make_fx(lambda *xs: (function(*xs),), tracing_mode=mode)(*examples)
    return Program(graph_module, tuple(specs), (TensorSpec("y", (), torch.float32),))


def test_a_matmul_costs_2mnk_in_named_sizes() -> None:
    cost = program_cost(trace(torch.mm, ("atoms", 16), (16, 32)))
    assert cost.flops == 2 * 16 * 32 * ATOMS
    assert cost.bytes == 4 * (16 * ATOMS + 16 * 32 + 32 * ATOMS)
    assert cost.at(atoms=10) == (10240, 4 * (160 + 512 + 320))


CASES: list[tuple[str, Callable[..., object], list[tuple[Dim, ...]], sympy.Expr, sympy.Expr]] = [
    ("bmm", torch.bmm, [("edges", 3, 5), ("edges", 5, 2)], 60 * EDGES, 4 * EDGES * (15 + 10 + 6)),
    ("addmm", torch.addmm, [(4,), ("atoms", 3), (3, 4)], 28 * ATOMS, 4 * (4 + 3 * ATOMS + 12 + 4 * ATOMS)),
    ("matrix times vector", torch.mv, [("atoms", 3), (3,)], 6 * ATOMS, 4 * (3 * ATOMS + 3 + ATOMS)),
    ("pointwise", torch.mul, [("edges", 3), ("edges", 1)], 3 * EDGES, 4 * (3 + 1 + 3) * EDGES),
    ("transcendental", torch.exp, [("edges", 3)], 3 * EDGES, 24 * EDGES),
    ("comparison", lambda x: x > 0, [("edges", 3)], 3 * EDGES, (12 + 3) * EDGES),
    ("reduction", lambda x: x.sum(1), [("edges", 3)], 3 * EDGES, (12 + 4) * EDGES),
    ("norm", lambda x: torch.linalg.vector_norm(x, dim=1), [("edges", 3)], 3 * EDGES, 16 * EDGES),
    ("gather", lambda x, i: x[i], [("atoms", 8), ("edges", "int")], sympy.S.Zero, (64 + 8) * EDGES),
    ("index_select", lambda x, i: x.index_select(0, i), [("atoms", 8), ("edges", "int")], sympy.S.Zero, 72 * EDGES),
    (
        "scatter-add",
        lambda out, i, x: out.index_add(0, i, x),
        [("atoms", 8), ("edges", "int"), ("edges", 8)],
        8 * EDGES,
        64 * ATOMS + (8 + 32) * EDGES,
    ),
    ("view", lambda x: x.view(-1, 2, 3).transpose(0, 1)[1:].unsqueeze(0), [("atoms", 6)], *2 * [sympy.S.Zero]),
    ("cat", lambda x, y: torch.cat([x, y]), [("atoms", 2), ("edges", 2)], sympy.S.Zero, 16 * (ATOMS + EDGES)),
    ("cast", lambda x: x.double(), [("atoms", 2)], sympy.S.Zero, 24 * ATOMS),
    ("zeros", lambda x: x.new_zeros(x.shape[0], 9), [("atoms", 2)], sympy.S.Zero, 36 * ATOMS),
    ("size", lambda ptr: torch.ones(ptr.shape[0] - 1, 5), [("graphs+1", "int")], sympy.S.Zero, 20 * GRAPHS),
    ("expanded operand", lambda x: x.expand(-1, 50).exp(), [("atoms", 1)], 50 * ATOMS, 4 * (1 + 50) * ATOMS),
]


@pytest.mark.parametrize(("function", "dims", "flops", "moved"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_ops(
    function: Callable[..., object], dims: list[tuple[Dim, ...]], flops: sympy.Expr, moved: sympy.Expr
) -> None:
    cost = program_cost(trace(function, *dims))
    assert sympy.expand(cost.flops - flops) == 0, cost
    assert sympy.expand(cost.bytes - moved) == 0, cost


def test_a_semantic_op_states_its_own_cost_in_named_sizes() -> None:
    from fxpass.ir import ops

    def gather_and_scatter(x: Tensor, index: Tensor) -> Tensor:
        return ops.scatter_sum(ops.gather(x, index), index, x.shape[0])

    program = trace(gather_and_scatter, ("atoms", 8), ("edges", "int"))
    by_target = {node.target: cost for node, cost in costs(program).items()}
    assert by_target[ops.gather].flops == 0
    assert by_target[ops.scatter_sum].flops == 8 * EDGES
    assert program_cost(program).sizes == {"atoms", "edges"}


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("ij,jk->ik", [(ATOMS, 3), (3, 5)], 30 * ATOMS),
        ("ij,jk", [(ATOMS, 3), (3, 5)], 30 * ATOMS),
        ("bui,buj->buij", [(EDGES, 4, 3), (EDGES, 4, 5)], 60 * EDGES),  # nothing is summed: one FLOP each
        ("...ij,jk->...ik", [(EDGES, 2, 3), (3, 4)], 48 * EDGES),
        ("ij->i", [(ATOMS, 3)], 3 * ATOMS),
        ("ij->ji", [(ATOMS, 3)], sympy.S.Zero),
        ("bi,bj,ijk->bk", [(EDGES, 2), (EDGES, 3), (2, 3, 5)], 6 * EDGES + 60 * EDGES),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[sympy.Expr, ...]], flops: sympy.Expr) -> None:
    shapes = [tuple(map(sympy.sympify, shape)) for shape in shapes]
    assert sympy.expand(einsum_flops(equation, shapes) - flops) == 0


def test_an_einsum_node() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(torch.ops.aten.einsum.default, ("ij,jk->ik", [x, y]))
    x.meta["val"], y.meta["val"], node.meta["val"] = torch.empty(2, 3), torch.empty(3, 5), torch.empty(2, 5)
    assert node_cost(node, SizeNames({})) == Cost(sympy.Integer(60), sympy.Integer(4 * (6 + 15 + 10)))


def message_passing(x: Tensor, index: Tensor, vectors: Tensor, w: Tensor) -> Tensor:
    radial = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    weights = torch.nn.functional.silu(radial @ w[:1])
    messages = x[index[0]] * weights
    return (torch.zeros_like(x).index_add(0, index[1], messages) @ w.t()).sum()


MESSAGE_PASSING: list[tuple[Dim, ...]] = [("atoms", 6), (2, "edges", "int"), ("edges", 3), (6, 6)]


@pytest.mark.parametrize("sizes", [{"atoms": 5, "edges": 11}, {"atoms": 40, "edges": 600}])
def test_the_expression_gives_what_is_counted_at_fixed_sizes(sizes: dict[str, int]) -> None:
    fixed = program_cost(trace(message_passing, *MESSAGE_PASSING, mode="fake", **sizes))
    assert fixed.sizes == set()
    assert program_cost(trace(message_passing, *MESSAGE_PASSING)).at(**sizes) == fixed.at()


def test_matmuls_agree_with_the_flop_counter_of_torch() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x, y) @ w

    program = trace(function, ("edges", 3, 5), ("edges", 5, 4), (4, 6))
    arguments = (torch.ones(13, 3, 5), torch.ones(13, 5, 4), torch.ones(4, 6))
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    assert program_cost(program).at(edges=13).flops == counter.get_total_flops() > 0


def test_costs_add_and_print() -> None:
    cost = Cost(12000 * EDGES, ATOMS) + Cost(3100 * ATOMS + 2, sympy.Integer(8))
    assert cost == Cost(12000 * EDGES + 3100 * ATOMS + 2, ATOMS + 8)
    assert str(cost) == "1.2e4·edges + 3.1e3·atoms + 2 flops, atoms + 8 bytes"
    assert str(Cost()) == "0 flops, 0 bytes"
    assert pretty(2 * ATOMS**2 - 12 * ATOMS * GRAPHS) == "-12·atoms·graphs + 2·atoms^2"


def test_a_missing_size_is_named() -> None:
    with pytest.raises(UsageError, match="edges, of which no value"):
        Cost(ATOMS * EDGES).at(atoms=3)


@pytest.mark.parametrize(
    "expr", [GRAPHS + 1, 3 * ATOMS**2 * EDGES - 7, sympy.Max(2, ATOMS) / 3, sympy.floor(EDGES / 2), sympy.Integer(0)]
)
def test_parse_reads_what_sympy_prints(expr: sympy.Expr) -> None:
    assert parse(str(expr)) == expr


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "atoms.free_symbols", "atoms +", "", "'a'", "f(2)"])
def test_parse_refuses_what_is_not_arithmetic(text: str) -> None:
    with pytest.raises(UsageError, match="not an expression in sizes"):
        parse(text)
