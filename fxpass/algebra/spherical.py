"""Real spherical harmonics as exact polynomials of a vector's components.

Y_lm(r) = N_lm * d^m P_l(y) homogenised with r^2 * {Im, Re}(z + i x)^|m|, y being the polar axis:
e3nn's basis and signs.  N_lm makes sum_m Y_lm^2 = 1 on the unit sphere ("norm"); "component"
multiplies by sqrt(2l+1), "integral" by sqrt((2l+1) / 4 pi).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import sympy

from .polynomial import Monomial, Polynomial

X, Y, Z = sympy.symbols("x y z", real=True)


@cache
def harmonic(l: int, m: int) -> sympy.Expr:
    """Y_lm with "norm" normalisation, expanded, exact."""
    legendre = sympy.legendre_poly(l, Y)
    profile = sympy.Poly(sympy.diff(legendre, Y, abs(m)) if m else legendre, Y)
    r2 = X**2 + Y**2 + Z**2
    # every term y^k of degree k < l - |m| is lifted to degree l - |m| with powers of r^2
    lifted = sum(c * Y**k * r2 ** ((l - abs(m) - k) // 2) for (k,), c in profile.terms())
    plane = sympy.expand((Z + sympy.I * X) ** abs(m))
    azimuth = sympy.re(plane) if m >= 0 else sympy.im(plane)
    norm = sympy.Integer(1)
    if m:
        norm = sympy.sqrt(2 * sympy.factorial(l - abs(m)) / sympy.factorial(l + abs(m)))
    return sympy.expand(norm * lifted * azimuth)


@cache
def exact_harmonics(degrees: tuple[int, ...], normalization: str) -> tuple[Mapping[Monomial, sympy.Expr], ...]:
    """Exact coefficients by monomial of each component of the given degrees, concatenated.

    Args:
        normalization: ``"norm"``, ``"component"`` or ``"integral"``.
    """
    found = []
    for l in degrees:
        scale = {
            "norm": sympy.Integer(1),
            "component": sympy.sqrt(2 * l + 1),
            "integral": sympy.sqrt((2 * l + 1) / (4 * sympy.pi)),
        }[normalization]
        for m in range(-l, l + 1):
            poly = sympy.Poly(harmonic(l, m), X, Y, Z)
            found.append({(0,) * a + (1,) * b + (2,) * c: scale * value for (a, b, c), value in poly.terms()})
    return tuple(found)


@cache
def spherical_harmonics(degrees: tuple[int, ...], normalization: str, parity: int) -> tuple[Polynomial, np.ndarray]:
    """Spherical harmonics of the given degrees, concatenated.

    Args:
        degrees: l of each output irrep, in order.
        normalization: ``"norm"``, ``"component"`` or ``"integral"``.
        parity: parity of the input vector, -1 for a true vector.

    Returns:
        the polynomial in (x, y, z), and its coefficients, float64, of shape [monomials, outputs].
    """
    exact = exact_harmonics(degrees, normalization)
    terms = [{m: float(sympy.N(value, 25)) for m, value in component.items()} for component in exact]
    monomials = tuple(sorted({m for t in terms for m in t}, key=lambda m: (len(m), m)))
    coefficients = np.array([[t.get(m, 0.0) for t in terms] for m in monomials])
    sign = "o" if parity == -1 else "e"
    irreps = "+".join(f"1x{l}{'e' if parity**l == 1 else 'o'}" for l in degrees)
    return Polynomial(3, monomials, f"1x1{sign}", irreps), coefficients
