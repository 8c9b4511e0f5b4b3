"""``optimize`` and ``load``: the pipeline from a model to a verified drop-in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from . import package
from .calibration import sampled, trajectories
from .capture.capture import copy_model
from .committee import Committee, join
from .errors import FxpassError, Location, PackageError, PassError, UnsupportedModelError, UsageError, VerificationError
from .frontends.base import Frontend, converted
from .functions import FAMILY, FunctionJudge, OptimizedFunction, lower_function, read_example
from .ir.program import Program
from .ir.snapshot import snapshot
from .ir.verifier import verify as verify_program
from .judge import Judge, allowed, custom_ops, weakest
from .lowering import legal, lower
from .optimized import Optimized
from .passes import Pass
from .pipeline import format_passes, resolve
from .registry import FRONTENDS, PASSES, default_registry
from .report import PassRecord, Report
from .runner import Observer, RunResult, run
from .structures import Structure, probes_of, read_structures
from .targets.base import Target, fallbacks
from .verify.receipt import Receipt
from .verify.tolerances import parse_budget, tolerance

#: a :class:`Structure`, ASE atoms, the path of a file with structures, or a list of these
Example = Any
Passes = str | Pass | Iterable[str | Pass]
Progress = Callable[[str], None]

UNVERIFIED = "verification was turned off: nothing was compared with the original"

#: packages whose versions a report records
VERSIONED = (
    *("fxpass", "torch", "e3nn", "numpy"),
    *("mace-torch", "nequip", "nequip-allegro", "sevenn", "schnetpack"),
)


@dataclass
class _Clock:
    """Wall time of each stage, in order."""

    timings: list[tuple[str, float]] = field(default_factory=list)
    told: Progress | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.told is not None:
            self.told(name)
        start = time.perf_counter()
        yield
        self.timings.append((name, time.perf_counter() - start))


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
        target: how the result runs: ``"eager"``, ``"torchscript"`` or ``"inductor"``.
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
    if example_inputs is not None:
        given = {"example": example, "calibration": calibration, "budget": budget}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{wrong[0]}= is for potentials, and example_inputs= for modules that are none",
                hint="one of them",
            )
        return _optimize_function(
            *(model, passes, example_inputs, dynamic),
            target=target,
            verify=verify,
            dump=dump,
            observers=observers,
            progress=progress,
        )
    if dynamic is not None:
        raise UsageError("dynamic= names sizes of example_inputs, which are missing", hint="example_inputs=(...)")
    if isinstance(model, (list, tuple)):
        if dump is not None:
            raise UsageError("dump= takes one model", hint="optimise the members one by one with a folder for each")
        each = partial(optimize, passes=passes, example=example, calibration=calibration, budget=budget)
        each = partial(each, verify=verify, observers=observers, progress=progress)
        return join([m if isinstance(m, Optimized) else each(m) for m in model], target, verify=verify)
    registry = default_registry()
    chosen = tuple(_budgeted(pass_, budget) for pass_ in resolve(passes, registry))
    backend: Target = registry.target(target)()
    margin = allowed(chosen, budget)
    learnt = None if calibration is None else tuple(_structures(calibration))
    if learnt == ():
        raise UsageError("the calibration set is empty", hint="structures like those the model will meet")
    structures = tuple(_structures(example))
    clock = _Clock(told=progress)
    with torch.inference_mode(False), torch.enable_grad():
        original, frontend = open_model(model)
        source = copy_model(original)  # what comes of the original later is not the result's concern
        facts = frontend.attributes(source)
        reference, caveats = frontend.reference(source)
        judge = Judge(reference, frontend, facts, weakest(chosen), margin, registry.target("eager")())
        if verify:
            tolerance(facts["dtype"], judge.exactness, margin)  # refuses what could not be judged at the end
        for structure in (*structures, *(learnt or ())):
            structure.check(facts["numbers"])
        folder = None if dump is None else _new_folder(Path(dump))
        watchers = observers if folder is None else (*observers, _Dump(folder))
        with clock.stage("capture"):
            captured = frontend.capture(source)
            verify_program(captured)
        with clock.stage("calibration"):
            if learnt is None:
                moving = any(pass_.calibrated for pass_ in chosen)
                learnt = trajectories(source, frontend, judge.probes()) if moving else ()
            captured = sampled(captured, frontend, facts, (*judge.probes(), *learnt))
        with clock.stage("passes"):
            result = run(captured, chosen, check=verify_program, observers=watchers)
            if result.program.stage == "energy":
                result = _continue(result, resolve("differentiate", registry), watchers)
        with clock.stage(f"lower to {target}"):
            fit = legal(result.program, backend, registry)
            interface = lower(fit.program, backend, frontend, facts)
        receipt: Receipt | None = None
        doubts: tuple[str, ...] = ()
        if verify:
            with clock.stage("verify"):
                probes = (*judge.probes(), *structures)
                receipt = judge.receipt(interface, result.program, probes)
                rows, doubts = custom_ops(captured, chosen)
                receipt = replace(receipt, rows=(*receipt.rows, *rows))
        report = Report(
            model=f"{type(original).__module__}.{type(original).__qualname__}",
            frontend=frontend.name,
            pipeline=format_passes(chosen),
            target=target,
            versions=_versions(),
            records=(*result.records, *fit.records),
            timings=tuple(clock.timings),
            receipt=receipt,
            warnings=(*caveats, *fallbacks(interface), *(doubts if verify else (UNVERIFIED,))),
        )
        if folder is not None:
            (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
        if receipt is not None and not receipt.passed:
            raise judge.failure(receipt, captured, chosen, probes, registry)

    def rebuild(dtype: torch.dtype, device: torch.device) -> Optimized:
        if device.type != "cpu":
            raise UsageError(f"an optimised model cannot move to {device} yet", hint="the original model there")
        other = converted(source, dtype)
        return optimize(
            other, chosen, example=structures, calibration=learnt or None, target=target, budget=budget, verify=verify
        )

    return Optimized(interface, result.program, report, frontend, backend, facts, rebuild)


def _optimize_function(
    model: Any,
    passes: Passes,
    example_inputs: Any,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    *,
    target: str,
    verify: bool,
    dump: str | Path | None,
    observers: Sequence[Observer],
    progress: Progress | None,
) -> OptimizedFunction:
    """:func:`optimize` for a module that no frontend covers."""
    _plain_module(model)
    registry = default_registry()
    chosen = resolve(passes, registry)
    backend: Target = registry.target(target)()
    clock = _Clock(told=progress)
    with torch.inference_mode(False), torch.enable_grad():
        source = copy_model(model).eval()
        trained = [path or "it" for path, part in model.named_modules() if part.training][:3]
        notes = tuple(f"{path} was in training mode, and is compiled as in evaluation mode" for path in trained)
        with clock.stage("capture"):
            given = read_example(source, example_inputs, dynamic)
            captured = given.capture(source)
            verify_program(captured)
        facts = given.facts(source)
        judge = FunctionJudge(source, given, facts, registry.target("eager")())
        folder = None if dump is None else _new_folder(Path(dump))
        watchers = observers if folder is None else (*observers, _Dump(folder))
        with clock.stage("passes"):
            result = run(captured, chosen, check=verify_program, observers=watchers)
        with clock.stage(f"lower to {target}"):
            fit = legal(result.program, backend, registry)
            interface = lower_function(fit.program, backend, facts)
        receipt: Receipt | None = None
        doubts: tuple[str, ...] = (UNVERIFIED,)
        if verify:
            with clock.stage("verify"):
                probes, refused = judge.probes()
                receipt = judge.receipt(interface, result.program, probes)
                rows, doubts = custom_ops(captured, chosen)
                receipt, doubts = replace(receipt, rows=(*receipt.rows, *rows)), (*refused, *doubts)
        report = Report(
            model=f"{type(model).__module__}.{type(model).__qualname__}",
            frontend=FAMILY.name,
            pipeline=format_passes(chosen),
            target=target,
            versions=_versions(),
            records=(*result.records, *fit.records),
            timings=tuple(clock.timings),
            receipt=receipt,
            warnings=(*notes, *given.notes, *fallbacks(interface), *doubts),
        )
        if folder is not None:
            (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
        if receipt is not None and not receipt.passed:
            raise judge.failure(receipt, captured, chosen, probes, registry)

    def rebuild(dtype: torch.dtype, device: torch.device) -> OptimizedFunction:
        if device.type != "cpu":
            raise UsageError(f"an optimised module cannot move to {device} yet", hint="the original module there")
        other, options = converted(source, dtype), {"target": target, "verify": verify}
        return optimize(other, chosen, example_inputs=given.cast(dtype), **options)  # type: ignore[return-value]

    return OptimizedFunction(interface, result.program, report, FAMILY, backend, facts, rebuild)  # type: ignore[arg-type]


def _plain_module(model: Any) -> None:
    """Refuse what ``example_inputs`` are not for."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"example_inputs are for a torch.nn.Module, not for a {type(model).__name__}")
    if isinstance(model, Optimized):
        raise UsageError("this model is optimised already", hint="optimise the original")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"this module is compiled to TorchScript already ({model.original_name}), which hides what it is made of",
            hint="optimise the module that it was made from",
        )
    listing = default_registry().listing(FRONTENDS)
    frontends: list[Frontend] = [listed.loaded() for listed in listing if listed.problem is None]
    family = next((f.name for f in frontends if f.recognises(model)), None)
    if family is not None:
        raise UsageError(
            f"this is a model of the family {family}, which has inputs of its own",
            hint="leave example_inputs out; example= takes structures",
        )
    _no_hooks(model)


def load(path: str | Path) -> Optimized:
    """Load what ``Optimized.save`` wrote; runs no code that the file carries (TorchScript files hold code).

    Raises:
        PackageError: not a saved model, truncated, altered, or of a newer format.
    """
    saved = package.load(Path(path))
    try:
        return assemble(saved)
    except PassError as error:
        what = f"{path} is damaged: {error.what}"
        raise PackageError(what, where=error.where, hint="save the model again") from error


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
        return sampled(program, frontend, facts, (*probes, *_structures(calibration)))


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
    given = tuple(_structures(example))
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


def open_model(model: nn.Module | str | Path) -> tuple[nn.Module, Frontend]:
    """A model, or the one that a checkpoint holds, and the frontend that covers it.

    Raises:
        UsageError: no such file, or not a model.
        UnsupportedModelError: no frontend covers the model, or the file cannot be loaded.
        MissingExtraError: the family's package is not installed.
    """
    listing = default_registry().listing(FRONTENDS)
    frontends: list[Frontend] = [listed.loaded() for listed in listing if listed.problem is None]
    broken = "".join(f"; {listed.problem}" for listed in listing if listed.problem is not None)
    known = ", ".join(f.name for f in frontends) + broken
    if isinstance(model, (str, Path)):
        path = Path(model)
        names = {name: f for f in frontends for name in getattr(f, "names", ())}
        if not path.is_file() and str(model).lower() not in names:
            shipped = f", or one of {', '.join(names)}" if names else ""
            raise UsageError(f"there is no file {path}", hint=f"check the path of the checkpoint{shipped}")
        readers = (f for f in frontends if f.reads(str(path)))
        reader = next(readers, None) if path.is_file() else names[str(model).lower()]
        if reader is None:
            raise UnsupportedModelError(f"{path} is not a checkpoint of a known family", hint=f"one of {known}")
        model = _load(reader, path)
    if isinstance(model, Optimized):
        raise UsageError("this model is optimised already", hint="optimise the original")
    if not isinstance(model, nn.Module):
        raise UsageError(f"{type(model).__name__} is not a model", hint="a torch.nn.Module or the path of a checkpoint")
    found = next((f for f in frontends if f.recognises(model)), None)
    if found is None:
        cls = type(model)
        raise UnsupportedModelError(
            "no frontend covers this model",
            where=Location(module_path="(model)", source=f"{cls.__module__}.{cls.__qualname__}"),
            hint=f"a model of {known}; example_inputs=(...) for a module that is no potential; or register a frontend "
            "(entry point group fxpass.frontends)",
        )
    _no_hooks(model)
    found.check(model)
    return model, found


def _no_hooks(model: nn.Module) -> None:
    """Refuse a model whose hooks change what it computes: no graph has them."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and (module._forward_hooks or module._forward_pre_hooks):
            raise UnsupportedModelError(
                "this module has forward hooks, which a compiled model would not run",
                where=Location(module_path=path or "(model)", source=type(module).__qualname__),
                hint="remove them; parametrisations by hooks (weight_norm) have a function that does",
            )


def _load(reader: Frontend, path: Path) -> nn.Module:
    try:
        return reader.load(str(path))
    except FxpassError:
        raise
    except Exception as error:  # unpickling runs whatever code the file names, which may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UnsupportedModelError(
            f"{path} cannot be loaded: {type(error).__name__}: {reason}",
            hint=f"save the checkpoint again; it needs the version of {reader.name} that wrote it",
        ) from error


# --- the parts


def assemble(saved: package.Saved) -> Optimized:
    """The drop-in of what was loaded from a file."""
    registry = default_registry()
    backend: Target = registry.target(saved.report.target)()
    if saved.program.stage == "function":
        with torch.inference_mode(False), torch.enable_grad():
            verify_program(saved.program)
            interface = saved.script
            if interface is None:
                interface = lower_function(legal(saved.program, backend, registry).program, backend, saved.facts)
        return OptimizedFunction(interface, saved.program, saved.report, FAMILY, backend, saved.facts, None)  # type: ignore[arg-type]
    frontend = registry.frontend(saved.family)()
    with torch.inference_mode(False), torch.enable_grad():
        verify_program(saved.program)
        interface = saved.script
        if interface is None:
            interface = lower(legal(saved.program, backend, registry).program, backend, frontend, saved.facts)
    return Optimized(interface, saved.program, saved.report, frontend, backend, saved.facts, None)


def _continue(done: RunResult, passes: Sequence[Pass], observers: Sequence[Observer]) -> RunResult:
    more = run(done.program, passes, check=verify_program, observers=observers)
    return RunResult(more.program, (*done.records, *more.records))


def _budgeted(pass_: Pass, budget: str | float | None) -> Pass:
    """``pass_`` with the user's budget, where it takes one and has none."""
    if budget is None or pass_.default_budget is not None or getattr(pass_, "budget", budget) is not None:
        return pass_
    return replace(pass_, budget=budget)  # type: ignore[call-arg]


def _structures(example: Any) -> Iterator[Structure]:
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
            yield from _structures(item)
    else:
        raise UsageError(
            f"{type(example).__name__} is not a structure", hint="a Structure, ASE atoms, a list of these, or a file"
        )


def _versions() -> tuple[tuple[str, str], ...]:
    found = []
    for name in VERSIONED:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


class _Dump:
    """Writes every graph that passes change as soon as it is there, so that a failure leaves what led to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = 0

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        if self.done == 0:
            self._write("captured", program)

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        self.done += 1
        if record.modified:
            self._write(record.name, after)

    def _write(self, title: str, program: Program) -> None:
        (self.folder / f"{self.done:02d}-{title}.txt").write_text(snapshot(program, title).code() + "\n")


def _new_folder(path: Path) -> Path:
    try:
        path.mkdir()
    except FileExistsError as error:
        raise UsageError(f"{path} exists and is left as it is", hint="a folder that does not exist yet") from error
    except OSError as error:
        raise UsageError(f"the folder {path} cannot be made: {error.strerror}") from error
    return path

