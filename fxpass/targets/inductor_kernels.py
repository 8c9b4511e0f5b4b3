"""inductor-kernels: the graph through ``torch.compile`` with dynamic sizes, its fused ops in kernels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, fx, nn

from ..ir.ops import SEMANTIC, fusion_guard
from ..ir.program import Program
from ..kernels.build import build, find_compiler
from ..kernels.choice import Choice, choose
from ..kernels.dispatch import Kernels
from .base import LEGAL, ManifestRow
from .inductor import Compiled
from .native import FUSED, UNBUILT


class InductorKernelsTarget:
    """Kernels for what is fused, torch.compile for the rest, also where autograd records.

    Kernels are built when a model is lowered, the rest at the first call. Without a C++ compiler it is all compiled.
    """

    name: ClassVar[str] = "inductor-kernels"

    @property
    def pipeline(self) -> str:  # depends on the machine
        return LEGAL if find_compiler() is None else FUSED

    def lower(self, program: Program) -> nn.Module:
        return CompiledKernels(program)

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return None


class CompiledKernels(nn.Module):
    """A compiled program whose ops run kernels where they have one, also in calls that record autograd.

    The backward of such calls is run by the caller, and by references.

    Attributes:
        manifest: what runs each semantic op.
        sources: C++ text by name of kernel.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = Compiled(program)
        weights = [*self.program.eager.parameters(), *self.program.eager.buffers()]
        self.kernels = Kernels(weights)
        self.manifest: tuple[ManifestRow, ...] = (UNBUILT,)
        self.sources: dict[str, str] = {}
        if (compiler := find_compiler()) is not None:
            self.manifest, self.sources = _planned(program)
            build(self.sources, compiler)  # all of them at once; each is loaded when it is called first

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        with self.kernels:
            return self.program(*inputs)


def _planned(program: Program) -> tuple[tuple[ManifestRow, ...], dict[str, str]]:
    """The manifest, and the sources of all kernels by name."""
    rows, sources = [], {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in SEMANTIC and node.target is not fusion_guard:
            constants = {
                at: getattr(program.graph_module, str(a.target)).detach()
                for at, a in enumerate(node.args)
                if isinstance(a, fx.Node) and a.op == "get_attr"
            }
            found = choose(node.target, fx.map_arg(node.args, lambda n: n.meta["val"]), constants)
            op = SEMANTIC[node.target].name
            if isinstance(found, Choice):
                sources[found.kernel.name] = found.kernel.source
                rows.append(ManifestRow(node.name, op, found.kernel.name))
            else:
                rows.append(ManifestRow(node.name, op, "", found))
    return tuple(rows), sources
