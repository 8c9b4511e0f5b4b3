"""Where features lie in which layout: what ``compact-irreps`` looks at before it rewrites.

A *block* is the columns of one term ``mul x l`` of a value with ``mul > 1`` and ``l > 0``: only there do e3nn's layout,
channels first, and the compact one, channels last, differ.  A *region* is a set of values that have to agree, because
ops between them move or scale whole rows; at a port of a tensor product or linear map the layout is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from fxpass.algebra.irreps import channels_last, same, segments
from fxpass.algebra.multilinear import Linear, TensorProduct, parse_linear, parse_tensor_product
from fxpass.ir import ops
from fxpass.ir.cost import REFERENCE_SIZES, SizeNames, size
from fxpass.ir.program import Program
from fxpass.rewrite import arguments

aten = torch.ops.aten
ROWS = (ops.gather, ops.scatter_sum, ops.fusion_guard, aten.neg.default, aten.clone.default, aten.alias.default)
COPIES = (aten.detach.default, aten._to_copy.default)
SCALES = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
FILLS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
#: slot -> name of the irreps in the spec, and of the number of the term in a path
FIELDS = {"x": "irreps_in", "x1": "irreps1", "x2": "irreps2", "out": "irreps_out"}
INDICES = {Linear: {"x": "i", "out": "o"}, TensorProduct: {"x1": "i1", "x2": "i2", "out": "io"}}


class Block(NamedTuple):
    """Columns ``offset`` to ``offset + mul * (2 * l + 1)`` of a value."""

    offset: int
    mul: int
    l: int

    @property
    def end(self) -> int:
        return self.offset + self.mul * (2 * self.l + 1)


Blocks = tuple[Block, ...]


class Port(NamedTuple):
    """A slot of a tensor product or linear map, ``at`` which of the node's arguments, -1 for the result."""

    node: fx.Node
    slot: str
    value: fx.Node


@dataclass(eq=False)
class Region:
    """Values that have one layout.

    Attributes:
        values: in the order of the graph.
        ports: slots that may have any layout.
        packs: ``cat`` of views [rows, mul, 2l+1] of the terms of one value, as polynomials read them.
        unpacks: views [rows, mul * (2l+1)] of what polynomials made.
        sources: values that another op makes in e3nn's layout.
        readers: (value, node that needs e3nn's layout).
        problem: why its layout cannot change, with the nodes to blame.
    """

    values: list[fx.Node] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    packs: list[fx.Node] = field(default_factory=list)
    unpacks: list[fx.Node] = field(default_factory=list)
    sources: list[fx.Node] = field(default_factory=list)
    readers: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    problem: tuple[str, tuple[fx.Node, ...]] | None = None


def uses(user: fx.Node, value: fx.Node) -> int:
    """How often ``value`` is an argument of its user; a list counts as one."""
    return max(1, sum(a is value for a in user.args))


def parse(node: fx.Node) -> TensorProduct | Linear:
    """The spec of a tensor product or linear map."""
    text = str(node.args[-2])
    return parse_tensor_product(text) if node.target is ops.tensor_product else parse_linear(text)


def layouts(spec: TensorProduct | Linear) -> dict[str, str]:
    """Irreps of the slots that hold features."""
    return {slot: getattr(spec, FIELDS[slot]) for slot in INDICES[type(spec)]}


def refined(spec: Linear, finer: str) -> Linear | None:
    """The same map, reading its operand in the smaller terms of ``finer``; None where these are no parts of its own."""
    if channels_last(spec.irreps_in) or channels_last(finer) or not same(spec.irreps_in, finer):
        return None
    whole, outs, paths = segments(spec.irreps_in), segments(spec.irreps_out), []
    for path in spec.paths:
        at, mul, l, _ = whole[path.i]
        width = 2 * l + 1
        for n, (offset, channels, _, _) in enumerate(segments(finer)):
            if channels and at <= offset < at + mul * width:
                if offset + channels * width > at + mul * width:
                    return None
                first = (offset - at) // width  # of the rows [channels read, channels written] of the path's weights
                paths.append(replace(path, i=n, weight=path.weight + first * outs[path.o][1]))
    return replace(spec, irreps_in=finer, paths=tuple(paths))


def blocks_of(irreps: str) -> Blocks:
    """Blocks of irreps in e3nn's layout; none where channels are last already."""
    if channels_last(irreps):
        return ()
    return tuple(Block(offset, mul, l) for offset, mul, l, _ in segments(irreps) if l and mul > 1)


def cut(blocks: Blocks, start: int, end: int) -> Blocks | None:
    """Blocks of columns ``start`` to ``end``, or None where the cut goes through one."""
    inside = tuple(b for b in blocks if b.end > start and b.offset < end)
    if any(b.offset < start or b.end > end for b in inside):
        return None
    return tuple(b._replace(offset=b.offset - start) for b in inside)


def shifted(blocks: Blocks, by: int) -> Blocks:
    return tuple(b._replace(offset=b.offset + by) for b in blocks)


def columns(node: fx.Node) -> int | None:
    """Number of columns of a value [rows, columns]; None for anything else."""
    value = node.meta.get("val")
    fits = isinstance(value, torch.Tensor) and value.dim() == 2 and isinstance(value.shape[1], int)
    return value.shape[1] if fits else None  # type: ignore[union-attr]


def span(node: fx.Node) -> tuple[int, int] | None:
    """Columns that a slice of [rows, columns] takes; None for any other node."""
    if node.target is not aten.slice.Tensor:
        return None
    given = arguments(node)
    width = columns(given["self"])
    if width is None or given["dim"] not in (1, -1) or given["step"] != 1:
        return None
    start, end = (given["start"] or 0), width if given["end"] is None else given["end"]
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    return (start + width if start < 0 else start), min(end + width if end < 0 else end, width)


def parts_of(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """What a ``cat`` along columns joins, each with its first column; nothing for any other node."""
    if node.target is not aten.cat.default or columns(node) is None or arguments(node)["dim"] not in (1, -1):
        return []
    found, at = [], 0
    for part in node.args[0]:  # type: ignore[union-attr]
        width = columns(part)  # type: ignore[arg-type]
        if width is None:
            return []
        found.append((part, at))
        at += width
    return found  # type: ignore[return-value]


def alike(node: fx.Node) -> tuple[fx.Node, ...]:
    """Operands that have the layout of the result, because whole rows are moved, scaled or added."""
    if columns(node) is None or node.op != "call_function":
        return ()
    given = [a for a in node.args if isinstance(a, fx.Node)]
    if node.target in (*ROWS, *COPIES):
        return (given[0],)
    wide = tuple(a for a in given if columns(a) == columns(node))
    if node.target in SUMS:
        return wide if len(wide) == len(given) == 2 else ()
    if node.target in SCALES and len(wide) == 1:
        others = [a.meta["val"] for a in given if a is not wide[0]]
        return wide if all(v.dim() == 0 or v.shape[-1] == 1 for v in others) else ()
    return ()


class Layouts:
    """The blocks of all values of a program, and its regions."""

    def __init__(self, program: Program) -> None:
        self.blocks: dict[fx.Node, Blocks] = {}
        self.splits: dict[fx.Node, str] = {}  # linear maps, and the smaller terms that their operand has
        self.clashes: dict[fx.Node, tuple[str, tuple[fx.Node, ...]]] = {}
        self.nodes = [n for n in program.graph.nodes if n.op != "output"]
        self.names = SizeNames.of(program)
        for node in self.nodes:
            self.forward(node)
        for node in reversed(self.nodes):
            self.backward(node)
        for node in self.nodes:
            self.forward(node)

    # --- blocks

    def learn(self, node: fx.Node, blocks: Blocks | None, source: fx.Node) -> None:
        if not blocks or columns(node) is None:
            return
        known = self.blocks.setdefault(node, blocks)
        if known != blocks:
            self.clashes[node] = (f"{source.name} reads or makes {node.name} in other terms", (node, source))

    def demanded(self, port: Port) -> Blocks:
        """Blocks of a slot; a linear map can read parts of its own terms."""
        spec = parse(port.node)
        blocks, known = blocks_of(layouts(spec)[port.slot]), self.blocks.get(port.value)
        finer = port.value.meta.get("irreps")
        if isinstance(spec, Linear) and port.slot == "x" and port.value is not port.node and known and finer:
            split = refined(spec, finer)
            if known != blocks and split is not None and blocks_of(finer) == known:
                self.splits[port.node] = finer
                return known
        return blocks

    def forward(self, node: fx.Node) -> None:
        for port in ports_of(node):
            self.learn(port.value, self.demanded(port), node)
        for operand in alike(node):
            self.learn(node, self.blocks.get(operand), operand)
        if (taken := span(node)) is not None:
            self.learn(node, cut(self.blocks.get(node.args[0], ()), *taken), node)  # type: ignore[arg-type]
        joined = tuple(b for part, at in parts_of(node) for b in shifted(self.blocks.get(part, ()), at))
        if joined and all(part in self.blocks or not self.open(part) for part, _ in parts_of(node)):
            self.learn(node, joined, node)

    def backward(self, node: fx.Node) -> None:
        for operand in alike(node):
            self.learn(operand, self.blocks.get(node), node)
        for part, at in parts_of(node):
            width = columns(part)
            assert width is not None
            self.learn(part, cut(self.blocks.get(node, ()), at, at + width), node)

    def open(self, node: fx.Node) -> bool:
        """Whether blocks of a value may still be learnt from what reads it."""
        return node.target in VIEWS or bool(alike(node) or parts_of(node))

    def bytes(self, node: fx.Node, blocks: Blocks | None = None) -> float:
        """Bytes that are read and written to transpose blocks of a value, at the reference sizes."""
        value = node.meta["val"]
        wide = sum(b.end - b.offset for b in (self.blocks[node] if blocks is None else blocks))
        rows = sympy.sympify(self.names.size(value.shape[0])).subs({size(k): v for k, v in REFERENCE_SIZES.items()})
        return 2.0 * float(rows) * wide * value.element_size()

    # --- regions

    def regions(self) -> list[Region]:
        found = []
        for values in grouped([n for n in self.nodes if n in self.blocks], self.tied):
            region = Region(values)
            for node in values:
                self.describe(region, node)
            found.append(region)
        return found

    def tied(self, node: fx.Node) -> Iterator[fx.Node]:
        """Operands in the region of ``node``."""
        if node in self.blocks:
            operands = (*alike(node), *(part for part, _ in parts_of(node)), *([node.args[0]] if span(node) else []))
            yield from (o for o in operands if o in self.blocks)  # type: ignore[misc]

    def describe(self, region: Region, node: fx.Node) -> None:
        region.problem = region.problem or self.clashes.get(node)
        region.ports += (p for p in ports_of(node) if p.value is node)
        if unpacked(node, self.blocks[node]):
            region.unpacks.append(node)
        elif not any(p.value is node for p in ports_of(node)) and not self.made_inside(node):
            region.sources.append(node)
        for user in node.users:
            found = [p for p in ports_of(user) if p.value is node]
            reads = [p for p in found if blocks_of(layouts(parse(user))[p.slot])]
            region.ports += reads
            if found and len(found) < uses(user, node):
                region.problem = (f"{user.name} reads it as features and as weights", (node, user))
            if not found and not self.follows(user, node):
                packs = self.packs(node, user)
                if packs is None:
                    region.readers.append((node, user))
                region.packs += (p for p in packs or () if p not in region.packs)

    def made_inside(self, node: fx.Node) -> bool:
        made = alike(node) or (node.args[0] if span(node) else None) or parts_of(node)
        return bool(made) or node.target in FILLS

    def follows(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` is in the region of ``node``, or reads none of its blocks."""
        if user in self.blocks:
            return node in self.tied(user)
        if (taken := span(user)) is not None:
            return cut(self.blocks[node], *taken) == ()
        if user.target is aten.select.int and user.args[1] in (1, -1):
            at: Any = user.args[2]
            return not any(b.offset <= at % columns(node) < b.end for b in self.blocks[node])
        return user.target in (aten.sym_size.int, *FILLS)

    def packs(self, node: fx.Node, user: fx.Node) -> list[fx.Node] | None:
        """The packs that take ``user``, a view of ``node``; None where it is read by anything else."""
        found = [u for u in user.users if self.takes_terms(u)] if user.target in VIEWS else []
        return found if found and len(found) == len(user.users) else None

    def takes_terms(self, pack: fx.Node) -> bool:
        """Whether what a node packs are whole terms."""
        if packed(pack) is None:
            return False
        for view in pack.args[0]:  # type: ignore[union-attr]
            _, mul, width = view.meta["val"].shape  # type: ignore[union-attr]
            if width > 1 and self.blocks.get(view.args[0]) != (Block(0, mul, width // 2),):  # type: ignore[arg-type, union-attr]
                return False
        return True


def grouped(nodes: list[fx.Node], tied: Callable[[fx.Node], Iterable[fx.Node]]) -> list[list[fx.Node]]:
    """``nodes`` by what ties them together, in the order of the graph."""
    parent = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in nodes:
        for other in tied(node):
            parent[find(other)] = find(node)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        found.setdefault(find(node), []).append(node)
    return list(found.values())


def classes(graph: fx.Graph) -> list[list[fx.Node]]:
    """Values [rows, columns] that have the same columns."""
    return grouped([n for n in graph.nodes if columns(n) is not None], alike)


def ports_of(node: fx.Node) -> list[Port]:
    """Slots of features of a tensor product or linear map; none of any other node."""
    if node.target not in (ops.tensor_product, ops.linear):
        return []
    spec, wrt = parse(node), node.args[-1]
    found = []
    for slot, operand in zip(spec.dims, node.args, strict=False):
        if slot in layouts(spec):
            value = node if slot == wrt else operand
            if isinstance(value, fx.Node):
                found.append(Port(node, slot, value))
    return found


class Packed(NamedTuple):
    """``cat`` along components of views of terms that follow each other: columns of ``value``, all of ``mul``."""

    value: fx.Node
    start: int
    end: int
    mul: int


def packed(node: fx.Node) -> Packed | None:
    """The pack that a node is; None where it is none, or read by anything but polynomials."""
    value = node.meta.get("val")
    if node.target is not aten.cat.default or not isinstance(value, torch.Tensor) or value.dim() != 3:
        return None
    if arguments(node)["dim"] not in (2, -1) or any(user.target is not ops.polynomial for user in node.users):
        return None
    source, first, at = None, None, 0
    for view in node.args[0]:  # type: ignore[union-attr]
        if not isinstance(view, fx.Node) or view.target not in VIEWS or view.meta["val"].dim() != 3:
            return None
        inner: Any = view.args[0]
        taken = span(inner)
        base, (start, end) = (inner.args[0], taken) if taken else (inner, (0, columns(inner) or 0))
        if view.meta["val"].shape[1] != value.shape[1] or (source is not None and (base is not source or start != at)):
            return None
        source, first, at = base, start if first is None else first, end
    assert source is not None and first is not None
    return Packed(source, first, at, int(value.shape[1]))


def unpacked(node: fx.Node, blocks: Blocks) -> bool:
    """Whether a value of one block is a view of [rows, mul, 2l+1] that a polynomial made."""
    if node.target not in VIEWS or len(blocks) != 1:
        return False
    made: Any = node.args[0]
    (block,) = blocks
    shape = made.meta["val"].shape
    whole = (block.offset, block.end) == (0, columns(node))
    return made.target is ops.polynomial and whole and tuple(shape[1:]) == (block.mul, 2 * block.l + 1)
