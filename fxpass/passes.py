"""What a pass is.

A pass is a frozen dataclass whose fields are its options, over a plain function on the graph.
Its docstring has a fixed form (``fxpass explain NAME`` prints it)::

    One-line summary.

    Before / After: the graph on both sides, as text.
    Holds when: the conditions that make the rewrite legal.
    Keeps: what stays the same (values, bits, gradients, interface).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from .ir.program import Program, Stage


class Exactness(Enum):
    """How far a pass may move the result."""

    EXACT = "exact"  # same bits
    REASSOCIATES = "reassociates"  # rounding only
    APPROXIMATE = "approximate"  # within a budget in eV/Angstrom


@dataclass(frozen=True)
class Application:
    """One place where a rule fired: its name, the node it replaced, how many nodes went and came."""

    rule: str
    node: str
    module: str = ""
    removed: int = 0
    added: int = 0


@dataclass(frozen=True)
class Refusal:
    """One place where a rule nearly fired: the reason, and the nodes to blame."""

    rule: str
    reason: str
    nodes: tuple[str, ...] = ()
    module: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a pass returns: the new program, whether it changed, where it fired and where not."""

    program: Program
    modified: bool
    applications: tuple[Application, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Pass:
    """Base class of all passes.

    Class attributes:
        name: kebab-case name, unique in a registry.
        exactness: how far the pass may move the result.
        stages: the stages of a program on which the pass runs.
        calibrated: the pass measures on ``Program.samples``, which must then hold more than probe structures.
        default_budget: eV/Angstrom that an approximate pass allows itself where it is given no budget; with ``None``
            it takes that of ``optimize``.

    A pass that is approximate has an option ``budget``: eV/Angstrom, a text such as ``"1 meV/A"``, or ``None``.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness] = Exactness.EXACT
    stages: ClassVar[tuple[Stage, ...]] = ("energy", "forces", "function")
    calibrated: ClassVar[bool] = False
    default_budget: ClassVar[float | None] = None

    def apply(self, program: Program) -> Outcome:
        """Run on ``program``, which is a private copy: its graph may be changed in place."""
        raise NotImplementedError
