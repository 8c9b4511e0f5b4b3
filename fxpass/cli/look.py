"""``fxpass inspect`` and ``fxpass diff``: what is in a model or a result, and what passes make of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .. import api
from ..errors import UsageError
from ..ir.diff import GraphDiff
from ..ir.diff import diff as compare
from ..ir.program import Program
from ..ir.snapshot import Snapshot, snapshot
from ..ir.verifier import verify
from ..package import check_new, is_package, read, write_new
from ..passes import Pass
from ..pipeline import format_pass, format_passes, resolve
from ..registry import default_registry, did_you_mean
from ..render import html
from ..render.terminal import graph_diff, graph_summary, pipeline_table, report_view
from ..report import PassRecord, Report
from ..structures import SYMBOLS
from . import options
from .answer import Answer
from .options import Commands

INSPECT = """
fxpass inspect example:small
fxpass inspect example:small --at atoms=108,edges=4600
fxpass inspect example:small --graph
fxpass inspect example:small --kernels
fxpass inspect example:small --sensitivity -p 'pin-precision{compute=float16}'
"""

DIFF = """
fxpass diff example:small -p fold-constants,dead-code
fxpass diff example:small -p exact --html exact.html
"""


def add_to(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add(
        "inspect",
        inspect,
        "show the graph of a model or of a result: ops, irreps, cost",
        options.calibration_option(),
        more="Of a result, which is what fxpass optimize wrote, also the passes, the receipt and the target.",
        examples=INSPECT,
    )
    parser.add_argument("model", metavar="MODEL|OUT", help=f"{options.MODEL_HELP}, or a result")
    parser.add_argument("--at", metavar="SIZES", default="", help="sizes to give the cost at: atoms=108,edges=4600")
    parser.add_argument("--graph", action="store_true", help="print the whole graph")
    parser.add_argument(
        "--sensitivity", action="store_true", help="rank regions by what low precision there does to forces"
    )
    parser.add_argument(
        "--kernels",
        nargs="?",
        const="",
        metavar="NAME",
        help="what runs each semantic op on the target native; with NAME, the C++ source of that kernel",
    )
    parser.add_argument(
        "-p",
        "--passes",
        metavar="PIPELINE",
        help="with --sensitivity: a pass that ranks (default: pin-precision); with --kernels: the passes before",
    )

    parser = commands.add(
        "diff",
        diff,
        "show what each pass does to a model, and why it does no more",
        options.model_argument(),
        options.passes_option(),
        options.file_option("--html", help="write the whole diff as a page"),
        examples=DIFF,
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=options.positive,
        default=10,
        help="nodes to show of each kind in each module (default: 10)",
    )


# --- inspect


def inspect(arguments: argparse.Namespace) -> Answer:
    if arguments.sensitivity:
        return _sensitivity(arguments)
    if arguments.kernels is not None:
        return _kernels(arguments)
    if arguments.passes or arguments.calibration:
        raise UsageError("--passes and --calibration are for --sensitivity", hint="fxpass inspect MODEL --sensitivity")
    word, given = arguments.model, _sizes(arguments.at)
    shown: list[RenderableType] = []
    if is_package(Path(word)):
        saved = read(Path(word))
        program, report, family, facts = saved.program, saved.report, saved.family, saved.facts
        verify(program)  # derives the shapes and irreps, which files do not hold
        data = {"model": word, "kind": "result", "report": report.to_json()}
        shown.append(report_view(report))
    else:
        with options.progress(stages=1) as bar:
            bar.stage("capture")
            model, frontend = api.open_model(options.find_model(word))
            program, family, facts = api.capture(model), frontend.name, frontend.attributes(model)
        data = {"model": word, "kind": "model"}
    graph = snapshot(program, Path(word).name)
    sizes = graph.reference_sizes()
    for name in given:
        if name not in sizes:
            known = ", ".join(sorted(sizes))
            raise UsageError(f"there is no size {name!r}{did_you_mean(name, sizes)}", hint=f"--at with {known}")
    sizes |= given
    data |= {"family": family, "facts": dict(facts), "graph": _graph_to_json(graph, sizes)}
    if arguments.graph:
        data["graph"]["nodes"] = graph.to_json()["nodes"]
        return Answer(data, (graph.code(),))
    amount = graph.cost.at(**sizes)
    cost = Text(f"Cost there: {amount.flops:.3g} FLOPs, {amount.bytes:.3g} bytes.")
    return Answer(data, (_facts(family, facts), *shown, graph_summary(graph, **sizes), cost))


def _sensitivity(arguments: argparse.Namespace) -> Answer:
    """The ranking of a pass that has one, after the passes before it."""
    chosen = resolve(arguments.passes or "pin-precision", default_registry())
    place = next((k for k, each in enumerate(chosen) if hasattr(each, "sensitivity")), None)
    if place is None:
        raise UsageError(f"no pass of {format_passes(chosen)!r} ranks regions", hint="-p pin-precision")
    with options.progress(stages=2) as bar:
        bar.stage("capture")
        structures = options.find_structures(arguments.calibration) or None
        program = api.capture(options.find_model(arguments.model), calibration=structures)
        program = api.run_passes(program, chosen[:place]).program
        bar.stage("sensitivity")
        rows = chosen[place].sensitivity(program)  # type: ignore[attr-defined]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("region", "max |dF|", "rms dF", "dE/atom", "FLOPs", "bytes saved", "per GFLOP", "per MB", "precision")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("region", "precision") else "right")
    data = []
    for row in rows:
        errors = row.errors
        ratios = {"per_gflop": row.per_gflop, "per_megabyte": row.per_megabyte}
        numbers = (errors.largest, errors.rms, errors.energy, row.flops, row.bytes, *ratios.values())
        table.add_row(row.region, *(f"{number:.2e}" for number in numbers), row.precision)
        data.append({**asdict(row), **{name: v if math.isfinite(v) else None for name, v in ratios.items()}})
    note = Text(
        "Each region alone in the low type, against float64: eV/Angstrom, eV/atom. Worst first: the ratio is of the "
        "larger of max |dF| and 10 dE/atom."
    )
    pipeline = format_passes(chosen[: place + 1])
    return Answer({"model": arguments.model, "pipeline": pipeline, "sensitivity": data}, (Text(pipeline), table, note))


def _kernels(arguments: argparse.Namespace) -> Answer:
    """What runs the semantic ops of a model on the target native, or the source of one kernel."""
    word = arguments.model
    if is_package(Path(word)):
        result = api.load(word)
    else:
        with options.progress(stages=4) as bar:
            model, passes = options.find_model(word), arguments.passes or "default"
            result = api.optimize(model, passes, target="native", verify=False, progress=bar.stage)
    if arguments.kernels:
        name, known = arguments.kernels, result.kernels
        if name not in known:
            what = f"there is no kernel {name!r}{did_you_mean(name, known)}"
            raise UsageError(what, hint="fxpass inspect MODEL --kernels lists them")
        return Answer({"model": word, "kernel": name, "source": known[name]}, (known[name],))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "node", "kernel"):
        table.add_column(heading)
    rows = dict.fromkeys(result.manifest)  # what two lowered programs have in common once
    for row in rows:
        table.add_row(row.op, row.node, row.kernel or f"none: {row.reason}")
    note = Text("Sources: --kernels NAME. Ops that are not listed run as ATen.")
    return Answer({"model": word, "manifest": [asdict(row) for row in rows]}, (table, note))


def _facts(family: str, facts: Mapping[str, Any]) -> Text:
    """One line of what the family says about the model."""
    species = " ".join(SYMBOLS[number] for number in facts["numbers"])
    return Text(f"{family}, {facts['dtype']}, cutoff {facts['cutoff']:g} Angstrom, species {species}")


def _graph_to_json(graph: Snapshot, at: Mapping[str, float]) -> dict[str, Any]:
    amount = graph.cost.at(**at)
    whole = graph.to_json()
    return {
        "stage": graph.stage,
        "node_count": len(graph.nodes),
        "inputs": whole["inputs"],
        "outputs": whole["outputs"],
        "cost": {"flops": str(graph.cost.flops), "bytes": str(graph.cost.bytes)},
        "at": {**at, "flops": amount.flops, "bytes": amount.bytes},
        "ops": [asdict(row) for row in graph.op_rows(**at)],
    }


def _sizes(text: str) -> dict[str, float]:
    """The sizes of ``atoms=108,edges=4600``."""
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if not value.strip().isdecimal():
            raise UsageError(f"{part.strip()!r} is not a size", hint="--at atoms=108,edges=4600")
        sizes[name.strip()] = float(value)
    return sizes


# --- diff


class _Steps:
    """An observer that keeps a record of every pass with the snapshots around it."""

    def __init__(self, captured: Program) -> None:
        self.captured = captured
        self.snapshots = [snapshot(captured, "capture")]
        self.records: list[PassRecord] = []
        self._label = ""

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        self._label = format_pass(pass_)

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        last = self.snapshots[-1]
        self.records.append(record)
        self.snapshots.append(snapshot(after, self._label, seconds=record.seconds) if record.modified else last)

    def diffs(self) -> list[GraphDiff]:
        """What each pass changed."""
        return [compare(before, after) for before, after in zip(self.snapshots, self.snapshots[1:], strict=False)]


def diff(arguments: argparse.Namespace) -> Answer:
    page = None if arguments.html is None else Path(arguments.html)
    if page is not None:
        check_new(page, overwrite=arguments.overwrite)
    chosen = resolve(arguments.passes, default_registry())
    with options.progress(stages=1, passes=arguments.passes) as bar:
        bar.stage("capture")
        model, frontend = api.open_model(options.find_model(arguments.model))
        steps = _Steps(api.capture(model))
        api.run_passes(steps.captured, chosen, observers=[steps, bar])
    report = Report(
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        frontend=frontend.name,
        pipeline=format_passes(chosen),
        target="none",
        records=tuple(steps.records),
    )
    diffs = steps.diffs()
    if page is not None:
        text = html.page(report, diffs, title=f"{arguments.model}: {report.pipeline}")
        write_new(page, lambda file: _write(file, text), overwrite=arguments.overwrite)
    passes = [
        {**record, "diff": change.to_json()} for record, change in zip(report.to_json()["passes"], diffs, strict=True)
    ]
    return Answer(
        {"model": arguments.model, "pipeline": report.pipeline, "passes": passes},
        (*(graph_diff(change, limit=arguments.limit) for change in diffs), pipeline_table(report.records, diffs)),
    )


def _write(file: IO[bytes], text: str) -> None:
    file.write(text.encode())
