"""The pass ``fold-constants``."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxpass.errors import Location, PassError
from fxpass.ir import ops
from fxpass.ir.metadata import provenance, set_provenance
from fxpass.ir.program import Program, add_constant, attribute
from fxpass.passes import Application, Exactness, Outcome, Pass
from fxpass.rewrite import apply_rules, erase_unused, escapes, is_pure

from .identities import IDENTITIES


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluates what depends on weights and literals only, and drops operations that do nothing.

    Before / After::

        v = mul(weight, 0.5)             y = mm(x, folded_mul)
        y = mm(x, v)
        a = view(y, y.shape)             return y
        return mul(a, 1)

    Holds when: evaluated nodes are not random, read no symbolic size and are not returned, and their result
    is smaller than ``limit`` bytes or than what they read. An operation does nothing if its result has the
    shape, strides, dtype and device of its operand and it is: a view, or two views that undo each other; a
    copy; ``x * 1``, ``x / 1``, ``x - 0``; for integers also ``x + 0``, which for floats turns -0.0 into 0.0;
    ``detach`` once the forces are in the graph. A returned copy stays, as its memory belongs to the caller.

    Keeps: bits and interface. Gradients with respect to inputs; those with respect to folded weights are
    gone, because the result is a buffer: ``parameters=False`` folds no trainable weight.

    Attributes:
        limit: size in bytes above which a result must be smaller than what it is computed from.
        parameters: whether parameters count as constants.
    """

    name: ClassVar[str] = "fold-constants"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    limit: int = 64 << 20
    parameters: bool = True

    def apply(self, program: Program) -> Outcome:
        simpler = apply_rules(program, IDENTITIES, made_by=self.name)
        folded = self._fold(program)
        applications = simpler.applications + folded
        return Outcome(program, bool(applications), applications, simpler.refusals)

    def _fold(self, program: Program) -> tuple[Application, ...]:
        graph = program.graph
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = attribute(program, node)
                if self.parameters or not isinstance(tensor, torch.nn.Parameter):
                    values[node] = tensor
            elif _is_foldable(node, values) and self._fits(node, node.meta.get("val"), values):
                value = _evaluate(node, values, self.name)
                if self._fits(node, value, values):
                    values[node] = value
        applications = []
        for node, value in values.items():
            needed = any(user not in values for user in node.users)
            if node.op != "call_function" or not isinstance(value, torch.Tensor) or not needed:
                continue
            with graph.inserting_before(node):
                constant = graph.get_attr(_store(program, f"folded_{node.name}", value))
            set_provenance(constant, replace(provenance(node), made_by=self.name))
            node.replace_all_uses_with(constant)
            removed = len(erase_unused([node]))
            applications.append(Application("constant", node.name, provenance(node).module, removed, added=1))
        return tuple(applications)

    def _fits(self, node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> bool:
        return _bytes(value) <= max(self.limit, sum(_bytes(values[n]) for n in node.all_input_nodes))


def _is_foldable(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    schema = getattr(node.target, "_schema", None)
    # What empty returns is no constant.
    known = node.target is operator.getitem or (schema is not None and "empty" not in schema.name)
    if node.target is ops.dequantize:
        return False  # what it reads is the smaller to store; once legalised it folds
    return known and is_pure(node) and all(n in values for n in node.all_input_nodes) and not escapes(node)


def _evaluate(node: fx.Node, values: Mapping[fx.Node, Any], pass_name: str) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        with torch.inference_mode(False), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError as error:
        raise PassError(
            f"a constant cannot be computed: {error}",
            where=Location(pass_name=pass_name, node=node.name, module_path=provenance(node).module),
        ) from error


def _bytes(value: Any) -> float:
    """Size of a result; infinite where it is not known before it runs."""
    if isinstance(value, torch.Tensor):
        known = value.layout is torch.strided and not isinstance(value.numel(), torch.SymInt)
        return value.numel() * value.element_size() if known else math.inf
    return sum(_bytes(v) for v in value) if isinstance(value, (list, tuple)) else 0


def _store(program: Program, name: str, value: torch.Tensor) -> str:
    """Name of a buffer that holds ``value``, bit for bit: one that is there already, or a new one."""
    for known, buffer in program.graph_module.named_buffers():
        if _same_bits(buffer, value):
            return known
    return add_constant(program, name, value)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.stride(), a.dtype, a.device) != (b.shape, b.stride(), b.dtype, b.device):
        return False
    whole = torch.contiguous_format  # by a copy: one row of a larger tensor passes for contiguous, and keeps its stride
    return torch.equal(*(t.resolve_conj().clone(memory_format=whole).flatten().view(torch.uint8) for t in (a, b)))
