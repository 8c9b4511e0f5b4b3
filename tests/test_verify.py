"""Verification on an analytic potential: what is right passes, each way of being wrong fails in its own row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fxpass.errors import FxpassError, PackageError, StructureError, UsageError, VerificationError
from fxpass.passes import Exactness
from fxpass.structures import Structure, neighbour_list, probe_structures
from fxpass.verify import Evaluation, Evaluator, Receipt, Row, make_receipt, parse_budget, physics
from fxpass.verify.receipt import on_float32_grid
from fxpass.verify.tolerances import TABLE, tolerance

pytestmark = pytest.mark.once

CUTOFF = 4.0
PROBES = probe_structures([28, 29], CUTOFF)
FEW = tuple(s for s in PROBES if s.name in ("cluster", "triclinic"))
REASSOCIATES = Exactness.REASSOCIATES


@dataclass
class Potential:
    """Lennard-Jones-like pairs and a three-body term, smooth to all orders at the cutoff; counts its calls."""

    dtype: torch.dtype = torch.float64
    reversed_sum: bool = False  # the same potential, summed in the other order
    calls: int = 0

    def energy(self, vectors: torch.Tensor, edges: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Edge vectors to total energy; the three-body term is ``sum_jk f_j f_k (1 + cos + cos^2)`` by moments."""
        sender, receiver = edges
        r = vectors.norm(dim=1)
        inside = 1 - (r / CUTOFF) ** 2
        smooth = torch.exp(-0.5 / inside.clamp(min=1e-3))
        size = 2.3 + 0.05 * (numbers[sender] + numbers[receiver] - 57).to(self.dtype)
        pairs = 0.1 * ((size / r) ** 12 - 2 * (size / r) ** 6) * smooth
        unit, weight = vectors / r[:, None], (torch.exp(-r) * smooth)[:, None]
        second = (unit[:, :, None] * unit[:, None, :]).reshape(-1, 9)
        moments = torch.cat([torch.ones_like(weight), unit, second], dim=1) * weight
        total = torch.zeros(len(numbers), 13, dtype=self.dtype).index_add(0, receiver, moments)
        return 0.5 * pairs.sum() + 3.0 * (total**2).sum() - 1.5 * len(numbers)

    def __call__(self, structure: Structure) -> Evaluation:
        self.calls += 1
        edges, shifts = neighbour_list(structure, CUTOFF)
        if self.reversed_sum:
            edges, shifts = edges[:, ::-1].copy(), shifts[::-1].copy()
        arrays = (structure.positions, structure.cell, shifts)
        positions, cell, shift = (torch.tensor(x, dtype=self.dtype) for x in arrays)
        strain = torch.zeros(3, 3, dtype=self.dtype, requires_grad=True)
        positions.requires_grad_()
        deformation = torch.eye(3, dtype=self.dtype) + 0.5 * (strain + strain.T)
        index = torch.tensor(edges)
        vectors = (positions[index[1]] - positions[index[0]] + shift @ cell) @ deformation
        energy = self.energy(vectors, index, torch.tensor(structure.numbers))
        if edges.size:
            gradient, virial = torch.autograd.grad(energy, (positions, strain))
        else:
            gradient, virial = torch.zeros_like(positions), torch.zeros(3, 3)
        stress = virial.double().numpy() / structure.volume if all(structure.pbc) else None
        return Evaluation(energy.item(), -gradient.double().numpy(), stress, str(self.dtype).removeprefix("torch."))


def receipt(candidate: Evaluator, structures: tuple[Structure, ...] = FEW, dtype: str = "float64") -> Receipt:
    return make_receipt(Potential(), candidate, structures=structures, dtype=dtype, exactness=REASSOCIATES)


def failed(found: Receipt) -> set[str]:
    return {row.check for row in found.failures}


# What is right passes


def test_the_right_forces_pass() -> None:
    reference, candidate = Potential(), Potential(reversed_sum=True)
    seen: list[tuple[str, int, int]] = []
    found = make_receipt(
        reference,
        candidate,
        structures=PROBES,
        dtype="float64",
        exactness=REASSOCIATES,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert found.passed and not found.failures, found.summary()
    checks = {(row.check, row.structure) for row in found.rows}
    symmetry = {"rotation", "inversion", "permutation", "translation", "net force"}
    everywhere = {"energy", "forces", "forces rms"} | symmetry
    for structure in PROBES:
        here = {check for check, name in checks if name == structure.name}
        assert here >= everywhere - ({"permutation"} if structure.name == "atom" else set())
        assert ({"finite differences", "closed loop"} <= here) == (structure.name != "atom")
        assert ({"stress", "strain"} <= here) == all(structure.pbc)
    assert reference.calls + candidate.calls == 107  # as the docstring says
    assert [(done, total) for _, done, total in seen] == [(i, 18) for i in range(18)]
    assert "passed" in found.summary() and "6 structures" in found.summary() and "\n" not in found.summary()


def test_a_float32_result_passes() -> None:
    models = [Potential(), Potential(torch.float32, reversed_sum=True), Potential(torch.float32), Potential()]
    reference, candidate, original, candidate64 = models
    found = make_receipt(
        reference,
        candidate,
        original=original,
        candidate64=candidate64,
        structures=PROBES,
        dtype="float32",
        exactness=REASSOCIATES,
    )
    assert found.passed, found.summary()
    assert sum(model.calls for model in models) <= 118
    assert all("original" in row.note for row in found.rows if row.check in ("energy", "forces", "stress"))
    # Rounding is there to be seen, and derivatives are as good as float64 makes them.
    values = {row.check: row.value for row in found.rows if row.structure == "alloy"}
    assert values["forces"] > 1e-9 and values["finite differences"] < 1e-9 and values["strain"] < 1e-9


def test_finite_differences_and_loops_reach_their_accuracy() -> None:
    potential = Potential()
    for structure in PROBES:
        here = potential(structure)
        if len(structure) == 1:
            continue
        error, plateau = physics.force_error(potential, structure, here)
        assert error < 2e-9, (structure.name, plateau)
        curl, force_constant = physics.curl(potential, structure)
        assert curl < 1e-8 and force_constant > 1e-4
        if here.stress is not None:
            assert physics.stress_error(potential, structure, here)[0] < 1e-10


# Each way of being wrong fails


Damage = Callable[[Structure, Evaluation], Evaluation]


def shifted_forces(structure: Structure, e: Evaluation) -> Evaluation:
    forces = e.forces.copy()
    forces[0, 0] += 1e-5
    return replace(e, forces=forces)


def whirl(structure: Structure, e: Evaluation) -> Evaluation:
    """Forces around the z axis through the centre: no potential has them."""
    x, y, _ = (structure.positions - structure.positions.mean(axis=0)).T
    return replace(e, forces=e.forces + 1e-3 * np.stack([-y, x, 0 * x], axis=1))


def wind(structure: Structure, e: Evaluation) -> Evaluation:
    """A potential, but one with a direction in space."""
    weights = 1e-4 * np.cos(structure.numbers)
    x = structure.positions[:, 0]
    push = np.zeros_like(e.forces)
    push[:, 0] = -weights * np.cos(x)
    return replace(e, energy=e.energy + float((weights * np.sin(x)).sum()), forces=e.forces + push)


def order_dependent(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, energy=e.energy + 1e-6 * float(structure.numbers[0]))


def handed(structure: Structure, e: Evaluation) -> Evaluation:
    """Energy by the handedness of the first four atoms."""
    p = structure.positions
    return e if len(p) < 4 else replace(e, energy=e.energy + 1e-4 * float(np.linalg.det(p[1:4] - p[0])))


def scaled_energy(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, energy=e.energy * (1 + 1e-7))


def flipped_stress(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, stress=None if e.stress is None else -e.stress)


def nan_energy(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, energy=np.nan)


def nan_forces(structure: Structure, e: Evaluation) -> Evaluation:
    forces = e.forces.copy()
    forces[-1, -1] = np.nan
    return replace(e, forces=forces)


def infinite_forces(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, forces=np.full_like(e.forces, np.inf))


def nan_stress(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, stress=None if e.stress is None else np.full((3, 3), np.nan))


def no_stress(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, stress=None)


def other_dtype(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, dtype="float32")


def too_many_forces(structure: Structure, e: Evaluation) -> Evaluation:
    return replace(e, forces=np.concatenate([e.forces, e.forces]))


def damaged(damage: Damage) -> Evaluator:
    potential = Potential()
    return lambda structure: damage(structure, potential(structure))


@pytest.mark.parametrize(
    ("damage", "rows"),
    [
        (shifted_forces, {"forces", "finite differences", "net force", "permutation"}),
        (whirl, {"forces", "finite differences", "closed loop", "rotation"}),
        (wind, {"energy", "forces", "rotation", "translation", "net force"}),
        (order_dependent, {"energy", "permutation"}),
        (handed, {"energy", "inversion"}),
        (scaled_energy, {"energy", "finite differences"}),
        (flipped_stress, {"stress", "strain"}),
        (nan_energy, {"energy", "rotation", "finite differences"}),
        (nan_forces, {"forces", "rotation", "finite differences", "closed loop", "net force"}),
        (infinite_forces, {"forces", "finite differences", "closed loop"}),
        (nan_stress, {"stress", "strain"}),
        (no_stress, {"evaluation"}),
        (other_dtype, {"evaluation"}),
        (too_many_forces, {"evaluation"}),
    ],
)
def test_what_is_wrong_fails_in_its_row(damage: Damage, rows: set[str]) -> None:
    found = receipt(damaged(damage))
    assert not found.passed
    assert failed(found) >= rows, found.summary()
    assert "FAILED" in found.summary() and "\n" not in found.summary()


@pytest.mark.parametrize(
    ("damage", "untouched"),
    [
        (shifted_forces, {"energy", "stress", "strain"}),
        (wind, {"finite differences", "closed loop", "permutation", "stress"}),
        (flipped_stress, {"energy", "forces", "finite differences", "closed loop", "rotation", "inversion"}),
        (handed, {"forces", "rotation", "translation", "stress"}),
    ],
)
def test_what_is_right_beside_it_still_passes(damage: Damage, untouched: set[str]) -> None:
    assert not failed(receipt(damaged(damage))) & untouched


def test_every_structure_is_judged() -> None:
    """A result that is wrong on one structure only."""

    def on_the_dimer(structure: Structure, e: Evaluation) -> Evaluation:
        return shifted_forces(structure, e) if structure.name == "dimer" else e

    found = receipt(damaged(on_the_dimer), PROBES)
    assert {row.structure for row in found.failures} == {"dimer"}


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor this size"), ValueError(), FxpassError("refused")])
def test_what_cannot_be_computed_fails_with_the_reason(error: Exception) -> None:
    def raising(structure: Structure, e: Evaluation) -> Evaluation:
        if len(structure) == 5 and structure.pbc[0]:
            raise error
        return e

    found = receipt(damaged(raising), PROBES)
    (row,) = found.failures
    assert (row.check, row.structure) == ("evaluation", "slab")
    assert "could not be computed" in row.note and "\n" not in row.note
    assert np.isnan(row.value) and row.note in found.summary()


def test_a_check_that_breaks_off_fails_alone() -> None:
    def only_right_way_up(structure: Structure, e: Evaluation) -> Evaluation:
        if structure.name == "cluster" and structure.positions[3, 2] < 0:
            raise RuntimeError("upside down")
        return e

    found = receipt(damaged(only_right_way_up), PROBES[1:2])
    assert "inversion" in failed(found) and failed(found) <= {"inversion", "rotation"}
    assert all("upside down" in row.note for row in found.failures)


def test_a_broken_reference_fails() -> None:
    for damage in (nan_energy, nan_forces, infinite_forces, other_dtype):
        broken = make_receipt(
            damaged(damage), Potential(), structures=PROBES[:1], dtype="float64", exactness=REASSOCIATES
        )
        assert not broken.passed, damage.__name__


def test_bugs_in_an_evaluator_are_not_hidden() -> None:
    def interrupted(structure: Structure, e: Evaluation) -> Evaluation:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        receipt(damaged(interrupted))


def test_float32_needs_its_float64_twin() -> None:
    found = receipt(Potential(torch.float32), PROBES[:1], "float32")
    assert failed(found) == {"finite differences", "closed loop", "strain"}
    assert all("was not given" in row.note for row in found.failures)


def test_derivatives_of_a_float32_result_are_tested_on_its_twin() -> None:
    found = make_receipt(
        Potential(),
        Potential(torch.float32),
        candidate64=damaged(whirl),
        structures=PROBES[:1],
        dtype="float32",
        exactness=REASSOCIATES,
    )
    assert failed(found) == {"finite differences", "closed loop"}


def test_the_same_flaw_in_the_original_is_allowed_for() -> None:
    """A model that breaks a symmetry is compiled as it is, but may not be made worse."""

    def thrice(structure: Structure, e: Evaluation) -> Evaluation:
        return wind(structure, wind(structure, wind(structure, e)))

    same = make_receipt(damaged(wind), damaged(wind), structures=FEW, dtype="float64", exactness=REASSOCIATES)
    assert same.passed, same.summary()
    assert any(row.check == "rotation" and "original" in row.note for row in same.rows)
    worse = make_receipt(damaged(wind), damaged(thrice), structures=FEW, dtype="float64", exactness=REASSOCIATES)
    assert {"rotation", "translation"} <= failed(worse)


# Limits


def noisy(amplitude: float) -> Evaluator:
    """A float32 model with an error of its own, the same at every call."""
    potential = Potential(torch.float32)

    def evaluate(structure: Structure) -> Evaluation:
        e = potential(structure)
        noise = np.random.default_rng(len(structure)).choice([-amplitude, amplitude], size=e.forces.shape)
        return replace(e, forces=e.forces + noise)

    return evaluate


@pytest.mark.parametrize(("own", "passes"), [(0.0, False), (0.7e-6, True), (None, True)])
def test_float32_is_no_worse_than_twice_the_original(own: float | None, passes: bool) -> None:
    structures = (PROBES[1],)  # largest force below 1 eV/A
    found = make_receipt(
        Potential(),
        noisy(1.2e-6),
        original=None if own is None else noisy(own),
        candidate64=Potential(),
        structures=structures,
        dtype="float32",
        exactness=REASSOCIATES,
    )
    assert ("forces" not in failed(found)) == passes, found.summary()


@pytest.mark.parametrize(("error", "passes"), [(1e-4, True), (3e-4, False)])
def test_an_ill_conditioned_original_sets_the_limit(error: float, passes: bool) -> None:
    found = make_receipt(
        Potential(),
        noisy(error),
        original=noisy(1e-4),
        candidate64=Potential(),
        structures=PROBES[:1],
        dtype="float32",
        exactness=REASSOCIATES,
    )
    assert ("forces" not in failed(found)) == passes, found.summary()


@pytest.mark.parametrize(("budget", "passes"), [(1e-3, True), (1e-6, False)])
def test_a_budget_is_held(budget: float, passes: bool) -> None:
    """A softened potential: conservative and symmetric, with forces off by some 1e-5 eV/A."""

    def softened(structure: Structure, e: Evaluation) -> Evaluation:
        scale = 1 - 1e-5
        stress = None if e.stress is None else e.stress * scale
        return replace(e, energy=e.energy * scale, forces=e.forces * scale, stress=stress)

    found = make_receipt(
        Potential(),
        damaged(softened),
        structures=FEW,
        dtype="float64",
        exactness=Exactness.APPROXIMATE,
        budget=budget,
    )
    assert found.passed == passes, found.summary()
    assert found.budget == budget
    if not passes:
        assert failed(found) >= {"forces"} and not failed(found) & {"finite differences", "closed loop", "strain"}


def test_a_budget_does_not_excuse_forces_that_are_no_gradient() -> None:
    found = make_receipt(
        Potential(),
        damaged(lambda s, e: replace(e, forces=e.forces * (1 + 1e-5))),
        structures=FEW,
        dtype="float64",
        exactness=Exactness.APPROXIMATE,
        budget=1e-2,
    )
    assert failed(found) == {"finite differences"}


def test_the_table_holds_the_bars() -> None:
    f64, f32 = TABLE["float64"].values, TABLE["float32"].values
    assert (f64["energy"].limit(1.0), f64["forces"].limit(10.0)) == (1e-10, 1e-9)
    assert (f32["forces"].limit(0.1), f32["forces"].limit(10.0)) == (2e-6, pytest.approx(2e-5))
    approximate = tolerance("float32", Exactness.APPROXIMATE, 1e-3)
    assert approximate.values == TABLE["float32"].values  # what the type costs anyway, and beyond it the budget
    assert approximate.allowance == {"energy": 1e-4, "forces": 1e-3, "stress": 1e-4}
    assert approximate.gradient == TABLE["float32"].gradient
    assert tolerance("float64", Exactness.EXACT, 1.0) is TABLE["float64"]  # a budget loosens nothing exact


def test_bad_requests() -> None:
    with pytest.raises(StructureError, match="at least one structure"):
        receipt(Potential(), ())
    with pytest.raises(StructureError, match="no atoms"):
        receipt(Potential(), (replace(PROBES[0], numbers=np.zeros(0)),))
    with pytest.raises(UsageError, match="no tolerances for bfloat16"):
        receipt(Potential(), FEW, "bfloat16")
    with pytest.raises(UsageError, match="need a budget"):
        tolerance("float32", Exactness.APPROXIMATE)

    def knows_no_copper(structure: Structure) -> Evaluation:
        structure.check(known_numbers=[28])
        return Potential()(structure)

    with pytest.raises(StructureError, match="unknown species Cu; known are Ni"):
        receipt(knows_no_copper)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 meV/A", 1e-3),
        ("2.5meV/Å", 2.5e-3),
        ("0.5 eV/Angstrom", 0.5),
        ("1e-4 eV/\u212b", 1e-4),
        ("3 meV / Ang", 3e-3),
        ("1E-3", 1e-3),
        (0.002, 0.002),
        (1, 1.0),
    ],
)
def test_budgets(text: str | float, value: float) -> None:
    assert parse_budget(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "meV/A", "1 MeV/A", "1 meV", "-1 meV/A", "0", "nan", "inf", "1 kcal/mol", "1 eV/A eV/A", True, -0.1]
)
def test_what_is_no_budget(text: str | float) -> None:
    with pytest.raises(UsageError, match="is not a force budget"):
        parse_budget(text)


# The receipt itself


def test_json_round_trip() -> None:
    found = receipt(damaged(nan_forces), PROBES[:2])
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(data) == ["passed", "dtype", "exactness", "budget", "rows"]
    assert all(list(row) == ["check", "structure", "value", "limit", "unit", "passed", "note"] for row in data["rows"])
    back = Receipt.from_json(data)
    assert (back.passed, back.dtype, back.exactness, back.budget) == (False, "float64", REASSOCIATES, None)
    assert [row.passed for row in back.rows] == [row.passed for row in found.rows]
    assert back.to_json() == found.to_json()


def test_a_receipt_is_judged_by_its_numbers() -> None:
    data = Receipt((Row("forces", "a", 2.0, 1.0, "eV/A"),), "float64", REASSOCIATES).to_json()
    data["passed"] = data["rows"][0]["passed"] = True
    assert not Receipt.from_json(data).passed


@pytest.mark.parametrize(
    "change",
    [{"rows": None}, {"rows": [{"check": "forces"}]}, {"exactness": "roughly"}, {"dtype": ...}, {"budget": "much"}],
)
def test_what_is_no_receipt(change: dict[str, object]) -> None:
    data = {"passed": True, "dtype": "float64", "exactness": "exact", "budget": None, "rows": [], **change}
    data = {key: value for key, value in data.items() if value is not ...}
    with pytest.raises(PackageError, match="not a receipt"):
        Receipt.from_json(data)


@pytest.mark.parametrize(
    ("value", "limit", "passes"),
    [(1.0, 1.0, True), (1.1, 1.0, False), (np.nan, 1.0, False), (0.0, np.nan, False), (np.inf, np.inf, False)],
)
def test_rows_fail_closed(value: float, limit: float, passes: bool) -> None:
    assert Row("forces", "a", value, limit, "eV/A").passed is passes


def test_nothing_checked_is_nothing_passed() -> None:
    empty = Receipt((), "float64", REASSOCIATES)
    assert not empty.passed and "FAILED" in empty.summary()


# Physics by itself


def test_rotations_are_proper() -> None:
    for seed in range(20):
        r = physics.random_rotation(np.random.default_rng(seed))
        assert np.allclose(r @ r.T, np.eye(3)) and np.linalg.det(r) == pytest.approx(1.0)


def test_slope_takes_no_expected_value() -> None:
    found = physics.slope(np.exp)
    assert found.value == pytest.approx(1.0, abs=1e-11)
    assert [step for step, _ in found.scan] == list(physics.STEPS)
    kink = physics.slope(lambda x: np.exp(x) + 5.0 * abs(x - 1e-3) ** 3)  # a knot of a spline within the scan
    assert kink.value == pytest.approx(1.0 - 15e-6, abs=1e-8)
    assert np.isnan(physics.slope(lambda x: np.nan).value)


def test_deviation_refuses_a_stress_on_one_side() -> None:
    here = Potential()(PROBES[0])
    with pytest.raises(VerificationError, match="missing on the other"):
        physics.deviation(here, replace(here, stress=None))


def test_the_float32_grid_is_exact() -> None:
    for structure in PROBES:
        snapped = on_float32_grid(structure)
        assert np.abs(snapped.positions - structure.positions).max() < 1e-5
        (senders, receivers), shifts = neighbour_list(snapped, CUTOFF)
        exact = snapped.positions[receivers] - snapped.positions[senders] + shifts @ snapped.cell
        positions, cell = snapped.positions.astype(np.float32), snapped.cell.astype(np.float32)
        assert np.array_equal(positions[receivers] - positions[senders] + shifts.astype(np.float32) @ cell, exact)
