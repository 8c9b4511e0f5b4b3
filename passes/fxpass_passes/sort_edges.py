"""The pass ``sort-edges``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxpass.edges import SORTED
from fxpass.ir import ops
from fxpass.ir.convolution import rows_by
from fxpass.ir.metadata import Provenance, provenance, set_provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal

from .edge_order import order_matters

aten = torch.ops.aten


@dataclass(frozen=True)
class SortEdges(Pass):
    """Sorts edges by their receiver, once, inside the graph; results come in the caller's order.

    Before / After::

        y = f(edge_vectors, edge_index)      order = slice(rows_by(receiver, atoms), atoms + 1)
                                             vectors = gather(edge_vectors, order)
                                             index = index_select(edge_index, 1, order)
                                             y = f(vectors, index)
        return energy, edge_gradient         return energy, scatter_sum(edge_gradient, order, edges)

    Sums over the edges of an atom then read rows that lie together. The order of edges with one receiver stays, and
    every input with a row for each edge is sorted with the others. Comes after ``tabulate``, which looks for functions
    of the edge vectors as they come in. Hosts that sort by themselves need it not.

    Holds when: no result depends on the order of edges but by rounding: every op that edges go into maps rows or sums
    over them. Not under the assumption "edges sorted by receiver" of ``preserve-sparsity``.

    Keeps: values up to rounding of sums, the order of edges in inputs and outputs, interface, gradients.
    """

    name: ClassVar[str] = "sort-edges"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        if refusal := _why_not(program, self.name):
            return Outcome(program, modified=False, refusals=(refusal,))
        graph, inputs = program.graph, program.placeholders
        by_edges = [spec for spec in program.inputs if "edges" in spec.dims]
        own: set[fx.Node] = set()

        def call(target: Any, *args: Any) -> fx.Node:
            node = graph.call_function(target, args)
            set_provenance(node, Provenance(made_by=self.name))
            own.add(node)
            return node

        with graph.inserting_before(list(inputs.values())[-1].next):
            size, edges = call(aten.sym_size.int, _atoms(program), 0), call(aten.sym_size.int, inputs["edge_index"], 1)
            rows = call(rows_by, call(aten.select.int, inputs["edge_index"], 0, 1), size)
            order = call(aten.slice.Tensor, rows, 0, call(operator.add, size, 1))
            for spec in by_edges:
                node, axis = inputs[spec.name], spec.dims.index("edges")
                sort = (ops.gather, node, order) if axis == 0 else (aten.index_select.default, node, axis, order)
                node.replace_all_uses_with(call(*sort), delete_user_cb=lambda user: user not in own)
        (returned,) = graph.output_node().args
        results = list(returned)  # type: ignore[arg-type]
        with graph.inserting_before(graph.output_node()):
            for k, spec in enumerate(program.outputs):
                if "edges" in spec.dims:
                    results[k] = call(ops.scatter_sum, results[k], order, edges)
        graph.output_node().args = (tuple(results),)
        fired = tuple(Application("sorted", inputs[spec.name].name) for spec in by_edges)
        return Outcome(program, modified=True, applications=fired)


def _atoms(program: Program) -> fx.Node | None:
    """An input with a row for each atom."""
    return next((program.placeholders[s.name] for s in program.inputs if s.dims[:1] == ("atoms",)), None)


def _why_not(program: Program, name: str) -> Refusal | None:
    """Why edges stay as they are."""
    specs = {spec.name: spec for spec in program.inputs}
    index, vectors = specs.get("edge_index"), program.with_property("edge_vector")
    if index is None or index.dims != (2, "edges") or len(vectors) != 1 or _atoms(program) is None:
        return Refusal("sorted", "it has no edge vectors, edge index [2, edges] and rows for atoms to sort by")
    if SORTED in program.assumptions:
        return Refusal("sorted", f"its host sorts: {SORTED}", (index.name,))
    node = program.placeholders[vectors[0].name]
    if any(provenance(user).made_by == name for user in node.users):
        return Refusal("sorted", "its edges are sorted already", (node.name,))
    for spec in (*program.inputs, *program.outputs):
        if any(fact in ("index:edges", "below:edges") for fact in spec.properties):
            return Refusal("sorted", f"{spec.name} names edges by their number in the list", (spec.name,))
    for spec in program.outputs:
        if "edges" in spec.dims[1:]:
            return Refusal("sorted", f"the result {spec.name} has edges in dimension {spec.dims.index('edges')}")
    if found := order_matters(program, node):
        reason, blamed = found
        return Refusal("sorted", reason, (blamed.name,), provenance(blamed).module)
    return None
