"""Regions against what is to stand in for them: right kernels go in, wrong ones are left out and told about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fxpass.errors import PassError
from fxpass.ir import ops
from fxpass.ir.guards import guards, regions
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.testing import example_inputs, run_program
from fxpass.verify.regions import Region, RegionReport, check_region, extract, substitute
from fxpass_passes.guard_fusion import GuardFusion
from test_guard_fusion import FORCES, SPEC, W, gated, run

pytestmark = pytest.mark.once

F64 = torch.float64
CONVOLUTION = "convolution:tensor_product_default"
SIZES = [(9, 40, 2), (1, 0, 1), (30, 200, 3)]


def guarded() -> Program:
    p = GuardFusion().apply(gated()).program
    verify(p)
    return p


def convolution(p: Program) -> Region:
    return extract(p, regions(p.graph)[CONVOLUTION], CONVOLUTION)


# kernels for the convolution: operands as the region has them


def fused(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """Right, in another order: each kind of message is summed by itself."""
    s = x[sender]
    scalars = s * y[:, :1] * w[:, :4]
    vectors = (s * w[:, 4:]).unsqueeze(-1) * y[:, 1:].unsqueeze(1) / math.sqrt(3)
    zero = x.new_zeros
    return torch.cat(
        [
            zero((atoms, 4)).index_add(0, receiver, scalars),
            zero((atoms, 12)).index_add(0, receiver, vectors.reshape(-1, 12)),
        ],
        dim=1,
    )


def mixes_components(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """A general matrix product over the flattened irreps: it does not know which columns are one vector."""
    mix = torch.eye(16, dtype=x.dtype) + 1e-3 * torch.ones(16, 16, dtype=x.dtype)
    return fused(x, sender, y, w, receiver, atoms) @ mix


def wrong_parity(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """Vectors that do not change sign with space."""
    return fused(x, sender, y.abs(), w, receiver, atoms)


def depends_on_order(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """A sum that weighs an edge by its place in the list."""
    place = torch.arange(sender.shape[0], dtype=x.dtype).unsqueeze(-1)
    return fused(x, sender, y, w * (1 + 1e-6 * place), receiver, atoms)


def no_derivative(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    return fused(x.detach(), sender, y.detach(), w.detach(), receiver, atoms)


def half_a_derivative(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    return fused(x, sender, y.detach(), w, receiver, atoms)


def other_shape(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    return fused(x, sender, y, w, receiver, atoms)[:, :4]


def crashes_without_edges(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    return fused(x, sender, y, w, receiver, atoms) + 0 * w.max()


def not_a_number(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    return fused(x, sender, y, w, receiver, atoms) * (x.sum() / 0)


WRONG: dict[Callable[..., Tensor], set[str]] = {
    mixes_components: {"values", "rotation", "inversion"},
    wrong_parity: {"values", "rotation", "inversion"},
    depends_on_order: {"values", "permutation"},
    no_derivative: {"gradients"},
    half_a_derivative: {"gradients"},
    other_shape: {"values", "rotation"},
    crashes_without_edges: {"values"},
    not_a_number: {"values"},
}


# --- regions


def test_a_region_knows_its_operands() -> None:
    region = convolution(guarded())
    facts = {spec.name: (spec.dims, spec.irreps, set(spec.properties)) for spec in region.operands}
    assert facts == {
        "sin_default": (("atoms", 4), "4x0e", set()),
        "sender": (("edges",), None, {"index:atoms"}),
        "cat_default": (("edges", 4), "1x0e+1x1o", set()),  # nobody recorded it: the product demands it
        "mul_tensor_1": (("edges", 8), None, set()),
        "receiver": (("edges",), None, {"index:atoms"}),
        "sym_size_int": (("atoms",), None, {"size"}),
    }
    assert [(spec.dims, spec.irreps) for spec in region.results] == [(("atoms", 16), "4x0e+4x1o")]
    assert not region.weights


def test_a_region_as_a_function_is_the_region() -> None:
    region = convolution(guarded())
    report = check_region(region.function, region.function, region.operands, region.results)
    assert report.passed and all(row.value < 1e-14 for row in report.rows)
    checks = {row.check for row in report.rows}
    assert checks == {
        *("values", "gradients", "rotation", "rotation, values", "inversion", "inversion, values"),
        *("permutation", "permutation, values"),
    }
    assert "24 checks passed" in report.summary()


def test_weights_of_the_program_are_not_random() -> None:
    p = gated()
    verify(p)
    region = extract(p, {n for n in p.graph.nodes if n.name == "mul_tensor_1"})
    assert list(region.weights) == ["w"] and torch.equal(region.weights["w"], p.graph_module.w)
    baked = check_region(
        region.function, lambda decay, w: W["w"] * decay, region.operands, region.results, weights=region.weights
    )
    assert baked.passed


def test_nodes_around_another_node_are_no_region() -> None:
    p = gated()
    verify(p)
    by_name = {n.name: n for n in p.graph.nodes}
    around = {by_name["exp_default"], by_name["tensor_product_default"]}
    with pytest.raises(PassError, match="lies between two nodes of it"):
        extract(p, around)
    with pytest.raises(PassError, match="calls of ops"):
        extract(p, {by_name["x"]})


# --- checks


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_each_kind_of_wrong_kernel_is_found(wrong: Callable[..., Tensor]) -> None:
    region = convolution(guarded())
    report = check_region(region.function, wrong, region.operands, region.results)
    assert not report.passed
    assert {row.check for row in report.failures} >= WRONG[wrong]
    assert all(check in report.summary() for check in WRONG[wrong])


def test_a_bug_of_the_check_is_not_the_fault_of_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    region = convolution(guarded())
    monkeypatch.setitem(check_region.__globals__, "relative_error", lambda found: 0.0)
    with pytest.raises(TypeError, match="positional"):
        check_region(region.function, region.function, region.operands, region.results)


def test_a_broken_symmetry_is_found_where_values_happen_to_agree() -> None:
    """With a tolerance so wide that values pass, equivariance is still held to twice the original's own error."""
    region = convolution(guarded())
    report = check_region(region.function, mixes_components, region.operands, region.results, tolerance=1e-2)
    by_check = {row.check: row for row in report.rows if "edges" in row.structure and "0 edges" not in row.structure}
    assert by_check["rotation"].value > 1e-4


def test_an_original_may_go_on_breaking_a_symmetry() -> None:
    operands = (TensorSpec("x", ("atoms", 3), F64, "1x1o"),)
    report = check_region(lambda x: x + 1, lambda x: 1 + x, operands, operands)
    assert report.passed
    rotation = next(row for row in report.rows if row.check == "rotation")
    assert rotation.limit > 0.1 and rotation.value <= rotation.limit
    worse = check_region(lambda x: x + 1e-6, lambda x: x + 1e-3, operands, operands)
    assert {row.check for row in worse.failures} >= {"values", "rotation", "inversion"}


def test_rows_whose_order_is_relied_on_are_not_permuted() -> None:
    region = convolution(guarded())
    fixed = check_region(region.function, fused, region.operands, region.results, fixed=("edges", "atoms", "graphs"))
    assert fixed.passed

    def cumulative(x: Tensor) -> Tensor:
        return x.cumsum(0)

    spec = (TensorSpec("x", ("edges", 2), F64),)
    free, held = (check_region(cumulative, cumulative, spec, spec, fixed=f) for f in ((), ("edges",)))
    assert max(r.value for r in free.rows) > 0.1 and max(r.value for r in held.rows) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_judged_by_its_own_rounding(dtype: torch.dtype) -> None:
    spec = (TensorSpec("x", ("atoms", 64), dtype),)
    result = (TensorSpec("y", ("atoms",), dtype),)

    def backwards(x: Tensor) -> Tensor:
        return x.flip(1).sum(1)

    assert check_region(lambda x: x.sum(1), backwards, spec, result).passed
    assert not check_region(lambda x: x.sum(1), lambda x: x.sum(1) * 1.1, spec, result).passed


def test_an_empty_report_has_not_passed() -> None:
    report = RegionReport((), "nothing")
    assert not report.passed and report.summary() == "nothing was compared"


# --- substitution


def test_a_right_kernel_goes_in() -> None:
    p = guarded()
    original = run(p, FORCES)
    done = substitute(p, convolution(p), fused, made_by="test")
    assert done.refusal is None and done.application is not None and done.report.passed
    assert done.application.removed == 3 and done.application.added > 5
    assert ops.tensor_product not in [n.target for n in p.graph.nodes]
    assert CONVOLUTION in regions(p.graph) and len(guards(p.graph)) == 9  # still one region, of other nodes
    forces = run(p, FORCES)
    for atoms, edges, graphs in SIZES:
        inputs = example_inputs(p, {"atoms": atoms, "edges": edges, "graphs": graphs})
        found = run_program(forces, inputs)
        for name, value in run_program(original, inputs).items():
            assert torch.allclose(found[name], value, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_left_out_and_told_about(wrong: Callable[..., Tensor]) -> None:
    p = guarded()
    before = str(p.graph)
    done = substitute(p, convolution(p), wrong, made_by="test")
    assert str(done.program.graph) == before and done.application is None
    assert done.refusal is not None and CONVOLUTION in done.refusal.reason
    assert "tensor_product_default" in done.refusal.nodes
    verify(p)


def test_a_kernel_that_ties_a_size_is_refused() -> None:
    def freezes(x: Tensor, sender: Tensor, y: Tensor, w: Tensor, receiver: Tensor, atoms: int) -> Tensor:
        return fused(x, sender, y, w, receiver, int(atoms))

    p = guarded()
    before = str(p.graph)
    done = substitute(p, convolution(p), freezes, made_by="test")
    assert done.report.passed and done.refusal is not None and "size" in done.refusal.reason
    assert str(p.graph) == before


@pytest.fixture
def kernel() -> Iterator[torch.library.Library]:
    library = torch.library.Library("fxpass", "FRAGMENT")
    schema = "test_convolution(Tensor x, Tensor s, Tensor y, Tensor w, Tensor r, SymInt n) -> Tensor"
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl("test_convolution", fused, "CompositeExplicitAutograd")
    fake = lambda x, s, y, w, r, n: x.new_empty((n, 16))  # noqa: E731
    torch.library.register_fake("fxpass::test_convolution", fake, lib=library)
    yield library
    library._destroy()


def test_a_kernel_s_op_stays_one_node(kernel: torch.library.Library) -> None:
    p = run(gated(), FORCES)  # differentiated already: a kernel needs no derivative of its own
    forward = next(n for n in p.graph.nodes if n.target is ops.tensor_product and n.args[-1] == "out")
    region = extract(p, {forward, next(iter(forward.users))})
    inputs = example_inputs(p, {"atoms": 9, "edges": 40, "graphs": 2})
    expected = run_program(p, inputs)
    op = torch.ops.fxpass.test_convolution.default

    def candidate(s: Tensor, y: Tensor, w: Tensor, r: Tensor, n: int) -> Tensor:
        return op(s, torch.arange(s.shape[0]), y, w, r, n)

    done = substitute(p, region, candidate, made_by="test")
    assert done.refusal is None
    assert [n.target for n in p.graph.nodes].count(op) == 1
    for name, value in run_program(p, inputs).items():
        assert torch.allclose(value, expected[name], rtol=1e-12, atol=1e-12)


def test_readers_between_the_nodes_of_a_region_move_behind_it() -> None:
    p = gated()
    verify(p)
    by_name = {n.name: n for n in p.graph.nodes}
    # the square of the first product is read before the second one is computed
    region = extract(p, {by_name["exp_default"], by_name["mul_tensor_1"]})
    assert len(region.outputs) == 2
    inputs = example_inputs(p, {"atoms": 9, "edges": 40, "graphs": 2})
    expected = run_program(p, inputs)
    done = substitute(p, region, lambda r2, w: (torch.exp(r2), w * torch.exp(r2)), made_by="test")
    assert done.refusal is None, done.refusal
    p.graph.lint()
    assert torch.allclose(run_program(p, inputs)["energy"], expected["energy"], rtol=1e-12, atol=1e-12)


def test_the_spec_of_the_test_is_what_the_kernel_computes() -> None:
    x, y, w = (torch.randn(5, n, dtype=F64) for n in (4, 4, 8))
    one = torch.arange(5)
    product = ops.tensor_product(x, y, w, None, SPEC, "out")
    assert torch.allclose(fused(x, one, y, w, one, 5), product, rtol=1e-13, atol=1e-13)
