"""The result of ``optimize`` for a module without a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import UsageError
from ..ir.program import Program
from ..optimized import Optimized
from ..targets.base import Finishes, Target
from .signature import Signature, interface

if TYPE_CHECKING:
    from ..structures import Evaluation, Structure


class FunctionFamily:
    """What stands in place of a frontend."""

    name = "function"

    def evaluate(self, model: nn.Module, structure: Structure) -> Evaluation:
        raise UsageError("a module without a family has no energy", hint="call it with its own arguments")


FAMILY = FunctionFamily()


def lower_function(program: Program, target: Target, facts: Mapping[str, Any]) -> nn.Module:
    """The drop-in of a program at stage ``"function"`` that is fit for ``target``.

    Raises:
        LoweringError: the target cannot carry the program.
    """
    module = interface(target.lower(program), Signature.from_json(facts["signature"]), program.inputs)
    if isinstance(target, Finishes):
        target.finish(module)
    return module.eval()


class OptimizedFunction(Optimized):
    """An optimised module: call it as the original, with the original's arguments and results.

    It takes the sizes that ``program.inputs`` name, whatever they are, and refuses everything else with a
    ``ValueError`` that names the argument.  Its results have gradients with respect to its inputs.
    """

    def calculator(self, *, head: str | None = None, skin: float = 0.5) -> NoReturn:
        raise UsageError("a module without a family has no energy, so no calculator", hint="a model of a known family")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> OptimizedFunction:
        own = getattr(torch, self.facts["dtype"])
        probe = fn(torch.zeros((), dtype=own))
        if probe.dtype == own and probe.device.type == "cpu":
            return self
        if self.rebuild is None:
            raise UsageError(
                f"this module was loaded from a file made for {own} on the CPU, and cannot become {probe.dtype}",
                hint="optimise the original in that dtype and save it again",
            )
        self._become(self.rebuild(probe.dtype, probe.device))
        return self
