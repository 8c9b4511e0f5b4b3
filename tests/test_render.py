"""What people see: plain text in a pipe, colours on a terminal, HTML that escapes, SVG that is XML."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from rich.console import Console, RenderableType
from torch import fx

from fxpass.errors import UsageError
from fxpass.ir.diff import GraphDiff, diff
from fxpass.ir.metadata import Provenance, set_provenance
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.snapshot import Snapshot, snapshot
from fxpass.passes import Application, Exactness, Refusal
from fxpass.render import html, svg, terminal
from fxpass.report import PassRecord, Report
from fxpass.verify.receipt import Receipt, Row

pytestmark = pytest.mark.once

aten = torch.ops.aten


def snapshots() -> tuple[Snapshot, Snapshot]:
    """exp(x) * 2 + 1 and sigmoid(x) * 3 + 1, in modules whose names need escaping nowhere but in HTML."""

    def program(target: object, factor: float) -> Program:
        graph = fx.Graph()
        x = graph.placeholder("x")
        first = graph.call_function(target, (x,))  # type: ignore[arg-type]
        second = graph.call_function(aten.mul.Tensor, (first, factor))
        third = graph.call_function(aten.add.Tensor, (second, 1.0))
        graph.output((third,))
        for node in graph.nodes:
            node.meta["val"] = torch.empty(8, 3)
        for node, module in ((first, "layers.0"), (second, "layers.1"), (third, "readout<T>")):
            set_provenance(node, Provenance(module))
        spec = TensorSpec("x", (8, 3), torch.float32, irreps="1o", unit="Angstrom")
        return Program(fx.GraphModule(torch.nn.Module(), graph), (spec,), (replace(spec, name="y"),))

    return snapshot(program(aten.exp.default, 2.0), "capture"), snapshot(program(aten.sigmoid.default, 3.0), "my-pass")


def report(*, passed: bool = True) -> tuple[Report, list[GraphDiff]]:
    before, after = snapshots()
    refusal = Refusal("fuse", "the weight <w> is not constant & has 2 users", ("mul_3",), "layers.1")
    records = (
        PassRecord("my-pass", "order=5", 0.125, 5, 5, True, None, 3 * (Application("swap", "exp"),), 12 * (refusal,)),
        PassRecord("idle", "", 0.0, 5, 5, False),
        PassRecord("late", "", 0.0, 5, 5, False, skipped="runs at stage energy"),
    )
    rows = (
        Row("energy", "fcc", 1e-9, 1e-6, "eV/atom", "fine"),
        Row("forces", "fcc", 1e-3 if not passed else 1e-9, 1e-6, "eV/Angstrom", ""),
        *((Row("closed loop", "dimer", math.nan, 1e-6, "eV", "could not be computed"),) if not passed else ()),
    )
    receipt = Receipt(rows, "float32", Exactness.REASSOCIATES, None)
    made = Report(
        "pkg.<Model>", "mace", "my-pass{order=5},idle,late", "eager", (("torch", "2.13"),), records,
        (("capture", 1.5),), receipt, ("do not <panic>",),
    )  # fmt: skip
    return made, [diff(before, after), diff(after, after), diff(after, after)]


def piped(renderable: RenderableType) -> str:
    out = io.StringIO()
    terminal.console(out).print(renderable)
    return out.getvalue()


def coloured(renderable: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=120, highlight=False).print(renderable)
    return out.getvalue()


def everything() -> dict[str, RenderableType]:
    made, diffs = report()
    assert made.receipt is not None
    return {
        "summary": terminal.graph_summary(snapshots()[0]),
        "diff": terminal.graph_diff(diffs[0]),
        "pipeline": terminal.pipeline_table(made.records, diffs),
        "receipt": terminal.receipt_table(made.receipt.to_json()),
        "report": terminal.report_view(made, diffs),
    }


@pytest.mark.parametrize("name", ["summary", "diff", "pipeline", "receipt", "report"])
def test_a_pipe_gets_plain_text_that_fits(name: str) -> None:
    text = piped(everything()[name])
    assert "\x1b" not in text
    assert text.strip()
    assert max(map(len, text.splitlines())) <= terminal.PIPE_WIDTH
    assert "\x1b[" in coloured(everything()[name])


def test_the_environment_puts_no_colour_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    text = piped(everything()["report"])
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) > 60


def test_graph_summary() -> None:
    text = piped(terminal.graph_summary(snapshots()[0], atoms=8))
    assert "capture: energy program, 5 nodes" in text
    assert re.search(r"in +x +float32\[8, 3\] +1o +Angstrom", text)
    assert re.search(r"aten\.mul +1 +33\.3% +33\.3%", text)
    assert "atoms = 8, edges = 4000, graphs = 1" in text


def test_graph_diff_shows_what_changed_and_folds_the_rest() -> None:
    _, (changed, same, _) = report()
    text = piped(terminal.graph_diff(changed))
    assert "capture → my-pass  +1 -1 ~1 = 5" in text
    assert "ops: aten.exp -1, aten.sigmoid +1" in text
    assert re.search(r"layers\.0  \+1 -1", text)
    assert "- exp_default: float32[8, 3] = aten.exp(%x)" in text
    assert "+ sigmoid_default: float32[8, 3] = aten.sigmoid(%x)" in text
    assert "~ mul_tensor: float32[8, 3] = aten.mul(%sigmoid_default, 3.0)" in text
    assert "args: %exp_default -> %sigmoid_default, 2.0 -> 3.0" in text
    assert "… 3 unchanged in 2 other modules" in text
    assert "aten.add" not in text
    assert piped(terminal.graph_diff(same)).strip() == "my-pass → my-pass  = 5  no change"


def test_colours_of_a_diff() -> None:
    text = coloured(terminal.graph_diff(report()[1][0]))
    for colour, line in ((31, "- exp"), (32, "+ sigmoid"), (33, "~ mul")):
        assert f"\x1b[{colour}m{line}" in text


def test_a_limit_counts_what_it_hides() -> None:
    text = piped(terminal.graph_diff(report()[1][0], limit=0))
    assert text.count("… 1 more") == 3
    assert "aten.exp(" not in text


def test_pipeline_table() -> None:
    made, diffs = report()
    text = piped(terminal.pipeline_table(made.records, diffs))
    assert re.search(r"my-pass\{order=5\} +0\.12 s +5 → 5 +3 × swap +12 ", text)
    assert re.search(r"idle .* no change +-", text)
    assert "skipped: runs at stage energy" in text
    reasons = [line for line in text.splitlines() if "the weight <w> is not constant" in line]
    assert len(reasons) == 1 and "12 ×, e.g. layers.1, mul_3" in reasons[0]


def test_a_failed_receipt_begins_with_what_failed() -> None:
    made, _ = report(passed=False)
    assert made.receipt is not None
    lines = piped(terminal.receipt_table(made.receipt.to_json())).splitlines()
    assert lines[0].startswith("Receipt FAILED, float32, 3 checks")
    verdicts = [line.split()[0] for line in lines if re.match(r" ?(ok|FAILED)", line)]
    assert verdicts == ["FAILED", "FAILED", "ok"]
    assert any("1.00e-03" in line and "eV/Angstrom" in line for line in lines)
    assert any("closed loop" in line and "not finite" in line for line in lines)


def test_a_report_ends_in_its_warnings() -> None:
    made, diffs = report()
    text = piped(terminal.report_view(made, diffs))
    assert "pkg.<Model> (mace)" in text
    assert text.rstrip().endswith("Warning: do not <panic>")


# --- HTML


class Checker(HTMLParser):
    """Fails on a tag closed by another one, and on what loads something; keeps open tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object")
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("passed", [True, False])
def test_the_page_is_well_formed_and_escapes(passed: bool) -> None:
    made, diffs = report(passed=passed)
    plot = svg.bar_chart({"a": {"x": 1.0}}, title="T", y_label="v")
    text = html.page(made, diffs, figures=[plot], title="Report <1> & more")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    verdict = "Receipt passed" if passed else "Receipt failed"
    for expected in (
        "Report <1> & more", "pkg.<Model> (mace)", "do not <panic>", "the weight <w> is not constant & has 2 users",
        "3 × swap", "skipped: runs at stage energy", "+ sigmoid_default: float32[8, 3] = aten.sigmoid(%x)",
        "args: %exp_default -> %sigmoid_default, 2.0 -> 3.0", "layers.0", "+1 −1 ~1 = 5 nodes", verdict,
    ):  # fmt: skip
        assert expected in checker.text, expected
    assert ("not finite" in checker.text) is not passed


def test_the_page_asks_for_nothing_elsewhere() -> None:
    text = html.page(*report())
    checker = Checker()
    checker.feed(text)
    assert not {name for name, _ in checker.attributes} & {"src", "href", "onclick", "style"}
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_a_hostile_name_stays_text() -> None:
    made, diffs = report()
    hostile = "</pre><script>alert('x')</script>"
    record = replace(made.records[0], name=hostile, options=hostile, applications=(Application(hostile, "n"),))
    node = replace(diffs[0].added[0], args=hostile, module=hostile)
    text = html.page(
        replace(made, records=(record,), model=hostile, warnings=(hostile,)),
        [replace(diffs[0], after=hostile, added=(node,))],
        title=hostile,
    )
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.text.count(hostile) >= 7


# --- SVG

NAMESPACE = {"s": "http://www.w3.org/2000/svg"}


def lines(**options: bool) -> ET.Element:
    series = [
        svg.Series("eager <a> & b", [10, 100, 1000], [1.0, 10.0, 100.0]),
        svg.Series("fxpass", [10, 100, 1000], [0.1, 1.0, 10.0]),
    ]
    return ET.fromstring(svg.line_plot(series, title="Time & more", x_label="atoms", y_label="t / ms", **options))


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iterfind(".//s:text", NAMESPACE)]


def points(element: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def test_a_line_plot_has_title_axes_ticks_and_legend() -> None:
    root = lines(log_x=True, log_y=True)
    for expected in ("Time & more", "atoms", "t / ms", "eager <a> & b", "fxpass", "10", "100", "1000", "0.1"):
        assert expected in texts(root)
    assert len(root.findall(".//s:polyline", NAMESPACE)) == 2
    assert len(root.findall(".//s:circle", NAMESPACE)) == 6


def test_powers_are_straight_and_parallel_on_logarithmic_axes() -> None:
    first, second = (points(p) for p in lines(log_x=True, log_y=True).findall(".//s:polyline", NAMESPACE))
    steps = [b - a for line in (first, second) for (_, a), (_, b) in pairwise(line)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.11)
    assert steps[0] < 0  # upwards: y grows downwards in SVG
    assert all(y2 > y1 for (_, y1), (_, y2) in zip(first, second, strict=True))


def test_a_tick_stands_at_its_value() -> None:
    root = ET.fromstring(svg.line_plot([svg.Series("a", [0, 50], [2, 7])], title="", x_label="x", y_label="y"))
    ((x0, y0), (x1, y1)) = points(root.findall(".//s:polyline", NAMESPACE)[0])
    labels = {e.text: e for e in root.iterfind(".//s:text", NAMESPACE)}
    assert float(labels["0"].attrib["x"]) == pytest.approx(x0, abs=0.1)
    assert float(labels["50"].attrib["x"]) == pytest.approx(x1, abs=0.1)
    assert float(labels["2"].attrib["y"]) - 4 == pytest.approx(y0, abs=0.1)
    assert float(labels["7"].attrib["y"]) - 4 == pytest.approx(y1, abs=0.1)


def test_a_point_that_is_not_finite_interrupts_the_line() -> None:
    series = svg.Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 2.0, 3.0])
    root = ET.fromstring(svg.line_plot([series], title="", x_label="", y_label=""))
    assert [len(points(p)) for p in root.findall(".//s:polyline", NAMESPACE)] == [2, 2]
    assert "nan" not in ET.tostring(root, encoding="unicode")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[5.0, 5.0], [1e-12, 1.0], [3.0, 3.1], [1e9, 1.0000001e9], [2e-7, 9e-7]])
def test_everything_drawn_is_inside_the_picture(values: list[float], log: bool) -> None:
    text = svg.line_plot([svg.Series("a", [1, 2], values)], title="t", x_label="x", y_label="y", log_y=log)
    root = ET.fromstring(text)
    for line in root.findall(".//s:polyline", NAMESPACE):
        assert all(78 <= x <= 696 and 58 <= y <= 362 for x, y in points(line))
    ticks = [e for e in root.iterfind(".//s:text", NAMESPACE) if e.attrib["text-anchor"] == "end"]
    assert 2 <= len(ticks) <= 10
    assert len({e.text for e in ticks}) == len(ticks)
    assert all(0 < float(e.attrib["y"]) < 420 for e in ticks)


def test_a_bar_is_as_high_as_its_value() -> None:
    groups = {"MACE": {"eager": 4.0, "fxpass": 1.0}, "NequIP": {"eager": 2.0}}
    root = ET.fromstring(svg.bar_chart(groups, title="Cost", y_label="ms", number="{:.1f}"))
    bars = [e for e in root.iterfind(".//s:rect", NAMESPACE) if "rx" in e.attrib and e.attrib["width"] != "14"]
    heights = [float(e.attrib["height"]) for e in bars]
    assert heights == pytest.approx([heights[0], heights[0] / 4, heights[0] / 2], abs=0.1)
    assert {"MACE", "NequIP", "eager", "fxpass", "Cost", "ms", "4.0", "1.0", "2.0"} <= set(texts(root))
    assert bars[0].attrib["fill"] == bars[2].attrib["fill"] != bars[1].attrib["fill"]


def test_negative_bars_hang_from_zero() -> None:
    root = ET.fromstring(svg.bar_chart({"a": {"x": -2.0}, "b": {"x": 2.0}}, title="", y_label=""))
    down, up = (e for e in root.iterfind(".//s:rect", NAMESPACE) if "rx" in e.attrib)
    assert float(down.attrib["y"]) == pytest.approx(float(up.attrib["y"]) + float(up.attrib["height"]), abs=0.11)


@pytest.mark.parametrize(
    ("series", "complaint"),
    [
        ([], "nothing to plot"),
        ([svg.Series("a", [1.0], [math.nan])], "nothing to plot"),
        ([svg.Series("a", [1.0], [1.0, 2.0])], "1 x values and 2 y values"),
        ([svg.Series("a", [1.0], [-2.0])], "no place on a logarithmic axis"),
    ],
)
def test_a_plot_that_cannot_be_drawn(series: list[svg.Series], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        svg.line_plot(series, title="", x_label="", y_label="", log_y=True)


@pytest.mark.parametrize(("value", "complaint"), [(math.inf, "finite height"), (0.0, "logarithmic")])
def test_a_bar_that_cannot_be_drawn(value: float, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        svg.bar_chart({"a": {"x": value}}, title="", y_label="", log_y=True)
