"""Equivariant polynomials of what models are built from: tensor products, linear maps, harmonics, contractions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
import sympy

from .contraction import Contraction
from .couplings import Index, coupling, exact
from .equivariant import RESULT, EquivariantPolynomial, Factor, Segment, Term
from .irreps import segments
from .multilinear import CHANNELS, Linear, TensorProduct
from .polynomial import Polynomial
from .spherical import exact_harmonics, spherical_harmonics


def layout(irreps: str) -> tuple[Segment, ...]:
    """Segments of irreps: one axis of channels each."""
    return tuple(Segment((mul,), 2 * l + 1) for _, mul, l, _ in segments(irreps))


def of_tensor_product(tp: TensorProduct) -> EquivariantPolynomial:
    """Operands: x1, x2 and the weights, [rows, weights] or [1, weights] where they are shared."""
    weights = {p.weight: p for p in tp.paths if p.weight >= 0}
    extents = {at: tuple(tp.sizes(p)[c] for c in CHANNELS[p.mode][2]) for at, p in weights.items()}
    blocks, number = _blocks(extents, tp.weights)
    results, terms = list(layout(tp.irreps_out)), []
    for p in tp.paths:
        u, v, w, out = CHANNELS[p.mode]
        if len(out) > 1:  # its channels are pairs
            results[p.io] = Segment((tp.sizes(p)["u"], tp.sizes(p)["v"]), results[p.io].components)
        factors = [Factor(0, p.i1, u), Factor(1, p.i2, v)]
        factors += [Factor(2, number[p.weight], w)] if p.weight >= 0 else []
        places = (0,) * (len(factors) - 2)
        scale = exact(p.coefficient)
        entries = tuple(((i, j, *places, k), c * scale) for (i, j, k), c in coupling(*tp.degrees(p)).items())
        terms.append(Term(tuple(factors), Factor(RESULT, p.io, out), entries))
    operands = (layout(tp.irreps1), layout(tp.irreps2), blocks)
    return EquivariantPolynomial(operands, tuple(results), tuple(terms)).merged()


def of_linear(linear: Linear) -> EquivariantPolynomial:
    """Operands: x and the weights."""
    ins, outs = layout(linear.irreps_in), layout(linear.irreps_out)
    extents = {p.weight: (*ins[p.i].channels, *outs[p.o].channels) for p in linear.paths}
    blocks, number = _blocks(extents, linear.weights)
    terms = tuple(
        Term(
            (Factor(0, p.i, "u"), Factor(1, number[p.weight], "uw")),
            Factor(RESULT, p.o, "w"),
            tuple(((i, 0, i), exact(p.coefficient)) for i in range(ins[p.i].components)),
        )
        for p in linear.paths
    )
    return EquivariantPolynomial((ins, blocks), outs, terms).merged()


def of_polynomial(
    poly: Polynomial, coefficients: Mapping[tuple[Index, int], sympy.Expr], channels: int = 1
) -> EquivariantPolynomial:
    """Operand: x [rows, channels * variables].

    Args:
        coefficients: by monomial and output of one channel.
    """
    results = tuple(
        Segment((channels,), 2 * l + 1) for _, mul, l, _ in segments(poly.irreps_out) for _ in range(mul)
    )
    where = [(s, k) for s, segment in enumerate(results) for k in range(segment.components)]
    found: dict[tuple[int, int], list[tuple[Index, sympy.Expr]]] = {}
    for (monomial, output), value in coefficients.items():
        segment, k = where[output]
        found.setdefault((len(monomial), segment), []).append(((*monomial, k), value))
    x = Factor(0, 0, "u")
    terms = tuple(
        Term((x,) * degree, Factor(RESULT, segment, "u"), tuple(entries))
        for (degree, segment), entries in found.items()
    )
    return EquivariantPolynomial(((Segment((channels,), poly.variables),),), results, terms).merged()


def of_spherical_harmonics(degrees: tuple[int, ...], normalization: str, parity: int = -1) -> EquivariantPolynomial:
    """Operand: the vector; degrees and normalization as in ``spherical.spherical_harmonics``."""
    poly, _ = spherical_harmonics(degrees, normalization, parity)
    harmonics = exact_harmonics(degrees, normalization)
    return of_polynomial(poly, {(m, k): value for k, row in enumerate(harmonics) for m, value in row.items()})


def symmetric_contractions(irreps: str, l: int, parity: int, correlation: int) -> tuple[EquivariantPolynomial, ...]:
    """Independent equivariant polynomials of degree ``correlation`` that span all of one degree l and parity.

    Products are coupled one after the other, each time in all ways, and what depends on the others linearly is left
    out; an irrep of several copies counts as several. The span is that of MACE's reduced coupling coefficients.

    Returns:
        polynomials of one operand, x of one channel [rows, dim(irreps)].
    """
    parts = [(at, degree, p) for at, _, degree, p in segments(irreps)]
    x = tuple(Segment((1,), 2 * degree + 1) for _, degree, _ in parts)
    firsts = [
        (degree, p, EquivariantPolynomial((x,), (x[n],), (_identity(n, x[n]),)))
        for n, (_, degree, p) in enumerate(parts)
    ]
    powers = firsts
    for _ in range(correlation - 1):
        found: dict[tuple[int, int], list[EquivariantPolynomial]] = {}
        for (l1, p1, one), (l2, p2, other) in product(powers, firsts):
            for l3 in range(abs(l1 - l2), l1 + l2 + 1):
                both = _coupled(l1, l2, l3).composed(0, one).composed(0, other)
                found.setdefault((l3, p1 * p2), []).append(both.identified(0, 1))
        powers = [(l3, p, poly) for (l3, p), made in found.items() for poly in independent(made)]
    return tuple(poly for degree, p, poly in powers if (degree, p) == (l, parity))


def _identity(n: int, segment: Segment) -> Term:
    entries = tuple(((k, k), sympy.Integer(1)) for k in range(segment.components))
    return Term((Factor(0, n, "u"),), Factor(RESULT, 0, "u"), entries)


def _coupled(l1: int, l2: int, l3: int) -> EquivariantPolynomial:
    """Two operands of one irrep each, coupled to a third."""
    one, two, three = (Segment((1,), 2 * l + 1) for l in (l1, l2, l3))
    term = Term((Factor(0, 0, "u"), Factor(1, 0, "u")), Factor(RESULT, 0, "u"), tuple(coupling(l1, l2, l3).items()))
    return EquivariantPolynomial(((one,), (two,)), (three,), (term,))


def independent(polynomials: Sequence[EquivariantPolynomial]) -> list[EquivariantPolynomial]:
    """Those of polynomials of the same operands that do not depend linearly on earlier ones."""
    names: dict[tuple[tuple[Factor, ...], Factor, Index], int] = {}
    rows = [
        {names.setdefault((t.factors, t.out, i), len(names)): float(v) for t in p.terms for i, v in t.coefficients}
        for p in polynomials
    ]
    kept, basis = [], np.zeros((0, len(names)))
    for poly, row in zip(polynomials, rows, strict=True):
        vector = np.zeros(len(names))
        vector[list(row)] = list(row.values())
        size = np.linalg.norm(vector)
        rest = vector - basis.T @ (basis @ vector)
        rest -= basis.T @ (basis @ rest)
        if np.linalg.norm(rest) > 1e-9 * size:
            kept.append(poly)
            basis = np.vstack([basis, rest / np.linalg.norm(rest)])
    return kept


def of_contraction(contraction: Contraction, channels: int) -> EquivariantPolynomial:
    """Operands: x [rows, channels * variables] and the coefficients of its terms [rows, terms * channels]."""
    blocks = tuple(Segment((channels,), 1) for _ in contraction.terms)
    results = tuple(
        Segment((channels,), 2 * l + 1) for _, mul, l, _ in segments(contraction.irreps_out) for _ in range(mul)
    )
    where = [(s, k) for s, segment in enumerate(results) for k in range(segment.components)]
    terms = tuple(
        Term(
            (*(Factor(0, 0, "u") for _ in monomial), Factor(1, n, "u")),
            Factor(RESULT, where[output][0], "u"),
            (((*monomial, 0, where[output][1]), sympy.Integer(1)),),
        )
        for n, (monomial, output) in enumerate(contraction.terms)
    )
    x = (Segment((channels,), contraction.variables),)
    return EquivariantPolynomial((x, blocks), results, terms).merged()


def _blocks(extents: Mapping[int, tuple[int, ...]], total: int) -> tuple[tuple[Segment, ...], dict[int, int]]:
    """Segments that cover a vector of weights, and the number of that which begins at each offset."""
    blocks, number, at = [], {}, 0
    for offset in (*sorted(extents), total):
        if offset > at:
            blocks.append(Segment((offset - at,), 1))  # weights that nobody reads
        if offset in extents:
            number[offset] = len(blocks)
            blocks.append(Segment(extents[offset], 1))
            at = offset + prod(extents[offset])
    return tuple(blocks), number
