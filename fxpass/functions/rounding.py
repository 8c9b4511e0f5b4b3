"""How far rounding may move each element of a result: Monte Carlo arithmetic.

The original runs again with every value that it makes multiplied by ``1 + delta * xi``, with xi normal; how far an
element of its result moves, over delta, is the size of the terms that it is made of, whatever cancels among them
(D. S. Parker, Monte Carlo Arithmetic, UCLA CSD-970002, 1997).  So each element has a scale of its own, and a fill
value such as -1e9 is the scale of nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture.capture import copy_model

#: computes results or gradients of a module
Run = Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]]

#: how often a module runs with noise: one element in 1e5 has a scale below a sixteenth of what it should be
DRAWS = 4
#: noise in the constants of a module, relative to their mean size and to ``delta``
DIRT = 1e-3
#: what chooses among values: a choice does not round, and noise would break its ties
CHOICES = frozenset({*("max", "min", "amax", "amin", "topk", "sort", "kthvalue", "median", "mode", "cummax", "cummin")})


def scales(run: Run, module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The size of what each element of the results is made of: rounding moves it by about epsilon times that.

    Args:
        run: computes the results; on the CPU, in the types that ``module`` and ``inputs`` have.
        module: the original.
        inputs: where.
    """
    before = run(module, inputs)
    other = copy_model(module)
    own = [[t for t in chain(m.parameters(), m.buffers()) if is_inexact(t)] for m in (module, other)]
    widths = [torch.finfo(t.dtype).eps for t in chain(inputs, own[0]) if is_inexact(t)]
    delta = max(widths, default=torch.finfo(torch.float64).eps) ** 0.75  # above its own rounding, and yet small
    moved = [torch.zeros_like(t.abs()) for t in before]
    for seed in range(DRAWS):
        noise = Noise(delta, seed)
        with torch.no_grad():
            for value, copied in zip(*own, strict=True):
                copied.copy_(noise.of_constant(value))
        with noise:
            after = run(other, [noise.of(t) for t in inputs])
        moved = [m + ((b - a).abs() / delta).square() for m, a, b in zip(moved, before, after, strict=True)]
    sizes = [(m / DRAWS).sqrt().maximum(t.abs()) for m, t in zip(moved, before, strict=True)]
    return [torch.where(size.isfinite(), size, 0.0) for size in sizes]


class Noise(TorchFunctionMode):
    """While open, what torch's functions make is off by about ``delta``, relative to each element.

    Whole numbers stay: they are fills, masks and counts, which do not round, and which others are compared with.
    """

    def __init__(self, delta: float, seed: int) -> None:
        super().__init__()
        self.delta, self.generator = delta, torch.Generator().manual_seed(seed)

    def of(self, x: Any) -> Any:
        """``x`` with noise, if it is a tensor of numbers that round."""
        return x * (1 + self._drawn(x)) if is_inexact(x) else x

    def of_constant(self, x: Tensor) -> Tensor:
        """``x`` with noise, and some relative to its mean size: what ought to be zero in it is zero to rounding."""
        return x + self._drawn(x) * (x.abs() + DIRT * x.abs().square().mean().sqrt())

    def _drawn(self, x: Tensor) -> Tensor:
        xi = self.delta * torch.randn(x.shape, generator=self.generator, dtype=torch.float32).to(x.dtype.to_real())
        return xi.masked_fill(x.detach() == x.detach().round(), 0.0) if x.is_floating_point() else xi

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in CHOICES:
            return result
        given = {_storage(x) for x in _inside((args, kwargs))}
        if type(result) in (tuple, list):
            return type(result)(x if _shares(x, given) else self.of(x) for x in result)
        return result if _shares(result, given) else self.of(result)


def is_inexact(x: Any) -> bool:
    """Whether ``x`` is a tensor of numbers that round."""
    return isinstance(x, Tensor) and x.layout == torch.strided and (x.is_floating_point() or x.is_complex())


def _inside(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _inside(item)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


def _shares(x: Any, given: set[int]) -> bool:
    """Whether ``x`` is a part of what a function was given, or was written by it: both must stay as they are."""
    return isinstance(x, Tensor) and _storage(x) in given
