"""What a target is: the one place where an execution backend is known."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import fx, nn

from ..ir.guards import lower_guards
from ..ir.program import Program

#: in place of the name of a kernel: an op of ATen between kernels, which no pass promised one
ATEN = "ATen"


@dataclass(frozen=True)
class ManifestRow:
    """What runs one op of a lowered program.

    Attributes:
        node: its name.
        op: name of the op, without namespace.
        kernel: name of the kernel, ``ATEN`` where an op of ATen runs as it is, or empty where the reference of a
            semantic op does.
        reason: why no kernel runs.
    """

    node: str
    op: str
    kernel: str
    reason: str = ""


def manifest(interface: nn.Module) -> tuple[ManifestRow, ...]:
    """What runs the semantic ops of all programs inside a drop-in; empty for targets that know no kernels."""
    found = (getattr(module, "manifest", ()) for module in interface.modules())
    return tuple(row for rows in found for row in rows)


def fallbacks(interface: nn.Module) -> tuple[str, ...]:
    """Warnings: ops that a kernel was promised for and the reference runs, by reason."""
    reasons = Counter((row.op, row.reason) for row in manifest(interface) if not row.kernel)
    return tuple(f"no kernel runs {op} ({count} times): {why}" for (op, why), count in reasons.items())


class Target(Protocol):
    """One way to run a program.

    Class attributes:
        name: as registered in the entry-point group ``fxpass.targets``.
        pipeline: text of the passes that make a program fit for ``lower``.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]

    @abstractmethod
    def lower(self, program: Program) -> nn.Module:
        """A module that takes the program's inputs in order and returns its outputs as a list of tensors.

        Raises:
            LoweringError: the target cannot carry the program.
        """


    @abstractmethod
    def portable(self, interface: nn.Module) -> nn.Module | None:
        """What a saved file carries to be run without fxpass; None where the program is all it carries."""


@runtime_checkable
class Finishes(Protocol):
    """A target that has parts of its own for what a family's interface does around the programs."""

    @abstractmethod
    def finish(self, interface: nn.Module) -> None:
        """Put them in; what the interface returns stays the same but for rounding."""


#: semantic ops become ATen, and what that leaves behind is cleaned up
LEGAL = "legalize,fold-constants,common-subexpressions,dead-code"


def executable(program: Program, *, guarded: bool = False) -> fx.GraphModule:
    """A copy of the program's graph module that returns a list, the common result type of all targets.

    Its weights of the program's own floating type are parameters, folded ones too: a drop-in has ``parameters()`` as
    its original has, and whoever asks one of them for the type of the model gets that, whatever else is in there.
    Fusion guards are gone, as running node by node fuses nothing; ``guarded`` keeps them for a compiler to see.
    """
    module = program.copy().graph_module
    if not guarded:
        lower_guards(module.graph)
    output = module.graph.output_node()
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]
    # names of weights stay; metadata of the compiler is of no use at run time and may hold fake tensors
    for node in module.graph.nodes:
        node.meta = {}
    module.recompile()
    own = next((spec.dtype for spec in program.inputs if spec.dtype.is_floating_point), None)
    for name, buffer in list(module.named_buffers()):
        if buffer.dtype == own:
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    return module

