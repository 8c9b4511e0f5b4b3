"""eager: the graph as a plain ``torch.fx.GraphModule`` of ATen ops; needs no compiler."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..ir.program import Program
from .base import LEGAL, executable


class EagerTarget:
    """Runs each node by itself; results carry autograd graphs when autograd is on."""

    name: ClassVar[str] = "eager"
    pipeline: ClassVar[str] = LEGAL

    def lower(self, program: Program) -> nn.Module:
        return executable(program)

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return None
