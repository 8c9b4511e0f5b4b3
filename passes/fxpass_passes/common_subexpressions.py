"""The pass ``common-subexpressions``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, attribute
from fxpass.passes import Application, Exactness, Outcome, Pass
from fxpass.rewrite import arguments, escapes, is_pure


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Computes equal expressions once.

    Before / After::

        a = mul(x, 2.0)                  a = mul(x, 2.0)
        b = mul(x, 2.0)                  c = add(a, a)
        c = add(a, b)

    Holds when: both nodes call the same op with the same arguments, defaults filled in; literals of
    different type differ (``1``, ``1.0`` and ``True``, ``0.0`` and ``-0.0``). Two weights are the same where
    they are the same memory read in the same way. Random ops, and two results that are both returned,
    are left alone.

    Keeps: bits, gradients, interface, and the provenance of the first node.
    """

    name: ClassVar[str] = "common-subexpressions"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program) -> Outcome:
        first: dict[Hashable, fx.Node] = {}
        applications: list[Application] = []
        for node in list(program.graph.nodes):
            if not is_pure(node):
                continue
            known = first.setdefault(_expression(program, node), node)
            # Two outputs in one memory would change together where the caller writes to one of them.
            if known is node or (escapes(known) and escapes(node)):
                continue
            node.replace_all_uses_with(known)
            program.graph.erase_node(node)
            applications.append(Application("equal-expressions", node.name, provenance(node).module, removed=1))
        return Outcome(program, bool(applications), tuple(applications))


def _expression(program: Program, node: fx.Node) -> Hashable:
    """Equal for two nodes if and only if they are the same expression."""
    if node.op == "get_attr":
        return "weight", *_memory(attribute(program, node))
    return node.target, _literal(arguments(node))


def _memory(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    learned = isinstance(tensor, torch.nn.Parameter), tensor.requires_grad
    if tensor.layout is not torch.strided:
        return id(tensor), *learned
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *start, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, *learned


def _literal(value: Any) -> Hashable:
    """Hashable stand-in for an argument that, unlike Python's ``==``, keeps types and signed zeros apart."""
    if isinstance(value, (list, tuple)):
        return "list", *(_literal(v) for v in value)
    if isinstance(value, dict):
        return "dict", *((key, _literal(v)) for key, v in sorted(value.items()))
    return type(value), repr(value) if isinstance(value, (float, complex, slice)) else value
