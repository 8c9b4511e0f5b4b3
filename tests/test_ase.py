"""Optimised MACE models in ASE: their own calculator, mace-torch's calculator, committees, dynamics."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import fxpass
from conftest import ALLOY
from fxpass.structures import Structure
from fxpass.verify.receipt import on_float32_grid
from mace_models import NUMBERS, build

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

pytestmark = pytest.mark.mace

EXACT = 1e-9  # eV, eV/A, eV/A^3


def atoms(kind: str, seed: int = 0) -> Atoms:
    """A small structure with all species of the small models."""
    from ase import Atoms

    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = 2.1 * grid + rng.normal(scale=0.15, size=grid.shape)
    pbc = {"crystal": True, "cluster": False, "slab": (True, True, False)}[kind]
    cell = None if kind == "cluster" else [[4.3, 0, 0], [0.4, 4.2, 0], [0, 0.3, 4.4 if kind == "crystal" else 12]]
    return Atoms(rng.choice(NUMBERS, len(grid)), positions, cell=cell, pbc=pbc)


@dataclass(frozen=True)
class Pair:
    """A model and what became of it."""

    original: torch.nn.Module
    optimised: fxpass.Optimized


def pair(passes: str = "exact", **options: Any) -> Pair:
    model = build(l_max=1, correlation=2, **options)
    return Pair(model, fxpass.optimize(model, passes, verify=False))


@pytest.fixture(scope="module")
def double() -> Pair:
    return pair()


def mace_calculator(*models: torch.nn.Module, **options: Any) -> Calculator:
    """mace-torch's calculator on copies, because it moves and casts what it is given."""
    from mace.calculators import MACECalculator

    return MACECalculator(models=[copy.deepcopy(model) for model in models], **options)


def results(calculator: Calculator, structure: Atoms) -> dict[str, Any]:
    calculator.calculate(structure, ["energy"])
    return calculator.results


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = EXACT) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.shape(found[name]) == np.shape(value), name
        assert np.allclose(found[name], value, rtol=0, atol=tolerance), name


# --- the calculator of an optimised model


@pytest.mark.parametrize("kind", ["crystal", "cluster", "slab"])
def test_its_calculator_equals_mace(double: Pair, kind: str) -> None:
    from ase.calculators.calculator import PropertyNotImplementedError

    structure = atoms(kind)
    expected = results(mace_calculator(double.original, default_dtype="float64"), structure.copy())
    structure.calc = double.optimised.calculator()
    assert abs(structure.get_potential_energy() - expected["energy"]) < EXACT
    assert abs(structure.get_potential_energy(force_consistent=True) - expected["free_energy"]) < EXACT
    assert np.abs(expected["forces"]).max() > 0.1
    assert np.allclose(structure.get_forces(), expected["forces"], rtol=0, atol=EXACT)
    if kind == "crystal":
        assert np.abs(expected["stress"]).max() > 1e-3
        assert np.allclose(structure.get_stress(), expected["stress"], rtol=0, atol=EXACT)
    else:
        with pytest.raises(PropertyNotImplementedError):
            structure.get_stress()


def test_its_calculator_follows_the_atoms(double: Pair) -> None:
    """Computed again where something changed, and only there."""
    structure, calculator = atoms("crystal"), double.optimised.calculator()
    structure.calc = calculator
    first = structure.get_potential_energy()
    kept = calculator.results["forces"]
    assert structure.get_forces() is not kept and calculator.results["forces"] is kept
    structure.positions[0, 0] += 0.1
    assert abs(structure.get_potential_energy() - first) > 1e-4
    structure.positions[0, 0] -= 0.1
    assert abs(structure.get_potential_energy() - first) < EXACT
    structure.set_cell(structure.cell.array * 1.05, scale_atoms=True)
    assert abs(structure.get_potential_energy() - first) > 1e-4


@pytest.mark.parametrize("kind", ["crystal", "cluster", "slab"])
def test_a_skin_changes_no_bit(kind: str) -> None:
    """Strong motion, wrapped atoms, a cell that breathes, an atom more: as with a list made anew each time."""
    both = pair("exact,preserve-sparsity", layers=1)
    calculators = [both.optimised.calculator(skin=skin) for skin in (0.0, 0.7)]
    start, rng = atoms(kind), np.random.default_rng(3)
    moving, velocity = start.copy(), rng.normal(scale=0.03, size=start.positions.shape)
    for step in range(24):
        moving.positions += velocity
        if step == 10:
            moving.wrap()
        if step == 15 and kind != "cluster":
            moving.set_cell(moving.cell.array * 1.02, scale_atoms=True)
        if step == 18:
            moving += moving[:1]
            moving.positions[-1] += [0.9, 0.9, 0.9]
            velocity = rng.normal(scale=0.03, size=moving.positions.shape)
        found, expected = (results(calculator, moving.copy()) for calculator in calculators)
        assert set(found) == set(expected) == {"energy", "free_energy", "forces", *["stress"] * (kind == "crystal")}
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
    fresh, skinned = (calculator.neighbours.made for calculator in calculators)
    assert fresh == 24 and 1 < skinned < 16


def test_a_skin_is_a_length(double: Pair) -> None:
    with pytest.raises(fxpass.UsageError, match="skin of -1"):
        double.optimised.calculator(skin=-1)


def test_its_stress_is_the_derivative_of_its_energy(double: Pair) -> None:
    from ase.stress import voigt_6_to_full_3x3_stress

    calculator = double.optimised.calculator()
    structure = atoms("crystal")
    structure.calc = calculator
    stress = voigt_6_to_full_3x3_stress(structure.get_stress())
    for i, j in [(0, 0), (1, 2)]:
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * 1e-5
            strained = structure.copy()
            strained.set_cell(structure.cell.array @ strain, scale_atoms=True)
            strained.calc = calculator
            energies.append(strained.get_potential_energy())
        assert abs((energies[0] - energies[1]) / 2e-5 / structure.get_volume() - stress[i, j]) < 1e-7


def test_bad_atoms_are_refused(double: Pair) -> None:
    from ase import Atoms

    calculator = double.optimised.calculator()
    for structure, says in [
        (Atoms("Au", [[0, 0, 0]]), "unknown species Au"),
        (Atoms("C", [[0, 0, np.nan]]), "NaN"),
        (Atoms(), "no atoms"),
        (Atoms("CO", [[0, 0, 0], [0, 0, 0]]), "at the same place"),
    ]:
        structure.calc = calculator
        with pytest.raises(fxpass.StructureError, match=says):
            structure.get_potential_energy()


def test_heads() -> None:
    both = pair("fold-constants", layers=1, heads=["pbe", "Default"])
    structure = atoms("crystal")
    energies = {}
    for head in ("pbe", "Default"):
        expected = results(mace_calculator(both.original, default_dtype="float64", head=head), structure.copy())
        found = results(both.optimised.calculator(head=head), structure.copy())
        assert abs(found["energy"] - expected["energy"]) < EXACT
        assert np.allclose(found["forces"], expected["forces"], rtol=0, atol=EXACT)
        theirs = results(mace_calculator(both.optimised, default_dtype="float64", head=head), structure.copy())
        assert_same(theirs, expected)
        energies[head] = expected["energy"]
    assert abs(energies["pbe"] - energies["Default"]) > 1e-3
    structure.info["head"] = "Default"
    assert abs(results(both.optimised.calculator(), structure)["energy"] - energies["Default"]) < EXACT
    with pytest.raises(fxpass.StructureError, match=r"the head 'none'.*pbe, Default"):
        results(both.optimised.calculator(head="none"), structure)


# --- mace-torch's calculator on an optimised model


@pytest.mark.parametrize("kind", ["crystal", "cluster"])
@pytest.mark.parametrize("atomic", [False, True], ids=["", "atomic stresses"])
def test_maces_calculator_works_unchanged(double: Pair, kind: str, atomic: bool) -> None:
    structure, options = atoms(kind), {"default_dtype": "float64", "compute_atomic_stresses": atomic}
    if atomic and kind == "cluster":
        structure.set_cell([20, 20, 20])  # atomic stresses are per volume
    expected = results(mace_calculator(double.original, **options), structure.copy())
    found = results(mace_calculator(double.optimised, **options), structure.copy())
    assert {"energy", "free_energy", "energies", "node_energy", "forces", "stress"} <= set(expected)
    assert ("stresses" in expected) == atomic
    assert_same(found, expected)


def test_maces_calculator_gives_the_hessian(double: Pair) -> None:
    structure = atoms("cluster")[:4]
    expected = mace_calculator(double.original, default_dtype="float64").get_hessian(structure)
    found = mace_calculator(double.optimised, default_dtype="float64").get_hessian(structure)
    assert np.abs(expected).max() > 0.1
    assert np.allclose(found, expected, rtol=0, atol=1e-8)


def test_a_committee(double: Pair) -> None:
    other = pair("fold-constants", layers=1, seed=1)
    structure = atoms("crystal")
    both = {"default_dtype": "float64"}
    expected = results(mace_calculator(double.original, other.original, **both), structure.copy())
    found = results(mace_calculator(double.optimised, other.optimised, **both), structure.copy())
    assert {"energy_comm", "energy_var", "forces_comm", "stress_var"} <= set(expected)
    assert expected["energy_var"] > 1e-6
    assert_same(found, expected)
    mixed = results(mace_calculator(double.optimised, other.original, **both), structure.copy())
    assert_same(mixed, expected)


def test_a_saved_model_in_maces_calculator(double: Pair, tmp_path: Path) -> None:
    structure = atoms("crystal")
    double.optimised.save(tmp_path / "model.fxp")
    loaded = mace_calculator(fxpass.load(tmp_path / "model.fxp"), default_dtype="float64")
    expected = results(mace_calculator(double.original, default_dtype="float64"), structure.copy())
    assert_same(results(loaded, structure.copy()), expected)


def test_maces_calculator_may_ask_for_another_dtype() -> None:
    """It calls ``.double()`` or ``.float()``, which compiles again: CG coefficients are not cast."""
    single = pair("fold-constants", layers=1, dtype=torch.float32)
    structure = atoms("crystal")
    expected = results(mace_calculator(single.original, default_dtype="float64"), structure.copy())
    asked = mace_calculator(single.optimised, default_dtype="float64")
    assert_same(results(asked, structure.copy()), expected)
    assert next(asked.models[0].parameters()).dtype == torch.float64
    assert next(single.optimised.parameters()).dtype == torch.float32  # a copy was cast

    own = results(mace_calculator(single.optimised, default_dtype="float32"), structure.copy())
    assert own["forces"].dtype == np.float32
    assert np.allclose(own["forces"], expected["forces"], rtol=0, atol=1e-4)
    assert not np.allclose(own["forces"], expected["forces"], rtol=0, atol=1e-12)


# --- the trained alloy model


@dataclass(frozen=True)
class AlloyPair(Pair):
    frames: list[Structure]


@pytest.fixture(scope="module")
def alloy(alloy_model_path: Path, alloy_structures: list[Atoms]) -> AlloyPair:
    """Verified on the reference frames too."""
    frames = [Structure.from_ase(frame, f"frame {k}") for k, frame in enumerate(alloy_structures)]
    original = torch.load(alloy_model_path, weights_only=False)
    return AlloyPair(original, fxpass.optimize(alloy_model_path, example=frames), frames)


@pytest.mark.slow
def test_the_alloy_receipt(alloy: AlloyPair) -> None:
    """float32 forces within 2e-6 eV/A x max(1, |F|max) of the float64 original, and twice its own error."""
    receipt = alloy.optimised.report.receipt
    assert receipt is not None and receipt.passed and receipt.dtype == "float32"
    rows = {(row.structure, row.check): row for row in receipt.rows}
    evaluate = alloy.optimised.frontend.evaluate
    exact = copy.deepcopy(alloy.original).double()
    errors, own, limits = [], [], []
    for frame in alloy.frames:
        grid = on_float32_grid(frame)
        reference = evaluate(exact, grid).forces
        errors.append(np.abs(evaluate(alloy.optimised, grid).forces - reference).max())
        own.append(np.abs(evaluate(alloy.original, grid).forces - reference).max())
        limits.append(2e-6 * max(1.0, np.abs(reference).max()))
        assert rows[frame.name, "forces"].value == pytest.approx(errors[-1], rel=1e-6)
        assert np.abs(reference).max() > 0.5
    print(f"float32 forces: {max(errors):.1e}, the original's own: {max(own):.1e}, allowed: {min(limits):.1e} eV/A")
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True))
    assert max(errors) <= 2 * max(own)


@dataclass(frozen=True)
class Trajectory:
    """Total energies in eV/atom at every step, and where the atoms are at the end."""

    totals: np.ndarray
    positions: np.ndarray

    @property
    def drift(self) -> float:
        """Change along the line of best fit over the whole run, eV/atom."""
        return abs(float(np.polyfit(np.arange(len(self.totals)), self.totals, 1)[0])) * len(self.totals)

    @property
    def fluctuation(self) -> float:
        """Root mean square about that line, eV/atom."""
        steps = np.arange(len(self.totals))
        return float(np.std(self.totals - np.polyval(np.polyfit(steps, self.totals, 1), steps)))


def dynamics(structure: Atoms, calculator: Calculator, steps: int) -> Trajectory:
    """Constant-energy dynamics with a time step of 2 fs."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    structure = structure.copy()
    structure.calc = calculator
    totals: list[float] = []
    run = VelocityVerlet(structure, timestep=2 * units.fs)
    run.attach(lambda: totals.append(structure.get_total_energy() / len(structure)))
    run.run(steps)
    return Trajectory(np.array(totals), structure.positions)


def hot_alloy() -> Atoms:
    """A 108-atom fcc alloy of five elements at 300 K, the same at every call."""
    from ase import units
    from ase.build import bulk

    rng = np.random.default_rng(5)
    structure = bulk("Cu", "fcc", a=3.9, cubic=True).repeat(3)
    structure.numbers = rng.choice(list(ALLOY), size=108)
    momenta = rng.normal(size=(108, 3)) * np.sqrt(structure.get_masses() * 300 * units.kB)[:, None]
    structure.set_momenta(momenta - momenta.mean(axis=0))
    assert structure.get_kinetic_energy() / 108 == pytest.approx(1.5 * 300 * units.kB, rel=0.2)
    return structure


@pytest.mark.slow
def test_dynamics_conserves_energy_as_the_original_does(alloy: AlloyPair) -> None:
    start, steps = hot_alloy(), 200
    theirs = dynamics(start, mace_calculator(alloy.original, default_dtype="float32"), steps)
    ours = dynamics(start, alloy.optimised.calculator(), steps)
    print(f"drift {ours.drift:.2e} / {theirs.drift:.2e}, fluctuation {ours.fluctuation:.2e} / {theirs.fluctuation:.2e}")
    assert len(ours.totals) == len(theirs.totals) == steps + 1
    noise = 3e-7  # eV/atom: one rounding to float32 of the total energy, some 400 eV
    assert ours.drift <= 1.1 * theirs.drift + noise
    assert ours.fluctuation <= 1.1 * theirs.fluctuation + noise
    assert ours.fluctuation < 1e-3 and ours.drift < 1e-3  # and both are dynamics
    assert np.abs(ours.positions - start.positions).max() > 0.1
    assert np.abs(ours.positions - theirs.positions).max() < 1e-2
