"""What the interaction term of a swap is worth: 1-swap with it and without it, from the same masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure as Canvas

from ...records.study import ModelRecord, UnitRecord
from ..axes import gap_scale, legend_below, numbers, series
from ..figures import Figure
from ..page import Section
from ..palette import style
from ..study_data import Bools, StudyData, pattern_name, pattern_order
from ..tables import Cell, Column, Row, Table, span
from .ablations import INFINITE, show_swaps, swaps_allowed

WITH, WITHOUT = "OneSwap(", "AdditiveSwap("
STEEPEST = "search='best'"
# Errors closer than this, in relative terms, are the same: both searches stop at 1e-6 of the start.
SAME = 2e-6


@dataclass(frozen=True)
class _Group:
    """Units that can be compared: one width and one warm start.

    Attributes:
        cols, start: what they share.
        methods: units of each method, by the swaps that they allow (infinity for no limit).
        reference: method of the 1-swap search that the others are measured against.
    """

    cols: int
    start: str
    methods: dict[str, dict[float, list[int]]]
    reference: str


def interaction_section(data: StudyData, models: Sequence[ModelRecord]) -> Section | None:
    """1-swap against its ablation; None unless a study has both from the same start."""
    rows = [row for group in _groups(data.units) for row in _group_rows(data, group)]
    runs = _model_rows([record for record in models if not record.failure])
    if not rows and not runs:
        return None
    items: list[Table | Figure] = []
    if rows:
        items += [_table(rows), _figure(tuple(rows))]
    if runs:
        items.append(_model_table(runs))
    text = (
        *_text(rows),
        *_model_text(runs),
        "The ablation chooses the weight to prune and the weight to restore as if their effects added up, "
        "without −2 w_u w_p G_up; its errors are true errors.",
    )
    return Section("The interaction term", text, tuple(items))


def _is_swap(record: UnitRecord | ModelRecord) -> bool:
    return record.solver.startswith((WITH, WITHOUT))


def _limit(record: UnitRecord | ModelRecord) -> float:
    allowed = swaps_allowed(record)
    return float("inf") if allowed is None else allowed


def _groups(units: Sequence[UnitRecord]) -> list[_Group]:
    found: dict[tuple[int, str], dict[str, dict[float, list[int]]]] = {}
    for index, unit in enumerate(units):
        if _is_swap(unit):
            methods = found.setdefault((unit.cols, unit.start), {})
            methods.setdefault(unit.method, {}).setdefault(_limit(unit), []).append(index)
    groups = []
    for (cols, start), methods in sorted(found.items()):
        solvers = {name: units[min(min(limits.values()))].solver for name, limits in methods.items()}
        complete = [
            name for name, solver in solvers.items() if solver.startswith(WITH) and np.inf in methods[name]
        ]
        if complete and any(solver.startswith(WITHOUT) for solver in solvers.values()):
            # the ablation leaves something out of the steepest descent
            complete.sort(key=lambda name: STEEPEST not in solvers[name])
            groups.append(_Group(cols, start, methods, complete[0]))
    return groups


def _group_rows(data: StudyData, group: _Group) -> list[Row]:
    """One row per method and limit of swaps, on the instances that the reference has too."""

    def rows_of(members: Sequence[int]) -> Bools:
        return data.rows_of_units(np.isin(np.arange(len(data.units)), members).tolist())

    reference = np.full(len(data.reference), np.nan)
    converged = rows_of(group.methods[group.reference][np.inf])
    reference[data.instance[converged]] = data.objective[converged]
    shown = [
        name
        for name, limits in group.methods.items()
        if name == group.reference or data.units[min(min(limits.values()))].solver.startswith(WITHOUT)
    ]
    rows: list[Row] = []
    for name in sorted(shown, key=lambda name: name != group.reference):
        for limit, members in sorted(group.methods[name].items()):
            chosen = rows_of(members)
            chosen &= ~np.isnan(reference[data.instance])
            if not chosen.any():
                continue
            mine, theirs = data.objective[chosen], reference[data.instance[chosen]]
            larger, smaller = mine > theirs * (1 + SAME), mine < theirs * (1 - SAME)
            swaps = data.swaps[chosen]
            rows.append(
                (
                    name + (f", from {group.start}" if group.start else ""),
                    group.cols,
                    show_swaps(limit),
                    len(mine),
                    float(mine.sum() / theirs.sum() - 1) if theirs.sum() > 0 else 0.0,
                    float(larger.mean()),
                    float(smaller.mean()),
                    float(swaps[swaps >= 0].mean()) if (swaps >= 0).any() else None,
                )
            )
    return rows


def _text(rows: Sequence[Row]) -> list[str]:
    """What is left of the error at convergence, on the widest rows."""
    ends = [row for row in rows if row[2] == INFINITE]
    if not ends:
        return []
    widest = max(numbers(ends, 1))
    at_widest = [row for row in ends if row[1] == widest]
    text = []
    for row in at_widest[1:]:
        change, larger = numbers([row], 4)[0], numbers([row], 5)[0]
        how = f"{change:.2%} more error" if change >= 0 else f"{-change:.2%} less error"
        text.append(
            f"Rows of {widest:g} weights: {row[0]} ends with {how} than {at_widest[0][0]}, larger in "
            f"{larger:.1%} of the rows."
        )
    return text


def _table(rows: Sequence[Row]) -> Table:
    return Table(
        "interaction",
        "Error after at most T swaps per row, relative to 1-swap with its interaction term at convergence "
        "from the same warm start; share of rows with a larger and with a smaller error than there.",
        (
            Column("solver"),
            Column("cols"),
            Column("T"),
            Column("rows"),
            Column("error above 1-swap", "+.2%"),
            Column("larger", ".1%"),
            Column("smaller", ".1%"),
            Column("swaps per row", ".1f"),
        ),
        tuple(rows),
    )


def _figure(rows: tuple[Row, ...]) -> Figure:
    ticks = sorted(
        {str(row[2]) for row in rows}, key=lambda text: float("inf") if text == INFINITE else float(text)
    )

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
        axes.set(xlabel="swaps allowed per row (T)", ylabel="error above converged 1-swap")
        legend_below(canvas, axes, 2)

    return Figure(
        "interaction",
        "1-swap with and without its interaction term",
        "How much error is left above that of converged 1-swap from the same masks. A curve without the "
        "term that stays above zero at the right edge shows what the term is worth.",
        (
            "solver",
            "cols",
            "T",
            "rows",
            "error above 1-swap",
            "share larger",
            "share smaller",
            "swaps per row",
        ),
        rows,
        draw,
    )


def _model_rows(models: Sequence[ModelRecord]) -> list[Row]:
    """Whole models pruned by both searches without a limit of swaps, all else equal."""
    groups: dict[tuple[object, ...], list[ModelRecord]] = {}
    for record in models:
        if _is_swap(record) and _limit(record) == float("inf"):
            key: tuple[object, ...] = (
                record.model, pattern_order(record.pattern), record.apart("solver"), record.seed
            )  # fmt: skip
            groups.setdefault(key, []).append(record)
    rows: list[Row] = []
    for key in sorted(groups, key=str):
        members = sorted(groups[key], key=lambda record: (record.solver.startswith(WITHOUT), record.label))
        if len({record.solver.startswith(WITHOUT) for record in members}) == 2:
            rows += [_model_row(record) for record in members]
    return rows


def _model_row(record: ModelRecord) -> Row:
    quality: tuple[Cell, ...] = (record.perplexity, record.cosine)
    return (
        record.model, pattern_name(record.pattern), record.fitted, record.label, record.error,
        record.held_out_error, *quality,
    )  # fmt: skip


def _model_text(rows: Sequence[Row]) -> list[str]:
    """How the layer error of whole models changes without the term."""
    changes = []
    base: Row | None = None
    for row in rows:
        if base is None or row[:3] != base[:3]:
            base = row
        else:
            changes.append(numbers([row], 4)[0] / numbers([base], 4)[0] - 1)
    if not changes:
        return []
    larger = sum(change > 0 for change in changes)
    return [
        f"Whole models: without the term the layer error is larger in {larger} of {len(changes)} runs, "
        f"{span(changes, '+.1%')}."
    ]


def _model_table(rows: Sequence[Row]) -> Table:
    return Table(
        "interaction-models",
        "Whole models pruned with and without the term, all else equal.",
        (
            Column("model"),
            Column("pattern"),
            Column("mode"),
            Column("solver"),
            Column("layer error", ".2%"),
            Column("held-out error", ".2%"),
            Column("perplexity", ".2f"),
            Column("cosine", ".4f"),
        ),
        tuple(rows),
    )
