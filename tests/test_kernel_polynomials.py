"""Generated C++ for contractions and for polynomials without weights, against the references in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations_with_replacement
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxpass.algebra.contraction import Contraction
from fxpass.algebra.polynomial import Polynomial
from fxpass.algebra.spherical import spherical_harmonics
from fxpass.errors import UsageError
from fxpass.ir import ops
from fxpass.ir.contraction import contraction, contraction_gradient
from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.contraction import DTYPES, ContractionKernel
from fxpass.kernels.polynomial import PolynomialKernel

pytestmark = pytest.mark.once

TOLERANCE = {"float32": 2e-6, "float64": 1e-12}  # of the largest number
SPECIES, ATOMS = 3, 7
CHANNELS = (1, 5, 8, 24, 32, 128)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_contraction(variables: int, degree: int, outputs: int, share: float, constant: bool = False) -> Contraction:
    """A random ``share`` of the pairs of a monomial up to ``degree`` and an output."""
    degrees = range(0 if constant else 1, degree + 1)
    names = list(chain.from_iterable(combinations_with_replacement(range(variables), d) for d in degrees))
    chosen = torch.rand(len(names), outputs, generator=torch.Generator().manual_seed(degree)) < share
    terms = [(m, k) for k in range(outputs) for n, m in enumerate(names) if chosen[n, k]]
    return Contraction(variables, tuple(terms), f"{variables}x0e", f"{outputs}x0e")


SMALL = random_contraction(4, 3, 3, share=0.5, constant=True)
#: name -> contraction: each degree, one output and many, a constant alone, an output without terms, several functions
CASES = {
    "degree-1": random_contraction(4, 1, 2, share=1.0),
    "degree-2": random_contraction(9, 2, 4, share=0.5),
    "degree-3": random_contraction(16, 3, 4, share=0.1),
    "degree-4": random_contraction(9, 4, 1, share=0.6, constant=True),
    "constant": Contraction(2, (((), 1),), "2x0e", "2x0e"),
    "nothing": Contraction(2, (), "2x0e", "3x0e"),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def check(kernels: list[ContractionKernel], folder: Path, atoms: int = ATOMS, threads: int = 1) -> None:
    compiler = find_compiler(folder=folder)
    assert compiler is not None
    built = build({k.name: k.source for k in kernels}, compiler, folder)
    for kernel in kernels:
        found, dtype = kernel.contraction, DTYPES[kernel.dtype]
        x, g = numbers(atoms, kernel.channels, found.variables), numbers(atoms, kernel.channels, found.outputs, seed=1)
        terms = numbers(SPECIES, len(found.terms), kernel.channels, seed=2)
        index = torch.randint(SPECIES, (atoms,), generator=torch.Generator().manual_seed(3))
        given = [x, index, terms, *([g] if kernel.gradient else [])]
        given = [t.to(dtype) if t.is_floating_point() else t for t in given]
        if found.terms:
            op = contraction_gradient if kernel.gradient else contraction
            expected = op(*(t.double() if t.is_floating_point() else t for t in given), str(found))
        else:
            expected = torch.zeros(atoms, kernel.channels, found.variables if kernel.gradient else found.outputs)
        result = kernel.call(kernel.function(built[kernel.name]), *given, threads=threads)
        assert (result.dtype, result.shape) == (dtype, expected.shape)
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=TOLERANCE[kernel.dtype] * scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_contraction_for_numbers_of_channels(dtype: str, libraries: Path) -> None:
    check([ContractionKernel(SMALL, n, dtype, gradient) for n in CHANNELS for gradient in (False, True)], libraries)


@pytest.mark.parametrize("name", CASES)
def test_contraction_of_each_kind(name: str, libraries: Path) -> None:
    kernels = [ContractionKernel(CASES[name], 16, dtype, g) for dtype in TOLERANCE for g in (False, True)]
    check(kernels, libraries)


@pytest.mark.parametrize(("atoms", "threads"), [(0, 1), (0, 2), (1, 2), (ATOMS, 2)])
def test_contraction_for_numbers_of_atoms_and_threads(atoms: int, threads: int, libraries: Path) -> None:
    check([ContractionKernel(SMALL, 8, "float64", gradient) for gradient in (False, True)], libraries, atoms, threads)


def test_parts_share_the_terms_among_them() -> None:
    kernel = ContractionKernel(CASES["degree-3"], 128, "float64", gradient=True)
    assert len(kernel.parts) > 4
    loaded = [i.at for part in kernel.parts for i in part.live() if i.array == "terms"]
    assert sorted(loaded) == list(range(len(CASES["degree-3"].terms)))


def test_a_term_costs_a_multiply_add_and_its_gradient_two() -> None:
    found = CASES["degree-2"]
    for gradient in (False, True):
        (part,) = ContractionKernel(found, 16, "float32", gradient).parts
        assert part.flops <= found.flops(gradient) + found.outputs + found.variables  # additions to the result
        assert part.flops <= (4 if gradient else 2) * len(found.terms) * 1.35


def test_sources_are_the_same_for_the_same_kernel_and_differ_otherwise() -> None:
    kernel = ContractionKernel(SMALL, 8, "float32", gradient=False)
    assert replace(kernel).source == kernel.source
    others = [{"channels": 9}, {"dtype": "float64"}, {"gradient": True}, {"contraction": CASES["degree-1"]}]
    names = {replace(kernel, **other).name for other in others} | {kernel.name}
    assert len(names) == 5
    assert all(name.isidentifier() for name in names)
    assert kernel.source.count(f'extern "C" int {kernel.name}(') == 1


def test_contraction_refuses_what_it_was_not_made_for(libraries: Path) -> None:
    kernel = ContractionKernel(SMALL, 8, "float64", gradient=False)
    compiler = find_compiler(folder=libraries)
    assert compiler is not None
    function = kernel.function(build({kernel.name: kernel.source}, compiler, libraries)[kernel.name])
    x, index, terms = numbers(2, 8, 4), torch.tensor([0, 2]), numbers(3, len(SMALL.terms), 8)
    assert kernel.call(function, x, index, terms).shape == (2, 8, 3)
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(UsageError, match="not below 3, the number of species"):
            kernel.call(function, x, wrong, terms)
    for bad in ((x.float(), index, terms), (x.mT.contiguous().mT, index, terms), (x, index, terms[:, 1:])):
        with pytest.raises(UsageError, match="The kernel takes"):
            kernel.call(function, *bad)


# --- polynomials without weights


def harmonics(l_max: int, dtype: str, gradient: bool) -> PolynomialKernel:
    poly, coefficients = spherical_harmonics(tuple(range(l_max + 1)), "component", -1)
    return PolynomialKernel(poly, tuple(map(tuple, coefficients.tolist())), dtype, gradient)


def check_polynomial(kernels: list[PolynomialKernel], folder: Path, rows: int, threads: int = 1) -> None:
    compiler = find_compiler(folder=folder)
    assert compiler is not None
    built = build({k.name: k.source for k in kernels}, compiler, folder)
    for kernel in kernels:
        dtype = DTYPES[kernel.dtype]
        x = numbers(rows, 1, kernel.polynomial.variables).to(dtype)
        g = numbers(rows, 1, kernel.outputs, seed=1).to(dtype) if kernel.gradient else None
        coefficients = torch.tensor(kernel.coefficients, dtype=torch.float64).unsqueeze(1)
        wide = None if g is None else g.double()
        wrt = "out" if g is None else "direction"
        expected = ops.polynomial(x.double(), [], None, wide, coefficients, str(kernel.polynomial), wrt)
        result = kernel.call(kernel.function(built[kernel.name]), x, *([] if g is None else [g]), threads=threads)
        assert (result.dtype, result.shape) == (dtype, expected.shape)
        scale = expected.abs().max().item() if rows else 0.0
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=TOLERANCE[kernel.dtype] * scale)


@pytest.mark.parametrize("l_max", [0, 1, 3, 4, 6])
def test_spherical_harmonics(l_max: int, libraries: Path) -> None:
    kernels = [harmonics(l_max, dtype, gradient) for dtype in TOLERANCE for gradient in (False, True)]
    check_polynomial(kernels, libraries, rows=37)


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 1000])
def test_numbers_of_rows(rows: int, libraries: Path) -> None:
    kernels = [harmonics(3, "float64", gradient) for gradient in (False, True)]
    check_polynomial(kernels, libraries, rows, threads=2)


def test_any_polynomial(libraries: Path) -> None:
    """A constant, an output of constants alone, one that is zero, high powers."""
    poly = Polynomial(2, ((), (0,), (0, 1, 1), (1, 1, 1, 1)), "2x0e", "4x0e")
    rows = ((0.1, 2.0, 0.0, 0.0), (1 / 3, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, -7.0), (1e-9, 0.0, 0.0, 0.0))
    kernels = [PolynomialKernel(poly, rows, dtype, gradient) for dtype in TOLERANCE for gradient in (False, True)]
    check_polynomial(kernels, libraries, rows=11)


def test_sources_of_polynomials() -> None:
    kernel = harmonics(2, "float64", gradient=False)
    assert harmonics(2, "float64", gradient=False).source == kernel.source
    assert repr(kernel.coefficients[-1][-1]) in kernel.source  # in full
    assert len({kernel.name, harmonics(2, "float32", False).name, harmonics(2, "float64", True).name}) == 3


def test_polynomial_refuses_what_it_was_not_made_for(libraries: Path) -> None:
    kernel, compiler = harmonics(1, "float64", gradient=True), find_compiler(folder=libraries)
    assert compiler is not None
    function = kernel.function(build({kernel.name: kernel.source}, compiler, libraries)[kernel.name])
    for x, g in ((numbers(2, 1, 3), numbers(2, 1, 3)), (numbers(2, 1, 3).float(), numbers(2, 1, 4))):
        with pytest.raises(UsageError, match="The kernel takes"):
            kernel.call(function, x, g)
