"""Factors of single edges, and tables that several products read: what ``fuse-convolution`` rewrites before it looks.

A tensor product is linear in its second operand y, which is by far its narrowest.  So a number for each edge that
multiplies its result or its weights, a cutoff or an attention weight, may multiply y instead, and the derivatives too:

    TP(x, y, w) * f            = TP(x, y * f, w)            TP(x, y, w * f) likewise
    TP_x(y, w, g * f)          = TP_x(y * f, w, g)          by the weights likewise
    TP_y(x, w, g * f)          = TP_y(x, w, g) * f
    sum(g * TP(x, y, w))       = sum(y * TP_y(x, w, g))     which is the derivative by f
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxpass.algebra.multilinear import parse_tensor_product
from fxpass.ir import ops
from fxpass.ir.convolution import fusible
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.passes import Application
from fxpass.rewrite import arguments, erase_unused

from .edge_products import Edges, is_gather

aten = torch.ops.aten
X1, Y, WEIGHT, OUT = range(4)  # operands of a tensor product


class EdgeFactors:
    """The rewriting of one graph."""

    def __init__(self, graph: fx.Graph, made_by: str) -> None:
        self.graph, self.made_by = graph, made_by
        self.applications: list[Application] = []
        self.specs: set[str] = set()
        self.factors: set[Any] = set()
        self.scaled: dict[tuple[fx.Node, Any], fx.Node] = {}

    def products(self) -> list[fx.Node]:
        return [n for n in self.graph.find_nodes(op="call_function", target=ops.tensor_product) if n.users]

    def move(self) -> None:
        """Move the factors of all products over edges to their second operands."""
        for node in self.products():
            if node.args[5] == "out" and is_gather(node.args[X1]) and not fusible(parse_tensor_product(_spec(node))):
                found = [f for user in node.users if _summed(user) and (f := self.factor(user, node)) is not None]
                if (_summed(node) or found) and (split := self.split(node, WEIGHT)) is not None:
                    found.append(split[1])
                if found:
                    self.specs.add(_spec(node))
                    self.factors.update(found)
        before = None
        while self.factors and before != len(self.applications):
            before = len(self.applications)
            for node in self.products():
                if node.users and _spec(node) in self.specs:
                    self.step(node)

    def step(self, node: fx.Node) -> None:
        for slot in (OUT, WEIGHT):
            if (split := self.split(node, slot, known=True)) is not None:
                rest, factor = split
                args = [*node.args]
                args[slot] = rest
                with self.graph.inserting_before(node):
                    if node.args[5] == "x2":
                        new = self.call(aten.mul.Tensor, (self.product(args, node), factor), node)
                    else:
                        args[Y] = self.times(node.args[Y], factor, node)
                        new = self.product(args, node)
                return self.substitute(node, new)
        if node.args[5] not in ("out", "weight"):
            return None
        for user in list(node.users):
            factor = self.factor(user, node)
            if factor in self.factors and self.may(node, WEIGHT if node.args[5] == "weight" else OUT):
                args = [*node.args]
                with self.graph.inserting_before(user):
                    args[Y] = self.times(node.args[Y], factor, user)
                    new = self.product(args, node)
                return self.substitute(user, new)
            if (found := self.derivative_by_factor(user, node)) is not None:
                other, total = found
                args = [*node.args[:4], _spec(node), "x2"]
                args[Y], args[OUT if node.args[5] == "out" else WEIGHT] = None, other
                y: Any = node.args[Y]
                with self.graph.inserting_before(total):
                    by_y = self.call(ops.tensor_product, tuple(args), node, y)
                    both = self.call(aten.mul.Tensor, (y, by_y), total, y)
                    new = self.call(aten.sum.dim_IntList, (both, *total.args[1:]), total)
                return self.substitute(total, new)
        return None

    def may(self, node: fx.Node, slot: int) -> bool:
        """Whether a factor of an operand is one of the product: of weights, where every path has some."""
        return slot != WEIGHT or all(path.weight >= 0 for path in parse_tensor_product(_spec(node)).paths)

    def split(self, node: fx.Node, slot: int, known: bool = False) -> tuple[fx.Node, Any] | None:
        """An operand without its factor, and the factor."""
        value = node.args[slot]
        if isinstance(value, fx.Node) and self.may(node, slot):
            for rest, factor in _pairs(value):
                if factor in self.factors or not known:
                    return rest, factor
        return None

    def factor(self, user: fx.Node, node: fx.Node) -> Any:
        """What ``user`` multiplies ``node`` by, if it is one number for each edge."""
        return next((factor for rest, factor in _pairs(user) if rest is node), None)

    def derivative_by_factor(self, user: fx.Node, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """What ``node`` is multiplied by and summed over columns to give a derivative by its factor, and that sum."""
        if user.target is not aten.mul.Tensor or len(user.users) != 1 or len(user.all_input_nodes) != 2:
            return None
        (total,), (other,) = user.users, (n for n in user.all_input_nodes if n is not node)
        if total.target is not aten.sum.dim_IntList or total.kwargs or arguments(total)["dim"] not in ([1], [-1]):
            return None
        if node.args[5] == "out":
            return (other, total) if is_gather(other) else None
        weights = {n.args[WEIGHT] for n in self.products() if _spec(n) == _spec(node) and n.args[5] == "out"}
        weights |= {rest for w in weights if isinstance(w, fx.Node) for rest, f in _pairs(w) if f in self.factors}
        return (other, total) if other in weights and self.may(node, WEIGHT) else None

    def times(self, y: Any, factor: Any, before: fx.Node) -> fx.Node:
        """``y * factor``, once in a graph, as early as it can be."""
        if (y, factor) not in self.scaled:
            position = {node: k for k, node in enumerate(self.graph.nodes)}
            late = max((n for n in (y, factor) if isinstance(n, fx.Node)), key=position.__getitem__)
            inputs = self.graph.find_nodes(op="placeholder")
            with self.graph.inserting_after(inputs[-1] if late in inputs else late):
                self.scaled[y, factor] = self.call(aten.mul.Tensor, (y, factor), y, y)
        return self.scaled[y, factor]

    def distribute(self, known: list[Edges]) -> None:
        """Sums of gradients by the weights of one table are multiplied by its derivative one by one.

        Each then belongs to the gradient of one product, whose op makes a number for each edge of it.
        """
        tables = [edges.table for edges in known if edges.table]
        for total in self.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            (product,) = total.all_input_nodes
            if product.target is not aten.mul.Tensor or len(product.users) != 1 or total.kwargs:
                continue
            for added, slope in (product.args, product.args[::-1]):
                leaves = list(_leaves(added))
                fits = isinstance(slope, fx.Node) and slope.target is ops.table and slope.args[4] == 1
                if fits and len(leaves) > 1 and slope.args[:4] in tables and all(map(_by_weights, leaves)):
                    with self.graph.inserting_before(total):
                        parts = [self.call(aten.mul.Tensor, (leaf, slope), total, leaf) for leaf in leaves]
                        sums = [self.call(aten.sum.dim_IntList, (p, *total.args[1:]), total) for p in parts]
                        new = sums[0]
                        for other in sums[1:]:
                            new = self.call(aten.add.Tensor, (new, other), total)
                    self.substitute(total, new, "shared-table")

    def product(self, args: list[Any], like: fx.Node) -> fx.Node:
        return self.call(ops.tensor_product, tuple(args), like)

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node, shaped: fx.Node | None = None) -> fx.Node:
        """A node of the value of ``shaped``, by default of ``like``."""
        node = self.graph.call_function(target, args)
        node.meta["val"] = (shaped or like).meta["val"]
        set_provenance(node, replace(provenance(like), made_by=self.made_by))
        return node

    def substitute(self, node: fx.Node, new: fx.Node, rule: str = "edge-factor") -> None:
        node.replace_all_uses_with(new)
        removed = len(erase_unused([node]))
        self.applications.append(Application(rule, new.name, provenance(new).module, removed, added=1))


def _pairs(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    """(value, factor) of a product of a value [edges, columns] and one number for each edge, or for all."""
    if node.target is aten.mul.Tensor:
        for value, factor in (node.args, node.args[::-1]):
            if isinstance(value, fx.Node) and _is_factor(factor, value):
                yield value, factor


def _is_factor(factor: Any, value: fx.Node) -> bool:
    if not isinstance(factor, fx.Node):
        return isinstance(factor, (int, float))
    one, all_ = factor.meta["val"], value.meta["val"]
    shapes = one.dim() == all_.dim() == 2 and one.shape[1] == 1 and all_.shape[1] != 1
    return shapes and str(one.shape[0]) == str(all_.shape[0]) and one.dtype == all_.dtype


def _leaves(node: Any) -> Iterator[Any]:
    """What a tree of sums adds up, where nobody else reads the sums."""
    if isinstance(node, fx.Node) and node.target is aten.add.Tensor and len(node.users) == 1 and not node.kwargs:
        for operand in node.args:
            yield from _leaves(operand)
    else:
        yield node


def _by_weights(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is ops.tensor_product and node.args[5] == "weight"


def _summed(node: fx.Node) -> bool:
    return any(user.target is ops.scatter_sum for user in node.users)


def _spec(node: fx.Node) -> str:
    return str(node.args[4])
