"""The tests of a plugin's author: the contract that every pass is held to, and what this one does and does not do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fxpass_plugin_example import FuseScalarMultiplies
from torch import fx

from fxpass.ir.program import Program, TensorSpec
from fxpass.testing import PassContract, derive_values

aten = torch.ops.aten
Factors = tuple[float, ...]


def scaled(dtype: torch.dtype, *factors: float) -> Program:
    """``x * factors[0] * factors[1] ...`` on one value for each atom."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for factor in factors:
        node = graph.call_function(aten.mul.Tensor, (node, factor))
    graph.output((node,))
    inputs, outputs = (TensorSpec("x", ("atoms",), dtype),), (TensorSpec("y", ("atoms",), dtype),)
    return derive_values(Program(fx.GraphModule(torch.nn.Module(), graph), inputs, outputs))


def factors_of(program: Program) -> list[float]:
    return [node.args[1] for node in program.graph.nodes if node.target is aten.mul.Tensor]


def test_keeps_the_contract() -> None:
    programs = [partial(scaled, torch.float32, 2.0, 3.0, 0.1), partial(scaled, torch.float64, 0.1)]
    merged, alone = PassContract(FuseScalarMultiplies(), programs).check()
    assert merged.modified
    assert not alone.modified


@pytest.mark.parametrize(
    ("factors", "left"),
    [((2.0, 3.0), [6.0]), ((2.0, 3.0, 0.5, -1), [-3.0]), ((2.0,), [2.0]), ((2.0, 1e38, 10.0, 3.0), [2e38, 30.0])],
)
def test_merges(factors: Factors, left: list[float]) -> None:
    program = scaled(torch.float32, *factors)
    outcome = FuseScalarMultiplies().apply(program.copy())
    assert factors_of(outcome.program) == left
    assert outcome.modified == (len(left) < len(factors))
    x = torch.linspace(-1, 1, 7) / 8
    assert torch.allclose(outcome.program.graph_module(x)[0], program.graph_module(x)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "factors", "reason"),
    [
        (torch.int64, (2, 0.5), "not floating point"),
        (torch.float32, (1e-30, 1e-30), "not a normal number"),
        (torch.float16, (1000.0, 1000.0), "not a normal number"),
        (torch.float32, (0.0, float("inf")), "not a normal number"),
    ],
)
def test_refuses(dtype: torch.dtype, factors: Factors, reason: str) -> None:
    outcome = FuseScalarMultiplies().apply(scaled(dtype, *factors))
    assert not outcome.modified
    (refusal,) = outcome.refusals
    assert reason in refusal.reason
    assert "x" in refusal.nodes


def test_leaves_what_is_needed_elsewhere() -> None:
    program = scaled(torch.float32, 2.0, 3.0)
    (returned,) = program.graph.output_node().args[0]
    program.graph.output_node().args = ((returned, returned.args[0]),)
    outcome = FuseScalarMultiplies().apply(program)
    assert factors_of(outcome.program) == [2.0, 3.0]
    assert "also used by" in outcome.refusals[0].reason
