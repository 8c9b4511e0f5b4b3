"""The verifier derives again what a pass changed, and nothing else; what a failure ties does not stay tied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxpass.errors import PassError
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.testing import build_program

pytestmark = pytest.mark.once

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    """y = exp(view(2 x + w)), beside z = sin(x)."""

    def build(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        def call(target: Any, *args: Any) -> fx.Node:
            return graph.call_function(target, args)

        added = call(aten.add.Tensor, call(aten.mul.Tensor, x, 2), graph.get_attr("w"))
        return {"y": call(aten.exp.default, call(aten.view.default, added, [-1, 3])), "z": call(aten.sin.default, x)}

    inputs = (TensorSpec("x", ("atoms", 3), torch.float64),)
    built = build_program(build, inputs, {"w": torch.ones(3, dtype=torch.float64)}, stage="energy")
    verify(built)
    return built


def derived(program: Program) -> dict[str, Any]:
    return {n.name: n.meta["derived"] for n in program.graph.nodes if n.op == "call_function"}


def again(program: Program, before: dict[str, Any]) -> set[str]:
    """Nodes that ``verify`` derives again."""
    verify(program)
    return {name for name, what in derived(program).items() if before.get(name) is not what}


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def test_what_did_not_change_is_not_derived_again(program: Program) -> None:
    before = derived(program)
    assert again(program, before) == set()
    assert again(program.copy(), before) == set()


def test_a_change_and_what_depends_on_it_are_derived_again(program: Program) -> None:
    changed, before = program.copy(), derived(program)
    mul = node(changed, "mul_tensor")
    mul.args = (mul.args[0], 3)
    assert again(changed, before) == {"mul_tensor", "add_tensor", "view_default", "exp_default"}


@pytest.mark.parametrize("literal", [2.0, True])
def test_equal_literals_of_other_types_are_changes(program: Program, literal: object) -> None:
    changed, before = program.copy(), derived(program)
    mul = node(changed, "mul_tensor")
    mul.args = (mul.args[0], literal)
    assert "mul_tensor" in again(changed, before)


def test_another_op_on_the_same_values_is_a_change(program: Program) -> None:
    changed, before = program.copy(), derived(program)
    node(changed, "sin_default").target = aten.cos.default
    assert again(changed, before) == {"sin_default"}


def test_other_weights_are_a_change(program: Program) -> None:
    changed = program.copy()
    changed.graph_module.w = torch.nn.Buffer(torch.ones(2, dtype=torch.float64))
    with pytest.raises(PassError, match="does not fit"):
        verify(changed)


def test_a_value_that_a_pass_wrote_is_put_right(program: Program) -> None:
    sin = node(program, "sin_default")
    right, sin.meta["val"] = sin.meta["val"], torch.zeros(1)
    verify(program)
    assert sin.meta["val"] is right


def test_a_size_that_a_broken_copy_ties_stays_free(program: Program) -> None:
    broken = program.copy()
    view = node(broken, "view_default")
    view.args = (view.args[0], [7, 3])
    for _ in range(2):
        with pytest.raises(PassError):
            verify(broken)
    verify(program)
    assert isinstance(node(program, "exp_default").meta["val"].shape[0], torch.SymInt)
