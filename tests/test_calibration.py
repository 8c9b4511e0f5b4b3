"""The molecular dynamics that makes calibration structures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fxpass.calibration import BLOWN_UP, BOLTZMANN, FEMTOSECOND, MASSES, molecular_dynamics
from fxpass.errors import StructureError, UsageError
from fxpass.frontends.bundled import BundledFrontend
from fxpass.models import small_potential
from fxpass.structures import SYMBOLS, Evaluation, Evaluator, Structure, probe_structures

pytestmark = pytest.mark.once

STIFFNESS = 2.0  # eV/Angstrom^2


def crystal(atoms: int = 20, number: int = 29) -> Structure:
    """Atoms on a line, 3 Angstrom apart."""
    positions = 3.0 * np.arange(atoms)[:, None] * np.array([[1.0, 0.0, 0.0]])
    return Structure(np.full(atoms, number), positions, np.zeros((3, 3)), (False, False, False), "crystal")


def springs(to: Structure) -> Evaluator:
    """Every atom tied to where it is in ``to``."""

    def evaluate(structure: Structure) -> Evaluation:
        off = structure.positions - to.positions
        return Evaluation(0.5 * STIFFNESS * float((off**2).sum()), -STIFFNESS * off)

    return evaluate


def test_masses_are_those_of_the_elements() -> None:
    assert len(MASSES) == len(SYMBOLS) and (MASSES > 0).all()
    known = {"H": 1.008, "C": 12.011, "Cu": 63.546, "Au": 196.97, "U": 238.03, "Og": 294.0}
    assert {symbol: MASSES[SYMBOLS.index(symbol)] for symbol in known} == known


def test_units_give_the_period_of_an_oscillator() -> None:
    at = crystal(1)
    start = replace(at, positions=at.positions + np.array([[0.1, 0.0, 0.0]]))
    half_period = np.pi * np.sqrt(MASSES[29] / STIFFNESS) / FEMTOSECOND  # fs
    steps = 200
    frames = molecular_dynamics(
        springs(at),
        start,
        temperature=0.0,
        steps=steps,
        timestep=half_period / steps,
        every=steps,
        friction=1e-12,
    )
    assert np.allclose(frames[-1].positions, [[-0.1, 0.0, 0.0]], atol=1e-4)


def test_the_temperature_is_the_one_asked_for() -> None:
    at = crystal(60)
    frames = molecular_dynamics(
        springs(at), at, temperature=500.0, steps=4000, timestep=4.0, every=10, friction=0.02, seed=1
    )
    squares = np.mean([(f.positions - at.positions) ** 2 for f in frames[50:]])
    assert STIFFNESS * squares == pytest.approx(BOLTZMANN * 500.0, rel=0.05)


def test_the_same_seed_gives_the_same_frames() -> None:
    at = replace(crystal(), head="pbe")

    def run(seed: int) -> list[Structure]:
        return molecular_dynamics(springs(at), at, temperature=300.0, steps=20, timestep=1.0, every=6, seed=seed)

    first, again, other = run(0), run(0), run(1)
    assert [f.name for f in first] == ["crystal@6", "crystal@12", "crystal@18"]
    assert {f.head for f in first} == {"pbe"}
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(first, again, strict=True))
    assert not np.allclose(first[-1].positions, other[-1].positions)
    assert np.array_equal(at.positions, crystal().positions)


@pytest.mark.parametrize("force", [2 * BLOWN_UP, np.nan, np.inf, -np.inf])
def test_forces_that_blow_up_are_refused_with_numbers(force: float) -> None:
    at = crystal(3)

    def evaluate(structure: Structure) -> Evaluation:
        forces = np.zeros((3, 3))
        if not np.array_equal(structure.positions, at.positions):
            forces[1, 2] = force
        return Evaluation(0.0, forces)

    what = r"crystal blows up: at step 1 the force on atom 1 \(Cu\) is (200|nan|inf)"
    with pytest.raises(StructureError, match=what):
        molecular_dynamics(evaluate, at, temperature=300.0, steps=5, timestep=1.0, every=1, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": np.nan},
        {"timestep": 0.0},
        {"friction": 0.0},
        {"every": 0},
        {"steps": 0},
        {"steps": 4, "every": 5},
    ],
)
def test_bad_arguments(wrong: dict[str, float]) -> None:
    at = crystal(2)
    arguments = {"temperature": 300.0, "steps": 10, "timestep": 1.0, "every": 2, **wrong}
    with pytest.raises(UsageError):
        molecular_dynamics(springs(at), at, **arguments)  # type: ignore[arg-type]


def test_a_start_that_cannot_be_evaluated_is_refused() -> None:
    at = crystal(2)
    with pytest.raises(StructureError, match="no atoms"):
        molecular_dynamics(springs(at), crystal(0))
    with pytest.raises(StructureError, match="NaN"):
        molecular_dynamics(springs(at), replace(at, positions=np.full((2, 3), np.nan)))


def test_dynamics_of_a_model_stays_near_its_start() -> None:
    model, frontend = small_potential(), BundledFrontend()
    evaluate: Callable[[Structure], Evaluation] = lambda s: frontend.evaluate(model, s)  # noqa: E731
    probe = probe_structures(model.atomic_numbers.tolist(), model.cutoff)[0]
    frames = molecular_dynamics(evaluate, probe, temperature=300.0, steps=20, every=5)
    moved = [np.abs(f.positions - probe.positions).max() for f in frames]
    assert len(frames) == 4 and 0.01 < max(moved) < 1.0
