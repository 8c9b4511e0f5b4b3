"""What a result is held against: the original, the budget, and who is to blame where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from .errors import FxpassError, Location, VerificationError
from .frontends.base import Frontend, converted
from .instruments import bisect
from .ir.decompositions import decompose
from .ir.program import Program
from .ir.verifier import verify
from .lowering import legal, lower
from .passes import Exactness, Pass
from .pipeline import resolve
from .registry import Registry
from .runner import run
from .structures import Evaluator, Structure, probes_of
from .targets.base import Target
from .verify.devices import device_rows, kernel_rows
from .verify.receipt import Receipt, Row, make_receipt
from .verify.tolerances import parse_budget

#: samples on which implementations of custom ops are compared
MULTIDEVICE = 3


@dataclass(frozen=True)
class Judge:
    """What the results for one model are held against.

    Attributes:
        model: the original, or the copy of it whose forces are the gradient of its energy.
        frontend: of its family.
        facts: what ``frontend.attributes`` told about it.
        exactness: the weakest class among the passes.
        budget: force error that a receipt allows, eV/Angstrom; needed where passes approximate.
        eager: the target that derivatives are tested on.
    """

    model: nn.Module
    frontend: Frontend
    facts: Mapping[str, Any]
    exactness: Exactness
    budget: float | None
    eager: Target

    def probes(self) -> tuple[Structure, ...]:
        """The frontend's probe structures, and one of them for every further head."""
        probes = probes_of(self.facts)
        heads = self.facts.get("heads", [])
        if len(heads) > 1:  # a model may refuse to choose
            probes = tuple(replace(probe, head=heads[0]) for probe in probes)
        return (*probes, *(replace(probes[0], name=f"{probes[0].name}, head {h}", head=h) for h in heads[1:]))

    def evaluator(self, module: nn.Module) -> Evaluator:
        return lambda structure: self.frontend.evaluate(module, structure)

    def receipt(self, interface: nn.Module, program: Program, structures: Sequence[Structure]) -> Receipt:
        """Compare ``interface``; derivatives are tested on ``program`` in float64, before lowering rounds constants."""
        dtype = self.facts["dtype"]
        single = dtype == "float32"
        reference = self.evaluator(converted(self.model, torch.float64))
        twin = None
        if single or self.exactness is Exactness.APPROXIMATE:  # which may compute in more than one type
            facts = {**self.facts, "dtype": "float64"}
            twin = self.evaluator(lower(program.cast(torch.float64), self.eager, self.frontend, facts))
        receipt = make_receipt(
            reference,
            self.evaluator(interface),
            structures=structures,
            dtype=dtype,
            exactness=self.exactness,
            original=self.evaluator(self.model) if single else None,
            budget=self.budget,
            candidate64=twin,
        )
        if "structures" in self.facts:  # it may be bound to these atoms in this order, as bonds between them are
            receipt = replace(receipt, rows=tuple(row for row in receipt.rows if row.check != "permutation"))
        return receipt

    def failure(
        self,
        receipt: Receipt,
        captured: Program,
        passes: Sequence[Pass],
        probes: Sequence[Structure],
        registry: Registry,
    ) -> FxpassError:
        """The error for a failed receipt, with the first pass after which it fails."""
        bad = {row.structure for row in receipt.failures}
        suspects = [s for s in probes if s.name in bad]

        @cache
        def is_good(program: Program) -> bool:
            if program.stage == "energy":
                program = run(program, resolve("differentiate", registry), check=verify).program
            fit = legal(program, self.eager, registry).program
            interface = lower(fit, self.eager, self.frontend, self.facts)
            return self.receipt(interface, program, suspects).passed

        hint = "the pipeline without it, a wider budget=, or fxpass inspect to look at the graph"
        return blamed(receipt, captured, passes, is_good, hint)


def blamed(
    receipt: Receipt, captured: Program, passes: Sequence[Pass], is_good: Callable[[Program], bool], hint: str
) -> VerificationError:
    """The error for a failed receipt: names the first pass after which a program is no longer good, if it is a pass."""
    if not is_good(captured):
        guilty, blame = None, "the capture"
    else:
        found = bisect(captured, passes, is_good, check=verify)
        guilty = None if found is None else found.name
        blame = "the lowering" if found is None else f"the pass {found.name}"
    return VerificationError(
        f"the result is outside its tolerance and is not returned; {blame} is to blame. {receipt.summary()}",
        where=Location(pass_name=guilty),
        hint=hint,
    )


def weakest(passes: Iterable[Pass | type[Pass]]) -> Exactness:
    """The weakest class among the passes; capture itself reassociates."""
    weak = [Exactness.REASSOCIATES, *(p.exactness for p in passes)]
    return Exactness.APPROXIMATE if Exactness.APPROXIMATE in weak else Exactness.REASSOCIATES


def allowed(passes: Sequence[Pass], budget: str | float | None) -> float | None:
    """The force error that a receipt allows, eV/Angstrom: the user's, or the sum of what the passes state."""
    if budget is not None:
        return parse_budget(budget)
    approximate = [pass_ for pass_ in passes if pass_.exactness is Exactness.APPROXIMATE]
    stated = [getattr(pass_, "budget", None) or pass_.default_budget for pass_ in approximate]
    if not stated or None in stated:
        return None
    return sum(parse_budget(b) for b in stated if b is not None)


def custom_ops(program: Program, passes: Sequence[Pass]) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """What the receipt says of custom ops: their references on every device against them, and kernels that differ."""
    references = next((r for r in (getattr(pass_, "references", None) for pass_ in passes) if r), None)
    done = decompose(program, references, made_by="verify")
    if not done.replaced or done.opaque:
        return (), ()
    samples = program.samples[:MULTIDEVICE]
    wrong = [row for row in kernel_rows(program, samples, references) if not row.passed]
    doubts = tuple(f"{row.check} differs from its reference by {row.value:.1e} ({row.structure})" for row in wrong)
    return device_rows(program, done.program, samples), doubts
