"""Models that are physically smaller: what their size and their measured speed cost in quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure as Canvas

from ...records.study import ModelRecord, SizeRecord
from ..axes import legend_below, numbers, plain_log, series
from ..figures import Figure
from ..page import Section
from ..palette import NEUTRAL, style
from ..study_data import file_stem
from ..tables import Column, Row, Table

# Columns of the rows, by their places.
MODEL, METHOD, UNITS, PARAMETERS, MEGABYTES, QUALITY, DENSE, PREFILL = 0, 1, 2, 3, 4, 6, 7, 8


def smaller_models_section(
    models: Sequence[ModelRecord], sizes: Sequence[SizeRecord], names: dict[str, str]
) -> Section | None:
    """Quality against size and measured speed; None without smaller models.

    Args:
        models: finished runs, in the order of the tables.
        sizes: of runs that made a smaller model.
        names: of each run.
    """
    of_unit = {size.unit: size for size in sizes}
    groups: dict[tuple[str, str, str], list[ModelRecord]] = {}
    for record in models:
        if record.unit in of_unit and record.option("units"):
            name = names[record.unit].removesuffix(f", seed {record.seed}")
            groups.setdefault((record.model, name, record.pattern), []).append(record)
    rows = [
        _row(key, members, [of_unit[record.unit] for record in members]) for key, members in groups.items()
    ]
    if not rows:
        return None
    figures = [
        figure
        for model in dict.fromkeys(str(row[MODEL]) for row in rows)
        if (figure := _pareto(model, [row for row in rows if row[MODEL] == model])) is not None
    ]
    text = (
        "These models are smaller, not sparse: whole units are gone, and every runtime has less to compute. "
        "Speed is that of the saved model beside the dense one, measured in turns in one run; where it was "
        "not measured, nothing is said of it.",
        *_best(rows),
    )
    return Section("Smaller models: quality against size and speed", text, (_table(rows), *figures))


def _row(key: tuple[str, str, str], members: Sequence[ModelRecord], sizes: Sequence[SizeRecord]) -> Row:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    causal = members[0].perplexity is not None
    lost = [
        record.perplexity if causal else None if record.cosine is None else 1 - record.cosine
        for record in members
    ]
    return (
        *key,
        fmean(size.parameters / size.parameters_dense for size in sizes),
        fmean(size.megabytes for size in sizes),
        len(members),
        mean(lost),
        mean([record.perplexity_dense for record in members]) if causal else 0.0,
        mean([size.prefill for size in sizes]),
        mean([size.prefill_low for size in sizes]),
        mean([size.prefill_high for size in sizes]),
        mean([size.decode for size in sizes]),
    )


def _table(rows: Sequence[Row]) -> Table:
    return Table(
        "smaller-models",
        "Smaller models: share of the dense model's parameters, size of what is saved, mean over seeds of "
        "the perplexity (of encoders 1 − mean cosine), and how many times the dense model's tokens per "
        "second: of a prompt with its 95 % interval, and behind it.",
        (
            Column("model"),
            Column("method"),
            Column("units"),
            Column("parameters", ".1%"),
            Column("MB", ".1f"),
            Column("seeds"),
            Column("quality", ".4g"),
            Column("dense", ".4g"),
            Column("prefill", ".2f"),
            Column("from", ".2f"),
            Column("to", ".2f"),
            Column("decode", ".2f"),
        ),
        tuple(rows),
    )


def _best(rows: Sequence[Row]) -> list[str]:
    """The best method of each model and share."""
    text = []
    for model, units in dict.fromkeys((str(row[MODEL]), str(row[UNITS])) for row in rows):
        members = [row for row in rows if row[MODEL] == model and row[UNITS] == units]
        members = [row for row in members if row[QUALITY] is not None]
        if len(members) < 2:
            continue
        best, worst = (pick(members, key=lambda row: numbers([row], QUALITY)[0]) for pick in (min, max))
        text.append(
            f"{model}, {units}: **{best[METHOD]}** leaves {numbers([best], QUALITY)[0]:.4g} "
            f"(dense {numbers([best], DENSE)[0]:.4g}), {worst[METHOD]} {numbers([worst], QUALITY)[0]:.4g}."
        )
    return text


def _pareto(model: str, rows: Sequence[Row]) -> Figure | None:
    """Quality against measured speed, or against size where no speed was measured."""
    measured = [row for row in rows if row[PREFILL] is not None and row[QUALITY] is not None]
    by_speed = bool(measured)
    chosen = tuple(measured or [row for row in rows if row[QUALITY] is not None])
    if not chosen:
        return None
    column = PREFILL if by_speed else PARAMETERS
    causal = numbers(chosen[:1], DENSE)[0] > 0

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, (label, points) in enumerate(series(rows, METHOD).items()):
            look = style(index)
            joined = sorted(zip(numbers(points, column), numbers(points, QUALITY), strict=True))
            axes.plot(
                [x for x, _ in joined], [y for _, y in joined], look.mark, color=look.colour,
                linestyle=look.line, linewidth=0.8, label=label,
            )  # fmt: skip
        pairs = zip(numbers(rows, column), numbers(rows, QUALITY), strict=True)
        front: list[tuple[float, float]] = []
        least = math.inf
        for x, y in sorted(pairs, reverse=by_speed):  # from the fastest or smallest on
            if y < least:
                front.append((x, y))
                least = y
        axes.step(
            [x for x, _ in front], [y for _, y in front], where="post", color=NEUTRAL, linewidth=1.6,
            linestyle=":", label=f"no other is better and {'faster' if by_speed else 'smaller'}",
        )  # fmt: skip
        if causal:
            axes.axhline(numbers(rows, DENSE)[0], color=NEUTRAL, linestyle="--", linewidth=1.2)
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.set_xlabel(
            "prefill, times the dense model's tokens per second" if by_speed else "share of the parameters"
        )
        axes.set_ylabel("perplexity" if causal else "1 − mean cosine to the dense model")
        legend_below(canvas, axes)

    what = "measured speed" if by_speed else "size"
    return Figure(
        f"smaller-{file_stem(model)}",
        f"Quality against {what}, {model}",
        "Each mark is a method at one share, means over seeds; lower is better"
        + (", and so is farther to the right." if by_speed else ", and so is farther to the left.")
        + " The dotted line joins what nothing else beats in both."
        + (" The dashed line is the dense model." if causal else ""),
        tuple(each.title for each in _table(chosen).columns),
        chosen,
        draw,
        3.6,
    )
