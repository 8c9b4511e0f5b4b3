"""Clebsch-Gordan coefficients in e3nn's real basis, exact."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from math import sqrt
from types import MappingProxyType

import sympy
from sympy.physics.wigner import clebsch_gordan

from .irreps import clebsch_gordan as of_e3nn

Index = tuple[int, ...]


@cache
def real_to_complex(l: int) -> Mapping[int, tuple[tuple[int, sympy.Expr], ...]]:
    """Of each complex component m, the real components 0..2l that it is made of, with their factors.

    e3nn's: Y_m = (Y_|m| -+ i Y_-|m|) / sqrt(2), times (-1)^m for m > 0 and (-i)^l throughout, which makes the coupling
    coefficients real.
    """
    phase, half = (-sympy.I) ** l, 1 / sympy.sqrt(2)
    rows: dict[int, tuple[tuple[int, sympy.Expr], ...]] = {0: ((l, phase),)}
    for m in range(1, l + 1):
        rows[-m] = ((l + m, phase * half), (l - m, -sympy.I * phase * half))
        rows[m] = ((l + m, phase * (-1) ** m * half), (l - m, sympy.I * phase * (-1) ** m * half))
    return rows


@cache
def coupling(l1: int, l2: int, l3: int) -> Mapping[Index, sympy.Expr]:
    """The non-zero coefficients C[i, j, k] by index, exact, with sum of squares 1: e3nn's ``wigner_3j``.

    <l1 m1 l2 m2|l3 m3> brought to real components on all three sides, divided by sqrt(2 l3 + 1). The sign as a whole
    is that of the installed e3nn: 0.4.4 has the opposite one for l = 1, 2, 2 and 1, 3, 3 in any order.
    """
    found: dict[Index, sympy.Expr] = {}
    one, two, three = map(real_to_complex, (l1, l2, l3))
    for m1, first in one.items():
        for m2, second in two.items():
            value = clebsch_gordan(l1, l2, l3, m1, m2, m1 + m2) if abs(m1 + m2) <= l3 else sympy.Integer(0)
            if value == 0:
                continue
            for i, a in first:
                for j, b in second:
                    for k, c in three[m1 + m2]:
                        found[i, j, k] = found.get((i, j, k), 0) + a * b * sympy.conjugate(c) * value
    scale = sympy.sqrt(2 * l3 + 1)
    values = {index: sympy.expand(value) / scale for index, value in sorted(found.items())}
    values = {index: value for index, value in values.items() if value != 0}
    index, value = next(iter(values.items()))
    sign = 1 if value * of_e3nn(l1, l2, l3)[index] > 0 else -1
    return MappingProxyType({index: sign * value for index, value in values.items()})


@cache
def exact(number: float) -> sympy.Expr:
    """The number that a float stands for: the root of a small fraction that rounds to it, or the float itself.

    Normalisations are such roots: 1/sqrt(32) is kept as a float and meant as what it is.
    """
    square = Fraction(number * number).limit_denominator(1 << 20)
    root = sympy.sqrt(sympy.Rational(square.numerator, square.denominator))
    near = abs(sqrt(square) - abs(number)) <= 4e-16 * abs(number)
    return (root if number >= 0 else -root) if near else sympy.Rational(number)
