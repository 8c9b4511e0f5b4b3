"""Forces, stress and what each edge and atom contributes to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError
from ..structures import Floats, Integers
from .model import Differentiable, structure_of, to_numpy, volume_of
from .motion import Motion


@dataclass(frozen=True, eq=False)
class EdgeForces:
    """What each edge contributes to forces and virial.

    Attributes:
        index: sender and receiver, int64 [2, edges].
        vectors: from sender to receiver, [edges, 3], Angstrom.
        gradients: derivative of the energy by these vectors, [edges, 3], eV/Angstrom: the force on the sender, and
            minus that on the receiver, through this edge.
    """

    index: Integers
    vectors: Floats
    gradients: Floats


class FirstDerivatives(Differentiable):
    """By positions and strain."""

    def forces(self, structure: Any) -> Floats:
        """Forces [atoms, 3], eV/Angstrom."""
        motion = self._motion(structure_of(structure))
        return -to_numpy(motion.by_atom(self._gradient(motion)))

    def virial(self, structure: Any) -> Floats:
        """-dE/d(strain), symmetric [3, 3], eV."""
        motion = self._motion(structure_of(structure))
        return -to_numpy(motion.by_strain(self._gradient(motion)))

    def stress(self, structure: Any) -> Floats:
        """dE/d(strain) over the volume, symmetric [3, 3], eV/Angstrom^3; times ``EV_PER_CUBIC_ANGSTROM``, in GPa.

        Raises:
            StructureError: the structure is not periodic in all directions, so it has no volume.
        """
        structure = structure_of(structure)
        return -self.virial(structure) / volume_of(structure)

    def edge_forces(self, structure: Any) -> EdgeForces:
        """Edges with the derivatives of the energy by their vectors.

        Raises:
            UnsupportedModelError: the energy depends on positions or cells besides edges.
        """
        motion = self._motion(structure_of(structure))
        self._only_edges(motion, "per-edge forces")
        real = motion.index[0] < motion.atoms
        vectors, gradients = motion.moved[-1][real], self._gradient(motion)[-1][real]
        return EdgeForces(motion.index[:, real].numpy().copy(), to_numpy(vectors), to_numpy(gradients))

    def atomic_virials(self, structure: Any) -> Floats:
        """Virials of atoms, symmetric [atoms, 3, 3], eV, which add up to :meth:`virial`.

        Half of what an edge contributes belongs to either end (Thompson, Plimpton and Mattson, J. Chem. Phys. 131,
        154107 (2009), Eq. 15, for pairs); how a many-body virial is shared out is a convention.

        Raises:
            UnsupportedModelError: the energy depends on positions or cells besides edges.
        """
        structure = structure_of(structure)
        edges = self.edge_forces(structure)
        outer = edges.vectors[:, :, None] * edges.gradients[:, None, :]
        total = np.zeros((len(structure), 3, 3))
        for end in edges.index:
            np.add.at(total, end, -0.25 * (outer + outer.transpose(0, 2, 1)))
        return total

    def _only_edges(self, motion: Motion, what: str) -> None:
        others = [spec.name for spec in self._program.with_property("differentiated")]
        if others:
            raise UnsupportedModelError(
                f"{what} are not all there is: the energy of this model depends on {', '.join(others)} besides edges",
                hint="forces and virial of the whole structure",
            )
