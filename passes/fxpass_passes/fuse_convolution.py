"""The pass ``fuse-convolution``."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxpass.ir.convolution import convolution, convolution_gradient, rows_by
from fxpass.ir.guards import guards, region_of, side_and_region
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.ops import tensor_product
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import erase_unused

from .edge_factors import EdgeFactors
from .edge_products import Edges, Gradient, Refused, edges_of, gradient_of, rows_of, sums_of

aten = torch.ops.aten


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
    graph are not asked for. A number for each edge that multiplies the product or its weights, ``[edges, 1]``, goes to
    y, which is narrow; gradients by the weights of one table that were added are taken apart again. A guarded region
    of which only fused ops are left needs no guards: an op is fused, reordered and decomposed as a whole or not at all.

    Holds when: x1 is gathered, kernels take the tensor product (``fxpass.ir.convolution.fusible``) in float32 or
    float64, messages are summed and read by nobody else, and the gradient of a result is gathered. A gradient
    belongs to the tensor product that has the same operands; one by the weights of a table goes into the radial
    gradient, or stays as it is.

    Keeps: values up to rounding, interface, gradients of any order.
    """

    name: ClassVar[str] = "fuse-convolution"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        opened = open_regions(program.graph, self.absorbed(program))
        fusion = _Fusion(program, self.name)
        fusion.run()
        fusion.applications += (
            Application("guarded-region", gone[0].name, region, removed=len(gone)) for region, gone in opened.items()
        )
        return Outcome(program, bool(fusion.applications), tuple(fusion.applications), tuple(fusion.refusals))


    def absorbed(self, program: Program) -> set[str]:
        """The guarded regions of which nothing is left but fused ops, once their guards are gone."""
        regions = region_of(program.graph)
        found = {region for node, region in regions.items() if node.target is tensor_product}
        while found:
            trial = program.copy()
            open_regions(trial.graph, found)
            _Fusion(trial, self.name).run()
            names = {node.name for node in trial.graph.nodes}
            left = {region for node, region in regions.items() if node.name in names}
            if not found & left:
                break
            found -= left
        return found


def open_regions(graph: fx.Graph, names: set[str]) -> dict[str, list[fx.Node]]:
    """Take away the guards of some regions, in place; those of each."""
    removed: dict[str, list[fx.Node]] = {}
    for guard in guards(graph):
        _, region = side_and_region(guard)
        if region in names:
            guard.replace_all_uses_with(guard.all_input_nodes[0])
            graph.erase_node(guard)
            removed.setdefault(region, []).append(guard)
    return removed


class _Fusion:
    def __init__(self, program: Program, name: str) -> None:
        self.graph, self.name = program.graph, name
        self.applications: list[Application] = []
        self.refusals: list[Refusal] = []
        self.sorted: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> None:
        factors = EdgeFactors(self.graph, self.name)
        factors.move()
        forward = {n: self.attempt(n, edges_of) for n in factors.products() if n.args[5] == "out"}
        known = list(dict.fromkeys(edges for edges in forward.values() if edges))
        factors.distribute(known)
        self.applications += factors.applications
        products = factors.products()
        gradients: dict[Gradient, list[tuple[int, fx.Node]]] = {}
        # one with respect to x1 does not say which x1: it joins the others, which do
        for node in sorted(products, key=lambda n: n.args[5] == "x1"):
            found = self.attempt(node, gradient_of, known, gradients) if node not in forward else None
            if found and found[1][1].users:
                gradients.setdefault(found[0], []).append(found[1])
        for node, edges in forward.items():
            if edges and (sums := self.attempt(node, sums_of)):
                self.fuse(edges, sums)
        for (edges, g, receiver), parts in gradients.items():
            self.attempt(parts[0][1], self.fuse_gradients, edges, g, receiver, parts)

    def attempt(self, node: fx.Node, function: Any, *args: Any) -> Any:
        try:
            return function(node, *args)
        except Refused as refused:
            names = dict.fromkeys(n.name for n in (node, *refused.nodes))
            self.refusals.append(Refusal("convolution", str(refused), tuple(names), provenance(node).module))
            return None

    def fuse(self, edges: Edges, sums: list[fx.Node]) -> None:
        for node in sums:
            _, receiver, size = node.args
            order = self.rows(receiver, node.meta["val"].shape[0])  # type: ignore[arg-type]
            with self.graph.inserting_before(node):
                radial, lookup, grid = self.radial(edges, node)
                args = (edges.x, edges.y, radial, *lookup, edges.sender, receiver, order, size, edges.spec, grid)
                new = self.call(convolution, args, node)
            self.substitute("convolution", {node: new})

    def fuse_gradients(
        self, first: fx.Node, edges: Edges, g: fx.Node, receiver: fx.Node, parts: list[tuple[int, fx.Node]]
    ) -> None:
        order = self.rows(edges.sender, edges.x.meta["val"].shape[0])
        position = {node: k for k, node in enumerate(self.graph.nodes)}
        user = min((user for _, node in parts for user in node.users), key=position.__getitem__)
        operands = (edges.x, edges.y, g, receiver, edges.sender, order, *(edges.table or [edges.weight]))
        late = max((n for n in operands if isinstance(n, fx.Node)), key=position.__getitem__)
        if position[late] >= position[user]:
            gone = erase_unused([order])
            self.sorted = {key: node for key, node in self.sorted.items() if node not in gone}
            raise Refused(f"{late.name}, which another gradient needs, is computed after {user.name}", late, user)
        with self.graph.inserting_before(user):
            radial, lookup, grid = self.radial(edges, first)
            needs = [any(slot == k for slot, _ in parts) for k in range(3)]
            args = (edges.x, edges.y, g, radial, *lookup, edges.sender, receiver, order, edges.spec, grid, needs)
            new = self.call(convolution_gradient, args, first)
            items = {node: self.call(operator.getitem, (new, slot), node) for slot, node in parts}
        self.substitute("convolution-gradient", items)

    def radial(self, edges: Edges, like: fx.Node) -> tuple[Any, tuple[Any, Any], Any]:
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
        tall = next(node for node in self.graph.nodes if rows_of(node) == str(size))
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
