"""How far masks are from the optimum: tables and figures over proven and over all rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator, PercentFormatter

from ..axes import LABEL_WIDTH, gap_scale, legend_below, numbers, series
from ..figures import Figure
from ..page import Section
from ..palette import style
from ..statistics import bootstrap_interval, ecdf
from ..study_data import OPTIMAL, StudyData, is_per_row, pattern_name, pattern_order
from ..tables import Cell, Column, Row, Table, span

# Points of a distribution function that are drawn; more cannot be seen.
CURVE_POINTS = 200
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def optimality_section(data: StudyData) -> Section | None:
    """Gap to the proven optimum; None without a proven row."""
    proven = data.proven[data.instance]
    if not proven.any():
        return None
    table = gap_table(data)
    text = [
        *_finding(data, table),
        f"{int(data.proven.sum())} of {len(data.reference)} matrix rows have a mask that is proven to be "
        "optimal. "
        "The **gap** of a mask is the share of its error that the optimal mask would not have: "
        "(error − optimum) / error.",
    ]
    figures: list[Table | Figure] = [table, gap_distribution(data), gap_ecdf(data)]
    by_size = gap_by_size(data)
    by_pattern = gap_by_pattern(data)
    figures += [figure for figure in (by_size, by_pattern) if figure is not None]
    return Section("Distance to the optimum", tuple(text), tuple(figures))


def _finding(data: StudyData, table: Table) -> list[str]:
    """Who comes closest to the optimum without proving it, who follows, and who is furthest away."""
    found = {str(row[0]): numbers([row], 3)[0] for row in table.rows if row[0] in data.inexact_labels}
    ranked = sorted(found, key=lambda label: found[label])
    if not ranked:
        return []
    row = next(row for row in table.rows if row[0] == ranked[0])
    share, _, low, high = (numbers([row], column)[0] for column in range(2, 6))
    among = "Among solvers that prove no optimum, " if data.inexact_labels != data.main_labels else ""
    text = (
        f"{among}**{ranked[0]}** comes closest: its mean gap to the optimum is {found[ranked[0]]:.2%} (95% "
        f"interval {low:.2%} to {high:.2%}), and it is optimal in {share:.0%} of {row[1]} proven rows"
    )
    if len(ranked) > 1:
        text += f"; {ranked[1]} follows with {found[ranked[1]]:.2%}"
    if len(ranked) > 2:
        text += f", and {ranked[-1]} is furthest away with {found[ranked[-1]]:.2%}"
    return [text + "."]


def gap_table(data: StudyData) -> Table:
    """Every mask-only solver on the rows with a proven optimum."""
    rows: list[Row] = []
    for label in data.mask_labels:
        chosen = data.rows_of(label) & data.proven[data.instance]
        gaps = data.gap[chosen]
        if not gaps.size:
            continue
        interval = bootstrap_interval(gaps, resamples=400)
        rows.append(
            (
                label,
                int(gaps.size),
                float(data.optimal[chosen].mean()),
                interval.estimate,
                interval.low,
                interval.high,
                float(np.median(gaps)),
                float(np.quantile(gaps, 0.95)),
                float(gaps.max()),
            )
        )
    return Table(
        "gap-to-optimum",
        "Gap to the proven optimum, over rows. A row counts as optimal when its error is within "
        f"{OPTIMAL:.2%} of the optimum; the interval is a 95% bootstrap over rows.",
        (
            Column("solver"),
            Column("rows"),
            Column("optimal", ".1%", "max"),
            Column("mean gap", ".2%", "min"),
            Column("from", ".2%"),
            Column("to", ".2%"),
            Column("median", ".2%"),
            Column("95th percentile", ".2%"),
            Column("largest", ".2%", "min"),
        ),
        tuple(rows),
    )


def gap_distribution(data: StudyData) -> Figure:
    """Quantiles of the gap of each solver."""
    rows: list[Row] = []
    for label in data.main_labels:
        gaps = data.gap[data.rows_of(label) & data.proven[data.instance]]
        if gaps.size:
            rows.append((label, *(float(q) for q in np.quantile(gaps, QUANTILES)), float(gaps.mean())))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, row in enumerate(rows):
            low, first, middle, third, high, mean = (100 * numbers([row], i)[0] for i in range(1, 7))
            look = style(index)
            axes.plot([low, high], [index, index], color=look.colour, linewidth=1.5)
            axes.plot(
                [first, third],
                [index, index],
                color=look.colour,
                linewidth=8,
                solid_capstyle="butt",
                alpha=0.6,
            )
            axes.plot([middle], [index], "|", color=look.colour, markersize=16, markeredgewidth=2.5)
            axes.plot([mean], [index], look.mark, color=look.colour)
        axes.set_yticks(range(len(rows)), [textwrap.fill(str(row[0]), LABEL_WIDTH) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        gap_scale(axes, "x", max([*numbers(rows, 5), 0.0]))
        axes.set_xlabel("gap to the proven optimum")

    return Figure(
        "gap-distribution",
        "Distribution of the gap to the optimum",
        "Line: 5th to 95th percentile over rows; thick: middle half; bar: median; mark: mean. "
        "Linear up to 0.1%, then logarithmic. Further left is closer to the optimum.",
        ("solver", *(f"{quantile:g} quantile" for quantile in QUANTILES), "mean"),
        tuple(rows),
        draw,
        0.8 + 0.4 * max(len(rows), 3),
    )


def gap_ecdf(data: StudyData) -> Figure:
    """Share of rows within a gap, per solver."""
    rows: list[Row] = []
    for label in data.main_labels:
        gaps = data.gap[data.rows_of(label) & data.proven[data.instance]]
        if not gaps.size:
            continue
        values, shares = ecdf(gaps)
        if len(values) > CURVE_POINTS:
            kept = np.unique(np.linspace(0, len(values) - 1, CURVE_POINTS).round().astype(int))
            values, shares = values[kept], shares[kept]
        rows += [(label, float(value), float(share)) for value, share in zip(values, shares, strict=True)]

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, (label, points) in enumerate(series(rows).items()):
            look = style(index)
            x, y = [100 * value for value in numbers(points, 1)], numbers(points, 2)
            lead = [0.0] if x[0] > 0 else []
            axes.step(
                [*x[: len(lead)], *x, 1000.0],
                [*lead, *y, 1.0],
                look.line,
                where="post",
                color=look.colour,
                label=label,
            )
        gap_scale(axes, "x")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="gap to the proven optimum", ylabel="share of rows")
        legend_below(canvas, axes)

    return Figure(
        "gap-ecdf",
        "Share of rows within a gap",
        "A curve further up and left is better; where it meets the left edge is the share of rows solved to "
        "optimality. Linear up to 0.1%, then logarithmic.",
        ("solver", "gap", "share of rows"),
        tuple(rows),
        draw,
    )


def gap_by_size(data: StudyData) -> Figure | None:
    """Mean gap against the width of the row, per-row patterns; None for a single width."""
    per_row = (
        data.rows_of_units([is_per_row(unit.pattern) for unit in data.units]) & data.proven[data.instance]
    )
    sizes = sorted(set(data.cols[per_row].tolist()))
    if len(sizes) < 2:
        return None
    rows: list[Row] = []
    for label in data.main_labels:
        mine = per_row & data.rows_of(label)
        for size in sizes:
            gaps = data.gap[mine & (data.cols == size)]
            if gaps.size:
                rows.append((label, size, *_mean_interval(gaps), int(gaps.size)))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        _lines(canvas, rows)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("weights in a row")

    return Figure(
        "gap-by-size",
        "Gap to the optimum against the width of the row",
        "Mean over the proven rows of that width with a 95% interval, patterns per row. "
        "Widths that exact solvers cannot prove are missing here.",
        ("solver", "cols", "mean gap", "from", "to", "rows"),
        tuple(rows),
        draw,
    )


def gap_by_pattern(data: StudyData) -> Figure | None:
    """Mean gap against the pattern; None for a single one."""
    patterns = sorted({unit.pattern for unit in data.units}, key=pattern_order)
    proven = data.proven[data.instance]
    rows: list[Row] = []
    for label in data.main_labels:
        mine = proven & data.rows_of(label)
        for pattern in patterns:
            here = data.rows_of_units([unit.pattern == pattern for unit in data.units])
            gaps = data.gap[mine & here]
            if gaps.size:
                rows.append((label, pattern_name(pattern), *_mean_interval(gaps), int(gaps.size)))
    names = list(dict.fromkeys(pattern_name(pattern) for pattern in patterns))
    if len({row[1] for row in rows}) < 2:
        return None

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        shown = tuple((row[0], names.index(str(row[1])), *row[2:]) for row in rows)
        _lines(canvas, shown, joined=False)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("pattern (pruned share, or kept N:M)")

    return Figure(
        "gap-by-pattern",
        "Gap to the optimum against the pattern",
        "Mean over the proven rows with that pattern, with a 95% interval.",
        ("solver", "pattern", "mean gap", "from", "to", "rows"),
        tuple(rows),
        draw,
    )


def _mean_interval(values: np.ndarray) -> tuple[Cell, Cell, Cell]:
    interval = bootstrap_interval(values, resamples=200)
    return interval.estimate, interval.low, interval.high


def _lines(canvas: Canvas, rows: tuple[Row, ...], joined: bool = True) -> None:
    """One line or row of marks with intervals per solver; columns: label, x, mean, low, high."""
    axes = canvas.axes[0]
    groups = series(rows)
    for index, (label, points) in enumerate(groups.items()):
        look = style(index)
        spread = 0.0 if joined else (index - (len(groups) - 1) / 2) * 0.5 / max(len(groups), 1)
        x = [value + spread for value in numbers(points, 1)]
        mean, low, high = (np.array(numbers(points, column)) * 100 for column in (2, 3, 4))
        axes.errorbar(
            x, mean, yerr=[mean - low, high - mean], fmt=look.mark, linestyle=look.line if joined else "none",
            color=look.colour, label=label, capsize=2, elinewidth=1,
        )  # fmt: skip
    gap_scale(axes, "y", max([*numbers(rows, 4), 0.0]))
    axes.set_ylabel("mean gap to the proven optimum")
    legend_below(canvas, axes)


def bounds_section(data: StudyData) -> Section | None:
    """Certified gaps beside true ones; None without any bound."""
    rows: list[Row] = []
    known = data.best_bound[data.instance] > 0
    if not known.any():
        return None
    proven = data.proven[data.instance]
    for label in data.main_labels:
        mine = known & data.rows_of(label)
        for size in sorted(set(data.cols[mine].tolist())):
            here = mine & (data.cols == size)
            true = data.gap[here & proven]
            rows.append(
                (
                    label,
                    size,
                    int(here.sum()),
                    float(data.certified_gap[here].mean()),
                    int((here & proven).sum()),
                    float(true.mean()) if true.size else None,
                )
            )
    return Section(
        "Certified gaps",
        (
            _certified_text(data, [row for row in rows if row[0] == data.inexact_labels[-1]]),
            "Where no optimum is known, the gap to a proven lower bound is an upper bound on the true gap. "
            "Beside it stands the true gap on the rows where the optimum is proven.",
        ),
        tuple(item for item in (_bound_table(data), _certified_figure(tuple(rows))) if item is not None),
    )


def _certified_text(data: StudyData, rows: Sequence[Row]) -> str:
    """What is certified of the best solver that proves no optimum, and what is true."""
    label = data.inexact_labels[-1]
    certified, true = numbers(rows, 3), [value for value in numbers(rows, 5) if not np.isnan(value)]
    text = (
        f"Bounds certify that other masks could save at most {span(certified, '.1%')} of the error of "
        f"**{label}**, on average over the rows of one width"
    )
    if true:
        text += f"; where the optimum is known it saves {span(true, '.1%')}"
    return text + "."


def _bound_table(data: StudyData) -> Table | None:
    """Every solver that proves bounds: how close they come."""
    rows: list[Row] = []
    for label in dict.fromkeys(unit.label for unit in data.units):
        for size in sorted(set(data.cols[data.rows_of(label)].tolist())):
            mine = data.rows_of(label) & (data.cols == size)
            if not (data.bound[mine] > 0).any():
                continue
            reference = data.reference[data.instance[mine]]
            bound = np.minimum(data.bound[mine], reference)
            gaps = 1 - np.divide(bound, reference, out=np.ones_like(bound), where=reference > 0)
            rows.append(
                (
                    label,
                    size,
                    int(mine.sum()),
                    float((gaps <= OPTIMAL).mean()),
                    float(gaps.mean()),
                    float(np.median(gaps)),
                    float(data.seconds[mine].mean()),
                )
            )
    if not rows:
        return None
    return Table(
        "bounds",
        "Solvers that prove lower bounds: share of rows where the bound meets the best known error, and "
        "how far "
        "below that error the bound stays (best known − bound) / best known.",
        (
            Column("solver"),
            Column("cols"),
            Column("rows"),
            Column("closed", ".1%"),
            Column("mean gap of the bound", ".2%"),
            Column("median", ".2%"),
            Column("seconds per row", ".3f"),
        ),
        tuple(rows),
    )


def _certified_figure(rows: tuple[Row, ...]) -> Figure:
    """Certified and true gap against the width, one panel for each."""

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        panels = canvas.subplots(2, 1, sharex=True)
        sizes = sorted(set(numbers(rows, 1)))
        for axes, column, title in zip(
            panels, (3, 5), ("certified (all rows)", "true (proven rows)"), strict=True
        ):
            for index, (label, points) in enumerate(series(rows).items()):
                look = style(index)
                axes.plot(
                    numbers(points, 1), [100 * value for value in numbers(points, column)],
                    look.mark + look.line, color=look.colour, label=label,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=60 if len(sizes) > 10 else 0)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(title, loc="left")
            axes.set_ylabel("mean gap")
        for axes in panels:
            gap_scale(axes, "y")
        panels[1].set_xlabel("weights in a row")
        legend_below(canvas, panels[0])

    return Figure(
        "certified-gap",
        "Certified gap beside the true gap",
        "Above: what can be certified, an upper bound on the true gap. Below: the true gap where the "
        "optimum is "
        "proven. The distance between the panels is what the bound loses, not what the mask loses.",
        ("solver", "cols", "rows", "mean certified gap", "proven rows", "mean true gap"),
        rows,
        draw,
        5.0,
    )
