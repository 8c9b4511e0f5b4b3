"""The receipt: what was checked about a result, how far off it was, and what was allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from ..errors import FxpassError, PackageError, StructureError, VerificationError
from ..passes import Exactness
from ..structures import Evaluation, Evaluator, Structure
from . import physics
from .physics import SYMMETRIES, deviation, largest
from .tolerances import OWN_ERROR_FACTOR, OWN_ERROR_FLOOR, Bound, Tolerance, tolerance

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all

# What an evaluator raises when it cannot evaluate. It becomes a failed row; anything else is a bug and passes.
_EVALUATION_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, FxpassError),
)


@dataclass(frozen=True)
class Row:
    """One check on one structure.

    Attributes:
        check: what was checked, e.g. ``"forces"`` or ``"rotation"``.
        structure: name of the structure.
        value: the error found, NaN where it could not be computed.
        limit: the largest error allowed.
        unit: of both.
        note: how it was found, or why it could not be.
    """

    check: str
    structure: str
    value: float
    limit: float
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """The value is within the limit; nothing passes that is NaN or infinite."""
        return math.isfinite(self.value) and math.isfinite(self.limit) and self.value <= self.limit

    @property
    def used(self) -> float:
        """The share of the limit that the value takes; infinite where there is no number."""
        share = self.value / self.limit if self.limit else math.inf
        return share if math.isfinite(share) else math.inf


@dataclass(frozen=True)
class Checks:
    """Rows that pass or fail together; failed ones included."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Every row passed, and there is one at least."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)


@dataclass(frozen=True)
class Receipt(Checks):
    """All that was checked about one result.

    Attributes:
        rows: the checks, failed ones included.
        dtype: element type of the result.
        exactness: the class under which it was judged.
        budget: eV/Angstrom that approximate passes had, or ``None``.
    """

    dtype: str
    exactness: Exactness
    budget: float | None = None

    def summary(self) -> str:
        """One line: the worst failures, or the row that came nearest to its limit."""
        if not self.rows:
            return "receipt FAILED: nothing was checked"
        places = len({row.structure for row in self.rows})
        if self.failures:
            worst = sorted(self.failures, key=lambda row: row.used, reverse=True)
            more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
            told = "; ".join(_told(row) for row in worst[:3])
            return f"receipt FAILED {len(worst)} of {len(self.rows)} checks ({self.dtype}): {told}{more}"
        nearest = max(self.rows, key=lambda row: row.used)
        return (
            f"receipt passed: {len(self.rows)} checks on {places} structures ({self.dtype}); "
            f"nearest to its limit: {_told(nearest)}"
        )

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain JSON values; numbers that are not finite become ``None``."""
        rows = [
            {
                "check": row.check,
                "structure": row.structure,
                "value": row.value if math.isfinite(row.value) else None,
                "limit": row.limit if math.isfinite(row.limit) else None,
                "unit": row.unit,
                "passed": row.passed,
                "note": row.note,
            }
            for row in self.rows
        ]
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "exactness": self.exactness.value,
            "budget": self.budget,
            "rows": rows,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Receipt:
        """The receipt that ``to_json`` wrote; what passed is judged again from the numbers.

        Raises:
            PackageError: ``data`` is not a receipt.
        """
        try:
            rows = tuple(
                Row(
                    str(row["check"]),
                    str(row["structure"]),
                    math.nan if row["value"] is None else float(row["value"]),
                    math.nan if row["limit"] is None else float(row["limit"]),
                    str(row["unit"]),
                    str(row["note"]),
                )
                for row in data["rows"]
            )
            budget = None if data["budget"] is None else float(data["budget"])
            return cls(rows, str(data["dtype"]), Exactness(data["exactness"]), budget)
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(f"This is not a receipt: {type(error).__name__} {error}.") from error


def _told(row: Row) -> str:
    if not math.isfinite(row.value):
        return f"{row.check} of {row.structure}: {row.note or 'not a finite number'}"
    sign = "<=" if row.passed else ">"
    return f"{row.check} of {row.structure} {row.value:.1e} {sign} {row.limit:.1e} {row.unit}"


@np.errstate(invalid="ignore", over="ignore")  # NaN and infinities make rows, not warnings
def make_receipt(
    reference64: Evaluator,
    candidate: Evaluator,
    *,
    structures: Sequence[Structure],
    dtype: str,
    exactness: Exactness,
    original: Evaluator | None = None,
    budget: float | None = None,
    candidate64: Evaluator | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Compare a result with its original, and test its physics.

    Rows on every structure: ``energy``, ``forces``, ``forces rms`` and ``stress`` against ``reference64``;
    ``rotation``, ``inversion``, ``permutation``, ``translation`` and ``net force``. Where there are two atoms or
    more: forces against ``finite differences`` of the energy, and work around a ``closed loop``. Where there are
    three periodic vectors and a stress: stress against finite differences in ``strain``. A structure that cannot be
    evaluated has one row, ``evaluation``, which fails.

    A row of symmetry or derivatives that exceeds the table is measured on the original as well, and passes within
    twice the original's own error: a model that breaks a symmetry may go on breaking it.

    For float32 the structures are first rounded to a grid on which coordinates and edge vectors are exact in
    float32, so that rounding of the input is not taken for an error of the model.

    Cost: 2 evaluations a structure (3 with ``original``), 4 for symmetry (3 for one atom), 6 each for finite
    differences, loop and strain, 1 more where the result is not float64, and those that a row above the table takes.
    The structures of ``fxpass.structures.probe_structures``, 12 atoms at most, take 107, or 118 for float32.

    Args:
        reference64: the original in float64.
        candidate: the result, computing in ``dtype``.
        structures: what to compare on.
        dtype: ``"float64"`` or ``"float32"``.
        exactness: the weakest class among the passes that ran.
        original: the original in ``dtype``; a float32 result may be twice as far from float64 as the original is,
            no more, which is stricter than the table for a well-conditioned model and looser for an
            ill-conditioned one, whose own float32 forces miss the table.
        budget: eV/Angstrom, for approximate passes.
        candidate64: the result computing in float64 throughout, for finite differences; by default the candidate, if
            it is float64.
        progress: called before each step.

    Returns:
        A receipt, passed or not. What could not be computed is a failed row.

    Raises:
        StructureError: no structures, or one that makes no sense or that the model does not know.
        UsageError: a dtype without tolerances, or approximate passes without a budget.
    """
    bounds = tolerance(dtype, exactness, budget)
    if not structures:
        raise StructureError("A receipt needs at least one structure.")
    for structure in structures:
        structure.check()
    if dtype == "float32":
        structures = [on_float32_grid(structure) for structure in structures]
    result = _checked(candidate, dtype, "result")
    models = _Models(
        _checked(reference64, "float64", "original in float64"),
        result,
        None if original is None else _checked(original, dtype, "original"),
        result
        if dtype == "float64" and candidate64 is None
        else _checked(candidate64 or _missing, "float64", "result in float64"),
    )
    done = 0

    def step(what: str, structure: Structure) -> None:
        nonlocal done
        if progress is not None:
            progress(f"{what} of {structure.name}", done, 3 * len(structures))
        done += 1

    rows: list[Row] = []
    measured: list[_Measured] = []
    for structure in structures:
        step("energy, forces, stress", structure)
        try:
            measured.append(_measure(models, structure))
        except StructureError:  # what the user gave, not what the model made of it
            raise
        except _EVALUATION_ERRORS as error:
            rows.append(_failed("evaluation", structure, error))
    scaled: dict[str, float] = {}
    if original is not None and dtype == "float32":
        shares = _own_shares(measured, bounds)
        floor = {"forces": OWN_ERROR_FLOOR}  # energy and stress keep the whole of their rows
        scaled = {q: float(np.maximum(OWN_ERROR_FACTOR * share, floor.get(q, 1.0))) for q, share in shares.items()}
    for case in measured:
        rows += _value_rows(case, bounds, scaled)
    for case in measured:
        step("symmetry", case.structure)
        rows += _symmetry_rows(models, case, bounds)
    for case in measured:
        step("derivatives", case.structure)
        rows += _derivative_rows(models, case, bounds)
    return Receipt(tuple(rows), dtype, exactness, budget)


@dataclass(frozen=True)
class _Models:
    reference: Evaluator
    candidate: Evaluator
    original: Evaluator | None
    candidate64: Evaluator


@dataclass(frozen=True)
class _Measured:
    """A structure and what each evaluator says about it; the reference sets the scale of all errors."""

    structure: Structure
    reference: Evaluation
    candidate: Evaluation
    original: Evaluation | None

    @property
    def scales(self) -> dict[str, float]:
        stress = self.reference.stress
        return {
            "energy": abs(self.reference.energy) / math.sqrt(len(self.structure)),
            "forces": largest(self.reference.forces),
            "stress": 0.0 if stress is None else largest(stress),
        }


def _missing(structure: Structure) -> Evaluation:
    raise VerificationError("derivatives need the result in float64, and it was not given")


def _checked(evaluate: Evaluator, dtype: str, role: str) -> Evaluator:
    """``evaluate``, refusing results of another dtype or shape than they must have."""

    def checked(structure: Structure) -> Evaluation:
        found = evaluate(structure)
        if found.dtype != dtype:
            raise VerificationError(f"the {role} computed in {found.dtype}, not in {dtype}")
        if found.forces.shape != structure.positions.shape:
            raise VerificationError(f"the {role} returned forces of shape {found.forces.shape}")
        if found.stress is not None and found.stress.shape != (3, 3):
            raise VerificationError(f"the {role} returned a stress of shape {found.stress.shape}")
        return found

    return checked


def _measure(models: _Models, structure: Structure) -> _Measured:
    original = None if models.original is None else models.original(structure)
    case = _Measured(structure, models.reference(structure), models.candidate(structure), original)
    for found in (case.candidate, case.original or case.reference):
        deviation(found, case.reference)  # refuses a stress on one side only
    return case


def _failed(check: str, structure: Structure, error: Exception) -> Row:
    reason = " ".join(str(error).split()) or type(error).__name__
    return Row(check, structure.name, math.nan, math.nan, "", f"could not be computed: {reason}")


def _attempt(check: str, structure: Structure, compute: Callable[[], list[Row]]) -> list[Row]:
    """The rows that ``compute`` makes, or a failed one that says why it could not."""
    try:
        return compute()
    except StructureError:
        raise
    except _EVALUATION_ERRORS as error:
        return [_failed(check, structure, error)]


def _own_shares(measured: Sequence[_Measured], bounds: Tolerance) -> dict[str, float]:
    """The largest share of each limit that the original's own error takes on any structure.

    The largest over all structures, because on a single small one it may be small by luck.
    """
    shares: dict[str, float] = {}
    for case in measured:
        for quantity, error in deviation(case.original or case.reference, case.reference).items():
            share = error / bounds.values[quantity].limit(case.scales[quantity])
            shares[quantity] = float(np.maximum(shares.get(quantity, 0.0), share))  # keeps NaN
    return shares


def _value_rows(case: _Measured, bounds: Tolerance, scaled: Mapping[str, float]) -> list[Row]:
    """Rows for energy, forces (largest and rms) and stress against the float64 original."""
    name, rows = case.structure.name, []
    own = {} if case.original is None else deviation(case.original, case.reference)
    for quantity, value in deviation(case.candidate, case.reference).items():
        bound = bounds.values[quantity]
        allowance = bounds.allowance.get(quantity, 0.0)
        row = bound.limit(case.scales[quantity]) + allowance
        limit = bound.limit(case.scales[quantity]) * scaled.get(quantity, 1.0) + allowance
        note = f"original {own[quantity]:.1e}" if quantity in own else ""
        if row < value <= limit:
            note += f"; over the table's {row:.1e}, allowed because the original is as far off"
        rows.append(Row(quantity, name, value, limit, bound.unit, note))
        if quantity == "forces":
            rms = float(np.sqrt(np.mean((case.candidate.forces - case.reference.forces) ** 2)))
            rows.append(Row("forces rms", name, rms, limit, bound.unit))
    return rows


def _judged(
    check: str, case: _Measured, value: float, limit: float, unit: str, own: Callable[[], float], note: str = ""
) -> Row:
    """A row; one that exceeds the table may be as wrong as twice the original is, which ``own`` computes."""
    if value > limit:
        error = own()
        note = f"{note}; original {error:.1e}".removeprefix("; ")
        limit = float(np.fmax(limit, OWN_ERROR_FACTOR * error))
    return Row(check, case.structure.name, value, limit, unit, note)


def _symmetry_rows(models: _Models, case: _Measured, bounds: Tolerance) -> list[Row]:
    """One row a symmetry, for the quantity that is nearest to its limit, and one for the net force."""
    structure, scales = case.structure, case.scales
    original, original_here = models.original or models.reference, case.original or case.reference

    def symmetry(name: str) -> list[Row]:
        own = cache(lambda: physics.symmetry_error(name, original, structure, original_here))
        found = physics.symmetry_error(name, models.candidate, structure, case.candidate)

        def row(quantity: str) -> Row:
            bound = bounds.symmetry[quantity]
            limit = bound.limit(scales[quantity])
            return _judged(name, case, found[quantity], limit, bound.unit, lambda: own()[quantity], quantity)

        return [max(map(row, found), key=lambda row: row.used)]

    rows = []
    for name in SYMMETRIES:
        if name != "permutation" or len(structure) > 1:
            rows += _attempt(name, structure, partial(symmetry, name))
    bound = bounds.symmetry["forces"]
    net, own_net = (largest(found.forces.sum(axis=0)) for found in (case.candidate, original_here))
    limit = bound.limit(scales["forces"]) * math.sqrt(len(structure))
    rows.append(_judged("net force", case, net, limit, bound.unit, lambda: own_net))
    return rows


def _derivative_rows(models: _Models, case: _Measured, bounds: Tolerance) -> list[Row]:
    """Rows for finite differences, the closed loop and strain, all in float64."""
    structure, evaluate = case.structure, models.candidate64

    @cache
    def here() -> Evaluation:
        return case.candidate if evaluate is models.candidate else evaluate(structure)

    def slope(check: str, bound: Bound, scale: float, error: Callable[..., tuple[float, str]]) -> list[Row]:
        value, note = error(evaluate, structure, here())

        def own() -> float:
            return error(models.reference, structure, case.reference)[0]

        return [_judged(check, case, value, bound.limit(scale), bound.unit, own, note)]

    def loop() -> list[Row]:
        value, force_constant = physics.curl(evaluate, structure)
        limit = bounds.curl.limit(force_constant)

        def own() -> float:
            return physics.curl(models.reference, structure)[0]

        return [_judged("closed loop", case, value, limit, bounds.curl.unit, own)]

    def forces() -> list[Row]:
        return slope("finite differences", bounds.gradient, case.scales["forces"], physics.force_error)

    def strain() -> list[Row]:
        return slope("strain", bounds.strain, case.scales["stress"], physics.stress_error)

    rows = []
    if len(structure) > 1:
        rows += _attempt("finite differences", structure, forces)
        rows += _attempt("closed loop", structure, loop)
    if all(structure.pbc) and case.reference.stress is not None:
        rows += _attempt("strain", structure, strain)
    return rows


def on_float32_grid(structure: Structure) -> Structure:
    """The structure with coordinates rounded to a power of two that leaves float32 two bits to spare.

    Differences of positions, and their sums with cell vectors, are then exact in float32. Atoms move by 1e-5
    Angstrom at most in a cell of 64 Angstrom.
    """
    extent = max(1.0, largest(structure.positions), largest(structure.cell))
    step = 2.0 ** (math.ceil(math.log2(extent)) - 22)
    positions, cell = (np.round(x / step) * step for x in (structure.positions, structure.cell))
    return replace(structure, positions=positions, cell=cell)
