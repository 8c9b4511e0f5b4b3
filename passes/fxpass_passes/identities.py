"""Operations that do nothing, as rules: what ``fold-constants`` removes besides folding.

Each holds for every bit of the result.  ``x + 0`` does not for floats (-0.0 + 0.0 is 0.0), so it is
refused, while ``x - 0`` and ``x + -0.0`` go.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxpass.ir.program import Program
from fxpass.rewrite import Lit, Match, Op, Refused, Rule, Shared, Var, escapes, refuse

aten = torch.ops.aten

VIEWS = (
    *(aten.view.default, aten.expand.default, aten.alias.default, aten.slice.Tensor, aten.permute.default),
    *(aten.t.default, aten.transpose.int, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
RESHAPES = (aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default)  # may copy, unless trivial
COPIES = (
    *(aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other),
)
SUMS = (aten.add.Tensor, aten.add.Scalar)
DIFFERENCES = (aten.sub.Tensor, aten.sub.Scalar)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have the same shape, strides, offset, dtype and device; false where that is not known."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if (x.dtype, x.device, x.layout, x.ndim) != (y.dtype, y.device, y.layout, y.ndim) or x.layout is not torch.strided:
        return False
    sizes = zip((*x.shape, *x.stride(), x.storage_offset()), (*y.shape, *y.stride(), y.storage_offset()), strict=True)
    return all(_same_size(s, t) for s, t in sizes)


def _same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equality that is certain for every size; ``==`` on symbolic sizes would record a guard."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b


def _unchanged(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and same_layout(node, node.args[0])


def unchanged_view(node: fx.Node) -> bool:
    """A view that has the layout of what it views."""
    return node.target in (*VIEWS, *RESHAPES) and _unchanged(node)


def unchanged_copy(node: fx.Node) -> bool:
    """A copy that has the layout of its original, so that no later view can tell them apart."""
    return node.target in COPIES and _unchanged(node)


def undone_view(node: fx.Node) -> bool:
    """A view of a view that has the layout of the original: the same memory, read in the same way."""
    inner = node.args[0] if node.target in VIEWS else None
    return isinstance(inner, fx.Node) and inner.target in VIEWS and same_layout(node, inner.all_input_nodes[0])


def operand(match: Match, program: Program, builder: object, *, x: fx.Node, **literals: object) -> fx.Node:
    return x


def not_returned(match: Match, program: Program, *, x: fx.Node) -> Refused | None:
    if escapes(match.root):
        return refuse(f"{match.root.name} is returned, and its memory belongs to the caller")
    return None


def multiplies_by_one(match: Match, program: Program, *, x: fx.Node, one: float) -> Refused | None:
    return _same_value(match, program, x)


def adds_zero(match: Match, program: Program, *, x: fx.Node, zero: float) -> Refused | None:
    positive = (math.copysign(1, zero) > 0) == (match.root.target in SUMS)
    if positive and same_layout(match.root, x) and x.meta["val"].is_floating_point():
        return refuse("adding 0.0 turns -0.0 into 0.0", x)
    return _same_value(match, program, x)


def _same_value(match: Match, program: Program, x: fx.Node) -> Refused | None:
    if not same_layout(match.root, x):
        return refuse("the result has another shape, dtype or memory layout", x)
    if x.meta["val"].is_complex():
        return refuse("complex arithmetic with a real number may change the sign of a zero", x)
    return not_returned(match, program, x=x)


def differentiated(match: Match, program: Program, *, x: fx.Node) -> Refused | None:
    return refuse("it stops a derivative that is still to be taken") if program.stage != "forces" else None


def _number(value: int) -> Any:
    return lambda literal: isinstance(literal, (int, float)) and literal == value


X = Var("x")
IDENTITIES = (
    Rule("unchanged-view", Op(unchanged_view, X, ...), None, operand),
    Rule("undone-view", Op(undone_view, Shared(Op(VIEWS, X, ...)), ...), None, operand),
    Rule("unchanged-copy", Op(unchanged_copy, X, ...), not_returned, operand),
    Rule("multiply-by-one", Op(PRODUCTS, X, Lit("one", _number(1))), multiplies_by_one, operand),
    Rule("add-zero", Op(SUMS + DIFFERENCES, X, Lit("zero", _number(0))), adds_zero, operand),
    Rule("detach", Op(aten.detach.default, X), differentiated, operand),
)
