"""Sparse polynomials whose coefficients differ from row to row and from channel to channel.

A symmetric contraction with its weights contracted in: the weights of a species and the coupling
coefficients become one number for each term, a term being a monomial that goes to an output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from .irreps import dim
from .polynomial import DIGITS, Monomial, Polynomial

Term = tuple[Monomial, int]  # a monomial, and the output that it goes to


@dataclass(frozen=True)
class Contraction:
    """out[k] = sum over the terms (m, k) of c[term] * monomial_m(x).

    Attributes:
        variables: number of variables.
        terms: in the order of the coefficients, each once.
        irreps_in, irreps_out: irreps of the variables and of the outputs of one channel.
    """

    variables: int
    terms: tuple[Term, ...]
    irreps_in: str
    irreps_out: str

    def __str__(self) -> str:
        words = ",".join("".join(DIGITS[i] for i in m) + f":{k}" for m, k in self.terms)
        return f"{self.variables}|{self.irreps_in}|{self.irreps_out}|{words}"

    @classmethod
    def of(cls, poly: Polynomial, coefficients: Any) -> Contraction:
        """The terms that some path of a polynomial touches, by output.

        Args:
            coefficients: array or tensor [monomials, paths, outputs].
        """
        touched = (coefficients != 0).any(1).tolist()
        terms = sorted((k, m) for m, row in zip(poly.monomials, touched, strict=True) for k, t in enumerate(row) if t)
        return cls(poly.variables, tuple((m, k) for k, m in terms), poly.irreps_in, poly.irreps_out)

    def fold(self, poly: Polynomial, coefficients: Any, weights: Any) -> Any:
        """Coefficient of each term: weights summed over the paths.

        Args:
            coefficients: array or tensor [monomials, paths, outputs] of ``poly``.
            weights: the same kind of array, [species, paths, channels].

        Returns:
            [species, terms, channels].
        """
        row = {m: n for n, m in enumerate(poly.monomials)}
        return coefficients[[row[m] for m, _ in self.terms], :, [k for _, k in self.terms]] @ weights

    @staticmethod
    def merged(parts: Sequence[Contraction]) -> Contraction:
        """One contraction of the same variables, whose terms and outputs are those of ``parts``, concatenated."""
        terms: list[Term] = []
        first = 0
        for part in parts:
            terms += ((m, first + k) for m, k in part.terms)
            first += part.outputs
        irreps_out = "+".join(part.irreps_out for part in parts)
        return Contraction(parts[0].variables, tuple(terms), parts[0].irreps_in, irreps_out)

    @cached_property
    def outputs(self) -> int:
        """Number of outputs of one channel."""
        return dim(self.irreps_out)

    @cached_property
    def polynomial(self) -> Polynomial:
        """The polynomial of all monomials, each once."""
        names = dict.fromkeys(m for m, _ in self.terms)
        return Polynomial(self.variables, tuple(names), self.irreps_in, self.irreps_out)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Number of the monomial of each term in ``polynomial``."""
        row = {m: n for n, m in enumerate(self.polynomial.monomials)}
        return tuple(row[m] for m, _ in self.terms)

    def by_output(self) -> dict[int, Nested]:
        """The nested form of each output that has terms; its coefficients are numbers of terms."""
        names: dict[int, dict[Monomial, int]] = {}
        for number, (m, k) in enumerate(self.terms):
            names.setdefault(k, {})[m] = number
        return {k: nested(names[k]) for k in sorted(names)}

    def flops(self, gradient: bool = False) -> int:
        """Operations per row and channel, a multiply-add counting two; of the value, or of the gradient by x."""
        return sum(tree.flops(gradient) for tree in self.by_output().values())


@cache
def parse_contraction(text: str) -> Contraction:
    """Inverse of ``str(Contraction)``."""
    variables, irreps_in, irreps_out, words = text.split("|")
    pairs = (word.split(":") for word in words.split(",") if word)
    terms = tuple((tuple(DIGITS.index(c) for c in name), int(k)) for name, k in pairs)
    return Contraction(int(variables), terms, irreps_in, irreps_out)


@dataclass(frozen=True)
class Nested:
    """A polynomial in Horner's form: coefficient + sum over the factors (i, inner) of x_i * inner.

    Attributes:
        coefficient: number of the coefficient of the constant term, None where there is none.
        factors: variables, each with what it multiplies.
    """

    coefficient: int | None
    factors: tuple[tuple[int, Nested], ...]

    def flops(self, gradient: bool = False) -> int:
        """Operations to evaluate it, or its gradient by x for a given derivative by its value."""
        total = 0
        for number, (_, inner) in enumerate(self.factors):
            first = number == 0 and self.coefficient is None
            total += (1 if first else 2) + inner.flops(gradient)
            if gradient:
                total += 2 + bool(inner.factors)
        return total


def nested(coefficients: Mapping[Monomial, int]) -> Nested:
    """Nested form of a sum of monomials, each with the number of its coefficient.

    The variable in most monomials is factored out first: every term then costs one multiply-add, and few
    products are left over (Ceberio and Kreinovich, "Greedy algorithms for optimizing multivariate Horner
    schemes", ACM SIGSAM Bulletin 38, 8 (2004)).
    """
    left = dict(coefficients)
    constant = left.pop((), None)
    factors = []
    while left:
        counts = Counter(i for m in left for i in set(m))
        most = min(counts, key=lambda i: (-counts[i], i))
        inner = {}
        for m in [m for m in left if most in m]:
            at = m.index(most)
            inner[m[:at] + m[at + 1 :]] = left.pop(m)
        factors.append((most, nested(inner)))
    return Nested(constant, tuple(factors))
