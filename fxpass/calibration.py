"""What passes measure on: frames of a short molecular dynamics where the user gives none, and a program's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import StructureError, UsageError
from .frontends.base import Frontend
from .ir.program import Program
from .structures import SYMBOLS, Evaluation, Evaluator, Floats, Structure
from .targets.base import executable

BOLTZMANN = 8.617333262e-5  # eV/K
FEMTOSECOND = 0.09822694788  # in Angstrom sqrt(amu/eV), the unit of time that eV, Angstrom and amu imply
BLOWN_UP = 100.0  # eV/Angstrom; two bonded atoms reach some 50 at half their distance, and no trajectory goes there

# Standard atomic weights (IUPAC 2021, abridged); the longest-lived isotope where an element has none. By atomic
# number; the dummy X, which no model knows, weighs 1.
_WEIGHTS = (
    "1 1.008 4.0026 6.94 9.0122 10.81 12.011 14.007 15.999 18.998 20.180 22.990 24.305 26.982 28.085 30.974 32.06 "
    "35.45 39.95 39.098 40.078 44.956 47.867 50.942 51.996 54.938 55.845 58.933 58.693 63.546 65.38 69.723 72.630 "
    "74.922 78.971 79.904 83.798 85.468 87.62 88.906 91.224 92.906 95.95 97 101.07 102.91 106.42 107.87 112.41 "
    "114.82 118.71 121.76 127.60 126.90 131.29 132.91 137.33 138.91 140.12 140.91 144.24 145 150.36 151.96 157.25 "
    "158.93 162.50 164.93 167.26 168.93 173.05 174.97 178.49 180.95 183.84 186.21 190.23 192.22 195.08 196.97 200.59 "
    "204.38 207.2 208.98 209 210 222 223 226 227 232.04 231.04 238.03 237 244 243 247 247 251 252 257 258 259 262 "
    "267 268 269 270 269 277 281 282 285 286 290 290 293 294 294"
)
MASSES: Floats = np.array(_WEIGHTS.split(), dtype=np.float64)  # amu, by atomic number
assert len(MASSES) == len(SYMBOLS)


def molecular_dynamics(
    evaluate: Evaluator,
    structure: Structure,
    *,
    temperature: float = 300.0,
    steps: int = 200,
    timestep: float = 2.0,
    every: int = 20,
    seed: int = 0,
    friction: float = 0.02,
) -> list[Structure]:
    """Frames of a trajectory at constant temperature and cell.

    Langevin dynamics in the BAOAB splitting (Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34), one
    evaluation a step. Velocities start from the Maxwell-Boltzmann distribution. The same arguments give the same
    frames.

    Args:
        evaluate: the model; only forces are used.
        structure: where the trajectory starts; it is not among the frames.
        temperature: K.
        steps: how many.
        timestep: fs.
        every: steps from one frame to the next.
        seed: of velocities and noise.
        friction: 1/fs.

    Returns:
        ``steps // every`` structures, called ``NAME@STEP``.

    Raises:
        UsageError: an argument is not a positive number (the temperature may be 0), or ``every`` is beyond ``steps``.
        StructureError: the start cannot be evaluated, or the forces blow up on the way.
    """
    positive = {"timestep": timestep, "friction": friction, "every": every, "steps": steps}
    for name, value in {**positive, "temperature": temperature}.items():
        if not (np.isfinite(value) and (value > 0 or (name == "temperature" and value == 0))):
            raise UsageError(f"Molecular dynamics cannot run with {name}={value}.", hint=f"a positive {name}")
    if every > steps:
        raise UsageError(f"A trajectory of {steps} steps has no frame when every {every}th step is kept.")
    structure.check()
    rng = np.random.default_rng(seed)
    masses = MASSES[structure.numbers][:, None]
    thermal = np.sqrt(BOLTZMANN * temperature / masses)
    dt = timestep * FEMTOSECOND
    kept = np.exp(-friction * timestep)
    noise = np.sqrt(1.0 - kept**2) * thermal

    velocities = thermal * rng.normal(size=structure.positions.shape)
    forces = _forces(evaluate(structure), structure, 0)
    frames = []
    for step in range(1, steps + 1):
        velocities += 0.5 * dt * forces / masses
        halfway = structure.positions + 0.5 * dt * velocities
        velocities = kept * velocities + noise * rng.normal(size=velocities.shape)
        structure = replace(structure, positions=halfway + 0.5 * dt * velocities)
        forces = _forces(evaluate(structure), structure, step)
        velocities += 0.5 * dt * forces / masses
        if step % every == 0:
            frames.append(replace(structure, name=f"{structure.name}@{step}"))
    return frames


def _forces(evaluation: Evaluation, structure: Structure, step: int) -> Floats:
    """The forces, if they can be followed."""
    forces = evaluation.forces
    largest = np.abs(forces).max(axis=1)
    bad = np.flatnonzero(~(largest < BLOWN_UP))  # so that a NaN counts
    if bad.size:
        atom = int(bad[np.argmax(np.nan_to_num(largest[bad], nan=np.inf))])
        raise StructureError(
            f"Molecular dynamics of {structure.name} blows up: at step {step} the force on atom {atom} "
            f"({SYMBOLS[structure.numbers[atom]]}) is {largest[atom]:.3g} eV/Angstrom, limit {BLOWN_UP:g}.",
            hint="start from a relaxed structure, at a lower temperature or with a shorter timestep, "
            "or give structures to calibrate on.",
        )
    return forces


def trajectories(model: nn.Module, frontend: Frontend, probes: Iterable[Structure]) -> tuple[Structure, ...]:
    """Frames of short molecular dynamics from the probe structures that have more than one bond."""
    evaluate = partial(frontend.evaluate, model)
    runs = [molecular_dynamics(evaluate, p, temperature=600.0, steps=40, every=8) for p in probes if len(p) > 2]
    return tuple(frame for run in runs for frame in run)


class _Recorder(nn.Module):
    """Stands in for a lowered program, and keeps the inputs that the family's interface gives it."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.run = executable(program)
        self.taken: list[dict[str, Tensor]] = []

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        sample = {spec.name: value.detach() for spec, value in zip(self.program.inputs, inputs, strict=True)}
        self.taken.append(sample)
        return [*self.run(*inputs), *(torch.zeros_like(sample[spec.name]) for spec in self.program.differentiated)]


def sampled(
    program: Program, frontend: Frontend, facts: Mapping[str, Any], structures: Iterable[Structure]
) -> Program:
    """``program``, at stage ``"energy"``, with the inputs that its family makes of ``structures``."""
    recorder = _Recorder(program)
    interface = frontend.interface(recorder, recorder, facts)
    for structure in structures:
        frontend.evaluate(interface, structure)
    return replace(program, samples=tuple(recorder.taken))
