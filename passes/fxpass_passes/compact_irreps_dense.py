"""Terms of features that nothing reads or nothing makes, gone from the layout: the dense half of ``compact-irreps``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxpass.algebra.irreps import channels_last, ir_mul, segments
from fxpass.algebra.multilinear import Linear, TensorProduct
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program
from fxpass.passes import Application, Refusal
from fxpass.rewrite import erase_unused

from .compact_irreps_regions import (
    FIELDS,
    INDICES,
    Port,
    alike,
    classes,
    columns,
    layouts,
    parse,
    parts_of,
    ports_of,
    span,
    uses,
)
from .dead_irreps import Liveness

aten = torch.ops.aten


def without(spec: Any, slot: str, gone: set[int]) -> TensorProduct | Linear:
    """A spec without some terms of a slot, and without the paths that they are part of."""
    irreps, index = layouts(spec)[slot], INDICES[type(spec)][slot]
    kept = [n for n in range(len(segments(irreps))) if n not in gone]
    terms = "+".join(f"{m}x{l}{'e' if p == 1 else 'o'}" for _, m, l, p in (segments(irreps)[n] for n in kept))
    number = {old: new for new, old in enumerate(kept)}
    read = [p for p in spec.paths if getattr(p, index) in number]
    paths = tuple(replace(p, **{index: number[getattr(p, index)]}) for p in read)
    return replace(spec, paths=paths, **{FIELDS[slot]: ir_mul(terms) if channels_last(irreps) else terms})


@dataclass
class Dense:
    """The rewriting of one program, until no term is left to drop."""

    program: Program
    applications: list[Application] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def run(self) -> None:
        while self.sweep():
            pass

    def sweep(self) -> bool:
        before = len(self.applications)
        self.refusals.clear()
        self.live = Liveness(self.program)
        for node in list(self.program.graph.nodes):
            if parts_of(node):
                self.drop_parts(node)
        for values in classes(self.program.graph):
            if all(value.users for value in values):
                self.drop_terms(values)
        return len(self.applications) > before

    def dead(self, value: fx.Node, start: int, end: int) -> bool:
        """Whether no output depends on these columns."""
        mask = self.live.masks.get(value)
        return mask is None or not mask[..., start:end].any()

    def drop_parts(self, node: fx.Node) -> None:
        """Leave out of a concatenation what none of its readers looks at."""
        parts = parts_of(node)
        ports = readers(node)
        if len(ports) != sum(uses(user, node) for user in node.users):
            return
        gone: list[tuple[int, int]] = []
        for part, at in parts:
            end = at + (columns(part) or 0)
            if end > at and self.dead(node, at, end) and all(_terms(p, at, end) is not None for p in ports):
                gone.append((at, end))
        kept = [part for part, at in parts if at not in dict(gone)]
        if not gone or not kept:
            return
        for port in ports:
            rewrite(port, {n for at, end in gone for n in _terms(port, at, end) or ()})
        node.update_arg(0, kept)
        resize(node, sum(columns(part) or 0 for part in kept))
        removed = len(erase_unused(part for part, at in parts if at in dict(gone)))
        self.applied(node, removed)

    def drop_terms(self, values: list[fx.Node]) -> None:
        """Drop terms of values that linear maps and products make, and of which nobody reads those columns."""
        members, first = set(values), values[0]
        ports = [p for v in values for p in ports_of(v) if p.value is v and p.slot == v.args[-1]]
        made = {p.value for p in ports}
        reads = [p for v in values for p in readers(v)]
        if not ports or len({segments(_irreps(p)) for p in (*ports, *reads)}) != 1:
            return
        terms = segments(_irreps(ports[0]))
        gone = set()
        for n, (at, mul, l, _) in enumerate(terms):
            end = at + mul * (2 * l + 1)
            empty = len(made) == len(ports) and not any(_touches(p, n) for p in ports)
            if empty or all(self.dead(v, at, end) for v in values):
                gone.add(n)
        if not gone or len(gone) == len(terms):
            return
        cut = [(terms[n][0], terms[n][0] + terms[n][1] * (2 * terms[n][2] + 1)) for n in sorted(gone)]
        problem = [v for v in values if v not in made and not alike(v)]
        slices, joins = [], dict[fx.Node, set[int]]()
        for value in values:
            for user in value.users:
                taken = span(user)
                known = sum(p.node is user and p.value is value for p in reads)
                if user in members or known == uses(user, value) or _reads_rows(user):
                    continue
                starts = {at for part, at in parts_of(user) if part is value}
                if taken is not None and not any(a < taken[1] and taken[0] < b for a, b in cut):
                    slices.append((user, taken))
                elif starts and self.joins_whole(user, [(at + a, at + b) for at in starts for a, b in cut]):
                    joins.setdefault(user, set()).update(starts)
                else:
                    problem.append(user)
        if problem:
            reason = f"terms {', '.join(map(str, sorted(gone)))} of {_irreps(ports[0])} are dead and stay: "
            reason += f"{problem[0].name} makes or reads whole rows"
            names = tuple(dict.fromkeys((first.name, *(n.name for n in problem))))
            self.refusals.append(Refusal("dense", reason, names, provenance(first).module))
            return
        for port in (*ports, *reads):
            rewrite(port, gone)
        width = terms[-1][0] + terms[-1][1] * (2 * terms[-1][2] + 1) - sum(b - a for a, b in cut)
        for user, (start, end) in slices:
            by = sum(b - a for a, b in cut if b <= start)
            user.args, user.kwargs = (user.args[0], 1, start - by, end - by), {}
        for join, starts in joins.items():
            spans = [(at + a, at + b) for at in starts for a, b in cut]
            for port in readers(join):
                rewrite(port, {n for span_ in spans for n in _terms(port, *span_) or ()})
            resize(join, (columns(join) or 0) - sum(b - a for a, b in spans))
        for value in values:
            resize(value, width)
        self.applied(first, 0)

    def joins_whole(self, node: fx.Node, spans: list[tuple[int, int]]) -> bool:
        """Whether all that reads a concatenation can do without these columns."""
        ports = readers(node)
        if len(ports) != sum(uses(user, node) for user in node.users):
            return False
        return all(_terms(p, *span_) is not None for p in ports for span_ in spans)

    def applied(self, node: fx.Node, removed: int) -> None:
        self.applications.append(Application("dense", node.name, provenance(node).module, removed=removed))


def readers(value: fx.Node) -> list[Port]:
    """Slots of tensor products and linear maps that read a value."""
    return [p for user in value.users for p in ports_of(user) if p.value is value]


def rewrite(port: Port, gone: set[int]) -> None:
    node = port.node
    node.update_arg(len(node.args) - 2, str(without(parse(node), port.slot, gone)))


def resize(node: fx.Node, width: int) -> None:
    value = node.meta["val"]
    node.meta["val"] = value.new_empty((value.shape[0], width))


def _irreps(port: Port) -> str:
    return layouts(parse(port.node))[port.slot]


def _touches(port: Port, term: int) -> bool:
    spec = parse(port.node)
    return any(getattr(p, INDICES[type(spec)][port.slot]) == term for p in spec.paths)


def _terms(port: Port, start: int, end: int) -> set[int] | None:
    """Terms that fill columns ``start`` to ``end``; None where they do not."""
    rows = segments(_irreps(port))
    ends = [*accumulate((m * (2 * l + 1) for _, m, l, _ in rows), initial=0)]
    if start not in ends or end not in ends:
        return None
    return {n for n, row in enumerate(rows) if start <= row[0] < end}


def _reads_rows(user: fx.Node) -> bool:
    """Whether only the number of rows is read."""
    return user.target is aten.sym_size.int and user.args[1:] == (0,)
