"""Train the potential that fxpass ships: effective-medium theory of Cu, Ag and Au, by ASE.

    python examples/train_small_potential.py --output my_potential.npz
    python examples/train_small_potential.py --output my_potential.npz --batches 2 --epochs 3

The defaults made fxpass/data/small_potential.npz, in five minutes on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from torch import Tensor
from torch.nn.functional import huber_loss

from fxpass.models import Settings, SmallPotential, build, collate, save
from fxpass.structures import Structure

LATTICE_CONSTANTS = {29: 3.61, 47: 4.09, 79: 4.08}  # Angstrom
CUTOFF = 5.0
STRONGEST_FORCE = 100.0  # eV/Angstrom; frames beyond it are not used


@dataclass(frozen=True)
class Batch:
    """The input of the model and what it should say: eV, eV/Angstrom."""

    data: dict[str, Tensor]
    energy: Tensor
    forces: Tensor


def random_frame(rng: np.random.Generator) -> Atoms:
    """A rattled alloy: bulk, slab, cluster, a few atoms at all distances, or one atom."""
    numbers = rng.choice(list(LATTICE_CONSTANTS), size=rng.integers(1, 4), replace=False)
    a = np.mean([LATTICE_CONSTANTS[z] for z in numbers]) * rng.uniform(0.93, 1.07)
    kind = rng.choice(["bulk", "slab", "cluster", "few", "one"], p=[0.5, 0.15, 0.15, 0.17, 0.03])
    if kind == "bulk":
        atoms = bulk("Cu", "fcc", a, cubic=True).repeat(rng.permutation([2, rng.integers(1, 3), 1]))
        atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
    elif kind == "slab":
        atoms = fcc111("Cu", (2, 2, 3), a, vacuum=6.0)
    elif kind == "cluster":
        atoms = bulk("Cu", "fcc", a, cubic=True).repeat(3)
        distances = np.linalg.norm(atoms.positions - atoms.positions.mean(axis=0) - rng.normal(size=3), axis=1)
        atoms = atoms[np.argsort(distances)[: rng.integers(4, 14)]]
        atoms.pbc = False
    elif kind == "few":
        steps = rng.normal(size=(rng.integers(1, 4), 3))
        steps *= rng.uniform(0.5, 1.6, size=(len(steps), 1)) * a / np.sqrt(2) / np.linalg.norm(steps, axis=1)[:, None]
        atoms = Atoms(["Cu"] * (len(steps) + 1), np.concatenate([np.zeros((1, 3)), steps.cumsum(axis=0)]))
    else:
        atoms = Atoms("Cu")
    atoms.numbers = rng.choice(numbers, size=len(atoms))
    atoms.positions += rng.normal(scale=rng.uniform(0.0, 0.25), size=(len(atoms), 3))
    return atoms


def reference_batch(rng: np.random.Generator, size: int) -> Batch:
    """``size`` random frames with their energies and forces."""
    structures, energies, forces = [], [], []
    while len(structures) < size:
        atoms = random_frame(rng)
        atoms.calc = EMT()
        if np.abs(atoms.get_forces()).max() < STRONGEST_FORCE:
            structures.append(Structure.from_ase(atoms))
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces())
    data = collate(structures, list(LATTICE_CONSTANTS), CUTOFF)
    return Batch(data, torch.tensor(energies).float(), torch.from_numpy(np.concatenate(forces)).float())


def isolated_energies() -> tuple[float, ...]:
    atoms = [Atoms(numbers=[z], calculator=EMT()) for z in LATTICE_CONSTANTS]
    return tuple(float(atom.get_potential_energy()) for atom in atoms)


def errors(model: SmallPotential, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
    """Errors of energy in eV/atom [graphs] and of forces in eV/Angstrom [atoms, 3]."""
    result = model(batch.data, training=training)
    atoms = torch.bincount(batch.data["batch"])
    return (result["energy"] - batch.energy) / atoms, result["forces"] - batch.forces


def train(model: SmallPotential, batches: list[Batch], epochs: int, rng: np.random.Generator) -> None:
    """Fit energies and forces; the learning rate falls to zero along a cosine."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(batches))
    for epoch in range(epochs):
        total = 0.0
        for k in rng.permutation(len(batches)):
            energy, forces = errors(model, batches[k], training=True)
            # Huber: a compressed pair must not outweigh a solid
            loss = 10 * huber_loss(energy, torch.zeros_like(energy), delta=0.1)
            loss = loss + huber_loss(forces, torch.zeros_like(forces), delta=0.5)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        if epoch % 4 == 0 or epoch == epochs - 1:
            print(f"epoch {epoch:4d}  loss {total / len(batches):.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--batches", type=int, default=250, help="number of training batches")
    parser.add_argument("--batch-size", type=int, default=8, help="structures in a batch")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    batches = [reference_batch(rng, options.batch_size) for _ in range(options.batches)]
    neighbours = sum(batch.data["edge_index"].shape[1] for batch in batches) / sum(len(b.forces) for b in batches)
    settings = Settings(
        tuple(LATTICE_CONSTANTS), isolated_energies(), cutoff=CUTOFF, average_neighbours=round(neighbours, 1)
    )
    model = build(settings, seed=options.seed)
    train(model, batches, options.epochs, rng)

    energy, forces = errors(model, reference_batch(rng, 5 * options.batch_size), training=False)
    print(f"on new structures: {1000 * energy.square().mean().sqrt():.1f} meV/atom, ", end="")
    print(f"{1000 * forces.square().mean().sqrt():.0f} meV/A (root mean square)")
    save(model, options.output)


if __name__ == "__main__":
    main()
