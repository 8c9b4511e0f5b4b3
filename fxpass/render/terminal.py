"""What the command line shows, as rich renderables: coloured on a terminal, plain text in a pipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import IO, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ..ir.cost import Cost, pretty
from ..ir.diff import GraphDiff, ModuleDiff
from ..ir.snapshot import Snapshot
from ..passes import Refusal
from ..report import PassRecord, Report

PIPE_WIDTH = 160

_ADDED, _REMOVED, _CHANGED, _QUIET = "green", "red", "yellow", "bright_black"


def console(file: IO[str] | None = None) -> Console:
    """A console on ``file`` (default: standard output).

    On a terminal it has the terminal's width and colours; elsewhere it writes plain text 160 columns wide.
    """
    terminal = Console(file=file, highlight=False)
    return terminal if terminal.is_terminal else Console(file=file, highlight=False, no_color=True, width=PIPE_WIDTH)


def _table(*columns: tuple[str, str], title: str | None = None) -> Table:
    """A table of (heading, ``"left"`` or ``"right"``) columns."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify="right" if justify == "right" else "left")
    return table


def graph_summary(snapshot: Snapshot, **sizes: float) -> RenderableType:
    """What a program consists of: size, cost, inputs and outputs, and a table of its ops.

    Args:
        snapshot: the program.
        sizes: e.g. ``atoms=108, edges=4610``; shares of FLOPs and bytes are taken at these sizes.
    """
    at = snapshot.reference_sizes(**sizes)
    heading = Text.assemble(
        (snapshot.label, "bold"), f": {snapshot.stage} program, {len(snapshot.nodes)} nodes\n", *_cost(snapshot.cost)
    )
    ports = _table(("", "left"), ("name", "left"), ("type", "left"), ("irreps", "left"), ("unit", "left"))
    for role, group in (("in", snapshot.inputs), ("out", snapshot.outputs)):
        for port in group:
            ports.add_row(Text(role, _QUIET), *map(Text, (port.name, port.dtype + port.shape, port.irreps, port.unit)))
    ops = _table(("op", "left"), ("calls", "right"), ("flops", "right"), ("bytes", "right"), ("irreps", "left"))
    rows = snapshot.op_rows(**sizes)
    free = [row for row in rows if not (row.flops or row.bytes)]
    for row in rows:
        if row in free:
            continue
        style = "bold" if row.target.startswith("fxpass.") else ""
        irreps = Text(", ".join(row.irreps), _QUIET, no_wrap=True, overflow="ellipsis")
        ops.add_row(Text(row.target, style), str(row.count), _share(row.flops), _share(row.bytes), irreps)
    if free:
        names = Text(", ".join(row.target for row in free), _QUIET)
        ops.add_row(Text(f"{len(free)} free ops", _QUIET), str(sum(row.count for row in free)), "-", "-", names)
    where = ", ".join(f"{name} = {value:g}" for name, value in at.items())
    return Group(heading, ports, ops, Text(f"Shares of FLOPs and bytes at {where}.", _QUIET))


def graph_diff(diff: GraphDiff, *, limit: int | None = None) -> RenderableType:
    """A diff as a tree over module paths: red removed, green added, yellow changed, the unchanged counted.

    Args:
        diff: two snapshots compared.
        limit: show at most this many nodes of each kind in each module.
    """
    heading = Text.assemble((diff.before, "bold"), " → ", (diff.after, "bold"), "  ", *_delta(diff))
    if not diff:
        return Text.assemble(heading, ("  no change", _QUIET))
    lines: list[RenderableType] = [heading, *_cost_change(diff)]
    ops = ", ".join(f"{target} {count:+d}" for target, count in diff.op_delta.items())
    if ops:
        lines.append(Text(f"ops: {ops}", _QUIET))
    modules = diff.by_module()
    touched = [part for part in modules if part.added or part.removed or part.changed]
    tree = Tree("", hide_root=True, guide_style=_QUIET)
    for part in touched:
        counts = _counts(len(part.added), len(part.removed), len(part.changed))
        branch = tree.add(_line(Text.assemble((part.place, "bold"), "  ", *counts)))
        _add_nodes(branch, part, limit)
    rest = [part for part in modules if part not in touched]
    if rest:
        unchanged = sum(part.unchanged for part in rest)
        tree.add(Text(f"… {unchanged} unchanged in {len(rest)} other modules", _QUIET))
    return Group(*lines, tree)


def pipeline_table(records: Sequence[PassRecord], diffs: Sequence[GraphDiff] = ()) -> RenderableType:
    """One row for each pass, and below it why its rules did not fire.

    Args:
        records: what the passes did.
        diffs: one for each record, for the cost before and after; none where it is not known.
    """
    columns = [("pass", "left"), ("time", "right"), ("nodes", "right"), ("applied", "left"), ("refused", "right")]
    table = _table(*columns, *([("flops before → after", "left")] if diffs else []))
    for record, diff in zip(records, diffs or repeat(None, len(records)), strict=True):
        cells: list[RenderableType] = [
            Text.assemble((record.name, "bold"), f"{{{record.options}}}" if record.options else ""),
            Text("-" if record.skipped else f"{record.seconds:.2f} s"),
            Text.assemble(str(record.nodes_before), (" → ", _QUIET), str(record.nodes_after)),
            _applied(record),
            Text(str(len(record.refusals)) if record.refusals else "-"),
        ]
        if diff is not None:
            cells.append(_flops_change(diff))
        table.add_row(*cells)
    reasons = [line for record in records for line in _refusals(record)]
    if not reasons:
        return table
    return Group(table, Text("Why a rule did not fire", "bold"), *reasons)


def receipt_table(receipt: Mapping[str, Any]) -> RenderableType:
    """A receipt (as ``Receipt.to_json`` gives it): one row for each check on each structure, failed ones first."""
    verdict = Text("passed", "bold green") if receipt["passed"] else Text("FAILED", "bold red")
    table = _table(
        ("", "left"), ("check", "left"), ("structure", "left"), ("value", "right"), ("limit", "right"),
        ("unit", "left"), ("note", "left"),
    )  # fmt: skip
    for row in sorted(receipt["rows"], key=lambda row: bool(row["passed"])):
        mark = Text("ok", _ADDED) if row["passed"] else Text("FAILED", "bold red")
        value, limit = quantity(row["value"]), quantity(row["limit"], missing="")
        table.add_row(mark, *map(Text, (row["check"], row["structure"], value, limit, row["unit"], row["note"])))
    return Group(Text.assemble("Receipt ", verdict, f", {receipt['dtype']}, {len(receipt['rows'])} checks"), table)


def report_view(report: Report, diffs: Sequence[GraphDiff] = ()) -> RenderableType:
    """A whole report: what was optimised, the passes, the time of each stage, the receipt, the warnings."""
    facts = Table.grid(padding=(0, 2))
    for name, text in report_facts(report):
        facts.add_row(Text(name, _QUIET), Text(text))
    parts: list[RenderableType] = [facts, pipeline_table(report.records, diffs)]
    if report.receipt is not None:
        parts.append(receipt_table(report.receipt.to_json()))
    parts += [Text(f"Warning: {warning}", "yellow") for warning in report.warnings]
    return Group(*parts)


def report_facts(report: Report) -> Iterator[tuple[str, str]]:
    """The head of a report as (name, text) pairs."""
    yield "model", f"{report.model} ({report.frontend})"
    yield "pipeline", report.pipeline or "none"
    yield "target", report.target
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions)
    yield "time", ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.timings)


def quantity(value: float | None, missing: str = "not finite") -> str:
    """A measured number as text."""
    return missing if value is None else f"{value:.2e}"


def refusal_groups(refusals: Iterable[Refusal]) -> Iterator[tuple[str, str, int, Refusal]]:
    """Refusals by rule and reason, the most frequent first: (rule, reason, how often, the first of them)."""
    refusals = list(refusals)
    for (rule, reason), count in Counter((r.rule, r.reason) for r in refusals).most_common():
        yield rule, reason, count, next(r for r in refusals if (r.rule, r.reason) == (rule, reason))


# --- parts


def _cost(cost: Cost) -> Iterator[str | tuple[str, str]]:
    yield from ("  flops ", (pretty(cost.flops), "cyan"), "\n  bytes ", (pretty(cost.bytes), "cyan"))


def _cost_change(diff: GraphDiff) -> Iterator[Text]:
    for name in ("flops", "bytes"):
        old, new = (pretty(getattr(cost, name)) for cost in (diff.cost_before, diff.cost_after))
        text = old if old == new else f"{old} → {new}"
        yield Text.assemble((f"{name} ", _QUIET), (text, "" if old == new else "cyan"))


def _flops_change(diff: GraphDiff) -> Text:
    old, new = pretty(diff.cost_before.flops), pretty(diff.cost_after.flops)
    return Text(new, _QUIET) if old == new else Text(f"{old}\n→ {new}")


def _counts(added: int, removed: int, changed: int) -> Iterator[tuple[str, str]]:
    for sign, count, style in (("+", added, _ADDED), ("-", removed, _REMOVED), ("~", changed, _CHANGED)):
        if count:
            yield f"{sign}{count} ", style


def _delta(diff: GraphDiff) -> Iterator[tuple[str, str]]:
    yield from _counts(len(diff.added), len(diff.removed), len(diff.changed))
    yield f"= {diff.nodes_after}", "bold"


def _add_nodes(branch: Tree, part: ModuleDiff, limit: int | None) -> None:
    for sign, nodes, style in (("-", part.removed, _REMOVED), ("+", part.added, _ADDED)):
        for node in nodes[:limit]:
            remark = node.summary or node.irreps
            branch.add(_line(Text.assemble((f"{sign} {node}", style), (f"  {remark}" if remark else "", _QUIET))))
        _add_rest(branch, sign, len(nodes), limit, style)
    for change in part.changed[:limit]:
        was = f"  (was {change.before.name})" if change.renamed else ""
        leaf = branch.add(_line(Text.assemble((f"~ {change.after}", _CHANGED), (was, _QUIET))))
        for detail in change.details:
            leaf.add(_line(Text(detail, _QUIET)))
    _add_rest(branch, "~", len(part.changed), limit, _CHANGED)
    if part.unchanged:
        branch.add(Text(f"… {part.unchanged} unchanged", _QUIET))


def _add_rest(branch: Tree, sign: str, count: int, limit: int | None, style: str) -> None:
    if limit is not None and count > limit:
        branch.add(Text(f"{sign} … {count - limit} more", style))


def _line(text: Text) -> Text:
    """One line, cut rather than wrapped where it is too long."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _applied(record: PassRecord) -> Text:
    if record.skipped:
        return Text(f"skipped: {record.skipped}", _QUIET)
    rules = Counter(application.rule for application in record.applications)
    if not rules:
        return Text("changed" if record.modified else "no change", "" if record.modified else _QUIET)
    return Text("\n".join(f"{count} × {rule}" for rule, count in rules.most_common()))


def _refusals(record: PassRecord) -> Iterator[RenderableType]:
    for rule, reason, count, first in refusal_groups(record.refusals):
        places = ", ".join(chain((first.module,) if first.module else (), first.nodes))
        text = Text.assemble((f"{record.name}/{rule}", "bold"), f": {reason}", (f"  {count} ×", _QUIET))
        if places:
            text.append(f", e.g. {places}", _QUIET)
        yield Padding(text, (0, 0, 0, 2))


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 5e-4 else "-"
