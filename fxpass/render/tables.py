"""Plots of table errors: against distance, and of order 3 against order 5 against the step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MissingExtraError, UsageError
from .svg import Series, line_plot

WIDTH, HEIGHT = 760, 420
FLOOR = 1e-18  # what is drawn for an error of 0
_ERROR = "largest error of the slope"


def table_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An SVG with both plots, one above the other.

    Args:
        rows: of the report of ``fxpass compress``, each a table with ``"module"`` and ``"curves"``.

    Raises:
        UsageError: there is no table.
    """
    plots = [
        line_plot(series, title=title, x_label=label, y_label=_ERROR, log_x=log, log_y=True, width=WIDTH, height=HEIGHT)
        for title, label, log, series in _panels(rows)
    ]
    inner = "\n".join(plot.replace("<svg ", f'<svg y="{number * HEIGHT}" ', 1) for number, plot in enumerate(plots))
    size = f'width="{WIDTH}" height="{HEIGHT * len(plots)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{inner}</svg>\n'.encode()


def table_png(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The same plots as a PNG, drawn by matplotlib.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: there is no table.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install matplotlib, or a file named *.svg"
        raise MissingExtraError("A PNG needs matplotlib.", hint=hint) from error
    panels = _panels(rows)
    figure = Figure(figsize=(WIDTH / 100, HEIGHT * len(panels) / 100), layout="constrained")
    for axes, (title, label, log, series) in zip(figure.subplots(len(panels)), panels, strict=True):
        for line in series:
            axes.plot(line.x, line.y, label=line.name, marker="o" if log else None)
        axes.set(title=title, xlabel=label, ylabel=_ERROR, yscale="log", xscale="log" if log else "linear")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool, list[Series]]]:
    if not rows:
        raise UsageError("There is nothing to plot: no function was tabulated.")
    modules = [row["module"] for row in rows]
    names = [row["module"] if modules.count(row["module"]) == 1 else f"{row['module']} {row['node']}" for row in rows]

    def drawn(values: Sequence[float]) -> list[float]:
        return [max(value, FLOOR) for value in values]

    distance = [
        Series(name, row["curves"]["x"], drawn(row["curves"]["slope"])) for name, row in zip(names, rows, strict=True)
    ]
    steps = [
        Series(f"{name}, order {order}", row["curves"]["steps"], drawn(errors["slope"]))
        for name, row in zip(names, rows, strict=True)
        for order, errors in row["curves"]["by_order"].items()
    ]
    return [
        ("Error of the tables against distance", "edge length, or the variable of the table (A)", False, distance),
        ("Order 3 against order 5 against the step", "step (A)", True, steps),
    ]
