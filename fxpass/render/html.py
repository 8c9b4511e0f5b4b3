"""One self-contained HTML page about an optimisation: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..ir.cost import pretty
from ..ir.diff import GraphDiff, ModuleDiff
from ..report import PassRecord, Report
from .terminal import quantity, refusal_groups, report_facts

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #656d76; --paper: #ffffff; --line: #d8dee4;
  --tint: #f6f8fa; --add: #1a7f37; --del: #cf222e; --mod: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #8d96a0; --paper: #0d1117; --line: #30363d;
  --tint: #161b22; --add: #3fb950; --del: #f85149; --mod: #d29922; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.5rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th { text-align: left; color: var(--quiet); font-weight: 500; } .number { text-align: right; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, code, pre { font-family: ui-monospace, monospace; font-size: 13px; font-variant-numeric: tabular-nums; }
pre { margin: .3rem 0 1rem; padding: .6rem .8rem; overflow-x: auto; background: var(--tint); border-radius: 6px; }
summary { cursor: pointer; padding: .25rem 0; } details details { margin-left: 1.2rem; }
.add { color: var(--add); } .del { color: var(--del); } .mod { color: var(--mod); } .quiet { color: var(--quiet); }
.badge { padding: .1rem .6rem; border-radius: 1rem; color: var(--paper); background: var(--add); }
.badge.failed { background: var(--del); } .warning { border-left: 4px solid var(--mod); padding-left: .8rem; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
"""


def page(
    report: Report, diffs: Sequence[GraphDiff] = (), *, figures: Iterable[str] = (), title: str = "fxpass report"
) -> str:
    """A report as one HTML page.

    Args:
        report: what was optimised, and how.
        diffs: one for each pass record, in order; none where snapshots were not taken.
        figures: SVG from ``fxpass.render.svg``, put in as it is.
        title: heading of the page.
    """
    body = [f"<h1>{escape(title)}</h1>", _facts(report)]
    body += [f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings]
    body += ["<h2>Passes</h2>", _passes(report.records, diffs)]
    body += _refusals(report.records)
    if diffs:
        body.append("<h2>What each pass did</h2>")
        body += [_diff(diff) for diff in diffs]
    if report.receipt is not None:
        body += _receipt(report.receipt.to_json())
    body += [f"<figure>{figure}</figure>" for figure in figures]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _facts(report: Report) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report_facts(report))
    return f"<dl>{pairs}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int]) -> str:
    """A table of cells that are HTML already; ``numbers`` are the columns aligned to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if n in numbers else "" for n in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>\n<thead>{row(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _passes(records: Sequence[PassRecord], diffs: Sequence[GraphDiff]) -> str:
    head = ["pass", "time", "nodes", "applied", "refused", *(["flops before", "flops after"] if diffs else [])]
    rows = []
    for n, record in enumerate(records):
        options = f"{{{escape(record.options)}}}" if record.options else ""
        cells = [
            f"<code><b>{escape(record.name)}</b>{options}</code>",
            "-" if record.skipped else f"{record.seconds:.2f} s",
            f"{record.nodes_before} → {record.nodes_after}",
            _applied(record),
            str(len(record.refusals)),
        ]
        if diffs:
            cells += [escape(pretty(cost.flops)) for cost in (diffs[n].cost_before, diffs[n].cost_after)]
        rows.append(cells)
    return _table(head, rows, frozenset({1, 2, 4}))


def _applied(record: PassRecord) -> str:
    if record.skipped:
        return f'<span class="quiet">skipped: {escape(record.skipped)}</span>'
    rules = Counter(application.rule for application in record.applications)
    if not rules:
        return "changed" if record.modified else '<span class="quiet">no change</span>'
    return "<br>".join(f"{count} × {escape(rule)}" for rule, count in rules.most_common())


def _refusals(records: Sequence[PassRecord]) -> Iterator[str]:
    lines = []
    for record in records:
        for rule, reason, count, first in refusal_groups(record.refusals):
            places = escape(", ".join(filter(None, (first.module, *first.nodes))))
            example = f", e.g. <code>{places}</code>" if places else ""
            lines.append(
                f"<li><code>{escape(record.name)}/{escape(rule)}</code>: {escape(reason)}"
                f' <span class="quiet">{count} ×{example}</span></li>'
            )
    if lines:
        yield "<details><summary>Why a rule did not fire</summary><ul>" + "\n".join(lines) + "</ul></details>"


def _counts(added: int, removed: int, changed: int) -> str:
    kinds = (("add", "+", added), ("del", "−", removed), ("mod", "~", changed))
    return " ".join(f'<span class="{kind}">{sign}{count}</span>' for kind, sign, count in kinds if count)


def _diff(diff: GraphDiff) -> str:
    name = f"<b>{escape(diff.after)}</b>"
    if not diff:
        return f'<details><summary>{name} <span class="quiet">no change</span></summary></details>'
    counts = _counts(len(diff.added), len(diff.removed), len(diff.changed))
    modules = diff.by_module()
    touched = [part for part in modules if part.added or part.removed or part.changed]
    unchanged = sum(part.unchanged for part in modules if part not in touched)
    rest = f'<p class="quiet">… {unchanged} unchanged in other modules</p>' if unchanged else ""
    parts = "\n".join(map(_module, touched))
    return f"<details><summary>{name} {counts} = {diff.nodes_after} nodes</summary>\n{parts}{rest}</details>"


def _module(part: ModuleDiff) -> str:
    lines = [f'<span class="del">- {escape(str(node))}</span>' for node in part.removed]
    lines += [f'<span class="add">+ {escape(str(node))}</span>' for node in part.added]
    for change in part.changed:
        was = f" (was {change.before.name})" if change.renamed else ""
        lines.append(f'<span class="mod">~ {escape(str(change.after) + was)}</span>')
        lines += [f'<span class="quiet">    {escape(detail)}</span>' for detail in change.details]
    if part.unchanged:
        lines.append(f'<span class="quiet">… {part.unchanged} unchanged</span>')
    counts = _counts(len(part.added), len(part.removed), len(part.changed))
    text = "\n".join(lines)
    return f"<details><summary><code>{escape(part.place)}</code> {counts}</summary><pre>{text}</pre></details>"


def _receipt(receipt: Mapping[str, Any]) -> Iterator[str]:
    verdict, kind = ("passed", "badge") if receipt["passed"] else ("failed", "badge failed")
    yield f'<h2>Receipt <span class="{kind}">{verdict}</span></h2>'
    rows = []
    for row in sorted(receipt["rows"], key=lambda row: bool(row["passed"])):
        mark = '<span class="add">ok</span>' if row["passed"] else '<b class="del">failed</b>'
        value, limit = quantity(row["value"]), quantity(row["limit"], missing="")
        texts = (row["check"], row["structure"], value, limit, row["unit"], row["note"])
        rows.append([mark, *map(escape, texts)])
    yield _table(["", "check", "structure", "value", "limit", "unit", "note"], rows, frozenset({3, 4}))
