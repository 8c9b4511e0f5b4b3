"""What a semantic op is: a ``torch.library`` op in the namespace ``fxpass``, and its row of the semantics table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .._torch_compat import size_expr

_LIBRARY = torch.library.Library("fxpass", "DEF")


def define(schema: str, *tags: torch.Tag) -> None:
    """Declare an op of the namespace ``fxpass``."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))


def owned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference may return a view of its input (an identity slice); an op's results never alias one."""

    def run(*args: Any) -> Any:
        value = function(*args)
        own = tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors(value))
        return own if isinstance(value, tuple) else own[0]

    return run


def tensors(value: object) -> tuple[Tensor, ...]:
    """The tensors of a result, which may be one tensor or a tuple of them."""
    return tuple(v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor))


@dataclass(frozen=True)
class SemanticOp:
    """One row of the semantics table.

    Attributes:
        name: op name without namespace.
        reference: plain PyTorch implementation with the op's arguments.
        summary: node -> short description for people, in place of the full spec.
        cost: node -> (FLOPs, bytes moved) as sympy expressions in the shape symbols of ``meta["val"]``.
        irreps: node -> irreps of the result's last dimension (None where the result carries weights); where the op
            has several results, it is asked about each node that takes one of them by ``operator.getitem``.
        operands: node -> slot name -> (operand node, irreps that the spec demands of it).
    """

    name: str
    reference: Callable[..., Any]
    summary: Callable[[fx.Node], str]
    cost: Callable[[fx.Node], tuple[sympy.Expr, sympy.Expr]]
    irreps: Callable[[fx.Node], str | None]
    operands: Callable[[fx.Node], dict[str, tuple[fx.Node, str | None]]]


def slots(node: fx.Node, demanded: dict[str, str]) -> dict[str, tuple[fx.Node, str | None]]:
    """Operands of a multilinear op by slot, leading arguments being the slots in order."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = zip(names, node.args, strict=False)
    return {name: (a, demanded[name]) for name, a in given if isinstance(a, fx.Node) and name in demanded}


def numel(value: Tensor) -> sympy.Expr:
    return reduce(operator.mul, map(size_expr, value.shape), sympy.Integer(1))


def moved(node: fx.Node) -> sympy.Expr:
    """Bytes of all tensor operands and of the results: what a perfect kernel moves at least."""
    values = [v for n in (*node.all_input_nodes, node) for v in tensors(n.meta.get("val"))]
    return sum((numel(v) * v.element_size() for v in values), sympy.Integer(0))


def rows_of(node: fx.Node, *, skip: Sequence[int] = ()) -> sympy.Expr:
    first = next(a for k, a in enumerate(node.args) if isinstance(a, fx.Node) and k not in skip)
    return size_expr(first.meta["val"].shape[0])


def no_operands(node: fx.Node) -> dict[str, tuple[fx.Node, str | None]]:
    return {}


def no_summary(node: fx.Node) -> str:
    return ""


def no_cost(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    return sympy.Integer(0), sympy.Integer(0)


def no_irreps(node: fx.Node) -> str | None:
    return None
