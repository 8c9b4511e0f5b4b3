"""inductor: the graph through ``torch.compile`` with dynamic sizes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ir.program import Program
from .base import LEGAL, executable


class InductorTarget:
    """Compiles at the first call, once for all sizes of two and more."""

    name: ClassVar[str] = "inductor"
    pipeline: ClassVar[str] = LEGAL

    def lower(self, program: Program) -> nn.Module:
        return Compiled(program)


class Compiled(nn.Module):
    """One compiled program, and the same program in eager mode for sizes of 0 and 1.

    torch.compile specialises sizes 0 and 1 whatever it is told, which would recompile there; those calls
    are too small to gain from it, so they run eagerly.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.eager = executable(program)
        self.axes = tuple(
            tuple(k for k, dim in enumerate(spec.dims) if isinstance(dim, str)) for spec in program.inputs
        )
        self.compiled = torch.compile(self.eager, dynamic=True, fullgraph=True)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        for value, axes in zip(inputs, self.axes, strict=True):
            if any(value.shape[k] < 2 for k in axes):
                return self.eager(*inputs)
        for value, axes in zip(inputs, self.axes, strict=True):
            for k in axes:
                torch._dynamo.mark_dynamic(value, k)
        return self.compiled(*inputs)
