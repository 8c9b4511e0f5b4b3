"""native: fused kernels, generated as C++ for this machine and this model, and ATen for the rest."""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..edges import Edges
from ..ir.guards import lower_guards
from ..ir.ops import SEMANTIC
from ..ir.program import Program
from ..kernels.build import build, find_compiler
from ..kernels.choice import Choice, choose
from ..kernels.edges import IN_ORDER, PLAIN, BoundEdges, EdgesKernel
from ..kernels.neighbours import BoundNeighbours, NeighboursKernel
from ..kernels.step.run import Plan, bind, graph_of, plan
from ..kernels.step.translate import Fixed
from ..neighbours import Pairs
from .base import ATEN, LEGAL, ManifestRow, executable

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

    def finish(self, interface: nn.Module) -> None:
        compiler = find_compiler()
        if compiler is None:
            return
        children = [(parent, *found) for parent in list(interface.modules()) for found in parent.named_children()]
        edges, neighbours = EdgesKernel(), NeighboursKernel()
        wanted = {edges.name: edges.source} if any(type(child) is Edges for _, _, child in children) else {}
        wanted |= {neighbours.name: neighbours.source} if any(type(child) is Pairs for _, _, child in children) else {}
        libraries = build(wanted, compiler)
        for parent, name, child in children:
            if type(child) is Edges:
                setattr(parent, name, NativeEdges(child, edges.bind(libraries[edges.name])))
            elif type(child) is Pairs:
                setattr(parent, name, NativePairs(child, neighbours.bind(libraries[neighbours.name])))


class NativeEdges(Edges):
    """Edges whose usual case, that nothing is to be done, is found in one pass; all else is torch's."""

    def __init__(self, edges: Edges, functions: BoundEdges) -> None:
        super().__init__(edges.cutoff)
        self.sort, self.drop, self.mask, self.shortest = edges.sort, edges.drop, edges.mask, edges.shortest
        self.functions = functions

    def vectors(self, positions: Tensor, index: Tensor, shifts: Tensor) -> Tensor:
        made = self.functions.vectors(positions, index, shifts)
        return super().vectors(positions, index, shifts) if made is None else made

    def forward(self, vectors: Tensor, index: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor | None]:
        wanted = (PLAIN if self.drop or self.mask or self.shortest > 0 else 0) | (IN_ORDER if self.sort else 0)
        found = self.functions.look(vectors.detach(), index, atoms, self.shortest, self.cutoff) if wanted else 0
        return (vectors, index, None) if found & wanted == wanted else super().forward(vectors, index, atoms)

    def forces(self, gradient: Tensor, index: Tensor, like: Tensor) -> Tensor:
        made = self.functions.forces(gradient, index, like)
        return super().forces(gradient, index, like) if made is None else made

    def virial(self, gradient: Tensor, vectors: Tensor) -> Tensor:
        made = self.functions.virial(gradient, vectors)
        return super().virial(gradient, vectors) if made is None else made


class NativePairs(Pairs):
    """Pairs found by one function; where autograd looks on, by torch."""

    def __init__(self, pairs: Pairs, functions: BoundNeighbours) -> None:
        super().__init__(pairs.cutoff)
        self.functions = functions

    def forward(self, positions: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        found = self.functions.pairs(positions, cell, self.cutoff)
        return super().forward(positions, cell) if found is None else found


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
        self.manifest: tuple[ManifestRow, ...] = (UNBUILT,)
        self.sources: Mapping[str, str] = {}
        self.versions: list[tuple[int, int]] = []
        self.fused = self.eager
        compiler = find_compiler()
        if compiler is None:
            return
        bare = program.copy()
        lower_guards(bare.graph)  # one op after the other, or in a function of ours, fuses nothing that is guarded
        chosen, self.manifest = _choices(bare)
        steps = plan(bare.graph, chosen)
        self.manifest += tuple(ManifestRow("", f"{step.nodes} ops in one", step.name) for step in steps.steps)
        ops = {node.name: str(node.target) for node in bare.graph.nodes}
        self.manifest += tuple(ManifestRow(name, ops[name], ATEN, why) for name, why in steps.refused.items())
        self.sources = {c.kernel.name: c.kernel.source for c in chosen.values()}
        self.sources |= {step.name: step.source for step in steps.steps}
        self.fused = _bound(self.eager, bare.graph, steps, chosen, build(self.sources, compiler))
        self.versions = self._versions()

    def __deepcopy__(self, memo: dict[int, Any]) -> Native:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        made.versions = made._versions() if self.versions == self._versions() else []
        return made

    def _versions(self) -> list[tuple[int, int]]:
        """Changes when a weight is exchanged or written to, but not behind torch's back (``.data``)."""
        weights = (*self.eager._parameters.values(), *self.eager._buffers.values())
        return [(t.data_ptr(), t._version) for t in weights if t is not None and not t.is_inference()]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return self.eager(*inputs)
        if any(t.dtype != d or t.device.type != "cpu" for t, d in zip(inputs, self.dtypes, strict=True)):
            return self.eager(*inputs)
        if self.fused is not self.eager and self.versions != self._versions():
            warnings.warn(
                "fxpass: weights of this model have changed since its kernels were made, so it runs without them, "
                "slowly; optimise the changed model anew",
                stacklevel=2,
            )
            return self.eager(*inputs)
        return self.fused(*inputs)


def _choices(program: Program) -> tuple[dict[str, Choice], tuple[ManifestRow, ...]]:
    """Kernels by name of the node that they run, and the manifest."""
    chosen, rows = {}, []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in SEMANTIC:
            continue
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


def _bound(
    module: fx.GraphModule,
    graph: fx.Graph,
    plan: Plan,
    chosen: Mapping[str, Choice],
    libraries: Mapping[str, ctypes.CDLL],
) -> fx.GraphModule:
    """A module on the same weights that runs ``plan``."""
    packed: dict[str, Mapping[int, Tensor]] = {}

    def fixed(which: Fixed) -> Tensor:
        if which.position < 0:
            return getattr(module, which.name).detach().clone()  # a copy of this module has weights of its own
        if which.name not in packed:
            choice = chosen[which.name]
            packed[which.name] = choice.pack(libraries[choice.kernel.name])
        return packed[which.name][which.position]

    functions = {step.name: bind(step, [fixed(f) for f in step.fixed], libraries) for step in plan.steps}
    functions |= {name: choice.bind(libraries[choice.kernel.name]) for name, choice in chosen.items()}
    return fx.GraphModule(module, graph_of(graph, plan, functions))
