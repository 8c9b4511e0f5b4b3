"""The only loop over passes: run, time, verify, record.

A pass is not trusted.  It works on a private copy, and before its result is taken the graph is linted, the
interface and the modification flag are compared with the program that went in, and shapes, dtypes and irreps
are derived again.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

from torch import fx
from torch.fx.node import map_arg

from .errors import FxpassError, Location, PassError
from .ir.program import Program, TensorSpec
from .passes import Application, Outcome, Pass, Refusal
from .pipeline import format_options

Check = Callable[[Program], None]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: name of the pass.
        options: its options as text, those at their defaults left out.
        seconds: time inside the pass; verification is not counted.
        nodes_before: nodes of the graph that went in.
        nodes_after: nodes of the graph that came out.
        modified: whether the program changed.
        skipped: why the pass did not run, ``None`` where it did.
        applications: where its rules fired.
        refusals: where they nearly fired, and why they did not.
    """

    name: str
    options: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    skipped: str | None = None
    applications: tuple[Application, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """The program that came out of the last pass, and a record for every pass."""

    program: Program
    records: tuple[PassRecord, ...]


class Observer(Protocol):
    """Watches a run.  Every start has an end unless the run fails in between; programs must not be changed."""

    def on_pass_start(self, pass_: Pass, program: Program) -> None: ...

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        """``after`` is ``before`` itself where the pass was skipped or changed nothing."""


def run(program: Program, passes: Sequence[Pass], *, check: Check, observers: Sequence[Observer] = ()) -> RunResult:
    """Run ``passes`` in order over ``program``, which stays as it is.

    Args:
        program: a program that has passed ``check``.
        passes: a pass that does not run at the stage the program has reached is skipped, with the reason recorded.
        check: derives shapes, dtypes and irreps of a program again, and raises :class:`PassError` naming the node.
        observers: told about every pass, in order.

    Returns:
        The last program and the records.  A program that a pass reports as unmodified is passed on itself, so
        a pass that changes nothing but metadata has to report it as a modification.

    Raises:
        PassError: a pass crashed, returned a broken graph, changed the interface, changed shared tensors in
            place, dropped an assumption or reported a change as none.  Names the pass and those that ran before.
        FxpassError: whatever a pass raises on purpose, with the name of the pass filled in.
    """
    records: list[PassRecord] = []
    for pass_ in passes:
        for observer in observers:
            observer.on_pass_start(pass_, program)
        try:
            record, after = _run_pass(pass_, program, check)
        except FxpassError as error:
            error.where = replace(error.where, pass_name=error.where.pass_name or pass_.name)
            done = [record.name for record in records if record.skipped is None]
            error.what = f"{error.what.rstrip()}; passes that ran before: {', '.join(done) or 'none'}"
            raise
        records.append(record)
        for observer in observers:
            observer.on_pass_end(record, program, after)
        program = after
    return RunResult(program, tuple(records))


def _run_pass(pass_: Pass, program: Program, check: Check) -> tuple[PassRecord, Program]:
    size = len(program.graph.nodes)
    record = PassRecord(pass_.name, format_options(pass_), 0.0, size, size, modified=False)
    if program.stage not in pass_.stages:
        reason = f"runs at stage {' or '.join(pass_.stages)}, the program is at stage {program.stage}"
        return replace(record, skipped=reason), program
    copy = program.copy()
    versions = _versions(program)
    start = time.perf_counter()
    outcome = _apply(pass_, copy)
    seconds = time.perf_counter() - start
    if complaint := _complaint(program, outcome, versions):
        raise PassError(f"the pass {pass_.name!r} {complaint}", hint=_advice(pass_))
    if outcome.modified:
        outcome.program.graph_module.recompile()
        check(outcome.program)
        program = outcome.program
    record = replace(
        record,
        seconds=seconds,
        nodes_after=len(program.graph.nodes),
        modified=outcome.modified,
        applications=outcome.applications,
        refusals=outcome.refusals,
    )
    return record, program


def _apply(pass_: Pass, program: Program) -> Outcome:
    try:
        return pass_.apply(program)
    except FxpassError:
        raise
    except Exception as error:  # a plugin is foreign code: whatever its bug raises becomes an error that names it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).splitlines()
        crash = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise PassError(
            f"the pass {pass_.name!r} crashed: {crash}",
            where=Location(source=f"{frame.filename}:{frame.lineno}"),
            hint=_advice(pass_),
        ) from error


def _advice(pass_: Pass) -> str:
    cls = type(pass_)
    return f"the pipeline without {pass_.name!r}; this is a bug in {cls.__module__}.{cls.__qualname__}"


# --- what can be wrong with an outcome: each check says so in words that follow "the pass 'x'", or returns None


def _complaint(before: Program, outcome: object, versions: dict[str, int]) -> str | None:
    if not isinstance(outcome, Outcome) or not isinstance(outcome.program, Program):
        return f"returned {type(outcome).__name__} instead of an Outcome with a Program"
    written = [name for name, version in _versions(before).items() if version != versions[name]]
    if written:
        return f"changed the tensor {written[0]!r} in place, which is shared with the original model"
    after = outcome.program
    if broken := _broken_graph(after):
        return f"returned a broken graph: {broken}"
    if changed := _changed_interface(before, after):
        return changed
    if not outcome.modified and (difference := _difference(before, after)):
        return f"reported that it changed nothing, but {difference}"
    return None


def _versions(program: Program) -> dict[str, int]:
    """How often each weight and constant was written in place; inference tensors do not count it."""
    module = program.graph_module
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor._version for name, tensor in tensors if not tensor.is_inference()}


def _broken_graph(program: Program) -> str | None:
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]  # the lines below are the whole graph
    nodes = list(program.graph.nodes)
    if [node.op for node in nodes].count("output") != 1 or nodes[-1].op != "output":
        return "it does not end in its one output node"
    placeholders = sum(node.op == "placeholder" for node in nodes)
    if placeholders != len(program.inputs):
        return f"{placeholders} placeholders for {len(program.inputs)} inputs"
    returned = nodes[-1].args[0]
    if not isinstance(returned, (tuple, list)) or not all(isinstance(node, fx.Node) for node in returned):
        return f"it returns {returned!r} instead of a tuple of nodes"
    if len(returned) != len(program.outputs):
        return f"it returns {len(returned)} values for {len(program.outputs)} outputs"
    return None


def _changed_interface(before: Program, after: Program) -> str | None:
    if after.energy != before.energy:
        return f"changed the differentiated output from {before.energy!r} to {after.energy!r}"
    dropped = [assumption for assumption in before.assumptions if assumption not in after.assumptions]
    if dropped:
        return f"dropped the assumption {dropped[0]!r}, on which earlier passes rely"
    if (before.stage, after.stage) == ("energy", "forces"):
        return None
    if after.stage != before.stage:
        return f"took the program back from stage {before.stage} to {after.stage}"
    return _changed_specs("input", before.inputs, after.inputs) or _changed_specs(
        "output", before.outputs, after.outputs
    )


def _changed_specs(kind: str, before: tuple[TensorSpec, ...], after: tuple[TensorSpec, ...]) -> str | None:
    if before == after:
        return None
    old, new = ([spec.name for spec in specs] for specs in (before, after))
    if old != new:
        return f"changed the {kind}s from {', '.join(old)} to {', '.join(new) or 'none'}"
    was, now = next((was, now) for was, now in zip(before, after, strict=True) if was != now)
    field = next(field.name for field in fields(was) if getattr(was, field.name) != getattr(now, field.name))
    return f"changed {field} of the {kind} {was.name!r} from {getattr(was, field)} to {getattr(now, field)}"


def _difference(before: Program, after: Program) -> str | None:
    """The first difference between two programs of equal interface; names of nodes do not count."""
    if after.stage != before.stage or after.assumptions != before.assumptions:
        return "its stage or assumptions differ"
    old, new = list(before.graph.nodes), list(after.graph.nodes)
    origin = dict(zip(new, old, strict=False))  # the lengths are compared below
    for was, now in zip(old, new, strict=False):
        # compared as text, because nan differs from itself, and 1 does not differ from 1.0 and True
        arguments = map_arg((now.args, now.kwargs), lambda node: origin.get(node, node))
        if (was.op, was.target) != (now.op, now.target) or repr((was.args, was.kwargs)) != repr(arguments):
            return f"node {now.name!r} ({now.target}) differs"
        if now.op == "get_attr" and _attribute(before, was) is not _attribute(after, now):
            return f"the tensor {now.target!r} differs"
    if len(old) != len(new):
        return f"its graph has {len(new)} nodes instead of {len(old)}"
    return None


def _attribute(program: Program, node: fx.Node) -> object:
    return getattr(program.graph_module, str(node.target))
