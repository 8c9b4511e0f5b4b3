"""``tabulate``: what it finds in the graph, how well tables fit, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import FileCheck

import table_models as models
from fxpass.algebra.piecewise import Grid, parse_grid
from fxpass.api import capture, optimize, run_passes
from fxpass.errors import UsageError, VerificationError
from fxpass.ir import ops
from fxpass.ir.legalize import legalize
from fxpass.ir.program import Program
from fxpass.ir.scalar_functions import ScalarFunction, function_of, scalar_functions
from fxpass.ir.tabulation import check, domain, fit
from fxpass.ir.verifier import verify
from fxpass.pipeline import format_pass, parse
from fxpass.registry import default_registry
from fxpass.testing.contract import PassContract
from fxpass_passes.tabulate import Tabulate
from table_models import CUTOFF, SPECIES, Bessel, Deepmd, Pairs, Potential, Schnet, cluster

pytestmark = pytest.mark.once

BUDGET = 1e-6


def tables(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target is ops.table]


def grids(program: Program) -> list[Grid]:
    return [parse_grid(str(n.args[3])) for n in tables(program)]


@cache
def captured(family: type[Potential], dtype: torch.dtype = torch.float64) -> Program:
    return models.program(family(), dtype)


@cache
def tabulated(family: type[Potential], dtype: torch.dtype = torch.float64) -> Program:
    outcome = Tabulate().apply(captured(family, dtype).copy())
    assert outcome.modified and len(tables(outcome.program)) == 1
    return outcome.program


def program(model: Potential, samples: int = 2) -> Program:
    return models.program(model, samples=samples)


def energy_and_forces(program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The energy, and forces [atoms, 3] by autograd."""
    vectors = inputs[0].clone().requires_grad_()
    (energy,) = program.graph_module(vectors, *inputs[1:])
    (gradient,) = torch.autograd.grad(energy.sum(), vectors)
    sender, receiver = inputs[1]
    forces = gradient.new_zeros(inputs[2].shape[0], 3).index_add(0, sender, gradient)
    return energy.detach(), forces.index_add(0, receiver, -gradient)


def force_error(exact: Program, other: Program, dtype: torch.dtype = torch.float64) -> float:
    """Largest over clusters that no sample is like: other sizes, other seeds."""
    errors = []
    for atoms, seed in ((9, 100), (5, 101), (12, 102)):
        inputs = cluster(dtype, atoms, seed)
        (a, f), (b, g) = energy_and_forces(exact, inputs), energy_and_forces(other, inputs)
        assert torch.allclose(a, b, atol=1e-4)
        errors.append(float((f - g).abs().max()))
    return max(errors)


FAMILIES = pytest.mark.parametrize("family", [Bessel, Schnet, Deepmd])


# --- finding


@pytest.mark.parametrize(
    ("family", "found"),
    [
        (Bessel, [((), 6)]),
        (Schnet, [((0,), 8)]),  # filter times embedding of the sender
        (Deepmd, [((), 1), ((0, 1), 5), ((0, 1), 5), ((), 1)]),  # s, embedding, s times it, s / r
    ],
)
def test_functions_are_found_in_their_widest_form(family: type[Potential], found: list[Any]) -> None:
    functions = scalar_functions(program(family(), samples=0))
    assert [(f.ends, f.channels) for f in functions] == found
    assert [f.tables for f in functions] == [SPECIES ** len(ends) for ends, _ in found]


def test_the_variable_is_the_length_however_it_is_computed() -> None:
    def by_components(vectors: Tensor) -> Tensor:
        x, y, z = vectors.unbind(1)
        return torch.sqrt(x * x + y * y + z * z)

    class Components(Bessel):
        def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
            return self.radial(by_components(vectors).unsqueeze(1))

    for model in (Bessel(), Schnet(), Components()):
        (function,) = scalar_functions(program(model, samples=0))
        lengths = torch.linspace(0.5, 3, 5, dtype=torch.float64)
        torch.testing.assert_close(function.of_length(lengths), lengths.repeat(3))


def test_a_function_of_direction_or_of_features_is_none() -> None:
    class Directed(Bessel):
        def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
            return self.radial(vectors[:, :1] * 0.2 + 2.0)

    class Degree(Bessel):
        def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
            r = vectors.norm(dim=-1, keepdim=True)
            count = torch.zeros_like(species[:, :1]).index_add(0, index[0], torch.ones_like(r))
            return self.radial(r * count.index_select(0, index[0]))

    for model in (Directed(), Degree()):
        before = program(model, samples=0)
        outcome = Tabulate().apply(before.copy())
        assert not outcome.modified and not tables(outcome.program)


def test_rows_that_meet_are_no_function_of_one_edge() -> None:
    """A mean over all edges in the middle of the network."""

    class Mixed(Bessel):
        def radial(self, r: Tensor) -> Tensor:
            hidden = torch.tanh(self.net[0](torch.sin(self.k * r)))
            return self.net[2](hidden - hidden.mean(0, keepdim=True))

    functions = scalar_functions(program(Mixed(), samples=0))
    assert all(f.channels != 6 for f in functions)


def test_functions_evaluate_as_they_do_in_the_program() -> None:
    model = Deepmd()
    before = program(model)
    function = next(f for f in scalar_functions(before) if f.channels == 5)
    r = torch.linspace(0.8, 3.9, 11, dtype=torch.float64)
    for number in range(function.tables):
        sender, receiver = number // SPECIES, number % SPECIES
        pair = [torch.full((11,), end) for end in (sender, receiver)]
        expected = model.embedding(model.switched(r.unsqueeze(1)), *pair)
        found, slope, bend = function.jet(r, torch.full((11,), number), 2)
        torch.testing.assert_close(found, expected)
        h = 1e-5
        near = [function.jet(r + d, torch.full((11,), number), 1) for d in (-h, h)]
        torch.testing.assert_close((near[1][0] - near[0][0]) / (2 * h), slope, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close((near[1][1] - near[0][1]) / (2 * h), bend, rtol=1e-5, atol=1e-6)


def test_layer_norm_keeps_its_second_derivative() -> None:
    """torch's own takes mean and deviation for constants from the third backward pass on, silently."""

    class Normed(Bessel):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(16)

        def radial(self, r: Tensor) -> Tensor:
            return self.net[2](torch.tanh(self.norm(self.net[0](torch.sin(self.k * r) / r * models.envelope(r) + 1))))

    before = program(Normed())
    after = Tabulate().apply(before.copy())
    assert after.modified and force_error(before, after.program) <= BUDGET


# --- the result


@FAMILIES
def test_forces_stay_within_the_default_budget_on_new_structures(family: type[Potential]) -> None:
    after = tabulated(family)
    verify(after)
    assert force_error(captured(family), after) <= BUDGET


@FAMILIES
@pytest.mark.parametrize("order", [3, 5])
def test_certified_bounds_hold_at_random_points(family: type[Potential], order: Any) -> None:
    function = next(f for f in scalar_functions(captured(family)) if f.channels > 1)
    for variant in (function, *([function.nearer] if function.nearer else [])):
        where = domain(variant, 0.5, lengths=torch.tensor([1.0, 3.9]))
        found = fit(variant, where, order, (where.end - where.start) / 40)
        value, slope = check(variant, found, 20_000, seed=1)
        assert value <= found.grid.value_bound <= 10 * max(value, 1e-15)
        assert slope <= found.grid.slope_bound <= 10 * max(slope, 1e-13)


@pytest.mark.parametrize("order", [3, 5])
def test_errors_fall_with_the_known_power_of_the_step(order: Any) -> None:
    function = next(f for f in scalar_functions(program(Bessel())))
    where = domain(function, 0.5)
    errors = [fit(function, where, order, step) for step in (0.04, 0.02)]
    assert math.log2(errors[0].value_error / errors[1].value_error) == pytest.approx(order + 1, abs=0.4)
    assert math.log2(errors[0].slope_error / errors[1].slope_error) == pytest.approx(order, abs=0.4)


def test_auto_takes_the_coarsest_grid_and_wider_budgets_take_wider_steps() -> None:
    before = captured(Bessel)
    steps = []
    for budget in (1e-3, 1e-6, 1e-9):
        after = Tabulate(budget=budget).apply(before.copy()).program
        assert force_error(before, after) <= budget
        steps.append(grids(after)[0].step)
    assert steps[0] > 2 * steps[1] > 4 * steps[2]


def test_the_graph_before_and_after() -> None:
    before = program(Bessel())
    after = Tabulate().apply(before.copy())
    FileCheck().check("aten.sin").check("aten.pow").check("aten.silu").run(str(before.graph))
    check = FileCheck().check("linalg_vector_norm").check("squeeze.dim").check("fxpass.table")
    check.check_not("aten.sin").check_not("aten.silu").run(str(after.program.graph))
    assert after.applications[0].rule == "table" and after.applications[0].removed > 10
    assert after.program.assumptions == ("edge lengths >= 0.3 A",)
    (node,) = tables(after.program)
    assert node.args[1] is None and parse_grid(str(node.args[3])).flat


def test_functions_with_more_dimensions_and_without_channels_keep_their_shape() -> None:
    def function(r: Tensor) -> Tensor:
        wide = torch.exp(-r * torch.arange(1, 7, dtype=r.dtype)) * models.envelope(r)
        return (wide.view(-1, 2, 3) * 2).flatten(1)

    class Flat(Potential):
        def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
            r = vectors.norm(dim=-1)
            return (torch.tanh(torch.exp(-r) * torch.sin(r)) * models.envelope(r)).unsqueeze(1)

    for model in (Pairs(function), Flat()):
        before = program(model)
        after = Tabulate(gain=0.1).apply(before.copy())
        assert after.modified
        verify(after.program)
        assert force_error(before, after.program) <= BUDGET


@FAMILIES
def test_no_edges_one_atom_and_edges_beyond_the_cutoff(family: type[Potential]) -> None:
    before, after = captured(family), tabulated(family)
    vectors, index, hot, batch = cluster(torch.float64, 4, 5)
    alone = (vectors[:0], index[:, :0], hot[:1], batch[:1])
    for a, b in zip(energy_and_forces(before, alone), energy_and_forces(after, alone), strict=True):
        assert torch.equal(a, b)
    lengths = torch.linspace(CUTOFF + 1e-6, 1e6, len(vectors), dtype=torch.float64).unsqueeze(1)
    far = vectors / vectors.norm(dim=1, keepdim=True) * lengths
    one, other = energy_and_forces(before, (far, index, hot, batch)), energy_and_forces(after, (far, index, hot, batch))
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-9)
    assert not other[1].any()


def test_padding_at_infinity_gives_exactly_nothing() -> None:
    after = tabulated(Bessel)
    (node,) = tables(after)
    x = torch.tensor([CUTOFF, 10.0, math.inf], dtype=torch.float64)
    stored = getattr(after.graph_module, str(node.args[2].target))  # type: ignore[union-attr]
    for derivative in (0, 1, 2):
        assert not ops.table(x, None, stored, str(node.args[3]), derivative).any()


@FAMILIES
def test_float32_programs_and_their_float64_twins_share_tables(family: type[Potential]) -> None:
    before, after = captured(family, torch.float32), tabulated(family, torch.float32)
    (node,) = tables(after)
    stored = getattr(after.graph_module, str(node.args[2].target))  # type: ignore[union-attr]
    assert stored.dtype == torch.float64
    scale = float(energy_and_forces(before, cluster(torch.float32, 9, 100))[1].abs().max())
    assert force_error(before, after, torch.float32) <= 1e-5 * max(scale, 1.0)
    twin = after.cast(torch.float64)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in cluster(torch.float32, 9, 100))
    vectors = inputs[0].requires_grad_()
    (energy,) = twin.graph_module(vectors, *inputs[1:])
    (gradient,) = torch.autograd.grad(energy.sum(), vectors)
    h, along = 1e-5, torch.randn_like(vectors)
    sides = [twin.graph_module(vectors.detach() + s * h * along, *inputs[1:])[0] for s in (-1, 1)]
    torch.testing.assert_close((sides[1] - sides[0])[0] / (2 * h), (gradient * along).sum(), rtol=1e-6, atol=1e-6)


def test_differentiated_and_legalised_it_still_has_hessians() -> None:
    inputs = cluster(torch.float64, 4, 9)
    hessians = []
    for one in (captured(Bessel), tabulated(Bessel)):
        derived = legalize(run_passes(replace(one, samples=()), "differentiate").program)
        vectors = inputs[0].clone().requires_grad_()
        gradient = derived.graph_module(vectors, *inputs[1:])[1]
        hessians.append(torch.autograd.grad(gradient.sum(), vectors)[0])
    torch.testing.assert_close(hessians[0], hessians[1], rtol=1e-4, atol=1e-4)


# --- mistakes that existing compressors make, one test each


def nets(model: Deepmd, r: Tensor, number: int) -> Tensor:
    ends = [torch.full((len(r),), end) for end in (number // SPECIES, number % SPECIES)]
    return model.embedding(model.switched(r.unsqueeze(1)), *ends)


def looked_up(after: Program, function: ScalarFunction, r: Tensor, number: int) -> Tensor:
    """The table of ``after`` at edges of length r between species of table ``number``."""
    (node,) = tables(after)
    stored = getattr(after.graph_module, str(node.args[2].target))  # type: ignore[union-attr]
    x = function.of_length(r)[: len(r)]
    return ops.table(x, torch.full((len(r),), number), stored, str(node.args[3]), 0)


def embedding(model: Deepmd, **options: Any) -> tuple[Program, ScalarFunction]:
    """The tabulated program by s, and its function."""
    before = program(model)
    function = next(f for f in scalar_functions(before) if f.channels == 5)
    assert function.nearer is not None
    return Tabulate(over="nearest", **options).apply(before.copy()).program, function.nearer


def test_every_pair_of_types_has_its_own_table_with_its_own_steps() -> None:
    """Elsewhere the coarse step leaks into the next pair: error 1.6e-3 instead of 1.5e-8."""
    model = Deepmd()
    after, function = embedding(model, dx=0.01, order=3)
    (grid,) = grids(after)
    assert grid.coarse > 0
    r = torch.linspace(1.2, 3.9, 101, dtype=torch.float64)
    for number in range(SPECIES**2):
        error = (looked_up(after, function, r, number) - nets(model, r, number)).abs().max()
        assert error <= grid.value_bound < 1e-7


def test_the_coarse_extension_is_used_for_what_calibration_never_met() -> None:
    """Elsewhere it is built and never looked up: errors near 1."""
    model = Deepmd()
    after, function = embedding(model, dx=0.01, order=3)
    (grid,) = grids(after)
    r = torch.linspace(0.2, 1.0, 101, dtype=torch.float64)
    s = model.switched(r)
    beyond = (s > grid.end) & (s < grid.last)
    assert beyond.sum() > 50 and grid.last >= 10 * grid.end
    for number in range(SPECIES**2):
        error = (looked_up(after, function, r, number) - nets(model, r, number)).abs()[beyond]
        assert error.max() < 1e-2


def test_nothing_is_read_past_the_end_of_a_table() -> None:
    model = Deepmd()
    after, function = embedding(model, dx=0.01, order=3)
    r = torch.tensor([1e-6, 1e-3, 0.05], dtype=torch.float64)  # s up to 1e6
    for number in (0, SPECIES**2 - 1):
        (grid,) = grids(after)
        found = looked_up(after, function, r, number)
        assert found.isfinite().all()
        at = torch.tensor([1 / grid.last], dtype=torch.float64)
        slope = (looked_up(after, function, r[:1], number) - looked_up(after, function, r[1:2], number)) / (1e6 - 1e3)
        expected = looked_up(after, function, at, number) + slope * (1e3 - grid.last)
        torch.testing.assert_close(found[1:2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dx", [0.03, 0.07])
def test_a_step_that_does_not_divide_the_range_shifts_no_table(dx: float) -> None:
    """Elsewhere the second table is off by a row: error 5.7e-2 at step 0.03, silently."""
    model = Deepmd()
    after, function = embedding(model, dx=dx, order=5)
    (grid,) = grids(after)
    assert grid.step < dx and grid.start + grid.cells * grid.step == pytest.approx(grid.end, abs=1e-12)
    r = torch.linspace(1.2, 3.9, 101, dtype=torch.float64)
    for number in range(SPECIES**2):
        error = (looked_up(after, function, r, number) - nets(model, r, number)).abs().max()
        assert error <= grid.value_bound < 1e-5


def test_knots_are_float64_also_for_a_float32_model() -> None:
    after = Tabulate(dx=0.01, order=5).apply(captured(Bessel, torch.float32).copy()).program
    (node,) = tables(after)
    assert 0 < parse_grid(str(node.args[3])).slope_bound < 1e-7  # float32 knots: 1e-5


def test_tracers_see_the_op() -> None:
    """Elsewhere it is opaque: the traced graph returns NaN energies and no forces."""
    after = run_passes(tabulated(Bessel), "differentiate").program
    assert [n.args[4] for n in tables(after)] == [0, 1]
    inputs = cluster(torch.float64, 5, 3)
    assert all(value.isfinite().all() and value.any() for value in after.graph_module(*inputs))


# --- refusals


def test_a_table_must_pay() -> None:
    before = program(Pairs(lambda r: models.envelope(r) * torch.ones(1, 40, dtype=r.dtype)))
    outcome = Tabulate(gain=50.0).apply(before.copy())
    assert not outcome.modified
    assert "operations an edge, a table" in outcome.refusals[0].reason and outcome.refusals[0].nodes


def test_tables_by_species_that_are_too_large_are_refused_with_their_size() -> None:
    outcome = Tabulate(max_bytes=30_000).apply(program(Deepmd()).copy())
    (refusal,) = (r for r in outcome.refusals if "9 tables by species take" in r.reason and "add" in r.nodes[0])
    assert "MB" in refusal.reason and "max_bytes is 0.03 MB" in refusal.reason


def test_within_a_refused_function_of_species_the_part_without_them_is_tabulated() -> None:
    outcome = Tabulate(max_bytes=20_000).apply(program(Schnet()).copy())
    assert any("3 tables by species" in r.reason for r in outcome.refusals)
    assert outcome.modified or any("limit is" in r.reason for r in outcome.refusals)


def jagged(r: Tensor) -> Tensor:
    waves = torch.sin(r * torch.arange(1, 9, dtype=r.dtype))
    return torch.cat([(waves.abs() * 3).exp() * models.envelope(r)] * 2, 1)


def test_what_is_not_smooth_enough_is_refused_with_measured_numbers() -> None:
    before = program(Pairs(jagged))
    outcome = Tabulate(gain=0.1).apply(before.copy())
    assert not outcome.modified
    refusal = next(r for r in outcome.refusals if "table of order" in r.reason)
    for words in ("not smooth enough", "cells of", "its slope by", "changes forces by some", "share of the budget"):
        assert words in refusal.reason
    with pytest.raises(VerificationError, match=r"nothing can be tabulated within 1\.0e-04 eV/A: .*not smooth enough"):
        Tabulate(budget="0.1 meV/A", gain=0.1).apply(before.copy())


def test_a_jump_at_the_cutoff_is_refused() -> None:
    before = program(Pairs(lambda r: torch.sin(r * torch.arange(1, 9, dtype=r.dtype)) * (r < CUTOFF)))
    assert any("jumps by" in refusal.reason for refusal in Tabulate(gain=0.1).apply(before.copy()).refusals)


def test_a_function_without_cutoff_ends_where_calibration_does_or_at_r_max() -> None:
    def function(r: Tensor) -> Tensor:
        return torch.sin(r * torch.arange(1, 9, dtype=r.dtype)) / (1 + r)

    assert any("no end" in r.reason for r in Tabulate(gain=0.1).apply(program(Pairs(function), samples=0)).refusals)
    before = program(Pairs(function))
    longest = max(float(s["edge_vectors"].norm(dim=1).max()) for s in before.samples)
    (grid,) = grids(Tabulate(gain=0.1).apply(before.copy()).program)
    assert grid.end == longest and not grid.flat
    (grid,) = grids(Tabulate(r_max=7.5, gain=0.1).apply(before.copy()).program)
    assert grid.end == 7.5


def test_a_function_that_is_not_finite_is_refused() -> None:
    before = program(Pairs(lambda r: torch.sqrt(r - 0.9) * torch.ones(1, 9, dtype=r.dtype) * models.envelope(r)))
    outcome = Tabulate(gain=0.1).apply(before.copy())
    assert not outcome.modified
    assert any("not finite at the length 0.8" in refusal.reason for refusal in outcome.refusals)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dx": 0.0}, "step 0.0"), ({"dx": -1.0}, "step"), ({"r_max": 0.1}, "0.3 to 0.1"), ({"budget": 0.0}, "budget")],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Tabulate(**options).apply(program(Bessel()).copy())


def test_order_must_be_three_or_five() -> None:
    with pytest.raises(UsageError, match="order"):
        parse("tabulate{order=4}", default_registry())


# --- the pass as a pass


def test_options_survive_the_pipeline_text() -> None:
    for one in (Tabulate(), Tabulate(budget="1 meV/A", dx=0.01, order=3, r_max=5.0, over="nearest", max_bytes=7)):
        assert parse(format_pass(one), default_registry()) == (one,)


@pytest.mark.parametrize("seed", [3])
def test_contract(seed: int) -> None:
    options = {"budget": 1e-4, "r_min": 0.05}
    made = [partial(program, Bessel()), partial(program, Schnet()), partial(program, Bessel(), samples=0)]
    plain = partial(program, Pairs(lambda r: models.envelope(r)))
    PassContract(Tabulate(**options), [*made, plain], budget=1e-3, seed=seed).check()  # type: ignore[arg-type]


# --- real models


@pytest.mark.mace
@pytest.mark.slow
def test_mace_in_its_variants() -> None:
    import mace_models

    counts = {"density": 4, "late-cutoff": 2, "nonlinear": 4, "agnesi": 2}
    folded = "fold-constants,specialize-species,common-subexpressions,dead-code"
    for name, count in counts.items():
        before = run_passes(capture(mace_models.build(**mace_models.VARIANTS[name])), folded).program
        outcome = Tabulate().apply(before.copy())
        assert len(tables(outcome.program)) == count, name
        assert all(grid.flat for grid in grids(outcome.program)), name
        assert function_of(before, outcome.applications[0].node) is not None


@pytest.mark.mace
@pytest.mark.slow
def test_a_mace_drop_in_meets_its_receipt_and_refuses_short_edges() -> None:
    import mace_models

    model = mace_models.build()
    passes = "fold-constants,common-subexpressions,tabulate,dead-code,differentiate,fold-constants"
    result = optimize(model, passes, budget=1e-6)
    assert result.report.receipt is not None
    record = next(r for r in result.report.records if r.name == "tabulate")
    assert [a.rule for a in record.applications] == ["table", "table"]
    assert all("conv_tp_weights" in a.module for a in record.applications)
    from ase import Atoms

    near = Atoms("CO", positions=[[0, 0, 0], [0, 0, 0.2]])
    near.calc = result.calculator()
    with pytest.raises(RuntimeError, match="shorter than"):
        near.get_forces()


@pytest.mark.mace
@pytest.mark.slow
def test_the_alloy_model_on_frames_it_never_saw(alloy_model_path: Path, alloy_structures: list[Any]) -> None:
    folded = "fold-constants,specialize-species,common-subexpressions,dead-code"
    before = run_passes(capture(alloy_model_path), folded).program
    after = Tabulate().apply(before.copy()).program
    held_out = capture(alloy_model_path, calibration=alloy_structures).cast(torch.float64).samples
    exact, other = before.cast(torch.float64), after.cast(torch.float64)
    for sample in held_out:
        gradients = []
        for one in (exact, other):
            inputs = [sample[s.name] for s in one.inputs]
            vectors = inputs[0].clone().requires_grad_()
            energy = one.graph_module(vectors, *inputs[1:])[0]
            (gradient,) = torch.autograd.grad(energy.sum(), vectors)
            gradients.append(gradient)
        index, change = sample["edge_index"], gradients[1] - gradients[0]
        forces = change.new_zeros(32, 3).index_add(0, index[0], change).index_add(0, index[1], -change)
        assert forces.abs().max() <= BUDGET
