"""Certified gaps of whole models: how far each layer type can be from its optimum, beside its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...records.study import LayerBoundRecord, ModelLayer, ModelRecord
from ..axes import legend_below, numbers, series
from ..figures import Figure
from ..page import Section
from ..palette import style
from ..statistics import gap
from ..study_data import file_stem, pattern_name, pattern_order
from ..tables import Column, Row, Table

ALL_KINDS = "all layers"


@dataclass(frozen=True)
class _Layer:
    """A bounded layer: its type, width, relative error, certified gap and the seconds of its bound."""

    kind: str
    cols: int
    error: float
    gap: float
    seconds: float
    cut_off: bool


def model_bounds_section(
    models: Sequence[ModelRecord],
    layers: Sequence[ModelLayer],
    bounds: Sequence[LayerBoundRecord],
    names: dict[str, str],
) -> Section | None:
    """Certified gap per layer type of every run that asked for one; None without any.

    Args:
        models: finished runs, in the order of the tables.
        layers: all layers.
        bounds: all bounds of layers.
        names: of each run.
    """
    found = {(record.unit, record.layer): record for record in bounds}
    by_run: dict[str, list[_Layer]] = {}
    for layer in layers:
        record = found.get((layer.unit, layer.record.name))
        if record is not None:
            by_run.setdefault(layer.unit, []).append(
                _Layer(
                    layer.record.kind, layer.record.cols, layer.record.error,
                    float(gap(record.objective, record.bound)), record.seconds,
                    record.status == "time_limit",
                )
            )  # fmt: skip
    rows: list[Row] = []
    for run in models:
        if run.unit in by_run:
            rows += _run_rows(run, names[run.unit], by_run[run.unit])
    if not rows:
        return None
    figures = [
        figure
        for model in dict.fromkeys(str(row[0]) for row in rows)
        if (figure := _figure(model, [row for row in rows if row[0] == model])) is not None
    ]
    return Section("Certified gaps of whole models", tuple(_text(rows)), (_table(rows), *figures))


def _run_rows(run: ModelRecord, name: str, layers: Sequence[_Layer]) -> list[Row]:
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    groups = [(kind, [layer for layer in layers if layer.kind == kind]) for kind in kinds]
    rows: list[Row] = []
    for kind, members in [*groups, (ALL_KINDS, list(layers))]:
        widths = {layer.cols for layer in members}
        rows.append(
            (
                run.model,
                pattern_name(run.pattern),
                name,
                kind,
                widths.pop() if len(widths) == 1 else None,
                len(members),
                sum(layer.error for layer in members) / len(members),
                sum(layer.gap for layer in members) / len(members),
                max(layer.gap for layer in members),
                sum(layer.cut_off for layer in members),
                sum(layer.seconds for layer in members) / len(members),
            )
        )
    return rows


def _text(rows: Sequence[Row]) -> list[str]:
    text = []
    whole = [row for row in rows if row[3] == ALL_KINDS]
    for model, pattern in dict.fromkeys((str(row[0]), str(row[1])) for row in whole):
        members = [row for row in whole if row[:2] == (model, pattern)]
        best = min(members, key=lambda row: numbers([row], 7)[0])
        kinds = [row for row in rows if row[:3] == best[:3] and row[3] != ALL_KINDS]
        least, most = (pick(kinds, key=lambda row: numbers([row], 7)[0]) for pick in (min, max))
        text.append(
            f"{model}, {pattern}: other masks could save at most {numbers([best], 7)[0]:.1%} of the error "
            f"that **{best[2]}** leaves in a layer on average, from {numbers([least], 7)[0]:.1%} "
            f"({least[3]}) to {numbers([most], 7)[0]:.1%} ({most[3]})."
        )
    text.append(
        "Each layer's error is set against a proven lower bound for the inputs that the layer received in "
        "the same run: no mask of the pattern has a smaller error than the bound. So the certified gap is at "
        "least the true gap, and most of it is the bound's own weakness where rows are wide."
    )
    return text


def _table(rows: Sequence[Row]) -> Table:
    return Table(
        "certified-layers",
        "Layer types of whole models: mean relative layer error, mean and largest certified gap (error − "
        "bound) / error of the layers, how many bounds were cut off by their time limit, and seconds per "
        "bound.",
        (
            Column("model"),
            Column("pattern"),
            Column("method"),
            Column("layer type"),
            Column("cols"),
            Column("layers"),
            Column("layer error", ".2%"),
            Column("certified gap", ".1%"),
            Column("largest", ".1%"),
            Column("cut off"),
            Column("seconds per layer", ".1f"),
        ),
        tuple(rows),
    )


def _figure(model: str, rows: Sequence[Row]) -> Figure | None:
    """Error and certified gap of each layer type, on the pattern with the most runs."""
    patterns = [str(row[1]) for row in rows if row[3] == ALL_KINDS]
    pattern = max(sorted(dict.fromkeys(patterns), key=pattern_order), key=patterns.count)
    chosen = tuple(
        (row[2], row[3], row[4], row[6], row[7])
        for row in rows
        if row[1] == pattern and row[3] != ALL_KINDS
    )  # fmt: skip
    kinds = list(series(chosen, 1))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        panels = canvas.subplots(1, 2, sharey=True)
        runs = series(rows)
        for axes, column, title in zip(panels, (3, 4), ("layer error", "certified gap"), strict=True):
            for index, (label, points) in enumerate(runs.items()):
                look = style(index)
                # beside each other, so that equal values do not hide each other
                shift = 0.5 * ((index + 0.5) / len(runs) - 0.5)
                y = [kinds.index(str(point[1])) + shift for point in points]
                axes.plot(numbers(points, column), y, look.mark, color=look.colour, label=label)
            axes.set_title(title, loc="left")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        widths = {str(row[1]): row[2] for row in rows}
        panels[0].set_yticks(
            range(len(kinds)), [f"{kind} ({widths[kind]})" if widths[kind] else kind for kind in kinds]
        )
        panels[0].set_ylim(len(kinds) - 0.5, -0.5)
        legend_below(canvas, panels[0])

    stem = file_stem(model)
    return Figure(
        f"certified-layers-{stem}",
        f"{model}, {pattern}: error and certified gap by layer type",
        "Left: mean layer error, by layer type with its width. Right: the share of it that other masks could "
        "save at most. Methods that lie apart on the left and close together on the right differ less than "
        "the bound can tell.",
        ("run", "layer type", "cols", "mean layer error", "mean certified gap"),
        chosen,
        draw,
        max(2.4, 0.9 + 0.4 * len(kinds)),
    )
