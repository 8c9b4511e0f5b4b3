"""``fxpass compress``: functions of one distance become tables, as users of model compression know it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from rich.table import Table

from ..algebra.piecewise import parse_grid
from ..errors import UsageError
from ..ir import ops
from ..ir.program import Program, attribute
from ..ir.scalar_functions import function_of
from ..ir.tabulation import curves
from ..package import check_new, write_new
from ..passes import Pass
from ..render.tables import table_plot, table_png
from ..render.terminal import receipt_table
from ..report import PassRecord
from . import options
from .answer import Answer
from .optimize import optimized
from .options import Commands

EXAMPLES = """
fxpass compress example:small -d 0.01 -o 3 -s compressed.fxp
fxpass compress example:small --budget '0.01 meV/A' -s certified.fxp --plot tables.svg --report tables.json
"""

STEP, ORDER = 0.01, 3  # what existing compressors take unless told otherwise
ALLOWED = "1 meV/A"  # force error of a table of a step that the user chose
BEFORE = "fold-constants,specialize-species,specialize-heads,common-subexpressions,dead-code"


def add_to(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add(
        "compress",
        compress,
        "replace embedding nets and radial networks by tables",
        *options.optimizing_options("-s", "--output"),
        more="With --budget and without -d the step is the widest that keeps forces within the budget. A step that "
        "does not divide the range is made smaller until it does.",
        examples=EXAMPLES,
    )
    parser.add_argument("-d", "--step", metavar="STEP", type=_step, help=f"of the tables (default: {STEP})")
    parser.add_argument(
        "-o", "--order", type=int, choices=(3, 5), help=f"of the polynomials (default: {ORDER}, with --budget 5)"
    )
    parser.add_argument("--plot", metavar="FILE", help="new SVG or PNG of errors against distance and against the step")
    parser.add_argument("--report", metavar="FILE", help="new JSON file with every table and what was not tabulated")


def compress(arguments: argparse.Namespace) -> Answer:
    output = Path(arguments.output)
    check_new(output, overwrite=arguments.overwrite)
    extras = {name: Path(word) for name in ("plot", "report") if (word := getattr(arguments, name)) is not None}
    for path in extras.values():
        check_new(path, overwrite=arguments.overwrite)
    if "plot" in extras and extras["plot"].suffix not in (".svg", ".png"):
        raise UsageError(f"{extras['plot']} is neither .svg nor .png", hint="tables.svg")
    seen = _Watcher()
    result = optimized(arguments, _pipeline(arguments), arguments.budget or ALLOWED, observers=[seen])
    rows = seen.rows(full=bool(extras))
    if not rows:
        reasons = "; ".join(f"{r.nodes[0]}: {r.reason}" for r in seen.refusals())
        reasons = reasons or "no function of a distance was found"
        raise UsageError(f"nothing was tabulated: {reasons}", hint="fxpass optimize, which does without tables")
    result.save(output, overwrite=arguments.overwrite)
    receipt = result.report.receipt
    size = output.stat().st_size
    data = {
        "output": str(output),
        "bytes": size,
        "pipeline": result.report.pipeline,
        "tables": rows,
        "not_tabulated": [{"nodes": list(r.nodes), "module": r.module, "reason": r.reason} for r in seen.refusals()],
        "receipt": None if receipt is None else receipt.to_json(),
        "warnings": list(result.report.warnings),
    }
    _write(extras, data, overwrite=arguments.overwrite)
    shown: list[Any] = [_shown(rows)]
    if receipt is not None:
        shown.append(receipt_table(receipt.to_json()))
    shown += [f"warning: {warning}" for warning in result.report.warnings]
    return Answer(data, [*shown, f"{output}: {size / 1e3:,.0f} kB"])


def _pipeline(arguments: argparse.Namespace) -> str:
    searched = arguments.budget is not None and arguments.step is None
    step = "auto" if searched else repr(arguments.step or STEP)
    order = arguments.order or (5 if searched else ORDER)
    return f"{BEFORE},tabulate{{dx={step},order={order}}},exact"


def _step(text: str) -> float:
    """A positive number, for ``type=`` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


class _Watcher:
    """Keeps what the pass ``tabulate`` was given and made."""

    def __init__(self) -> None:
        self.kept: tuple[PassRecord, Program, Program] | None = None

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        pass

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        if record.name == "tabulate":
            self.kept = record, before, after

    def refusals(self) -> list[Any]:
        return [] if self.kept is None else list(self.kept[0].refusals)

    def rows(self, *, full: bool) -> list[dict[str, Any]]:
        """One object for each table; with ``full`` with the curves of its errors, which takes some seconds."""
        if self.kept is None:
            return []
        record, before, after = self.kept
        nodes = [n for n in after.graph.nodes if n.target is ops.table]
        rows = []
        for application, node in zip(record.applications, nodes, strict=True):
            function = function_of(before, application.node)
            assert function is not None
            stored, grid = attribute(after, node.args[2]), parse_grid(str(node.args[3]))
            x = node.args[0]
            x = x.args[0] if x.target is torch.ops.aten.squeeze.dim else x
            if function.nearer is not None and x.name == function.nearer.variable_name:
                function = function.nearer
            row: dict[str, Any] = {
                "module": application.module,
                "node": application.node,
                "variable": x.name,
                "tables": function.tables,
                "order": grid.order,
                "start": grid.start,
                "end": grid.end,
                "reach": grid.last,
                "step": grid.step,
                "knots": grid.cells + grid.coarse + 1,
                "channels": function.channels,
                "bytes": stored.numel() * stored.element_size(),
                "value_bound": grid.value_bound,
                "slope_bound": grid.slope_bound,
            }
            if full:
                found = curves(function, grid, stored)
                row["curves"] = {
                    "x": found.x,
                    "value": found.value,
                    "slope": found.slope,
                    "steps": found.steps,
                    "by_order": {str(k): {"value": v, "slope": s} for k, (v, s) in found.by_order.items()},
                }
                row |= {"value_error": max(found.value), "slope_error": max(found.slope)}
            rows.append(row)
        return rows


def _shown(rows: list[dict[str, Any]]) -> Table:
    table = Table("module", "order", "range", "step", "knots", "tables", "channels", "kB", "value", "slope")
    table.caption = "value and slope: certified bounds of their errors"
    for row in rows:
        table.add_row(
            row["module"] or row["node"],
            str(row["order"]),
            f"{row['start']:.3g} to {row['end']:.4g}",
            f"{row['step']:.3g}",
            str(row["knots"]),
            str(row["tables"]),
            str(row["channels"]),
            f"{row['bytes'] / 1e3:,.0f}",
            f"{row['value_bound']:.1e}",
            f"{row['slope_bound']:.1e}",
        )
    return table


def _write(extras: Mapping[str, Path], data: Mapping[str, Any], *, overwrite: bool) -> None:
    contents: dict[str, Callable[[], bytes]] = {
        "report": lambda: json.dumps(data, indent=1, allow_nan=False).encode() + b"\n",
        "plot": lambda: (table_png if extras["plot"].suffix == ".png" else table_plot)(data["tables"]),
    }
    for name, path in extras.items():
        content = contents[name]()

        def write(file: IO[bytes], content: bytes = content) -> None:
            file.write(content)

        write_new(path, write, overwrite=overwrite)
