"""The way from a model to a verified result: capture, passes, lowering, verification, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from .errors import FxpassError, UsageError
from .ir.program import Program
from .ir.snapshot import snapshot
from .ir.verifier import verify
from .judge import custom_ops
from .lowering import Lowered, fingerprint, legal
from .passes import Pass
from .pipeline import format_passes, resolve
from .registry import Registry
from .report import PassRecord, Report
from .runner import Observer, RunResult, run
from .targets.base import Target, fallbacks
from .verify.receipt import Receipt

Progress = Callable[[str], None]

UNVERIFIED = "verification was turned off: nothing was compared with the original"

#: packages whose versions a report records
VERSIONED = (
    *("fxpass", "torch", "e3nn", "numpy"),
    *("mace-torch", "nequip", "nequip-allegro", "sevenn", "schnetpack", "deepmd-kit"),
)


@dataclass
class Clock:
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


class Judging(Protocol):
    """What results are held against."""

    def receipt(self, interface: nn.Module, program: Program, probes: Sequence[Any], /) -> Receipt:
        """``interface``, the drop-in of ``program``, compared with the original."""

    def failure(
        self, receipt: Receipt, captured: Program, passes: Sequence[Pass], probes: Sequence[Any], registry: Registry, /
    ) -> FxpassError:
        """The error for a failed receipt: who is to blame."""


class Subject(Protocol):
    """What is compiled: a potential, or a module of no family.

    Attributes:
        name: of the model's class.
        family: name of its frontend.
        notes: what the user must be told of it.
        judge: of its results.
    """

    name: str
    family: str
    notes: tuple[str, ...]

    @property
    def judge(self) -> Judging: ...

    def capture(self, clock: Clock) -> Program:
        """The program before any pass, verified, with samples to measure on."""

    def lower(self, program: Program, target: Target) -> nn.Module:
        """The drop-in of a program that is fit for ``target``."""

    def probes(self) -> tuple[Sequence[Any], tuple[str, ...]]:
        """What results are compared on, and what they cannot be compared on."""


@dataclass(frozen=True)
class Order:
    """What to do with a subject; the fields are arguments of ``optimize``."""

    passes: tuple[Pass, ...]
    target: str
    verify: bool = True
    dump: Path | None = None
    observers: Sequence[Observer] = ()
    progress: Progress | None = None


@dataclass(frozen=True)
class Compiled:
    """What came of it.

    Attributes:
        interface: the drop-in.
        program: after the passes.
        lowered: after those of the target; what runs.
        report: what was done.
    """

    interface: nn.Module
    program: Program
    lowered: Lowered
    report: Report


def compiled(subject: Subject, order: Order, backend: Target, registry: Registry) -> Compiled:
    """Capture, run passes, lower to ``backend``, verify.

    Raises:
        FxpassError: whatever stage fails, as ``optimize`` lists them.
    """
    clock = Clock(told=order.progress)
    folder = None if order.dump is None else _new_folder(order.dump)
    watchers = order.observers if folder is None else (*order.observers, _Dump(folder))
    captured = subject.capture(clock)
    with clock.stage("passes"):
        result = run(captured, order.passes, check=verify, observers=watchers)
        if result.program.stage == "energy":
            more = run(result.program, resolve("differentiate", registry), check=verify, observers=watchers)
            result = RunResult(more.program, (*result.records, *more.records))
    with clock.stage(f"lower to {order.target}"):
        fit = legal(result.program, backend, registry)
        interface = subject.lower(fit.program, backend)
    receipt: Receipt | None = None
    doubts: tuple[str, ...] = (UNVERIFIED,)
    if order.verify:
        with clock.stage("verify"):
            probes, refused = subject.probes()
            receipt = subject.judge.receipt(interface, result.program, probes)
            rows, differing = custom_ops(captured, order.passes)
            receipt, doubts = replace(receipt, rows=(*receipt.rows, *rows)), (*refused, *differing)
    report = Report(
        model=subject.name,
        frontend=subject.family,
        pipeline=format_passes(order.passes),
        target=order.target,
        versions=_versions(),
        records=(*result.records, *fit.records),
        timings=tuple(clock.timings),
        receipt=receipt,
        warnings=(*subject.notes, *fallbacks(interface), *doubts),
    )
    if folder is not None:
        (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if receipt is not None and not receipt.passed:
        raise subject.judge.failure(receipt, captured, order.passes, probes, registry)
    lowered = Lowered(fit.program, fingerprint(backend, registry))
    return Compiled(interface, result.program, lowered, report)


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
