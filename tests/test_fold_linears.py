"""The pass fold-linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

import fxpass
from fxpass.algebra.multilinear import Linear, LinearPath, parse_linear
from fxpass.ir import ops
from fxpass.ir.program import Program, TensorSpec
from fxpass.passes import Outcome
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.fold_linears import FoldLinears

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
SIZES = ({"atoms": 9, "edges": 23, "graphs": 3}, {"atoms": 1, "edges": 0, "graphs": 1}, {"atoms": 0})
WIDE, NARROW = "4x0e+4x1o", "2x0e+2x1o"
X = TensorSpec("x", ("atoms", 16), F64, WIDE)
G = TensorSpec("g", ("atoms", 8), F64, NARROW)
DOWN = str(Linear(WIDE, NARROW, (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 8, -1.5)), 16, True))
UP = str(Linear(NARROW, WIDE, (LinearPath(0, 0, 3, 2.0), LinearPath(1, 1, 11, 0.25)), 19, True))
MIX = str(Linear(NARROW, NARROW, (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 4, 1.5)), 8, True))
SQUARE = str(Linear(WIDE, WIDE, (LinearPath(0, 0, 0, 1.0), LinearPath(1, 1, 16, 1.0)), 32, True))
OTHER = str(Linear("2x0e+2x0e+4x1o", NARROW, (LinearPath(0, 0, 0, 0.5), LinearPath(2, 1, 4, -1.5)), 12, True))
EACH = DOWN.replace("shared", "rows")
SIZE = {"down": 16, "up": 19, "mix": 8, "square": 32, "other": 12}

Build = Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]


def numbers(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


def program(build: Build, dtype: torch.dtype = F64) -> Program:
    """What ``build(graph, x, g)`` returns; weights are ``NAME`` and ``NAME2``."""

    def body(graph: fx.Graph, x: fx.Node, g: fx.Node) -> dict[str, fx.Node]:
        return {"y": build(graph, x, g)}

    weights = {f"{n}{k}": numbers(s, s + len(k)).to(dtype) for n, s in SIZE.items() for k in ("", "2")}
    return build_program(body, [TensorSpec(s.name, s.dims, dtype, s.irreps) for s in (X, G)], weights)


def forward(graph: fx.Graph, x: Any, name: str, spec: str) -> fx.Node:
    return graph.call_function(ops.linear, (x, graph.get_attr(name), None, spec, "out"))


def backward(graph: fx.Graph, g: Any, name: str, spec: str) -> fx.Node:
    return graph.call_function(ops.linear, (None, graph.get_attr(name), g, spec, "x"))


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def maps(outcome: Outcome) -> list[fx.Node]:
    return outcome.program.graph.find_nodes(op="call_function", target=ops.linear)


FOLDS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "quotient of a result": (
        lambda g, x, _: call(g, aten.div.Tensor, forward(g, x, "down", DOWN), 38.5),
        ("scaled-result",),
    ),
    "product of a result": (
        lambda g, x, _: call(g, aten.mul.Scalar, forward(g, x, "down", DOWN), -3),
        ("scaled-result",),
    ),
    "quotient that a map reads": (
        lambda g, x, _: forward(g, call(g, aten.div.Scalar, x, 38.5), "down", DOWN),
        ("scaled-operand",),
    ),
    "quotient that a transposed map reads": (
        lambda g, _, y: backward(g, call(g, aten.div.Tensor, y, 38.5), "down", DOWN),
        ("scaled-operand",),
    ),
    "both sides": (
        lambda g, x, _: call(
            g, aten.mul.Tensor, forward(g, call(g, aten.div.Tensor, x, 3.0), "down", DOWN), 1 / 7
        ),
        ("scaled-operand", "scaled-result"),
    ),
    "map of a map": (
        lambda g, x, _: forward(g, forward(g, x, "square", SQUARE), "down", DOWN),
        ("linear-of-linear",),
    ),
    "transposed map of a transposed map": (
        lambda g, _, y: backward(g, backward(g, y, "mix", MIX), "down", DOWN),
        ("linear-of-linear",),
    ),
    "transposed map of a map": (
        lambda g, x, _: backward(g, forward(g, forward(g, x, "down", DOWN), "mix", MIX), "mix2", MIX),
        ("linear-of-linear", "linear-of-linear"),
    ),
    "sum of maps": (
        lambda g, x, _: call(g, aten.add.Tensor, forward(g, x, "down", DOWN), forward(g, x, "down2", DOWN)),
        ("sum-of-linears",),
    ),
    "sum of transposed maps": (
        lambda g, _, y: call(g, aten.add.Tensor, backward(g, y, "down", DOWN), backward(g, y, "down2", DOWN)),
        ("sum-of-linears",),
    ),
    "sum of a map and a transposed map": (
        lambda g, x, _: call(g, aten.add.Tensor, forward(g, x, "down", DOWN), backward(g, x, "up", UP)),
        ("sum-of-linears",),
    ),
    "all of it": (
        lambda g, x, _: call(
            g,
            aten.div.Tensor,
            call(
                g,
                aten.add.Tensor,
                forward(g, forward(g, x, "square", SQUARE), "down", DOWN),
                forward(g, call(g, aten.mul.Tensor, x, 2.0), "down2", DOWN),
            ),
            38.5,
        ),
        ("linear-of-linear", "scaled-operand", "sum-of-linears", "scaled-result"),
    ),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FOLDS)
def test_one_map_is_left(name: str, dtype: torch.dtype) -> None:
    build, rules = FOLDS[name]
    (outcome,) = PassContract(FoldLinears(), [lambda: program(build, dtype)], SIZES).check()
    assert tuple(a.rule for a in outcome.applications) == rules
    assert len(maps(outcome)) == 1 and outcome.refusals == ()
    operations = [n for n in outcome.program.graph.nodes if n.op == "call_function"]
    assert operations == maps(outcome)


def test_a_number_goes_into_coefficients_and_weights_stay() -> None:
    build, _ = FOLDS["quotient of a result"]
    before, after = program(build), FoldLinears().apply(program(build))
    FileCheck().check("fxpass.linear").check("aten.div.Tensor(%linear, 38.5)").run(graph_text(before))
    FileCheck().check("fxpass.linear.default(%x, %down, None").check_not("aten.div").run(graph_text(after.program))
    (node,) = maps(after)
    paths = (LinearPath(0, 0, 0, 0.5 / 38.5), LinearPath(1, 1, 8, -1.5 / 38.5))
    found = parse_linear(node.args[-2]).paths
    assert [p.coefficient for p in found] == pytest.approx([p.coefficient for p in paths], rel=1e-15)
    assert [(p.i, p.o, p.weight) for p in found] == [(p.i, p.o, p.weight) for p in paths]


def test_a_folded_map_is_the_product_of_its_weights() -> None:
    build, _ = FOLDS["map of a map"]
    outcome = FoldLinears().apply(program(build))
    text = graph_text(outcome.program)
    FileCheck().check("%square_folded").check("fxpass.linear.default(%x, %square_folded, None").run(text)
    (node,) = maps(outcome)
    assert parse_linear(node.args[-2]) == Linear(
        WIDE, NARROW, (LinearPath(0, 0, 0, 1.0), LinearPath(1, 1, 8, 1.0)), 16, True
    )
    given, folded = program(build).graph_module, outcome.program.graph_module.square_folded
    expected = given.square[:16].view(4, 4) @ given.down[:8].view(4, 2) * 0.5
    torch.testing.assert_close(folded[:8].view(4, 2), expected, rtol=1e-14, atol=0)


def test_the_transposed_map_has_the_weights_of_the_forward_one() -> None:
    def both(g: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        there = forward(g, forward(g, x, "square", SQUARE), "down", DOWN)
        back = backward(g, backward(g, y, "down", DOWN), "square", SQUARE)
        return call(g, aten.cat.default, [there, back], 1)

    (outcome,) = PassContract(FoldLinears(), [lambda: program(both)], SIZES).check()
    one, other = maps(outcome)
    assert one.args[-2:] == (other.args[-2], "out") and other.args[-1] == "x"
    module = outcome.program.graph_module
    assert torch.equal(*(getattr(module, str(n.args[1].target)) for n in (one, other)))  # type: ignore[union-attr]


def large(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
    return forward(graph, forward(graph, x, "down", DOWN), "up", UP)


def used_twice(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
    inner = forward(graph, x, "square", SQUARE)
    tail = call(graph, aten.tanh.default, inner)
    return call(graph, aten.cat.default, [forward(graph, inner, "down", DOWN), tail], 1)


def scaled_used_twice(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
    half = call(graph, aten.mul.Tensor, x, 0.5)
    return call(graph, aten.cat.default, [forward(graph, half, "down", DOWN), half], 1)


def of_each_row(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
    inner = forward(graph, x, "square", SQUARE)
    return graph.call_function(ops.linear, (inner, x, None, EACH, "out"))


def of_integers(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
    stored = call(graph, aten.round.default, graph.get_attr("down"))
    weight = call(graph, ops.dequantize, call(graph, aten._to_copy.default, stored), graph.get_attr("down2"))
    return graph.call_function(ops.linear, (forward(graph, x, "square", SQUARE), weight, None, DOWN, "out"))


REFUSED: dict[str, tuple[Build, str, str]] = {
    "more work": (large, "linear-of-linear", "one map would cost 128 FLOPs for each row, where the two cost 128"),
    "a second user": (used_twice, "linear-of-linear", "linear_default is also used by tanh_default, outside the match"),
    "a second user of a product": (scaled_used_twice, "scaled-operand", "cat_default needs the scaled value too"),
    "weights of each row": (of_each_row, "linear-of-linear", "its weights are not constants shared by all rows"),
    "integers": (of_integers, "linear-of-linear", "its weights are stored as integers, and folded they would not be"),
    "other segments": (
        lambda g, x, _: forward(g, forward(g, x, "square", SQUARE), "other", OTHER),
        "linear-of-linear",
        "4x0e+4x1o is read as 2x0e+2x0e+4x1o",
    ),
    "other rows": (
        lambda g, x, y: call(g, aten.add.Tensor, forward(g, x, "down", DOWN), forward(g, y, "mix", MIX)),
        "sum-of-linears",
        "the maps read different rows",
    ),
    "other layouts": (
        lambda g, x, _: call(g, aten.add.Tensor, forward(g, x, "down", DOWN), forward(g, x, "other", OTHER)),
        "sum-of-linears",
        "the maps have different layouts, 4x0e+4x1o and 2x0e+2x0e+4x1o",
    ),
    "a tensor": (
        lambda g, x, y: call(g, aten.mul.Tensor, forward(g, x, "down", DOWN), y),
        "scaled-result",
        "number of mul_tensor is g, not a literal",
    ),
    "zero": (
        lambda g, x, _: call(g, aten.div.Tensor, forward(g, x, "down", DOWN), 0),
        "scaled-result",
        "the number, or one over it, is not finite",
    ),
    "infinity": (
        lambda g, x, _: forward(g, call(g, aten.mul.Tensor, x, float("inf")), "down", DOWN),
        "scaled-operand",
        "the number, or one over it, is not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_is_reported_with_the_reason(name: str) -> None:
    build, rule, reason = REFUSED[name]
    outcome = FoldLinears().apply(program(build))
    assert not outcome.modified
    assert (rule, reason) in [(r.rule, r.reason) for r in outcome.refusals]
    assert all(r.nodes for r in outcome.refusals)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_16_bits_stay(dtype: torch.dtype) -> None:
    for name, (build, _) in FOLDS.items():
        outcome = FoldLinears().apply(program(build, dtype))
        assert not outcome.modified, name
        assert any("16 bits" in r.reason for r in outcome.refusals), name


def test_a_returned_map_stays() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        inner = forward(graph, x, "square", SQUARE)
        return {"inner": inner, "y": forward(graph, inner, "down", DOWN)}

    outcome = FoldLinears().apply(build_program(body, [X], {"square": numbers(32), "down": numbers(16)}))
    assert not outcome.modified
    assert [r.reason for r in outcome.refusals] == ["linear_default is also used by output, outside the match"]


def small_potential() -> Program:
    """Edge vectors, scaled, mapped twice, squared and summed: an energy for each graph."""
    spec = str(Linear("1x1o", "3x1o", (LinearPath(0, 0, 0, 0.7),), 3, True))
    again = str(Linear("3x1o", "2x1o", (LinearPath(0, 0, 0, 0.3),), 6, True))
    vectors = TensorSpec("edge_vectors", ("edges", 3), F64, "1x1o", properties=frozenset({"edge_vector"}))

    def body(graph: fx.Graph, r: fx.Node) -> dict[str, fx.Node]:
        up = forward(graph, call(graph, aten.div.Tensor, r, 2.5), "up", spec)
        down = call(graph, aten.div.Tensor, forward(graph, up, "down", again), 38.5)
        total = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, down, down), [0, 1])
        return {"energy": call(graph, aten.view.default, total, [1])}

    return build_program(body, [vectors], {"up": numbers(3), "down": numbers(6)})


def test_forces_are_the_same_folded_before_and_after_differentiation() -> None:
    sizes = ({"atoms": 3, "edges": 7, "graphs": 1}, {"atoms": 1, "edges": 0, "graphs": 1})
    early, late = PassContract(
        FoldLinears(), [small_potential, lambda: Differentiate().apply(small_potential()).program], sizes
    ).check()
    assert len(maps(early)) == 1 and len(maps(late)) == 2
    forces = [Differentiate().apply(p).program for p in (small_potential(), early.program)] + [late.program]
    for size in sizes:
        inputs = example_inputs(forces[0], size)
        expected, *found = (run_program(p, inputs) for p in forces)
        for other in found:
            for name in expected:
                torch.testing.assert_close(other[name], expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.mace
@pytest.mark.slow
def test_a_mace_model_keeps_its_energies_and_forces() -> None:
    from mace_models import VARIANTS, build

    passes = "fold-constants,fold-linears,differentiate,fold-linears,dead-code"
    model = build(**VARIANTS["agnostic"] | {"hidden": "2x0e+2x1o", "l_max": 1})
    optimised = fxpass.optimize(model, passes)
    early, late = (record for record in optimised.report.records if record.name == "fold-linears")
    rules = {a.rule for a in (*early.applications, *late.applications)}
    assert {"scaled-result", "scaled-operand", "linear-of-linear"} <= rules
    receipt = optimised.report.receipt
    assert receipt is not None and receipt.passed and receipt.dtype == "float64"


@pytest.mark.mace
def test_numbers_of_neighbours_fold_in_the_alloy_model(alloy_model_path: Path) -> None:
    from fxpass.frontends.mace import MaceFrontend

    frontend = MaceFrontend()
    captured = frontend.capture(frontend.load(str(alloy_model_path)).double())
    (outcome,) = PassContract(FoldLinears(), [lambda: captured], SIZES[:2]).check()
    folded = {a.module for a in outcome.applications if a.rule == "scaled-result"}
    assert {"interactions.0", "interactions.1"} <= folded
