"""How a class of modules wants to become TorchScript."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal, TypeVar

from torch import fx, nn

from ..errors import UsageError

Mode = Literal["script", "trace", "unsupported"] | None
MODES = ("script", "trace", "unsupported", None)
#: where e3nn keeps the mark
MARK = "__e3nn_compile_mode__"
#: method that makes inputs to trace a module with
OWN = "_make_tracing_inputs"

M = TypeVar("M", bound=type[nn.Module])


def compile_mode(mode: Mode) -> Callable[[M], M]:
    """Class decorator: how instances become TorchScript.  Subclasses inherit it.

    Args:
        mode: ``"script"``: from its source; ``"trace"``: from a recorded call; ``"unsupported"``: compiling it, or
            anything that holds it, is an error; None: it stays Python, unless its parent is compiled.

    Raises:
        UsageError: another mode, or what is decorated is no class of modules.
    """
    if mode not in MODES:
        raise UsageError(f"{mode!r} is no compile mode", hint="one of 'script', 'trace', 'unsupported', None")

    def mark(cls: M) -> M:
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
            raise UsageError(f"compile_mode decorates classes derived from torch.nn.Module, not {cls!r}")
        setattr(cls, MARK, mode)
        return cls

    return mark


def get_compile_mode(module: nn.Module) -> Mode:
    """The mark of a module, its own or its class's; ``"script"`` for an unmarked ``fx.GraphModule``.

    Raises:
        UsageError: the mark is none of the modes.
    """
    mode: Mode = getattr(module, MARK, None)
    if mode is None and isinstance(module, fx.GraphModule):
        return "script"  # straight-line code without types: scripting it keeps its sizes free
    if mode not in MODES:
        raise UsageError(f"{type(module).__name__} is marked {mode!r}", hint="one of 'script', 'trace', 'unsupported'")
    return mode
