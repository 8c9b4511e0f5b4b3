"""The pass ``fold-linears``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fxpass.algebra.irreps import segments
from fxpass.algebra.multilinear import Linear, parse_linear
from fxpass.ir import ops
from fxpass.ir.program import Program
from fxpass.passes import Exactness, Outcome, Pass
from fxpass.rewrite import Builder, Lit, Match, OneOf, Op, Refused, Rule, Shared, Var, apply_rules, refuse

from .constants import constants, taking_over, weight_name
from .linear_maps import (
    Blocks,
    add_to,
    blocks_of,
    is_quantized,
    joined,
    linear_map,
    operand,
    oriented,
    product,
    reading,
)

aten = torch.ops.aten
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class FoldLinears(Pass):
    """Makes one linear map of linear maps that follow each other, are added, or are scaled by a number.

    Before / After::

        y = div(linear(x, w), 38.5)                 y = linear(x, w)               with smaller coefficients
        y = linear(None, w, div(g, 38.5), "x")      y = linear(None, w, g, "x")    likewise
        y = linear(linear(x, v), w)                 y = linear(x, v_folded)
        y = add(linear(x, v), linear(x, w))         y = linear(x, v_folded)

    Holds when: no one else needs the value that disappears. A number is a finite literal, and numbers have more
    than 16 bits, so that none leaves its range. Weights that are folded into others are constants shared by all
    rows, not stored as integers; maps that follow each other meet in one layout, and cost more than the one that
    takes over; maps that are added read the same rows and have the same layouts.

    Keeps: values up to rounding, interface, gradients with respect to inputs. Weights are folded in float64 and
    rounded once; they become buffers and get no gradient. Numbers go into coefficients, which leaves the weights as
    they are.
    """

    name: ClassVar[str] = "fold-linears"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        done = apply_rules(program, _Folding(program).rules(), made_by=self.name)
        return Outcome(program, done.modified, done.applications, done.refusals)


class _Folding:
    """The rules, and the weights that are known before the program runs."""

    def __init__(self, program: Program) -> None:
        self.constants = constants(program.graph)

    def rules(self) -> tuple[Rule, ...]:
        first, second = Var("first", Op(linear_map, ...)), Var("second", Op(linear_map, ...))
        scaled = Shared(OneOf(*(Op(op, Var("x"), Lit("number", is_number)) for op in (PRODUCTS, QUOTIENTS))))
        result = OneOf(*(Op(op, first, Lit("number", is_number)) for op in (PRODUCTS, QUOTIENTS)))
        return (
            Rule("scaled-result", result, moves_no_range, scale_result),
            Rule("scaled-operand", reading(scaled), needed_scaled, scale_operand),
            Rule("linear-of-linear", reading(first), self.may_compose, self.compose),
            Rule("sum-of-linears", Op(aten.add.Tensor, first, second), self.may_add, self.add),
        )

    def may_compose(self, match: Match, program: Program, *, first: fx.Node) -> Refused | None:
        if refused := self.unknown(match.root, first):
            return refused
        inner, outer = oriented(first), oriented(match.root)
        if segments(inner.irreps_out) != segments(outer.irreps_in):
            return refuse(f"{inner.irreps_out} is read as {outer.irreps_in}", first)
        cost, now = inner.then(outer).flops(), inner.flops() + outer.flops()
        if cost >= now:
            return refuse(f"one map would cost {cost} FLOPs for each row, where the two cost {now}", first)
        return None

    def compose(self, match: Match, program: Program, builder: Builder, *, first: fx.Node) -> fx.Node:
        blocks = product(blocks_of(program, first), blocks_of(program, match.root))
        return self.build(match, builder, oriented(first).then(oriented(match.root)), blocks, first, match.root)

    def may_add(self, match: Match, program: Program, *, first: fx.Node, second: fx.Node) -> Refused | None:
        if refused := self.unknown(first, second):
            return refused
        if operand(first) is not operand(second):
            return refuse("the maps read different rows", first, second)
        one, other = oriented(first), oriented(second)
        for a, b in ((one.irreps_in, other.irreps_in), (one.irreps_out, other.irreps_out)):
            if segments(a) != segments(b):
                return refuse(f"the maps have different layouts, {a} and {b}", first, second)
        return None

    def add(self, match: Match, program: Program, builder: Builder, *, first: fx.Node, second: fx.Node) -> fx.Node:
        blocks = blocks_of(program, first)
        for ends, block in blocks_of(program, second).items():
            add_to(blocks, ends, block)
        return self.build(match, builder, oriented(first), blocks, first, second)

    def unknown(self, *maps: fx.Node) -> Refused | None:
        """Why the weights of ``maps`` cannot be folded into others."""
        for node in maps:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if weight not in self.constants or not parse_linear(str(node.args[-2])).shared:
                return refuse("its weights are not constants shared by all rows", node)
            if is_quantized(weight):
                return refuse("its weights are stored as integers, and folded they would not be", node)
            if weight.meta["val"].dtype != node.meta["val"].dtype or node.meta["val"].dtype.itemsize == 2:
                return refuse("weights of 16 bits are rounded as they are", node)
        return None

    def build(
        self, match: Match, builder: Builder, layout: Linear, blocks: Blocks, first: fx.Node, second: fx.Node
    ) -> fx.Node:
        """The map with ``blocks``; of two transposed maps it is one too, so that it has the forward map's weights."""
        backward = first.args[-1] == second.args[-1] == "x"
        if backward:
            layout, blocks = layout.transposed, {(o, i): block.T for (i, o), block in blocks.items()}
        linear, weights = joined(layout, blocks)
        old, x, value = first.args[1], operand(first), first.meta["val"]
        assert isinstance(old, fx.Node)
        weight = builder.constant(f"{weight_name(first, old)}_folded", weights.to(value.device, value.dtype))
        weight.meta["val"] = old.meta["val"].new_empty(weights.shape)
        self.constants |= {weight}
        args = (None, weight, x, str(linear), "x") if backward else (x, weight, None, str(linear), "out")
        return taking_over(builder.call(ops.linear, *args), match)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def factor(node: fx.Node, number: float) -> float:
    """What a product with, or quotient by, ``number`` multiplies its operand by; NaN for a quotient by zero."""
    if node.target in PRODUCTS:
        return float(number)
    return 1 / number if number else math.nan


def moves_no_range(match: Match, program: Program, *, first: fx.Node, number: float) -> Refused | None:
    return _why_not(match.root, factor(match.root, number))


def scale_result(match: Match, program: Program, builder: Builder, *, first: fx.Node, number: float) -> fx.Node:
    args = (*first.args[:-2], scaled(first, factor(match.root, number)), first.args[-1])
    return taking_over(builder.call(ops.linear, *args), match)


def needed_scaled(match: Match, program: Program, *, x: fx.Node, number: float) -> Refused | None:
    product = operand(match.root)
    for user in product.users:
        if not linear_map(user):
            return refuse(f"{user.name} needs the scaled value too", product)
    return _why_not(match.root, factor(product, number))


def scale_operand(match: Match, program: Program, builder: Builder, *, x: fx.Node, number: float) -> fx.Node:
    root = match.root
    spec = scaled(root, factor(operand(root), number))
    args = [x if a is operand(root) else a for a in root.args[:-2]]
    return taking_over(builder.call(ops.linear, *args, spec, root.args[-1]), match)


def scaled(node: fx.Node, by: float) -> str:
    """The spec of a map with coefficients multiplied by a number."""
    linear = parse_linear(str(node.args[-2]))
    return str(linear.keep(tuple(replace(p, coefficient=p.coefficient * by) for p in linear.paths)))


def _why_not(node: fx.Node, by: float) -> Refused | None:
    if not math.isfinite(by):
        return refuse("the number, or one over it, is not finite")
    if node.meta["val"].dtype.itemsize == 2:
        return refuse("numbers of 16 bits could leave their range")
    return None
