"""torchscript: a pure ATen module that ``torch.jit.load`` runs without fxpass, e3nn or the family's package."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import fx, nn

from .._torch_compat import OpOverload
from ..errors import Location, LoweringError
from ..ir.metadata import provenance
from ..ir.program import Program
from .base import LEGAL, executable


class TorchScriptTarget:
    """Scripts the graph; sizes stay dynamic because the graph's are."""

    name: ClassVar[str] = "torchscript"
    pipeline: ClassVar[str] = LEGAL

    def lower(self, program: Program) -> nn.Module:
        for node in program.graph.nodes:
            overload = node.target
            if isinstance(overload, OpOverload) and overload.namespace != "aten":
                raise LoweringError(
                    f"TorchScript cannot carry {overload}",
                    where=Location(node=node.name, module_path=provenance(node).module),
                    hint="a legalisation for this op",
                )
        module = executable(program)
        for node in module.graph.nodes:
            _scriptable(node)
        module.recompile()
        return script(module)

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return script(interface)


def script(module: nn.Module) -> torch.jit.ScriptModule:
    """``torch.jit.script``, whose deprecation in torch 2.9 and later is known and not the user's concern.

    Raises:
        LoweringError: TorchScript refuses the module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.script(module)
        except (RuntimeError, NotImplementedError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise LoweringError(f"TorchScript refuses the graph: {' '.join(lines[:2])}") from error


def _scriptable(node: fx.Node) -> None:
    """TorchScript resolves overloads by itself and spells a symbolic size ``aten::size``."""
    if isinstance(node.target, OpOverload):
        if node.target is torch.ops.aten.sym_size.int:
            node.target = torch.ops.aten.size
        else:
            node.target = node.target.overloadpacket
