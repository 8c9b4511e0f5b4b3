"""What a module is traced with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.irreps import dim
from ..errors import Location, UsageError
from . import e3nn_parts
from .modes import OWN

#: name of a method to its arguments, as ``torch.jit.trace_module`` takes them
Inputs = dict[str, tuple[Any, ...]]

#: rows of derived inputs: not 1, which torch broadcasts, and every time another number
ROWS = (4, 2, 5, 3, 7)


def tracing_inputs(module: nn.Module, count: int = 1, path: str = "") -> list[Inputs]:
    """Inputs to trace a module with, on the device and of the floating-point dtype of its parameters.

    They are what its method ``_make_tracing_inputs(count)`` returns: a list of dicts from the name of a method to its
    arguments.  A module without one gets normally distributed tensors ``[rows, irreps.dim]`` by its attribute
    ``irreps_in`` (one, or a list for several arguments) or ``irreps_in1``, ``irreps_in2`` and so on; an irreps is an
    object with ``dim``, a string, or ``"cartesian_points"`` for three columns.  Weights that a tensor product of e3nn
    does not hold are its last argument.  The caller's random numbers are not touched.

    Raises:
        UsageError: there is neither, or the method fails or returns something else.
    """
    where = Location(module_path=path or None)
    with torch.random.fork_rng(devices=()):
        corrected = [e3nn_parts.arguments(module, rows) for rows in _rows(count)]
        if given := [args for args in corrected if args is not None]:
            made = [{"forward": args} for args in given]
        elif hasattr(module, OWN):
            try:
                made = getattr(module, OWN)(count)
            except Exception as error:
                text = f"{OWN} of {type(module).__name__} fails: {type(error).__name__}: {error}"
                raise UsageError(text, where=where) from error
            if not (isinstance(made, list) and made and all(map(_is_inputs, made))):
                raise UsageError(
                    f"{OWN} of {type(module).__name__} must return a list of dicts from method names to tuples",
                    where=where,
                )
        else:
            widths = [_width(irreps, module, where) for irreps in _arguments(module, where)]
            made = [
                {"forward": (*(torch.randn(rows, width) for width in widths), *e3nn_parts.weights(module, rows))}
                for rows in _rows(count)
            ]
    held = [x for x in (*module.parameters(), *module.buffers())]
    device = held[0].device if held else torch.device("cpu")
    dtype = next((x.dtype for x in held if x.is_floating_point()), torch.get_default_dtype())

    def placed(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return [{method: map_tensors(placed, args) for method, args in inputs.items()} for inputs in made]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor within nested tuples, lists and dicts; leave the rest."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, x) for x in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, x) for x in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, x) for key, x in value.items()}
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor within nested tuples, lists and dicts."""
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) or x, value)  # type: ignore[func-returns-value]
    return found


@contextmanager
def unchanged(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Within, the module may be called: its buffers and torch's random numbers are afterwards what they were.

    With a seed the random numbers within are always the same.
    """
    held = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    absent = [(owner, name) for owner in module.modules() for name, x in owner._buffers.items() if x is None]
    devices = {x.device.index for x in (*module.parameters(), *module.buffers()) if x.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        if seed is not None:
            for generator in (torch.default_generator, *(torch.cuda.default_generators[k] for k in devices)):
                generator.manual_seed(seed)
        try:
            yield
        finally:
            for owner, name, buffer, value in held:
                if not isinstance(owner, torch.jit.ScriptModule) and getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)  # it was replaced, as a running average may be
                if buffer.layout is not torch.strided or not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
            for owner, name in absent:
                if getattr(owner, name) is not None:
                    setattr(owner, name, None)


def _rows(count: int) -> list[int]:
    return [ROWS[k % len(ROWS)] for k in range(count)]


def _arguments(module: nn.Module, where: Location) -> Sequence[Any]:
    irreps = getattr(module, "irreps_in", None)
    if irreps is not None:
        return irreps if isinstance(irreps, list) else [irreps]
    numbered: list[Any] = []
    while hasattr(module, name := f"irreps_in{len(numbered) + 1}"):
        numbered.append(getattr(module, name))
    if not numbered:
        raise UsageError(
            f"{type(module).__name__} says nothing of its inputs: it cannot be traced",
            where=where,
            hint=f"give it a method {OWN}(n), or an attribute irreps_in; or pass example inputs to fxpass.jit.trace",
        )
    return numbered


def _width(irreps: Any, module: nn.Module, where: Location) -> int:
    width = 3 if irreps == "cartesian_points" else getattr(irreps, "dim", None)
    if isinstance(irreps, str) and width is None:
        with suppress(ValueError):
            width = dim(irreps)
    if not isinstance(width, int):
        raise UsageError(
            f"{type(module).__name__} has {irreps!r} among its input irreps, which tells no width",
            where=where,
            hint=f"give it a method {OWN}(n)",
        )
    return width


def _is_inputs(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, tuple) for k, v in value.items())
