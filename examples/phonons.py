"""Phonon bands of fcc copper from second derivatives, checked against finite displacements.

    python examples/phonons.py
    python examples/phonons.py --cells 5 --plot bands.svg
    python examples/phonons.py --model my.model --symbol Ni

Without --model the small potential that fxpass ships is used.  Rows of the Hessian of a supercell are the force
constants between one atom and all others; a Fourier sum of them gives the frequencies at any wave vector.
"""

from __future__ import annotations

import argparse
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

import fxpass
from fxpass.calibration import FEMTOSECOND, MASSES
from fxpass.derivatives import EV_PER_CUBIC_ANGSTROM, Derivatives
from fxpass.models import small_potential
from fxpass.render.svg import Series, line_plot
from fxpass.structures import SYMBOLS, Floats, Structure

#: corners of the Brillouin zone of fcc, in 2 pi / a
PATH = {
    "Γ": (0.0, 0.0, 0.0),
    "X": (0.0, 1.0, 0.0),
    "W": (0.5, 1.0, 0.0),
    "K": (0.75, 0.75, 0.0),
    "Γ ": (0.0, 0.0, 0.0),
    "L": (0.5, 0.5, 0.5),
}
PRIMITIVE = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])  # in lattice constants
THZ = FEMTOSECOND * 1e3 / (2 * np.pi)  # of sqrt(eV/Angstrom^2/amu)


def supercell(number: int, a: float, cells: int) -> Structure:
    """The primitive cell repeated along each of its vectors; atom 0 is at the origin."""
    lattice = np.array(list(product(range(cells), repeat=3))) @ PRIMITIVE * a
    numbers = np.full(len(lattice), number)
    return Structure(numbers, lattice, PRIMITIVE * a * cells, (True, True, True), f"{cells}^3 fcc")


def lattice_constant(derivatives: Derivatives, number: int, guess: float) -> float:
    """Where the pressure vanishes, Angstrom: the root of the stress, by bisection within 10 % of the guess."""

    def pressure(a: float) -> float:
        return -float(np.trace(derivatives.stress(supercell(number, a, 1)))) / 3

    low, high = 0.9 * guess, 1.1 * guess
    if not pressure(low) > 0 > pressure(high):
        raise SystemExit(f"no fcc crystal with a lattice constant within 10 % of {guess} Angstrom is stable")
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if pressure(middle) > 0 else (low, middle)
    return 0.5 * (low + high)


def force_constants(derivatives: Derivatives, crystal: Structure) -> Floats:
    """d2E/dx_0 dx_j, [3, atoms, 3], eV/Angstrom^2: by symmetry of the lattice, those of every atom."""
    _, rows = next(derivatives.hessian_rows(crystal, chunk=1))
    return rows[0]


def by_displacements(derivatives: Derivatives, crystal: Structure, step: float = 1e-3) -> Floats:
    """The same from differences of forces."""
    found = np.empty((3, len(crystal), 3))
    for axis in range(3):
        moved = []
        for sign in (1, -1):
            positions = crystal.positions.copy()
            positions[0, axis] += sign * step
            moved.append(derivatives.forces(Structure(crystal.numbers, positions, crystal.cell, crystal.pbc)))
        found[axis] = (moved[1] - moved[0]) / (2 * step)
    return found


def acoustic(constants: Floats) -> Floats:
    """Force constants with the sum rule enforced: moving all atoms together costs nothing."""
    mended = constants.copy()
    mended[:, 0] -= constants.sum(axis=1)
    return mended


def frequencies(constants: Floats, crystal: Structure, waves: Floats) -> Floats:
    """Frequencies [waves, 3], THz, negative where they are imaginary, at wave vectors in 1/Angstrom.

    Force constants between an atom and the images of another at one distance are shared equally among these.
    """
    images = np.array(list(product((-1, 0, 1), repeat=3))) @ crystal.cell
    vectors = crystal.positions[:, None] - crystal.positions[0] + images  # [atoms, images, 3]
    distances = np.linalg.norm(vectors, axis=2)
    nearest = distances < distances.min(axis=1, keepdims=True) + 1e-6
    weights = nearest / nearest.sum(axis=1, keepdims=True)
    phases = np.einsum("ai,qai->qa", weights, np.exp(1j * np.einsum("qx,aix->qai", waves, vectors)))
    dynamical = np.einsum("xay,qa->qxy", constants, phases) / MASSES[crystal.numbers[0]]
    squares = np.linalg.eigvalsh(0.5 * (dynamical + dynamical.conj().transpose(0, 2, 1)))
    return np.sign(squares) * np.sqrt(np.abs(squares)) * THZ


def band_path(a: float, points: int) -> tuple[Floats, Floats]:
    """Wave vectors along ``PATH`` [n, 3], 1/Angstrom, and the length of the way to each."""
    corners = np.array(list(PATH.values())) * 2 * np.pi / a
    parts = [np.linspace(p, q, points, endpoint=False) for p, q in pairwise(corners)]
    waves = np.concatenate([*parts, corners[-1:]])
    way = np.concatenate([[0.0], np.linalg.norm(np.diff(waves, axis=0), axis=1).cumsum()])
    return waves, way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of a model (default: the potential that fxpass ships)")
    parser.add_argument("--symbol", default="Cu", help="element (default: Cu)")
    parser.add_argument("--guess", type=float, default=3.6, help="lattice constant in Angstrom (default: 3.6)")
    parser.add_argument("--cells", type=int, default=4, help="of the supercell along each vector (default: 4)")
    parser.add_argument("--plot", type=Path, help="write the bands to this SVG file")
    arguments = parser.parse_args()

    number = SYMBOLS.index(arguments.symbol)
    model = small_potential(torch.float64) if arguments.model is None else arguments.model
    derivatives = fxpass.optimize(model, "exact", verify=False).derivatives(dtype=torch.float64)
    a = lattice_constant(derivatives, number, arguments.guess)
    print(f"fcc {arguments.symbol}: lattice constant {a:.4f} Angstrom")
    c = derivatives.elastic_constants(supercell(number, a, 1)) * EV_PER_CUBIC_ANGSTROM
    print(f"elastic constants: C11 {c[0, 0, 0, 0]:.1f}, C12 {c[0, 0, 1, 1]:.1f}, C44 {c[1, 2, 1, 2]:.1f} GPa")

    crystal = supercell(number, a, arguments.cells)
    constants = force_constants(derivatives, crystal)
    numerical = by_displacements(derivatives, crystal)
    difference, largest = np.abs(constants - numerical).max(), np.abs(constants).max()
    print(f"force constants within {difference:.1e} eV/Angstrom^2 of finite displacements, largest {largest:.3f}")
    assert difference < 1e-4 * largest, "second derivatives and finite displacements disagree"
    print(f"their sum, which the acoustic sum rule wants to vanish, is {np.abs(constants.sum(axis=1)).max():.1e}")

    waves, way = band_path(a, 40)
    bands = frequencies(acoustic(constants), crystal, waves)
    numerical_bands = frequencies(acoustic(numerical), crystal, waves)
    change = np.abs(np.abs(bands) * bands - np.abs(numerical_bands) * numerical_bands).max()  # of squares: roots of 0
    print(f"squared frequencies within {change:.1e} THz^2 of those by finite displacements")
    assert change < 1e-3, "frequencies by second derivatives and by finite displacements disagree"
    for name, corner in zip(PATH, range(0, len(waves), 40), strict=True):
        print(f"{name:2} {'  '.join(f'{f:7.3f}' for f in bands[corner])} THz")

    if arguments.plot is not None:
        lines = [Series(f"branch {k + 1}", way.tolist(), bands[:, k].tolist()) for k in range(3)]
        path = " – ".join(name.strip() for name in PATH)
        title = f"Phonons of fcc {arguments.symbol}"
        picture = line_plot(lines, title=title, x_label=f"{path}  (1/Å)", y_label="THz")
        arguments.plot.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
