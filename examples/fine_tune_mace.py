"""Fine-tune a MACE model through the optimised graph, and save the original with its new weights.

    python examples/fine_tune_mace.py --output tuned.model
    python examples/fine_tune_mace.py --model alloy.model --data alloy_calibration.xyz --steps 100 --rate 1e-4

Frames are read with ASE; energies and forces are taken from REF_energy and REF_forces where a frame has them.  Without
--model a small MACE with random weights is fitted, without --data to effective-medium theory of copper and gold.
Needs mace-torch and ase: pip install "fxpass[mace]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, io
from ase.build import bulk
from ase.calculators.emt import EMT
from mace_ase import random_mace
from torch import Tensor
from torch.nn.functional import huber_loss

import fxpass
from fxpass.frontends.mace import mace_batch
from fxpass.training import trainable


def effective_medium(frames: int) -> list[Atoms]:
    """Rattled crystals of copper and gold with energies and forces by ASE's EMT."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(frames):
        atoms = bulk("Cu", "fcc", 3.85, cubic=True).repeat((2, 1, 1))
        atoms.numbers = rng.choice([29, 79], size=len(atoms))
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        atoms.calc = EMT()
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        made.append(atoms)
    return made


def loss(result: dict[str, Tensor], frames: list[Atoms], counts: Tensor) -> Tensor:
    """Huber losses of energies per atom and of forces."""
    like = result["forces"]
    energies = torch.tensor([atoms.info["REF_energy"] for atoms in frames]).to(like)
    forces = torch.from_numpy(np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])).to(like)
    per_atom = (result["energy"] - energies) / counts.to(like)
    return huber_loss(per_atom, torch.zeros_like(per_atom)) + 10 * huber_loss(like, forces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint of MACE")
    parser.add_argument("--data", type=Path, help="frames with REF_energy and REF_forces")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--output", type=Path, default=Path("tuned.model"))
    options = parser.parse_args()

    model = random_mace() if options.model is None else torch.load(options.model, weights_only=False)
    frames = effective_medium(8) if options.data is None else io.read(options.data, ":8")
    numbers, dtype = model.atomic_numbers.tolist(), next(model.parameters()).dtype
    heads = list(getattr(model, "heads", None) or ["Default"])
    structures = [fxpass.Structure.from_ase(atoms) for atoms in frames]
    batch = mace_batch(structures, numbers, float(model.r_max), heads, dtype)
    counts = batch["ptr"].diff()

    fast = trainable(model)  # its parameters are the model's
    optimiser = torch.optim.Adam(fast.parameters(), lr=options.rate)
    for step in range(options.steps):
        optimiser.zero_grad()
        value = loss(fast(batch, training=True), frames, counts)
        value.backward()
        optimiser.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {value.item():.5f}", flush=True)
    original = loss(model(batch, training=True), frames, counts).item()
    print(f"the original with its new weights: loss {original:.5f}")
    torch.save(model, options.output)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
