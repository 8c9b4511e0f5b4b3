"""Second derivatives by positions, whole and along displacements, and third ones along two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..errors import UsageError, VerificationError
from ..structures import Floats, Integers
from .model import Apply, Differentiable, direction_of, directions_of, structure_of, to_numpy
from .motion import Motion


class Hessians(Differentiable):
    """By positions twice, or three times."""

    def hessian_vector(self, structure: Any, displacements: Any) -> Floats:
        """The Hessian times displacements, eV/Angstrom^2 times their unit.

        Args:
            displacements: [atoms, 3], or [k, atoms, 3] for k of them.

        Returns:
            of the same shape.
        """
        structure = structure_of(structure)
        along = directions_of(displacements, structure)
        apply, motion = self._hessian_of(structure)
        found = [to_numpy(motion.by_atom(apply(*motion.displaced(u)))) for u in self._tensor(along)]
        return np.array(found).reshape(np.shape(displacements))

    def hessian_rows(self, structure: Any, chunk: int = 16) -> Iterator[tuple[Integers, Floats]]:
        """The Hessian by atoms, so that it need not fit into memory: (atoms [k], rows [k, 3, atoms, 3]), eV/Angstrom^2.

        Args:
            chunk: atoms in one piece.

        Raises:
            UsageError: ``chunk`` is not positive.
        """
        if chunk < 1:
            raise UsageError(f"a Hessian cannot come in pieces of {chunk} atoms")
        structure = structure_of(structure)
        apply, motion = self._hessian_of(structure)
        return self._rows(apply, motion, chunk)

    def _rows(self, apply: Apply, motion: Motion, chunk: int) -> Iterator[tuple[Integers, Floats]]:
        n = motion.atoms
        for start in range(0, n, chunk):
            atoms = np.arange(start, min(start + chunk, n))
            rows = np.empty((len(atoms), 3, n, 3))
            for k, atom in enumerate(atoms):
                for axis in range(3):
                    unit = torch.zeros((n, 3), dtype=self.dtype)
                    unit[atom, axis] = 1.0
                    rows[k, axis] = to_numpy(motion.by_atom(apply(*motion.displaced(unit))))
            yield atoms, rows

    def hessian(self, structure: Any, *, symmetrise: bool = True, tolerance: float | None = None) -> Floats:
        """d2E/dx dx [atoms, 3, atoms, 3], eV/Angstrom^2: force constants of the structure as it is repeated.

        Args:
            symmetrise: return the mean with the transpose, which differs by rounding.
            tolerance: largest difference of the two, relative to the largest element; by default 4 times the root of
                the resolution of the type.

        Raises:
            VerificationError: the two differ by more.
        """
        structure = structure_of(structure)
        n = len(structure)
        full = np.empty((n, 3, n, 3))
        for atoms, rows in self.hessian_rows(structure):
            full[atoms] = rows
        mirrored = full.transpose(2, 3, 0, 1)
        limit = 4 * float(torch.finfo(self.dtype).eps) ** 0.5 if tolerance is None else tolerance
        difference, largest = np.abs(full - mirrored).max(), np.abs(full).max()
        if not difference <= limit * largest:
            raise VerificationError(
                f"the Hessian of {structure.name} is not symmetric: H - H^T reaches {difference:.3g} eV/Angstrom^2, "
                f"{limit:.1g} of {largest:.3g} is allowed",
                hint="dtype=torch.float64, or passes of which none is approximate",
            )
        return 0.5 * (full + mirrored) if symmetrise else full

    def third(self, structure: Any, first: Any, second: Any) -> Floats:
        """d3E/dx dx dx along two displacements [atoms, 3] each: [atoms, 3], eV/Angstrom^3 times their units.

        Raises:
            UsageError: the program reads cubic tables, whose third derivatives are steps.
        """
        structure = structure_of(structure)
        u, v = (self._tensor(direction_of(d, structure)) for d in (first, second))
        motion = self._motion(structure)
        # of so few directions none is worth keeping anything for
        apply = self._product(3).prepared(motion.inputs, 0)
        return to_numpy(motion.by_atom(apply(*motion.displaced(u), *motion.displaced(v))))
