"""native: fused kernels, generated as C++ for this machine and this model, and ATen for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..ir.ops import SEMANTIC, fusion_guard
from ..ir.program import Program
from ..kernels.build import build, find_compiler
from ..kernels.choice import Choice, choose
from .base import LEGAL, ManifestRow, executable

#: edges and atoms fused, linear maps folded; of the semantic ops that are left those without a kernel become ATen
FUSED = (
    "fold-linears,fuse-convolution,fuse-contraction,legalize{kernels=true},"
    "fold-constants,common-subexpressions,dead-code"
)


UNBUILT = ManifestRow("", "any op", "", "no C++ compiler on PATH builds kernels; fxpass doctor says why")


class NativeTarget:
    """Kernels are built when a model is lowered, and kept for the next time; without a compiler it runs as ATen."""

    name: ClassVar[str] = "native"

    @property
    def pipeline(self) -> str:  # depends on the machine
        return LEGAL if find_compiler() is None else FUSED

    def lower(self, program: Program) -> nn.Module:
        return Native(program)

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return None


class Native(nn.Module):
    """A lowered program.

    Calls that record autograd run the ops one by one, whose derivatives torch knows; so do those with inputs of another
    type or device than the kernels were made for, which would read them as something else. All others run the kernels.

    Attributes:
        manifest: what runs each semantic op.
        sources: C++ text by name of kernel.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.eager = executable(program)
        self.dtypes = tuple(spec.dtype for spec in program.inputs)
        compiler = find_compiler()
        chosen, rows = _choices(program) if compiler is not None else ({}, (UNBUILT,))
        self.manifest: tuple[ManifestRow, ...] = rows
        self.sources: Mapping[str, str] = {c.kernel.name: c.kernel.source for c in chosen.values()}
        self.fused = self.eager
        if compiler is not None and chosen:
            libraries = build(self.sources, compiler)
            self.fused = _bound(self.eager, {n: c.bind(libraries[c.kernel.name]) for n, c in chosen.items()})

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return self.eager(*inputs)
        if any(t.dtype != d or t.device.type != "cpu" for t, d in zip(inputs, self.dtypes, strict=True)):
            return self.eager(*inputs)
        return self.fused(*inputs)


def _choices(program: Program) -> tuple[dict[str, Choice], tuple[ManifestRow, ...]]:
    """Kernels by name of the node that they run, and the manifest."""
    chosen, rows = {}, []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in SEMANTIC or node.target is fusion_guard:
            continue  # a guard runs nothing, and one op after the other fuses nothing
        found = choose(node.target, fx.map_arg(node.args, lambda n: n.meta["val"]), _constants(program, node))
        if isinstance(found, Choice):
            chosen[node.name] = found
        name, reason = (found.kernel.name, "") if isinstance(found, Choice) else ("", found)
        rows.append(ManifestRow(node.name, SEMANTIC[node.target].name, name, reason))
    return chosen, tuple(rows)


def _constants(program: Program, node: fx.Node) -> dict[int, Tensor]:
    """Values of the arguments that are weights, by position."""
    return {
        at: getattr(program.graph_module, str(a.target)).detach()
        for at, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op == "get_attr"
    }


def _bound(module: fx.GraphModule, functions: Mapping[str, Any]) -> fx.GraphModule:
    """A module on the same weights that calls ``functions`` in place of the nodes of these names."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(module.graph, copies)
    graph.output(returned)
    for node, copy in copies.items():
        if node.name in functions:
            copy.target = functions[node.name]
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)
