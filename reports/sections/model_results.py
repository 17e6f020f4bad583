"""Whole models: what each way of pruning leaves of them, and whether a smaller layer error helps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from matplotlib.figure import Figure as Canvas

from ...records.study import LayerBoundRecord, ModelLayer, ModelRecord, SizeRecord
from ..axes import legend_below, numbers, plain_log, series
from ..demo import DemoLayer, layer_error_map, layer_text
from ..figures import Figure
from ..page import Section
from ..palette import INK, NEUTRAL, style
from ..study_data import file_stem, pattern_name, pattern_order
from ..tables import Column, Row, Table, span
from .ablations import swaps_allowed
from .factors import FACTORS, factor_figure, factor_of, factor_text
from .model_bounds import model_bounds_section
from .smaller_models import smaller_models_section

# Runs that a legend tells apart; with more of them, one sign stands for all runs of a solver.
SERIES = 12
# Panels of a heat map; more cannot be compared by eye.
MAP_PANELS = 4


def variant_names(models: Sequence[ModelRecord]) -> dict[str, str]:
    """A name for each run that tells it from the others on its model: label and what else varies there."""
    names = {}
    for record in models:
        peers = [other for other in models if other.model == record.model]
        parts = [record.label]
        if len({other.fitted for other in peers}) > 1:
            parts.append(record.fitted)
        if len({other.samples for other in peers}) > 1:
            parts.append(f"{record.samples} windows")
        if len({other.calibration for other in peers}) > 1:
            parts.append(f"calibrated on {record.calibration}")
        if len({other.seed for other in peers}) > 1:
            parts.append(f"seed {record.seed}")
        names[record.unit] = ", ".join(parts)
    return names


def main_runs(models: Sequence[ModelRecord]) -> list[ModelRecord]:
    """Runs with the most common calibration text, windows and seed, and no limit of swaps that is varied."""
    settings = [(record.calibration, record.samples, record.seed) for record in models]
    common = max(dict.fromkeys(settings), key=settings.count) if settings else None
    return [
        record
        for record, setting in zip(models, settings, strict=True)
        if setting == common and swaps_allowed(record) in (None, math.inf)
    ]


def quality(record: ModelRecord) -> float | None:
    """What a model has lost, smaller is better: perplexity, or 1 - mean cosine for encoders."""
    if record.perplexity is not None:
        return record.perplexity
    return None if record.cosine is None else 1 - record.cosine


def model_sections(
    models: Sequence[ModelRecord],
    layers: Sequence[ModelLayer],
    bounds: Sequence[LayerBoundRecord] = (),
    sizes: Sequence[SizeRecord] = (),
) -> list[Section]:
    """Sections about whole models; empty without any."""
    done = [record for record in models if not record.failure]
    if not done:
        return []
    names = variant_names(done)
    items: list[Table | Figure] = [model_table(done, names)]
    by_model = {name: [r for r in done if r.model == name] for name in dict.fromkeys(r.model for r in done)}
    for name, members in by_model.items():
        figure = error_against_quality(name, members)
        items += [figure] if figure is not None else []
    sections = [Section("Whole models", tuple(_model_text(done, names)), tuple(items))]
    smaller = smaller_models_section(_sorted(done, names), sizes, names)
    if smaller is not None:
        sections.append(smaller)
    certified = model_bounds_section(_sorted(done, names), layers, bounds, names)
    if certified is not None:
        sections.append(certified)
    agreement = agreement_table(done, names)
    if agreement is not None:
        sections.append(
            Section(
                "Does a smaller layer error mean a better model?",
                (_agreement_text(agreement),),
                (agreement,),
            )
        )
    figures = tuple(figure for factor in FACTORS if (figure := factor_figure(done, factor)) is not None)
    if figures:
        text = tuple(factor_text(figure) for figure in figures)
        sections.append(Section("One thing at a time", text, figures))
    maps = tuple(
        figure for name, members in by_model.items() if (figure := _map(name, members, layers)) is not None
    )
    if maps:
        sections.append(
            Section("Layers", tuple(f"{figure.title}. {layer_text(figure.rows)}" for figure in maps), maps)
        )
    return sections


def _sorted(models: Sequence[ModelRecord], names: dict[str, str]) -> list[ModelRecord]:
    return sorted(models, key=lambda r: (r.model, pattern_order(r.pattern), -(r.error or 0), names[r.unit]))


def model_table(models: Sequence[ModelRecord], names: dict[str, str]) -> Table:
    """Every run, the dense model first, worst layer error first."""
    rows: list[Row] = []
    for model in dict.fromkeys(record.model for record in models):
        mine = [record for record in models if record.model == model]
        dense = next((r.perplexity_dense for r in mine if r.perplexity_dense is not None), None)
        encoder = any(record.cosine is not None for record in mine)
        rows.append((model, "dense", "", 0.0, 0.0, 0.0, dense, 1.0 if encoder else None, None, None))
        rows += [
            (
                model,
                names[record.unit],
                pattern_name(record.pattern),
                record.sparsity,
                record.error,
                record.held_out_error,
                record.perplexity,
                record.cosine,
                record.seconds,
                record.peak_memory_mb,
            )
            for record in _sorted(mine, names)
        ]
    return Table(
        "models",
        "Whole models: mean relative layer error on calibration and held-out text, perplexity of "
        "language models, mean "
        "cosine to the dense model's embeddings of encoders, wall-clock seconds with evaluation, and "
        "peak memory.",
        (
            Column("model"),
            Column("method"),
            Column("pattern"),
            Column("pruned", ".1%"),
            Column("layer error", ".2%"),
            Column("held-out error", ".2%"),
            Column("perplexity", ".2f"),
            Column("cosine", ".4f"),
            Column("seconds", ".1f"),
            Column("memory (MB)", ".0f"),
        ),
        tuple(rows),
    )


def _model_text(models: Sequence[ModelRecord], names: dict[str, str]) -> list[str]:
    groups: dict[tuple[str, str], list[ModelRecord]] = {}
    for record in _sorted(models, names):
        if quality(record) is not None:
            groups.setdefault((record.model, record.pattern), []).append(record)
    text = _winner_text(list(groups.values()))
    for (model, pattern), members in groups.items():
        if len(members) < 2:
            continue
        best = min(members, key=lambda r: quality(r) or 0.0)
        least = min(members, key=lambda r: r.error or 0.0)
        measure = "perplexity" if best.perplexity is not None else "distance 1 − cosine"
        sentence = (
            f"{model}, {pattern_name(pattern)}: the best model comes from **{names[best.unit]}** "
            f"({measure} {quality(best):.4g}"
        )
        if best.perplexity_dense is not None:
            sentence += f", dense {best.perplexity_dense:.4g}"
        sentence += ")"
        if least is not best:
            sentence += (
                f"; the smallest layer error from {names[least.unit]} ({measure} {quality(least):.4g})"
            )
        text.append(sentence + ".")
    return text


def _winner_text(groups: Sequence[Sequence[ModelRecord]]) -> list[str]:
    """The solver whose runs make the best models most often, and how far the next solver's are behind.

    Args:
        groups: the runs of each model and pattern.
    """
    leads: dict[str, list[float]] = {}
    for members in groups:
        best: dict[str, float] = {}
        for record in members:
            best[record.label] = min(best.get(record.label, math.inf), quality(record) or 0.0)
        ranked = sorted(best, key=lambda label: best[label])
        if len(ranked) > 1 and best[ranked[0]] > 0:
            leads.setdefault(ranked[0], []).append(best[ranked[1]] / best[ranked[0]] - 1)
    if not leads:
        return []
    label = max(leads, key=lambda label: len(leads[label]))
    cases = sum(map(len, leads.values()))
    return [
        f"The best model comes from **{label}** in {len(leads[label])} of {cases} cases (model and pattern); "
        f"the next solver's has {span(leads[label], '.1%')} more perplexity or distance there."
    ]


def error_against_quality(model: str, models: Sequence[ModelRecord]) -> Figure | None:
    """Layer error against perplexity or cosine, one point per run; None without a measure."""
    rated = [
        record for record in main_runs(models) if quality(record) is not None and record.error is not None
    ]
    if not rated:
        return None
    causal = rated[0].perplexity is not None
    names = variant_names(rated)
    if len(set(names.values())) > SERIES:
        names = {record.unit: record.label for record in rated}
    order = list(dict.fromkeys(names[record.unit] for record in rated))
    rated.sort(key=lambda record: (order.index(names[record.unit]), pattern_order(record.pattern)))
    rows: tuple[Row, ...] = tuple(
        (
            names[record.unit],
            pattern_name(record.pattern),
            record.error,
            record.held_out_error,
            quality(record),
            record.perplexity_dense,
        )
        for record in rated
    )

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for members in series(rows, 1).values():
            joined = sorted(zip(numbers(members, 2), numbers(members, 4), strict=True))
            x, y = [100 * each for each, _ in joined], [each for _, each in joined]
            axes.plot(x, y, color=NEUTRAL, linewidth=0.8, alpha=0.5)
            axes.annotate(
                str(members[0][1]), (x[-1], y[-1]), xytext=(8, -3),
                textcoords="offset points", fontsize=8.5, color=INK,
            )  # fmt: skip
        for index, (label, points) in enumerate(series(rows).items()):
            look = style(index)
            axes.plot(
                [100 * x for x in numbers(points, 2)], numbers(points, 4), look.mark, color=look.colour,
                label=label,
            )  # fmt: skip
        dense = [value for value in numbers(rows, 5) if not math.isnan(value)]
        if causal and dense:
            axes.axhline(dense[0], color=NEUTRAL, linestyle="--", linewidth=1.4)
            axes.annotate(
                f"dense {dense[0]:.2f}", (1, dense[0]), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                textcoords="offset points", ha="right", fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.margins(x=0.12, y=0.1)
        axes.set_xlabel("mean relative layer error (%)")
        axes.set_ylabel("perplexity" if causal else "1 − mean cosine to the dense model")
        legend_below(canvas, axes)

    stem = file_stem(model)
    return Figure(
        f"error-quality-{stem}",
        f"Layer error against {'perplexity' if causal else 'cosine'}, {model}",
        "Each mark is one run, thin lines join runs with the same pattern: a line that falls to the left "
        "means that a "
        "smaller layer error goes with a better model; where it rises to the left, it does not."
        + (" The dashed line is the dense model." if causal else " The dense model is at 0."),
        ("run", "pattern", "layer error", "held-out error", "quality", "dense perplexity"),
        rows,
        draw,
        3.6,
    )


def _kind_of_pair(first: ModelRecord, second: ModelRecord) -> str | None:
    """What two runs on the same model and pattern differ in; None for more than one thing."""
    differ = [
        name
        for (name, one), (_, other) in zip(factor_of(first), factor_of(second), strict=True)
        if one != other and name not in ("start", "swaps")
    ]
    told = [option for factor in FACTORS for option in factor.options]
    if first.apart(*told) != second.apart(*told):
        differ.append("options")
    if first.label != second.label:
        differ.append("solver")
    return differ[0] if len(differ) == 1 else None


def agreement_table(models: Sequence[ModelRecord], names: dict[str, str]) -> Table | None:
    """In how many pairs of runs the smaller layer error has the better model, by what differs."""
    counts: dict[tuple[str, str], list[tuple[bool, bool | None]]] = {}
    for first, second in itertools.combinations(_sorted(models, names), 2):
        if (first.model, first.pattern, first.seed) != (second.model, second.pattern, second.seed):
            continue
        one, other = quality(first), quality(second)
        if one is None or other is None or first.error is None or second.error is None:
            continue
        kind = _kind_of_pair(first, second)
        if kind is None or one == other or first.error == second.error:
            continue
        better = one < other
        held_out = None
        if first.held_out_error is not None and second.held_out_error is not None:
            held_out = (first.held_out_error < second.held_out_error) == better
        counts.setdefault((first.model, kind), []).append(((first.error < second.error) == better, held_out))
    rows: list[Row] = []
    for (model, kind), found in counts.items():
        known = [held_out for _, held_out in found if held_out is not None]
        rows.append(
            (
                model,
                kind,
                len(found),
                sum(agrees for agrees, _ in found) / len(found),
                sum(known) / len(known) if known else None,
            )
        )
    if not rows:
        return None
    return Table(
        "agreement",
        "Pairs of runs on the same model and pattern that differ in one thing only: share in which the "
        "run with the "
        "smaller layer error is also the better model.",
        (
            Column("model"),
            Column("what differs"),
            Column("pairs"),
            Column("calibration error agrees", ".0%"),
            Column("held-out error agrees", ".0%"),
        ),
        tuple(rows),
    )


def _agreement_text(table: Table) -> str:
    pairs = sum(numbers(table.rows, 2))
    agree = sum(n * share for n, share in zip(numbers(table.rows, 2), numbers(table.rows, 3), strict=True))
    least = min(table.rows, key=lambda row: numbers([row], 3)[0])
    text = (
        f"In {agree:.0f} of {pairs:.0f} pairs the run with the smaller layer error is also the better model. "
    )
    if numbers([least], 3)[0] < 1:
        text += (
            f"They disagree most where the runs differ in {least[1]} ({least[0]}: agreement in "
            f"{numbers([least], 3)[0]:.0%} of {least[2]} pairs). A smaller layer error is no proof of a "
            "better model."
        )
    return text


def _map(model: str, models: Sequence[ModelRecord], layers: Sequence[ModelLayer]) -> Figure | None:
    """Heat map of the runs on the most common pattern, from the largest to the smallest error.

    Runs without rows of layers are left out; None if no run has any.
    """
    known = {layer.unit for layer in layers}
    models = main_runs([record for record in models if record.unit in known])
    if not models:
        return None
    names = variant_names(models)
    patterns = [record.pattern for record in models]
    pattern = max(dict.fromkeys(patterns), key=patterns.count)
    runs = [r for r in _sorted(models, names) if r.pattern == pattern]
    if len(runs) > MAP_PANELS:
        runs = [runs[round(i * (len(runs) - 1) / (MAP_PANELS - 1))] for i in range(MAP_PANELS)]
    labels: dict[str, str] = {record.unit: names[record.unit] for record in runs}
    rows = [
        DemoLayer(
            labels[layer.unit], layer.record.name, layer.record.block, layer.record.kind, layer.record.error,
            layer.record.error_start, layer.record.seconds,
        )
        for layer in layers
        if layer.unit in labels
    ]  # fmt: skip
    stem = file_stem(model)
    return layer_error_map(
        list(labels.values()),
        rows,
        f"layers-{stem}",
        f"{model}, {pattern_name(pattern)}: layer error over depth",
    )
