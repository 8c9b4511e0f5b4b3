"""triton: fused kernels, generated as Triton for the GPU, and ATen on the same GPU for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..errors import LoweringError
from ..ir.guards import lower_guards
from ..ir.ops import SEMANTIC
from ..ir.program import Program
from ..kernels.triton_choice import Choice, choose
from ..kernels.triton_launch import bind, load_triton
from ..kernels.triton_tune import Tuner
from .base import ManifestRow, executable
from .native import FUSED


class TritonTarget:
    """Runs on the CUDA device that is current when a model is lowered; what is there and what not is seen at once.

    Raises:
        LoweringError: torch sees no CUDA device.
        MissingExtraError: Triton is not installed.
    """

    name: ClassVar[str] = "triton"
    pipeline: ClassVar[str] = FUSED

    def __init__(self) -> None:
        load_triton()
        if not torch.cuda.is_available():
            raise LoweringError(
                "the target triton needs a CUDA device, and torch sees none", hint="the target native, on this CPU"
            )

    def lower(self, program: Program) -> nn.Module:
        return OnDevice(program, torch.device("cuda", torch.cuda.current_device()), Tuner())

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return None


class OnDevice(nn.Module):
    """A lowered program on one device.

    Inputs come from any device and results go back to it.  Calls that record autograd, that have inputs of another type
    than the kernels were made for, or that come after weights were changed, run the ops one by one.

    Args:
        program: as the passes left it.
        device: that runs it.
        tuner: chooses how kernels are launched; None where nothing is measured.

    Attributes:
        manifest: what runs each semantic op.
        sources: Triton text by name of kernel.
    """

    def __init__(self, program: Program, device: torch.device, tuner: Tuner | None = None) -> None:
        super().__init__()
        moved = _moved(program, device)
        self.device = device
        self.dtypes = tuple(spec.dtype for spec in program.inputs)
        self.eager = executable(moved).to(device)
        chosen, self.manifest = _choices(moved)
        kernels = [kernel for choice in chosen.values() for kernel in choice.kernels]
        self.sources: Mapping[str, str] = {kernel.name: kernel.source for kernel in kernels}
        self.fused = _bound(self.eager, chosen, tuner)
        self.weights = [t for t in (*self.eager.parameters(), *self.eager.buffers()) if not t.is_inference()]
        self.versions = [t._version for t in self.weights]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(deepcopy(self.__dict__, memo))
        if not self._changed():
            made.versions = [t._version for t in made.weights]
        return made

    def _changed(self) -> bool:
        """Whether weights were written to, of which kernels have copies."""
        return [t._version for t in self.weights] != self.versions

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        home = inputs[0].device
        here = [t.to(self.device) for t in inputs]
        results = (self.fused if self._fit(here) else self.eager)(*here)
        return [t.to(home) for t in results]

    def _fit(self, inputs: list[Tensor]) -> bool:
        """Whether kernels may run on these inputs."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return False
        if any(t.dtype != dtype for t, dtype in zip(inputs, self.dtypes, strict=True)):
            return False
        if self._changed():
            warnings.warn(
                "fxpass: weights of this model have changed since its kernels were made, so it runs without them, "
                "slowly; optimise the changed model anew",
                stacklevel=3,
            )
            return False
        return True


def _moved(program: Program, device: torch.device) -> Program:
    """A copy without guards, whose weights, and whose tensors that are made on the way, are on ``device``."""
    moved = program.copy()
    lower_guards(moved.graph)
    moved.graph_module.to(device)
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    return moved


def _choices(program: Program) -> tuple[dict[str, Choice], tuple[ManifestRow, ...]]:
    """Kernels by name of the node that they run, and the manifest."""
    chosen, rows = {}, []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in SEMANTIC:
            continue
        constants = {
            at: getattr(program.graph_module, str(a.target)).detach()
            for at, a in enumerate(node.args)
            if isinstance(a, fx.Node) and a.op == "get_attr"
        }
        found = choose(node.target, fx.map_arg(node.args, lambda n: n.meta["val"]), constants)
        if isinstance(found, Choice):
            chosen[node.name] = found
        name, reason = (found.name, "") if isinstance(found, Choice) else ("", found)
        rows.append(ManifestRow(node.name, SEMANTIC[node.target].name, name, reason))
    return chosen, tuple(rows)


def _bound(module: fx.GraphModule, chosen: Mapping[str, Choice], tuner: Tuner | None) -> fx.GraphModule:
    """A module on the same weights that runs kernels in place of the nodes of these names."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node, copy in copies.items():
        if node.name in chosen:
            copy.target = chosen[node.name].make(partial(bind, tuner=tuner))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)
