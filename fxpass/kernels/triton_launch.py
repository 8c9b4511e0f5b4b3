"""Launches printed Triton kernels; Triton is imported when the first one is asked for."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, Location, MissingExtraError
from .triton_printer import Config, TritonKernel
from .triton_tune import Tuner

#: programs of one grid along its first axis, the only one that kernels use
MOST_PROGRAMS = 2**31 - 1


def load_triton() -> Any:
    """The module ``triton``.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    try:
        import triton
        import triton.backends.compiler
        import triton.compiler
        import triton.language
    except ImportError as error:
        raise MissingExtraError("Triton is not installed", hint='pip install "fxpass[triton]"') from error
    return triton


def function(printed: TritonKernel) -> Any:
    """The kernel as Triton's ``JITFunction``; compiled at its first launch, and kept by Triton after that.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    triton = load_triton()
    place = f"<fxpass {printed.name}>"
    # Triton reads the source of what it compiles, and so do tracebacks
    linecache.cache[place] = (len(printed.source), None, printed.source.splitlines(keepends=True), place)
    names: dict[str, Any] = {"triton": triton, "tl": triton.language, "__name__": __name__}
    exec(compile(printed.source, place, "exec"), names)
    return names[printed.name]


def bind(printed: TritonKernel, tuner: Tuner | None = None) -> Callable[..., Any]:
    """The kernel as a function of contiguous tensors on one device, as its ``run`` takes them.

    It is launched on the device of its operands, whichever is the current one, on the current stream of that device.

    Args:
        tuner: chooses how the kernel is launched on a device; without one it is the first of its configurations.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    kernel = function(printed)

    def launch(programs: Callable[[Config], int], operands: Sequence[Any]) -> None:
        device = next(t.device for t in operands if isinstance(t, Tensor))

        def start(config: Config) -> None:
            kernel[programs(config),](*operands, **dict(config.blocks), num_warps=config.warps)

        default = printed.configs[0]
        count = programs(default)
        if count > MOST_PROGRAMS:
            where = Location(source=printed.name)
            raise KernelError(f"{count} programs are more than a grid has, {MOST_PROGRAMS}", where=where)
        if count:
            with _on(device):
                start(default if tuner is None else tuner.choose(printed, device, count, start))

    return partial(printed.run, launch)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
