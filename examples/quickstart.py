"""Optimise the potential that comes with fxpass, read the receipt, run molecular dynamics, plot the energy.

    python examples/quickstart.py
    python examples/quickstart.py --steps 20 --plot energy.svg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import nn

import fxpass
from fxpass.models import collate, small_potential
from fxpass.render.svg import Series, line_plot
from fxpass.render.terminal import console, graph_diff, pipeline_table, receipt_table
from fxpass.structures import Floats

MASSES = {29: 63.546, 47: 107.868, 79: 196.967}  # u
BOLTZMANN = 8.617333e-5  # eV/K
ACCELERATION = 9.648533e-3  # 1 eV/(Angstrom u) in Angstrom/fs^2


class Stages:
    """Watches the passes and keeps a snapshot of the program before the first and after each of them."""

    def __init__(self) -> None:
        self.snapshots: list[fxpass.Snapshot] = []

    def on_pass_start(self, pass_: fxpass.Pass, program: fxpass.Program) -> None:
        if not self.snapshots:
            self.snapshots.append(fxpass.snapshot(program, "capture"))

    def on_pass_end(self, record: fxpass.PassRecord, before: fxpass.Program, after: fxpass.Program) -> None:
        self.snapshots.append(fxpass.snapshot(after, record.name, seconds=record.seconds))


def alloy(rng: np.random.Generator) -> fxpass.Structure:
    """32 atoms of Cu, Ag and Au at random on an fcc lattice."""
    cell = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    corners = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)])
    positions = 3.95 * (corners[:, None] + cell).reshape(-1, 3)
    return fxpass.Structure(rng.choice(list(MASSES), size=32), positions, 7.9 * np.eye(3), (True, True, True), "alloy")


def forces(model: nn.Module, structure: fxpass.Structure) -> tuple[float, Floats]:
    """Energy in eV and forces in eV/Angstrom."""
    result = model(collate([structure], list(MASSES), model.cutoff))
    return float(result["energy"]), result["forces"].double().numpy()


def dynamics(
    model: nn.Module, structure: fxpass.Structure, velocities: Floats, steps: int, dt: float
) -> Iterator[float]:
    """Velocity Verlet in steps of ``dt`` fs; yields the total energy in eV/atom before each step."""
    mass = np.array([MASSES[z] for z in structure.numbers.tolist()])[:, None]
    potential, force = forces(model, structure)
    for _ in range(steps):
        yield (potential + 0.5 * float((mass * velocities**2).sum()) / ACCELERATION) / len(structure)
        velocities = velocities + 0.5 * dt * ACCELERATION * force / mass
        structure = replace(structure, positions=structure.positions + dt * velocities)
        potential, force = forces(model, structure)
        velocities = velocities + 0.5 * dt * ACCELERATION * force / mass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of molecular dynamics, 2 fs each")
    parser.add_argument("--temperature", type=float, default=300.0, help="at the start, K")
    parser.add_argument("--plot", type=Path, default=Path("quickstart.svg"), help="the picture to write")
    options = parser.parse_args()

    model = small_potential()
    stages = Stages()
    optimized = fxpass.optimize(model, observers=[stages])

    screen = console()
    for before, after in pairwise(stages.snapshots):
        screen.print(graph_diff(fxpass.diff(before, after), limit=1))
    screen.print(pipeline_table(optimized.report.records))
    screen.print(receipt_table(optimized.report.receipt.to_json()))

    rng = np.random.default_rng(0)
    structure = alloy(rng)
    mass = np.array([MASSES[z] for z in structure.numbers.tolist()])[:, None]
    velocities = rng.normal(size=(32, 3)) * np.sqrt(BOLTZMANN * options.temperature * ACCELERATION / mass)
    lines = []
    for name, potential in (("original", model), ("optimised", optimized)):
        start = time.perf_counter()
        energies = np.array(list(dynamics(potential, structure, velocities, options.steps, 2.0)))
        each = 1000 * (time.perf_counter() - start) / options.steps
        print(f"{name}: total energy within {1000 * np.ptp(energies):.3f} meV/atom, {each:.0f} ms/step")
        lines.append(Series(name, 0.002 * np.arange(options.steps), 1000 * (energies - energies[0])))
    picture = line_plot(
        lines, title="Energy conservation of 32 atoms", x_label="time (ps)", y_label="change of total energy (meV/atom)"
    )
    options.plot.write_text(picture)
    print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
