"""What e3nn 0.4.4 and 0.6 leave unsaid, or say wrongly, about how their classes are compiled.

Known by name, so that e3nn need not be imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .modes import MARK, OWN, Mode, get_compile_mode

#: marked "script", while TorchScript takes neither ``super().forward`` nor the ``dim`` of irreps
TRACED = frozenset({"TensorSquare", "S2Activation"})


def mode_of(module: nn.Module) -> Mode:
    """The mark of a module; ``"trace"`` for the classes of e3nn that cannot be what their mark says."""
    return "trace" if _name(module, MARK) in TRACED else get_compile_mode(module)


def arguments(module: nn.Module, rows: int) -> tuple[Tensor, ...] | None:
    """Arguments of ``forward`` for a class whose attributes, or own inputs, do not give them right."""
    part: Any = module
    match _name(module, "forward", OWN):
        case "ToS2Grid":  # its own inputs have lmax**2 columns, which its forward does not take
            return (torch.randn(rows, (part.lmax + 1) ** 2),)
        case "FromS2Grid":  # its own inputs have no rows, and a trace of its forward keeps the number of axes
            return (torch.randn(rows, part.res_beta, part.res_alpha),)
        case "FullyConnectedNet":
            return (torch.randn(rows, part.hs[0]),)
    return None


def weights(module: nn.Module, rows: int) -> tuple[Tensor, ...]:
    """The last argument of a tensor product or linear layer that does not hold its weights."""
    part: Any = module
    if not getattr(part, "weight_numel", 0) or getattr(part, "internal_weights", True):
        return ()
    return (torch.randn(part.weight_numel) if part.shared_weights else torch.randn(rows, part.weight_numel),)


def _name(module: nn.Module, *own: str) -> str:
    """Name of the class, or of its first base, that is e3nn's; empty without one, or below a class with its own."""
    for c in type(module).__mro__:
        if c.__module__.startswith("e3nn."):
            return c.__name__
        if any(name in vars(c) for name in own):
            break
    return ""
