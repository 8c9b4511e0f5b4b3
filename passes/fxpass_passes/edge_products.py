"""Tensor products over edges, and the gradients that belong to them: what ``fuse-convolution`` looks for."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import fx

from fxpass.algebra.multilinear import parse_tensor_product
from fxpass.ir import ops
from fxpass.ir.convolution import fusible
from fxpass.rewrite import arguments

aten = torch.ops.aten
KERNEL_TYPES = (torch.float32, torch.float64)
GRADIENTS = ("x1", "x2", "weight")  # slots of a tensor product, in the order of the gradients


class Edges(NamedTuple):
    """The operands that a tensor product over edges and its gradients share.

    ``table`` has the arguments of the table of which the weights are values, less the derivative.
    """

    x: fx.Node
    sender: fx.Node
    y: fx.Node
    weight: fx.Node | None
    spec: str
    table: tuple[Any, ...] | None


#: operands of a product, gradient of its sum [atoms, columns], index that it is gathered by
Gradient = tuple[Edges, fx.Node, fx.Node]


class Refused(Exception):
    """Why a tensor product stays, and the nodes to blame."""

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.nodes = nodes


def edges_of(node: fx.Node) -> Edges:
    """The operands of a tensor product with respect to its result."""
    _check(node)
    args: Any = node.args
    x1, x2, weight, _, spec, _ = args
    if not is_gather(x1):
        what = f"its x2, {x2.name}, is gathered and its x1 is not" if is_gather(x2) else "its x1 is not gathered"
        raise Refused(what, x1)
    x, sender = x1.args
    return Edges(x, sender, x2, weight, spec, _table(weight))


def _table(weight: Any) -> tuple[Any, ...] | None:
    """The arguments of a table but for the derivative, where its argument is of the type that it gives."""
    if not isinstance(weight, fx.Node) or weight.target is not ops.table or weight.args[4] != 0:
        return None
    return weight.args[:4] if _dtype(weight.all_input_nodes[0]) == _dtype(weight) else None


def sums_of(node: fx.Node) -> list[fx.Node]:
    """The sums of a message, where nobody else reads it."""
    for user in node.users:
        if user.target is not ops.scatter_sum:
            raise Refused(f"its result is read by {user.name}, which is no sum over edges", user)
    return list(node.users)


def gradient_of(node: fx.Node, known: list[Edges], first: Container[Gradient]) -> tuple[Gradient, tuple[int, fx.Node]]:
    """Which gradient a node is of which ``known`` product, those of ``first`` before others; slot, and what has it."""
    _check(node)
    out: Any = node.args[3]
    if not is_gather(out):
        raise Refused(f"the gradient of its result, {out.name}, is not gathered", out)
    (g, receiver), wrt = out.args, node.args[5]
    slot = GRADIENTS.index(str(wrt))
    fits = [edges for edges in known if _belongs(node, edges)]
    if not fits:
        raise Refused("there is no tensor product over edges with the same operands")
    if slot == 0:
        by_sender = sums_of(node)
        if len(by_sender) > 1:
            raise Refused("its result is summed more than once", *by_sender)
        (total,) = by_sender
        fits = [e for e in fits if total.args[1] is e.sender and rows_of(total) == rows_of(e.x)]
        if not fits:
            raise Refused(f"{total.name} does not sum it by the index that x1 is gathered by", total)
        return min(((e, g, receiver) for e in fits), key=lambda gradient: gradient not in first), (slot, total)
    (edges, *_) = fits
    return (edges, g, receiver), (slot, _by_radial(node, edges.table) if slot == 2 and edges.table else node)


def _belongs(node: fx.Node, edges: Edges) -> bool:
    args: Any = node.args
    x1, x2, weight, _, spec, wrt = args
    gathered = x1.args if is_gather(x1) else None
    given = {"x1": gathered, "x2": x2, "weight": weight}
    own = {"x1": (edges.x, edges.sender), "x2": edges.y, "weight": edges.weight}
    return spec == edges.spec and all(given[name] == own[name] for name in own if name != wrt)


def _by_radial(node: fx.Node, table: tuple[Any, ...]) -> fx.Node:
    """The sum over weights of their gradient times the derivative of the table."""
    (product, *others) = node.users
    slopes = [n for n in product.all_input_nodes if n is not node]
    if not others and product.target is aten.mul.Tensor and len(slopes) == 1:
        (slope,), (total, *more) = slopes, product.users
        derived = slope.target is ops.table and slope.args == (*table, 1)
        wanted = {"dim": ([1], [-1]), "keepdim": (False,), "dtype": (None,)}
        if derived and not more and total.target is aten.sum.dim_IntList:
            given = arguments(total)
            if all(given[name] in values for name, values in wanted.items()):
                return total
    raise Refused(f"{product.name} does not multiply it by the derivative of its table to be summed", product)


def _check(node: fx.Node) -> None:
    """Whether a kernel takes a tensor product, and its operands.

    Raises:
        Refused: the reason.
    """
    tp = parse_tensor_product(str(node.args[4]))
    if reason := fusible(tp):
        raise Refused(reason)
    types = sorted({str(_dtype(operand)).removeprefix("torch.") for operand in node.all_input_nodes})
    if len(types) > 1 or _dtype(node) not in KERNEL_TYPES:
        raise Refused(f"kernels compute in float32 or float64 throughout, its operands are {', '.join(types)}")


def is_gather(value: Any) -> bool:
    """Whether it is rows of a tensor by an index."""
    return isinstance(value, fx.Node) and value.target is ops.gather


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def rows_of(node: fx.Node) -> str | None:
    """The number of rows of a tensor, as text."""
    value = node.meta.get("val")
    return str(value.shape[0]) if isinstance(value, torch.Tensor) and value.dim() else None
