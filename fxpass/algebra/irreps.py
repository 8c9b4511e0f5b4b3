"""Irreps as layout: which columns of a feature vector hold which irrep.

Conventions are e3nn's: ``"32x0e+32x1o"`` is 32 even scalars, then 32 odd vectors, each vector's
components contiguous; within an irrep of degree l the basis runs m = -l..l with y as polar axis.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import numpy as np

from .._torch_compat import o3, wigner_3j


@cache
def segments(irreps: str) -> tuple[tuple[int, int, int, int], ...]:
    """``(offset, multiplicity, l, parity)`` of each term of ``irreps``, in order."""
    rows, offset = [], 0
    for mul, ir in o3().Irreps(irreps):
        rows.append((offset, mul, ir.l, ir.p))
        offset += mul * ir.dim
    return tuple(rows)


@cache
def dim(irreps: str) -> int:
    """Number of columns that ``irreps`` takes."""
    return int(o3().Irreps(irreps).dim)


@cache
def clebsch_gordan(l1: int, l2: int, l3: int, rounding: str = "float64") -> np.ndarray:
    """Clebsch-Gordan coefficients C[i, j, k] in e3nn's basis, float64, with sum of squares 1.

    With an l of zero they are delta / sqrt(2l+1), exactly.  ``rounding="float32"`` gives the
    float64 values of the float32 coefficients: what a model built in float32 computes with, also
    after ``model.double()``.
    """
    if 0 in (l1, l2, l3):
        l = max(l1, l2, l3)
        return np.eye(2 * l + 1).reshape(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1) / sqrt(2 * l + 1)
    return wigner_3j(l1, l2, l3).astype(rounding).astype(np.float64)


def same(a: str, b: str) -> bool:
    """Whether two irreps name the same columns: equal up to splitting of multiplicities."""
    return a == b or o3().Irreps(a).simplify() == o3().Irreps(b).simplify()


def scalars_only(irreps: str) -> bool:
    """Whether every irrep has l = 0, of either parity."""
    return all(l == 0 for _, _, l, _ in segments(irreps))


def join(*irreps: str) -> str:
    """Irreps of a concatenation along the feature dimension."""
    return "+".join(i for i in irreps if i)


def slice_irreps(irreps: str, start: int, end: int) -> str | None:
    """Irreps of columns ``start:end``, or None where the cut goes through an irrep."""
    parts = []
    for offset, mul, l, p in segments(irreps):
        width = 2 * l + 1
        low, high = max(start, offset), min(end, offset + mul * width)
        if low < high:
            if (low - offset) % width or (high - offset) % width:
                return None
            parts.append(f"{(high - low) // width}x{l}{'e' if p == 1 else 'o'}")
    return "+".join(parts) or None
