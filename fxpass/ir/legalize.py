"""Legalisation: semantic ops become ATen, by their reference implementations."""

from __future__ import annotations

import torch

from ..errors import LoweringError
from .ops import SEMANTIC
from .program import Program
from .tracing import Replay, constants_of, trace_program


def semantic_nodes(program: Program) -> list[torch.fx.Node]:
    """The nodes that legalisation replaces."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target in SEMANTIC]


def legalize(program: Program, made_by: str = "legalize") -> Program:
    """The same program in ATen alone; provenance is kept, new nodes say ``made_by``.

    Raises:
        LoweringError: a reference implementation tied a size to a value.
    """
    expand = {op: semantic.reference for op, semantic in SEMANTIC.items()}

    def body(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return list(Replay(program, expand, made_by=made_by).run(*inputs))

    legal, frozen = trace_program(
        body, program.inputs, program.outputs, constants_of(program), stage=program.stage, energy=program.energy
    )
    if frozen:
        raise LoweringError(f"legalisation tied a size to a value: {'; '.join(frozen)}")
    return legal.with_assumptions(program.assumptions)
