"""Rules: matching, refusals, the best partial match, the driver."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch.testing import FileCheck

from fxpass.errors import PassError, UsageError
from fxpass.ir.metadata import Provenance, provenance, set_provenance
from fxpass.ir.program import Program, TensorSpec
from fxpass.rewrite import (
    Lit,
    Match,
    OneOf,
    Op,
    PartialMatch,
    Rule,
    Shared,
    Var,
    apply_rules,
    arguments,
    escapes,
    match,
    refuse,
)
from fxpass.testing import build_program, example_inputs, graph_text, run_program

pytestmark = pytest.mark.once

aten = torch.ops.aten
X = TensorSpec("x", ("atoms", 3), torch.float64)
W = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.25]], dtype=torch.float64)
SIZES = {"atoms": 5}


def node(program: Program, target: Any) -> fx.Node:
    (found,) = program.graph.find_nodes(op="call_function", target=target)
    return found


def scaled_product(scale: object = 2.0, **outputs: str) -> Program:
    """mul(mm(x, w), scale); ``also`` names a node that is returned as well."""

    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        nodes = {"x": x, "w": graph.get_attr("w")}
        nodes["mm"] = graph.call_function(aten.mm.default, (x, nodes["w"]))
        nodes["y"] = graph.call_function(aten.mul.Tensor, (nodes["mm"], nodes["mm"] if scale == "mm" else scale))
        return {"y": nodes["y"]} | {name: nodes[which] for name, which in outputs.items()}

    return build_program(body, [X], {"w": W})


SCALED = Op(aten.mul.Tensor, Op(aten.mm.default, Var("x"), Var("w")), Lit("scale", lambda value: value != 1))


# --- patterns


def test_match_binds_nodes_and_literals() -> None:
    program = scaled_product()
    found = match(SCALED, node(program, aten.mul.Tensor))
    assert isinstance(found, Match)
    assert found.bindings["x"] is program.placeholders["x"]
    assert found.bindings["w"].target == "w"
    assert found.bindings["scale"] == 2.0
    assert found.nodes == (node(program, aten.mul.Tensor), node(program, aten.mm.default))


def test_no_match_at_another_root() -> None:
    program = scaled_product()
    assert match(SCALED, node(program, aten.mm.default)) is None
    assert match(Op((aten.add.Tensor, aten.sub.Tensor), ...), node(program, aten.mul.Tensor)) is None


def test_partial_match_says_where_and_why() -> None:
    program = scaled_product(scale=1)
    found = match(SCALED, node(program, aten.mul.Tensor))
    assert isinstance(found, PartialMatch)
    assert (found.matched, found.node) == (2, node(program, aten.mul.Tensor))
    assert found.reason == "scale of mul_tensor is 1"


def test_partial_match_needs_a_second_node() -> None:
    program = scaled_product()
    assert match(Op(aten.mul.Tensor, Op(aten.sin.default, Var("x")), ...), node(program, aten.mul.Tensor)) is None


def test_the_deepest_alternative_is_reported() -> None:
    program = scaled_product()
    shallow = Op(aten.mul.Tensor, Op(aten.sin.default, Var("x")), ...)
    deep = Op(aten.mul.Tensor, Op(aten.mm.default, Op(aten.cos.default, Var("x")), ...), ...)
    found = match(OneOf(shallow, deep, shallow), node(program, aten.mul.Tensor))
    assert isinstance(found, PartialMatch)
    assert found.reason == "x is x, not aten.cos.default"


def test_one_name_binds_one_node() -> None:
    square = Op(aten.mul.Tensor, Var("a"), Var("a"))
    assert isinstance(match(square, node(scaled_product(scale="mm"), aten.mul.Tensor)), Match)

    def product(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        sine, cosine = (graph.call_function(op, (x,)) for op in (aten.sin.default, aten.cos.default))
        return {"y": graph.call_function(aten.mul.Tensor, (sine, cosine))}

    program = build_program(product, [X])
    assert match(square, node(program, aten.mul.Tensor)) is None
    both = Op(aten.mul.Tensor, Op(aten.sin.default, Var("a")), Op(aten.cos.default, Var("a")))
    assert isinstance(match(both, node(program, aten.mul.Tensor)), Match)


def test_backtracking_over_alternatives_below_the_root() -> None:
    """The first alternative binds ``a`` to the sine, which the second argument contradicts."""

    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        sine = graph.call_function(aten.sin.default, (x,))
        product = graph.call_function(aten.mul.Tensor, (sine, x))
        return {"y": graph.call_function(aten.add.Tensor, (product, x))}

    inner = OneOf(Op(aten.mul.Tensor, Var("a"), Var("b")), Op(aten.mul.Tensor, Var("b"), Var("a")))
    program = build_program(body, [X])
    found = match(Op(aten.add.Tensor, inner, Var("a")), node(program, aten.add.Tensor))
    assert isinstance(found, Match)
    assert found.bindings["a"] is program.placeholders["x"]
    assert found.bindings["b"] is node(program, aten.sin.default)


def test_names_of_the_other_alternative_are_none() -> None:
    pattern = OneOf(Op(aten.mul.Tensor, Var("x"), Lit("s")), Op(aten.mul.Tensor, Var("x"), Var("y")))
    found = match(pattern, node(scaled_product(), aten.mul.Tensor))
    assert isinstance(found, Match)
    assert found.bindings["s"] == 2.0
    assert found.bindings["y"] is None


def test_arguments_go_by_schema_and_defaults() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        one = graph.call_function(aten.add.Tensor, (), {"self": x, "other": x, "alpha": 1})
        two = graph.call_function(aten.add.Tensor, (x, x), {"alpha": 2})
        return {"one": one, "two": two}

    one, two = build_program(body, [X]).results.values()
    assert arguments(one) == {"self": one.kwargs["self"], "other": one.kwargs["other"], "alpha": 1}
    assert isinstance(match(Op(aten.add.Tensor, Var("x"), Var("x")), one), Match)
    assert match(Op(aten.add.Tensor, Var("x"), Var("x")), two) is None, "alpha is not the default"
    assert isinstance(match(Op(aten.add.Tensor, Var("x"), ...), two), Match)
    assert isinstance(match(Op(aten.add.Tensor, other=Var("x"), alpha=2, self=Var("x")), two), Match)


def test_lists_builtins_predicates_and_bound_ops() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        parts = graph.call_function(aten.split.Tensor, (x, 1, 1))
        first, second = (graph.call_function(operator.getitem, (parts, i)) for i in (0, 1))
        return {"y": graph.call_function(aten.cat.default, ([first, second], 1))}

    program = build_program(body, [X])
    split = Shared(Op(lambda n: n.target is aten.split.Tensor, Var("x"), ...))
    item = Op(operator.getitem, split, Lit("i"))
    pattern = Op(aten.cat.default, [item, Var("second", Op(operator.getitem, split, 1))], 1)
    found = match(pattern, node(program, aten.cat.default))
    assert isinstance(found, Match)
    assert found.bindings["i"] == 0
    assert found.bindings["second"].args[1] == 1
    assert match(Op(aten.cat.default, [item], ...), node(program, aten.cat.default)) is None


def test_a_node_used_elsewhere_must_be_shared() -> None:
    program = scaled_product(also="mm")
    root = node(program, aten.mul.Tensor)
    found = match(SCALED, root)
    assert isinstance(found, PartialMatch)
    assert found.node is node(program, aten.mm.default)
    assert found.reason == "mm_default is also used by output, outside the match"
    shared = Op(aten.mul.Tensor, Shared(Op(aten.mm.default, Var("x"), Var("w"))), Lit("scale"))
    assert isinstance(match(shared, root), Match)


# --- rules


def scale_the_weight(m: Match, program: Program, builder: Any, *, x: fx.Node, w: fx.Node, scale: float) -> fx.Node:
    scaled = builder.constant("scaled", program.graph_module.get_buffer(str(w.target)) * scale)
    return builder.call(aten.mm.default, x, scaled)


def weights_only(m: Match, program: Program, *, x: fx.Node, w: fx.Node, scale: float) -> Any:
    return None if w.op == "get_attr" else refuse("the second factor is no weight", w)


RULE = Rule("scale-weight", SCALED, weights_only, scale_the_weight)


def test_rule_knows_where_it_was_declared() -> None:
    file, line = RULE.origin.rsplit(":", 1)
    with open(file, encoding="utf-8") as source:
        assert source.readlines()[int(line) - 1].startswith("RULE = Rule(")


@pytest.mark.parametrize(
    ("pattern", "check", "replace", "message"),
    [
        (Var("x"), None, lambda m, p, b, *, x: x, "matches at any node"),
        (OneOf(SCALED, Var("x")), None, lambda m, p, b, **names: None, "matches at any node"),
        (SCALED, lambda m, p, *, x: None, scale_the_weight, "check of rule 'broken' does not take"),
        (SCALED, None, lambda m, p, b, *, x, w: x, "replace of rule 'broken' does not take"),
    ],
)
def test_rule_that_cannot_work_is_refused_when_declared(pattern: Any, check: Any, replace: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule("broken", pattern, check, replace)


# --- driver


def test_apply_rules_rewrites_inherits_provenance_and_counts() -> None:
    program = scaled_product()
    x = example_inputs(program, SIZES)
    expected = run_program(program, x)["y"]
    set_provenance(node(program, aten.mul.Tensor), Provenance("layers.0", "model.py:7", backward=True))

    outcome = apply_rules(program, [RULE], made_by="test-pass")

    assert outcome.modified
    (application,) = outcome.applications
    assert (application.rule, application.node, application.module) == ("scale-weight", "mul_tensor", "layers.0")
    assert (application.removed, application.added) == (3, 2), "mul, mm and w go; mm and the new weight come"
    (statistics,) = outcome.statistics
    assert (statistics.tried, statistics.matched, statistics.applied) == (1, 1, 1)
    for new in (node(program, aten.mm.default), *program.graph.find_nodes(op="get_attr", target="scaled")):
        assert provenance(new) == Provenance("layers.0", "model.py:7", backward=True, made_by="test-pass")
    program.graph.lint()
    FileCheck().check_not("aten.mul").check("%scaled = weight f64[3, 2]").check("aten.mm.default(%x, %scaled)").run(
        graph_text(program)
    )
    torch.testing.assert_close(run_program(program, x)["y"], expected)


def test_refused_check_is_reported_with_nodes() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        square = graph.call_function(aten.t.default, (x,))
        product = graph.call_function(aten.mm.default, (x, square))
        return {"y": graph.call_function(aten.mul.Tensor, (product, 3.0))}

    program = build_program(body, [X])
    set_provenance(node(program, aten.mul.Tensor), Provenance("readout"))
    outcome = apply_rules(program, [RULE], made_by="test-pass")
    assert not outcome.modified and not outcome.applications
    (refusal,) = outcome.refusals
    assert (refusal.rule, refusal.reason) == ("scale-weight", "the second factor is no weight")
    assert refusal.nodes == ("mul_tensor", "t_default")
    assert refusal.module == "readout"


def test_partial_match_is_reported_as_refusal() -> None:
    outcome = apply_rules(scaled_product(also="mm"), [RULE], made_by="test-pass")
    (refusal,) = outcome.refusals
    assert refusal.nodes == ("mul_tensor", "mm_default")
    assert refusal.reason == "mm_default is also used by output, outside the match"


def chain(*ops: Any) -> Program:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        for op in ops:
            x = graph.call_function(op, (x,))
        return {"y": x}

    return build_program(body, [X])


DOUBLE_NEGATION = Rule(
    "double-negation",
    Op(aten.neg.default, Op(aten.neg.default, Var("x"))),
    None,
    lambda match, program, builder, *, x: x,
)


def test_rewrites_until_nothing_fires() -> None:
    program = chain(*[aten.neg.default] * 5, aten.sin.default)
    outcome = apply_rules(program, [DOUBLE_NEGATION], made_by="test-pass")
    assert len(outcome.applications) == 2
    assert len(program.graph.find_nodes(op="call_function", target=aten.neg.default)) == 1
    assert not apply_rules(program, [DOUBLE_NEGATION], made_by="test-pass").modified


def test_first_rule_wins_and_later_ones_see_the_result() -> None:
    to_cos = Rule("sin", Op(aten.sin.default, Var("x")), None, lambda m, p, b, *, x: b.call(aten.cos.default, x))
    to_exp = Rule("cos", Op(aten.cos.default, Var("x")), None, lambda m, p, b, *, x: b.call(aten.exp.default, x))
    outcome = apply_rules(chain(aten.sin.default), [to_cos, to_exp], made_by="test-pass")
    assert [a.rule for a in outcome.applications] == ["sin", "cos"]


def test_dead_nodes_are_left_alone() -> None:
    program = chain(aten.neg.default)
    with program.graph.inserting_before(program.graph.output_node()):
        program.graph.call_function(aten.neg.default, (node(program, aten.neg.default),))
    assert not apply_rules(program, [DOUBLE_NEGATION], made_by="test-pass").modified


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (lambda m, p, b, *, x: b.call(aten.relu.default, m.root), "reads the root it replaces"),
        (lambda m, p, b, *, x: m.root, "cannot take over"),
        (lambda m, p, b, *, x: None, "cannot take over"),
    ],
)
def test_replacement_that_cannot_take_over(replace: Any, message: str) -> None:
    rule = Rule("broken", Op(aten.sin.default, Var("x")), None, replace)
    with pytest.raises(PassError, match=message) as caught:
        apply_rules(chain(aten.sin.default), [rule], made_by="test-pass")
    assert caught.value.where.source == rule.origin


def test_endless_rule_is_named() -> None:
    def flip(match: Match, program: Program, builder: Any, *, x: fx.Node) -> fx.Node:
        return builder.call(aten.cos.default if match.root.target is aten.sin.default else aten.sin.default, x)

    endless = Rule("flip", Op((aten.sin.default, aten.cos.default), Var("x")), None, flip)
    program = chain(aten.neg.default, aten.neg.default, aten.sin.default)
    with pytest.raises(PassError, match=r"rule 'flip' keeps firing: 20 applications") as caught:
        apply_rules(program, [DOUBLE_NEGATION, endless], made_by="test-pass", limit=20)
    assert caught.value.where.source == endless.origin
    assert caught.value.where.pass_name == "test-pass"


def test_replaced_random_op_goes_and_unrelated_ones_stay() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        graph.call_function(aten.rand_like.default, (x,))
        noise = graph.call_function(aten.bernoulli.default, (x,))
        return {"y": graph.call_function(aten.add.Tensor, (x, noise))}

    program = build_program(body, [X])
    off = Rule("no-noise", Op(aten.bernoulli.default, Var("x")), None, lambda match, program, builder, *, x: x)
    (application,) = apply_rules(program, [off], made_by="test-pass").applications
    assert application.removed == 1
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        aten.rand_like.default,
        aten.add.Tensor,
    ]


def test_escapes_follows_views_to_the_output() -> None:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        copy = graph.call_function(aten.clone.default, (x,))
        flat = graph.call_function(aten.view.default, (copy, [-1]))
        return {"y": graph.call_function(aten._unsafe_view.default, (flat, [-1, 3]))}

    program = build_program(body, [X])
    assert escapes(node(program, aten.clone.default))
    assert not escapes(node(chain(aten.clone.default, aten.sin.default), aten.clone.default))
