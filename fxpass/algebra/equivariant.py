"""Equivariant polynomials as immutable data: what tensor products, linear maps and contractions have in common.

A polynomial has operands and a result, each a row of segments.  A term multiplies some segments of operands, channel by
channel, and couples their components by sparse exact coefficients into one segment of the result.  Channels are named
by letters, as in an einsum: equal letters run together, letters that the result has not are summed over.  Derivatives,
transposes and compositions of such polynomials are such polynomials.  ``constructions`` makes them of what models are
built from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, permutations, product
from math import prod
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import sympy

from ..errors import UsageError
from .couplings import Index

Floats = npt.NDArray[np.float64]
Coefficients = tuple[tuple[Index, sympy.Expr], ...]


class Segment(NamedTuple):
    """A block of columns: channels outermost, the components of each channel together.

    Attributes:
        channels: extents of the axes of channels; weights have one axis for each letter.
        components: 2l+1, or 1.
    """

    channels: tuple[int, ...]
    components: int

    @property
    def columns(self) -> int:
        return prod(self.channels) * self.components


class Factor(NamedTuple):
    """A segment of an operand, or of the result, as a term reads or writes it: with a letter for each axis."""

    operand: int
    segment: int
    letters: str


RESULT = -1  # in the place of the number of an operand


@dataclass(frozen=True)
class Term:
    """Product of ``factors``, coupled into ``out``.

    Attributes:
        coefficients: by component of each factor and, last, of the result; none is zero.
    """

    factors: tuple[Factor, ...]
    out: Factor
    coefficients: Coefficients


@dataclass(frozen=True)
class EquivariantPolynomial:
    """Sum of terms.

    Attributes:
        operands: segments of each operand; an operand may occur several times in a term.
        result: segments of the result.
    """

    operands: tuple[tuple[Segment, ...], ...]
    result: tuple[Segment, ...]
    terms: tuple[Term, ...]

    # --- what is made of it

    def derivative(self, operand: int) -> EquivariantPolynomial:
        """The derivative along a direction of ``operand``, which is one more operand, the last."""
        new = len(self.operands)
        terms = tuple(
            replace(term, factors=(*term.factors[:n], factor._replace(operand=new), *term.factors[n + 1 :]))
            for term in self.terms
            for n, factor in enumerate(term.factors)
            if factor.operand == operand
        )
        return EquivariantPolynomial((*self.operands, self.operands[operand]), self.result, terms).merged()

    def transposed(self, operand: int) -> EquivariantPolynomial:
        """The gradient of sum(g * value) by an operand in which it is linear; g takes the operand's place.

        Raises:
            UsageError: it is not linear in the operand.
        """
        terms = []
        for term in self.terms:
            places = [n for n, factor in enumerate(term.factors) if factor.operand == operand]
            if len(places) != 1:
                count = len(places)
                raise UsageError(f"The polynomial is not linear in operand {operand}: a term has it {count} times.")
            (n,) = places
            factors = (*term.factors[:n], term.out._replace(operand=operand), *term.factors[n + 1 :])
            swapped = tuple(((*i[:n], i[-1], *i[n + 1 : -1], i[n]), value) for i, value in term.coefficients)
            terms.append(Term(factors, term.factors[n]._replace(operand=RESULT), swapped))
        operands = (*self.operands[:operand], self.result, *self.operands[operand + 1 :])
        return EquivariantPolynomial(operands, self.operands[operand], tuple(terms)).merged()

    def composed(self, operand: int, inner: EquivariantPolynomial) -> EquivariantPolynomial:
        """The polynomial with ``inner`` in the place of an operand, whose operands follow the others.

        Raises:
            UsageError: the result of ``inner`` has other segments than the operand.
        """
        if inner.result != self.operands[operand]:
            raise UsageError(f"Operand {operand} has the segments {self.operands[operand]}, not {inner.result}.")
        kept = [k for k in range(len(self.operands)) if k != operand]
        number = {k: n for n, k in enumerate(kept)}
        makers: dict[int, list[Term]] = {}
        for term in inner.terms:
            makers.setdefault(term.out.segment, []).append(term)
        terms: list[Term] = []
        for term in self.terms:
            choices = [makers.get(f.segment, []) if f.operand == operand else [None] for f in term.factors]
            terms += (_substituted(term, choice, number, len(kept)) for choice in product(*choices))
        operands = (*(self.operands[k] for k in kept), *inner.operands)
        return EquivariantPolynomial(operands, self.result, tuple(terms)).merged()

    def identified(self, operand: int, other: int) -> EquivariantPolynomial:
        """The polynomial in which ``other`` is the same operand as ``operand``, and has no place of its own.

        Raises:
            UsageError: the two have different segments.
        """
        if self.operands[operand] != self.operands[other]:
            raise UsageError(f"Operands {operand} and {other} have different segments.")
        places = [k for k in range(len(self.operands)) if k != other]
        number = {k: n for n, k in enumerate(places)}
        number[other] = number[operand]
        terms = tuple(
            replace(term, factors=tuple(f._replace(operand=number[f.operand]) for f in term.factors))
            for term in self.terms
        )
        return EquivariantPolynomial(tuple(self.operands[k] for k in places), self.result, terms).merged()

    def __add__(self, other: EquivariantPolynomial) -> EquivariantPolynomial:
        """The sum of two polynomials of the same operands."""
        if (self.operands, self.result) != (other.operands, other.result):
            raise UsageError("Polynomials of different operands or results cannot be added.")
        return replace(self, terms=self.terms + other.terms).merged()

    def merged(self) -> EquivariantPolynomial:
        """The same polynomial in normal form: like terms are one term, and none is zero.

        Factors are sorted and letters renamed; where a segment occurs in a term several times with the same letters,
        so are its components, because products commute.
        """
        found: dict[tuple[tuple[Factor, ...], Factor], dict[Index, sympy.Expr]] = {}
        for term in self.terms:
            factors, out, coefficients = _normal(term)
            sums = found.setdefault((factors, out), {})
            for index, value in coefficients:
                sums[index] = sums.get(index, sympy.Integer(0)) + value
        terms = []
        for (factors, out), sums in sorted(found.items()):
            expanded = ((index, sympy.expand(sums[index])) for index in sorted(sums))
            values = tuple((index, value) for index, value in expanded if value != 0)
            if values:
                terms.append(Term(factors, out, values))
        return replace(self, terms=tuple(terms))

    def live(
        self, results: Collection[int] | None = None, zeros: Collection[tuple[int, int]] = ()
    ) -> EquivariantPolynomial:
        """Without dead terms: those that write to no segment of ``results``, or read a segment that is zero.

        Args:
            results: numbers of the segments that somebody reads; None for all.
            zeros: (operand, segment) of what is known to be zero.
        """
        terms = tuple(
            term
            for term in self.merged().terms
            if (results is None or term.out.segment in results)
            and not any((f.operand, f.segment) in zeros for f in term.factors)
        )
        return replace(self, terms=terms)

    # --- what is known of it

    @cached_property
    def reads(self) -> frozenset[tuple[int, int]]:
        """(operand, segment) of everything that some term reads; what is not in it is dead."""
        return frozenset((f.operand, f.segment) for term in self.terms for f in term.factors)

    @cached_property
    def writes(self) -> frozenset[int]:
        """Numbers of the segments of the result that are not zero."""
        return frozenset(term.out.segment for term in self.terms)

    def degree(self, operand: int) -> int:
        """The largest power of an operand."""
        return max((sum(f.operand == operand for f in term.factors) for term in self.terms), default=0)

    def flops(self) -> int:
        """Operations for each row, term by term: products of the factors, and a multiply-add for each coefficient."""
        total = 0
        for term in self.terms:
            monomials = len({index[:-1] for index, _ in term.coefficients})
            channels = prod(self._extents(term).values())
            total += channels * (monomials * (len(term.factors) - 1) + 2 * len(term.coefficients))
        return total

    def bytes(self, itemsize: int) -> int:
        """Bytes for each row that a perfect kernel reads and writes: the live segments, each once."""
        read = sum(self.operands[operand][segment].columns for operand, segment in self.reads)
        return itemsize * (read + sum(self.result[segment].columns for segment in self.writes))

    def _extents(self, term: Term) -> dict[str, int]:
        pairs = ((f, self.operands[f.operand][f.segment]) for f in term.factors)
        found: dict[str, int] = {}
        for factor, segment in (*pairs, (term.out, self.result[term.out.segment])):
            found |= zip(factor.letters, segment.channels, strict=True)
        return found

    def __call__(self, *operands: Floats) -> Floats:
        """Evaluate it in float64, for tests and constants.

        Args:
            operands: [rows, columns] each, or [1, columns] for one that all rows share.

        Returns:
            [rows, columns].
        """
        rows = max((x.shape[0] for x in operands), default=1)
        columns = [_starts(layout) for layout in (*self.operands, self.result)]
        out = np.zeros((rows, columns[-1][-1]))
        for term in self.terms:
            views, names = [], []
            for n, factor in enumerate(term.factors):
                segment, start = self.operands[factor.operand][factor.segment], columns[factor.operand][factor.segment]
                block = operands[factor.operand][:, start : start + segment.columns]
                block = np.broadcast_to(block, (rows, segment.columns))
                views.append(block.reshape(rows, *segment.channels, segment.components))
                names.append(f"Z{factor.letters}{chr(ord('A') + n)}")
            target = self.result[term.out.segment]
            sizes = [view.shape[-1] for view in views]
            table = np.zeros((*sizes, target.components))
            for index, value in term.coefficients:
                table[index] = float(value)
            inside = "".join(chr(ord("A") + n) for n in range(len(views)))
            spread = np.ones([self._extents(term)[letter] for letter in term.out.letters])  # letters of no factor
            text = ",".join([*names, f"{inside}K", term.out.letters, "Z"]) + f"->Z{term.out.letters}K"
            value = np.einsum(text, *views, table, spread, np.ones(rows), optimize=True)
            start = columns[-1][term.out.segment]
            out[:, start : start + target.columns] += value.reshape(rows, -1)
        return out


def _starts(layout: Sequence[Segment]) -> list[int]:
    """First column of each segment, and the number of columns."""
    starts = [0]
    for segment in layout:
        starts.append(starts[-1] + segment.columns)
    return starts


def _normal(term: Term) -> tuple[tuple[Factor, ...], Factor, Iterator[tuple[Index, sympy.Expr]]]:
    """Factors in order, letters by first appearance in the result and then in them, indices of equal factors sorted."""
    best: tuple[tuple[Factor, ...], Factor] | None = None
    order: tuple[int, ...] = ()
    groups: dict[tuple[int, int], list[int]] = {}
    for n, factor in enumerate(term.factors):
        groups.setdefault((factor.operand, factor.segment), []).append(n)
    ordered = [groups[key] for key in sorted(groups)]
    for choice in product(*map(permutations, ordered)):  # within a group letters decide
        places = tuple(chain.from_iterable(choice))
        letters = "".join([term.out.letters, *(term.factors[n].letters for n in places)])
        names = dict(zip(dict.fromkeys(letters), ascii_lowercase, strict=False))
        renamed = tuple(_renamed(term.factors[n], names) for n in places), _renamed(term.out, names)
        if best is None or renamed < best:
            best, order = renamed, places
    assert best is not None
    factors, out = best
    equal: dict[Factor, list[int]] = {}
    for n, factor in enumerate(factors):
        equal.setdefault(factor, []).append(n)

    def coefficients() -> Iterator[tuple[Index, sympy.Expr]]:
        for index, value in term.coefficients:
            moved = [*(index[n] for n in order), index[-1]]
            for places in equal.values():
                for place, component in zip(places, sorted(moved[n] for n in places), strict=True):
                    moved[place] = component
            yield tuple(moved), value

    return factors, out, coefficients()


def _renamed(factor: Factor, names: Mapping[str, str]) -> Factor:
    return factor._replace(letters="".join(names[letter] for letter in factor.letters))


def _substituted(term: Term, choice: Sequence[Term | None], number: Mapping[int, int], first: int) -> Term:
    """A term with some factors replaced by the terms that make them."""
    used = set("".join([term.out.letters, *(f.letters for f in term.factors)]))
    factors: list[Factor] = []
    partial: list[tuple[Index, Index, sympy.Expr]] = [((), i, v) for i, v in term.coefficients]
    for n, (factor, maker) in enumerate(zip(term.factors, choice, strict=True)):
        if maker is None:
            factors.append(factor._replace(operand=number[factor.operand]))
            partial = [((*made, index[n]), index, value) for made, index, value in partial]
            continue
        names = dict(zip(maker.out.letters, factor.letters, strict=True))
        for letter in "".join(f.letters for f in maker.factors):
            if letter not in names:
                names[letter] = next(c for c in ascii_lowercase if c not in used)
                used.add(names[letter])
        factors += (_renamed(f, names)._replace(operand=first + f.operand) for f in maker.factors)
        partial = [
            ((*made, *inner[:-1]), index, value * weight)
            for made, index, value in partial
            for inner, weight in maker.coefficients
            if inner[-1] == index[n]
        ]
    sums: dict[Index, sympy.Expr] = {}
    for made, index, value in partial:
        key = (*made, index[-1])
        sums[key] = sums.get(key, sympy.Integer(0)) + value
    return Term(tuple(factors), term.out, tuple(sorted(sums.items())))
