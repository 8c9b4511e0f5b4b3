"""torchscript: a pure ATen module that ``torch.jit.load`` runs without fxpass, e3nn or the family's package."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.jit.frontend import FrontendError

from .._torch_compat import OpOverload
from ..errors import LoweringError
from ..ir.decompositions import HINT, References, decompose, place
from ..ir.guards import lower_guards
from ..ir.ops import fusion_guard
from ..ir.program import Program, TensorSpec
from ..ir.tracing import module_provenance, trace_program
from .base import LEGAL, executable


class TorchScriptTarget:
    """Scripts the graph; sizes stay dynamic because the graph's are."""

    name: ClassVar[str] = "torchscript"
    pipeline: ClassVar[str] = LEGAL

    def lower(self, program: Program) -> torch.jit.ScriptModule:
        for node in program.graph.nodes:
            overload = node.target
            if isinstance(overload, OpOverload) and overload.namespace != "aten" and overload is not fusion_guard:
                raise LoweringError(
                    f"TorchScript cannot carry {overload}",
                    where=place(node),
                    hint=f"the pass legalize-custom-ops; {HINT}",
                )
        module = executable(program, guarded=True)
        # a view that moves no byte, and that neither the fuser nor the peephole passes of TorchScript know
        lower_guards(module.graph, torch.ops.aten.alias.default)
        for node in module.graph.nodes:
            _scriptable(node)
        module.recompile()
        return script(module)

    def portable(self, interface: nn.Module) -> nn.Module | None:
        return script(interface)


def export_module(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    *,
    references: References | None = None,
    sizes: Mapping[str, int] | None = None,
) -> torch.jit.ScriptModule:
    """A TorchScript module of ATen alone that computes what any ``nn.Module`` with custom ops computes.

    Custom ops become their reference decompositions (``fxpass.ir.decompositions``), so that the file needs no library
    and takes one numeric path on every device.  The module is copied and traced in evaluation mode with symbolic
    sizes; the result takes any sizes and returns a list of tensors.

    Args:
        module: its ``forward`` takes one tensor for each input and returns a tensor or a tuple of tensors.
        inputs: name, dimensions and dtype of each argument; a dimension is a number or the name of a size.
        references: op name to function.
        sizes: example values of the named sizes, by default primes; they do not show in the result.

    Raises:
        LoweringError: an op has neither a reference nor a place in ATen, or the module ties a size to a value.
    """
    replica = copy.deepcopy(module).eval()
    named = dict.fromkeys(d.partition("+")[0] for spec in inputs for d in spec.dims if isinstance(d, str))
    hints = dict(zip(named, _PRIMES, strict=False)) | dict(sizes or {})

    def body(*values: Tensor) -> Sequence[Tensor]:
        found = replica(*values)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    constants = dict([*replica.named_parameters(), *replica.named_buffers()])
    with module_provenance(replica):
        traced, frozen = trace_program(body, tuple(inputs), (), constants, stage="energy", sizes=hints)
    if frozen:
        raise LoweringError(f"the module ties a size to a value: {'; '.join(frozen)}", hint="sizes taken from x.shape")
    done = decompose(traced, references, made_by="export", sizes=hints)
    for node in done.opaque:
        raise LoweringError(f"{node.target} is opaque: it has no reference", where=place(node), hint=HINT)
    return TorchScriptTarget().lower(done.program)


_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)


def script(module: nn.Module) -> torch.jit.ScriptModule:
    """``torch.jit.script``, whose deprecation in torch 2.9 and later is known and not the user's concern.

    Raises:
        LoweringError: TorchScript refuses the module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.script(module)
        except (RuntimeError, FrontendError) as error:  # what its compiler and its parser raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise LoweringError(f"TorchScript refuses the graph: {' '.join(lines[:2])}") from error


def _scriptable(node: fx.Node) -> None:
    """TorchScript resolves overloads by itself and spells a symbolic size ``aten::size``."""
    if isinstance(node.target, OpOverload):
        if node.target is torch.ops.aten.sym_size.int:
            node.target = torch.ops.aten.size
        else:
            node.target = node.target.overloadpacket
