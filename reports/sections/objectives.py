"""What an objective is worth to the model: methods over several calibration seeds, paired with 1-swap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure as Canvas
from scipy import stats

from ...records.run import known_mean
from ...records.study import ModelRecord
from ..axes import legend_below, numbers, plain_log, series
from ..figures import Figure
from ..page import Section
from ..palette import NEUTRAL, style
from ..study_data import file_stem, pattern_name, pattern_order
from ..tables import Column, Row, Table, span
from .model_results import quality

# The group of methods that change kept weights, which no table mixes with masks.
UPDATES = "weight update"
# What the others are measured against: the paper's search and error.
PLAIN = "1-swap"
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class _Runs:
    """One method on one model at one pattern with one choice of calibration text, over seeds.

    Attributes:
        method: what was run; records: by seed.
    """

    method: str
    records: dict[int, ModelRecord]

    @property
    def first(self) -> ModelRecord:
        """One of them, for what they share."""
        return next(iter(self.records.values()))

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.first.model

    @property
    def pattern(self) -> str:
        """As asked for."""
        return self.first.pattern

    @property
    def calibration(self) -> str:
        """Name of the calibration text."""
        return self.first.calibration

    @property
    def samples(self) -> int:
        """Calibration windows."""
        return self.first.samples

    @property
    def setting(self) -> tuple[object, ...]:
        """What a comparison of methods holds fixed."""
        return self.first.setting


def method_name(record: ModelRecord) -> str:
    """Solver and what was done beyond the paper's error, without the mode that all runs share."""
    one_shot = ["one-shot"] if record.mode == "one-shot" else []
    return ", ".join([record.label, *one_shot, *record.extras])


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with Student's 95 % interval (Student, Biometrika 6, 1908); no width for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.sem(values)) * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return mean, mean - half, mean + half


def objective_sections(models: Sequence[ModelRecord]) -> list[Section]:
    """Masks alone, then updated weights; empty unless something ran with more than one seed."""
    done = [record for record in models if not record.failure and quality(record) is not None]
    groups: dict[tuple[object, ...], dict[int, ModelRecord]] = {}
    for record in done:
        key = (record.model, method_name(record), record.apart())
        groups.setdefault(key, {})[record.seed] = record
    runs = [_Runs(method_name(next(iter(found.values()))), found) for found in groups.values()]
    if not any(len(run.records) > 1 for run in runs):
        return []
    sections = []
    for title, updated in (("Better models from masks alone", False), ("Kept weights updated too", True)):
        chosen = [run for run in runs if (_group(run) == UPDATES) is updated]
        if not chosen:
            continue
        rows = _rows(chosen, runs)
        items: list[Table | Figure] = [_table(rows, updated)]
        for model in dict.fromkeys(row[0] for row in rows):
            # against calibration text and windows methods have a figure of their own (see ``factors``)
            if len({(run.calibration, run.samples) for run in chosen if run.model == model}) == 1:
                items.append(_figure(str(model), [row for row in rows if row[0] == model], updated))
        sections.append(Section(title, tuple(_text(rows)), tuple(items)))
    return sections


def _group(run: _Runs) -> str:
    return run.first.group


def _value(record: ModelRecord) -> float:
    found = quality(record)
    return math.nan if found is None else found


def _rows(runs: Sequence[_Runs], everything: Sequence[_Runs]) -> list[Row]:
    plain = {run.setting: run for run in everything if run.method == PLAIN}
    names = _names(everything)
    rows: list[Row] = []
    for run in runs:
        records = list(run.records.values())
        quality_interval = interval([_value(record) for record in records])
        base = plain.get(run.setting)
        change: tuple[float | None, float | None, float | None] = (None, None, None)
        seeds = [] if base is None or base is run else sorted(set(run.records) & set(base.records))
        if base is not None and seeds:
            logs = [math.log(_value(run.records[s]) / _value(base.records[s])) for s in seeds]
            found = interval(logs)
            change = (math.expm1(found[0]), math.expm1(found[1]), math.expm1(found[2]))
            if len(seeds) < 2:
                change = (change[0], None, None)
        rows.append(
            (
                run.model,
                run.pattern,
                names[run],
                len(records),
                *quality_interval,
                *change,
                float(np.mean([record.error or 0.0 for record in records])),
                known_mean([record.held_out_error for record in records]),
                float(np.mean([record.seconds for record in records])),
                max(record.peak_memory_mb for record in records),
                next((record.perplexity_dense for record in records), None),
            )
        )
    rows.sort(key=lambda row: (str(row[0]), pattern_order(str(row[1])), -numbers([row], 4)[0], str(row[2])))
    return [(row[0], pattern_name(str(row[1])), *row[2:]) for row in rows]


def _names(runs: Sequence[_Runs]) -> dict[_Runs, str]:
    """The method of each, with windows and text where those vary on its model."""
    names = {}
    for run in runs:
        peers = [other for other in runs if other.model == run.model]
        parts = [run.method]
        if len({other.samples for other in peers}) > 1:
            parts.append(f"{run.samples} windows")
        if len({other.calibration for other in peers}) > 1:
            parts.append(f"calibrated on {run.calibration}")
        names[run] = ", ".join(parts)
    return names


def _table(rows: Sequence[Row], updated: bool) -> Table:
    kind = "kept weights updated" if updated else "masks only"
    return Table(
        "updates" if updated else "objectives",
        f"Methods over calibration seeds, {kind}, worst first: perplexity (encoders: 1 − mean cosine) with "
        "Student's 95% interval; its change against plain 1-swap of the same seeds, geometric mean with the "
        "same interval; mean layer error on calibration and held-out text; seconds and peak memory.",
        (
            Column("model"),
            Column("pattern"),
            Column("method"),
            Column("seeds"),
            Column("quality", ".4g"),
            Column("from", ".4g"),
            Column("to", ".4g"),
            Column("against 1-swap", "+.1%"),
            Column("from", "+.1%"),
            Column("to", "+.1%"),
            Column("layer error", ".2%"),
            Column("held-out error", ".2%"),
            Column("seconds", ".1f"),
            Column("memory (MB)", ".0f"),
            Column("dense", ".4g"),
        ),
        tuple(rows),
    )


def _text(rows: Sequence[Row]) -> list[str]:
    """The best method of each model and pattern, and methods whose gain is not shown everywhere."""
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in rows:
        groups.setdefault((row[0], row[1]), []).append(row)
    winners = [min(members, key=lambda row: numbers([row], 4)[0]) for members in groups.values()]
    text = _winner_text(winners) if len(winners) > 1 else []
    for (model, pattern), best in zip(groups, winners, strict=True):
        value, low, high = (numbers([best], column)[0] for column in (4, 5, 6))
        sentence = f"{model}, {pattern}: best is **{best[2]}** ({value:.4g}"
        if low < high:
            sentence += f", 95% interval {low:.4g} to {high:.4g}"
        if best[14] is not None:
            sentence += f", dense {numbers([best], 14)[0]:.4g}"
        if best[7] is not None:
            sentence += f"; {numbers([best], 7)[0]:+.1%} against plain 1-swap"
        text.append(sentence + ").")
    for method in dict.fromkeys(str(row[2]) for row in rows):
        shown = [row for row in rows if row[2] == method and row[9] is not None]
        if not shown:
            continue
        gains = [row for row in shown if numbers([row], 9)[0] < 0]
        if len(gains) == len(shown):
            text.append(
                f"{method}: better than plain 1-swap beyond the seeds' spread in all {len(shown)} cases."
            )
        else:
            rest = [row for row in shown if row not in gains]
            where = "; ".join(f"{row[0]}, {row[1]}: {numbers([row], 7)[0]:+.1%}" for row in rest)
            text.append(
                f"{method}: better beyond the seeds' spread in {len(gains)} of {len(shown)} cases, not in: "
                f"{where}."
            )
    return text


def _winner_text(winners: Sequence[Row]) -> list[str]:
    """The method that is best most often, and by how much."""
    methods = [str(row[2]) for row in winners]
    best = max(dict.fromkeys(methods), key=methods.count)
    changes = [
        value for value in numbers([row for row in winners if row[2] == best], 7) if not math.isnan(value)
    ]
    text = f"**{best}** is the best in {methods.count(best)} of {len(winners)} cases (model and pattern)"
    if changes:
        text += f", there {span(changes, '+.1%')} against plain 1-swap (perplexity or distance)"
    return [text + "."]


def _figure(model: str, rows: Sequence[Row], updated: bool) -> Figure:
    patterns = list(dict.fromkeys(str(row[1]) for row in rows))
    causal = any(row[14] is not None for row in rows)

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        named = tuple((row[2], *row) for row in rows)
        methods = series(named)
        for index, (label, points) in enumerate(methods.items()):
            look = style(index)
            shift = 0.7 * ((index + 0.5) / len(methods) - 0.5)
            x = [patterns.index(str(point[2])) + shift for point in points]
            y = numbers(points, 5)
            low, high = numbers(points, 6), numbers(points, 7)
            spread = [
                [max(0.0, v - lo) for v, lo in zip(y, low, strict=True)],
                [max(0.0, hi - v) for v, hi in zip(y, high, strict=True)],
            ]
            axes.errorbar(x, y, spread, fmt=look.mark, color=look.colour, label=label, capsize=2)
        dense = [value for value in numbers(rows, 14) if not math.isnan(value)]
        if causal and dense:
            axes.axhline(dense[0], color=NEUTRAL, linestyle="--", linewidth=1.4)
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.set_xticks(range(len(patterns)), patterns)
        axes.set(xlabel="pattern", ylabel="perplexity" if causal else "1 − mean cosine")
        legend_below(canvas, axes, 2)

    stem = file_stem(model)
    return Figure(
        f"{'updates' if updated else 'objectives'}-{stem}",
        f"{'Updated weights' if updated else 'Masks alone'}: quality of {model}",
        "Each mark is the mean over calibration seeds, its bar Student's 95% interval; lower is better."
        + (" The dashed line is the dense model." if causal else " The dense model is at 0."),
        (
            "model",
            "pattern",
            "method",
            "seeds",
            "quality",
            "quality from",
            "quality to",
            "against 1-swap",
            "against from",
            "against to",
            "layer error",
            "held-out error",
            "seconds",
            "memory MB",
            "dense",
        ),
        tuple(rows),
        draw,
        4.0,
    )
