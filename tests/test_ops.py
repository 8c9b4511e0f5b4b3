"""Semantic ops: values against e3nn, derivatives to third order, shapes, and the two spellings of each spec."""

from __future__ import annotations

import gc
from itertools import permutations
from math import prod

import numpy as np
import pytest
import torch

from fxpass._torch_compat import o3
from fxpass.algebra.multilinear import Linear, LinearPath, Path, TensorProduct, parse_linear, parse_tensor_product
from fxpass.algebra.polynomial import Polynomial, parse_polynomial
from fxpass.algebra.spherical import spherical_harmonics
from fxpass.ir import ops

ROWS = 4
MODES = {
    "uvw": ("3x0e+2x1o+1x2e", "2x0e+2x1o", "4x0e+2x1o+3x2e", None),
    "one-hot": ("3x0e+2x1o", "5x0e", "4x0e+2x1o", None),
    "uvu": ("3x0e+3x1o", "2x0e+2x1o+2x2e", "3x0e+3x1o+3x2e+3x1o+3x1o", "uvu"),
    "uvu-single": ("4x0e+4x1o", "0e+1o+2e", "4x0e+4x1o+4x2e+4x1o+4x1o", "uvu"),
    "uvv": ("3x0e+3x1o", "2x0e+2x1o+2x2e", "2x0e+2x1o+2x2e+2x1o+2x1o", "uvv"),
    "uuu": ("3x0e+3x1o", "3x1o", "3x1o+3x2e", "uuu"),
    "uuw": ("3x0e+3x1o", "3x1o", "4x1o+2x2e", "uuw"),
}
TRIPLES = [(0, 0, 0), (1, 0, 1), (1, 1, 2), (0, 1, 3), (1, 1, 0), (1, 2, 4)]


def e3nn_product(mode: str, *, shared: bool, weighted: bool = True) -> torch.nn.Module:
    in1, in2, out, connection = MODES[mode]
    if connection is None:
        return o3().FullyConnectedTensorProduct(in1, in2, out, shared_weights=shared, internal_weights=False)
    triples = TRIPLES if connection in ("uvu", "uvv") else TRIPLES[:2]
    instructions = [(a, b, c, connection, weighted) for a, b, c in triples]
    if connection in ("uuu", "uuw"):
        instructions = [(0, 0, 0, connection, weighted), (1, 0, 1, connection, weighted)]
    irreps = o3().Irreps
    return o3().TensorProduct(
        irreps(in1), irreps(in2), irreps(out), instructions, shared_weights=shared, internal_weights=False
    )


def spec(tp: torch.nn.Module) -> str:
    paths, offset = [], 0
    for ins in tp.instructions:
        weight = -1
        if ins.has_weight:
            weight, offset = offset, offset + prod(ins.path_shape)
        paths.append(Path(ins.i_in1, ins.i_in2, ins.i_out, ins.connection_mode, weight, float(ins.path_weight)))
    irreps = (str(tp.irreps_in1), str(tp.irreps_in2), str(tp.irreps_out))
    return str(TensorProduct(*irreps, tuple(paths), offset, tp.shared_weights))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("mode", "weighted"), [*((m, True) for m in MODES), ("uvu", False), ("uvv", False)])
def test_tensor_product_is_e3nn_s_to_third_order(mode: str, weighted: bool, shared: bool) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    tp = e3nn_product(mode, shared=shared, weighted=weighted)
    x1 = torch.randn(ROWS, tp.irreps_in1.dim, requires_grad=True)
    x2 = torch.randn(ROWS, tp.irreps_in2.dim, requires_grad=True)
    inputs = [x1, x2]
    weight = None
    if tp.weight_numel:
        weight = torch.randn(*(() if shared else (ROWS,)), tp.weight_numel, requires_grad=True)
        inputs.append(weight)
    reference = tp(x1, x2, weight) if weight is not None else tp(x1, x2)
    found = ops.tensor_product(x1, x2, weight, None, spec(tp), "out")
    assert torch.allclose(found, reference, atol=1e-13)
    assert str(parse_tensor_product(spec(tp))) == spec(tp)
    for _ in range(3):
        reference, found = reference.sin().sum(), found.sin().sum()
        a = torch.autograd.grad(reference, inputs, create_graph=True)
        b = torch.autograd.grad(found, inputs, create_graph=True)
        for p, q in zip(a, b, strict=True):
            assert torch.allclose(p, q, rtol=1e-10, atol=1e-10)
        reference, found = torch.cat([p.flatten() for p in a]), torch.cat([q.flatten() for q in b])


def test_paths_with_and_without_weights_in_one_product() -> None:
    paths = (Path(0, 0, 0, "uvu", 0, 1.0), Path(0, 1, 1, "uvu", -1, 0.7), Path(1, 0, 1, "uvu", 2, 0.5))
    text = str(TensorProduct("2x0e+2x1o", "1x0e+1x1o", "2x0e+2x1o", paths, 4, False))
    shapes = (8, 4, 4)
    inputs = tuple(torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in shapes)
    assert torch.autograd.gradcheck(lambda *a: ops.tensor_product(*a, None, text, "out"), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ops.tensor_product(*a, None, text, "out"), inputs)


@pytest.mark.parametrize("shared", [True, False])
def test_linear_is_e3nn_s(shared: bool) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    lin = o3().Linear("3x0e+2x1o+4x0e+1x2e", "5x0e+3x1o+2x2e+2x3o", shared_weights=shared, internal_weights=False)
    paths, offset = [], 0
    for ins in lin.instructions:
        paths.append(LinearPath(ins.i_in, ins.i_out, offset, float(ins.path_weight)))
        offset += prod(ins.path_shape)
    text = str(Linear(str(lin.irreps_in), str(lin.irreps_out), tuple(paths), offset, shared))
    assert str(parse_linear(text)) == text
    x = torch.randn(ROWS, lin.irreps_in.dim, requires_grad=True)
    w = torch.randn(*(() if shared else (ROWS,)), lin.weight_numel, requires_grad=True)
    assert torch.allclose(ops.linear(x, w, None, text, "out"), lin(x, w), atol=1e-13)
    assert torch.autograd.gradcheck(lambda a, b: ops.linear(a, b, None, text, "out"), (x, w))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.linear(a, b, None, text, "out"), (x, w))


@pytest.mark.parametrize("normalization", ["norm", "component", "integral"])
def test_spherical_harmonics_are_e3nn_s(normalization: str) -> None:
    degrees = tuple(range(7))
    poly, coefficients = spherical_harmonics(degrees, normalization, -1)
    x = torch.randn(20, 3, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    found = ops.polynomial(x[:, None], [], None, None, torch.from_numpy(coefficients)[:, None], str(poly), "out")
    expected = o3().spherical_harmonics(list(degrees), x, normalize=False, normalization=normalization)
    assert torch.allclose(found[:, 0], expected, atol=1e-12)
    assert parse_polynomial(str(poly)) == poly


def test_polynomial_derivatives_close_over_themselves() -> None:
    torch.manual_seed(0)
    names = ((), (0,), (3,), (0, 1), (2, 2), (0, 0, 1), (1, 2, 3), (3, 3, 3), (0, 1, 1, 3))
    poly = Polynomial(4, names, "4x0e", "2x0e")
    coefficients = torch.randn(len(names), 3, 2, dtype=torch.float64)
    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def value(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.polynomial(a, [], b, None, coefficients, str(poly), "out")

    direct = torch.zeros(2, 2, 2, dtype=torch.float64)
    for m, name in enumerate(names):
        mono = torch.stack([x[..., i] for i in name]).prod(0) if name else torch.ones_like(x[..., 0])
        direct = direct + torch.einsum("zc,nk,znc->zck", mono, coefficients[m], w)
    assert torch.allclose(value(x, w), direct)
    assert torch.autograd.gradcheck(value, (x, w))
    assert torch.autograd.gradgradcheck(value, (x, w))

    def gradient(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(value(a, b).sin().sum(), (a, b), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (x, w))


def test_polynomial_is_symmetric_in_its_directions() -> None:
    torch.manual_seed(0)
    poly = Polynomial(3, ((0, 1, 2), (1, 1, 2)), "3x0e", "1x0e")
    c = torch.randn(2, 1, 1, dtype=torch.float64)
    x, *d = (torch.randn(2, 1, 3, dtype=torch.float64) for _ in range(4))
    values = [ops.polynomial(x, list(p), None, None, c, str(poly), "out") for p in permutations(d)]
    assert all(torch.allclose(v, values[0]) for v in values)
    nothing = ops.polynomial(x, [*d, d[0]], None, None, c, str(poly), "out")
    assert torch.equal(nothing, torch.zeros_like(nothing)), "a fourth derivative of a cubic"


def test_gather_and_scatter_are_each_other_s_transpose() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 0, 2])
    assert torch.equal(ops.gather(x, index), x[index])
    assert torch.autograd.gradcheck(lambda a: ops.gather(a, index), (x,))
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ops.scatter_sum(y, index, 5)[1], torch.zeros(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a: ops.scatter_sum(a, index, 5), (y,))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_shape_functions_agree_with_the_ops(rows: int) -> None:
    tp = e3nn_product("uvu", shared=False)
    text = spec(tp)
    x1, x2 = torch.randn(rows, tp.irreps_in1.dim), torch.randn(rows, tp.irreps_in2.dim)
    w, out = torch.randn(rows, tp.weight_numel), torch.randn(rows, tp.irreps_out.dim)
    poly, coefficients = spherical_harmonics((0, 1, 2), "norm", -1)
    c = torch.from_numpy(coefficients).float()[:, None]
    v = torch.randn(rows, 1, 3)
    calls = [
        (ops.tensor_product, (x1, x2, w, None, text, "out")),
        (ops.tensor_product, (None, x2, w, out, text, "x1")),
        (ops.tensor_product, (x1, None, w, out, text, "x2")),
        (ops.tensor_product, (x1, x2, None, out, text, "weight")),
        (ops.polynomial, (v, [], None, None, c, str(poly), "out")),
        (ops.polynomial, (v, [v], None, torch.randn(rows, 1, 9), c, str(poly), "direction")),
    ]
    for op, args in calls:
        real = op(*args)
        assert real.is_contiguous()
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        assert torch.isfinite(real).all()


def test_pruned_paths_keep_layouts() -> None:
    tp = parse_tensor_product(spec(e3nn_product("uvu", shared=False)))
    pruned = tp.keep(tp.paths[1:])
    x1, x2 = torch.randn(ROWS, tp.dims["x1"]), torch.randn(ROWS, tp.dims["x2"])
    w = torch.randn(ROWS, tp.weights)
    one = ops.tensor_product(x1, x2, w, None, str(tp), "out")
    two = ops.tensor_product(x1, x2, w, None, str(pruned), "out")
    assert one.shape == two.shape
    assert not torch.allclose(one, two)
    gradient = ops.tensor_product(x1, x2, None, one, str(pruned), "weight")
    assert gradient.shape == w.shape
    first = tp.paths[0]
    length = tp.paths[1].weight - first.weight
    assert torch.equal(gradient[:, first.weight : first.weight + length], torch.zeros(ROWS, length))


def test_clebsch_gordan_rounding_is_the_stored_one() -> None:
    from fxpass.algebra.irreps import clebsch_gordan

    exact, rounded = clebsch_gordan(1, 2, 3), clebsch_gordan(1, 2, 3, "float32")
    assert np.array_equal(rounded, o3().wigner_3j(1, 2, 3, dtype=torch.float32).double().numpy())
    assert 0 < np.abs(exact - rounded).max() < 1e-7


@pytest.mark.parametrize("wrt", ["out", "direction"])
def test_a_polynomial_with_wider_coefficients_has_the_type_of_x(wrt: str) -> None:
    poly, numbers = spherical_harmonics((0, 1, 2), "component", -1)
    x = torch.randn(5, 1, 3, dtype=torch.float32)
    g = torch.randn(5, 1, numbers.shape[1], dtype=torch.float32) if wrt == "direction" else None
    wide = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)
    found = ops.polynomial(x, [], None, g, wide, str(poly), wrt)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, ops.polynomial(x, [], None, g, wide.float(), str(poly), wrt))


def test_the_reference_of_a_polynomial_keeps_nothing_alive() -> None:
    """A cycle would hold all monomials until Python looks for cycles."""
    poly, coefficients = spherical_harmonics((0, 1, 2, 3), "component", -1)
    x, constants = torch.rand(ROWS, 1, 3, dtype=torch.float64), torch.from_numpy(coefficients)[:, None]

    def held() -> int:
        with torch.no_grad():
            ops.polynomial(x, [x], None, None, constants, str(poly), "out")
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    held()
    gc.collect()
    gc.disable()
    try:
        assert held() == held()
    finally:
        gc.enable()
