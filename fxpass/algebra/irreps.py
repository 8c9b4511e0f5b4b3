"""Irreps as layout: which columns of a feature vector hold which irrep.

Conventions are e3nn's: ``"32x0e+32x1o"`` is 32 even scalars, then 32 odd vectors, each vector's
components contiguous; within an irrep of degree l the basis runs m = -l..l with y as polar axis.

``"ir_mul:32x0e+32x1o"`` names the other layout of the same features: each term takes the same columns, but within it
components come first and channels last, so that channels are contiguous.  Scalars lie alike in both.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import numpy as np

from .._torch_compat import o3, wigner_3j

IR_MUL = "ir_mul:"


def channels_last(irreps: str) -> bool:
    """Whether components come first within a term, channels last."""
    return irreps.startswith(IR_MUL)


def mul_ir(irreps: str) -> str:
    """The same terms as e3nn lays them out."""
    return irreps.removeprefix(IR_MUL)


def ir_mul(irreps: str) -> str:
    """The same terms with channels last; unchanged where that is no difference."""
    plain = mul_ir(irreps)
    return IR_MUL + plain if any(l and mul > 1 for _, mul, l, _ in segments(plain)) else plain


@cache
def segments(irreps: str) -> tuple[tuple[int, int, int, int], ...]:
    """``(offset, multiplicity, l, parity)`` of each term of ``irreps``, in order."""
    rows, offset = [], 0
    for mul, ir in o3().Irreps(mul_ir(irreps)):
        rows.append((offset, mul, ir.l, ir.p))
        offset += mul * ir.dim
    return tuple(rows)


def columns_as_mul_ir(irreps: str) -> list[int]:
    """For each column, its place in e3nn's layout."""
    found: list[int] = []
    for offset, mul, l, _ in segments(irreps):
        table = np.arange(offset, offset + mul * (2 * l + 1)).reshape(mul, 2 * l + 1)
        found += (table.T if channels_last(irreps) else table).ravel().tolist()
    return found


@cache
def dim(irreps: str) -> int:
    """Number of columns that ``irreps`` takes."""
    return int(o3().Irreps(mul_ir(irreps)).dim)


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
    """Whether two irreps name the same columns: equal up to splitting of multiplicities, and in layout."""
    return a == b or _columns(a) == _columns(b)


@cache
def _columns(irreps: str) -> tuple[tuple[int, int, int], ...]:
    """``(l, parity, component)`` of each column."""
    found: list[tuple[int, int, int]] = []
    for _, mul, l, p in segments(irreps):
        if channels_last(irreps):
            found += ((l, p, m) for m in range(2 * l + 1) for _ in range(mul))
        else:
            found += ((l, p, m) for _ in range(mul) for m in range(2 * l + 1))
    return tuple(found)


def scalars_only(irreps: str) -> bool:
    """Whether every irrep has l = 0, of either parity."""
    return all(l == 0 for _, _, l, _ in segments(irreps))


def join(*irreps: str) -> str | None:
    """Irreps of a concatenation along the feature dimension, or None where layouts are mixed."""
    whole = "+".join(mul_ir(i) for i in irreps if i)
    if not any(map(channels_last, irreps)):
        return whole
    return ir_mul(whole) if all(channels_last(i) or ir_mul(i) == i for i in irreps) else None


def slice_irreps(irreps: str, start: int, end: int) -> str | None:
    """Irreps of columns ``start:end``, or None where the cut goes through an irrep."""
    parts = []
    for offset, mul, l, p in segments(irreps):
        width = 2 * l + 1
        low, high = max(start, offset), min(end, offset + mul * width)
        if low < high:
            if (low - offset) % width or (high - offset) % width:
                return None
            if channels_last(irreps) and l and high - low < mul * width:
                return None
            parts.append(f"{(high - low) // width}x{l}{'e' if p == 1 else 'o'}")
    whole = "+".join(parts)
    return (ir_mul(whole) if channels_last(irreps) else whole) or None
