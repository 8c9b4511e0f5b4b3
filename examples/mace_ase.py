"""A MACE model in ASE: optimise it, compare it with the original, run molecular dynamics with both.

    python examples/mace_ase.py
    python examples/mace_ase.py --model my.model --steps 200

Without --model a small MACE with random weights stands in for a trained one.  Needs mace-torch and ase:
pip install "fxpass[mace]".
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from mace import modules
from mace.calculators import MACECalculator

# isort: split
from e3nn import o3  # after mace, which lets e3nn 0.4.4 be imported

import fxpass
from fxpass.render.terminal import console, pipeline_table


def random_mace() -> torch.nn.Module:
    """A small MACE for copper and gold with random weights, always the same ones."""
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=4.5,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.array([-3.7, -3.2]),
        avg_num_neighbors=30.0,
        atomic_numbers=[29, 79],
        correlation=2,
        atomic_inter_scale=[50.0],  # makes forces of random weights as large as real ones,
        atomic_inter_shift=0.0,
    ).double()


def alloy(numbers: list[int], cells: int) -> Atoms:
    """Random species on an fcc lattice whose neighbours are two mean covalent radii apart."""
    rng = np.random.default_rng(0)
    atoms = bulk("Cu", "fcc", a=2 * np.sqrt(2) * covalent_radii[numbers].mean(), cubic=True).repeat(cells)
    atoms.numbers = rng.choice(numbers, size=len(atoms))
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def simulate(atoms: Atoms, calculator: Calculator, steps: int) -> tuple[np.ndarray, float]:
    """Total energies in eV/atom over a run of NVE from 300 K in steps of 2 fs, and seconds a step."""
    atoms = atoms.copy()
    atoms.calc = calculator
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(1))
    dynamics = VelocityVerlet(atoms, 2 * units.fs)
    start = time.perf_counter()
    energies = [atoms.get_total_energy() for _ in dynamics.irun(steps)]
    return np.array(energies) / len(atoms), (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a file saved by mace_run_train; it is a pickle, so loading it runs its code")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cells", type=int, default=2, help="cubic cells along each edge, 4 atoms each")
    options = parser.parse_args()

    model = torch.load(options.model, map_location="cpu", weights_only=False) if options.model else random_mace()
    optimized = fxpass.optimize(model)
    console().print(pipeline_table(optimized.report.records))
    print(optimized.report.receipt.summary())

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    calculators = {
        "original": MACECalculator(models=[model], device="cpu", default_dtype=dtype),
        "optimised": optimized.calculator(),
        "optimised, by mace-torch": MACECalculator(models=[optimized], device="cpu", default_dtype=dtype),
    }
    atoms = alloy(model.atomic_numbers.tolist(), options.cells)
    reference = None
    for name, calculator in calculators.items():
        calculator.calculate(atoms, ["energy", "forces", "stress"])
        energy, forces = calculator.results["energy"], calculator.results["forces"]
        if reference is None:
            reference = energy, forces
        print(
            f"{name}: {energy:.6f} eV, off by {abs(energy - reference[0]) / len(atoms):.1e} eV/atom "
            f"and {np.abs(forces - reference[1]).max():.1e} eV/A"
        )
    for name in ("original", "optimised"):
        energies, seconds = simulate(atoms, calculators[name], options.steps)
        print(f"{name}: NVE energy within {1000 * np.ptp(energies):.3f} meV/atom, {1000 * seconds:.0f} ms/step")


if __name__ == "__main__":
    main()
