"""``optimize`` and ``load``: the pipeline from a model to a verified drop-in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from . import package
from .calibration import sampled
from .committee import Committee, join
from .compilation import Order, Progress, compiled
from .errors import UsageError, VerificationError
from .frontends.base import converted
from .ir.program import Program
from .ir.verifier import verify as verify_program
from .judge import Judge, allowed, weakest
from .loading import assemble
from .opening import open_model
from .optimized import Optimized
from .passes import Pass
from .pipeline import resolve
from .registry import PASSES, default_registry
from .runner import Observer, RunResult, run
from .structures import probes_of
from .subjects import Example, Function, Potential, structures_in
from .targets.base import Target
from .verify.receipt import Receipt
from .verify.tolerances import parse_budget

__all__ = ["capture", "load", "open_model", "optimize", "run_passes", "verify"]

Passes = str | Pass | Iterable[str | Pass]


@overload
def optimize(model: nn.Module | str | Path, passes: Passes = ..., **options: Any) -> Optimized: ...


@overload
def optimize(model: list[Any] | tuple[Any, ...], passes: Passes = ..., **options: Any) -> Committee: ...


def optimize(  # type: ignore[misc]  # the overloads leave the options to this signature
    model: nn.Module | str | Path | list[Any] | tuple[Any, ...],
    passes: Passes = "default",
    *,
    example: Example | None = None,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    calibration: Example | None = None,
    target: str = "eager",
    budget: str | float | None = None,
    verify: bool = True,
    dump: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
) -> Optimized | Committee:
    """Compile a potential to a verified drop-in replacement.

    Args:
        model: a model of a family that has a frontend, the path of its checkpoint, or the name of one that the
            family's package brings with it, such as ``"7net-0"``.  Never modified.  Loading a checkpoint unpickles
            it, which runs code it names.  A list of these, or of optimised models, becomes one
            :class:`fxpass.committee.Committee`.
        passes: a preset (``"exact"``, ``"default"``, ``"portable"``), a pipeline text such as
            ``"fold-constants,specialize-heads{head=0}"``, a pass instance, or a list that mixes these.
            ``differentiate`` is added at the end where the passes leave it out.
        example: structures to verify on besides the frontend's own: a :class:`Structure`, ASE atoms, a
            list of these, or the path of a file with structures.
        example_inputs: for a module that is no potential, arguments of its ``forward``: a tuple of them, or a dict by
            name, of tensors and of values that stay as they are. The first size of each tensor may change from call to
            call where the module takes another one; equal ones change together.
        dynamic: which sizes may change instead, by name: ``{"x": {0: "batch", 2: "height"}}``; arguments inside
            others are named ``"data.positions"``. ``{}`` for an argument fixes all its sizes.
        calibration: structures that passes measure on while they choose, of the same kinds, besides the frontend's
            own. Without them: for passes that calibrate, a short molecular dynamics started from the frontend's.
        target: how the result runs: ``"eager"``, ``"torchscript"``, ``"inductor"``, or ``"native"``, which builds
            kernels in C++ on this machine and is by far the fastest.
        budget: force error that approximate passes may make, ``"1 meV/A"`` or a number in eV/Angstrom; goes to the
            passes that have none of their own. The receipt allows it, or else the sum of what the passes allow.
        verify: compare with the original in float64 and test the physics; ``False`` is noted in the report.
        dump: a folder to write every intermediate graph and the report to; it must not exist.
        observers: told about every pass that runs.
        progress: called with the name of each stage as it begins.

    Returns:
        A module with the original's ``forward``, and ``graph_module``, ``report``, ``calculator()``, ``save()``.

    Raises:
        UsageError: an argument that makes no sense; nothing was done.
        UnsupportedModelError: no frontend covers the model, or the variant; nothing was done.
        CaptureError: the model cannot be captured as a dynamic graph.
        PassError: a pass broke its promise.
        LoweringError: the target cannot carry the graph.
        VerificationError: the result is outside its tolerance; the pass that broke it is named.
    """
    given = {"example": example, "calibration": calibration, "budget": budget}
    if example_inputs is not None:
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{wrong[0]}= is for potentials, and example_inputs= for modules that are none",
                hint="one of them",
            )
    elif dynamic is not None:
        raise UsageError("dynamic= names sizes of example_inputs, which are missing", hint="example_inputs=(...)")
    elif isinstance(model, (list, tuple)):
        if dump is not None:
            raise UsageError("dump= takes one model", hint="optimise the members one by one with a folder for each")
        each = partial(optimize, passes=passes, **given, verify=verify, observers=observers, progress=progress)
        return join([m if isinstance(m, Optimized) else each(m) for m in model], target, verify=verify)
    registry = default_registry()
    chosen = tuple(_budgeted(pass_, budget) for pass_ in resolve(passes, registry))
    backend: Target = registry.target(target)()
    order = Order(chosen, target, verify, None if dump is None else Path(dump), observers, progress)
    subject: Potential | Function
    with torch.inference_mode(False), torch.enable_grad():
        if example_inputs is not None:
            subject = Function(model, example_inputs, dynamic, registry)
        else:
            subject = Potential(model, chosen, registry, **given, judged=verify)
        done = compiled(subject, order, backend, registry)

    def rebuild(dtype: torch.dtype, device: torch.device) -> Optimized:
        if device.type != "cpu":
            raise UsageError(f"an optimised model cannot move to {device} yet", hint="the original model there")
        other, options = subject.cast(dtype)
        return optimize(other, chosen, target=target, verify=verify, **options)

    return subject.result(done, backend, rebuild)


def load(path: str | Path) -> Optimized:
    """Load what ``Optimized.save`` wrote; runs no code that the file carries (TorchScript files hold code).

    What another fxpass or torch lowered is lowered anew, and a warning of the report says so.

    Raises:
        PackageError: not a saved model, truncated, altered, or of a newer format.
    """
    path = Path(path)
    return assemble(package.load(path), path)


def capture(model: nn.Module | str | Path, *, calibration: Example | None = None) -> Program:
    """The energy program of a model, verified, before any pass.

    Args:
        model: as for :func:`optimize`.
        calibration: structures that passes measure on, besides the frontend's own.

    Raises:
        UnsupportedModelError, CaptureError: as for :func:`optimize`.
    """
    model, frontend = open_model(model)
    with torch.inference_mode(False), torch.enable_grad():
        facts = frontend.attributes(model)
        program = frontend.capture(model)
        verify_program(program)
        probes = probes_of(facts)
        return sampled(program, frontend, facts, (*probes, *structures_in(calibration)))


def run_passes(program: Program, passes: Passes, *, observers: Sequence[Observer] = ()) -> RunResult:
    """Run passes over a program with the verifier after each: what ``optimize`` does between capture and lowering."""
    with torch.inference_mode(False), torch.enable_grad():
        return run(program, resolve(passes, default_registry()), check=verify_program, observers=observers)


def verify(
    optimized: Optimized,
    against: nn.Module | str | Path,
    *,
    example: Example | None = None,
    budget: str | float | None = None,
    probes: bool = True,
) -> Receipt:
    """Compare an optimised or loaded model with an original: the receipt, passed or not.

    Args:
        optimized: what ``optimize`` or ``load`` returned.
        against: the original, or the path of its checkpoint.
        example: structures to compare on.
        budget: for results of approximate passes; by default that of their own receipt, or of the passes themselves.
        probes: compare on the frontend's probe structures too.
    """
    if optimized.program.stage == "function":
        raise UsageError("a module without a family is compared by optimize itself", hint="its report has the receipt")
    registry = default_registry()
    own = optimized.report.receipt
    if budget is None:
        budget = own.budget if own is not None else allowed(resolve(optimized.report.pipeline, registry), None)
    margin = None if budget is None else parse_budget(budget)
    given = tuple(structures_in(example))
    with torch.inference_mode(False), torch.enable_grad():
        model, frontend = open_model(against)
        if frontend.name != optimized.frontend.name:
            raise UsageError(f"the original is of the family {frontend.name}, the result of {optimized.frontend.name}")
        facts = frontend.attributes(model)
        for key in ("numbers", "heads", "cutoff"):
            there, here = facts.get(key), optimized.facts.get(key)
            if there != here:
                raise VerificationError(f"this is not the original: {key} is {there} there, {here} in the result")
        dtype = getattr(torch, optimized.facts["dtype"])
        if facts["dtype"] != optimized.facts["dtype"]:
            model = converted(model, dtype)
            facts = frontend.attributes(model)
        model, _ = frontend.reference(model)
        chosen = [registry.pass_class(r.name) for r in optimized.report.records if r.name in registry.names(PASSES)]
        eager: Target = registry.target("eager")()
        judge = Judge(model, frontend, facts, weakest(chosen), margin, eager)
        return judge.receipt(optimized.interface, optimized.program, (*(judge.probes() if probes else ()), *given))


def _budgeted(pass_: Pass, budget: str | float | None) -> Pass:
    """``pass_`` with the user's budget, where it takes one and has none."""
    if budget is None or pass_.default_budget is not None or getattr(pass_, "budget", budget) is not None:
        return pass_
    return replace(pass_, budget=budget)  # type: ignore[call-arg]
