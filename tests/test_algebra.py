"""Equivariant polynomials: exact data, the operations on it, and the conventions of the installed e3nn."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import sympy
import torch

from fxpass._torch_compat import o3
from fxpass.algebra.constructions import (
    independent,
    of_contraction,
    of_linear,
    of_polynomial,
    of_spherical_harmonics,
    of_tensor_product,
    symmetric_contractions,
)
from fxpass.algebra.contraction import Contraction
from fxpass.algebra.couplings import coupling, exact
from fxpass.algebra.equivariant import EquivariantPolynomial, Factor, Segment, Term
from fxpass.algebra.irreps import clebsch_gordan
from fxpass.algebra.multilinear import Linear, LinearPath, Path, TensorProduct, parse_linear
from fxpass.algebra.polynomial import Polynomial
from fxpass.capture.rules import LinearStandIn, tensor_product_spec
from fxpass.errors import UsageError
from fxpass.ir import ops

F64 = torch.float64
MODES = ("uvw", "uvu", "uvv", "uuw", "uuu", "uvuv")
TP = TensorProduct(
    "3x0e+3x1o",
    "1x0e+1x1o+1x2e",
    "3x0e+3x1o+3x1o+3x2e",
    (
        Path(0, 0, 0, "uvu", 0, 0.5),
        Path(0, 1, 1, "uvu", 3, 0.7071067811865476),
        Path(1, 1, 0, "uvu", 6, 0.4),
        Path(1, 2, 2, "uvu", -1, 0.3),
        Path(1, 1, 3, "uvu", 9, 1.0),
    ),
    12,
    False,
)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def close(found: np.ndarray, expected: object, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(found, np.asarray(expected), rtol=0, atol=atol)


# --- conventions


@pytest.mark.parametrize("l1, l2", list(product(range(4), repeat=2)))
def test_couplings_are_e3nns(l1: int, l2: int) -> None:
    for l3 in range(abs(l1 - l2), min(l1 + l2, 4) + 1):
        table = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
        for index, value in coupling(l1, l2, l3).items():
            assert value.is_real and (value**2).is_rational
            table[index] = float(value)
        close(table, clebsch_gordan(l1, l2, l3), 2e-15)
        assert np.array_equal(table != 0, clebsch_gordan(l1, l2, l3) != 0)
        assert sympy.simplify(sum(v**2 for v in coupling(l1, l2, l3).values())) == 1


@pytest.mark.parametrize("number", [1 / 32**0.5, -(3**0.5), 0.25, 0.0, 1.0, -(0.7**0.5)])
def test_floats_stand_for_roots(number: float) -> None:
    assert float(exact(number)) == pytest.approx(number, rel=4e-16)
    assert (exact(number) ** 2).is_rational and (exact(number) ** 2).q < 1 << 20


def test_other_floats_are_what_they_are() -> None:
    assert float(exact(0.123456789012345)) == 0.123456789012345
    assert exact(1.6791767923989418) == sympy.Rational(1.6791767923989418)


@pytest.mark.parametrize("normalization", ["norm", "component", "integral"])
def test_spherical_harmonics_are_e3nns(normalization: str) -> None:
    vectors = numbers(5, 3)
    expected = o3().spherical_harmonics([0, 1, 2, 3], torch.from_numpy(vectors), False, normalization)
    close(of_spherical_harmonics((0, 1, 2, 3), normalization)(vectors), expected)


@pytest.mark.parametrize("normalization", [("component", "element"), ("norm", "path"), ("component", "path")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [True, False])
def test_tensor_products_are_e3nns(mode: str, shared: bool, normalization: tuple[str, str]) -> None:
    torch.manual_seed(1)
    second = "2x1o+2x2e" if mode in ("uuw", "uuu") else "3x1o+3x2e"
    out = {"uvw": "4x0e+4x1o+4x2o", "uvu": "2x0e+2x1o+2x2o", "uvv": "3x0e+3x1o+3x2o"}.get(mode)
    out = out or {"uuw": "4x0e+4x1o+4x2o", "uuu": "2x0e+2x1o+2x2o", "uvuv": "6x0e+6x1o+6x2o"}[mode]
    weighted = mode not in ("uuu",) or shared
    instructions = [(0, 0, 1, mode, weighted), (1, 0, 0, mode, weighted), (1, 1, 1, mode, weighted)]
    instructions.append((1, 1, 2, mode, weighted))
    tp = o3().TensorProduct(
        "2x0e+2x1o", second, out, instructions, irrep_normalization=normalization[0],
        path_normalization=normalization[1], shared_weights=shared, internal_weights=False,
    ).double()  # fmt: skip
    spec = tensor_product_spec(tp, "tp")
    poly = of_tensor_product(spec)
    x, y = numbers(4, spec.dims["x1"]), numbers(4, spec.dims["x2"], seed=1)
    w = numbers(1 if shared else 4, spec.weights, seed=2)
    given = torch.from_numpy(w[0] if shared else w)
    expected = tp(torch.from_numpy(x), torch.from_numpy(y), given)
    close(poly(x, y, w), expected, 2e-7 if spec.rounding == "float32" else 1e-12)
    assert poly.merged() == poly and hash(poly) == hash(of_tensor_product(spec))


def test_linears_are_e3nns() -> None:
    linear = o3().Linear("3x0e+2x1o+1x0e", "2x0e+4x1o").double()
    made = LinearStandIn(linear, "linear")
    x, w = numbers(4, 10), linear.weight.detach().numpy()[None]
    close(of_linear(parse_linear(made.spec))(x, w), linear(torch.from_numpy(x)).detach())


# --- operations


def operands() -> list[np.ndarray]:
    return [numbers(4, width, seed=n) for n, width in enumerate((TP.dims["x1"], TP.dims["x2"], 12))]


@pytest.mark.parametrize("operand, slot", [(0, "x1"), (1, "x2"), (2, "weight")])
def test_transposes(operand: int, slot: str) -> None:
    """The same as the op, which is written down without this algebra."""
    poly, tp = of_tensor_product(TP), TP.linear_in_weights if slot == "weight" else TP
    if slot == "weight":
        poly = of_tensor_product(tp)
    given, g = operands(), numbers(4, TP.dims["out"], seed=7)
    tensors = [None if n == operand else torch.from_numpy(x) for n, x in enumerate(given)]
    expected = ops.tensor_product(*tensors, torch.from_numpy(g), str(tp), slot)
    given[operand] = g
    transposed = poly.transposed(operand)
    close(transposed(*given), expected)
    assert transposed.transposed(operand) == poly


def test_transposed_needs_a_linear_operand() -> None:
    with pytest.raises(UsageError, match="not linear in operand 0: a term has it 2 times"):
        of_spherical_harmonics((2,), "norm").transposed(0)
    with pytest.raises(UsageError, match="0 times"):
        of_tensor_product(TP).transposed(2)  # one path has no weights


def test_derivative_is_that_of_differences_and_of_euler() -> None:
    poly = of_spherical_harmonics((1, 2, 3), "component")
    x, v, h = numbers(6, 3), numbers(6, 3, seed=1), 1e-6
    close(poly.derivative(0)(x, v), (poly(x + h * v) - poly(x - h * v)) / (2 * h), 1e-8)
    degrees = np.repeat([1.0, 2.0, 3.0], [3, 5, 7])
    close(poly.derivative(0)(x, x), degrees * poly(x))
    second = poly.derivative(0).derivative(0)
    close(second(x, x, x), degrees * (degrees - 1) * poly(x))
    assert poly.degree(0) == 3 and second.degree(0) == 1 and poly.derivative(0).degree(1) == 1
    assert second.derivative(0).derivative(0).terms == (), "degree 3 differentiated four times"


def test_composition() -> None:
    linear = of_linear(Linear("2x0e+5x1o", "3x0e+3x1o", (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 6, 0.2)), 21, True))
    poly = of_tensor_product(TP)
    x, y, w = operands()
    both = poly.composed(0, linear)
    inner, v = numbers(4, 17, seed=5), numbers(1, 21, seed=6)
    close(both(y, w, inner, v), poly(linear(inner, v), y, w))
    harmonics = of_spherical_harmonics((0, 1, 2), "component")
    vectors = numbers(4, 3, seed=8)
    close(poly.composed(1, harmonics)(x, w, vectors), poly(x, harmonics(vectors), w))
    with pytest.raises(UsageError, match="Operand 0 has the segments"):
        poly.composed(0, harmonics)


def test_composition_with_a_power() -> None:
    """Of an operand that occurs several times in a term, each occurrence is replaced."""
    square = of_polynomial(Polynomial(2, ((0, 1), (1, 1)), "2x0e", "1x0e"), {((0, 1), 0): 1, ((1, 1), 0): 2})
    swap = Term((Factor(0, 0, "u"),), Factor(-1, 0, "u"), (((0, 1), sympy.Integer(1)), ((1, 0), sympy.Integer(3))))
    x = (Segment((1,), 2),)
    made = square.composed(0, EquivariantPolynomial((x,), x, (swap,)))
    (term,) = made.terms
    assert term.coefficients == (((0, 0, 0), 2), ((0, 1, 0), 3))


def test_like_terms_merge() -> None:
    x, c = (Segment((2,), 2),), sympy.sqrt(2)
    a = Term((Factor(0, 0, "u"), Factor(0, 0, "u")), Factor(-1, 0, "u"), (((0, 1, 0), c), ((1, 0, 0), c)))
    b = Term((Factor(0, 0, "v"), Factor(0, 0, "v")), Factor(-1, 0, "v"), (((1, 1, 0), c), ((1, 0, 0), -2 * c)))
    made = EquivariantPolynomial((x,), (Segment((2,), 1),), (a, b)).merged()
    (term,) = made.terms
    assert term.coefficients == (((1, 1, 0), c),), "x0 x1 is x1 x0, and cancels"
    assert (made + made).terms[0].coefficients == (((1, 1, 0), 2 * c),)
    assert (made + EquivariantPolynomial((x,), made.result, ())).terms == made.terms
    with pytest.raises(UsageError, match="different operands"):
        _ = made + of_tensor_product(TP)


def test_channels_keep_terms_apart() -> None:
    """x_u x_u and x_u x_v summed over v are different polynomials."""
    x = (Segment((2,), 1),)
    one = (((0, 0, 0), sympy.Integer(1)),)
    same = Term((Factor(0, 0, "u"), Factor(0, 0, "u")), Factor(-1, 0, "u"), one)
    other = Term((Factor(0, 0, "v"), Factor(0, 0, "u")), Factor(-1, 0, "u"), one)
    made = EquivariantPolynomial((x,), x, (same, other)).merged()
    assert len(made.terms) == 2
    value = numbers(3, 2)
    close(made(value), value**2 + value * value.sum(1, keepdims=True))


def test_dead_terms() -> None:
    poly = of_tensor_product(TP)
    assert poly.reads == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), *((2, n) for n in range(4))}
    scalars = poly.live(results=[0])
    assert scalars.writes == {0} and (1, 2) not in scalars.reads
    without = poly.live(zeros=[(0, 1)])
    assert without.writes == {0, 1}
    x, y, w = operands()
    x[:, 3:] = 0
    close(without(x, y, w), poly(x, y, w))
    assert without.flops() < poly.flops() and without.bytes(4) < poly.bytes(4)


def test_counts() -> None:
    poly = of_linear(Linear("2x1o", "3x1o", (LinearPath(0, 0, 0, 1.0),), 6, True))
    assert poly.flops() == 3 * 6 * 3, "for each of 3 components and 6 weights a product and a multiply-add"
    assert poly.bytes(8) == 8 * (6 + 6 + 9)


def test_sparse_counts_are_below_dense_ones() -> None:
    assert of_tensor_product(TP).flops() < TP.flops()


def test_contractions() -> None:
    terms = (((), 0), ((0,), 1), ((0, 1), 0), ((1, 1, 2), 2))
    contraction = Contraction(3, terms, "1x0e+2x0e", "1x0e+2x0e")
    poly = of_contraction(contraction, 2)
    x, c = numbers(4, 2, 3), numbers(4, 4, 2, seed=1)
    expected = torch.ops.fxpass.contraction(
        torch.from_numpy(x), torch.arange(4), torch.from_numpy(c), str(contraction)
    )
    close(poly(x.reshape(4, -1), c.reshape(4, -1)).reshape(4, 3, 2).transpose(0, 2, 1), expected)


def test_linear_maps_as_paths() -> None:
    """What passes do on paths is what the polynomials say."""
    inner = Linear("2x0e+5x1o+1x0e", "3x0e+3x1o", (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 6, 0.2)), 21, True)
    outer = Linear("3x0e+3x1o", "4x1o+1x0e", (LinearPath(0, 1, 0, 1.0), LinearPath(1, 0, 3, 0.7)), 15, True)
    poly = of_linear(outer).composed(0, of_linear(inner))
    both = inner.then(outer)
    assert (both.irreps_in, both.irreps_out) == (inner.irreps_in, outer.irreps_out)
    assert {(p.i, p.o) for p in both.paths} == {(0, 1), (1, 0)}
    assert {(f.segment, t.out.segment) for t in poly.terms for f in t.factors if f.operand == 1} == {(0, 1), (1, 0)}
    assert both.flops() == 2 * (2 * 1 * 1 + 5 * 4 * 3)
    back = inner.transposed
    assert back.transposed == inner and (back.irreps_in, back.irreps_out) == (inner.irreps_out, inner.irreps_in)
    terms = of_linear(inner).transposed(0).terms
    assert {(p.i, p.o) for p in back.paths} == {(t.factors[0].segment, t.out.segment) for t in terms}


# --- symmetric contractions


def vector(poly: EquivariantPolynomial, points: np.ndarray) -> np.ndarray:
    return poly(points).ravel()


@pytest.mark.parametrize(
    "l, parity, degree, count", [(0, 1, 2, 2), (1, -1, 2, 1), (2, 1, 2, 1), (0, 1, 3, 2), (0, -1, 3, 0)]
)
def test_symmetric_contractions_of_a_scalar_and_a_vector(l: int, parity: int, degree: int, count: int) -> None:
    found = symmetric_contractions("1x0e+1x1o", l, parity, degree)
    assert len(found) == count and len(independent(found)) == count
    angles = torch.tensor([0.3, 1.1, -2.0], dtype=F64)
    x = numbers(5, 4)
    turned = x @ o3().Irreps("1x0e+1x1o").D_from_angles(*angles).numpy().T
    wigner = o3().Irreps([(1, (l, parity))]).D_from_angles(*angles).numpy()
    for poly in found:
        close(poly(turned), poly(x) @ wigner.T, 1e-6)  # e3nn 0.6 makes its rotations of l = 2 in float32


@pytest.mark.mace
@pytest.mark.parametrize("l, parity", [(0, 1), (1, -1)])
@pytest.mark.parametrize("correlation", [1, 2, 3])
def test_they_span_what_maces_reduced_couplings_span(l: int, parity: int, correlation: int) -> None:
    from mace.tools.cg import U_matrix_real

    irreps, degrees = "1x0e+1x1o+1x2e", o3().Irreps([(1, (l, parity))])
    _, table = U_matrix_real(irreps, degrees, correlation, dtype=F64)
    u = table.reshape(2 * l + 1, *[9] * correlation, -1) if l else table.reshape(1, *[9] * correlation, -1)
    points = numbers(200, 9)
    letters = "abc"[:correlation]
    theirs = np.einsum(
        ",".join([f"k{letters}p", *(f"Z{c}" for c in letters)]) + "->pZk", u.numpy(), *[points] * correlation
    )
    ours = [vector(p, points) for p in symmetric_contractions(irreps, l, parity, correlation)]
    rows = theirs.reshape(theirs.shape[0], -1)
    rank = np.linalg.matrix_rank(rows, tol=1e-8)
    assert len(ours) == rank == np.linalg.matrix_rank(np.vstack([rows, *ours]), tol=1e-8)
