"""What a compiled module checks of its arguments; plain functions that TorchScript compiles as well.

Each raises ``ValueError`` that names the argument, so that a wrong one is told from a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensor(x: Tensor, path: str, dtype: torch.dtype, dims: list[int], names: list[str]) -> Tensor:
    """``x``, contiguous, if it has the dtype and the sizes that it must have; a size of -1 may be any."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{path} is no tensor")
    if x.dtype != dtype:
        raise ValueError(f"{path} has the wrong dtype: {x.dtype}, but this module was compiled for {dtype}")
    if x.dim() != len(dims):
        raise ValueError(f"{path} has {x.dim()} dimensions (shape {list(x.shape)}), not {len(dims)}")
    for k, size in enumerate(dims):
        if size >= 0 and x.size(k) != size:
            why = f"which other inputs have as '{names[k]}'" if names[k] != "" else "which is fixed (dynamic= frees it)"
            raise ValueError(f"{path} has the size {x.size(k)} in dimension {k}, not {size}, {why}")
    return x.contiguous()


def index(x: Tensor, path: str, size: int) -> Tensor:
    """``x``, if it stays within ``0`` and ``size``."""
    if x.numel() > 0:
        least, most = torch.aminmax(x)
        if int(least) < 0 or int(most) >= size:
            raise ValueError(f"{path} holds indices from {int(least)} to {int(most)}, out of 0 to {size - 1}")
    return x


def absent(x: Tensor | None, path: str) -> None:
    """Refuses an argument that the example left out."""
    if x is not None:
        raise ValueError(f"{path} is given, but this module was compiled without it: give it in example_inputs")


def present(x: Tensor | None, path: str) -> Tensor:
    """Refuses to leave out an argument that the example gave."""
    if x is None:
        raise ValueError(f"{path} is left out, but this module was compiled with it")
    return x


def _bool(x: bool, value: bool, told: str) -> None:
    if not isinstance(x, bool) or x != value:
        raise ValueError(told)


def _int(x: int, value: int, told: str) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x != value:
        raise ValueError(told)


def _float(x: float, value: float, told: str) -> None:
    if not isinstance(x, float) or (x != value and (x == x or value == value)):
        raise ValueError(told)


def _str(x: str, value: str, told: str) -> None:
    if not isinstance(x, str) or x != value:
        raise ValueError(told)


#: what refuses another value of what is no tensor, or one of another type: 1, 1.0 and True are equal
CONSTANT: dict[type, Callable[..., None]] = {bool: _bool, int: _int, float: _float, str: _str}


def _is(x: Any, kind: Any, told: str) -> None:
    if not isinstance(x, kind):
        raise ValueError(told)


def listed(x: Any, path: str) -> None:
    """Refuses what is neither a list nor a tuple."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _is(x, (list, tuple), f"{path} is left out or no list or tuple, but this module was compiled with one")


def length(found: int, expected: int, path: str) -> None:
    """Refuses a list of another length."""
    if found != expected:
        raise ValueError(f"{path} has {found} elements, not {expected}")


def keys(data: dict[str, Tensor], expected: list[str], path: str) -> None:
    """Refuses what is no dict, and one with other keys."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _is(data, Mapping, f"{path} is left out or no dict, but this module was compiled with one")
    for key in expected:
        if key not in data:
            raise ValueError(f"{path} has no entry '{key}'")
    if len(data) != len(expected):
        found = list(data.keys())
        raise ValueError(f"{path} has the entries {found}, but this module was compiled for {expected}")
