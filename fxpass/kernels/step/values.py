"""What a node of a graph stands for while its step is written: memory, a formula, or pieces yet to be put together.

Nothing is computed before somebody needs it in memory, so a chain of elementwise ops becomes one loop, and what is
cut and joined again is copied once, to where it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import sympy
import torch

from .views import Shape, Size, View, printed, same

Indices = Sequence[str]


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor in memory."""

    view: View

    @property
    def shape(self) -> Shape:
        return self.view.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def reads(self) -> frozenset[int]:
        return frozenset({self.view.buffer})

    def element(self, indices: Indices) -> str:
        return self.view.element(indices)

    @property
    def flat(self) -> bool:
        return self.view.contiguous

    def at(self, index: str) -> str:
        """The element of this number, of a contiguous tensor."""
        offset = "" if self.view.offset == 0 else f"{printed(self.view.offset)} + "
        return f"b{self.view.buffer}[{offset}{index}]"


@dataclass(frozen=True, eq=False)
class Formula:
    """A tensor whose elements are computed where they are read.

    Attributes:
        element: indices -> C++ of the element.
        reads: buffers.
        at: C++ of the element of this number, where it does not need the indices.
        free: it costs nothing to compute it more than once.
    """

    shape: Shape
    dtype: torch.dtype
    element: Callable[[Indices], str]
    reads: frozenset[int]
    at: Callable[[str], str] | None = None
    free: bool = False

    @property
    def flat(self) -> bool:
        return self.at is not None


@dataclass(frozen=True, eq=False)
class Pieces:
    """Zero but for pieces, side by side along one dimension.

    Attributes:
        parts: first index and value, in order; of the shape of the whole but for ``dim``.
    """

    shape: Shape
    dtype: torch.dtype
    dim: int
    parts: tuple[tuple[Size, Value], ...]

    def gaps(self) -> list[tuple[Size, Size]]:
        """First index and length of what no piece covers."""
        gaps, at = [], sympy.S.Zero
        for start, part in self.parts:
            if not same(at, start):
                gaps.append((at, sympy.expand(start - at)))
            at = sympy.expand(start + part.shape[self.dim])
        if not same(at, self.shape[self.dim]):
            gaps.append((at, sympy.expand(self.shape[self.dim] - at)))
        return gaps

    def plus(self, other: Pieces) -> Pieces | None:
        """The sum, where no piece of one is on a piece of the other and that can be seen."""
        if self.dim != other.dim or self.dtype != other.dtype:
            return None
        parts = (*self.parts, *other.parts)
        if not all(start.is_Integer and part.shape[self.dim].is_Integer for start, part in parts):
            return None
        ordered = sorted(parts, key=lambda part: int(part[0]))
        for (start, part), (following, _) in pairwise(ordered):
            if start + part.shape[self.dim] > following:
                return None
        return Pieces(self.shape, self.dtype, self.dim, tuple(ordered))


@dataclass(frozen=True, eq=False)
class Reshaped:
    """The elements of a value, in their order, in another shape."""

    shape: Shape
    inner: Value

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype


Readable: TypeAlias = Place | Formula
Value: TypeAlias = Place | Formula | Pieces | Reshaped


def constant(shape: Shape, dtype: torch.dtype, text: str) -> Formula:
    """The same number everywhere."""
    return Formula(shape, dtype, lambda indices: text, frozenset(), lambda index: text, free=True)


def aligned(value: Readable, shape: Shape, indices: Indices) -> str:
    """The element of a value that is broadcast to ``shape``."""
    own = indices[len(shape) - len(value.shape) :]
    wide = shape[len(shape) - len(value.shape) :]
    at = ["0" if n == 1 and m != 1 else i for n, m, i in zip(value.shape, wide, own, strict=True)]
    return value.element(at)


def moved(value: Readable, shape: Shape, indices: Callable[[Indices], Indices]) -> Formula:
    """A formula that reads ``value`` at other indices."""
    return Formula(shape, value.dtype, lambda at: value.element(indices(at)), value.reads)

