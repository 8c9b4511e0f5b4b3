"""Where tensors lie in memory, with sizes that are known when a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import sympy
import torch

Size: TypeAlias = sympy.Expr
Shape: TypeAlias = tuple[Size, ...]

#: C++ types of elements; tensors of several types take turns in one place, so each may alias any other
TYPES = {
    torch.float64: "Float64",
    torch.float32: "Float32",
    torch.int64: "Int64",
    torch.int32: "Int32",
    torch.bool: "Bool",
}


class Unsupported(Exception):
    """Something that no C++ is printed for; the node runs as ATen."""


def printed(size: Size) -> str:
    """C++ of a size.

    Raises:
        Unsupported: a size that is not made of sums and products.
    """
    if size.is_Integer or size.is_Symbol:
        return str(size)
    if size.is_Add or size.is_Mul:
        return "(" + (" + " if size.is_Add else " * ").join(printed(term) for term in size.args) + ")"
    raise Unsupported(f"the size {size}")


def same(a: Size, b: Size) -> bool:
    return bool(a == b) or sympy.expand(a - b) == 0


def numel(shape: Sequence[Size]) -> Size:
    return sympy.expand(prod(shape, start=sympy.S.One))


def packed_strides(shape: Sequence[Size]) -> Shape:
    """Strides of a contiguous tensor."""
    return tuple(numel(shape[d + 1 :]) for d in range(len(shape)))


@dataclass(frozen=True)
class View:
    """A tensor in a buffer; strides and offset count elements."""

    buffer: int
    dtype: torch.dtype
    shape: Shape
    strides: Shape
    offset: Size = sympy.S.Zero

    @staticmethod
    def whole(buffer: int, dtype: torch.dtype, shape: Shape) -> View:
        return View(buffer, dtype, shape, packed_strides(shape))

    @property
    def contiguous(self) -> bool:
        pairs = zip(self.shape, self.strides, packed_strides(self.shape), strict=True)
        return all(n == 1 or same(has, wanted) for n, has, wanted in pairs)

    def element(self, indices: Sequence[str]) -> str:
        """C++ of the element at ``indices``."""
        terms = [] if self.offset == 0 else [printed(self.offset)]
        for index, stride in zip(indices, self.strides, strict=True):
            if index != "0" and stride != 0:
                inside = index if index.isidentifier() or index.isdigit() else f"({index})"
                terms.append(inside if stride == 1 else f"{inside} * {printed(stride)}")
        return f"b{self.buffer}[{' + '.join(terms) or '0'}]"

    def pointer(self) -> str:
        return f"b{self.buffer}" + ("" if self.offset == 0 else f" + {printed(self.offset)}")

    def narrow(self, dim: int, start: Size, length: Size, step: int = 1) -> View:
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], self.strides[dim] * step, *self.strides[dim + 1 :])
        return View(self.buffer, self.dtype, shape, strides, sympy.expand(self.offset + start * self.strides[dim]))

    def drop(self, dim: int) -> View:
        """Without a dimension, at its first index."""
        shape, strides = (each[:dim] + each[dim + 1 :] for each in (self.shape, self.strides))
        return View(self.buffer, self.dtype, shape, strides, self.offset)

    def insert(self, dim: int, size: Size = sympy.S.One) -> View:
        """With one more dimension, along which nothing changes."""
        shape = (*self.shape[:dim], size, *self.shape[dim:])
        strides = (*self.strides[:dim], sympy.S.Zero, *self.strides[dim:])
        return View(self.buffer, self.dtype, shape, strides, self.offset)

    def permute(self, dims: Sequence[int]) -> View:
        shape, strides = (tuple(each[d] for d in dims) for each in (self.shape, self.strides))
        return View(self.buffer, self.dtype, shape, strides, self.offset)

    def reshape(self, shape: Shape) -> View | None:
        """The same elements in the same order in another shape, or None where that is no view."""
        runs: list[tuple[Size, Size]] = []  # sizes and strides of dimensions that lie one in the other, last first
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n == 1:
                continue
            if runs and same(stride, runs[-1][0] * runs[-1][1]):
                runs[-1] = (sympy.expand(runs[-1][0] * n), runs[-1][1])
            else:
                runs.append((n, stride))
        strides: list[Size] = []
        left = iter(runs)
        run, filled = next(left, (sympy.S.One, sympy.S.One)), sympy.S.One
        for n in reversed(shape):
            if n != 1 and same(filled, run[0]):
                run, filled = next(left, (sympy.S.One, sympy.S.One)), sympy.S.One
            strides.append(sympy.expand(run[1] * filled))
            filled = sympy.expand(filled * n)
            if not _divides(filled, run[0]):
                return None
        if not same(filled, run[0]) or next(left, None) is not None:
            return None
        return View(self.buffer, self.dtype, shape, tuple(reversed(strides)), self.offset)


def _divides(a: Size, b: Size) -> bool:
    """Whether it is plain that ``b`` is a multiple of ``a``."""
    if a == 0 or b == 0:
        return bool(b == 0)
    quotient = sympy.expand(b) / a if a.is_Integer else sympy.cancel(b / a)
    terms = sympy.Add.make_args(sympy.expand(quotient))
    return all(term.as_coeff_Mul()[0].is_Integer and sympy.denom(term) == 1 for term in terms)
