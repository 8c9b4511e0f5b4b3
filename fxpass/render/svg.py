"""Line plots and bar charts as small hand-written SVG, for reports and examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..errors import UsageError

PALETTE = ("#3564a8", "#d2691e", "#2e8b6d", "#a23b72", "#7a7f85", "#c9a227", "#5b4fa2", "#4f9bb5")

_FONT = "font-family=\"system-ui, 'Helvetica Neue', Arial, sans-serif\""
_INK, _QUIET, _GRID = "#24292f", "#57606a", "#e4e8ec"


@dataclass(frozen=True)
class Series:
    """One line of a plot; a point whose y is not finite interrupts it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class _Axis:
    """A scale from data to pixels, with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], log: bool, start: float, end: float, *, zero: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if log:
            if high < 1.2 * low:
                low, high = low / 2, high * 2
            margin = (high / low) ** 0.04
            low, high = low / (1.5 if zero else margin), high * margin
            return cls(low, high, _log_ticks(low, high), log, start, end)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        ticks = _linear_ticks(low, high)
        margin = 0.0 if zero else 0.03 * (high - low)
        return cls(min(low - margin, ticks[0]), max(high + margin, ticks[-1]), ticks, log, start, end)

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def minor(self) -> Iterator[float]:
        """Ticks without a number: 2 to 9 times each power of ten on a logarithmic axis of seven decades at most."""
        if not self.log or self.high > 1e7 * self.low:
            return
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))):
            for factor in range(2, 10):
                if self.low < factor * 10.0**exponent < self.high:
                    yield factor * 10.0**exponent

    def label(self, tick: float) -> str:
        if self.log:
            return f"{tick:g}" if 1e-3 <= tick < 1e5 else _scientific(tick, 0)
        step = self.ticks[1] - self.ticks[0]
        largest = max(abs(t) for t in self.ticks)
        if largest >= 1e6 or step < 1e-4:
            digits = math.ceil(math.log10(largest / step)) + 1  # enough to tell neighbouring ticks apart
            return "0" if abs(tick) < 1e-9 * step else _scientific(tick, digits)
        digits = next(n for n in range(8) if math.isclose(round(step, n), step))
        return f"{tick:.{digits}f}"


def _scientific(value: float, digits: int) -> str:
    """``2e-9``, ``1.25e6``: at most so many digits after the point, none that are zero."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    if digits:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to nine round numbers that enclose the range or nearly so; a range without extent is widened."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        spread = abs(low) or 1.0
        low, high = low - 0.5 * spread, high + 0.5 * spread
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(n * step for n in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten within the range, nine at most; 2 and 5 times them too where they alone would be few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high < 50 * low else (1,)
    if high < 4 * low:
        return tuple(t for t in _linear_ticks(low, high) if low <= t <= high)
    stride = -(-(last - first) // 9)
    ticks = (factor * 10.0**n for n in range(first, last + 1, stride) for factor in factors)
    return tuple(t for t in ticks if low <= t <= high)


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool | None = None,
    width: int = 720,
    height: int = 420,
) -> str:
    """A line plot.

    Args:
        series: the lines, drawn in the order of ``PALETTE``.
        title: heading; ``x_label`` and ``y_label`` name the axes, with units.
        log_x: logarithmic axis, likewise ``log_y``; the values must then be positive.
        markers: draw the points; by default where no line has more than 40.
        width: of the picture, likewise ``height``, in pixels.

    Raises:
        UsageError: no finite point, x and y of different length, or a logarithm of a number that has none.
    """
    for line in series:
        if len(line.x) != len(line.y):
            raise UsageError(f"The series {line.name!r} has {len(line.x)} x values and {len(line.y)} y values.")
    points = [(x, y) for line in series for x, y in zip(line.x, line.y, strict=True) if _finite(x, y)]
    if not points:
        raise UsageError("There is nothing to plot: no series has a finite point.")
    for log, values, label in ((log_x, [x for x, _ in points], x_label), (log_y, [y for _, y in points], y_label)):
        if log and min(values) <= 0:
            raise UsageError(
                f"{label} has the value {min(values):g}, which has no place on a logarithmic axis.",
                hint="a linear axis, or leave these points out",
            )
    left, right, top, bottom = 78, width - 24, _top(len(series) > 1), height - 58
    x_axis = _Axis.over([x for x, _ in points], log_x, left, right)
    y_axis = _Axis.over([y for _, y in points], log_y, bottom, top)
    if markers is None:
        markers = all(len(line.x) <= 40 for line in series)

    parts = [*_y_grid(y_axis, left, right), *_x_ticks(x_axis, top, bottom)]
    for line, color in zip(series, _colors(len(series)), strict=True):
        for run in _runs(line):
            path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in run)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" '
                'stroke-linejoin="round" stroke-linecap="round"/>'
            )
            if markers or len(run) == 1:
                parts += [
                    f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3.4" fill="{color}" '
                    'stroke="#ffffff" stroke-width="1.2"/>'
                    for x, y in run
                ]
    if len(series) > 1:
        parts += _legend([line.name for line in series], left)
    parts += _frame(title, x_label, y_label, left, right, top, bottom, height)
    return _picture(parts, title, width, height)


def bar_chart(
    groups: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    y_label: str,
    log_y: bool = False,
    number: str = "{:.3g}",
    width: int = 720,
    height: int = 420,
) -> str:
    """A bar chart, one group of bars side by side for each key.

    Args:
        groups: label below the axis -> name of the bar -> value; bars of one name have one colour.
        title: heading; ``y_label`` names the axis, with unit.
        log_y: logarithmic axis; the values must then be positive.
        number: format of the value above each bar, empty for none.
        width: of the picture, likewise ``height``, in pixels.

    Raises:
        UsageError: no bar, a value that is not finite, or a logarithm of a number that has none.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    values = [value for bars in groups.values() for value in bars.values()]
    if not values:
        raise UsageError("There is nothing to plot: no group has a bar.")
    if not all(map(_finite, values)):
        raise UsageError("A bar must have a finite height.")
    if log_y and min(values) <= 0:
        raise UsageError(
            f"{y_label} has the value {min(values):g}, which has no place on a logarithmic axis.",
            hint="a linear axis",
        )
    left, right, top, bottom = 78, width - 24, _top(len(names) > 1), height - 58
    axis = _Axis.over(values, log_y, bottom, top, zero=True)
    floor = axis(axis.low if log_y else 0.0)
    parts = list(_y_grid(axis, left, right))
    slot = (right - left) / len(groups)
    bar = min(64.0, 0.8 * slot / len(names))
    for place, (group, bars) in enumerate(groups.items()):
        middle = left + (place + 0.5) * slot
        for n, (name, color) in enumerate(zip(names, _colors(len(names)), strict=True)):
            if name not in bars:
                continue
            x, y = middle + (n - len(names) / 2) * bar, axis(bars[name])
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{min(y, floor):.1f}" width="{bar - 2:.1f}" '
                f'height="{abs(floor - y):.1f}" rx="2" fill="{color}"/>'
            )
            above = y - 6 if bars[name] >= 0 else y + 15
            parts.append(_text(x + bar / 2, above, number.format(bars[name]), "middle", 12, _INK))
        parts.append(_text(middle, bottom + 20, group, "middle", 13, _INK))
    if not log_y:
        parts.append(f'<line x1="{left}" y1="{floor:.1f}" x2="{right}" y2="{floor:.1f}" stroke="{_QUIET}"/>')
    if len(names) > 1:
        parts += _legend(names, left)
    parts += _frame(title, "", y_label, left, right, top, bottom, height)
    return _picture(parts, title, width, height)


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _colors(count: int) -> list[str]:
    return [PALETTE[n % len(PALETTE)] for n in range(count)]


def _top(legend: bool) -> int:
    return 84 if legend else 58


def _runs(line: Series) -> Iterator[list[tuple[float, float]]]:
    """The stretches of a line between points that are not finite."""
    run: list[tuple[float, float]] = []
    for x, y in zip(line.x, line.y, strict=True):
        if _finite(x, y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _text(x: float, y: float, text: str, anchor: str, size: int, color: str, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"{more}>'
        f"{escape(text)}</text>"
    )


def _y_grid(axis: _Axis, left: float, right: float) -> Iterator[str]:
    for tick in axis.minor():
        yield f'<line x1="{left}" y1="{axis(tick):.1f}" x2="{left + 4}" y2="{axis(tick):.1f}" stroke="{_QUIET}"/>'
    for tick in axis.ticks:
        y = axis(tick)
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{_GRID}"/>'
        yield _text(left - 9, y + 4, axis.label(tick), "end", 12, _QUIET)


def _x_ticks(axis: _Axis, top: float, bottom: float) -> Iterator[str]:
    for tick in axis.minor():
        yield f'<line x1="{axis(tick):.1f}" y1="{bottom}" x2="{axis(tick):.1f}" y2="{bottom - 4}" stroke="{_QUIET}"/>'
    for tick in axis.ticks:
        x = axis(tick)
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{_GRID}"/>'
        yield _text(x, bottom + 19, axis.label(tick), "middle", 12, _QUIET)


def _legend(names: Sequence[str], left: float) -> Iterator[str]:
    x = left
    for name, color in zip(names, _colors(len(names)), strict=True):
        yield f'<rect x="{x:.1f}" y="52" width="14" height="14" rx="3" fill="{color}"/>'
        yield _text(x + 20, 63.5, name, "start", 13, _INK)
        x += 44 + 7.2 * len(name)  # 7.2: about the width of a letter of this size


def _frame(
    title: str, x_label: str, y_label: str, left: float, right: float, top: float, bottom: float, height: float
) -> Iterator[str]:
    yield f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="{_QUIET}"/>'
    yield f'<line x1="{left}" y1="{top}" x2="{left}" y2="{bottom}" stroke="{_QUIET}"/>'
    yield _text(left, 32, title, "start", 17, _INK, ' font-weight="600"')
    if x_label:
        yield _text((left + right) / 2, height - 15, x_label, "middle", 13, _INK)
    middle = (top + bottom) / 2
    yield _text(20, middle, y_label, "middle", 13, _INK, f' transform="rotate(-90 20 {middle:.1f})"')


def _picture(parts: Sequence[str], title: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" {_FONT}>\n<title>{escape(title)}</title>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
