"""Legalisation: ops become what stands for them, semantic ops by their reference implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import LoweringError
from .ops import SEMANTIC, OpOverload, fusion_guard
from .program import Program
from .tracing import SIZES, Replay, constants_of, trace_program

#: a fusion guard has no ATen form that is free: each target lowers it in its own way
EXPAND: Mapping[OpOverload, Callable[..., Any]] = {
    op: semantic.reference for op, semantic in SEMANTIC.items() if op is not fusion_guard
}


#: (op, arguments of a call) -> whether that call stays
Keeps = Callable[[Any, Sequence[Any]], bool]


def semantic_nodes(program: Program, keeps: Keeps | None = None) -> list[torch.fx.Node]:
    """The nodes that legalisation replaces."""
    found = [n for n in program.graph.nodes if n.op == "call_function" and n.target in EXPAND]
    if keeps is None:
        return found
    return [n for n in found if not keeps(n.target, torch.fx.map_arg(n.args, lambda a: a.meta["val"]))]


def legalize(program: Program, made_by: str = "legalize", keeps: Keeps | None = None) -> Program:
    """The same program in ATen, fusion guards and the calls that are kept; new nodes say ``made_by``.

    Raises:
        LoweringError: a reference implementation tied a size to a value.
    """

    def expanding(op: Any) -> Callable[..., Any]:
        return lambda *args: (op if keeps is not None and keeps(op, args) else EXPAND[op])(*args)

    return expand_ops(program, {op: expanding(op) for op in EXPAND}, made_by)


def expand_ops(
    program: Program,
    expand: Mapping[Any, Callable[..., Any]],
    made_by: str,
    sizes: Mapping[str, int] | None = None,
) -> Program:
    """The same program, traced again with the functions of ``expand`` in place of the ops that they stand for.

    Args:
        sizes: hints for the named sizes, by default those of atoms, edges and graphs.

    Raises:
        LoweringError: a function tied a size to a value.
    """

    def body(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return list(Replay(program, expand, made_by=made_by).run(*inputs))

    legal, frozen = trace_program(
        body,
        program.inputs,
        program.outputs,
        constants_of(program),
        stage=program.stage,
        energy=program.energy,
        sizes=sizes or SIZES,
    )
    if frozen:
        raise LoweringError(f"legalisation tied a size to a value: {'; '.join(frozen)}")
    return legal.following(program)
