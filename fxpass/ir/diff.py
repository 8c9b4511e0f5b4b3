"""A diff of two snapshots, node by node.

Text of generated code is no ground for a diff: one node more renumbers all names after it.  Nodes are
matched by what they compute:

1. inputs and weights by name, outputs as such;
2. by value number, that is the same target, literals and equal inputs, within one module; a symbolic size
   equals every other one of the same value;
3. what is left: the same target, literals and module, where no input contradicts: each is equal, or was
   added or removed; of several such nodes the one with most equal inputs, then the one of equal shape;
4. by name in the same module, where the arguments, or the target and the shape, are the same.

What has a partner is unchanged or changed (its target, arguments, shape, dtype, irreps or module are
different, where an argument that was only renamed is not); what has none was added or removed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from .cost import Cost
from .snapshot import REFERENCE, NodeRecord, Snapshot

_COMPARED = ("target", "shape", "dtype", "irreps", "module", "backward")


@dataclass(frozen=True)
class Change:
    """A node on both sides, and the names of the fields that are different."""

    before: NodeRecord
    after: NodeRecord
    fields: tuple[str, ...]

    @property
    def renamed(self) -> bool:
        """Whether the node has another name now, which alone is no change."""
        return self.before.name != self.after.name and self.after.op != "output"

    @property
    def details(self) -> tuple[str, ...]:
        """One line a field: ``"shape: [edges, 32] -> [atoms, 32]"``; of arguments only those that are different."""
        return tuple(f"{name}: {self._told(name)}" for name in self.fields)

    def _told(self, name: str) -> str:
        old, new = getattr(self.before, name), getattr(self.after, name)
        if name == "args":
            olds, news = old.split(", "), new.split(", ")
            if len(olds) == len(news):
                pairs = ((a.strip("[]()"), b.strip("[]()")) for a, b in zip(olds, news, strict=True))
                return ", ".join(f"{a} -> {b}" for a, b in pairs if a != b) or f"{old} -> {new}"
        return f"{_shown(old)} -> {_shown(new)}"


@dataclass(frozen=True)
class ModuleDiff:
    """The part of a diff that belongs to one module path."""

    place: str
    added: tuple[NodeRecord, ...]
    removed: tuple[NodeRecord, ...]
    changed: tuple[Change, ...]
    unchanged: int


@dataclass(frozen=True)
class GraphDiff:
    """What became of the nodes of one snapshot in another.

    Attributes:
        before: label of the first snapshot.
        after: label of the second.
        added, removed, changed: in graph order.
        kept: the nodes of the second snapshot that are as before, names aside.
        cost_before, cost_after: cost of one run.
    """

    before: str
    after: str
    added: tuple[NodeRecord, ...]
    removed: tuple[NodeRecord, ...]
    changed: tuple[Change, ...]
    kept: tuple[NodeRecord, ...]
    cost_before: Cost
    cost_after: Cost

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.added or self.removed or self.changed)

    @property
    def unchanged(self) -> int:
        return len(self.kept)

    @property
    def nodes_before(self) -> int:
        return len(self.removed) + len(self.changed) + self.unchanged

    @property
    def nodes_after(self) -> int:
        return len(self.added) + len(self.changed) + self.unchanged

    @property
    def delta(self) -> str:
        """Node counts: ``"+3 -2 ~1 = 120"``, where 120 is the count afterwards."""
        changed = f" ~{len(self.changed)}" if self.changed else ""
        return f"+{len(self.added)} -{len(self.removed)}{changed} = {self.nodes_after}"

    @property
    def op_delta(self) -> dict[str, int]:
        """Calls of each op after minus before, where they are not the same."""
        counts: dict[str, int] = defaultdict(int)
        for sign, nodes in ((1, self.added), (-1, self.removed)):
            for node in nodes:
                counts[node.target] += sign * (node.op == "call_function")
        for change in self.changed:
            counts[change.after.target] += change.after.op == "call_function"
            counts[change.before.target] -= change.before.op == "call_function"
        return {target: count for target, count in sorted(counts.items()) if count}

    def by_module(self) -> tuple[ModuleDiff, ...]:
        """The diff by module path, in order of path; modules without a difference too."""
        places = {
            *(node.place for nodes in (self.added, self.removed, self.kept) for node in nodes),
            *(change.after.place for change in self.changed),
        }
        return tuple(
            ModuleDiff(
                place,
                tuple(n for n in self.added if n.place == place),
                tuple(n for n in self.removed if n.place == place),
                tuple(c for c in self.changed if c.after.place == place),
                sum(n.place == place for n in self.kept),
            )
            for place in sorted(places)
        )

    def to_json(self) -> dict[str, Any]:
        """The diff as JSON data: nodes as text, unchanged ones counted."""
        return {
            "before": self.before,
            "after": self.after,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "op_delta": self.op_delta,
            "flops": [str(self.cost_before.flops), str(self.cost_after.flops)],
            "bytes": [str(self.cost_before.bytes), str(self.cost_after.bytes)],
            "modules": [
                {
                    "module": part.place,
                    "added": [str(n) for n in part.added],
                    "removed": [str(n) for n in part.removed],
                    "changed": [{"node": str(c.after), "fields": list(c.details)} for c in part.changed],
                    "unchanged": part.unchanged,
                }
                for part in self.by_module()
            ],
        }


def diff(before: Snapshot, after: Snapshot) -> GraphDiff:
    """Compare two snapshots of one program."""
    matching = _Matching(before.nodes, after.nodes)
    matching.run(exact=True)
    matching.run(exact=False)

    added, changed, kept = [], [], []
    for node in after.nodes:
        partner = matching.partners.get(node.name)
        if partner is None:
            added.append(node)
            continue
        differing = matching.differences(partner, node)
        if differing:
            changed.append(Change(partner, node, differing))
        else:
            kept.append(node)
    return GraphDiff(
        before=before.label,
        after=after.label,
        added=tuple(added),
        removed=tuple(node for node in before.nodes if node.name not in matching.taken),
        changed=tuple(changed),
        kept=tuple(kept),
        cost_before=before.cost,
        cost_after=after.cost,
    )


class _Matching:
    """Partners between two lists of nodes, as they are found.

    Every node has a value number, an integer; numbers of both sides are from one table, so nodes that
    compute the same have the same number.  The nodes of a pair have the same number whatever they compute,
    so that a change does not spread to what uses it.
    """

    def __init__(self, before: tuple[NodeRecord, ...], after: tuple[NodeRecord, ...]) -> None:
        self.before = {node.name: node for node in before}
        self.after = {node.name: node for node in after}
        self.partners: dict[str, NodeRecord] = {}  # name after -> node before
        self.taken: set[str] = set()  # names before that have a partner
        self.table: dict[Hashable, int] = {}
        self.numbers_before: dict[str, int] = {}
        self.numbers_after: dict[str, int] = {}
        self.equal: dict[Hashable, list[NodeRecord]] = defaultdict(list)  # nodes before by number and place
        self.alike: dict[Hashable, list[NodeRecord]] = defaultdict(list)  # nodes before by skeleton
        for node in before:
            number = self.numbers_before[node.name] = self._number(node, self.numbers_before)
            self.equal[number, node.target, node.place].append(node)
            self.alike[_skeleton(node)].append(node)

    def run(self, *, exact: bool) -> None:
        """Give every node after its number and a partner: one of equal number, else if not ``exact`` a similar one."""
        for node in self.after.values():
            partner = self.partners.get(node.name)
            number = self._number(node, self.numbers_after)
            if partner is None:
                partner = self._first(self.equal[number, node.target, node.place], node)
                if partner is None and not exact:
                    partner = self._similar(node) or self._namesake(node)
                if partner is not None:
                    self._pair(partner, node)
            self.numbers_after[node.name] = self.numbers_before[partner.name] if partner else number

    def differences(self, old: NodeRecord, new: NodeRecord) -> tuple[str, ...]:
        fields = [name for name in _COMPARED if getattr(old, name) != getattr(new, name)]
        if new.op != "placeholder" and self._value(old, self.numbers_before) != self._value(new, self.numbers_after):
            fields.insert(fields.index("target") + 1 if "target" in fields else 0, "args")
        return tuple(fields)

    def _first(self, candidates: list[NodeRecord], node: NodeRecord) -> NodeRecord | None:
        """The first candidate without a partner, the namesake before all others."""
        free = [old for old in candidates if old.name not in self.taken]
        return next((old for old in free if old.name == node.name), free[0] if free else None)

    def _similar(self, node: NodeRecord) -> NodeRecord | None:
        candidates: dict[tuple[int, bool], list[NodeRecord]] = defaultdict(list)  # by what speaks for them
        for old in self.alike[_skeleton(node)]:
            equal = 0
            for a, b in self._uses(old, node):
                if self.numbers_before[a.name] == self.numbers_after[b.name]:
                    equal += 1
                elif a.name in self.taken and b.name in self.partners:
                    break  # both are known, as different nodes
            else:
                candidates[equal, old.type == node.type].append(old)
        best = (self._first(candidates[merit], node) for merit in sorted(candidates, reverse=True))
        return next(filter(None, best), None)

    def _namesake(self, node: NodeRecord) -> NodeRecord | None:
        old = self.before.get(node.name)
        if old is None or old.name in self.taken or (old.op, old.place) != (node.op, node.place):
            return None
        same_value = self._value(old, self.numbers_before) == self._value(node, self.numbers_after)
        return old if same_value or (old.target, old.shape) == (node.target, node.shape) else None

    def _uses(self, old: NodeRecord, new: NodeRecord) -> Iterator[tuple[NodeRecord, NodeRecord]]:
        """The inputs of two nodes, place by place."""
        for a, b in zip(old.inputs, new.inputs, strict=False):
            if a in self.before and b in self.after:
                yield self.before[a], self.after[b]

    def _pair(self, old: NodeRecord, new: NodeRecord) -> None:
        self.partners[new.name] = old
        self.taken.add(old.name)

    def _number(self, node: NodeRecord, numbers: dict[str, int]) -> int:
        key: Hashable
        if node.op in ("placeholder", "get_attr"):
            key = (node.op, node.target)
        elif node.op == "output":
            key = node.op
        elif node.dtype == "int":
            key = ("size", node.shape)
        else:
            key = (node.op, node.target, self._value(node, numbers))
        return self.table.setdefault(key, len(self.table))

    @staticmethod
    def _value(node: NodeRecord, numbers: dict[str, int]) -> str:
        """The arguments with nodes replaced by their value numbers."""
        return REFERENCE.sub(lambda use: f"%{numbers.get(use[1], use[1])}", node.args)


def _skeleton(node: NodeRecord) -> tuple[Hashable, ...]:
    """A node without its inputs."""
    return node.op, node.target, REFERENCE.sub("%", node.args), node.module, node.backward


def _shown(value: object) -> str:
    return str(value) if value not in ("", None) else "none"
