"""Whether a program depends on the order of its edges: what ``sort-edges`` has to know.

Every op that edges go into must treat them alike: give each row of its result from the same row of its operands, or
sum over rows.  A program of such ops gives permuted rows for permuted edges, and the same sums up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxpass.ir import ops
from fxpass.ir.program import Program
from fxpass.rewrite import arguments

#: sums and the like, over rows or within them, and products of matrices
_REDUCTIONS = {"sum", "mean", "amax", "amin", "prod", "any", "all", "linalg_vector_norm", "logsumexp", "_softmax"}
_PRODUCTS = {"mm", "bmm", "addmm", "matmul", "mv", "dot", "linear"}
#: ops that move no rows past each other
_STILL = {
    *("unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "stack"),
    *("clone", "detach", "alias", "_to_copy"),
}
#: ops along one dimension, which rows must not lie along
_ALONG = {
    *("select", "narrow", "split", "split_with_sizes", "unbind", "cat", "flip", "cumsum", "cumprod", "sort", "argsort"),
    *("index_select", "gather", "argmax", "argmin", "max", "min", "topk", "slice"),
}
_REGROUPS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_SUMS_INTO = {"index_add", "scatter_add"}
_FILLED = {"zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full"}


def order_matters(program: Program, edges: fx.Node) -> tuple[str, fx.Node] | None:
    """Why results depend on the order of edges, and the node where they do; None where they do not.

    Args:
        edges: an input of which the first dimension is that of the edges.
    """
    count = str(edges.meta["val"].shape[0])

    def axes(value: Any) -> tuple[int, ...]:
        """The dimensions of a node that run over edges."""
        shape = value.meta["val"].shape if isinstance(value, fx.Node) and _is_tensor(value) else ()
        return tuple(k for k, size in enumerate(shape) if str(size) == count)

    for node in program.graph.nodes:
        touched = node.op == "call_function" and (axes(node) or any(map(axes, _tensors(node))))
        if touched and (reason := _reason(node, axes)):
            return reason, node
    return None


def _reason(node: fx.Node, axes: Callable[[Any], tuple[int, ...]]) -> str | None:
    target: Any = node.target
    if target is operator.getitem:
        return None  # of several results, whose maker was looked at
    name = str(getattr(getattr(target, "overloadpacket", target), "__name__", target))
    if len(axes(node)) > 1:
        return "it makes a row for each pair of edges"
    if target is ops.gather or target is ops.scatter_sum:
        x = node.args[0] if target is ops.gather else node
        return "it reads, or sums into, rows of edges by their numbers" if 0 in axes(x) else None
    if target in ops.SEMANTIC or name in _REDUCTIONS | _PRODUCTS | _STILL | _FILLED or name.startswith("sym_"):
        return None
    if name.endswith("_like") and not name.startswith("rand"):
        return None
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return None
    given = arguments(node)
    if name in _ALONG:
        return _along(name, given, axes)
    if name in _REGROUPS:
        before, after = (list(_behind(n, axes)) for n in (given["self"], node))
        return None if before == after else "it regroups rows of edges"
    if name in _SUMS_INTO:
        return "it sums into rows of edges by their numbers" if given["dim"] in axes(given["self"]) else None
    if name == "index":
        read = [k for k, index in enumerate(given["indices"]) if index is not None]
        return "it reads rows of edges by their numbers" if set(read) & set(axes(given["self"])) else None
    return "it is not known to treat all edges alike"


def _along(name: str, given: dict[str, Any], axes: Callable[[Any], tuple[int, ...]]) -> str | None:
    operands = [v for v in (given.get("self"), *(given.get("tensors") or ())) if isinstance(v, fx.Node)]
    for operand in operands:
        dims = operand.meta["val"].dim()
        along = given.get("dim")
        if along is not None and along % max(dims, 1) not in axes(operand):
            continue
        if along is None and not axes(operand):
            continue
        if name == "slice" and given["start"] in (None, 0) and given["end"] in (None, (1 << 63) - 1):
            continue
        return f"it works along the list of edges: {name}"
    return None


def _behind(node: Any, axes: Callable[[Any], tuple[int, ...]]) -> Iterator[Any]:
    """How many numbers each edge has behind it, in memory, for each dimension of edges."""
    for axis in axes(node):
        yield str(prod(node.meta["val"].shape[axis + 1 :]))


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if _is_tensor(n)]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
