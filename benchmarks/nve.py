"""Energy drift at constant energy: an optimised model against its original, from the same start.

    python benchmarks/nve.py MODEL [--structure FILE@FRAME] [--passes default --passes fast] [--json FILE]

The drift is the slope of the line of best fit through the total energy, times the length of the run.  Each run starts
from the same positions and velocities; the original and every pipeline run in this one process.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import fxpass
from fxpass.api import open_model
from fxpass.calibration import BOLTZMANN, FEMTOSECOND, MASSES
from fxpass.cli.options import find_model, find_structures
from fxpass.structures import Evaluator, Structure, probe_structures


@dataclass(frozen=True)
class Run:
    """One trajectory.

    Attributes:
        pipeline: what ran, ``"original"`` for the model itself.
        drift: eV/atom over the whole run.
        fluctuation: root mean square about the line of best fit, eV/atom.
        temperature: mean, K.
    """

    pipeline: str
    drift: float
    fluctuation: float
    temperature: float


def dynamics(pipeline: str, evaluate: Evaluator, start: Structure, steps: int, timestep: float, kelvin: float) -> Run:
    """Velocity Verlet from Maxwell-Boltzmann velocities at ``kelvin``, without motion of the centre of mass."""
    masses = MASSES[start.numbers][:, None]
    momenta = np.random.default_rng(7).normal(size=start.positions.shape) * np.sqrt(BOLTZMANN * kelvin * masses)
    velocities = (momenta - momenta.mean(axis=0)) / masses
    dt = timestep * FEMTOSECOND
    totals, kinetics = [], []
    now = evaluate(start)
    structure = start
    for _ in range(steps):
        velocities = velocities + 0.5 * dt * now.forces / masses
        structure = replace(structure, positions=structure.positions + dt * velocities)
        now = evaluate(structure)
        velocities = velocities + 0.5 * dt * now.forces / masses
        kinetics.append(0.5 * float((masses * velocities**2).sum()))
        totals.append((now.energy + kinetics[-1]) / len(start))
    line = np.polyfit(np.arange(steps), totals, 1)
    return Run(
        pipeline,
        drift=abs(float(line[0])) * steps,
        fluctuation=float(np.std(totals - np.polyval(line, np.arange(steps)))),
        temperature=float(np.mean(kinetics)) / len(start) / (1.5 * BOLTZMANN),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or example:small")
    parser.add_argument("--structure", default=None, help="FILE@FRAME to start from (default: a probe structure)")
    parser.add_argument("--passes", action="append", help="a pipeline; may be given more than once (default: default)")
    parser.add_argument("--budget", default=None, help="force budget of passes that state none")
    parser.add_argument("--calibration", default=None, help="FILE of structures for passes that calibrate")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--target", default="eager", help="how the results run")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--timestep", type=float, default=2.0, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--json", default=None, help="file to write the figures to")
    arguments = parser.parse_args()
    original, frontend = open_model(find_model(arguments.model))
    original = original.to(getattr(torch, arguments.dtype))
    facts = frontend.attributes(original)
    given = find_structures(arguments.structure)
    start = given[0] if given else probe_structures(facts["numbers"], facts["cutoff"])[0]
    common = (start, arguments.steps, arguments.timestep, arguments.temperature)
    runs = [dynamics("original", lambda s: frontend.evaluate(original, s), *common)]
    for pipeline in arguments.passes or ["default"]:
        calibration = find_structures(arguments.calibration) or None
        result = fxpass.optimize(
            original, pipeline, budget=arguments.budget, calibration=calibration, target=arguments.target
        )
        runs.append(dynamics(pipeline, lambda s, model=result: frontend.evaluate(model, s), *common))
    print(f"{len(start)} atoms, {arguments.steps} steps of {arguments.timestep} fs, {arguments.dtype}")
    print(f"{'pipeline':40} {'drift':>12} {'fluctuation':>12}  (eV/atom)  {'T':>6} K")
    for run in runs:
        print(f"{run.pipeline:40} {run.drift:12.2e} {run.fluctuation:12.2e} {'':11} {run.temperature:6.0f}")
    if arguments.json:
        facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        record = {**facts, "arguments": vars(arguments), "runs": [asdict(run) for run in runs]}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
