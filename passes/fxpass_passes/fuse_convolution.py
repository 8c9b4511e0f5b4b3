"""The pass ``fuse-convolution``."""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from fxpass.algebra.multilinear import parse_tensor_product
from fxpass.ir import ops
from fxpass.ir.convolution import convolution, convolution_gradient, fusible, rows_by
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import arguments, erase_unused

aten = torch.ops.aten
KERNEL_TYPES = (torch.float32, torch.float64)
GRADIENTS = ("x1", "x2", "weight")  # slots of a tensor product, in the order of the gradients


@dataclass(frozen=True)
class FuseConvolution(Pass):
    """Makes one op of a gather, a tensor product and a sum over edges, and one of all its gradients.

    Before / After::

        w = table(r, species, c, grid, 0)                   o = rows_by(receiver, n)
        t = tensor_product(gather(x, sender), y, w, .., 'out')
        m = scatter_sum(t, receiver, n)                     m = convolution(x, y, r, species, c, .., o, n, ..)

        h = gather(g, receiver)                             p = rows_by(sender, n)
        a = tensor_product(None, y, w, h, .., 'x1')         d = convolution_gradient(x, y, g, r, .., p, ..)
        by_x = scatter_sum(a, sender, n)                    by_x = d[0]
        by_y = tensor_product(.., None, w, h, .., 'x2')     by_y = d[1]
        b = tensor_product(.., y, None, h, .., 'weight')    by_r = d[2]
        by_r = sum(mul(b, table(r, .., grid, 1)), [1])

    Weights that are no table are taken as they are, and so is the gradient by them. Gradients that are not in the
    graph are not asked for.

    Holds when: x1 is gathered, kernels take the tensor product (``fxpass.ir.convolution.fusible``) in float32 or
    float64, messages are summed and read by nobody else, and the gradient of a result is gathered. A gradient
    belongs to the tensor product that has the same operands; one by the weights of a table goes into the radial
    gradient, or stays as it is.

    Keeps: values up to rounding, interface, gradients of any order.
    """

    name: ClassVar[str] = "fuse-convolution"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        fusion = _Fusion(program, self.name)
        fusion.run()
        return Outcome(program, bool(fusion.applications), tuple(fusion.applications), tuple(fusion.refusals))


class _Edges(NamedTuple):
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
_Gradient = tuple[_Edges, fx.Node, fx.Node]


class _Refused(Exception):
    """Why a tensor product stays, and the nodes to blame."""

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.nodes = nodes


class _Fusion:
    def __init__(self, program: Program, name: str) -> None:
        self.graph, self.name = program.graph, name
        self.applications: list[Application] = []
        self.refusals: list[Refusal] = []
        self.sorted: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> None:
        products = [n for n in self.graph.find_nodes(op="call_function", target=ops.tensor_product) if n.users]
        forward = {n: self.attempt(n, _edges) for n in products if n.args[5] == "out"}
        known = list(dict.fromkeys(edges for edges in forward.values() if edges))
        gradients: dict[_Gradient, list[tuple[int, fx.Node]]] = {}
        # one with respect to x1 does not say which x1: it joins the others, which do
        for node in sorted(products, key=lambda n: n.args[5] == "x1"):
            found = self.attempt(node, _gradient, known, gradients) if node not in forward else None
            if found and found[1][1].users:
                gradients.setdefault(found[0], []).append(found[1])
        for node, edges in forward.items():
            if edges and (sums := self.attempt(node, _sums)):
                self.fuse(edges, sums)
        for (edges, g, receiver), parts in gradients.items():
            self.attempt(parts[0][1], self.fuse_gradients, edges, g, receiver, parts)

    def attempt(self, node: fx.Node, function: Any, *args: Any) -> Any:
        try:
            return function(node, *args)
        except _Refused as refused:
            names = dict.fromkeys(n.name for n in (node, *refused.nodes))
            self.refusals.append(Refusal("convolution", str(refused), tuple(names), provenance(node).module))
            return None

    def fuse(self, edges: _Edges, sums: list[fx.Node]) -> None:
        for node in sums:
            _, receiver, size = node.args
            order = self.rows(receiver, node.meta["val"].shape[0])  # type: ignore[arg-type]
            with self.graph.inserting_before(node):
                radial, lookup, grid = self.radial(edges, node)
                args = (edges.x, edges.y, radial, *lookup, edges.sender, receiver, order, size, edges.spec, grid)
                new = self.call(convolution, args, node)
            self.substitute("convolution", {node: new})

    def fuse_gradients(
        self, first: fx.Node, edges: _Edges, g: fx.Node, receiver: fx.Node, parts: list[tuple[int, fx.Node]]
    ) -> None:
        order = self.rows(edges.sender, edges.x.meta["val"].shape[0])
        position = {node: k for k, node in enumerate(self.graph.nodes)}
        user = min((user for _, node in parts for user in node.users), key=position.__getitem__)
        operands = (edges.x, edges.y, g, receiver, edges.sender, order, *(edges.table or [edges.weight]))
        late = max((n for n in operands if isinstance(n, fx.Node)), key=position.__getitem__)
        if position[late] >= position[user]:
            erase_unused([order])
            raise _Refused(f"{late.name}, which another gradient needs, is computed after {user.name}", late, user)
        with self.graph.inserting_before(user):
            radial, lookup, grid = self.radial(edges, first)
            needs = [any(slot == k for slot, _ in parts) for k in range(3)]
            args = (edges.x, edges.y, g, radial, *lookup, edges.sender, receiver, order, edges.spec, grid, needs)
            new = self.call(convolution_gradient, args, first)
            items = {node: self.call(operator.getitem, (new, slot), node) for slot, node in parts}
        self.substitute("convolution-gradient", items)

    def radial(self, edges: _Edges, like: fx.Node) -> tuple[Any, tuple[Any, Any], Any]:
        """What weights are read from, (species, coefficients) and grid, as arguments of the ops."""
        if edges.table:
            radial, species, coefficients, grid = edges.table
            return radial, (species, coefficients), grid
        none = edges.weight or self.call(aten.slice.Tensor, (edges.y, 1, 0, 0), like)  # [edges, 0]
        return none, (None, None), ""

    def rows(self, index: fx.Node, size: int | torch.SymInt) -> fx.Node:
        """``rows_by(index, size)``, once in a graph."""
        if (index, str(size)) not in self.sorted:
            count = size if isinstance(size, int) else self.size(size)
            position = {node: k for k, node in enumerate(self.graph.nodes)}
            late = max((n for n in (index, count) if isinstance(n, fx.Node)), key=position.__getitem__)
            with self.inserting_after(late):
                self.sorted[index, str(size)] = self.call(rows_by, (index, count), index)
        return self.sorted[index, str(size)]

    def size(self, size: torch.SymInt) -> fx.Node:
        """The first node of this value; where there is none, read off the first tensor with so many rows."""
        for node in self.graph.nodes:
            if isinstance(node.meta.get("val"), torch.SymInt) and str(node.meta["val"]) == str(size):
                return node
        tall = next(node for node in self.graph.nodes if _rows(node) == str(size))
        with self.inserting_after(tall):
            node = self.call(aten.sym_size.int, (tall, 0), tall)
        node.meta["val"] = size
        return node

    def inserting_after(self, node: fx.Node) -> Any:
        inputs = self.graph.find_nodes(op="placeholder")
        return self.graph.inserting_after(inputs[-1] if node in inputs else node)

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args)
        set_provenance(node, replace(provenance(like), made_by=self.name))
        return node

    def substitute(self, rule: str, new: dict[fx.Node, fx.Node]) -> None:
        for node, other in new.items():
            node.replace_all_uses_with(other)
        removed = len(erase_unused(new))
        first = next(iter(new))
        self.applications.append(Application(rule, first.name, provenance(first).module, removed, added=1))


def _edges(node: fx.Node) -> _Edges:
    """The operands of a tensor product with respect to its result."""
    _check(node)
    args: Any = node.args
    x1, x2, weight, _, spec, _ = args
    if not _is_gather(x1):
        what = f"its x2, {x2.name}, is gathered and its x1 is not" if _is_gather(x2) else "its x1 is not gathered"
        raise _Refused(what, x1)
    x, sender = x1.args
    return _Edges(x, sender, x2, weight, spec, _table(weight))


def _table(weight: Any) -> tuple[Any, ...] | None:
    """The arguments of a table but for the derivative, where its argument is of the type that it gives."""
    if not isinstance(weight, fx.Node) or weight.target is not ops.table or weight.args[4] != 0:
        return None
    return weight.args[:4] if _dtype(weight.all_input_nodes[0]) == _dtype(weight) else None


def _sums(node: fx.Node) -> list[fx.Node]:
    """The sums of a message, where nobody else reads it."""
    for user in node.users:
        if user.target is not ops.scatter_sum:
            raise _Refused(f"its result is read by {user.name}, which is no sum over edges", user)
    return list(node.users)


def _gradient(node: fx.Node, known: list[_Edges], first: Container[_Gradient]) -> tuple[_Gradient, tuple[int, fx.Node]]:
    """Which gradient a node is of which ``known`` product, those of ``first`` before others; slot, and what has it."""
    _check(node)
    out: Any = node.args[3]
    if not _is_gather(out):
        raise _Refused(f"the gradient of its result, {out.name}, is not gathered", out)
    (g, receiver), wrt = out.args, node.args[5]
    slot = GRADIENTS.index(str(wrt))
    fits = [edges for edges in known if _belongs(node, edges)]
    if not fits:
        raise _Refused("there is no tensor product over edges with the same operands")
    if slot == 0:
        by_sender = _sums(node)
        if len(by_sender) > 1:
            raise _Refused("its result is summed more than once", *by_sender)
        (total,) = by_sender
        fits = [e for e in fits if total.args[1] is e.sender and _rows(total) == _rows(e.x)]
        if not fits:
            raise _Refused(f"{total.name} does not sum it by the index that x1 is gathered by", total)
        return min(((e, g, receiver) for e in fits), key=lambda gradient: gradient not in first), (slot, total)
    (edges, *_) = fits
    return (edges, g, receiver), (slot, _by_radial(node, edges.table) if slot == 2 and edges.table else node)


def _belongs(node: fx.Node, edges: _Edges) -> bool:
    args: Any = node.args
    x1, x2, weight, _, spec, wrt = args
    gathered = x1.args if _is_gather(x1) else None
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
    raise _Refused(f"{product.name} does not multiply it by the derivative of its table to be summed", product)


def _check(node: fx.Node) -> None:
    """Whether a kernel takes a tensor product, and its operands.

    Raises:
        _Refused: the reason.
    """
    tp = parse_tensor_product(str(node.args[4]))
    if reason := fusible(tp):
        raise _Refused(reason)
    types = sorted({str(_dtype(operand)).removeprefix("torch.") for operand in node.all_input_nodes})
    if len(types) > 1 or _dtype(node) not in KERNEL_TYPES:
        raise _Refused(f"kernels compute in float32 or float64 throughout, its operands are {', '.join(types)}")


def _is_gather(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is ops.gather


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _rows(node: fx.Node) -> str | None:
    """The number of rows of a tensor, as text."""
    value = node.meta.get("val")
    return str(value.shape[0]) if isinstance(value, torch.Tensor) and value.dim() else None
