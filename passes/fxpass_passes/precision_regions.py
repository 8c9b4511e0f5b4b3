"""What of a program may be computed in a low type: used by ``pin-precision``.

Regions are found by the graph: by ops, by what depends on the edge vectors and by the sizes of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpass.ir import ops
from fxpass.ir.cost import REFERENCE_SIZES, SizeNames, node_cost
from fxpass.ir.metadata import provenance
from fxpass.ir.ops import OpOverload
from fxpass.ir.program import Program
from fxpass.rewrite import arguments

from .constants import constants

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.matmul.default)
CONTRACTIONS = (*PRODUCTS, ops.linear, ops.tensor_product, ops.polynomial)
SCATTERS = (ops.scatter_sum, aten.index_add.default, aten.scatter_add.default)
DEPTH = 3  # parts of a module path that name a region: "interactions.0.conv_tp_weights"


@dataclass(frozen=True)
class Region:
    """Nodes of one module that go to the low type, or stay, together.

    Attributes:
        name: the first parts of the module path.
        nodes: names of the nodes, which copies of a program keep.
        flops: of these nodes, at the mean sizes of the samples.
        bytes: that the low type saves there, in weights and in values between nodes.
    """

    name: str
    nodes: tuple[str, ...]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Regions:
    """The regions of a program, and why the rest is pinned.

    Attributes:
        regions: those that may be low, in the order of the graph.
        pinned: name of a pinned node -> why.
        always_flops: of what no choice of regions makes low, at the mean sizes of the samples.
        flops: of the whole program, but for what depends on weights alone.
    """

    regions: tuple[Region, ...]
    pinned: Mapping[str, str]
    always_flops: float
    flops: float


def is_float(node: fx.Node) -> bool:
    """Whether a node makes one floating tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def own_type(node: fx.Node) -> bool:
    """Whether a call says itself which type it makes: a conversion, or a tensor out of none."""
    if not isinstance(node.target, OpOverload):
        return False
    return isinstance(arguments(node).get("dtype"), torch.dtype) or not any(map(is_float, node.all_input_nodes))


def static_operand(node: fx.Node, known: frozenset[fx.Node]) -> fx.Node | None:
    """The constant matrix that a node multiplies with: ``mm(x, W)``, an equivariant linear map, a polynomial."""
    if node.target is aten.mm.default or (node.target is ops.linear and node.args[-1] == "out"):
        x, matrix = node.args[0], node.args[1]
    elif node.target is ops.polynomial and node.args[-1] == "out" and not node.args[1]:
        x, matrix = node.args[0], node.args[4]
    else:
        return None
    return matrix if isinstance(matrix, fx.Node) and matrix in known and x not in known else None


def always_pinned(program: Program) -> dict[fx.Node, str]:
    """Floating nodes that no option makes low, and why: geometry, reductions, energies."""
    known = constants(program.graph)
    (vectors,) = program.with_property("edge_vector")
    source = program.placeholders[vectors.name]
    geometry, moving, messages, found = {source}, {source}, set[fx.Node](), dict[fx.Node, str]()
    for node in program.graph.nodes:
        if node.op != "call_function" or node in known or not is_float(node):
            continue
        operands = [n for n in node.all_input_nodes if n in moving]
        if operands:
            moving.add(node)
        if messages.intersection(operands):
            messages.add(node)
        harmonic = node.target is ops.polynomial and node.args[2] is None
        if operands and geometry.issuperset(operands) and (harmonic or node.target not in (*CONTRACTIONS, *SCATTERS)):
            geometry.add(node)
            found[node] = "geometry of edges"
        elif node.target is ops.tensor_product and geometry.intersection(operands) and node not in messages:
            messages.add(node)
            found[node] = "first tensor product on edges"
        elif node.target in SCATTERS or _sums_rows(node):
            found[node] = "sum over edges or atoms"
        elif own_type(node):
            found[node] = "type of its own"
    for node in _energies(program, moving):
        if node not in known and is_float(node):
            found.setdefault(node, "energies")
    return found


def _sums_rows(node: fx.Node) -> bool:
    """Whether a node reduces a dimension of symbolic size."""
    if not isinstance(node.target, OpOverload) or torch.Tag.reduction not in node.target.tags:
        return False

    def rows(value: Any) -> int:
        return sum(isinstance(s, torch.SymInt) for s in value.shape) if isinstance(value, Tensor) else 0

    return rows(node.meta["val"]) < max((rows(n.meta.get("val")) for n in node.all_input_nodes), default=0)


def _energies(program: Program, moving: set[fx.Node]) -> set[fx.Node]:
    """What energies are added up from, back to the last product with weights; energies of isolated atoms with it."""
    results = program.results
    pending = [results[s.name] for s in program.outputs if s.name == program.energy or s.unit == "eV"]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in found or node.op != "call_function" or (node in moving and node.target in CONTRACTIONS):
            continue
        found.add(node)
        pending.extend(node.all_input_nodes)
    return found


def find_regions(program: Program, compute: torch.dtype, *, equivariant: bool) -> Regions:
    """The regions of a program.

    Args:
        compute: the low type.
        equivariant: only products with constant matrices, for which low operands are enough.
    """
    known, pinned = constants(program.graph), always_pinned(program)
    count = SampleSizes(program)

    def saved(node: fx.Node) -> float:
        return count.elements(node) * (node.meta["val"].element_size() - compute.itemsize)

    always = sum(count.flops(node) for node in pinned)
    groups: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node in known or not is_float(node) or node in pinned:
            continue
        if equivariant and static_operand(node, known) is None:
            pinned[node] = "no product with a constant matrix"
            continue
        groups.setdefault(".".join(provenance(node).module.split(".")[:DEPTH]) or "(model)", []).append(node)
    regions = []
    for name, nodes in groups.items():
        stored = {n for node in nodes for n in node.all_input_nodes if n in known and is_float(n)}
        values = [] if equivariant else nodes  # between equivariant products everything stays in the pinned type
        names, flops = tuple(n.name for n in nodes), sum(map(count.flops, nodes))
        regions.append(Region(name, names, flops, sum(map(saved, (*stored, *values)))))
    whole = sum(count.flops(node) for node in program.graph.nodes if node not in known)
    return Regions(tuple(regions), {n.name: why for n, why in pinned.items()}, always, whole)


class SampleSizes:
    """FLOPs and bytes at the mean sizes of a program's samples; at those of the cost model where there are none."""

    def __init__(self, program: Program) -> None:
        self.names = SizeNames.of(program)
        seen: dict[str, list[int]] = {}
        for sample in program.samples:
            for spec in program.inputs:
                for dim, extent in zip(spec.dims, sample[spec.name].shape, strict=True):
                    if isinstance(dim, str) and dim.isidentifier():
                        seen.setdefault(dim, []).append(extent)
        self.sizes = {**REFERENCE_SIZES, **{name: sum(each) / len(each) for name, each in seen.items()}}

    def flops(self, node: fx.Node) -> float:
        """Of one node."""
        return node_cost(node, self.names).at(**self.sizes).flops

    def elements(self, node: fx.Node) -> float:
        """Of the tensor that a node makes."""
        elements = 1.0
        for extent in self.names.shape(node.meta["val"]):
            elements *= float(extent.subs({s: self.sizes[s.name] for s in extent.free_symbols}))
        return elements
