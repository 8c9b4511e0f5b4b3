"""The one table of tolerances, by element type and exactness class.

float64 and float32 rows hold for exact and reassociating results alike: an exact pass keeps every bit, but
what it is compared with, the original, sums in an order of its own. An approximate result may be off by its
budget; the budget moves the potential, never the fact that forces are its gradient, so the rows that test
derivatives stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..errors import UsageError
from ..passes import Exactness


@dataclass(frozen=True)
class Bound:
    """The largest error allowed: ``max(absolute, relative * scale)``, in ``unit``."""

    absolute: float
    relative: float
    unit: str

    def limit(self, scale: float) -> float:
        """The bound for quantities as large as ``scale``, which is in the same unit."""
        return max(self.absolute, self.relative * scale)

    def widened(self, error: float) -> Bound:
        """This bound, nowhere below ``error``."""
        return replace(self, absolute=max(self.absolute, error))


@dataclass(frozen=True)
class Tolerance:
    """Bounds on what a receipt checks.

    Attributes:
        values: how far ``energy``, ``forces`` and ``stress`` may be from the float64 original. They scale with the
            energy per atom times the square root of the number of atoms (so grows the rounding of a sum), the largest
            force component and the largest stress component.
        symmetry: how far the same may be from equivariant; they scale likewise.
        gradient: how far forces may be from finite differences of the energy; scales with forces.
        strain: how far stress may be from finite differences of the energy; scales with stress.
        curl: the antisymmetric part that force constants may have; scales with force constants.
        allowance: what approximate passes may add to each of ``values``.
    """

    values: Mapping[str, Bound]
    symmetry: Mapping[str, Bound]
    gradient: Bound
    strain: Bound
    curl: Bound
    allowance: Mapping[str, float] = field(default_factory=dict)


def _values(energy: Bound, forces: Bound, stress: Bound) -> Mapping[str, Bound]:
    return {"energy": energy, "forces": forces, "stress": stress}


ENERGY, FORCES, STRESS, FORCE_CONSTANTS = "eV/atom", "eV/A", "eV/A^3", "eV/A^2"

TABLE = {
    # 1e-9 eV/A is some 1e6 roundings: room for another order of summation, none for another constant. A stress
    # is a force times a neighbour distance per atomic volume, so 1e-9 eV/A * 2.5 A / 11 A^3 ~ 1e-10 eV/A^3.
    "float64": Tolerance(
        values=_values(Bound(1e-10, 1e-14, ENERGY), Bound(1e-9, 1e-14, FORCES), Bound(1e-10, 1e-14, STRESS)),
        symmetry=_values(Bound(1e-10, 1e-14, ENERGY), Bound(1e-9, 1e-14, FORCES), Bound(1e-10, 1e-14, STRESS)),
        # Energies of some 1e2 eV are sure to 1e-13 eV or so, slopes over 3e-4 A to 3e-10 eV/A. Forces of 10 eV/A
        # are sure to 1e-14 eV/A, which over a loop of radius 1e-5 A leaves 1e-9 eV/A^2.
        gradient=Bound(1e-7, 1e-7, FORCES),
        strain=Bound(1e-8, 1e-8, STRESS),
        curl=Bound(1e-7, 1e-7, FORCE_CONSTANTS),
    ),
    # 2e-6 is 17 roundings. A rotated structure is rounded to float32 again, which moves atoms 10 A from the origin
    # by 5e-7 A and changes forces by that times force constants of some 10 eV/A^2. Derivatives are tested in
    # float64, on weights that may have been rounded to float32 on each side of the derivative separately.
    "float32": Tolerance(
        values=_values(Bound(2e-6, 2e-6, ENERGY), Bound(2e-6, 2e-6, FORCES), Bound(1e-6, 2e-6, STRESS)),
        symmetry=_values(Bound(4e-6, 4e-6, ENERGY), Bound(1e-5, 1e-5, FORCES), Bound(2e-6, 4e-6, STRESS)),
        gradient=Bound(2e-6, 2e-6, FORCES),
        strain=Bound(2e-7, 2e-7, STRESS),
        curl=Bound(1e-6, 1e-6, FORCE_CONSTANTS),
    ),
}

# A float32 result must not be further from float64 than this many times the original float32 model, which is
# never taken to be better than an eighth of the table's row: 2 roundings are luck. The original's own error counts
# upwards too: a model whose own float32 forces miss the table cannot have a drop-in that meets it.
OWN_ERROR_FACTOR = 2.0
OWN_ERROR_FLOOR = 0.25

#: relative to the largest element: what sums in another order may differ by
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tolerance(dtype: str, exactness: Exactness, budget: float | None = None) -> Tolerance:
    """The row of the table for results of ``dtype`` computed under ``exactness``.

    Args:
        dtype: ``"float64"`` or ``"float32"``.
        exactness: the weakest class among the passes that ran.
        budget: eV/Angstrom, what approximate passes may change forces by, beyond the row. Energies per atom may
            change by a tenth of it times 1 A, stresses by a tenth of it per A^2: the proportions of the table.

    Raises:
        UsageError: no such row, or an approximate result without a budget.
    """
    if dtype not in TABLE:
        raise UsageError(f"There are no tolerances for {dtype}.", hint=f"one of {', '.join(TABLE)}.")
    row = TABLE[dtype]
    if exactness is not Exactness.APPROXIMATE:
        return row
    if budget is None:
        raise UsageError("Approximate passes need a budget.", hint='budget="1 meV/A".')
    allowance = {"energy": budget / 10, "forces": budget, "stress": budget / 10}
    symmetry = {quantity: bound.widened(allowance[quantity]) for quantity, bound in row.symmetry.items()}
    return replace(row, symmetry=symmetry, allowance=allowance)


_UNITS = {None: 1.0, "eV": 1.0, "meV": 1e-3}
# A or Å is U+0041, U+00C5 or U+212B.
_BUDGET = re.compile(r"\s*(\S+?)\s*(?:(m?eV)\s*/\s*(?:A|\u00c5|\u212b|Ang|Angstrom))?\s*")


def parse_budget(text: str | float) -> float:
    """A force budget in eV/Angstrom.

    Args:
        text: a number with one of the units ``meV/A``, ``eV/A`` (``Å``, ``Ang``, ``Angstrom`` for ``A``), or a
            plain number in eV/Angstrom.

    Raises:
        UsageError: anything else, or a budget that is not positive and finite.
    """
    found = _BUDGET.fullmatch(str(text))
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except ValueError:
        value = math.nan
    if isinstance(text, bool) or not (math.isfinite(value) and value > 0):
        raise UsageError(f"{text!r} is not a force budget.", hint='a positive force, such as "1 meV/A" or 0.001.')
    return value
