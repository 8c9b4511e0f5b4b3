"""Sparse polynomials by species: the algebra, the ops, the pass fuse-contraction."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

from fxpass.algebra.contraction import Contraction, Nested, nested, parse_contraction
from fxpass.algebra.polynomial import Polynomial
from fxpass.api import capture, run_passes
from fxpass.ir import ops
from fxpass.ir.contraction import CONTRACTION, CONTRACTION_GRADIENT, contraction, contraction_gradient
from fxpass.ir.cost import costs
from fxpass.ir.legalize import legalize
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.fuse_contraction import FuseContraction

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
SPECIES, PATHS, CHANNELS = 3, 4, 5
NAMES = ((), (0,), (3,), (0, 1), (2, 2), (0, 0, 1), (1, 2, 3), (3, 3, 3), (0, 1, 1, 3))
POLY = Polynomial(4, NAMES, "1x0e+1x1o", "2x0e")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sparse(poly: Polynomial, outputs: int, seed: int = 0) -> Tensor:
    """Coefficients [monomials, paths, outputs], about half of the pairs of monomial and output untouched."""
    coefficients = numbers(len(poly.monomials), PATHS, outputs, seed=seed)
    return coefficients * (numbers(len(poly.monomials), 1, outputs, seed=seed + 1) > 0)


COEFFICIENTS = sparse(POLY, 2, seed=2)
FOUND = Contraction.of(POLY, COEFFICIENTS)


# --- algebra


def test_terms_are_the_pairs_that_some_path_touches() -> None:
    assert set(FOUND.terms) == {(m, k) for n, m in enumerate(NAMES) for k in (0, 1) if COEFFICIENTS[n, :, k].any()}
    assert 0 < len(FOUND.terms) == len(set(FOUND.terms)) < 2 * len(NAMES)
    assert Contraction.of(POLY, COEFFICIENTS.numpy()) == FOUND
    assert parse_contraction(str(FOUND)) == FOUND
    assert str(Contraction(2, (((), 0), ((0, 1), 1)), "2x0e", "2x0e")) == "2|2x0e|2x0e|:0,01:1"
    assert parse_contraction("2|2x0e|1x0e|").terms == ()


def test_weights_and_coefficients_become_one_number_for_each_term() -> None:
    weights = numbers(SPECIES, PATHS, CHANNELS, seed=3)
    folded = FOUND.fold(POLY, COEFFICIENTS, weights)
    assert folded.shape == (SPECIES, len(FOUND.terms), CHANNELS)
    for t, (m, k) in enumerate(FOUND.terms):
        expected = torch.einsum("spc,p->sc", weights, COEFFICIENTS[NAMES.index(m), :, k])
        assert torch.allclose(folded[:, t], expected, rtol=1e-13)
    again = FOUND.fold(POLY, COEFFICIENTS.numpy(), weights.numpy())
    assert torch.allclose(torch.from_numpy(again), folded, rtol=1e-13)


def test_merged_outputs_follow_each_other() -> None:
    other = Contraction(4, (((1, 1), 0),), FOUND.irreps_in, "1x0e")
    merged = Contraction.merged([FOUND, other])
    assert merged.terms == (*FOUND.terms, ((1, 1), 2))
    assert (merged.outputs, merged.irreps_out) == (3, "2x0e+1x0e")


def expression(tree: Nested, x: list[sympy.Symbol], c: list[sympy.Symbol]) -> sympy.Expr:
    constant = 0 if tree.coefficient is None else c[tree.coefficient]
    return constant + sum(x[i] * expression(inner, x, c) for i, inner in tree.factors)


@pytest.mark.parametrize("names", [NAMES, ((),), ((2, 2, 2),), tuple(combinations_with_replacement(range(4), 3))])
def test_nested_form_is_the_same_polynomial(names: tuple[tuple[int, ...], ...]) -> None:
    x, c = list(sympy.symbols("x:4")), list(sympy.symbols(f"c:{len(names)}"))
    tree = nested({m: n for n, m in enumerate(names)})
    expected = sum(c[n] * sympy.prod(x[i] for i in m) for n, m in enumerate(names))
    assert sympy.expand(expression(tree, x, c) - expected) == 0
    # a multiply-add for each term but one, and a product for each factor that all of a sum share
    assert 2 * (len(names) - 1) <= tree.flops() <= 2 * len(names) + len(names)


def test_flops_of_a_value_and_of_a_gradient() -> None:
    # c0 + x0 * (c1 + x0 * c2): two multiply-adds; its gradient g * (c1 + x0 c2) + (g x0) * c2 needs both once more
    found = Contraction(1, (((), 0), ((0,), 0), ((0, 0), 0)), "1x0e", "1x0e")
    assert (found.flops(), found.flops(gradient=True)) == (4, 9)


# --- ops


def operands(rows: int = 4, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, index, weights [species, paths, channels], terms, g."""
    weights = numbers(SPECIES, PATHS, CHANNELS, seed=3)
    index = torch.arange(rows).remainder(2) * 2
    x, g = numbers(rows, CHANNELS, 4, seed=4), numbers(rows, CHANNELS, 2, seed=5)
    terms = FOUND.fold(POLY, COEFFICIENTS, weights)
    return x.to(dtype), index, weights.to(dtype), terms.to(dtype), g.to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_the_ops_are_the_polynomial_and_its_gradient(rows: int) -> None:
    x, index, weights, terms, g = operands(rows)
    by_row = weights[index]
    value = ops.polynomial(x, [], by_row, None, COEFFICIENTS, str(POLY), "out")
    gradient = ops.polynomial(x, [], by_row, g, COEFFICIENTS, str(POLY), "direction")
    assert torch.allclose(contraction(x, index, terms, str(FOUND)), value, rtol=1e-12, atol=1e-12)
    assert torch.allclose(contraction_gradient(x, index, terms, g, str(FOUND)), gradient, rtol=1e-12, atol=1e-12)


def test_derivatives_to_third_order() -> None:
    x, index, _, terms, g = operands()
    x, terms, g = (t.clone().requires_grad_() for t in (x, terms, g))

    def value(a: Tensor, t: Tensor) -> Tensor:
        return contraction(a, index, t, str(FOUND))

    def gradient(a: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return contraction_gradient(a, index, t, b, str(FOUND))

    for function, given in ((value, (x, terms)), (gradient, (x, terms, g))):
        assert torch.autograd.gradcheck(function, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_the_gradient_is_the_derivative_that_autograd_takes() -> None:
    x, index, _, terms, g = operands()
    x.requires_grad_()
    (by_x,) = torch.autograd.grad(contraction(x, index, terms, str(FOUND)), x, g)
    assert torch.equal(by_x, contraction_gradient(x, index, terms, g, str(FOUND)))


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_shape_functions_and_schemas(rows: int) -> None:
    x, index, _, terms, g = operands(rows)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, given in ((contraction, (x, index, terms)), (contraction_gradient, (x, index, terms, g))):
        assert op(*given, str(FOUND)).is_contiguous()
        torch.library.opcheck(op, (*given, str(FOUND)), test_utils=utilities)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_half_types_add_up_in_float32_and_round_once(low: torch.dtype) -> None:
    x, index, _, terms, g = operands(dtype=low)
    wide = contraction_gradient(x.float(), index, terms.float(), g.float(), str(FOUND))
    assert torch.equal(contraction_gradient(x, index, terms, g, str(FOUND)), wide.to(low))


def test_rows_of_the_table_of_ops() -> None:
    program = FuseContraction().apply(Differentiate().apply(layer()).program.copy()).program
    (value,) = program.graph.find_nodes(op="call_function", target=contraction)
    (gradient,) = program.graph.find_nodes(op="call_function", target=contraction_gradient)
    assert CONTRACTION.summary(value) == f"1x0e+1x1o -> 2x0e, degree 4, {len(FOUND.terms)} terms"
    assert (CONTRACTION.irreps(value), CONTRACTION_GRADIENT.irreps(gradient)) == ("2x0e", "1x0e+1x1o")
    assert CONTRACTION_GRADIENT.operands(gradient)["g"][1] == "2x0e"
    found = costs(program)
    assert found[value].at(atoms=10).flops == 10 * CHANNELS * FOUND.flops()
    assert found[gradient].at(atoms=10).flops == 10 * CHANNELS * FOUND.flops(gradient=True)


# --- the pass

X = TensorSpec("x", ("atoms", CHANNELS, 4), F64, properties=frozenset({"edge_vector"}))
KIND = TensorSpec("kind", ("atoms",), torch.int64, properties=frozenset({f"below:{SPECIES}"}))


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def energy_of(graph: fx.Graph, *values: fx.Node) -> dict[str, fx.Node]:
    """Sines, so that the gradient depends on the values: [atoms]."""
    total = [call(graph, aten.sum.dim_IntList, call(graph, aten.sin.default, v), [1, 2]) for v in values]
    energy = total[0]
    for other in total[1:]:
        energy = call(graph, aten.add.Tensor, energy, other)
    return {"energy": energy}


def layer(
    dtype: torch.dtype = F64,
    weights: Tensor | None = None,
    coefficients: Tensor = COEFFICIENTS,
    lookup: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node] | None = None,
) -> Program:
    """One polynomial of x with weights by species."""

    def body(graph: fx.Graph, x: fx.Node, kind: fx.Node) -> dict[str, fx.Node]:
        w = (lookup or look_up)(graph, kind, x)
        value = call(graph, ops.polynomial, x, [], w, None, graph.get_attr("c"), str(POLY), "out")
        return energy_of(graph, value)

    given = numbers(SPECIES, PATHS * CHANNELS, seed=3) if weights is None else weights
    x = TensorSpec("x", X.dims, dtype, properties=X.properties)
    return build_program(body, [x, KIND], {"w": given.to(dtype), "c": coefficients.to(dtype)})


def look_up(graph: fx.Graph, kind: fx.Node, x: fx.Node) -> fx.Node:
    rows = call(graph, ops.gather, graph.get_attr("w"), kind)
    return call(graph, aten.view.default, rows, [-1, PATHS, CHANNELS])


def three_outputs() -> Program:
    """Three polynomials of one x, and one of another."""
    polys = [Polynomial(4, NAMES[n:], "1x0e+1x1o", f"{n + 1}x0e") for n in range(3)]
    tables = {f"c{n}": sparse(poly, n + 1, seed=7 * n) for n, poly in enumerate(polys)}
    tables |= {f"w{n}": numbers(SPECIES, PATHS * CHANNELS, seed=n) for n in range(3)}

    def body(graph: fx.Graph, x: fx.Node, kind: fx.Node) -> dict[str, fx.Node]:
        def value(n: int, of: fx.Node) -> fx.Node:
            rows = call(graph, ops.gather, graph.get_attr(f"w{n}"), kind)
            w = call(graph, aten.view.default, rows, [-1, PATHS, CHANNELS])
            return call(graph, ops.polynomial, of, [], w, None, graph.get_attr(f"c{n}"), str(polys[n]), "out")

        twice = call(graph, aten.mul.Tensor, x, 2.0)
        return energy_of(graph, value(0, x), value(1, x), value(2, x), value(0, twice))

    return build_program(body, [X, KIND], tables)


def forces(make: Callable[[], Program]) -> Callable[[], Program]:
    return lambda: Differentiate().apply(make()).program


def without_weights() -> Program:
    poly, c = Polynomial(4, ((0,), (1, 2)), "1x0e+1x1o", "1x0e"), numbers(2, 1, 1)

    def body(graph: fx.Graph, x: fx.Node, kind: fx.Node) -> dict[str, fx.Node]:
        return energy_of(graph, call(graph, ops.polynomial, x, [], None, None, graph.get_attr("c"), str(poly), "out"))

    return build_program(body, [X, KIND], {"c": c})


def shared(graph: fx.Graph, kind: fx.Node, x: fx.Node) -> fx.Node:
    """The first species' weights for all atoms, as a product with ones."""
    ones = graph.call_function(aten.ones.default, ([call(graph, aten.sym_size.int, x, 0), 1],), {"dtype": F64})
    rows = call(graph, aten.mm.default, ones, graph.get_attr("w"))
    return call(graph, aten.view.default, rows, [-1, PATHS, CHANNELS])


def with_shared_weights() -> Program:
    return layer(weights=numbers(1, PATHS * CHANNELS), lookup=shared)


def test_contract() -> None:
    sizes = ({"atoms": 7}, {"atoms": 1}, {"atoms": 0})
    made = [layer, forces(layer), three_outputs, forces(three_outputs), forces(with_shared_weights), without_weights]
    outcomes = PassContract(FuseContraction(), made, sizes).check()
    fired = [[a.rule for a in outcome.applications] for outcome in outcomes]
    assert [names.count("contraction") for names in fired] == [1, 2, 4, 8, 2, 0]
    assert [names.count("sum-of-gradients") for names in fired] == [0, 0, 0, 2, 0, 0]
    assert not outcomes[-1].refusals


def test_graphs_before_and_after() -> None:
    before = forces(layer)()
    FileCheck().check_count("fxpass.polynomial.default", 2, exactly=True).run(graph_text(before))
    after = FuseContraction().apply(before.copy()).program
    verify(after)
    check = FileCheck().check(f"%w_terms = weight f64[{SPECIES}, {len(FOUND.terms)}, {CHANNELS}]")
    check.check_next("= fxpass.contraction.default(%x, %kind, %w_terms, '4|1x0e+1x1o|2x0e|")
    check.check("= fxpass.contraction_gradient.default(%x, %kind, %w_terms, %").check_not("polynomial")
    check.run(graph_text(after))


def test_gradients_of_one_x_become_one() -> None:
    after = FuseContraction().apply(forces(three_outputs)().copy()).program
    nodes = after.graph.find_nodes(op="call_function", target=contraction_gradient)
    outputs = sorted(parse_contraction(str(node.args[-1])).outputs for node in nodes)
    assert outputs == [1, 6]  # of 2 * x, and of x with all three


def test_legalised_it_still_computes_the_same() -> None:
    before = forces(three_outputs)()
    inputs = example_inputs(before, {"atoms": 7})
    legal = run_program(legalize(FuseContraction().apply(before.copy()).program), inputs)
    for name, value in run_program(before, inputs).items():
        assert torch.allclose(legal[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("program", "options", "reason"),
    [
        (lambda: layer(torch.bfloat16), {}, "it computes with torch.bfloat16, not in one full type"),
        (layer, {"max_bytes": 9}, f"take {8 * SPECIES * CHANNELS * len(FOUND.terms)} bytes, more than max_bytes=9"),
        (lambda: layer(coefficients=COEFFICIENTS[..., :1]), {}, "its coefficients do not fill its irreps"),
        (lambda: layer(coefficients=torch.zeros_like(COEFFICIENTS)), {}, "its coefficients do not fill its irreps"),
    ],
)
def test_refusals(program: Callable[[], Program], options: dict[str, int], reason: str) -> None:
    outcome = FuseContraction(**options).apply(program())
    assert not outcome.modified
    (refusal,) = outcome.refusals
    assert reason in refusal.reason
    assert refusal.nodes


def test_weights_that_differ_from_atom_to_atom_are_refused() -> None:
    def body(graph: fx.Graph, x: fx.Node, w: fx.Node, g: fx.Node) -> dict[str, fx.Node]:
        c = graph.get_attr("c")
        return {
            "value": call(graph, ops.polynomial, x, [], w, None, c, str(POLY), "out"),
            "by_weight": call(graph, ops.polynomial, x, [], w, g, c, str(POLY), "weight"),
            "along": call(graph, ops.polynomial, x, [x], w, g, c, str(POLY), "direction"),
        }

    w, g = TensorSpec("w", ("atoms", PATHS, CHANNELS), F64), TensorSpec("g", ("atoms", CHANNELS, 2), F64)
    outcome = FuseContraction().apply(build_program(body, [X, w, g], {"c": COEFFICIENTS}))
    assert [r.reason for r in outcome.refusals] == [
        "its weights are not constants that are looked up by species",
        *["it is a derivative by weights, or along a direction"] * 2,
    ]


def test_a_sum_of_gradients_that_would_be_too_large_stays() -> None:
    program = forces(three_outputs)()
    most = max(t.numel() * 8 for n, t in FuseContraction().apply(program.copy()).program.graph_module.named_buffers()
               if n.endswith("_terms"))  # fmt: skip
    outcome = FuseContraction(max_bytes=most).apply(program)
    assert [a.rule for a in outcome.applications].count("contraction") == 8
    assert any("more than max_bytes" in r.reason and r.rule == "sum-of-gradients" for r in outcome.refusals)


@pytest.mark.mace
@pytest.mark.parametrize(
    ("variant", "dtype"), [("hidden-l3", F64), ("correlation-4", torch.float32), ("agnostic-product", F64)]
)
def test_mace(variant: str, dtype: torch.dtype) -> None:
    from mace_models import VARIANTS
    from mace_models import build as build_mace

    program = capture(build_mace(**{**VARIANTS[variant], "dtype": dtype, "layers": 1}))
    before = run_passes(program, "specialize-species,fold-constants,differentiate").program
    outcome = FuseContraction().apply(before.copy())
    assert not outcome.refusals
    verify(outcome.program)
    assert not [n for n in outcome.program.graph.nodes if n.target is ops.polynomial and n.args[2] is not None]
    assert len(outcome.program.graph.find_nodes(op="call_function", target=contraction_gradient)) == 1
    for sizes in ({"atoms": 7, "edges": 19, "graphs": 2}, {"atoms": 1, "edges": 0, "graphs": 1}):
        inputs = example_inputs(before, sizes)
        expected, found = run_program(before, inputs), run_program(outcome.program, inputs)
        for name, value in expected.items():
            scale = value.abs().max().item() if value.numel() else 0.0
            tolerance = {F64: 1e-12, torch.float32: 1e-5}[dtype] * scale
            assert torch.allclose(found[name], value, rtol=0, atol=tolerance), name
