"""What changes in whole models when one thing changes: swaps allowed, warm start, calibration, drift."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from ...records.run import known_mean
from ...records.study import ModelRecord
from ..axes import legend_below, numbers, plain_log, series
from ..figures import Figure
from ..palette import style
from ..study_data import pattern_name
from ..tables import Row, span
from .ablations import INFINITE, show_swaps, swaps_allowed


@dataclass(frozen=True)
class Factor:
    """Something that whole-model runs vary.

    Attributes:
        name: stem of its figure; title: in words; options: of a run that it is about.
        value: of a run, as text; None where it does not apply.
        order: sort key of the texts.
    """

    name: str
    title: str
    options: tuple[str, ...]
    value: Callable[[ModelRecord], str | None]
    order: Callable[[str], float | str]


def _model_swaps(record: ModelRecord) -> str | None:
    allowed = swaps_allowed(record)
    return None if allowed is None else show_swaps(allowed)


def _drift_strength(record: ModelRecord) -> str | None:
    """One-shot, or the strength of the drift where the objective has nothing else."""
    if record.mode == "one-shot" or record.objective == "plain":
        return record.mode if record.mode == "one-shot" else "0"
    name, _, value = record.objective.partition("=")
    return value if name == "drift" and re.fullmatch(r"[\d.]+", value) else None


FACTORS = (
    Factor(
        "swaps",
        "swaps allowed per row",
        ("solver",),
        _model_swaps,
        lambda x: float("inf") if x == INFINITE else float(x),
    ),
    Factor("start", "warm start", ("start",), lambda record: record.start or None, str),
    Factor("samples", "calibration windows", ("samples",), lambda record: str(record.samples), float),
    Factor("calibration", "calibration text", ("calibration",), lambda record: record.calibration, str),
    Factor(
        "drift",
        "one-shot, then sequential with drift",
        ("objective", "mode"),
        _drift_strength,
        lambda x: -1.0 if x == "one-shot" else float(x),
    ),
)


def factor_of(record: ModelRecord) -> tuple[tuple[str, str | None], ...]:
    """The value of every factor of a run."""
    return tuple((factor.name, factor.value(record)) for factor in FACTORS)


def factor_figure(models: Sequence[ModelRecord], factor: Factor) -> Figure | None:
    """Error and quality of the model against one factor, all else equal; None where it is not varied.

    Runs that differ in their seed alone are one point, their mean.
    """
    groups: dict[tuple[object, ...], dict[str, list[ModelRecord]]] = {}
    for record in models:
        value = factor.value(record)
        if value is None:
            continue
        rest = tuple(pair for pair in factor_of(record) if pair[0] != factor.name)
        key = (record.model, record.method, record.apart(*factor.options), rest)
        groups.setdefault(key, {}).setdefault(value, []).append(record)
    chosen = [members for members in groups.values() if len(members) > 1]
    if not chosen:
        return None
    most = max(len(members) for members in chosen)
    chosen = [members for members in chosen if len(members) == most]
    causal = any(_first(members).perplexity is not None for members in chosen)
    chosen = [members for members in chosen if (_first(members).perplexity is not None) == causal]
    rows: list[Row] = []
    for name, members in zip(_line_names(chosen, factor), chosen, strict=True):
        for value in sorted(members, key=factor.order):
            records = members[value]
            rows.append(
                (
                    name,
                    value,
                    len(records),
                    known_mean([record.error for record in records]),
                    known_mean([record.held_out_error for record in records]),
                    known_mean([record.perplexity for record in records]),
                    known_mean([None if record.cosine is None else 1 - record.cosine for record in records]),
                )
            )

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        ticks = sorted({str(row[1]) for row in rows}, key=factor.order)
        above, below = canvas.subplots(2, 1, sharex=True)
        for index, (label, points) in enumerate(series(rows).items()):
            look = style(index)
            x = [ticks.index(str(point[1])) for point in points]
            above.plot(
                x, numbers(points, 3), look.mark + ":", color=look.colour, fillstyle="none", linewidth=1.2
            )
            above.plot(x, numbers(points, 4), look.mark + look.line, color=look.colour)
            below.plot(
                x, numbers(points, 5 if causal else 6), look.mark + look.line, color=look.colour, label=label
            )
        below.set_xticks(range(len(ticks)), ticks, rotation=30 if max(map(len, ticks)) > 12 else 0)
        below.margins(x=0.1)
        below.set_xlabel(factor.title)
        above.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        above.set_title("mean relative layer error", loc="left")
        below.set_title("perplexity" if causal else "1 − mean cosine", loc="left")
        if causal:
            below.set_yscale("log")
            plain_log(below.yaxis)
        legend_below(canvas, below, 2)

    return Figure(
        f"model-{factor.name}",
        f"Whole models against {factor.title}",
        "Above: layer error, dotted on the calibration text, solid on held-out text. Below: what it does "
        "to the model. Everything else is the same along a line; each mark is the mean over the seeds.",
        ("run", factor.title, "seeds", "calibration error", "held-out error", "perplexity", "1 - cosine"),
        tuple(rows),
        draw,
        5.0,
    )


def factor_text(figure: Figure) -> str:
    """Which value of the factor is best most often, and how much there is between the best and the worst."""
    best: list[str] = []
    spreads = []
    for points in series(figure.rows).values():
        lost = [
            one if math.isnan(other) else other
            for one, other in zip(numbers(points, 6), numbers(points, 5), strict=True)
        ]
        best.append(str(points[lost.index(min(lost))][1]))
        spreads.append(max(lost) / min(lost) - 1)
    value = max(dict.fromkeys(best), key=best.count)
    return (
        f"{figure.header[1].capitalize()}: {value} is best in {best.count(value)} of {len(best)} lines; the "
        f"worst value has {span(spreads, '.1%')} more perplexity or distance than the best one."
    )


def _first(members: dict[str, list[ModelRecord]]) -> ModelRecord:
    return next(iter(members.values()))[0]


def _line_names(lines: Sequence[dict[str, list[ModelRecord]]], factor: Factor) -> list[str]:
    """Model, pattern and method of each line, and what else tells it from the others."""
    parts = []
    for members in lines:
        record = _first(members)
        known = [record.model, pattern_name(record.pattern), record.method]
        fitted = [] if factor.name == "drift" else [record.fitted]
        others = [
            "" if value is None else f"{other.title} {value}"
            for other in FACTORS
            if other.name not in (factor.name, "drift")
            for value in [other.value(record)]
        ]
        parts.append([*known, *fitted, *others])
    names = []
    for line in parts:
        alike = [other for other in parts if other[:3] == line[:3]]
        told = [i for i in range(len(line)) if i < 3 or len({other[i] for other in alike}) > 1]
        names.append(", ".join(line[i] for i in told if line[i]))
    return names
