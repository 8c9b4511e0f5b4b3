"""Rules: pattern, check, replace.

::

    def check(match, program, *, x, scale):
        return None if scale > 0 else refuse("the scale is negative", x)

    def rescale(match, program, builder, *, x, scale):
        return builder.call(aten.mul.Tensor, x, scale)

    RULE = Rule("merge-scales", pattern, check, rescale)

``check`` and ``replace`` take the names that the pattern binds as keyword arguments.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from ..errors import Location, UsageError
from ..ir.metadata import provenance, set_provenance
from ..ir.program import Program, add_constant
from .pattern import Pattern, Target, names, root_ops


@dataclass(frozen=True)
class Refused:
    """Why a check refused a match, and the nodes to blame."""

    reason: str
    nodes: tuple[fx.Node, ...] = ()


def refuse(reason: str, *nodes: fx.Node) -> Refused:
    """What a check returns where the rule must not fire; the report quotes it."""
    return Refused(reason, nodes)


Check: TypeAlias = Callable[..., Refused | None]
Replace: TypeAlias = Callable[..., fx.Node]


@dataclass(frozen=True)
class Rule:
    """One rewrite: where the pattern matches and the check agrees, another node takes over from the root.

    Attributes:
        name: kebab-case name, quoted in reports.
        pattern: what to look for, anchored at an op.
        check: ``check(match, program, *, <names>) -> Refused | None``; ``None`` where the pattern says it all.
        replace: ``replace(match, program, builder, *, <names>) -> node``, the node that takes over from the
            root: a new one or one of the bound ones.
        origin: ``file:line`` of the declaration.

    Raises:
        UsageError: the pattern is not anchored at an op, or a function does not take the pattern's names.
    """

    name: str
    pattern: Pattern
    check: Check | None
    replace: Replace
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.origin:
            declared = traceback.extract_stack(limit=3)[0]  # below this method and the generated __init__
            object.__setattr__(self, "origin", f"{declared.filename}:{declared.lineno}")
        if not root_ops(self.pattern):
            raise UsageError(
                f"the pattern of rule {self.name!r} matches at any node",
                where=Location(source=self.origin),
                hint="anchor it at an Op",
            )
        bound = dict.fromkeys(names(self.pattern))
        for function, given in ((self.check, 2), (self.replace, 3)):
            if function is None:
                continue
            try:
                inspect.signature(function).bind(*[None] * given, **bound)
            except TypeError as error:
                label = "check" if function is self.check else "replace"
                raise UsageError(
                    f"{label} of rule {self.name!r} does not take what the pattern binds: {error}",
                    where=Location(source=self.origin),
                    hint=f"give it the keyword arguments {', '.join(bound)}",
                ) from error

    def targets(self) -> frozenset[object] | None:
        """Targets that the root may have; ``None`` where a predicate decides."""
        ops = root_ops(self.pattern)
        return None if any(op.predicate for op in ops) else frozenset(t for op in ops for t in op.targets)


class Builder:
    """Makes the nodes of a replacement, in front of the root and with its provenance."""

    def __init__(self, program: Program, root: fx.Node, made_by: str) -> None:
        self.nodes: list[fx.Node] = []
        self._program = program
        self._root = root
        self._provenance = replace(provenance(root), made_by=made_by)

    def call(self, target: Target, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of ``target``; nodes may stand wherever the op takes a tensor or a size."""
        with self._program.graph.inserting_before(self._root):
            return self._record(self._program.graph.call_function(target, args, kwargs))

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A buffer that holds ``value``, under a fresh name derived from ``name``."""
        attribute = add_constant(self._program, name, value)
        with self._program.graph.inserting_before(self._root):
            return self._record(self._program.graph.get_attr(attribute))

    def _record(self, node: fx.Node) -> fx.Node:
        set_provenance(node, self._provenance)
        self.nodes.append(node)
        return node
