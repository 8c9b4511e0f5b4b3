"""What ``optimize`` takes: a potential of a family, or a module of none with an example of its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration import sampled, trajectories
from .capture.capture import copy_model
from .compilation import Clock, Compiled
from .errors import UsageError
from .frontends.base import converted
from .functions import FAMILY, FunctionJudge, OptimizedFunction, lower_function, read_example
from .functions.judge import Probe
from .ir.program import Program
from .ir.verifier import verify
from .judge import Judge, allowed, weakest
from .lowering import lower
from .opening import open_function, open_model
from .optimized import Optimized, Rebuild
from .passes import Pass
from .registry import Registry
from .structures import Structure, read_structures
from .targets.base import Target
from .verify.tolerances import tolerance

#: a :class:`Structure`, ASE atoms, the path of a file with structures, or a list of these
Example = Any


class Potential:
    """A model of a family.

    Args:
        model: as the user gave it.
        passes: which will run.
        registry: of the target that derivatives are tested on.
        example: structures to verify on besides the frontend's own.
        calibration: structures to measure on besides the frontend's own; None for a trajectory where a pass needs one.
        budget: force error that passes may make.
        judged: whether the result will be verified.

    Raises:
        UsageError, StructureError: arguments that make no sense.
        UnsupportedModelError: no frontend covers the model.
    """

    def __init__(
        self,
        model: Any,
        passes: Sequence[Pass],
        registry: Registry,
        *,
        example: Example,
        calibration: Example,
        budget: str | float | None,
        judged: bool,
    ) -> None:
        self.budget, margin = budget, allowed(passes, budget)
        self.learnt = None if calibration is None else tuple(structures_in(calibration))
        if self.learnt == ():
            raise UsageError("the calibration set is empty", hint="structures like those the model will meet")
        self.structures = tuple(structures_in(example))
        self.calibrates = any(pass_.calibrated for pass_ in passes)
        original, self.frontend = open_model(model)
        self.name, self.family = _class_name(original), self.frontend.name
        self.source = copy_model(original)  # what comes of the original later is not the result's concern
        self.facts = self.frontend.attributes(self.source)
        reference, self.notes = self.frontend.reference(self.source)
        eager: Target = registry.target("eager")()
        self.judge = Judge(reference, self.frontend, self.facts, weakest(passes), margin, eager)
        if judged:
            tolerance(self.facts["dtype"], self.judge.exactness, margin)  # refuses what cannot be judged at the end
        for structure in (*self.structures, *(self.learnt or ())):
            structure.check(self.facts["numbers"])

    def capture(self, clock: Clock) -> Program:
        with clock.stage("capture"):
            captured = self.frontend.capture(self.source)
            verify(captured)
        with clock.stage("calibration"):
            probes = self.judge.probes()
            if self.learnt is None:
                self.learnt = trajectories(self.source, self.frontend, probes) if self.calibrates else ()
            return sampled(captured, self.frontend, self.facts, (*probes, *self.learnt))

    def lower(self, program: Program, target: Target) -> nn.Module:
        return lower(program, target, self.frontend, self.facts)

    def probes(self) -> tuple[tuple[Structure, ...], tuple[str, ...]]:
        return (*self.judge.probes(), *self.structures), ()

    def cast(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
        """The same in ``dtype``, as arguments of ``optimize``; passes measure on what they measured on here."""
        given = {"example": self.structures, "calibration": self.learnt or None, "budget": self.budget}
        return converted(self.source, dtype), given

    def result(self, done: Compiled, target: Target, rebuild: Rebuild) -> Optimized:
        parts = done.interface, done.program, done.report
        return Optimized(*parts, self.frontend, target, self.facts, rebuild, lowered=done.lowered)


class Function:
    """A module of no family, in evaluation mode.

    Args:
        model: as the user gave it.
        example_inputs: arguments of its ``forward``.
        dynamic: which of their sizes may change, by name.
        registry: of the target that derivatives are tested on.

    Raises:
        UsageError: the example does not fit the module, or the module is a potential.
        UnsupportedModelError: the module cannot be compiled, or fails on its example.
    """

    family = FAMILY.name

    def __init__(
        self, model: Any, example_inputs: Any, dynamic: Mapping[str, Mapping[int, str]] | None, registry: Registry
    ) -> None:
        original = open_function(model)
        self.name = _class_name(original)
        self.source = copy_model(original).eval()
        trained = [path or "it" for path, part in original.named_modules() if part.training][:3]
        notes = (f"{path} was in training mode, and is compiled as in evaluation mode" for path in trained)
        self.example = read_example(self.source, example_inputs, dynamic)
        self.notes = (*notes, *self.example.notes)
        self.facts = self.example.facts(self.source)
        self.judge = FunctionJudge(self.source, self.example, self.facts, registry.target("eager")())

    def capture(self, clock: Clock) -> Program:
        with clock.stage("capture"):
            captured = self.example.capture(self.source)
            verify(captured)
        return captured

    def lower(self, program: Program, target: Target) -> nn.Module:
        return lower_function(program, target, self.facts)

    def probes(self) -> tuple[tuple[Probe, ...], tuple[str, ...]]:
        return self.judge.probes()

    def cast(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
        """The same in ``dtype``, as arguments of ``optimize``."""
        return converted(self.source, dtype), {"example_inputs": self.example.cast(dtype)}

    def result(self, done: Compiled, target: Target, rebuild: Rebuild) -> OptimizedFunction:
        parts = done.interface, done.program, done.report
        return OptimizedFunction(*parts, FAMILY, target, self.facts, rebuild, lowered=done.lowered)  # type: ignore[arg-type]


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def structures_in(example: Example) -> Iterator[Structure]:
    """The structures that the user means.

    Raises:
        UsageError: something else than structures.
        StructureError: a file that holds none.
    """
    if example is None:
        return
    if isinstance(example, (str, Path)):
        yield from read_structures(example)
    elif isinstance(example, Structure):
        yield example
    elif hasattr(example, "get_positions"):
        yield Structure.from_ase(example)
    elif isinstance(example, Iterable):
        for item in example:
            yield from structures_in(item)
    else:
        raise UsageError(
            f"{type(example).__name__} is not a structure", hint="a Structure, ASE atoms, a list of these, or a file"
        )
