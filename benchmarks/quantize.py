"""What 8-bit weights do to forces: rounding to the nearest, AdaRound layer by layer, and refined on forces.

    python benchmarks/quantize.py MODEL CALIBRATION TEST [--every 4] [--budget "6 meV/A"]

Errors are against the same model with its own weights, in float64, on the frames of TEST; equivariance is the
largest change of rotated forces under the inverse rotation, of the original and of the result.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import fxpass
from fxpass.structures import Structure, probe_structures, read_structures
from fxpass.verify.physics import random_rotation
from fxpass_passes.force_gradients import Calibration, errors
from fxpass_passes.quantize import Quantize

BEFORE = "fold-constants,specialize-species,specialize-heads,dead-irreps,common-subexpressions,dead-code"
AFTER = "differentiate,fold-constants,common-subexpressions,dead-code"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--every", type=int, default=4, help="take every Nth frame of both files")
    parser.add_argument("--budget", default="10 meV/A", help="of the verified result")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    test = read_structures(arguments.test, f"::{arguments.every}")
    calibration = read_structures(arguments.calibration, f"::{arguments.every}")

    plain = fxpass.optimize(arguments.model, f"{BEFORE},{AFTER}", verify=False)
    probes = list(probe_structures(plain.facts["numbers"], plain.facts["cutoff"]))
    captured = fxpass.capture(arguments.model, calibration=calibration)
    program = fxpass.run_passes(captured, BEFORE).program
    judged = replace(program, samples=fxpass.capture(arguments.model, calibration=test).samples[-len(test) :])
    choice = None
    print(f"{len(calibration)} calibration frames, {len(probes)} probe structures, {len(test)} test frames")
    print(f"{'rounding':34} {'int8':>6} {'dE rms':>9} {'dF rms':>9} {'dF max':>9} {'seconds':>8}")
    print(f"{'':34} {'%':>6} {'meV/atom':>9} {'meV/A':>9} {'meV/A':>9}")

    def row(label: str, values: Mapping[str, torch.Tensor], share: float, seconds: float) -> None:
        deviations = Calibration(judged, tuple(values), len(test)).deviations(values)
        found, energy = errors(deviations), torch.stack([d[0] for d in deviations]).square().mean().sqrt().item()
        numbers = f"{1e3 * energy:9.4f} {1e3 * found.rms:9.4f} {1e3 * found.largest:9.4f} {seconds:8.0f}"
        print(f"{label:34} {100 * share:6.1f} {numbers}", flush=True)

    stages = (
        ("to the nearest", Quantize(steps=0, rounds=0, sweeps=0)),
        ("AdaRound, layer by layer", Quantize(rounds=0, sweeps=0)),
        ("AdaRound, refined on forces", Quantize()),
    )
    for label, subject in stages:
        start = time.perf_counter()
        choice = subject.choice(program)
        row(label, {r.candidate.name: r.value for r in choice.rounded}, choice.share, time.perf_counter() - start)

    passes = f"{BEFORE},quantize,{AFTER}"
    result = fxpass.optimize(
        arguments.model, passes, calibration=probes + calibration, budget=arguments.budget, verify=True
    )
    receipt = result.report.receipt
    assert receipt is not None
    print(f"verified within {arguments.budget}: {receipt.summary()}")
    for name, model in (("original", plain), ("int8", result)):
        print(f"equivariance error of {name}: {equivariance(model, test[:4]):.1e} eV/A; file {size(model):,} bytes")


def equivariance(model: fxpass.Optimized, structures: list[Structure]) -> float:
    """Largest difference between forces of rotated structures and rotated forces, eV/Angstrom."""
    turn, worst = random_rotation(np.random.default_rng(0)), 0.0
    for structure in structures:
        turned = replace(structure, positions=structure.positions @ turn.T, cell=structure.cell @ turn.T)
        here, there = (model.frontend.evaluate(model, s).forces for s in (structure, turned))
        worst = max(worst, float(np.abs(there - here @ turn.T).max()))
    return worst


def size(model: fxpass.Optimized) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fxp"
        model.save(path)
        return path.stat().st_size


if __name__ == "__main__":
    main()
