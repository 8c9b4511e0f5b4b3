"""What a user asks: stress, virials, Hessians, elastic constants, Jacobians, for one structure after the other."""

from __future__ import annotations

from .elastic import Elastic
from .jacobians import Jacobians

#: GPa
EV_PER_CUBIC_ANGSTROM = 160.21766208


class Derivatives(Elastic, Jacobians):
    """Derivatives of the energy, and of other outputs, of one model.

    Structures are ``fxpass.Structure`` or ASE atoms; arrays are float64 numpy arrays, whatever type the model computes
    in.  Each kind of derivative is traced when it is first asked for, in seconds, and kept; its kernels are built then.
    Displacements and positions are in Angstrom, energies in eV.  Second derivatives by strain are those of the energy
    per undeformed volume along x -> x (1 + strain), symmetric strain.
    """
