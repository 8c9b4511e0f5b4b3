"""The pass quantize: which weights, their layout, their rounding, budgets, files, and what it does to forces."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

import fxpass
from conftest import random_alloy
from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct
from fxpass.algebra.multilinear import Path as TensorProductPath
from fxpass.errors import PassError, StructureError, UsageError
from fxpass.frontends.bundled import BundledFrontend
from fxpass.ir import ops
from fxpass.ir.legalize import legalize
from fxpass.ir.program import Program, TensorSpec, attribute
from fxpass.ir.verifier import verify
from fxpass.models import small_potential
from fxpass.structures import Structure, probe_structures
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass.verify.physics import random_rotation
from fxpass_passes.adaround import adaround, below, descend, scales
from fxpass_passes.fold_constants import FoldConstants
from fxpass_passes.force_gradients import Calibration, Errors, errors, weighted
from fxpass_passes.quantizable import Layout, Piece, candidates
from fxpass_passes.quantize import Quantize, Rounded, store

pytestmark = pytest.mark.once

aten = torch.ops.aten
F32, F64 = torch.float32, torch.float64
VECTORS = TensorSpec("edge_vectors", ("edges", 3), F64, "1x1o", properties=frozenset({"edge_vector"}))
INDEX = TensorSpec("edge_index", (2, "edges"), torch.int64, properties=frozenset({"index:atoms"}))
SPECIES = TensorSpec("species", ("atoms", 3), F64, "3x0e", properties=frozenset({"one_hot"}))
BATCH = TensorSpec("batch", ("atoms",), torch.int64, properties=frozenset({"index:graphs"}))
GRAPHS = TensorSpec("cell", ("graphs", 3), F64)
X = TensorSpec("x", ("atoms", 16), F64, "4x0e+4x1o")
S = TensorSpec("s", ("atoms", 8), F64, "8x0e")
KIND = TensorSpec("kind", ("atoms",), torch.int64, properties=frozenset({"index:3"}))
SIZES = ({"atoms": 7, "edges": 19, "graphs": 2}, {"atoms": 1, "edges": 0, "graphs": 1})
MAP = Linear("8x0e", "8x0e", (LinearPath(0, 0, 0, 8**-0.5),), 64, True)
SKIP = TensorProduct("8x0e", "3x0e", "8x0e", (TensorProductPath(0, 0, 0, "uvw", 0, 0.3),), 192, True)
QUICK = Quantize(probes=16, rounds=1, steps=30)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def potential() -> Program:
    """A small potential with a radial net, an equivariant linear, a product with species, and energies of atoms."""

    def body(graph: fx.Graph, *inputs: fx.Node) -> dict[str, fx.Node]:
        vectors, index, species, batch, cell = inputs
        get = graph.get_attr
        lengths = call(graph, aten.linalg_vector_norm.default, vectors, 2.0, [-1], True)
        basis = call(graph, aten.exp.default, call(graph, aten.mul.Tensor, get("widths"), lengths))
        hidden = call(graph, aten.silu.default, call(graph, aten.mm.default, basis, get("radial0")))
        half = call(graph, aten.div.Tensor, get("radial1"), 4.0)
        messages = call(graph, aten.mm.default, hidden, half)
        atoms = call(graph, aten.sym_size.int, species, 0)
        receiver = call(graph, aten.select.int, index, 0, 1)
        summed = call(graph, ops.scatter_sum, messages, receiver, atoms)
        flat = call(graph, aten.view.default, get("mixing"), [-1])
        mixed = call(graph, ops.linear, summed, flat, None, str(MAP), "out")
        features = call(graph, ops.tensor_product, mixed, species, get("skip"), None, str(SKIP), "out")
        own = call(graph, aten.mm.default, species, get("embedding"))
        energies = call(graph, aten.mm.default, call(graph, aten.silu.default, features), get("readout"))
        total = call(graph, aten.add.Tensor, energies, call(graph, aten.sum.dim_IntList, own, [1], True))
        graphs = call(graph, aten.sym_size.int, cell, 0)
        per_graph = call(graph, ops.scatter_sum, total, batch, graphs)
        return {"energy": call(graph, aten.squeeze.dim, per_graph, 1)}

    weights = {
        "widths": -torch.linspace(0.2, 2.0, 8, dtype=F64),
        "radial0": random(8, 16),
        "radial1": random(16, 8, seed=1),
        "mixing": random(1, 64, seed=2),
        "skip": random(192, seed=3),
        "embedding": 50.0 * random(3, 4, seed=4),
        "readout": random(8, 1, seed=5),
    }
    program = build_program(body, [VECTORS, INDEX, SPECIES, BATCH, GRAPHS], weights)
    names = [s.name for s in program.inputs]
    drawn = [example_inputs(program, SIZES[0], seed) for seed in range(10, 22)]
    return replace(program, samples=tuple(dict(zip(names, inputs, strict=True)) for inputs in drawn))


def as_float32(program: Program) -> Program:
    return program.cast(F32)


def unread() -> Program:
    """Nothing here may be quantised."""

    def body(graph: fx.Graph, species: fx.Node) -> dict[str, fx.Node]:
        return {"energy": call(graph, aten.mm.default, species, graph.get_attr("w"))}

    return build_program(body, [SPECIES], {"w": random(3, 4)})


@cache
def captured(dtype: torch.dtype = F32) -> Program:
    """The potential that the package ships."""
    return fxpass.capture(small_potential(dtype))


@cache
def moved(count: int, seed: int = 0) -> tuple[Structure, ...]:
    """Probe structures whose atoms are moved at random."""
    model, rng = small_potential(), np.random.default_rng(seed)
    probes = probe_structures(model.atomic_numbers.tolist(), model.cutoff)
    return tuple(
        replace(p, positions=p.positions + rng.normal(scale=0.05, size=p.positions.shape), name=f"{p.name}-{k}")
        for p in probes
        for k in range(count)
    )


# --- the op


def test_dequantize_has_shapes_and_derivatives() -> None:
    q = torch.randint(-127, 128, (2, 3, 4), dtype=torch.int8)
    scale = random(2, 1, 4).requires_grad_()
    torch.library.opcheck(ops.dequantize, (q, scale))
    assert torch.autograd.gradcheck(lambda s: ops.dequantize(q, s), (scale,))
    assert torch.equal(ops.dequantize(q, scale), q.double() * scale)


def test_fold_constants_leaves_it_until_it_is_legalised() -> None:
    program = QUICK.apply(potential()).program
    folded = FoldConstants().apply(program.copy()).program
    assert _integers(folded) == _integers(program) > 0
    legal = FoldConstants().apply(legalize(folded)).program
    assert _integers(legal) == 0
    assert "dequantize" not in graph_text(legal)
    _same_values(legal, program, 1e-13)


def test_cast_keeps_integers() -> None:
    program = QUICK.apply(potential()).program
    single = program.cast(F32)
    verify(single)
    assert _integers(single) == _integers(program)
    assert {v.dtype for _, v in single.graph_module.named_buffers()} == {F32, torch.int8}


# --- which weights


def test_before_and_after() -> None:
    before = potential()
    FileCheck().check_not("dequantize").check("radial0").check("mm").check("fxpass.linear").run(graph_text(before))
    outcome = QUICK.apply(before.copy())
    verify(outcome.program)
    after = graph_text(outcome.program)
    FileCheck().check("radial0_int8").check("radial0_scale").check("fxpass.dequantize").check("aten.view").check(
        "mm"
    ).check("radial1_int8").check("aten.div").check("mixing_int8").check("fxpass.linear").check("skip_int8").check(
        "fxpass.tensor_product"
    ).check("readout_int8").run(after)
    assert "embedding_int8" not in after
    assert [a.rule for a in outcome.applications] == ["int8"] * 5
    _same_values(outcome.program, before, 0.1)


def test_the_rest_is_left_with_a_reason() -> None:
    found, refusals = candidates(potential())
    assert {c.name for c in found} == {"radial0", "radial1", "mixing", "skip", "readout"}
    reasons = {r.nodes[0]: r.reason for r in refusals}
    assert reasons.keys() == {"widths", "embedding"}
    assert "looked up by species" in reasons["embedding"]
    assert "(aten.mul.Tensor) is no linear map" in reasons["widths"]


LINEAR16 = str(Linear("4x0e+4x1o", "4x0e+4x1o", (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 16, 0.5)), 32, True))
ROWS16 = str(Linear("4x0e+4x1o", "4x0e+4x1o", (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 16, 0.5)), 32, False))
SHARED = str(Linear("4x0e+4x1o", "4x0e+4x1o", (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 8, 0.5)), 32, True))
UUU = str(TensorProduct("8x0e", "8x0e", "8x0e", (TensorProductPath(0, 0, 0, "uuu", 0, 1.0),), 8, True))
TURN = str(Linear("1x1o", "4x1o", (LinearPath(0, 0, 0, 0.5),), 4, True))
WIDE = str(Linear("1x1o", "8x1o", (LinearPath(0, 0, 0, 0.5),), 8, True))


def reading(
    target: Any, *args: Any, weight: Tensor, inputs: tuple[TensorSpec, ...] = (X,), through: tuple[Any, ...] = ()
) -> Program:
    """``target`` on inputs and the weight, given as ``%name`` and ``%w``; the weight through one op first."""

    def body(graph: fx.Graph, *nodes: fx.Node) -> dict[str, fx.Node]:
        w = graph.get_attr("w")
        if through:
            w = call(graph, through[0], w, *through[1:])
        named = dict(zip((s.name for s in inputs), nodes, strict=True)) | {"w": w}
        given = [named[a[1:]] if isinstance(a, str) and a[0] == "%" else a for a in args]
        return {"y": call(graph, target, *given)}

    return build_program(body, inputs, {"w": weight})


@pytest.mark.parametrize(
    ("program", "layout"),
    [
        (reading(aten.mm.default, "%x", "%w", weight=random(16, 5)), Layout((16, 5), 1, (Piece(0, 1, 16, 5),))),
        (
            reading(aten.mm.default, "%s", "%w", weight=random(5, 8), inputs=(S,), through=(aten.t.default,)),
            Layout((5, 8), 1, (Piece(0, 1, 1, 5, 8),)),
        ),
        (
            reading(aten.linear.default, "%s", "%w", weight=random(5, 8), inputs=(S,)),
            Layout((5, 8), 1, (Piece(0, 1, 1, 5, 8),)),
        ),
        (
            reading(ops.linear, "%x", "%w", None, LINEAR16, "out", weight=random(32)),
            Layout((32,), 1, (Piece(0, 2, 4, 4),)),
        ),
        (
            reading(ops.linear, "%x", "%w", None, LINEAR16.replace("|32|", "|40|"), "out", weight=random(40)),
            Layout((40,), 1, (Piece(0, 2, 4, 4), Piece(32, 1, 8, 1))),
        ),
    ],
)
def test_layouts(program: Program, layout: Layout) -> None:
    if "mm" in graph_text(program) and layout.shape == (16, 5):
        program = replace(program, inputs=(replace(X, irreps=None),))
        program.placeholders["x"].meta["irreps"] = None
    found, _ = candidates(program)
    assert [c.layout for c in found] == [layout]


def test_weights_by_species_have_scales_by_species() -> None:
    def body(graph: fx.Graph, x: fx.Node, kind: fx.Node) -> dict[str, fx.Node]:
        rows = call(graph, ops.gather, graph.get_attr("w"), kind)
        return {"y": call(graph, ops.linear, x, rows, None, ROWS16, "out")}

    program = build_program(body, [X, KIND], {"w": random(3, 32)})
    ((candidate,), _) = candidates(program)
    assert candidate.layout == Layout((3, 32), 3, (Piece(0, 2, 4, 4),))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (reading(aten.mm.default, "%x", "%w", weight=random(16, 5)), "mixes components of 4x0e+4x1o"),
        (reading(aten.mm.default, "%w", "%x", weight=random(6, 7)), "no linear map that it is the matrix of"),
        (reading(aten.mm.default, "%species", "%w", weight=random(3, 4), inputs=(SPECIES,)), "looked up by species"),
        (reading(ops.gather, "%w", "%kind", weight=random(3, 4), inputs=(KIND,)), "looked up by species"),
        (reading(ops.linear, "%x", "%w", None, SHARED, "out", weight=random(32)), "its paths share weights"),
        (reading(ops.linear, None, "%w", "%x", LINEAR16, "x", weight=random(32)), "derivative by x"),
        (
            reading(ops.tensor_product, "%s", "%s", "%w", None, UUU, "out", weight=random(8), inputs=(S,)),
            "channels of 1 weights",
        ),
        (
            reading(ops.linear, "%edge_vectors", "%w", None, WIDE, "out", weight=random(8), inputs=(VECTORS,)),
            "geometry of edges, which is pinned",
        ),
    ],
)
def test_what_must_stay(program: Program, reason: str) -> None:
    for node in program.graph.nodes:
        spec = next((s for s in program.inputs if s.name == node.name), None)
        node.meta["irreps"] = spec.irreps if spec else node.meta.get("irreps")
    found, (refusal,) = candidates(program)
    assert not found
    assert reason in refusal.reason


def test_a_weight_that_is_read_twice_in_different_ways_stays() -> None:
    def body(graph: fx.Graph, s: fx.Node) -> dict[str, fx.Node]:
        w = graph.get_attr("w")
        return {
            "y": call(graph, aten.mm.default, s, w),
            "z": call(graph, aten.mm.default, s, call(graph, aten.t.default, w)),
        }

    found, (refusal,) = candidates(build_program(body, [S], {"w": random(8, 8)}))
    assert not found and refusal.reason == "it is read in different ways"


def test_a_weight_pinned_to_a_wider_type_stays() -> None:
    def body(graph: fx.Graph, s: fx.Node) -> dict[str, fx.Node]:
        low = graph.call_function(aten._to_copy.default, (s,), {"dtype": F32})
        return {
            "y": call(graph, aten.mm.default, s, graph.get_attr("w")),
            "z": call(graph, aten.mm.default, low, graph.get_attr("v")),
        }

    found, refusals = candidates(build_program(body, [S], {"w": random(8, 8), "v": random(8, 8).float()}))
    assert [c.name for c in found] == ["v"]
    assert [r.reason for r in refusals] == ["it is pinned to float64, where other weights are narrower"]


@pytest.mark.parametrize(
    "layout",
    [
        Layout((6, 4), 1, (Piece(0, 1, 6, 4),)),
        Layout((4, 6), 1, (Piece(0, 1, 1, 4, 6),)),
        Layout((60,), 1, (Piece(0, 2, 4, 3), Piece(24, 1, 4, 1), Piece(28, 1, 2, 4, 4))),
        Layout((3, 28), 3, (Piece(0, 2, 4, 3), Piece(24, 1, 4, 1))),
    ],
)
def test_a_layout_is_undone(layout: Layout) -> None:
    weight = random(*layout.shape)
    columns = layout.to_columns(weight)
    assert torch.equal(layout.from_columns(columns), weight)
    assert [p.shape for p in layout.stored(columns)] == [
        (layout.rows, p.count, p.outer, p.channels, p.inner) for p in layout.pieces
    ]
    assert sum(p * k * n for p, k, n in layout.blocks()) == layout.size == weight.numel()


# --- rounding


def test_scales_cover_the_range_or_clip_what_does_not_matter() -> None:
    weights = random(2, 64, 5).float()
    weights[0, :, 0] = 0
    flat = torch.ones(2, 64, 1)
    found = scales(weights, flat)
    full = weights.abs().amax(1, keepdim=True) / 127
    assert found[0, 0, 0] == 1
    inside = found[weights.abs().sum(1, keepdim=True) > 0]
    assert (inside <= full[full > 0] * (1 + 1e-6)).all() and (inside >= 0.79 * full[full > 0]).all()

    def cost(scale: Tensor) -> Tensor:
        return ((weights / scale).round().clamp(-127, 127) * scale - weights).square().sum(1)

    assert (cost(found) <= cost(torch.where(full > 0, full, 1.0)) * (1 + 1e-6)).all()


def quadratic(seed: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Weights over their scales and gradients of few outputs by them."""
    return 40 * random(size, seed=seed).float().clamp(-3, 3), random(rank, size, seed=seed + 1).float()


def error(x: Tensor, up: Tensor, gradients: Tensor) -> float:
    return (gradients @ (below(x) + up - x)).square().sum().item()


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_learnt_rounding_beats_rounding_to_the_nearest(seed: int) -> None:
    x, gradients = quadratic(seed, 200, 12)
    nearest = x.round() > below(x)
    hessian = gradients.t() @ gradients
    soft = adaround(x.view(1, -1, 1), hessian[None], torch.ones(1, 1, 1), steps=300).view(-1)
    hard = descend(x, soft, gradients, sweeps=3, seed=0)
    assert error(x, soft, gradients) < 0.7 * error(x, nearest, gradients)
    assert error(x, hard, gradients) < 0.1 * error(x, nearest, gradients)


def test_the_descent_ends_where_no_single_weight_helps() -> None:
    x, gradients = quadratic(7, 12, 4)
    up = descend(x, x.round() > below(x), gradients, sweeps=20, seed=0)
    ridge = gradients.square().sum(0).mean()

    def cost(choice: Tensor) -> float:
        return error(x, choice, gradients) + (ridge * (below(x) + choice - x).square().sum()).item()

    neighbours = [cost(up ^ (torch.arange(12) == n)) for n in range(12)]
    assert cost(up) <= min(neighbours) + 1e-5
    every = min(cost(torch.tensor(bits)) for bits in product([False, True], repeat=12))
    assert cost(up) <= 1.5 * every


def test_gradients_predict_the_errors() -> None:
    program = potential()
    calibration = Calibration(program, ("radial0", "skip"), limit=5)
    moved = {n: w + 1e-3 * random(*w.shape, seed=9).float() for n, w in calibration.weights.items()}
    deviations = calibration.deviations(moved)
    along = [weighted(d) for d in deviations]
    rows = calibration.gradients([v[None] / v.norm() for v in along])
    predicted = sum((rows[n].flatten(1) @ (moved[n] - calibration.weights[n]).flatten()) for n in moved)
    assert torch.allclose(predicted.double(), torch.stack([v.norm() for v in along]), rtol=0.02)
    found = errors(deviations)
    assert found.largest == max(d[1:].abs().max().item() for d in deviations)
    assert sum(len(d) for d in calibration.directions(12, 0)) == 12


def test_errors_are_within_a_budget_with_their_energies() -> None:
    assert Errors(1e-3, 1e-4, 1e-4).within(1e-3)
    assert not Errors(1.1e-3, 1e-4, 1e-4).within(1e-3)
    assert not Errors(1e-4, 1e-5, 2e-4).within(1e-3)
    assert not Errors(float("nan"), 1e-5, 0.0).within(1e-3)


# --- the pass


def test_contract() -> None:
    both = [potential, lambda: as_float32(potential()), unread]
    contract = PassContract(QUICK, both, sizes=SIZES, budget=0.2)
    outcomes = contract.check()
    assert [o.modified for o in outcomes] == [True, True, False]
    assert outcomes[2].refusals[0].reason == "no constant weight of a linear map is wide enough to be quantised"


def test_the_same_seed_gives_the_same_bits() -> None:
    def integers(seed: int) -> list[Tensor]:
        program = replace(QUICK, seed=seed).apply(potential()).program
        return [v for _, v in program.graph_module.named_buffers() if v.dtype == torch.int8]

    first, again, other = integers(0), integers(0), integers(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_force_refined_rounding_beats_the_nearest_on_other_samples() -> None:
    program = potential()
    choice = Quantize(probes=60, steps=200).choice(program)
    names = [s.name for s in program.inputs]
    drawn = [dict(zip(names, example_inputs(program, SIZES[0], seed), strict=True)) for seed in range(40, 60)]
    held_out = replace(program, samples=tuple(drawn))
    judge = Calibration(held_out, tuple(r.candidate.name for r in choice.rounded), limit=20)
    values = {r.candidate.name: r.value for r in choice.rounded}
    nearest = {}
    for r in choice.rounded:
        layout = r.candidate.layout
        x = layout.to_columns(judge.weights[r.candidate.name]) / r.scale
        nearest[r.candidate.name] = layout.from_columns(x.round().clamp(-127, 127) * r.scale)
    assert choice.share == 1.0
    assert errors(judge.deviations(values)).rms < 0.6 * errors(judge.deviations(nearest)).rms


def test_a_budget_leaves_the_worst_weights_alone() -> None:
    free = QUICK.choice(potential())
    budget = 2 * 0.9 * max(free.errors.largest, 10 * free.errors.energy)
    outcome = replace(QUICK, budget=budget, share=0.3).apply(potential())
    left = [r for r in outcome.refusals if r.reason.startswith("the budget: rounding it to the nearest alone costs")]
    assert left and len(outcome.applications) == 5 - len(left)
    with pytest.raises(PassError, match=r"with 100% of the weights in 8 bits, the largest force error is .* meV/A"):
        replace(QUICK, budget=budget, share=1.0).apply(potential())


@pytest.mark.parametrize(
    "options",
    [
        *({"bits": 4}, {"share": 1.5}, {"probes": 0}, {"rounds": -1}, {"steps": -1}, {"sweeps": -1}),
        *({"budget": "much"}, {"budget": -1.0}),
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Quantize(**options)


def test_an_empty_calibration_set_is_refused() -> None:
    with pytest.raises(UsageError, match="the calibration set is empty"):
        QUICK.apply(replace(potential(), samples=()))


def test_weights_that_are_not_finite_are_refused() -> None:
    program = potential()
    program.graph_module.radial0 = program.graph_module.radial0.clone().index_fill(0, torch.tensor([2]), torch.nan)
    with pytest.raises(PassError, match="16 of 128 weights are not finite") as caught:
        QUICK.apply(program)
    assert caught.value.where.node == "radial0"


def test_a_program_without_such_weights_has_no_choice() -> None:
    with pytest.raises(PassError, match="no constant weight of a linear map"):
        QUICK.choice(unread())


def test_forces_that_are_not_finite_are_refused() -> None:
    program = potential()
    bad = {**program.samples[0], "edge_vectors": torch.full_like(program.samples[0]["edge_vectors"], torch.nan)}
    with pytest.raises(PassError, match="not finite on the calibration set"):
        QUICK.apply(replace(program, samples=(bad,)))


def test_one_atom_without_edges_is_a_sample_like_any_other() -> None:
    program = potential()
    names = [s.name for s in program.inputs]
    alone = dict(zip(names, example_inputs(program, SIZES[1]), strict=True))
    outcome = QUICK.apply(replace(program.copy(), samples=(alone, *program.samples)))
    assert len(outcome.applications) == 5
    lonely = QUICK.choice(replace(program, samples=(alone,)))
    assert lonely.errors.largest == 0.0


def test_equivariance_is_exact() -> None:
    """Scales belong to whole irreps, so rotated features of an equivariant map give rotated results, to rounding."""
    program = reading(ops.linear, "%x", "%w", None, LINEAR16, "out", weight=random(32))
    ((candidate,), _) = candidates(program)
    layout = candidate.layout
    columns = layout.to_columns(attribute(program, next(iter(program.graph.find_nodes(op="get_attr")))))
    scale = scales(columns.view(2, 4, 4).float(), torch.ones(2, 4, 1)).expand(2, 4, 4).reshape(-1)
    store(program, Rounded(candidate, (columns / scale).round(), scale, 0.0), "quantize")
    program.graph_module.recompile()
    verify(program)
    turn = torch.from_numpy(random_rotation(np.random.default_rng(0)))
    x = random(6, 16)

    def rotated(features: Tensor) -> Tensor:
        # components of an e3nn vector are in the order y, z, x; any order will do to test a rotation
        vectors = (features[:, 4:].view(-1, 4, 3) @ turn.T).reshape(-1, 12)
        return torch.cat([features[:, :4], vectors], dim=1)

    y, turned = run_program(program, (x,))["y"], run_program(program, (rotated(x),))["y"]
    assert torch.allclose(turned, rotated(y), atol=1e-13)


# --- whole models


@pytest.mark.slow
def test_the_shipped_potential(tmp_path: Path) -> None:
    """Verified, smaller as a file, the same after loading."""
    model, probes = small_potential(), moved(1)
    result = fxpass.optimize(model, [QUICK, "differentiate"], calibration=list(probes), budget=0.1)
    assert result.report.receipt.passed
    assert _integers(result.program) == sum(c.layout.size for c in candidates(captured())[0])
    result.save(tmp_path / "small.fxp")
    fxpass.optimize(model, ["differentiate"], verify=False).save(tmp_path / "plain.fxp")
    assert (tmp_path / "small.fxp").stat().st_size < (tmp_path / "plain.fxp").stat().st_size
    loaded, evaluate = fxpass.load(tmp_path / "small.fxp"), result.frontend.evaluate
    for structure in moved(1, seed=5)[:3]:
        here, there = evaluate(result, structure), evaluate(loaded, structure)
        assert np.array_equal(here.forces, there.forces) and here.energy == there.energy


@pytest.mark.parametrize(("dtype", "target"), [(F64, "eager"), (F32, "torchscript")])
def test_forces_on_other_structures(dtype: torch.dtype, target: str) -> None:
    """Close to the original's on periodic, isolated and single atoms; as equivariant as these."""
    model, probes, evaluate = small_potential(dtype), moved(1), BundledFrontend().evaluate
    result = fxpass.optimize(model, [QUICK], calibration=list(probes), target=target, verify=False)
    turn = random_rotation(np.random.default_rng(1))
    for structure in moved(1, seed=5):
        turned = replace(structure, positions=structure.positions @ turn.T, cell=structure.cell @ turn.T)
        exact, found, rotated = evaluate(model, structure), evaluate(result, structure), evaluate(result, turned)
        assert np.abs(found.forces - exact.forces).max() < 0.05
        assert abs(found.energy - exact.energy) / len(structure) < 0.01
        assert np.abs(rotated.forces - found.forces @ turn.T).max() < (1e-9 if dtype is F64 else 1e-4)


@pytest.mark.slow
def test_inductor() -> None:
    model, probes, evaluate = small_potential(), moved(1), BundledFrontend().evaluate
    result = fxpass.optimize(model, [QUICK], calibration=list(probes), target="inductor", verify=False)
    eager = fxpass.optimize(model, [QUICK], calibration=list(probes), verify=False)
    here, there = evaluate(result, probes[0]), evaluate(eager, probes[0])
    assert np.abs(here.forces - there.forces).max() < 1e-5


@pytest.mark.parametrize("others", ["pin-precision", "tabulate"])
@pytest.mark.parametrize("first", [True, False])
def test_beside_other_passes(others: str, first: bool) -> None:
    program = fxpass.capture(small_potential(), calibration=list(moved(1)))
    order = [QUICK, others] if first else [others, QUICK]
    result = fxpass.run_passes(program, [*order, "differentiate"]).program
    assert _integers(result) > 0
    sample = [program.samples[0][s.name] for s in program.inputs]
    exact = fxpass.run_passes(program, ["differentiate"]).program
    off = run_program(result, sample)["edge_gradient"] - run_program(exact, sample)["edge_gradient"]
    assert off.abs().max() < 0.1


@pytest.mark.mace
@pytest.mark.slow
def test_an_alloy_model(alloy_model_path: Path, alloy_structures: list[Any]) -> None:
    """The bar: forces within 1 meV/A rms on frames never seen, at least 70 % of the weights in 8 bits."""
    calibration = [random_alloy(seed) for seed in range(10, 22)]
    for structure in calibration:
        structure.rattle(0.05, seed=1)
    program = fxpass.capture(alloy_model_path, calibration=calibration)
    choice = Quantize(probes=48, rounds=1, steps=300).choice(program)
    held_out = fxpass.capture(alloy_model_path, calibration=alloy_structures).samples
    judge = Calibration(replace(program, samples=held_out), tuple(r.candidate.name for r in choice.rounded), limit=4)
    found = errors(judge.deviations({r.candidate.name: r.value for r in choice.rounded}))
    assert choice.share >= 0.7
    assert found.rms < 1e-3
    assert found.energy < 1e-3


def test_a_foreign_species_or_nothing_to_calibrate_on() -> None:
    model = small_potential()
    foreign = replace(moved(1)[0], numbers=np.full(len(moved(1)[0]), 92))
    with pytest.raises(StructureError, match="unknown species U"):
        fxpass.optimize(model, [QUICK], calibration=[foreign], budget=1.0)
    with pytest.raises(UsageError, match="calibration set is empty"):
        fxpass.optimize(model, [QUICK], calibration=[], budget=1.0)


def test_a_budget_that_cannot_be_met_is_refused_with_numbers() -> None:
    with pytest.raises(PassError, match=r"the largest force error is .* meV/A .* leaves 0\.0005 meV/A"):
        replace(QUICK, budget="1e-3 meV/A").apply(potential())


def _integers(program: Program) -> int:
    nodes = program.graph.find_nodes(op="get_attr")
    tensors = {str(n.target): attribute(program, n) for n in nodes}
    return sum(t.numel() for t in tensors.values() if t.dtype == torch.int8)


def _same_values(a: Program, b: Program, limit: float) -> None:
    inputs = example_inputs(b, SIZES[0], seed=3)
    for name, value in run_program(b, inputs).items():
        assert (run_program(a, inputs)[name] - value).abs().max() <= limit
