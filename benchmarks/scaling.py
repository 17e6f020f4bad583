"""What pruning a model of 8, 70 or 405 billion weights needs, by arithmetic; and curves that were measured.

    python benchmarks/scaling.py          # the tables of docs/scaling.md

The arithmetic follows the code: Gram matrices in float64 with a float32 normalised form beside them, one
float per token and channel of a stream of activations, one bit per weight in a mask file. The curves are
read from the tables in ``benchmarks/results``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from sparseswaps.reports import Figure
from sparseswaps.reports.axes import legend_below, numbers, series
from sparseswaps.reports.palette import style
from sparseswaps.reports.tables import Row

RESULTS = Path(__file__).parent / "results"
WINDOWS, LENGTH = 128, 2048
GIGA = 1e9
GRAM_BYTES, NORMALISED_BYTES = 8, 4


@dataclass(frozen=True)
class Shape:
    """A model's shape: width, feed-forward width, width of keys and values, blocks."""

    name: str
    hidden: int
    feed_forward: int
    key_value: int
    blocks: int

    @property
    def block_weights(self) -> int:
        """Prunable weights of a block: q and o, k and v, gate, up and down."""
        h = self.hidden
        return 2 * h * h + 2 * h * self.key_value + 3 * h * self.feed_forward

    @property
    def weights(self) -> int:
        """Prunable weights."""
        return self.blocks * self.block_weights


# the published configurations of Llama 3.1
MODELS = (
    Shape("8B", 4096, 14336, 1024, 32),
    Shape("70B", 8192, 28672, 1024, 80),
    Shape("405B", 16384, 53248, 1024, 126),
)


def memory_rows() -> list[tuple[str, ...]]:
    """What has to be held, in 10⁹ bytes."""
    tokens = WINDOWS * LENGTH
    entries = GRAM_BYTES + NORMALISED_BYTES
    facts = (
        ("prunable weights (10⁹)", lambda m: m.weights / GIGA),
        ("weights in bfloat16", lambda m: 2 * m.weights / GIGA),
        ("one block in bfloat16", lambda m: 2 * m.block_weights / GIGA),
        ("Gram matrix of a hidden input, with its normalised form", lambda m: entries * m.hidden**2 / GIGA),
        ("Gram matrix of a down projection's input", lambda m: entries * m.feed_forward**2 / GIGA),
        (
            "sums of the same with drift and residual drift",
            lambda m: (
                GRAM_BYTES * (3 * m.feed_forward**2 + (2 * m.feed_forward + m.hidden) * m.hidden) / GIGA
            ),
        ),
        ("activations of one stream in bfloat16", lambda m: 2 * tokens * m.hidden / GIGA),
        ("mask file", lambda m: m.weights / 8 / GIGA),
    )
    return [(name, *(f"{fact(model):,.2f}" for model in MODELS)) for name, fact in facts]


def work_rows() -> list[tuple[str, ...]]:
    """What has to be computed, in 10¹⁵ operations, and how many rows are searched."""
    tokens = WINDOWS * LENGTH
    peta = 1e15
    facts = (
        ("one forward pass over the calibration text", lambda m: 2 * m.weights * tokens / peta),
        (
            "Gram matrices (q k v, o, gate up, down)",
            lambda m: 2 * tokens * m.blocks * (3 * m.hidden**2 + m.feed_forward**2) / peta,
        ),
        ("rows to search (10⁶)", lambda m: _rows(m) / 1e6),
    )
    return [(name, *(f"{fact(model):,.2f}" for model in MODELS)) for name, fact in facts]


def _rows(model: Shape) -> int:
    per_block = 3 * model.hidden + 2 * model.key_value + 2 * model.feed_forward
    return model.blocks * per_block


def markdown(title: str, rows: list[tuple[str, ...]]) -> str:
    """A table with one column per model."""
    head = f"| {title} | " + " | ".join(model.name for model in MODELS) + " |"
    lines = [head, "|---|" + "---:|" * len(MODELS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tables() -> str:
    """Both tables, as ``docs/scaling.md`` shows them."""
    return (
        markdown("held (10⁹ bytes)", memory_rows())
        + "\n\n"
        + markdown("computed (10¹⁵ operations)", work_rows())
    )


def read_table(name: str, *columns: str) -> list[tuple[str, ...]]:
    """Columns of the tables in a results file that have them."""
    found: list[tuple[str, ...]] = []
    places: list[int] = []
    for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            places = []
        elif all(column in cells for column in columns):
            places = [cells.index(column) for column in columns]
        elif places and not set(line) <= set("|-: "):
            found.append(tuple(cells[place] for place in places))
    return found


def exact_figure() -> Figure:
    """Seconds in which branch and bound proves the optimum of a row, against its width."""
    rows: list[Row] = []
    for cols, pattern, seconds, slow in read_table(
        "exact_solvers.md", "d", "pattern", "s (median)", "s (95 %)"
    ):
        rows.append((_pattern_name(pattern), int(cols), float(seconds), float(slow)))
    rows.sort(key=lambda row: (str(row[0]), numbers([row], 1)[0]))

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, (label, points) in enumerate(series(rows).items()):
            look = style(index)
            x = numbers(points, 1)
            axes.plot(x, numbers(points, 2), look.mark + "-", color=look.colour, label=f"{label}, median")
            axes.plot(
                x, numbers(points, 3), look.mark + ":", color=look.colour, fillstyle="none",
                label=f"{label}, 95 %",
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set(xlabel="weights in a row", ylabel="seconds per row")
        legend_below(canvas, axes, 2)

    return Figure(
        "exact-seconds", "Exact search against width",
        "Seconds of branch and bound per row of real layers, one thread of a shared machine.",
        ("pattern", "cols", "median seconds", "95 % seconds"), tuple(rows), draw,
    )  # fmt: skip


def bound_figure() -> Figure:
    """Mean certified gap of each bound, against the width of the rows."""
    sums: dict[tuple[str, int], list[float]] = {}
    for cols, tier, gap in read_table("exact_bounds.md", "d", "tier", "mean gap"):
        share = re.match(r"[\d.]+", gap)
        if share is not None:
            sums.setdefault((tier, int(cols)), []).append(float(share[0]))
    rows: list[Row] = [(tier, cols, sum(v) / len(v)) for (tier, cols), v in sorted(sums.items())]

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, (label, points) in enumerate(series(rows).items()):
            look = style(index)
            axes.plot(numbers(points, 1), numbers(points, 2), look.mark + "-", color=look.colour, label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({int(value) for value in numbers(rows, 1)})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(0, 100)
        axes.set(xlabel="weights in a row", ylabel="mean certified gap (%)")
        legend_below(canvas, axes, 3)

    return Figure(
        "bound-gap", "Certified gap against width",
        "Mean gap between 1-swap masks and each proven bound.",
        ("tier", "cols", "mean gap (%)"), tuple(rows), draw,
    )  # fmt: skip


def engine_rows() -> list[tuple[str, ...]]:
    """Layer, method, seconds and certified share of each engine measurement."""
    found = []
    for name in ("engine.md", "engine_full_layer.md"):
        text = (RESULTS / name).read_text(encoding="utf-8")
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            layer = part.splitlines()[0].split(": ", 1)[1].split(",")[0]
            for method in (
                "1-swap lazy",
                "greedy, then tabu",
                "torch.compile brute force, 100 swaps, extrapolated",
            ):
                row = re.search(rf"^\| {re.escape(method)} \| ([\d.]+) \| ([\d.]+) \|", part, re.MULTILINE)
                if row is not None:
                    found.append((layer, method, row[1], row[2]))
    return found


def engine_table() -> str:
    """The engine's seconds at several sizes, from its results."""
    lines = ["| layer | method | wall s | processor s |", "|---|---|---:|---:|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in engine_rows())])


def memory_table() -> str:
    """Peak memory of offloaded pruning against the number of blocks, from its results."""
    return _copied("memory.md", "blocks", "model, MB", "hard limit, MB", "peak anonymous memory, MB")


def end_to_end_table() -> str:
    """Seconds and memory of the stages of a run, from its results."""
    return _copied("end_to_end.md", "stage", "seconds", "host, GB")


def kernel_counts_table() -> str:
    """What the CUDA kernel does per row under each search, from the counts of its steps."""
    return _copied(
        "kernel_counts.md", "layers", "size", "search", "swaps", "their lines", "lines of the last ones",
        "R of these, lines", "R, MB", "against as it was", "certified",
    )  # fmt: skip


def kernel_seconds_table() -> str:
    """Seconds of the search of a whole model that follow from the counts, and those measured on a card."""
    rows = read_table("kernel_counts.md", "layers", "kernel", "card", "32 blocks")
    cards = list(dict.fromkeys(card for _, _, card, _ in rows))
    newest = rows[-1][1]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for layers, kernel, card, seconds in rows:
        found.setdefault((layers, kernel), {})[card] = seconds
    heads = [f"{card}, {what}" for card in cards for what in ("predicted", "measured")]
    lines = ["| layers | kernel | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    for (layers, kernel), seconds_on in found.items():
        cells = [layers, kernel]
        for card in cards:
            measured = measured_seconds(card)
            ran = measured is None or (layers == "llm_scale" and kernel == newest)
            cells += [seconds_on[card], ("not measured" if measured is None else measured) if ran else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured_seconds(card: str) -> str | None:
    """Seconds of the search of a whole model that ``cuda_acceptance.py`` found on a card, if it ran there."""
    for path in sorted((RESULTS / "cuda").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if card in found["card"]:
            for row in found["rows"]:
                if (row["stage"], row["name"]) == ("shapes", "whole model, 0.5"):
                    return f"{row['value']:.0f}"
    return None


def _copied(name: str, *columns: str) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in read_table(name, *columns))])


def _pattern_name(pattern: str) -> str:
    return pattern if ":" in pattern else f"{100 * float(pattern):g} %"


if __name__ == "__main__":
    print(tables())
