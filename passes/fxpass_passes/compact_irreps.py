"""The pass ``compact-irreps``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxpass.algebra.irreps import ir_mul, segments
from fxpass.ir import ops
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass, Refusal
from fxpass.rewrite import erase_unused

from .compact_irreps_dense import Dense
from .compact_irreps_regions import FIELDS, Blocks, Layouts, Port, Region, layouts, packed, parse, refined

aten = torch.ops.aten


@dataclass(frozen=True)
class CompactIrreps(Pass):
    """Stores features densely, components first and channels last, wherever that moves fewer bytes.

    Before / After::

        t = tensor_product(x, y, w)  -> 32x0e+32x1o     t = tensor_product(x, y, w)  -> ir_mul:32x0e+32x1o
        m = scatter_sum(t, i, n)                        m = scatter_sum(t, i, n)
        z = linear(m, v)   32x0e+32x1o -> ..            z = linear(m, v)   ir_mul:32x0e+32x1o -> ..

        cat([view(slice(x, 1, 0, 32), [n, 32, 1]),      permute(view(x, [n, 4, 32]), [0, 2, 1])
             view(slice(x, 1, 32, 128), [n, 32, 3])], 2)

        y = linear(x, w)   0e+1o -> 4x0e+4x1o           y = linear(x, w)   0e+1o -> 4x0e
        return slice(y, 1, 0, 4)                        return slice(y, 1, 0, 4)

    Terms that no output depends on, or that nothing makes, go first. In e3nn's layout the 2l+1 components of a
    channel lie side by side; every product with Clebsch-Gordan coefficients or weights transposes them first, and its
    result back. With channels last nothing is transposed, a polynomial reads its variables from a view, and all loops
    run over channels. Each term keeps its columns and its parity, so slices and concatenations of whole terms stay as
    they are. Values that have to agree in layout form a region; each region is converted if its tensor products,
    linear maps and polynomials save more bytes than its borders cost.

    Holds when: the terms of a region are the same for all that read or make it. What else reads the features (an op
    that is not known, an output) is given e3nn's layout; what else makes them is converted. Before `differentiate`
    the backward graph has the same layouts; after it, slices of gradients are borders.

    Keeps: values up to rounding, interface, weights, gradients of any order.
    """

    name: ClassVar[str] = "compact-irreps"
    exactness: ClassVar[Exactness] = Exactness.REASSOCIATES

    def apply(self, program: Program) -> Outcome:
        dense = Dense(program)
        dense.run()
        applications, refusals = dense.applications, dense.refusals
        found = Layouts(program)
        for region in found.regions():
            if not region.ports:
                continue
            first = region.values[0]
            place = provenance(first).module
            saved, paid = gain(found, region), price(found, region)
            if region.problem is not None:
                reason, nodes = region.problem
                refusals.append(Refusal("channels-last", reason, tuple(n.name for n in nodes), place))
            elif saved <= paid:
                reason = f"it would save {saved:.3g} bytes and move {paid:.3g} at its borders"
                borders = [n.name for n in (*region.sources, *(user for _, user in region.readers), *region.unpacks)]
                names = tuple(dict.fromkeys((first.name, *borders)))
                refusals.append(Refusal("channels-last", reason, names, place))
            else:
                counts = _Conversion(program.graph, found, self.name).convert(region)
                applications.append(Application("channels-last", first.name, place, *counts))
        return Outcome(program, bool(applications), tuple(applications), tuple(refusals))


def gain(found: Layouts, region: Region) -> float:
    """Bytes that the semantic ops of a region no longer transpose, and packs no longer copy."""
    ports = sum(found.bytes(p.value) for p in region.ports if transposes(p))
    copied = (packed(node) for node in region.packs)
    whole = (found.bytes(p.value) / _width(found.blocks[p.value]) * (p.end - p.start) for p in copied if p)
    return ports + sum(whole)


def price(found: Layouts, region: Region) -> float:
    """Bytes moved at the borders of a region."""
    values = dict.fromkeys((*region.sources, *region.unpacks, *(value for value, _ in region.readers)))
    joined = {v for v in values if v not in region.unpacks and _width(found.blocks[v]) < v.meta["val"].shape[1]}
    whole = (found.bytes(v) / _width(found.blocks[v]) * v.meta["val"].shape[1] for v in joined)
    return sum(map(found.bytes, values)) + sum(whole)


def transposes(port: Port) -> bool:
    """Whether e3nn's layout costs a copy: a linear map of several terms copies each of them in any case."""
    operand = port.node.target is ops.linear and port.value is not port.node
    return not operand or len(segments(layouts(parse(port.node))[port.slot])) == 1


def _width(blocks: Blocks) -> int:
    return sum(b.end - b.offset for b in blocks)


class _Conversion:
    """The rewriting of one graph, region by region."""

    def __init__(self, graph: fx.Graph, found: Layouts, made_by: str) -> None:
        self.graph, self.blocks, self.splits, self.made_by = graph, found.blocks, found.splits, made_by
        self.made: list[fx.Node] = []

    def convert(self, region: Region) -> tuple[int, int]:
        """Give a region its new layout; returns how many nodes went, and how many came."""
        for value in dict.fromkeys(value for value, _ in region.readers):
            self.leave(value, [user for v, user in region.readers if v is value], value in region.sources)
        for node, slot, _ in region.ports:
            spec: Any = parse(node)
            if slot == "x" and node in self.splits:
                spec = refined(spec, self.splits[node])
            node.update_arg(len(node.args) - 2, str(replace(spec, **_compact(spec, slot))))
        old = [*region.unpacks, *region.packs]
        for node in old:
            with self.graph.inserting_before(node):
                node.replace_all_uses_with(self.pack(node) if node in region.packs else self.unpack(node))
        for value in region.sources:
            self.enter(value, {user for v, user in region.readers if v is value})
        gone = erase_unused(old)
        return len(gone), len(self.made)

    def leave(self, value: fx.Node, readers: list[fx.Node], already: bool) -> None:
        """Give e3nn's layout to what needs it; a source has it."""
        if not already:
            with self.after(value):
                other = self.relaid(value, last=False)
            for user in readers:
                user.replace_input_with(value, other)

    def enter(self, value: fx.Node, readers: set[fx.Node]) -> None:
        """Convert what another op made, for all that is in the region."""
        users = [user for user in value.users if user not in readers]
        with self.after(value):
            other = self.relaid(value, last=True)
        for user in users:
            user.replace_input_with(value, other)

    def pack(self, node: fx.Node) -> fx.Node:
        taken = packed(node)
        assert taken is not None
        x, width = taken.value, taken.end - taken.start
        if width != x.meta["val"].shape[1]:
            x = self.call(aten.slice.Tensor, (x, 1, taken.start, taken.end), node)
        return self.permuted(self.call(aten.view.default, (x, [-1, width // taken.mul, taken.mul]), node), node)

    def unpack(self, node: fx.Node) -> fx.Node:
        ((_, mul, l),) = self.blocks[node]
        turned = self.copied(self.permuted(node.args[0], node), node)
        return self.call(aten.view.default, (turned, [-1, mul * (2 * l + 1)]), node)

    def relaid(self, value: fx.Node, last: bool) -> fx.Node:
        """``value`` with its blocks transposed: to channels last, or from it."""
        parts, at, end = [], 0, value.meta["val"].shape[1]
        for block in self.blocks[value]:
            if block.offset > at:
                parts.append(self.call(aten.slice.Tensor, (value, 1, at, block.offset), value))
            part = self.call(aten.slice.Tensor, (value, 1, block.offset, block.end), value)
            shape = (block.mul, 2 * block.l + 1) if last else (2 * block.l + 1, block.mul)
            view = self.call(aten.reshape.default, (part, [-1, *shape]), value)
            turned = self.copied(self.permuted(view, value), value)
            parts.append(self.call(aten.view.default, (turned, [-1, block.end - block.offset]), value))
            at = block.end
        if end > at:
            parts.append(self.call(aten.slice.Tensor, (value, 1, at, end), value))
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, (parts, 1), value)

    def after(self, value: fx.Node) -> Any:
        inputs = self.graph.find_nodes(op="placeholder")
        return self.graph.inserting_before((inputs[-1] if value in inputs else value).next)

    def permuted(self, x: Any, like: fx.Node) -> fx.Node:
        return self.call(aten.permute.default, (x, [0, 2, 1]), like)

    def copied(self, x: fx.Node, like: fx.Node) -> fx.Node:
        node = self.call(aten.clone.default, (x,), like)
        node.kwargs = {"memory_format": torch.contiguous_format}
        return node

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args)
        set_provenance(node, replace(provenance(like), made_by=self.made_by))
        self.made.append(node)
        return node


def _compact(spec: Any, slot: str) -> dict[str, str]:
    return {FIELDS[slot]: ir_mul(layouts(spec)[slot])}
