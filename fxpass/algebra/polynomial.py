"""Polynomials in the components of one vector: spherical harmonics, symmetric contractions.

A polynomial is a list of monomials; their coefficients are a separate array, because a model's
coefficients are data of the model.  ``closure`` adds the factors from which the monomials and their
derivatives are built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from string import ascii_letters, digits

DIGITS = digits + ascii_letters
Monomial = tuple[int, ...]  # sorted variable indices, with repetition; () is the constant 1


@dataclass(frozen=True)
class Polynomial:
    """Monomials in ``variables`` variables.

    Attributes:
        variables: number of variables.
        monomials: each a sorted tuple of variable indices.
        irreps_in, irreps_out: irreps of the variables and of the outputs of one channel.
    """

    variables: int
    monomials: tuple[Monomial, ...]
    irreps_in: str
    irreps_out: str

    def __str__(self) -> str:
        words = ",".join("".join(DIGITS[i] for i in m) for m in self.monomials)
        return f"{self.variables}|{self.irreps_in}|{self.irreps_out}|{words}"

    @cached_property
    def closure(self) -> tuple[tuple[Monomial, ...], ...]:
        """Per degree, all monomials that divide one of the polynomial's, sorted."""
        levels: list[set[Monomial]] = [set() for _ in range(max(map(len, self.monomials), default=0) + 1)]
        for m in self.monomials:
            levels[len(m)].add(m)
        for degree in range(len(levels) - 1, 0, -1):
            levels[degree - 1].update(m[:k] + m[k + 1 :] for m in levels[degree] for k in range(degree))
        return tuple(tuple(sorted(level)) for level in levels)

    @cached_property
    def order(self) -> tuple[Monomial, ...]:
        """The closure, by degree: the columns in which monomials are evaluated."""
        return tuple(chain.from_iterable(self.closure))

    @cached_property
    def steps(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Per degree >= 1: (column of the parent within the degree below, last variable)."""
        rows = []
        for below, level in zip(self.closure, self.closure[1:], strict=False):
            column = {m: k for k, m in enumerate(below)}
            rows.append((tuple(column[m[:-1]] for m in level), tuple(m[-1] for m in level)))
        return tuple(rows)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Column of each of the polynomial's monomials in ``order``."""
        column = {m: k for k, m in enumerate(self.order)}
        return tuple(column[m] for m in self.monomials)

    @cached_property
    def gradient(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Per variable i: (monomial, column of monomial / x_i in ``order``, exponent of x_i)."""
        column = {m: k for k, m in enumerate(self.order)}
        rows: list[list[tuple[int, int, int]]] = [[] for _ in range(self.variables)]
        for k, m in enumerate(self.monomials):
            for i in set(m):
                at = m.index(i)
                rows[i].append((k, column[m[:at] + m[at + 1 :]], m.count(i)))
        return tuple(map(tuple, rows))


@cache
def parse_polynomial(text: str) -> Polynomial:
    """Inverse of ``str(Polynomial)``."""
    variables, irreps_in, irreps_out, words = text.split("|")
    monomials = tuple(tuple(DIGITS.index(c) for c in word) for word in words.split(","))
    return Polynomial(int(variables), monomials, irreps_in, irreps_out)
