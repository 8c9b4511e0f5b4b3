"""What must hold for any interatomic potential, tested on any evaluator.

An evaluator maps a structure to energy, forces and stress; nothing here knows what computes them. Random
rotations, permutations and directions come from fixed seeds, so that two evaluators see the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import VerificationError
from ..structures import Evaluation, Evaluator, Floats, Structure


def deviation(found: Evaluation, expected: Evaluation) -> dict[str, float]:
    """Largest differences between two evaluations of one structure; NaN where either has NaN.

    Returns:
        ``energy`` in eV/atom, and the largest component of ``forces`` (eV/Angstrom) and, where there is one, of
        ``stress`` (eV/Angstrom^3).

    Raises:
        VerificationError: only one of them has a stress.
    """
    differences = {
        "energy": abs(found.energy - expected.energy) / len(expected.forces),
        "forces": largest(found.forces - expected.forces),
    }
    if found.stress is not None and expected.stress is not None:
        differences["stress"] = largest(found.stress - expected.stress)
    elif found.stress is not None or expected.stress is not None:
        raise VerificationError("stress is there on one side and missing on the other")
    return differences


def largest(values: Floats) -> float:
    """Largest absolute component, NaN if any is NaN."""
    return float(np.abs(values).max())


# Symmetry. Each operation returns the transformed structure, and how an evaluation must transform with it.

Transformed = tuple[Structure, Callable[[Evaluation], Evaluation]]


def random_rotation(rng: np.random.Generator) -> Floats:
    """A rotation matrix (determinant 1), uniform over SO(3): a normalised Gaussian quaternion."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotated(structure: Structure) -> Transformed:
    """A random proper rotation, the cell rotates along."""
    r = random_rotation(np.random.default_rng(1))
    moved = replace(structure, positions=structure.positions @ r.T, cell=structure.cell @ r.T)

    def expected(e: Evaluation) -> Evaluation:
        return replace(e, forces=e.forces @ r.T, stress=None if e.stress is None else r @ e.stress @ r.T)

    return moved, expected


def inverted(structure: Structure) -> Transformed:
    """Inversion of space; a lattice is its own inverse, so the cell stays as it is."""
    return replace(structure, positions=-structure.positions), lambda e: replace(e, forces=-e.forces)


def permuted(structure: Structure) -> Transformed:
    """A random order of the atoms."""
    order = np.random.default_rng(2).permutation(len(structure))
    moved = replace(structure, numbers=structure.numbers[order], positions=structure.positions[order])
    return moved, lambda e: replace(e, forces=e.forces[order])


def translated(structure: Structure) -> Transformed:
    """A translation, by a vector that is exact in any floating-point format."""
    return replace(structure, positions=structure.positions + np.array([0.8125, -1.375, 0.5625])), lambda e: e


SYMMETRIES: dict[str, Callable[[Structure], Transformed]] = {
    "rotation": rotated,
    "inversion": inverted,
    "permutation": permuted,
    "translation": translated,
}


def symmetry_error(name: str, evaluate: Evaluator, structure: Structure, here: Evaluation) -> dict[str, float]:
    """The ``deviation`` of an evaluator from the symmetry ``name``, one of ``SYMMETRIES``. One evaluation.

    Args:
        here: what ``evaluate`` says about ``structure`` itself.
    """
    moved, expected = SYMMETRIES[name](structure)
    return deviation(evaluate(moved), expected(here))


# Derivatives


@dataclass(frozen=True)
class Slope:
    """A derivative by finite differences.

    Attributes:
        value: the extrapolated derivative.
        scan: the central difference at each step size, largest step first.
    """

    value: float
    scan: tuple[tuple[float, float], ...]

    def plateau(self, expected: float) -> str:
        """How far each step is from ``expected``, as text: falls with the step squared, then rises by rounding."""
        return ", ".join(f"h={step:.0e}: {abs(value - expected):.0e}" for step, value in self.scan)


STEPS = (3e-3, 3e-4, 3e-5)  # Angstrom, or strain


def slope(function: Callable[[float], float], steps: Sequence[float] = STEPS) -> Slope:
    """Derivative of ``function`` at 0: central differences, extrapolated to step 0. Two evaluations a step.

    Central differences are even in the step, so each pair of columns of the Neville scheme removes one power of
    the step squared. Of all entries the one that its neighbours agree with best is taken; the expected value has
    no say (Ridders, Adv. Eng. Softw. 4, 75 (1982)).

    Args:
        function: of one variable.
        steps: decreasing step sizes, two or more.
    """
    column = [(function(h) - function(-h)) / (2 * h) for h in steps]
    scan = tuple(zip(steps, column, strict=True))
    best, error = np.nan, np.inf
    for order in range(1, len(steps)):
        following = []
        for k in range(order, len(steps)):
            coarse, fine = column[k - order], column[k - order + 1]
            value = fine + (fine - coarse) / ((steps[k - order] / steps[k]) ** 2 - 1)
            following.append(value)
            spread = max(abs(value - coarse), abs(value - fine))
            if spread < error:
                best, error = value, spread
        column = following
    return Slope(best, scan)


def _signs(structure: Structure, seed: int) -> Floats:
    """A random direction in which every coordinate moves by one step: no component escapes the test."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=structure.positions.shape)


def force_error(evaluate: Evaluator, structure: Structure, here: Evaluation) -> tuple[float, str]:
    """``|F . d + dE/dd|`` along a random direction ``d`` of components ±1, eV/Angstrom; 6 evaluations.

    An error in one force component appears at its full size, errors in many add up as a random walk.

    Args:
        here: what ``evaluate``, which should compute in float64, says about ``structure`` itself.

    Returns:
        The error, and the scan over step sizes as text.
    """
    direction = _signs(structure, 3)
    expected = -float((here.forces * direction).sum())
    found = slope(lambda h: evaluate(replace(structure, positions=structure.positions + h * direction)).energy)
    return abs(found.value - expected), found.plateau(expected)


def stress_error(evaluate: Evaluator, structure: Structure, here: Evaluation) -> tuple[float, str]:
    """``|stress : d - dE/dd / V|`` for a random symmetric strain ``d`` of components ±1, eV/Angstrom^3; 6 evaluations.

    Returns:
        The error, and the scan over step sizes as text.

    Raises:
        VerificationError: ``here`` has no stress.
    """
    if here.stress is None:
        raise VerificationError("there is no stress")
    upper = np.triu(np.random.default_rng(4).choice([-1.0, 1.0], size=(3, 3)))
    direction = upper + np.triu(upper, 1).T
    expected = float((here.stress * direction).sum())

    def energy_density(h: float) -> float:
        strain = np.eye(3) + h * direction
        strained = replace(structure, positions=structure.positions @ strain, cell=structure.cell @ strain)
        return evaluate(strained).energy / structure.volume

    found = slope(energy_density)
    return abs(found.value - expected), found.plateau(expected)


# Small, because the forces of tabulated potentials have kinks; the error that these leave falls with the radius.
LOOP_POINTS, LOOP_RADIUS = 6, 1e-5  # Angstrom


def curl(evaluate: Evaluator, structure: Structure) -> tuple[float, float]:
    """Work around a closed loop over its area: 0 for forces that are a gradient. 6 evaluations.

    The loop is a circle in the plane of two random directions in the space of all coordinates. On a circle the
    trapezoidal rule is exact up to the fifth order in the radius (Trefethen and Weideman, SIAM Rev. 56, 385
    (2014)), which leaves rounding: at this radius as accurate as Gauss-Legendre rules with far more points.

    Returns:
        ``(curl, force_constant)``: the work over the area, eV/Angstrom^2, the antisymmetric part of the force
        constants between the two directions (each of unit length); and the size of their symmetric part, from the
        same evaluations, by which to judge it.
    """
    first = _signs(structure, 5)
    half = np.arange(first.size) % 2 * 2.0 - 1.0  # as many of either sign: the two directions are never parallel
    second = first * np.random.default_rng(6).permutation(half).reshape(first.shape)
    angles = 2 * np.pi * np.arange(LOOP_POINTS) / LOOP_POINTS
    outward = [np.cos(t) * first + np.sin(t) * second for t in angles]
    tangents = [np.cos(t) * second - np.sin(t) * first for t in angles]
    forces = np.array(
        [evaluate(replace(structure, positions=structure.positions + LOOP_RADIUS * d)).forces for d in outward]
    )
    change = forces - forces.mean(axis=0)
    per_area = 2 / (LOOP_POINTS * LOOP_RADIUS * first.size)
    work = sum(float((f * t).sum()) for f, t in zip(change, tangents, strict=True))
    stretch = sum(abs(float((f * d).sum())) for f, d in zip(change, outward, strict=True))
    return abs(work) * per_area, stretch * per_area
