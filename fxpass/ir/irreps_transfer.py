"""How irreps pass through ops: a table of transfer functions over the last dimension.

``None`` means unknown, and is always allowed: a view that splits channels from components has no
irreps of its own.  A contradiction that is certain (vectors added to scalars, a nonlinearity on
vectors) is an error.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..algebra.irreps import dim, join, same, scalars_only, slice_irreps
from .ops import SEMANTIC

aten = torch.ops.aten

KEEP = frozenset(
    {
        aten.neg.default,
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.index_select.default,
        aten.zeros_like.default,
    }
)
SUM = frozenset({aten.add.Tensor, aten.sub.Tensor})
SCALE = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar})
#: functions that commute with rotations on scalars only; an even or odd one may flip parity
NONLINEAR = frozenset(
    {
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.exp.default,
        aten.sin.default,
        aten.cos.default,
        aten.relu.default,
        aten.gelu.default,
        aten.softplus.default,
        aten.reciprocal.default,
        aten.log.default,
        aten.sqrt.default,
    }
)

Result = tuple[str | None, str | None]


def transfer(node: fx.Node) -> Result:
    """``(irreps of the result or None, complaint or None)`` of a node whose inputs are derived."""
    if node.op != "call_function":
        return None, None
    target: Any = node.target
    value = node.meta.get("val")
    if target is operator.getitem:
        source: Any = node.args[0]
        return (SEMANTIC[source.target].irreps(node) if source.target in SEMANTIC else None), None
    if not isinstance(value, torch.Tensor):
        return None, (_mismatch(node) if target in SEMANTIC else None)
    if target in SEMANTIC:
        return _semantic(node), _mismatch(node)
    args = [a for a in node.args if isinstance(a, fx.Node)]
    irreps = [a.meta.get("irreps") for a in args]
    if not irreps:
        return None, None
    if target in KEEP:
        return irreps[0], None
    if target in SUM:
        return _sum(node, args, irreps)
    if target in SCALE:
        return _scale(value, args, irreps)
    if target in NONLINEAR:
        if irreps[0] is not None and not scalars_only(irreps[0]):
            return None, f"{target} is applied to {irreps[0]}, which is not scalar"
        # a nonlinearity of an odd scalar may have either parity, or none
        return irreps[0] if irreps[0] is not None and same(irreps[0], f"{dim(irreps[0])}x0e") else None, None
    if target is aten.cat.default:
        return _cat(node, value), None
    if target is aten.slice.Tensor and irreps[0] is not None:
        axis, start = (*node.args[1:], 0, 0)[:2]
        rank = value.dim()
        if axis in (-1, rank - 1):
            width = value.shape[-1]
            known = isinstance(start, int) and start >= 0 and isinstance(width, int)
            return (slice_irreps(irreps[0], start, start + width) if known else None), None  # type: ignore[operator, arg-type]
        return irreps[0], None
    return None, None


def _semantic(node: fx.Node) -> str | None:
    irreps = SEMANTIC[node.target].irreps(node)  # type: ignore[index]
    return irreps


def _mismatch(node: fx.Node) -> str | None:
    """Operands of a semantic op whose known irreps contradict the op's spec."""
    for slot, (operand, expected) in SEMANTIC[node.target].operands(node).items():  # type: ignore[index]
        known = operand.meta.get("irreps")
        if known is not None and expected is not None and not same(known, expected):
            return f"operand {slot} is {known}, the op expects {expected}"
    return None


def _broadcasts(x: fx.Node) -> bool:
    """A tensor without a feature dimension of its own: a number, or one value per row."""
    value = x.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dim() < 2 or value.shape[-1] == 1)


def _sum(node: fx.Node, args: list[fx.Node], irreps: list[str | None]) -> Result:
    if len(args) < 2:
        only = irreps[0]
        if only is not None and not scalars_only(only):
            return None, f"a number is added to {only}"
        return only, None
    a, b = irreps[0], irreps[1]
    if a is not None and b is not None and not same(a, b):
        if dim(a) == dim(b):
            return None, f"{a} is added to {b}"
        return None, None
    known = a if a is not None else b
    return (known if not any(map(_broadcasts, args)) or known is None or scalars_only(known) else None), None


def _scale(value: torch.Tensor, args: list[fx.Node], irreps: list[str | None]) -> Result:
    if len(args) == 1:
        return irreps[0], None
    wide = [(a, i) for a, i in zip(args, irreps, strict=True) if not _broadcasts(a)]
    if len(wide) == 1:
        return wide[0][1], None
    known = [i for i in irreps if i is not None]
    if len(known) == len(args) and all(same(i, f"{dim(i)}x0e") for i in known):
        return known[0], None
    return None, None


def _cat(node: fx.Node, value: torch.Tensor) -> str | None:
    parts = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    irreps = [p.meta.get("irreps") for p in parts]  # type: ignore[union-attr]
    if axis in (-1, value.dim() - 1) and all(irreps):
        return join(*(i for i in irreps if i))
    if axis == 0 and value.dim() > 1 and all(irreps) and len(set(irreps)) == 1:
        return irreps[0]
    return None
