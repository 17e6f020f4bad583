"""The report of the demo: one model, several methods, one table and two figures.

    write_demo_report(
        "demo-report",
        methods=[DemoMethod("Wanda", 0.21, 0.24, 21.1, 4.8, 1.2), ...],
        layers=[DemoLayer("Wanda", "model.layers.0.self_attn.q_proj", 0, "q_proj", 0.2, 0.2, 0.1), ...],
    )

All errors are relative: layer error over ``‖W X‖_F²`` on the same tokens. Methods appear in the
order given; the first is what the others are compared with.
"""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure as Canvas

from .axes import legend_below, numbers, plain_log, series
from .figures import Figure
from .page import Fact, Section, build_page
from .palette import HEAT, INK, NEUTRAL, style
from .tables import Column, Row, Table, span

# What the model that nothing is pruned of is called.
DENSE = "dense model"


@dataclass(frozen=True)
class DemoMethod:
    """One way to prune the model.

    Attributes:
        label: name of the method, the same as in the layer rows.
        error: mean relative layer error on the calibration text.
        held_out_error: the same on held-out text, None without any.
        perplexity: of the pruned model, None where it has none (encoders).
        perplexity_dense: of the dense model.
        seconds: wall-clock time of the whole pruning run.
    """

    label: str
    error: float
    held_out_error: float | None
    perplexity: float | None
    perplexity_dense: float | None
    seconds: float


@dataclass(frozen=True)
class DemoLayer:
    """One pruned layer under one method.

    Attributes:
        method: label of the method.
        name: layer name; block: index of its block; kind: type inside the block.
        error: relative layer error of the result; error_start: of its warm start.
        seconds: time of the search.
    """

    method: str
    name: str
    block: int
    kind: str
    error: float
    error_start: float
    seconds: float


@dataclass(frozen=True)
class DemoText:
    """What each model writes after a prompt.

    Attributes:
        prompt: the text that is continued.
        continuations: by the label of the method, ``DENSE`` among them.
    """

    prompt: str
    continuations: Mapping[str, str]


def write_demo_report(
    out_dir: str | os.PathLike[str],
    methods: Sequence[DemoMethod],
    layers: Sequence[DemoLayer],
    title: str = "Pruning a language model",
    subtitle: str = "",
    facts: Sequence[Fact] = (),
    texts: Sequence[DemoText] = (),
) -> Path:
    """Write the demo's page (``index.html``), its Markdown twin and the data of its figures.

    Args:
        out_dir: folder, created if needed.
        methods: one row per method; the first is the baseline of all comparisons.
        layers: one row per layer and method.
        title: of the page.
        subtitle: one sentence about model, pattern and text.
        facts: key figures for the head of the page.
        texts: prompts and what the models make of them, of the dense one and of each method.

    Returns:
        Path of ``index.html``.

    Raises:
        ValueError: if there are no methods or no layers, or a layer's method is not listed.
    """
    if not methods or not layers:
        raise ValueError(
            f"demo report: expected methods and layers, found {len(methods)} methods and {len(layers)} layers"
        )
    labels = [method.label for method in methods]
    for layer in layers:
        if layer.method not in labels:
            raise ValueError(f"layer {layer.name}: expected a method of {labels}, found {layer.method!r}")
    errors = layer_error_map(labels, layers)
    sections = [
        Section("Methods", _summary(methods), (method_table(methods),)),
        Section(
            "Layer error and perplexity",
            (
                f"A smaller layer error and a lower perplexity {_agreement(methods)}. The layer "
                "error is what the methods minimise, perplexity is what it costs the model.",
            )
            if sum(m.perplexity is not None for m in methods) > 1
            else (),
            (error_against_perplexity(methods),) if any(m.perplexity is not None for m in methods) else (),
        ),
        Section("Layers", (layer_text(errors.rows),), (errors,)),
    ]
    if texts:
        sections.insert(1, Section("Continuations", _text_summary(texts), (text_table(texts),)))
    return build_page(out_dir, title, sections, subtitle, facts)


def method_table(methods: Sequence[DemoMethod]) -> Table:
    """Every method with its errors, perplexity and time; the dense model is the first line."""
    dense = next((m.perplexity_dense for m in methods if m.perplexity_dense is not None), None)
    base = methods[0]
    rows: list[Row] = []
    if dense is not None:
        rows.append((DENSE, 0.0, None, 0.0, dense, None))
    for method in methods:
        change = method.error / base.error - 1 if base.error > 0 and method is not base else None
        rows.append(
            (method.label, method.error, change, method.held_out_error, method.perplexity, method.seconds)
        )
    return Table(
        "methods",
        "Mean relative layer error on the calibration text and on held-out text, perplexity and time of each "
        f"method. The change is against {base.label}.",
        (
            Column("method"),
            Column("layer error", ".2%"),
            Column("change", "+.1%", "min"),
            Column("held-out error", ".2%"),
            Column("perplexity", ".2f"),
            Column("seconds", ".1f"),
        ),
        tuple(rows),
    )


def text_table(texts: Sequence[DemoText]) -> Table:
    """One line per prompt, the models side by side."""
    labels = tuple(texts[0].continuations)
    return Table(
        "continuations",
        "The likeliest token at each step, after each prompt; line breaks are shown as spaces.",
        (Column("prompt"), *map(Column, labels)),
        tuple(
            (text.prompt, *(" ".join(text.continuations[label].split()) for label in labels))
            for text in texts
        ),
    )


def _text_summary(texts: Sequence[DemoText]) -> tuple[str, ...]:
    """How many words each pruned model writes before it differs from the dense one."""
    shared = {
        label: sum(_same_words(text.continuations[DENSE], text.continuations[label]) for text in texts)
        for label in texts[0].continuations
        if label != DENSE
    }
    whole = sum(len(text.continuations[DENSE].split()) for text in texts)
    ranked = sorted(shared.items(), key=lambda item: -item[1])
    words = ", ".join(f"{count} of {label}" for label, count in ranked)
    longest = [label for label, count in ranked if count == ranked[0][1]]
    verb = "follow" if len(longest) > 1 else "follows"
    return (
        f"{' and '.join(longest)} {verb} the dense model longest. Words "
        f"before the first that differs, of {whole} after {len(texts)} prompts: {words}.",
    )


def _same_words(first: str, second: str) -> int:
    pairs = zip(first.split(), second.split(), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _summary(methods: Sequence[DemoMethod]) -> tuple[str, ...]:
    base = methods[0]
    best = min(methods, key=lambda method: method.error)
    text = [f"{best.label} leaves the smallest layer error: {best.error:.2%} of the layers' output energy"]
    if best is not base and base.error > 0:
        text[0] += f", {1 - best.error / base.error:.0%} less than {base.label} ({base.error:.2%})"
    text[0] += "."
    rated = [method for method in methods if method.perplexity is not None]
    if rated:
        lowest = min(rated, key=lambda method: method.perplexity or math.inf)
        sentence = f"The lowest perplexity is {lowest.perplexity:.2f}, from {lowest.label}"
        if base.perplexity is not None and lowest is not base:
            sentence += f"; {base.label} has {base.perplexity:.2f}"
        if lowest.perplexity_dense is not None:
            sentence += f"; the dense model has {lowest.perplexity_dense:.2f}"
        text.append(sentence + ".")
    return (" ".join(text),)


def _agreement(methods: Sequence[DemoMethod]) -> str:
    """In how many pairs of methods the smaller layer error has the lower perplexity."""
    rated = [(m.error, m.perplexity) for m in methods if m.perplexity is not None]
    pairs = [
        (first, second)
        for index, first in enumerate(rated)
        for second in rated[index + 1 :]
        if first[0] != second[0] and first[1] != second[1]
    ]
    agree = sum((first[0] < second[0]) == (first[1] < second[1]) for first, second in pairs)
    return f"agree in {agree} of {len(pairs)} pairs of methods"


def layer_text(rows: Sequence[Row]) -> str:
    """How the last method's layers compare with those of the first, from the rows of ``layer_error_map``."""
    errors = {(str(row[0]), str(row[3])): numbers([row], 4)[0] for row in rows}
    base, last = str(rows[0][0]), str(rows[-1][0])
    changes = sorted(
        errors[last, name] / error - 1
        for (method, name), error in errors.items()
        if method == base and (last, name) in errors and error > 0
    )
    if base == last or not changes:
        return f"{base} leaves errors of {span(list(errors.values()), '.1%')}."
    lower = sum(change < 0 for change in changes)
    return (
        f"{last} has a lower error than {base} in {lower} of {len(changes)} layers: {changes[0]:+.0%} to "
        f"{changes[-1]:+.0%}, {changes[len(changes) // 2]:+.0%} in the middle."
    )


def error_against_perplexity(methods: Sequence[DemoMethod]) -> Figure:
    """One point per method; the dense model is a line."""
    rows = tuple(
        (method.label, method.error, method.perplexity, method.perplexity_dense)
        for method in methods
        if method.perplexity is not None
    )

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, row in enumerate(rows):
            look = style(index)
            x, y = numbers([row], 1)[0], numbers([row], 2)[0]
            axes.plot([100 * x], [y], look.mark, color=look.colour, markersize=9, label=str(row[0]))
        dense = [value for value in numbers(rows, 3) if not math.isnan(value)]
        if dense:
            axes.axhline(dense[0], color=NEUTRAL, linestyle="--", linewidth=1.4)
            axes.annotate(
                f"dense model {dense[0]:.2f}", (1, dense[0]), xycoords=("axes fraction", "data"),
                xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.set(xlabel="mean relative layer error (%)", ylabel="perplexity", yscale="log")
        axes.margins(x=0.1, y=0.1)
        plain_log(axes.yaxis)
        legend_below(canvas, axes, 4)

    return Figure(
        "error-perplexity",
        "Layer error against perplexity",
        "Each point is a method: further left is a smaller layer error, further down a better model "
        "(logarithmic axis). The dashed line is the dense model.",
        ("method", "relative layer error", "perplexity", "dense perplexity"),
        rows,
        draw,
    )


def telling_kinds(layers: Sequence[DemoLayer]) -> dict[str, str]:
    """Kind of each layer by name; where a block has several of a kind, more words of the name with it."""
    blocks = {layer.name: layer.block for layer in layers}
    kinds = {layer.name: layer.kind for layer in layers}
    words = {name: [word for word in name.split(".") if not word.isdigit()] for name in kinds}
    for count in range(2, 1 + max(map(len, words.values()))):
        places = Counter((blocks[name], kind) for name, kind in kinds.items())
        shared = {kind for (_, kind), members in places.items() if members > 1}
        kinds = {
            name: ".".join(words[name][-count:]) if kind in shared else kind for name, kind in kinds.items()
        }
    return kinds


def layer_error_map(
    labels: Sequence[str],
    layers: Sequence[DemoLayer],
    name: str = "layer-errors",
    title: str = "Layer error over depth and layer type",
) -> Figure:
    """Layer errors over depth and type, one panel per method, one colour scale."""
    order = {label: index for index, label in enumerate(labels)}
    kinds_of = telling_kinds(layers)
    rows = tuple(
        (
            layer.method,
            layer.block,
            kinds_of[layer.name],
            layer.name,
            layer.error,
            layer.error_start,
            layer.seconds,
        )
        for layer in sorted(layers, key=lambda layer: (order[layer.method], layer.block))
    )
    blocks = len({layer.block for layer in layers})
    kinds = len(set(kinds_of.values()))
    panels = len({layer.method for layer in layers})
    across = 1 if blocks > 12 else min(panels, 2)
    down = -(-panels // across)
    height = max(2.2, down * (0.26 * kinds + 0.6) + 0.9)

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        groups = series(rows)
        block_names = sorted({int(value) for value in numbers(rows, 1)})
        kind_names = list(dict.fromkeys(str(row[2]) for row in rows))
        errors = [value for value in numbers(rows, 4) if value > 0]
        scale = LogNorm(min(errors), max(errors)) if errors and min(errors) < max(errors) else None
        panels = canvas.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        image = None
        for axes in panels.flat:
            axes.set_visible(False)
        for axes, (label, members) in zip(panels.flat, groups.items(), strict=False):
            axes.set_visible(True)
            table = [[float("nan")] * len(block_names) for _ in kind_names]
            for row in members:
                block, error = numbers([row], 1)[0], numbers([row], 4)[0]
                table[kind_names.index(str(row[2]))][block_names.index(int(block))] = error
            image = axes.imshow(table, norm=scale, cmap=HEAT, aspect="auto", interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(textwrap.fill(label, 52 // across), loc="left")
            axes.set_yticks(range(len(kind_names)), kind_names)
            step = max(1, math.ceil(len(block_names) * across / 16))
            axes.set_xticks(range(0, len(block_names), step), [str(block) for block in block_names[::step]])
        for axes in panels[-1]:
            axes.set_xlabel("block")
        if image is not None:
            bar = canvas.colorbar(image, ax=panels, location="bottom", pad=0.02, aspect=40)
            plain_log(bar.ax.xaxis, percent=True)
            bar.set_label("relative layer error")

    return Figure(
        name,
        title,
        "Relative error of every layer, first block at the left; darker is a smaller error, and all panels "
        "share one logarithmic scale.",
        (
            "method",
            "block",
            "kind",
            "layer",
            "relative layer error",
            "relative error of the warm start",
            "seconds",
        ),
        rows,
        draw,
        height,
    )
