"""What the Triton kernels of a model of realistic size take of GPUs that need not be there, as a table in Markdown.

    python -m fxpass.kernels.triton_report                          prints it
    python -m fxpass.kernels.triton_report --write docs/triton.md   puts it between the marks of that page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, permutations, product
from pathlib import Path

import numpy as np
import torch

from ..algebra.contraction import Contraction
from ..algebra.irreps import clebsch_gordan, dim, segments
from ..algebra.multilinear import Linear, LinearPath, TensorProduct
from ..algebra.multilinear import Path as Coupling
from ..algebra.piecewise import Grid
from ..algebra.spherical import spherical_harmonics
from .contraction import ContractionKernel
from .convolution import FORWARD, ConvolutionKernel
from .linear import LinearKernel, ScalarProductKernel
from .polynomial import PolynomialKernel
from .triton_compile import Resources, resources
from .triton_contraction import TritonContraction
from .triton_convolution import TritonConvolution
from .triton_launch import load_triton
from .triton_linear import TritonLinear
from .triton_polynomial import TritonPolynomial
from .triton_printer import TritonKernel

CAPABILITIES = (80, 90)
MARKS = ("<!-- resources: python -m fxpass.kernels.triton_report --write docs/triton.md -->\n", "<!-- end -->\n")
L_MAX, SPECIES = 3, 5
GRID = Grid(5, 0.0, 5.0, 500, flat=True)


@dataclass(frozen=True)
class Named:
    """A kernel of the model.

    Attributes:
        what: the model asks of it, in words.
        without: arguments that are None.
    """

    what: str
    printed: TritonKernel
    without: tuple[str, ...] = ()


def natural(channels: int, highest: int) -> str:
    """Irreps of parity (-1)^l up to degree ``highest``."""
    return "+".join(f"{channels}x{l}{'eo'[l % 2]}" for l in range(highest + 1))


def tensor_product(channels: int, features: int, harmonics: int = L_MAX, degree: int = L_MAX) -> TensorProduct:
    """The tensor product of a MACE layer: all paths to irreps of natural parity up to ``degree``."""
    paths: list[Coupling] = []
    out: list[str] = []
    for a, b in product(range(features + 1), range(harmonics + 1)):
        for l in range(abs(a - b), min(a + b, degree) + 1, 2):
            paths.append(Coupling(a, b, len(out), "uvu", channels * len(out), 1.0))
            out.append(f"{channels}x{l}{'eo'[l % 2]}")
    weights = channels * len(paths)
    return TensorProduct(
        natural(channels, features), natural(1, harmonics), "+".join(out), tuple(paths), weights, shared=False
    )


@cache
def symmetric_contraction(hidden: int, degree: int = 3, harmonics: int = L_MAX) -> Contraction:
    """The terms of a symmetric contraction of ``degree`` factors to natural irreps up to degree ``hidden``.

    A term is a monomial to which some coupling of so many factors, to one irrep after the other, gives a coefficient.
    """
    irreps = natural(1, harmonics)
    size, own = dim(irreps), [(at, l, p) for at, _, l, p in segments(irreps)]
    #: couplings of n factors: (degree, parity) -> arrays [variables] * n + [components]
    known: dict[tuple[int, int], list[np.ndarray]] = {}
    for at, l, p in own:
        known[l, p] = [np.eye(size)[:, at : at + 2 * l + 1]]
    chosen: set[tuple[int, int, tuple[int, ...]]] = set()
    for factors in range(1, degree + 1):
        if factors > 1:
            last = factors == degree
            known = _coupled(known, own, size, hidden if last else hidden + harmonics, natural_only=last)
        for l, array in ((l, a) for (l, p), arrays in known.items() if l <= hidden and p == (-1) ** l for a in arrays):
            total = sum(array.transpose(*order, factors) for order in permutations(range(factors)))
            for *variables, k in np.argwhere(np.abs(total) > 1e-9).tolist():
                chosen.add((l, k, tuple(sorted(variables))))
    parts = []
    for l in range(hidden + 1):
        terms = sorted((k, m) for degree_of, k, m in chosen if degree_of == l)
        out = f"1x{l}{'eo'[l % 2]}"
        parts.append(Contraction(size, tuple((m, k) for k, m in terms), irreps, out))
    return Contraction.merged(parts)


def _coupled(
    known: dict[tuple[int, int], list[np.ndarray]],
    own: list[tuple[int, int, int]],
    size: int,
    most: int,
    natural_only: bool,
) -> dict[tuple[int, int], list[np.ndarray]]:
    """Each of ``known`` times one more factor, to every degree up to ``most``."""
    made: dict[tuple[int, int], list[np.ndarray]] = {}
    for (l1, p1), arrays in known.items():
        for at, l2, p2 in own:
            for l in range(abs(l1 - l2), min(l1 + l2, most) + 1):
                if natural_only and p1 * p2 != (-1) ** l:
                    continue
                for array in arrays:
                    whole = np.zeros((*array.shape[:-1], size, 2 * l + 1))
                    whole[..., at : at + 2 * l2 + 1, :] = np.tensordot(array, clebsch_gordan(l1, l2, l), 1)
                    made.setdefault((l, p1 * p2), []).append(whole)
    return made


def linear(irreps_in: str, irreps_out: str) -> Linear:
    """All blocks between equal irreps."""
    paths: list[LinearPath] = []
    at = 0
    for (i, (_, m, *kind)), (o, (_, n, *other)) in product(
        enumerate(segments(irreps_in)), enumerate(segments(irreps_out))
    ):
        if kind == other:
            paths.append(LinearPath(i, o, at, 0.1))
            at += m * n
    return Linear(irreps_in, irreps_out, tuple(paths), at, shared=True)


def by_species(irreps_in: str, irreps_out: str, species: int = SPECIES) -> TensorProduct:
    """A linear map for each species."""
    whole = linear(irreps_in, irreps_out)
    paths = tuple(Coupling(p.i, 0, p.o, "uvw", p.weight * species, 0.1) for p in whole.paths)
    return TensorProduct(irreps_in, f"{species}x0e", irreps_out, paths, whole.weights * species, shared=True)


def harmonics(dtype: str, gradient: bool, highest: int = L_MAX) -> TritonPolynomial:
    poly, numbers = spherical_harmonics(tuple(range(highest + 1)), "component", -1)
    return TritonPolynomial(PolynomialKernel(poly, tuple(map(tuple, numbers.tolist())), dtype, gradient))


def mace(channels: int = 64, dtype: str = "float32", narrow: bool = False) -> Iterator[Named]:
    """The kernels of a MACE of two layers with scalars and vectors as features, l_max 3 and correlation 3."""
    hidden, both = natural(channels, 1), (False, True)
    storage = "bfloat16" if narrow else dtype
    for layer, features, needs in ((1, 0, (False, True, True)), (2, 1, (True, True, True))):
        for wanted in (FORWARD, needs):
            kernel = ConvolutionKernel(tensor_product(channels, features), GRID, dtype, wanted)
            what = f"convolution {layer}{', gradient' if kernel.gradient else ''}, {storage}"
            yield Named(what, TritonConvolution(kernel, narrow), ("species",))
    if narrow:
        return
    for layer, highest in ((1, 1), (2, 0)):
        for gradient in both:
            contraction = ContractionKernel(symmetric_contraction(highest), channels, dtype, gradient)
            parts = TritonContraction.parts(contraction)
            for printed in parts:
                part = f", part {printed.number + 1}" if len(parts) > 1 else ""
                yield Named(f"contraction {layer}{', gradient' if gradient else ''}{part}, {storage}", printed)
    message = linear(tensor_product(channels, 1).irreps_out, natural(channels, L_MAX))
    torch_dtype = getattr(torch, dtype)
    for back in both:
        mapped = ", transposed" if back else ""
        whole = LinearKernel(message, torch_dtype, "x" if back else "out")
        yield Named(f"linear map of messages{mapped}, {storage}", TritonLinear(whole))
        skipped = ScalarProductKernel(by_species(hidden, natural(channels, 0)), torch_dtype, "x1" if back else "out")
        yield Named(f"linear map by species{mapped}, {storage}", TritonLinear(skipped))
        yield Named(f"spherical harmonics{', gradient' if back else ''}, {storage}", harmonics(dtype, back))


@cache
def everything() -> tuple[Named, ...]:
    """All kernels of the table."""
    return tuple(chain(mace(), mace(narrow=True), mace(dtype="float64")))


def row(named: Named, found: Sequence[Resources]) -> str:
    """One line of the table."""
    numbers = [f"{r.registers} | {r.spill_stores + r.spill_loads} | {r.shared}" for r in found]
    lines = named.printed.source.count("\n")  # names depend on the last bits of what e3nn calculates
    return f"| {named.what} | {lines} | {named.printed.configs[0].warps} | {' | '.join(numbers)} |\n"


def table() -> str:
    """The whole table; takes minutes."""
    heads = [f"{what} sm_{capability}" for capability in CAPABILITIES for what in ("registers", "spills", "shared")]
    text = f"Triton {load_triton().__version__}\n\n| kernel | lines | warps | {' | '.join(heads)} |\n"
    text += f"|---|{'---:|' * (2 + len(heads))}\n"
    for named in everything():
        found = [resources(named.printed, c, without=named.without) for c in CAPABILITIES]
        text += row(named, found)
        print(text.splitlines()[-1], file=sys.stderr)
    return text


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    options = parser.parse_args(words)
    made = table()
    if options.write is None:
        print(made)
        return 0
    text = options.write.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    options.write.write_text(before + MARKS[0] + made + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
