"""Applies rules to a program until none fires, and says which nodes may be removed, merged or skipped."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..errors import Location, PassError
from ..ir.metadata import provenance
from ..ir.program import Program
from ..passes import Application, Outcome, Refusal
from .pattern import Match, OpOverload, PartialMatch, arguments, match
from .rule import Builder, Refused, Rule, refuse


@dataclass(frozen=True)
class RuleStatistics:
    """How often a rule was tried at a node that could be its root, matched in full, and applied."""

    rule: str
    tried: int
    matched: int
    applied: int


@dataclass(frozen=True)
class RewriteOutcome(Outcome):
    """The outcome of ``apply_rules``, with the statistics of each rule."""

    statistics: tuple[RuleStatistics, ...] = ()


def apply_rules(program: Program, rules: Sequence[Rule], *, made_by: str, limit: int | None = None) -> RewriteOutcome:
    """Sweep over the graph in topological order, in place, until no rule fires.

    At each node the first rule that fires wins.  What it makes is inserted in front of the root and carries
    the root's provenance; nodes that nothing needs any more go at once, and are counted as removed.

    Args:
        program: its graph is changed in place.
        rules: in order of precedence.
        made_by: name of the pass, for the provenance of new nodes.
        limit: number of applications above which rewriting counts as endless; by default a hundred, and
            ten for each node of the graph.

    Returns:
        The outcome; its refusals hold in the graph that is returned.

    Raises:
        PassError: a rule keeps firing, or did not return a node that can take over.
    """
    driver = _Driver(program, tuple(rules), made_by, 100 + 10 * len(program.graph.nodes) if limit is None else limit)
    while driver.sweep():
        pass
    return RewriteOutcome(
        program,
        modified=bool(driver.applications),
        applications=tuple(driver.applications),
        refusals=tuple(driver.refusals),
        statistics=tuple(
            RuleStatistics(r.name, driver.tried[r.name], driver.matched[r.name], driver.applied[r.name]) for r in rules
        ),
    )


class _Driver:
    def __init__(self, program: Program, rules: tuple[Rule, ...], made_by: str, limit: int) -> None:
        self.program = program
        self.rules = [(rule, rule.targets()) for rule in rules]
        self.made_by = made_by
        self.limit = limit
        self.applications: list[Application] = []
        self.refusals: list[Refusal] = []
        self.tried, self.matched, self.applied = Counter[str](), Counter[str](), Counter[str]()
        self.erased: set[fx.Node] = set()

    def sweep(self) -> bool:
        """Visit every node once; refusals are those of the last sweep, which changes nothing."""
        before = len(self.applications)
        self.refusals.clear()
        for root in list(self.program.graph.nodes):
            dead = root in self.erased or (not root.users and is_pure(root))
            if not dead and root.op not in ("placeholder", "output"):
                self.visit(root)
        return len(self.applications) > before

    def visit(self, root: fx.Node) -> None:
        for rule, targets in self.rules:
            if targets is not None and root.target not in targets:
                continue
            self.tried[rule.name] += 1
            found = match(rule.pattern, root)
            if isinstance(found, PartialMatch):
                self.refuse(rule, root, refuse(found.reason, found.node))
            if not isinstance(found, Match):
                continue
            self.matched[rule.name] += 1
            refused = rule.check(found, self.program, **found.bindings) if rule.check else None
            if refused is None:
                self.replace(rule, found)
                return
            self.refuse(rule, root, refused)

    def refuse(self, rule: Rule, root: fx.Node, refused: Refused) -> None:
        nodes = tuple(dict.fromkeys(node.name for node in (root, *refused.nodes)))
        self.refusals.append(Refusal(rule.name, refused.reason, nodes, provenance(root).module))

    def replace(self, rule: Rule, found: Match) -> None:
        root, builder = found.root, Builder(self.program, found.root, self.made_by)
        where = Location(pass_name=self.made_by, node=root.name, source=rule.origin)
        new = rule.replace(found, self.program, builder, **found.bindings)
        if not isinstance(new, fx.Node) or new is root or new.graph is not self.program.graph:
            raise PassError(f"rule {rule.name!r} returned {new!r}, which cannot take over from the root", where=where)
        if any(root in node.all_input_nodes for node in builder.nodes):
            hint = "call the root's op again, on its arguments"
            raise PassError(f"rule {rule.name!r} made a node that reads the root it replaces", where=where, hint=hint)
        root.replace_all_uses_with(new)
        gone = erase_unused((root, *found.nodes, *builder.nodes))
        if root not in gone and not root.users:
            self.program.graph.erase_node(root)  # impure, and replaced
            gone |= {root}
        self.erased |= gone
        made = set(builder.nodes)
        self.applied[rule.name] += 1
        self.applications.append(
            Application(rule.name, root.name, provenance(root).module, len(gone - made), len(made - gone))
        )
        if len(self.applications) > self.limit:
            most, times = self.applied.most_common(1)[0]
            origin = next(r.origin for r, _ in self.rules if r.name == most)
            raise PassError(
                f"rule {most!r} keeps firing: {times} applications and no end",
                where=Location(pass_name=self.made_by, node=root.name, source=origin),
                hint="let its check refuse what its replace returns",
            )


def erase_unused(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erase those of ``nodes`` that are pure and have no users, and what only they needed; return the erased."""
    erased: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in erased or node.users or not is_pure(node):
            continue
        pending.extend(node.all_input_nodes)
        node.graph.erase_node(node)
        erased.add(node)
    return erased


def is_pure(node: fx.Node) -> bool:
    """Whether a node may be removed, merged or computed ahead of time: no input or output, no effect, no randomness."""
    return not node.is_impure()


def escapes(node: fx.Node) -> bool:
    """Whether the program returns ``node`` or a view of it.

    Such a node must not be replaced by one that shares memory with an input, a weight or another output:
    a caller may write to what it gets.
    """
    return any(user.op == "output" or (node in shares_memory(user) and escapes(user)) for user in node.users)


def shares_memory(node: fx.Node) -> tuple[fx.Node, ...]:
    """Inputs whose memory the result of ``node`` may share, as its schema declares."""
    if node.target is operator.getitem:
        return tuple(node.all_input_nodes)
    if not isinstance(node.target, OpOverload):
        return ()
    if node.target is torch.ops.aten._unsafe_view.default:  # a view that its schema does not declare
        return tuple(node.all_input_nodes[:1])
    names = [argument.name for argument in node.target._schema.arguments if argument.alias_info is not None]
    given = arguments(node) if names else {}
    lists = (given[name] if isinstance(given[name], (list, tuple)) else [given[name]] for name in names)
    return tuple(value for values in lists for value in values if isinstance(value, fx.Node))
