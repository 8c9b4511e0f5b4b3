"""Proof that a program keeps the neighbour list a neighbour list.

Every tensor of a program is of one of these kinds: it has no edges in it, or one row for each edge, or it was
summed over edges.  The proof goes over the named sizes of all shapes and over every op in which edges go in and
atoms come out.  What it does not understand it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..errors import Location, PassError
from .cost import ATOMS, EDGES, SizeNames
from .cost import size as named
from .metadata import provenance
from .program import Program, TensorSpec

#: the assumption under which the verifier proves this again after every pass
SPARSE = "the neighbour list stays sparse"

_SUM = "gather the features of both ends of each edge and sum over edges with index_add (fxpass::scatter_sum)"
_LIST = "one row for each edge and an edge_index; no slots for neighbours"

#: ops that regroup elements without moving them
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "unfold"}
#: ops in which edges go in and atoms come out, as sums, or as places where an atom's edges begin
_WRITES = {
    *("scatter_sum", "index_add", "scatter_add", "scatter_reduce", "index_put", "_unsafe_index_put", "index_reduce"),
    *("index_copy", "scatter", "bincount", "convolution", "convolution_gradient"),
}
_COUNTS = {"segment_reduce", "searchsorted"}
_READS = {"gather", "index", "_unsafe_index", "index_select", "take", "take_along_dim", "embedding"}
_RANKS = {"arange", "cumsum", "argsort", "nonzero"}
_SORTS = {"sort", "topk"}


def check(program: Program) -> None:
    """Prove that no tensor of ``program`` is atoms x atoms or atoms x edges and none has slots for neighbours.

    Reads ``meta["val"]`` as the verifier leaves it.

    Raises:
        PassError: the first node for which this is not so, or cannot be shown, with its shape and module.
    """
    _Proof(program).check()


def has_edges(program: Program) -> bool:
    """Whether an input of ``program`` has a row for each edge."""
    return any("edges" in spec.dims for spec in program.inputs)


class _Proof:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes = SizeNames.of(program)
        self.known = {named(str(dim).partition("+")[0]) for spec in program.inputs for dim in spec.dims}
        self.specs = {node: spec for spec, node in zip(program.inputs, program.placeholders.values(), strict=True)}
        self.rank = cache(self._rank)

    def check(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            for shape in self.shapes(node):
                self.check_shape(node, shape)
            if node.op == "placeholder":
                self.check_input(node, self.specs[node])
            elif node.op == "call_function":
                self.check_call(node)

    def over_edges(self, node: fx.Node) -> bool:
        return any(EDGES in dim.free_symbols for shape in self.shapes(node) for dim in shape)

    def shapes(self, node: fx.Node) -> Iterator[tuple[sympy.Expr, ...]]:
        """Shapes of the node's dense tensors, in named sizes."""
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                yield self.sizes.shape(tensor)

    def check_shape(self, node: fx.Node, shape: tuple[sympy.Expr, ...]) -> None:
        strange = sorted(str(s) for dim in shape for s in dim.free_symbols - self.known)
        if strange:
            raise self.broken(node, f"the size {strange[0]} depends on values, so nothing can be proven of it", _LIST)
        if any({ATOMS, EDGES} <= dim.free_symbols and not dim.is_polynomial(ATOMS, EDGES) for dim in shape):
            raise self.broken(node, "edges are divided among atoms, as if each atom had as many", _LIST)
        if sum(map(degree, shape)) > 1:
            raise self.broken(node, f"{_product(shape)} elements, where a neighbour list has edges", _SUM)

    def check_input(self, node: fx.Node, spec: TensorSpec) -> None:
        index = any(fact.startswith("index:") for fact in spec.properties)
        if index and "atoms" in spec.dims and len(spec.dims) > 1:
            raise self.broken(node, "the input is a list of neighbours padded to a fixed number for each atom", _LIST)

    def check_call(self, node: fx.Node) -> None:
        name = _name(node)
        after = [dim for shape in self.shapes(node) for dim in shape]
        if not any(map(self.over_edges, node.all_input_nodes)):
            return
        if name in _RESHAPES and not any(_is_multiple(dim) for dim in after):
            raise self.broken(node, "edges are regrouped, a fixed number to a row", _LIST)
        if name in ("constant_pad_nd", "cat") and not self.over_edges(node):
            raise self.broken(node, "edges are padded to a fixed number", _LIST)
        indices = self.written_by(node) if name in _WRITES else []
        if ranked := next((index for index in indices if self.rank(index) and not self.stays(index)), None):
            what = f"edges are written to slots that {ranked.name} numbers, not summed by atom"
            raise self.broken(node, what, _SUM)
        empty = name.startswith("new_") or name.endswith("_like")  # only the shape of what goes in is read
        over_atoms = any(ATOMS in dim.free_symbols for dim in after) and not self.over_edges(node)
        maker = _name(node.all_input_nodes[0]) if name == "getitem" else name  # of several results
        if over_atoms and not empty and maker not in _WRITES | _COUNTS:
            raise self.broken(node, f"{node.target} makes rows for atoms of rows for edges", _SUM)

    def written_by(self, node: fx.Node) -> list[fx.Node]:
        """Integer operands that say where edges are written."""
        return [
            operand
            for operand in node.all_input_nodes
            if isinstance(value := operand.meta.get("val"), Tensor)
            and not value.is_floating_point()
            and self.over_edges(operand)
        ]

    def stays(self, index: fx.Node) -> bool:
        """Whether integers number the edges from 0 on: what is written to these places stays a row for each edge."""
        if _name(index) == "rows_by":  # which sorts them, and offsets with it
            return self.stays(index.all_input_nodes[0])
        return index.target is torch.ops.aten.arange.default and list(self.shapes(index)) == [(EDGES,)]

    def _rank(self, node: fx.Node) -> bool:
        """Whether integers depend on where in the list an edge stands, rather than on which atoms it joins."""
        if node.op != "call_function":
            spec = self.specs.get(node)
            known = spec is None or any(fact.startswith(("index:", "below:")) for fact in spec.properties)
            return not known and self.over_edges(node)
        name, operands = _name(node), node.all_input_nodes
        if name == "getitem" and _name(operands[0]) in _SORTS:
            return bool(node.args[1] == 1) or self.rank(operands[0].all_input_nodes[0])
        if name in _RANKS:
            return any(map(self.over_edges, [node, *operands]))
        if name in _READS:
            operands = operands[:1]  # what is read decides, not where it is read
        elif name == "where":
            operands = operands[1:]
        return any(self.rank(operand) for operand in operands)

    def broken(self, node: fx.Node, what: str, hint: str) -> PassError:
        origin = provenance(node)
        shape = next(self.shapes(node), None)
        return PassError(
            f"the neighbour list does not stay sparse: {what}",
            where=Location(
                node=node.name,
                shape=None if shape is None else f"[{', '.join(map(str, shape))}]",
                module_path=origin.module or None,
                source=origin.source or None,
            ),
            hint=hint,
        )


@cache
def degree(dim: sympy.Expr) -> int:
    """The power with which a size grows with the numbers of atoms and edges."""
    sizes = dim.free_symbols & {ATOMS, EDGES}
    if not sizes:
        return 0
    return int(sympy.Poly(dim, *sizes).total_degree()) if dim.is_polynomial(*sizes) else 1


def _is_multiple(dim: sympy.Expr) -> bool:
    return EDGES in dim.free_symbols and dim.is_polynomial(EDGES)


def _product(shape: tuple[sympy.Expr, ...]) -> str:
    return str(sympy.Mul(*shape)).replace("**", "^").replace("*", "·")


def _name(node: fx.Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))
