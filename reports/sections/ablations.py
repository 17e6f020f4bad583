"""What changes in layers when one thing changes: swaps allowed, warm start, calibration size and text."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from ...records.study import ModelRecord, UnitRecord
from ..axes import gap_scale, legend_below, numbers, series
from ..figures import Figure
from ..page import Section
from ..palette import style
from ..study_data import StudyData
from ..tables import Cell, Column, Row, Table

INFINITE = "∞"


def swaps_allowed(record: UnitRecord | ModelRecord) -> float | None:
    """The option ``max_swaps`` that a unit varies, infinity for none; None where it is not varied."""
    options = json.loads(record.options)
    if "max_swaps" not in options:
        return None
    value = options["max_swaps"]
    return float("inf") if value is None or str(value).lower() == "none" else float(value)


def show_swaps(value: float) -> str:
    """A number of swaps as text."""
    return INFINITE if value == float("inf") else f"{value:g}"


def convergence_section(data: StudyData) -> Section | None:
    """Error against the swaps allowed per row; None where that was not varied."""
    units: dict[tuple[str, str], set[float]] = {}
    for unit in data.units:
        allowed = swaps_allowed(unit)
        if allowed is not None:
            units.setdefault((unit.method, unit.start), set()).add(allowed)
    rows: list[Row] = []
    for (method, start), limits in units.items():
        if len(limits) < 2:
            continue
        for cols in sorted({unit.cols for unit in data.units if unit.method == method}):
            rows += _convergence_rows(data, method, start, cols, sorted(limits))
    if not rows:
        return None
    return Section(
        "Convergence",
        (_convergence_text(rows),),
        (_convergence_table(rows), _convergence_figure(tuple(rows))),
    )


def _convergence_rows(
    data: StudyData, method: str, start: str, cols: int, limits: Sequence[float]
) -> list[Row]:
    group = [(unit.method, unit.start, unit.cols) == (method, start, cols) for unit in data.units]
    allowed = [swaps_allowed(unit) for unit in data.units]
    masks = {
        limit: data.rows_of_units([here and each == limit for here, each in zip(group, allowed, strict=True)])
        for limit in limits
    }
    common = np.ones(len(data.reference), dtype=bool)
    for mask in masks.values():
        here = np.zeros(len(data.reference), dtype=bool)
        here[data.instance[mask]] = True
        common &= here
    if not common.any():
        return []
    totals = {limit: data.objective[mask & common[data.instance]].sum() for limit, mask in masks.items()}
    end = totals[limits[-1]]
    name = method + (f", from {start}" if start else "")
    return [
        (
            name,
            cols,
            show_swaps(limit),
            int(common.sum()),
            float(totals[limit] / end - 1) if end > 0 else 0.0,
            float(data.gap[mask & common[data.instance]].mean()),
            _mean_swaps(data, mask & common[data.instance]),
        )
        for limit, mask in masks.items()
    ]


def _mean_swaps(data: StudyData, chosen: np.ndarray) -> Cell:
    swaps = data.swaps[chosen]
    return float(swaps[swaps >= 0].mean()) if (swaps >= 0).any() else None


# An error this close to the converged one, in relative terms, is as good.
CLOSE = 0.01


def _convergence_text(rows: list[Row]) -> str:
    """After how many swaps each search is as good as converged, on the widest rows."""
    widest = max(numbers(rows, 1))
    parts = []
    for name, members in series([row for row in rows if row[1] == widest]).items():
        close = next(row for row in members if numbers([row], 4)[0] <= CLOSE)
        parts.append(f"{name} {close[2]} (error {numbers(members, 4)[0]:+.1%} after {members[0][2]})")
    return (
        f"Swaps per row from which the error is within {CLOSE:.0%} of the converged one, on rows of "
        f"{widest:g} weights: {'; '.join(parts)}."
    )


def _convergence_table(rows: list[Row]) -> Table:
    return Table(
        "convergence",
        "Error after at most T swaps per row, relative to the largest T, on rows that every T has.",
        (
            Column("solver"),
            Column("cols"),
            Column("T"),
            Column("rows"),
            Column("error above the last", ".2%"),
            Column("mean gap", ".2%"),
            Column("swaps per row", ".1f"),
        ),
        tuple(rows),
    )


def _convergence_figure(rows: tuple[Row, ...]) -> Figure:
    ticks = list(dict.fromkeys(str(row[2]) for row in rows))
    ticks.sort(key=lambda text: float("inf") if text == INFINITE else float(text))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        named = tuple((f"{row[0]}, {row[1]} weights", *row[1:]) for row in rows)
        for index, (label, points) in enumerate(series(named).items()):
            look = style(index)
            x = [ticks.index(str(point[2])) for point in points]
            y = [100 * value for value in numbers(points, 4)]
            axes.plot(x, y, look.mark + look.line, color=look.colour, label=label)
        axes.set_xticks(range(len(ticks)), ticks)
        gap_scale(axes, "y", max([*numbers(rows, 4), 0.0]))
        axes.set(xlabel="swaps allowed per row (T)", ylabel="error above the converged one")
        legend_below(canvas, axes, 2)

    return Figure(
        "convergence",
        "Error against swaps",
        "How much error is left above that of the largest T. Where a curve reaches zero before the right "
        "edge, "
        "more swaps change nothing.",
        ("solver", "cols", "T", "rows", "error above the last", "mean gap", "mean swaps per row"),
        rows,
        draw,
    )


def warm_start_section(data: StudyData) -> Section | None:
    """The same search from different masks; None where the start was not varied."""
    starts: dict[str, set[str]] = {}
    for unit in data.units:
        if unit.start and _converges(unit):
            starts.setdefault(unit.method, set()).add(unit.start)
    rows: list[Row] = []
    for method, names in starts.items():
        if len(names) < 2:
            continue
        for start in sorted(names):
            chosen = data.rows_of_units(
                [(unit.method, unit.start) == (method, start) and _converges(unit) for unit in data.units]
            )
            proven = chosen & data.proven[data.instance]
            alone = data.rows_of_units([unit.solver.lower().startswith(start + "(") for unit in data.units])
            same = alone & np.isin(data.instance, data.instance[chosen])
            rows.append(
                (
                    method,
                    start,
                    int(chosen.sum()),
                    float(data.gap[same].mean()) if same.any() else None,
                    float(data.gap[chosen].mean()),
                    float(np.quantile(data.gap[chosen], 0.95)),
                    float(data.optimal[proven].mean()) if proven.any() else None,
                    _mean_swaps(data, chosen),
                    float(data.seconds[chosen].mean()),
                )
            )
    if not rows:
        return None
    by_method = series(rows)
    text = []
    for method, members in by_method.items():
        ordered = sorted(members, key=lambda row: numbers([row], 4)[0])
        best, worst = ordered[0], ordered[-1]
        text.append(
            f"{method} ends closest from {best[1]}, with a mean gap of {numbers([best], 4)[0]:.2%}, and "
            f"furthest from {worst[1]}, with {numbers([worst], 4)[0]:.2%}."
        )
    table = Table(
        "warm-starts",
        "The same search from different masks: gap to the best known mask before (where that mask was a "
        "solver of "
        "the study) and after.",
        (
            Column("solver"),
            Column("warm start"),
            Column("rows"),
            Column("gap before", ".2%"),
            Column("mean gap after", ".2%", "min"),
            Column("95th percentile", ".2%"),
            Column("optimal", ".1%", "max"),
            Column("swaps per row", ".1f"),
            Column("seconds per row", ".4f"),
        ),
        tuple(rows),
    )
    return Section("Warm starts", tuple(text), (table, _warm_start_figure(tuple(rows))))


def _converges(unit: UnitRecord) -> bool:
    """Whether a unit's swaps are not limited by an option that is varied."""
    return swaps_allowed(unit) in (None, float("inf"))


def _warm_start_figure(rows: tuple[Row, ...]) -> Figure:
    data = tuple((row[0], row[1], row[3], row[4]) for row in rows)

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        starts = sorted({str(row[1]) for row in rows})
        for index, (method, points) in enumerate(series(rows).items()):
            look = style(index)
            y = [starts.index(str(point[1])) for point in points]
            before, after = ([100 * value for value in numbers(points, column)] for column in (2, 3))
            axes.hlines(y, after, before, color=look.colour, alpha=0.35)
            axes.plot(before, y, look.mark, color=look.colour, fillstyle="none", label=f"before {method}")
            axes.plot(after, y, look.mark, color=look.colour, label=f"after {method}")
        axes.set_yticks(range(len(starts)), starts)
        axes.set_ylim(len(starts) - 0.5, -0.5)
        gap_scale(axes, "x")
        axes.set_xlabel("mean gap to the best known mask")
        legend_below(canvas, axes, 2)

    return Figure(
        "warm-starts",
        "Sensitivity to the warm start",
        "Hollow: the warm start itself; filled: after the search. Filled marks close together mean that "
        "the start "
        "hardly matters.",
        ("solver", "warm start", "mean gap before", "mean gap after"),
        data,
        draw,
        2.4,
    )


def calibration_section(data: StudyData) -> Section | None:
    """Error on the calibration text against error on held-out text; None without held-out errors."""
    cells: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for unit in data.units:
        if unit.held_out is None or unit.objective is None or not unit.norm or not unit.held_out_norm:
            continue
        if unit.label in data.main_labels:
            cells.setdefault((unit.label, unit.calibration, unit.samples), []).append(
                (unit.objective / unit.norm, unit.held_out / unit.held_out_norm)
            )
    if not cells:
        return None
    order = {label: index for index, label in enumerate(data.main_labels)}
    rows: list[Row] = [
        (
            label,
            calibration,
            samples,
            len(values),
            float(np.mean([value[0] for value in values])),
            float(np.mean([value[1] for value in values])),
        )
        for (label, calibration, samples), values in sorted(
            cells.items(), key=lambda item: (order[item[0][0]], item[0][1:])
        )
    ]
    table = Table(
        "held-out",
        "Mean relative layer error on the calibration text and on held-out text that no solver has seen, by "
        "calibration text and number of windows.",
        (
            Column("solver"),
            Column("calibration"),
            Column("windows"),
            Column("layers"),
            Column("calibration error", ".2%"),
            Column("held-out error", ".2%"),
        ),
        tuple(rows),
    )
    varied = len({row[1] for row in rows}) > 1 or len({row[2] for row in rows}) > 1
    figures = (_calibration_figure(tuple(rows)),) if varied else ()
    return Section("Calibration and held-out error", (_calibration_text(rows),), (table, *figures))


def _calibration_text(rows: Sequence[Row]) -> str:
    """Where the held-out error is smallest, and what fewer windows of the same text cost."""
    best = min(rows, key=lambda row: numbers([row], 5)[0])
    text = (
        f"**{best[0]}** has the smallest held-out error, {best[5]:.1%} with {best[2]} windows of {best[1]}, "
        f"where its calibration error is {best[4]:.1%}"
    )
    fewest = min((row for row in rows if row[:2] == best[:2]), key=lambda row: numbers([row], 2)[0])
    if fewest is not best:
        text += f"; with {fewest[2]} windows it has {fewest[5]:.1%} and {fewest[4]:.1%}"
    return text + "."


def _calibration_figure(rows: tuple[Row, ...]) -> Figure:
    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        texts = list(series(rows, 1))
        panels = canvas.subplots(len(texts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        labels = list(series(rows))
        sizes = sorted({int(value) for value in numbers(rows, 2)})
        for axes, text in zip(panels, texts, strict=True):
            for label, points in series([row for row in rows if row[1] == text]).items():
                look = style(labels.index(label))
                x = numbers(points, 2)
                axes.plot(
                    x, numbers(points, 4), look.mark + ":", color=look.colour, fillstyle="none", linewidth=1.2
                )
                axes.plot(x, numbers(points, 5), look.mark + "-", color=look.colour, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.margins(x=0.15)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
            axes.set_title(f"calibrated on {text}", loc="left")
            axes.set_ylabel("layer error")
        panels[-1].set_xlabel("calibration windows")
        legend_below(canvas, panels[0])

    return Figure(
        "held-out",
        "Calibration error against held-out error",
        "Dotted with hollow marks: error on the calibration text; solid: on held-out text. The distance "
        "between them "
        "is what a solver owes to the calibration text alone.",
        ("solver", "calibration", "windows", "layers", "calibration error", "held-out error"),
        rows,
        draw,
        0.6 + 2.2 * len(series(rows, 1)),
    )
