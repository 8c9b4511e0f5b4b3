"""A classical force field in plain PyTorch: optimise it, verify it, run it, and fit one of its parameters.

Flexible water with bonds and angles over a fixed list of atoms, Lennard-Jones with mixing rules and an Ewald sum; or
butane with dihedrals.  Forces and stress come from fxpass.

    python examples/classical_force_field.py
    python examples/classical_force_field.py --system butane --molecules 4 --steps 20 --target eager
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

import fxpass
from fxpass.frontends.energy import batch_of
from fxpass.frontends.energy_interface import Potential
from fxpass.training import trainable

COULOMB = 14.399645  # e^2 / (4 pi epsilon_0), eV Angstrom
KCAL = 0.0433641  # eV a particle
KELVIN = 8.617333e-5  # eV


# Geometry. ``cell`` is [3, 3], and zero for an isolated system.


def reciprocal(cell: Tensor) -> tuple[Tensor, Tensor]:
    """Rows b with a_i . b_j = 1 for i = j, 0 otherwise, and the volume; both zero without a cell."""
    first = torch.stack([torch.linalg.cross(cell[k - 2], cell[k - 1]) for k in range(3)])
    volume = (cell[0] * first[0]).sum()
    return first / torch.where(volume == 0, torch.ones_like(volume), volume), volume.abs()


def minimum_image(vectors: Tensor, cell: Tensor) -> Tensor:
    """``vectors`` [n, 3] by way of the nearest periodic image."""
    across, _ = reciprocal(cell)
    return vectors - torch.round(vectors @ across.t()) @ cell


def between(positions: Tensor, cell: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return minimum_image(positions[end] - positions[start], cell)


# Terms. Indices are buffers, constants are parameters; each returns the energy in eV.


def parameter(values: Sequence[float] | float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


class HarmonicBonds(nn.Module):
    """k/2 (r - r0)^2 over pairs of atoms [n, 2]; k in eV/Angstrom^2."""

    pairs: Tensor

    def __init__(self, pairs: Sequence[Sequence[int]], constant: float, length: float) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.tensor(pairs))
        self.constant, self.length = parameter(constant), parameter(length)

    def forward(self, positions: Tensor, cell: Tensor) -> Tensor:
        distance = between(positions, cell, self.pairs[:, 0], self.pairs[:, 1]).norm(dim=1)
        return 0.5 * self.constant * ((distance - self.length) ** 2).sum()


class HarmonicAngles(nn.Module):
    """k/2 (theta - theta0)^2 over triples of atoms [n, 3], the middle one at the corner; k in eV/rad^2."""

    triples: Tensor

    def __init__(self, triples: Sequence[Sequence[int]], constant: float, angle: float) -> None:
        super().__init__()
        self.register_buffer("triples", torch.tensor(triples))
        self.constant, self.angle = parameter(constant), parameter(angle)

    def forward(self, positions: Tensor, cell: Tensor) -> Tensor:
        left, middle, right = self.triples.unbind(1)
        a, b = between(positions, cell, middle, left), between(positions, cell, middle, right)
        theta = torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1))
        return 0.5 * self.constant * ((theta - self.angle) ** 2).sum()


class ProperDihedrals(nn.Module):
    """Sum over n of k_n (1 + cos(n phi - delta_n)) over four atoms in a row [m, 4]; n = 1, 2, ...; k in eV."""

    rows: Tensor
    multiplicity: Tensor

    def __init__(self, rows: Sequence[Sequence[int]], constants: Sequence[float], phases: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows))
        self.register_buffer("multiplicity", torch.arange(1.0, len(constants) + 1, dtype=torch.float64))
        self.constants, self.phases = parameter(constants), parameter(phases)

    def forward(self, positions: Tensor, cell: Tensor) -> Tensor:
        i, j, k, l = self.rows.unbind(1)
        a, b, c = (between(positions, cell, *ends) for ends in ((i, j), (j, k), (k, l)))
        left, right = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
        phi = torch.atan2(b.norm(dim=1) * (a * right).sum(1), (left * right).sum(1))
        return (self.constants * (1 + torch.cos(self.multiplicity * phi.unsqueeze(1) - self.phases))).sum()


class LennardJones(nn.Module):
    """4 epsilon ((sigma/r)^12 - (sigma/r)^6) with Lorentz-Berthelot mixing, switched off over the last fifth.

    The switch is 1 - 10 t^3 + 15 t^4 - 6 t^5: forces are smooth at the cutoff.
    """

    def __init__(self, epsilon: Sequence[float], sigma: Sequence[float], cutoff: float) -> None:
        super().__init__()
        # the root is what mixes, and it has a derivative at zero
        self.root, self.sigma, self.cutoff = parameter([math.sqrt(e) for e in epsilon]), parameter(sigma), cutoff

    def pair(self, distance: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """Energy of pairs [n] at a distance, of species ``one`` and ``other``."""
        epsilon = self.root[one] * self.root[other]
        sixth = (0.5 * (self.sigma[one] + self.sigma[other]) / distance) ** 6
        t = ((distance / self.cutoff - 0.8) / 0.2).clamp(0, 1)
        return 4 * epsilon * (sixth * sixth - sixth) * (1 - t**3 * (10 - 15 * t + 6 * t * t))


class DampedShiftedCoulomb(nn.Module):
    """Damped shifted forces (Fennell and Gezelter, J. Chem. Phys. 124, 234104 (2006)), for any boundary conditions."""

    def __init__(self, charges: Sequence[float], cutoff: float, damping: float = 0.2) -> None:
        super().__init__()
        self.charges, self.cutoff, self.damping = parameter(charges), cutoff, damping
        edge = math.erfc(damping * cutoff) / cutoff
        self.value = edge
        self.slope = edge / cutoff + 2 * damping / math.sqrt(math.pi) * math.exp(-((damping * cutoff) ** 2)) / cutoff

    def pair(self, distance: Tensor, one: Tensor, other: Tensor) -> Tensor:
        shape = torch.erfc(self.damping * distance) / distance - self.value + self.slope * (distance - self.cutoff)
        inside = torch.where(distance < self.cutoff, shape, torch.zeros_like(shape))
        return COULOMB * self.charges[one] * self.charges[other] * inside


class Ewald(nn.Module):
    """Coulomb sum of a neutral periodic system: real part over edges, reciprocal part over wave vectors of the cell.

    Args:
        charges: by type, elementary charges.
        cutoff: of the real part, Angstrom; the damping follows from it.
        waves: wave vectors along each axis of the cell, in each direction.
    """

    waves: Tensor

    def __init__(self, charges: Sequence[float], cutoff: float, waves: int = 6) -> None:
        super().__init__()
        half = [n for n in product(range(-waves, waves + 1), repeat=3) if n > (0, 0, 0)]  # k and -k are alike
        self.register_buffer("waves", torch.tensor(half, dtype=torch.float64))
        self.charges, self.damping = parameter(charges), 3.2 / cutoff

    def pair(self, distance: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return COULOMB * self.charges[one] * self.charges[other] * torch.erfc(self.damping * distance) / distance

    def reciprocal_part(self, positions: Tensor, cell: Tensor, types: Tensor) -> Tensor:
        """With the energy of each charge in its own cloud taken out."""
        charges = self.charges[types]
        across, volume = reciprocal(cell)
        k = 2 * math.pi * self.waves @ across
        square = (k * k).sum(1)
        phase = positions @ k.t()
        structure = (charges @ torch.cos(phase)) ** 2 + (charges @ torch.sin(phase)) ** 2
        weight = torch.exp(-square / (4 * self.damping**2)) / square
        own = self.damping / math.sqrt(math.pi) * (charges**2).sum()
        return COULOMB * (4 * math.pi / volume * (weight * structure).sum() - own)

    def clouds(self, distance: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """What pairs of atoms feel of each other's clouds in the reciprocal part."""
        return COULOMB * self.charges[one] * self.charges[other] * torch.erf(self.damping * distance) / distance


class ForceField(nn.Module):
    """Bonded terms, pairwise terms and perhaps an Ewald sum, for the atoms of one system.

    What fxpass reads: ``numbers``, ``cutoff`` of the neighbour list, how many ``atoms`` it is for, ``examples`` of
    them, and what ``forward`` takes, by name.

    Args:
        types: of each atom, by which the constants of pairwise terms are listed.
        excluded: pairs of atoms between which no pairwise term acts.
    """

    types: Tensor
    excluded: Tensor
    key: Tensor

    def __init__(
        self,
        example: fxpass.Structure,
        types: Sequence[int],
        cutoff: float,
        bonded: Sequence[nn.Module],
        pairwise: Sequence[nn.Module],
        excluded: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.numbers = tuple(sorted(set(example.numbers.tolist())))
        self.cutoff = cutoff
        self.atoms, self.examples = len(types), (example,)
        self.bonded, self.pairwise = nn.ModuleList(bonded), nn.ModuleList(pairwise)
        self.register_buffer("types", torch.tensor(types))
        self.register_buffer("excluded", torch.tensor(excluded))
        self.register_buffer("key", torch.tensor([len(types), 1]))  # turns a pair of atoms into a number

    def forward(self, edge_vectors: Tensor, edge_index: Tensor, positions: Tensor, cell: Tensor) -> Tensor:
        """Total energy in eV."""
        box, (sender, receiver), (left, right) = cell[0], edge_index, self.excluded.unbind(1)
        # an edge between excluded atoms counts where it goes to another image
        keys = (self.excluded * self.key).sum(1), (self.excluded.flip(1) * self.key).sum(1)
        known = torch.isin((edge_index.t() * self.key).sum(1), torch.cat(keys))
        nearest = (edge_vectors - between(positions, box, sender, receiver)).abs().sum(1) < 1e-3
        distance = edge_vectors.norm(dim=1)
        energy = torch.stack([term(positions, box) for term in self.bonded]).sum()
        for term in self.pairwise:
            pairs = term.pair(distance, self.types[sender], self.types[receiver])
            energy = energy + 0.5 * torch.where(known & nearest, torch.zeros_like(pairs), pairs).sum()
            if isinstance(term, Ewald):
                inside = between(positions, box, left, right).norm(dim=1)
                clouds = term.clouds(inside, self.types[left], self.types[right])
                energy = energy + term.reciprocal_part(positions, box, self.types) - clouds.sum()
        return energy


def water(molecules: int, cutoff: float = 5.0, *, ewald: bool = True) -> ForceField:
    """Flexible three-site water (SPC/Fw: Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006)), at 1 g/cm^3."""
    first = [3 * m for m in range(molecules)]  # atoms come as O, H, H
    bonds = [(o, o + h) for o in first for h in (1, 2)]
    angles = [(o + 1, o, o + 2) for o in first]
    bonded = [
        HarmonicBonds(bonds, 1059.162 * KCAL, 1.012),
        HarmonicAngles(angles, 75.90 * KCAL, math.radians(113.24)),
    ]
    charges = [-0.82, 0.41]
    coulomb = Ewald(charges, cutoff) if ewald else DampedShiftedCoulomb(charges, cutoff)
    pairwise = [LennardJones([0.1554253 * KCAL, 0.0], [3.165492, 1.0], cutoff), coulomb]
    excluded = [*bonds, *((o + 1, o + 2) for o in first)]
    shape = np.array([[0, 0, 0], [0.845, 0.557, 0], [-0.845, 0.557, 0]])
    box = packed("water", [8, 1, 1], shape, 29.9, molecules)
    return ForceField(box, [0, 1, 1] * molecules, cutoff, bonded, pairwise, excluded)


def butane(molecules: int, cutoff: float = 9.0) -> ForceField:
    """Butane of united atoms (TraPPE-UA: Martin and Siepmann, J. Phys. Chem. B 102, 2569 (1998)) with soft bonds."""
    first = [4 * m for m in range(molecules)]
    bonds = [(c + k, c + k + 1) for c in first for k in range(3)]
    angles = [(c + k, c + k + 1, c + k + 2) for c in first for k in range(2)]
    torsion = [355.03 * KELVIN, -68.19 * KELVIN, 791.32 * KELVIN]
    bonded = [
        HarmonicBonds(bonds, 536.0 * KCAL, 1.54),
        HarmonicAngles(angles, 62500 * KELVIN, math.radians(114)),
        ProperDihedrals([range(c, c + 4) for c in first], torsion, [0.0, math.pi, 0.0]),
    ]
    pairwise = [LennardJones([98 * KELVIN, 46 * KELVIN], [3.75, 3.95], cutoff)]
    excluded = [(c + a, c + b) for c in first for a in range(4) for b in range(a)]
    gauche = np.array([[-0.63, -1.31, 0.52], [0, 0, 0], [1.54, 0, 0], [2.17, 0.92, 1.08]])
    box = packed("butane", [6] * 4, gauche, 300.0, molecules)
    return ForceField(box, [0, 1, 1, 0] * molecules, cutoff, bonded, pairwise, excluded)


SYSTEMS = {"water": water, "butane": butane}


def packed(
    name: str, numbers: Sequence[int], shape: np.ndarray, volume: float, molecules: int, seed: int = 0
) -> fxpass.Structure:
    """Randomly turned molecules on a grid, each with ``volume`` (Angstrom^3), in a periodic box."""
    rng = np.random.default_rng(seed)
    side = (volume * molecules) ** (1 / 3)
    along = math.ceil(molecules ** (1 / 3))
    places = np.array(list(product(range(along), repeat=3)))[:molecules] * side / along
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(molecules)]
    atoms = np.concatenate([p + shape @ turn for p, turn in zip(places, turns, strict=True)])
    return fxpass.Structure([*numbers] * molecules, atoms, side * np.eye(3), (True, True, True), name)


def dynamics(potential: fxpass.Optimized, box: fxpass.Structure, steps: int) -> str:
    """Molecular dynamics from 300 K with ASE, and how well the total energy is kept."""
    from ase import units
    from ase.md.verlet import VelocityVerlet
    from ase.optimize import FIRE

    atoms = box.to_ase()
    atoms.calc = potential.calculator()
    FIRE(atoms, logfile=None).run(fmax=0.5, steps=200)
    thermal = np.sqrt(300 * units.kB * atoms.get_masses())[:, None]
    atoms.set_momenta(thermal * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    totals = []
    integrator = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    integrator.attach(lambda: totals.append(atoms.get_total_energy()))
    start = time.perf_counter()
    integrator.run(steps)
    each = 1000 * (time.perf_counter() - start) / steps
    return f"total energy within {1000 * np.ptp(totals) / len(atoms):.3f} meV/atom, {each:.1f} ms/step"


def fit(field: ForceField) -> str:
    """Find the force constant of the bonds again, from energy and forces that were computed with it."""
    model = Potential(field)
    (box,) = field.examples
    shaken = box.positions + np.random.default_rng(1).normal(scale=0.03, size=box.positions.shape)
    data = batch_of([replace(box, positions=shaken)], model)
    target = model(data)
    constant = field.bonded[0].constant
    true = constant.item()
    for each in model.parameters():
        each.requires_grad_(each is constant)
    with torch.no_grad():
        constant.mul_(0.8)
    begin = constant.item()
    fast = trainable(model)  # its parameters are the model's
    optimizer = torch.optim.LBFGS([constant], max_iter=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = fast(data, training=True)
        value = (found["energy"] - target["energy"]).pow(2).sum() + (found["forces"] - target["forces"]).pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return f"bonds of {begin:.4f} became {constant.item():.4f} eV/A^2, the reference has {true:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, default="water")
    parser.add_argument("--molecules", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="of molecular dynamics, 0.5 fs each")
    parser.add_argument("--target", default="native", help="how the result runs")
    options = parser.parse_args()

    field = SYSTEMS[options.system](options.molecules)
    model = Potential(field)
    optimized = fxpass.optimize(model, "exact", target=options.target)
    print(optimized.report.receipt.summary())

    (box,) = field.examples
    data = batch_of([box], model)
    for name, potential in (("original", model), ("optimised", optimized)):
        start = time.perf_counter()
        for _ in range(10):
            found = potential(data, compute_stress=True)
        took = (time.perf_counter() - start) / 10
        print(f"{name}: {float(found['energy']):.6f} eV, {1000 * took:.1f} ms")
    print("dynamics: " + dynamics(optimized, box, options.steps))
    print("fit: " + fit(field))


if __name__ == "__main__":
    main()
