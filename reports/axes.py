"""Small helpers that several figures share."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .tables import Row


def series(rows: Sequence[Row], key: int = 0) -> dict[str, list[Row]]:
    """Rows grouped by the text in column ``key``, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    return groups


def numbers(rows: Sequence[Row], position: int) -> list[float]:
    """One column as floats; None becomes NaN, which leaves a hole in a line."""
    cells = [row[position] for row in rows]
    return [float(cell) if isinstance(cell, int | float) else float("nan") for cell in cells]


def legend_below(canvas: Canvas, axes: Axes, columns: int = 3, title: str | None = None) -> None:
    """A legend under the plot, where it hides nothing; the canvas grows by it."""
    handles, names = axes.get_legend_handles_labels()
    labels = [textwrap.fill(name, LEGEND_WIDTH - MARK_WIDTH) for name in names]
    columns = min(columns, len(labels))
    while columns > 1 and _legend_width(labels, columns) > LEGEND_WIDTH:
        columns -= 1
    if len(labels) > 1:
        lines = sum(label.count("\n") + 1 for label in labels) / columns
        canvas.set_figheight(canvas.get_figheight() + LINE_HEIGHT * (math.ceil(lines) + (title is not None)))
        canvas.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """Characters beside each other in a legend, which is filled column by column, marks included."""
    long, rest = divmod(len(labels), columns)
    width = start = 0
    for column in range(columns):
        end = start + long + (column < rest)
        width += max(len(line) for label in labels[start:end] for line in label.splitlines()) + MARK_WIDTH
        start = end
    return width


def plain_log(axis: Axis, percent: bool = False) -> None:
    """Plain numbers at 1, 2 and 5 of each decade of a logarithmic axis, or as percentages."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%" if percent else f"{value:g}"))


# Characters that fit beside each other in a legend; how many a mark and the space around it take.
LEGEND_WIDTH, MARK_WIDTH = 60, 6
# Characters of a line beside an axis.
LABEL_WIDTH = 20
# Inches of a line of a legend.
LINE_HEIGHT = 0.19
GAP_TICKS = (0.0, 0.1, 1.0, 10.0, 100.0)


def gap_scale(axes: Axes, direction: Literal["x", "y"], largest: float = 1.0) -> None:
    """An axis for gaps in percent: linear up to 0.1%, then logarithmic, up to the decade of ``largest``.

    Zero lies a little inside, so that marks on it are whole.
    """
    top = next((tick for tick in GAP_TICKS if tick >= max(100 * largest, 1.0)), 100.0)
    ticks = [tick for tick in GAP_TICKS if tick <= top]
    labels = [f"{tick:g}%" for tick in ticks]
    if direction == "x":
        axes.set_xscale("symlog", linthresh=GAP_TICKS[1])
        axes.set_xlim(-0.008, top)
        axes.set_xticks(ticks, labels)
    else:
        axes.set_yscale("symlog", linthresh=GAP_TICKS[1])
        axes.set_ylim(-0.008, top)
        axes.set_yticks(ticks, labels)
