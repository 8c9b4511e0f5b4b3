"""Second derivatives by strain: elastic constants and internal strain."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch

from ..errors import StructureError
from ..structures import Floats, Structure
from .first import FirstDerivatives
from .hessians import Hessians
from .model import structure_of, to_numpy, volume_of


class Elastic(FirstDerivatives, Hessians):
    """By strain once, and by positions or strain."""

    def internal_strain(self, structure: Any) -> Floats:
        """d2E/dx d(strain) [atoms, 3, 3, 3], eV/Angstrom: minus the forces that a strain causes."""
        return self._strained(structure_of(structure))[1]

    def elastic_constants(self, structure: Any, *, relaxed: bool = False, force_tolerance: float = 1e-2) -> Floats:
        """d2E/d(strain)d(strain) over the volume [3, 3, 3, 3], eV/Angstrom^3; times ``EV_PER_CUBIC_ANGSTROM``, in GPa.

        At zero stress these are the elastic constants; under stress, those of other conventions differ by it
        (Barron and Klein, Proc. Phys. Soc. 85, 523 (1965)).

        Args:
            relaxed: atoms follow the strain to where the forces vanish: less the internal strain times the inverse
                Hessian times the internal strain (Born and Huang; Wu, Vanderbilt and Hamann, PRB 72, 035105 (2005)).
            force_tolerance: eV/Angstrom, that forces may have for ``relaxed``.

        Raises:
            StructureError: the structure is not periodic in all directions; or ``relaxed``, and forces do not vanish
                or some displacement of atoms lowers the energy.
        """
        structure = structure_of(structure)
        volume = volume_of(structure)
        clamped, coupling = self._strained(structure)
        if not relaxed:
            return clamped / volume
        largest = np.abs(self.forces(structure)).max()
        if not largest <= force_tolerance:
            raise StructureError(
                f"{structure.name} is not relaxed: forces reach {largest:.3g} eV/Angstrom, {force_tolerance:g} allowed",
                hint="relax the atoms first, or ask for the constants of clamped atoms",
            )
        n = 3 * len(structure)
        hessian, coupling = self.hessian(structure).reshape(n, n), coupling.reshape(n, 9)
        together = np.tile(np.eye(3), (len(structure), 1)) / np.sqrt(len(structure))
        stiff = hessian + np.abs(hessian).max() * together @ together.T  # moving all atoms costs no energy
        lowest = np.linalg.eigvalsh(stiff).min()
        if len(structure) > 1 and not lowest > 1e-6 * np.abs(hessian).max():
            raise StructureError(
                f"{structure.name} is no minimum: a mode has the force constant {lowest:.3g} eV/Angstrom^2",
                hint="follow that mode to a minimum first",
            )
        if len(structure) == 1:
            return clamped / volume
        coupling = coupling - together @ (together.T @ coupling)
        return (clamped - (coupling.T @ np.linalg.solve(stiff, coupling)).reshape(3, 3, 3, 3)) / volume

    def _strained(self, structure: Structure) -> tuple[Floats, Floats]:
        """Second derivatives by strain [3, 3, 3, 3], eV, and by positions and strain [atoms, 3, 3, 3], eV/Angstrom."""
        apply, motion = self._hessian_of(structure)
        clamped, coupling = np.empty((3, 3, 3, 3)), np.empty((len(structure), 3, 3, 3))
        for i, j in combinations_with_replacement(range(3), 2):
            strain = torch.zeros((3, 3), dtype=self.dtype)
            strain[i, j] += 0.5
            strain[j, i] += 0.5
            found = apply(*motion.strained(strain))
            for pair in ((i, j), (j, i)):
                clamped[pair] = to_numpy(motion.by_strain(found))
                coupling[:, :, pair[0], pair[1]] = to_numpy(motion.by_atom(found))
        return 0.5 * (clamped + clamped.transpose(2, 3, 0, 1)), coupling
