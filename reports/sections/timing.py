"""What an answer costs: gap against time, primal integral, performance profile, means, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from ..axes import gap_scale, legend_below, numbers, series
from ..figures import Figure
from ..page import Section
from ..palette import style
from ..statistics import par10, performance_profile, primal_gap, primal_integral, shifted_geometric_mean
from ..study_data import OPTIMAL, StudyData
from ..tables import Column, Row, Table

# Shift of the geometric mean of seconds per row: a millisecond more or less does not matter.
SHIFT = 1e-3
TIMES = 60
LARGEST_RATIO = 2.0**16


def timing_section(data: StudyData) -> Section | None:
    """Time and quality together; None without rows."""
    if not data.main_labels:
        return None
    speed = gap_against_time(data)
    items: list[Table | Figure] = [speed]
    proven = data.proven[data.instance]
    text = [
        _speed_text(data, speed.rows),
        "Seconds are wall-clock time of one process on the machine named below, per matrix row; the start of "
        "the process is not counted.",
    ]
    if proven.any():
        text.append(
            f"A solver has **solved** a row when its mask is within {OPTIMAL:.2%} of the proven optimum, "
            "whether or "
            "not it could prove that itself; PAR10 counts ten times the limit for a row that it has not "
            "solved."
        )
        items.append(solve_table(data))
        profile = profile_figure(data)
        items += [profile] if profile is not None else []
    curve = gap_over_time(data)
    items += [curve] if curve is not None else []
    return Section("Time", tuple(text), tuple(items))


def _speed_text(data: StudyData, rows: Sequence[Row]) -> str:
    """Gap and seconds of the best solver, of the best that proves no optimum, and of the fastest."""
    found = {str(row[0]): (numbers([row], 1)[0], numbers([row], 2)[0]) for row in rows}
    best = min(found, key=lambda label: (found[label][1], found[label][0]))
    inexact = min(
        (label for label in found if label in data.inexact_labels),
        key=lambda label: found[label][1],
        default=best,
    )
    fastest = min(found, key=lambda label: found[label][0])
    named = {fastest: "is the fastest", inexact: "is the best without a proof", best: "comes closest"}
    return (
        "; ".join(
            f"{label} {what}: mean gap {found[label][1]:.2%} in {found[label][0]:.3g} s per row"
            for label, what in reversed(named.items())
        )
        + "."
    )


def _row_limit(data: StudyData, label: str) -> float:
    """Seconds per row that a solver had: its budget shared by its rows, else the longest time of any."""
    budgets = [
        unit.budget / unit.rows for unit in data.units if unit.label == label and unit.budget is not None
    ]
    return max(budgets) if budgets else float(max(data.seconds.max(), SHIFT))


def solve_table(data: StudyData) -> Table:
    """Times to a proven optimum."""
    rows: list[Row] = []
    integrals = _primal_integrals(data)
    for label in data.mask_labels:
        chosen = data.rows_of(label) & data.proven[data.instance]
        if not chosen.any():
            continue
        seconds, solved = data.seconds[chosen], data.optimal[chosen]
        limit = _row_limit(data, label)
        rows.append(
            (
                label,
                int(chosen.sum()),
                float(solved.mean()),
                shifted_geometric_mean(seconds, SHIFT),
                limit,
                par10(seconds, solved, limit),
                integrals.get(label),
            )
        )
    return Table(
        "time-to-optimum",
        f"Seconds per row on the proven rows: shifted geometric mean (shift {SHIFT * 1000:g} ms) of all "
        "times, PAR10, "
        "and the mean primal integral per row (seconds times primal gap, until the longest time of any "
        "solver "
        "on that problem; smaller is better).",
        (
            Column("solver"),
            Column("rows"),
            Column("solved", ".1%", "max"),
            Column("geometric mean (s)", ".3g", "min"),
            Column("limit (s)", ".3g"),
            Column("PAR10 (s)", ".4g", "min"),
            Column("primal integral (s)", ".4g", "min"),
        ),
        tuple(rows),
    )


def _primal_integrals(data: StudyData) -> dict[str, float]:
    """Mean primal integral per row of each solver, over units whose rows are all proven."""
    all_proven = np.ones(len(data.units), dtype=bool)
    all_proven[data.unit[~data.proven[data.instance]]] = False
    longest: dict[str, float] = {}
    for unit in data.units:
        longest[unit.problem] = max(longest.get(unit.problem, 0.0), unit.seconds)
    found: dict[str, list[float]] = {}
    for index, unit in enumerate(data.units):
        if not all_proven[index] or unit.objective is None:
            continue
        points = data.traces.get(index)
        times = [point.seconds for point in points] if points else [unit.seconds]
        values = [point.objective for point in points] if points else [unit.objective]
        value = primal_integral(times, values, float(data.unit_reference[index]), longest[unit.problem])
        found.setdefault(unit.label, []).append(value / unit.rows)
    return {label: float(np.mean(values)) for label, values in found.items()}


def gap_against_time(data: StudyData) -> Figure:
    """One point per solver: mean seconds per row against mean gap."""
    proven = data.proven[data.instance]
    known = proven if proven.any() else np.ones_like(proven)
    rows: list[Row] = []
    for label in data.main_labels:
        chosen = data.rows_of(label) & known
        if chosen.any():
            rows.append((label, float(data.seconds[chosen].mean()), float(data.gap[chosen].mean())))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, row in enumerate(rows):
            look = style(index)
            axes.plot(
                [max(numbers([row], 1)[0], 1e-6)], [100 * numbers([row], 2)[0]], look.mark,
                color=look.colour, markersize=9, label=str(row[0]), clip_on=False,
            )  # fmt: skip
        axes.set_xscale("log")
        gap_scale(axes, "y", max([*numbers(rows, 2), 0.0]))
        axes.margins(x=0.1)
        axes.set(xlabel="mean seconds per row", ylabel="mean gap to the reference")
        legend_below(canvas, axes)

    return Figure(
        "gap-time",
        "Gap against time",
        "Each point is a solver: further down is closer to the optimum, further left is faster; both "
        "axes are "
        "logarithmic (the gap below 0.1% is linear). "
        + ("Rows with a proven optimum." if proven.any() else "The reference is the best known mask."),
        ("solver", "mean seconds per row", "mean gap"),
        tuple(rows),
        draw,
    )


def profile_figure(data: StudyData) -> Figure | None:
    """Dolan–Moré profile of the time to a proven optimum; None for fewer than two solvers."""
    labels = [label for label in data.main_labels if (data.rows_of(label) & data.optimal).any()]
    instances = np.flatnonzero(data.proven & data.common_instances(labels))
    if len(labels) < 2 or not len(instances):
        return None
    costs = np.full((len(data.reference), len(labels)), np.inf)
    for column, label in enumerate(labels):
        mine = data.rows_of(label)
        seconds = np.where(data.optimal[mine], np.maximum(data.seconds[mine], 1e-6), np.inf)
        np.minimum.at(costs[:, column], data.instance[mine], seconds)
    costs = costs[instances]
    finite = costs[np.isfinite(costs).any(axis=1)]
    best = finite.min(axis=1, keepdims=True)
    largest = float(np.max(np.where(np.isfinite(finite), finite / best, 1.0), initial=2.0))
    top = min(LARGEST_RATIO, 2.0 ** math.ceil(math.log2(largest)))
    ratios = np.exp2(np.linspace(0, math.log2(top), TIMES))
    shares = performance_profile(costs, ratios)
    rows: list[Row] = [
        (label, float(ratio), float(share))
        for column, label in enumerate(labels)
        for ratio, share in zip(ratios, shares[:, column], strict=True)
    ]

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, (label, points) in enumerate(series(rows).items()):
            look = style(index)
            axes.step(
                numbers(points, 1),
                numbers(points, 2),
                look.line,
                where="post",
                color=look.colour,
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set_xlim(left=1)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="τ: times the fastest solver's seconds (log₂)", ylabel="ρ(τ): share of rows solved")
        legend_below(canvas, axes)

    return Figure(
        "performance-profile",
        "Performance profile",
        f"Share of {len(instances)} proven rows that a solver solves within τ times the time of the "
        "fastest solver "
        "that solves them (Dolan, Moré, 2002). Left edge: how often it is the fastest; right edge: how often "
        "it finds the optimum. Ranks can change when a solver leaves the comparison.",
        ("solver", "tau", "share of rows"),
        tuple(rows),
        draw,
    )


def gap_over_time(data: StudyData) -> Figure | None:
    """Mean primal gap and mean gap to the bound against time, from traces; None without any."""
    labels = [label for label in data.main_labels if any(data.units[i].label == label for i in data.traces)]
    if not labels:
        return None
    points = [point.seconds for trace in data.traces.values() for point in trace if point.seconds > 0]
    grid = np.geomspace(max(min(points), 1e-4), max(points), TIMES)
    rows: list[Row] = []
    for label in labels:
        curves, proofs = [], []
        for index, trace in data.traces.items():
            if data.units[index].label != label:
                continue
            times = [point.seconds for point in trace]
            last = np.searchsorted(times, grid, side="right") - 1
            best = float(data.unit_reference[index])
            objectives = np.array([point.objective for point in trace])
            gaps = np.append(primal_gap(objectives, best), 1.0)  # 1 before the first incumbent
            bounds = np.array([point.bound for point in trace])
            certified = np.append(np.where(objectives > 0, (objectives - bounds) / objectives, 0.0), 1.0)
            curves.append(gaps[last])
            proofs.append(certified[last])
        for second, mean, proof in zip(grid, np.mean(curves, axis=0), np.mean(proofs, axis=0), strict=True):
            rows.append((label, float(second), float(mean), float(max(proof, 0.0))))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        panels = canvas.subplots(2, 1, sharex=True)
        for axes, column, title in zip(
            panels, (2, 3), ("to the best known mask", "to its own bound"), strict=True
        ):
            for index, (label, members) in enumerate(series(rows).items()):
                look = style(index)
                axes.step(
                    numbers(members, 1), [100 * value for value in numbers(members, column)], look.line,
                    where="post", color=look.colour, label=label,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_title(title, loc="left")
            axes.set_ylabel("mean gap of the layer")
        for axes in panels:
            gap_scale(axes, "y")
        panels[1].set_xlabel("seconds")
        legend_below(canvas, panels[0])

    return Figure(
        "gap-over-time",
        "Gap over time",
        "Mean over problems, for solvers that record a trace. Above: gap of the incumbent to the best "
        "known mask. "
        "Below: gap to the solver's own bound, which reaches zero when everything is proven.",
        ("solver", "seconds", "mean primal gap", "mean gap to its bound"),
        tuple(rows),
        draw,
        5.0,
    )


def cost_section(data: StudyData) -> Section | None:
    """Seconds and memory of every solver; None without units."""
    rows: list[Row] = []
    for label in dict.fromkeys(unit.label for unit in data.units):
        mine = [unit for unit in data.units if unit.label == label]
        seconds = sum(unit.seconds for unit in mine)
        weights = sum(unit.rows * unit.cols for unit in mine)
        swaps = data.swaps[data.rows_of(label)]
        rows.append(
            (
                label,
                mine[0].group,
                len(mine),
                seconds,
                1e6 * seconds / weights,
                float(swaps[swaps >= 0].mean()) if (swaps >= 0).any() else None,
                max(unit.peak_memory_mb for unit in mine),
            )
        )
    if not rows:
        return None
    table = Table(
        "cost",
        "Time and memory of every solver, over all of its units. Memory is the largest resident set of "
        "the process, "
        "libraries included.",
        (
            Column("solver"),
            Column("group"),
            Column("units"),
            Column("seconds", ".2f"),
            Column("seconds per million weights", ".3g"),
            Column("swaps per row", ".1f"),
            Column("peak memory (MB)", ".0f"),
        ),
        tuple(rows),
    )
    cheapest, dearest = (pick(rows, key=lambda row: numbers([row], 4)[0]) for pick in (min, max))
    text = (
        f"{cheapest[0]} costs least, {cheapest[4]:.3g} seconds per million weights, and {dearest[0]} most, "
        f"{dearest[4]:.3g}."
    )
    return Section("Cost", (text,), (table,))
