"""inductor: the graph through ``torch.compile`` with dynamic sizes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .._torch_compat import compile_in_regions, mark_dynamic
from ..ir.guards import guards, region_of
from ..ir.ops import fusion_guard
from ..ir.program import Program, TensorSpec
from .base import LEGAL, executable


class InductorTarget:
    """Compiles at the first call, once for all sizes of two and more."""

    name: ClassVar[str] = "inductor"
    pipeline: ClassVar[str] = LEGAL

    def lower(self, program: Program) -> nn.Module:
        return Compiled(program)

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return None


class Compiled(nn.Module):
    """One compiled program for all sizes, and the same program in eager mode for less than two atoms or edges.

    torch.compile specialises sizes 0 and 1 whatever it is told, which would recompile there.  Most batches hold
    one structure, so the last graph's inputs are repeated for a graph without atoms, whose results are dropped.
    Less than two atoms or edges are too little to gain from compiling, so those calls run eagerly.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.eager = executable(program)
        self.axes = tuple(_axes(spec) for spec in program.inputs)
        self.per_graph = tuple(_graph_axis(spec) for spec in program.inputs)
        self.results_per_graph = tuple(_graph_axis(spec) for spec in program.outputs)
        if guards(program.graph):
            guarded = executable(program, guarded=True)
            for name, parameter in self.eager.named_parameters():
                setattr(guarded, name, parameter)  # one set of weights
            self.compiled = compile_in_regions(guarded, fusion_guard, region_of)
        else:
            self.compiled = torch.compile(self.eager, dynamic=True, fullgraph=True)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        padded = [value if k is None else _one_more(value, k) for value, k in zip(inputs, self.per_graph, strict=True)]
        if any(value.shape[k] < 2 for value, axes in zip(padded, self.axes, strict=True) for k in axes):
            return self.eager(*inputs)
        for value, axes in zip(padded, self.axes, strict=True):
            for k in axes:
                mark_dynamic(value, k)
        results = self.compiled(*padded)
        return [
            value if k is None else value.narrow(k, 0, value.shape[k] - 1)
            for value, k in zip(results, self.results_per_graph, strict=True)
        ]


def _axes(spec: TensorSpec) -> tuple[int, ...]:
    """The dimensions of symbolic size."""
    return tuple(k for k, dim in enumerate(spec.dims) if isinstance(dim, str))


def _graph_axis(spec: TensorSpec) -> int | None:
    return spec.dims.index("graphs") if "graphs" in spec.dims else None


def _one_more(value: Tensor, axis: int) -> Tensor:
    """``value`` with its last slice repeated, where it has one."""
    return torch.cat([value, value.narrow(axis, max(value.shape[axis] - 1, 0), min(value.shape[axis], 1))], axis)
