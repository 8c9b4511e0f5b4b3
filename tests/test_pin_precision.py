"""The pass pin-precision: regions, casts, words, budgets, ranges, and what it does to forces and their symmetry."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

import fxpass
from fxpass.algebra.multilinear import Linear, LinearPath
from fxpass.cli import main
from fxpass.errors import UsageError, VerificationError
from fxpass.ir import ops, reference
from fxpass.ir.legalize import legalize
from fxpass.ir.program import Program, TensorSpec, attribute
from fxpass.ir.verifier import verify
from fxpass.models import small_potential
from fxpass.registry import default_registry
from fxpass.structures import probe_structures
from fxpass.testing import PassContract, build_program, graph_text
from fxpass.verify.physics import random_rotation
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.pin_precision import PinPrecision
from fxpass_passes.precision_regions import always_pinned, find_regions
from fxpass_passes.sensitivity import Reference, Sensitivity, evaluate

pytestmark = pytest.mark.once

aten = torch.ops.aten
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
VECTORS = TensorSpec("edge_vectors", ("edges", 3), F32, "1x1o", properties=frozenset({"edge_vector"}))
INDEX = TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"}))
SPECIES = TensorSpec("species", ("atoms", 2), F32, "2x0e", properties=frozenset({"one_hot"}))


@cache
def captured(dtype: torch.dtype = F32) -> Program:
    return fxpass.capture(small_potential(dtype))


def small() -> Program:
    return captured().copy()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(scale: float = 1.0, factor: float = 1.0) -> Program:
    """energy = sum over edges of factor * (silu(scale * |r| w) / scale) v: a scalar net with large activations."""

    def body(graph: fx.Graph, vectors: fx.Node, index: fx.Node, species: fx.Node) -> dict[str, fx.Node]:
        w, v = graph.get_attr("w"), graph.get_attr("v")
        norm = graph.call_function(aten.linalg_vector_norm.default, (vectors, 2.0, [-1], True))
        hidden = graph.call_function(aten.mm.default, (norm, w))
        large = graph.call_function(aten.mul.Tensor, (hidden, scale))
        active = graph.call_function(aten.silu.default, (large,))
        small = graph.call_function(aten.mul.Tensor, (active, factor / scale))
        edge = graph.call_function(aten.mm.default, (small, v))
        receiver = graph.call_function(aten.select.int, (index, 0, 1))
        size = graph.call_function(aten.sym_size.int, (species, 0))
        atom = graph.call_function(ops.scatter_sum, (edge, receiver, size))
        total = graph.call_function(aten.sum.dim_IntList, (atom, [0]))
        return {"energy": total}

    weights = {"w": random(1, 8), "v": random(8, 1, seed=1)}
    program = build_program(body, [VECTORS, INDEX, SPECIES], weights)
    index = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 0, 3, 2, 2, 0]])
    sample = {"edge_vectors": random(6, 3, seed=2), "edge_index": index, "species": torch.eye(2)[[0, 1, 0, 1]]}
    return replace(program, samples=(sample,))


def pinned(program: Program, **options: Any) -> Program:
    """The result of the pass, verified."""
    outcome = PinPrecision(**options).apply(program.copy())
    outcome.program.graph_module.recompile()
    verify(outcome.program)
    return outcome.program


def types(program: Program) -> dict[str, torch.dtype]:
    """Types of the floating values that ops make."""
    values = {n.name.replace("_default", ""): n.meta["val"] for n in program.graph.nodes if n.op == "call_function"}
    return {name: v.dtype for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}


def stored(program: Program) -> set[torch.dtype]:
    """Types of the floating weights that products read."""
    nodes = [n for n in program.graph.nodes if n.op == "get_attr"]
    return {attribute(program, n).dtype for n in nodes if attribute(program, n).is_floating_point()}


def casts(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is aten._to_copy.default]


# --- reference implementations on low operands


@pytest.mark.parametrize(("low", "words"), [(F16, 2), (BF16, 3)])
def test_a_product_with_a_low_matrix_is_as_good_as_a_wide_one(low: torch.dtype, words: int) -> None:
    x, w = random(200, 64) * torch.exp(4 * random(200, 1, seed=1)), random(64, 32, seed=2).to(low)
    exact = x.double() @ w.double()
    scale = x.double().abs() @ w.double().abs()
    wide = ((x @ w.float() - exact) / scale).abs().max()
    for found in (reference.product(x, w), reference.product(w.t(), x.t()).t()):
        assert found.dtype == F32
        assert ((found - exact) / scale).abs().max() < 4 * wide
    assert round(24 / reference.digits(low)) == words


@pytest.mark.parametrize("size", [1e-36, 1e-20, 6e4, 7e8, 1e30])
def test_no_magnitude_overflows_or_is_lost(size: float) -> None:
    x, w = random(5, 8).clamp(-3, 3) * size, random(8, 3, seed=1).to(F16)
    expected = (x.double() @ w.double()).float()
    torch.testing.assert_close(reference.product(x, w), expected, rtol=1e-5, atol=size * 1e-5)
    assert reference.product(x[:0], w).shape == (0, 3)
    assert torch.equal(reference.product(0 * x, w), torch.zeros(5, 3))


@pytest.mark.parametrize("low", [F16, BF16])
def test_ops_on_low_operands_add_up_in_float32_and_round_once(low: torch.dtype) -> None:
    spec = Linear("3x0e+2x0e", "4x0e", (LinearPath(0, 0, 0, 0.3), LinearPath(1, 0, 12, 0.7)), 20, True)
    x, w = random(50, 5).to(low), random(20, seed=1).to(low)
    wide = ops.linear(x.float(), w.float(), None, str(spec), "out")
    assert torch.equal(ops.linear(x, w, None, str(spec), "out"), wide.to(low))
    source, index = random(999, 3).to(low) + 1, torch.zeros(999, dtype=torch.int64)
    assert torch.equal(ops.scatter_sum(source, index, 1), source.float().sum(0, keepdim=True).to(low))


def test_low_results_saturate() -> None:
    source, index = torch.full((3, 1), 6e4, dtype=F16), torch.zeros(3, dtype=torch.int64)
    assert ops.scatter_sum(source, index, 1).item() == 65504


def test_low_products_have_derivatives_of_every_order() -> None:
    spec = str(Linear("3x0e", "4x0e", (LinearPath(0, 0, 0, 0.5),), 12, True))
    w, x = random(12).to(BF16), random(2, 3, seed=1).requires_grad_()

    def value(x: Tensor, w: Tensor = w) -> Tensor:
        return ops.linear(x, w, None, spec, "out").pow(3).sum()

    def same_in_float32(x: Tensor) -> Tensor:
        return value(x, w.float())

    for order in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(order(value, x), order(same_in_float32, x), rtol=1e-5, atol=1e-5)


# --- regions


def test_geometry_reductions_and_energies_are_always_pinned() -> None:
    program = small()
    reasons = {node.name: why for node, why in always_pinned(program).items()}
    harmonics = [n.name for n in program.graph.nodes if n.target is ops.polynomial and n.args[2] is None]
    products = [n.name for n in program.graph.nodes if n.target is ops.tensor_product]
    sums = [n.name for n in program.graph.nodes if n.target is ops.scatter_sum]
    assert harmonics and all(reasons[name] == "geometry of edges" for name in harmonics)
    assert [name for name in products if reasons.get(name) == "first tensor product on edges"] == ["tensor_product"]
    assert len(sums) > 1 and all(reasons[name] == "sum over edges or atoms" for name in sums)
    assert "energies" in reasons.values()


def test_regions_follow_modules_and_count_what_they_save() -> None:
    program = small()
    found = find_regions(program, F16, equivariant=True)
    radial = next(r for r in found.regions if r.name == "layers.0.radial")
    weights = [program.graph.find_nodes(op="call_function", target=aten.mm.default)[k].args[1] for k in (0, 1)]
    assert radial.bytes == sum(2 * w.meta["val"].numel() for w in weights)
    assert found.always_flops + sum(r.flops for r in found.regions) < found.flops
    everything = find_regions(program, F16, equivariant=False)
    total = everything.always_flops + sum(r.flops for r in everything.regions)
    assert total == pytest.approx(everything.flops)


# --- what the pass does


def test_products_read_low_matrices_and_keep_features_wide() -> None:
    before, after = net(), pinned(net(), compute=BF16)
    FileCheck().check("aten.mm").check("aten.mm").check("scatter_sum").run(graph_text(before))
    FileCheck().check("fxpass.linear").check("fxpass.linear").check_not("aten.mm").run(graph_text(after))
    assert stored(after) == {BF16} and set(types(after).values()) == {F32} and not casts(after)


def test_casts_stand_at_borders_once() -> None:
    after = pinned(net(), compute=BF16, equivariant=False)
    kinds = types(after)
    assert kinds["linalg_vector_norm"] == kinds["scatter_sum"] == F32
    assert kinds["mm"] == kinds["silu"] == kinds["mm_1"] == BF16
    assert [c.args[0].target for c in casts(after)] == [aten.linalg_vector_norm.default, aten.mm.default]
    assert stored(after) == {BF16}
    program = pinned(small(), compute=F16, equivariant=False)
    made = [(c.args[0], c.kwargs["dtype"]) for c in casts(program)]
    assert len(made) == len(set(made))
    assert not any(c.args[0].target is aten._to_copy.default for c in casts(program))


def test_conversions_that_cancel_go() -> None:
    def body(graph: fx.Graph, vectors: fx.Node, index: fx.Node, species: fx.Node) -> dict[str, fx.Node]:
        w = graph.get_attr("w")
        hidden = graph.call_function(aten.mm.default, (species, w))
        wide = graph.call_function(aten._to_copy.default, (hidden,), {"dtype": F64})
        back = graph.call_function(aten._to_copy.default, (wide,), {"dtype": F32})
        norm = graph.call_function(aten.linalg_vector_norm.default, (vectors, 2.0, [0, 1]))
        again = graph.call_function(aten.mm.default, (back, w))
        return {"features": again, "energy": graph.call_function(aten.mul.Tensor, (norm, 1.5))}

    program = build_program(body, [VECTORS, INDEX, SPECIES], {"w": random(2, 2)})
    after = pinned(program, compute=BF16, equivariant=False)
    assert [(c.args[0].name, c.kwargs["dtype"]) for c in casts(after)] == [("species", BF16), ("mm_default_1", F32)]


def test_a_low_program_is_left_alone() -> None:
    after = pinned(small(), compute=F16)
    again = PinPrecision(compute=F16).apply(after.copy())
    assert not again.modified and again.refusals[0].nodes


@pytest.mark.parametrize("equivariant", [True, False])
@pytest.mark.parametrize("compute", [F16, BF16])
def test_the_contract(compute: torch.dtype, equivariant: bool) -> None:
    subject = PinPrecision(compute=compute, equivariant=equivariant)
    PassContract(subject, [small, net], budget=2.0 if compute is BF16 else 0.3).check()


@pytest.mark.parametrize("equivariant", [True, False])
@pytest.mark.parametrize("compute", [F16, BF16])
@pytest.mark.parametrize("make", [net, pytest.param(small, marks=pytest.mark.slow)])
def test_forces_are_the_gradient_and_targets_agree(make: Any, compute: torch.dtype, equivariant: bool) -> None:
    program = pinned(make(), compute=compute, equivariant=equivariant)
    derived = Differentiate().apply(program.copy()).program
    verify(derived)
    legal = legalize(derived)
    verify(legal)
    script = default_registry().target("torchscript")().lower(legal)
    for sample in program.samples:
        inputs = [sample[s.name] for s in program.inputs]
        by_autograd = evaluate(program, sample).forces
        found = [list(run(*inputs)) for run in (derived.graph_module, legal.graph_module, script)]
        gradients = [r[-1].double() for r in found]
        sender, receiver = sample["edge_index"]
        zeros = torch.zeros_like(by_autograd)
        f = zeros.index_add(0, sender, gradients[0]).index_add(0, receiver, gradients[0], alpha=-1)
        torch.testing.assert_close(f, by_autograd, rtol=5e-3, atol=1e-4)
        for other in found[1:]:
            for a, b in zip(other, found[0], strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
        assert [(v.dtype, v.shape) for v in found[0]] == [(v.dtype, v.shape) for v in found[2]]


def rotation_error(program: Program, structures: int = 3) -> float:
    """How far forces are from turning with the structure, rms in eV/Angstrom."""
    rotation = torch.tensor(random_rotation(np.random.default_rng(0)))
    off = []
    for sample in [s for s in program.samples if s["edge_index"].shape[1]][:structures]:
        turned = {**sample, "edge_vectors": (sample["edge_vectors"].double() @ rotation.T).to(F32)}
        off.append((evaluate(program, turned).forces - evaluate(program, sample).forces @ rotation.T).flatten())
    return torch.cat(off).square().mean().sqrt().item()


@pytest.mark.parametrize("compute", [F16, BF16])
def test_features_that_keep_their_type_keep_equivariance(compute: torch.dtype) -> None:
    own = rotation_error(small())
    assert rotation_error(pinned(small(), compute=compute)) < 1.5 * own
    assert rotation_error(pinned(small(), compute=compute, equivariant=False)) > 20 * own


def test_permuted_and_inverted_structures() -> None:
    program = pinned(small(), compute=BF16)
    sample = program.samples[0]
    here = evaluate(program, sample)
    inverted = evaluate(program, {**sample, "edge_vectors": -sample["edge_vectors"]})
    torch.testing.assert_close(inverted.forces, -here.forces, rtol=0, atol=1e-5)
    order = torch.randperm(len(here.forces), generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order)
    moved = {**sample, "species": sample["species"][order], "edge_index": place[sample["edge_index"]]}
    torch.testing.assert_close(evaluate(program, moved).forces, here.forces[order], rtol=0, atol=1e-5)


def test_float64_models_become_float32_with_a_float64_part() -> None:
    program = captured(F64)
    after = pinned(program, compute=F32, pinned=F64)
    kinds = set(types(after).values())
    errors = Reference(program, 10).errors(after)
    assert kinds == {F32, F64} and errors.rms < 1e-5  # 0.01 meV/A
    assert [s.dtype for s in after.outputs] == [s.dtype for s in program.outputs]


def test_a_model_may_be_pinned_in_another_type_than_its_own() -> None:
    after = pinned(small(), compute=F32, pinned=F64)
    assert {F32, F64} <= set(types(after).values())
    assert [s.dtype for s in after.outputs] == [s.dtype for s in small().outputs]
    assert Reference(small(), 10).errors(after).largest < Reference(small(), 10).errors(small()).largest * 2
    low = pinned(captured(F64), compute=BF16, pinned=F32)
    assert F32 in types(low).values() and low.outputs == captured(F64).outputs


# --- budgets


@pytest.mark.parametrize("compute", [F16, BF16])
def test_a_budget_is_met_on_structures_never_seen(compute: torch.dtype) -> None:
    given = [s for s in probe_structures(small_facts(), 4.5) if len(s) > 2][-2:]
    program = fxpass.capture(small_potential(F32), calibration=given)
    subject = PinPrecision(compute=compute, budget="1 meV/A")
    choice = subject.choice(program.copy())
    outcome = subject.apply(program.copy())
    verify(outcome.program)
    assert choice.share >= 0.5
    assert outcome.refusals[0].reason.startswith("two words: alone it moves forces by")
    rng = np.random.default_rng(1)
    moved = [replace(s, positions=s.positions + 0.05 * rng.normal(size=(len(s), 3))) for s in given]
    unseen = fxpass.capture(small_potential(F32), calibration=moved)
    assert Reference(unseen, 10).errors(outcome.program).largest < 1e-3


def small_facts() -> list[int]:
    model, frontend = fxpass.api.open_model(small_potential(F32))
    return list(frontend.attributes(model)["numbers"])


def test_the_worst_regions_are_pinned_first() -> None:
    subject = PinPrecision(compute=F16, equivariant=False, budget=0.03)
    rows = subject.sensitivity(small())
    assert [r.per_gflop for r in rows] == sorted((r.per_gflop for r in rows), reverse=True)
    precision = [r.precision for r in rows]
    assert set(precision) == {"pinned", "low"} and precision == sorted(precision, reverse=True)
    outcome = subject.apply(small())
    assert Reference(small(), 10).errors(outcome.program).largest < 0.03
    kept = {r.module for r in outcome.refusals if r.rule == "low-region"}
    assert kept == {r.region for r in rows if r.precision == "pinned"}


def test_a_ranking_needs_no_budget() -> None:
    rows = PinPrecision(compute=F16).sensitivity(small())
    assert all(isinstance(row, Sensitivity) and row.precision == "low" and row.errors.rms > 0 for row in rows)
    assert len(rows) == len(find_regions(small(), F16, equivariant=True).regions)


def test_a_budget_below_the_pinned_type_is_refused_with_numbers() -> None:
    with pytest.raises(VerificationError, match=r"with everything pinned the result is off by \d\.\d+e-\d+ eV/A, over"):
        PinPrecision(budget=1e-12).apply(small())


# --- numbers beyond the range


def test_activations_beyond_float16_are_pinned_with_their_numbers() -> None:
    program = net(scale=1e6)
    outcome = PinPrecision(compute=F16, equivariant=False).apply(program.copy())
    (refusal,) = [r for r in outcome.refusals if r.rule == "low-region"]
    assert "reach" in refusal.reason and "65504" in refusal.reason
    assert F16 not in types(outcome.program).values()


def test_large_gradients_are_found_too() -> None:
    outcome = PinPrecision(compute=F16, equivariant=False).apply(net(factor=1e7))
    assert any("gradients of" in r.reason for r in outcome.refusals)


def test_nothing_overflows_where_features_keep_their_type() -> None:
    after = pinned(net(scale=1e6), compute=F16)
    assert stored(after) == {F16}
    errors = Reference(net(scale=1e6), 1).errors(after)
    assert errors.largest < 1e-2


@pytest.mark.parametrize("equivariant", [True, False])
def test_geometry_far_from_the_samples_gives_numbers(equivariant: bool) -> None:
    after = pinned(net(scale=100.0), compute=F16, equivariant=equivariant)
    assert F16 in stored(after)
    far = {**net().samples[0], "edge_vectors": 1e5 * random(6, 3)}
    found = evaluate(after, far)
    assert found.energy.isfinite().all() and found.forces.isfinite().all()


def test_weights_beyond_float16_are_pinned() -> None:
    program = net()
    program.graph_module.w.mul_(1e6)
    outcome = PinPrecision(compute=F16).apply(program.copy())
    assert any("weights of mm_default reach" in r.reason for r in outcome.refusals)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": torch.int8}, "is no type that pin-precision computes in"),
        ({"compute": torch.float8_e4m3fn}, "is no type that pin-precision computes in"),
        ({"pinned": F16}, "is no type that pin-precision computes in"),
        ({"compute": F32}, "is not narrower than"),
        ({"budget": "fast"}, "is not a force budget"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PinPrecision(**options)


def test_an_empty_calibration_set_is_refused() -> None:
    bare = replace(small(), samples=())
    with pytest.raises(UsageError, match="calibration set is empty"):
        PinPrecision(budget="1 meV/A").apply(bare)
    with pytest.raises(UsageError, match="calibration set is empty"):
        PinPrecision(compute=F16, equivariant=False).apply(bare)
    assert PinPrecision(compute=F16).apply(bare).modified


# --- from outside


def test_the_ranking_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "example:small", "--sensitivity", "-p", "fold-constants,pin-precision{compute=float16}"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sensitivity"]
    assert {row["region"] for row in rows} >= {"layers.0.radial", "layers.1.radial"}
    assert all(row["errors"]["largest"] > 0 and row["precision"] == "low" for row in rows)
    ratios = [row["per_gflop"] for row in rows]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--sensitivity", "-p", "dead-code"], "no pass of 'dead-code' ranks"), (["-p", "exact"], "for --sensitivity")],
)
def test_a_ranking_that_makes_no_sense(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "example:small", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_results_pass_their_receipt_and_keep_their_bits_in_a_file(tmp_path: Path) -> None:
    model = small_potential(F32)
    given = [s for s in probe_structures(small_facts(), 4.5) if len(s) > 2][-2:]
    low = fxpass.optimize(model, "pin-precision{compute=bfloat16}", budget="2 meV/A", calibration=given)
    assert low.report.receipt.passed
    low.save(tmp_path / "low.fxp")
    again = fxpass.load(tmp_path / "low.fxp")
    for structure in given:
        ours, theirs = (low.frontend.evaluate(each, structure) for each in (low, again))
        assert ours.energy == theirs.energy and (ours.forces == theirs.forces).all()
    half = {t.dtype for t in again.program.graph_module.buffers() if t.is_floating_point()}
    assert BF16 in half


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_result_in_several_types_says_the_type_of_the_model(dtype: torch.dtype) -> None:
    model = small_potential(dtype)
    given = [s for s in probe_structures(small_facts(), 4.5) if len(s) > 2][-2:]
    low = fxpass.optimize(model, "pin-precision{compute=float16}", budget="5 meV/A", calibration=given)
    assert low.report.receipt.passed
    kinds = {t.dtype for t in low.interface.buffers() if t.is_floating_point()}
    assert F16 in kinds and {t.dtype for t in low.parameters()} <= {dtype}
    assert low.frontend.evaluate(low, given[0]).dtype == str(dtype).removeprefix("torch.")


# --- the alloy model


@pytest.mark.mace
@pytest.mark.slow
def test_the_alloy_model_meets_its_bars(alloy_model_path: Path, alloy_structures: list[Any]) -> None:
    program = fxpass.capture(alloy_model_path, calibration=alloy_structures[:2])
    program = replace(program, samples=program.samples[-2:])  # the bars are for structures of dynamics, not probes
    reference = Reference(program, 2)
    own = rotation_error(program, 1)
    for compute, bar in ((F16, 5e-4), (BF16, 3e-3)):
        low = pinned(program, compute=compute)
        errors, whole = reference.errors(low), reference.errors(program.cast(compute))
        assert errors.rms < bar and whole.rms > 5 * errors.rms
        assert compute is BF16 or errors.energy < 2e-4
        assert rotation_error(low, 1) < 1.5 * own
