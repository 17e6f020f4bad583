"""What commands show: progress bars on standard error, tables and JSON on standard output."""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..machine import duration
from ..progress import Silent
from ..records.run import ConsumerRecord, LayerRecord

# a pipe or a file has no width of its own: enough for the layer table; "file:x:" is a name, no emoji
console = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
error_console = Console(stderr=True, emoji=False)


class ProgressBars:
    """Bars with time left, on standard error; a ``pipeline.Progress``."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def stage(self, text: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` under ``text``."""
        self._show(text, text, done, total)

    def layer_started(self, name: str) -> None:
        """Show which layer is searched."""
        if "layers" in self._tasks:
            self._bars.update(self._tasks["layers"], description=f"pruning {name}")

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """Show the share of weights that are pruned."""
        self._show("layers", f"pruned {record.name}", done, total)

    def rows(self, done: int, total: int) -> None:
        """Show finished rows of one layer."""
        self._show("rows", "rows", done, total)

    def _show(self, key: str, text: str, done: int, total: int) -> None:
        if not self._tasks:
            self._bars.start()
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(text, total=total)
        self._bars.update(self._tasks[key], description=text, completed=done, total=total)


class ProgressLines:
    """One plain line per layer and finished stage, with time left, for logs; a ``pipeline.Progress``.

    A stage that takes longer says every ``EVERY`` seconds how far it is.
    """

    EVERY = 30.0

    def __init__(self) -> None:
        self._begun: dict[str, tuple[int, float]] = {}
        self._said: dict[str, float] = {}

    def stage(self, text: str, done: int, total: int) -> None:
        """Say that a stage is over, or how far a long one is."""
        now = time.monotonic()
        begun = self._begun.get(text)
        if begun is None or done < begun[0]:
            self._begun[text], self._said[text] = (done, now), now
        if done >= total or now - self._said[text] >= self.EVERY:
            self._said[text] = now
            self._say(text, text, done, total)
            if done >= total:  # the next of that name is another one
                del self._begun[text]

    def layer_started(self, name: str) -> None:
        """Note when the first search begins."""
        self._begun.setdefault("layers", (0, time.monotonic()))

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """Say which layer is pruned."""
        self._begun.setdefault("layers", (done, time.monotonic()))
        self._say("layers", f"pruned {record.name}", done, total)

    def rows(self, done: int, total: int) -> None:
        """Say how many rows of one layer are finished."""
        self.stage("rows", done, total)

    def _say(self, key: str, text: str, done: int, total: int) -> None:
        first, begin = self._begun[key]
        seconds = time.monotonic() - begin
        line = f"{text}: {done / max(total, 1):.0%}, {duration(seconds)}"
        if first < done < total:
            left = seconds / (done - first) * (total - done)
            line += f", about {duration(left)} left" if left >= 1 else f", {duration(left)} left"
        error_console.print(line, highlight=False, markup=False, soft_wrap=True)


class NoProgress(Silent):
    """What ``--quiet`` shows: nothing."""

    def rows(self, done: int, total: int) -> None:
        """Say nothing."""


Shown = ProgressBars | ProgressLines | NoProgress


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Shown]:
    """Progress while the block runs: bars, plain lines where there is no terminal, nothing if ``quiet``.

    Warnings are shown above bars, one line each.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=error_console,
        transient=True,
    )
    shown: Shown = ProgressBars(bars) if error_console.is_terminal else ProgressLines()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        bars.console.print(f"[yellow]warning:[/] {message}", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]  # the module attribute is the documented hook
        try:
            yield NoProgress() if quiet else shown
        finally:
            if bars.live.is_started:
                bars.stop()


def quiet_libraries() -> None:
    """No progress bars and no chatter of transformers and accelerate between ours."""
    import transformers

    logging.getLogger("accelerate").setLevel(logging.ERROR)

    chatter: Any = transformers.utils.logging
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()


def print_json(values: Any) -> None:
    """One JSON object on standard output; numbers that JSON has no name for become null."""
    sys.stdout.write(json.dumps(_finite(values), indent=2, sort_keys=True) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def layer_table(layers: Sequence[LayerRecord]) -> Table:
    """The closing table of a run: one line per layer."""
    with_drift = any(layer.objective != layer.error for layer in layers)
    shared = _shared_prefix([layer.name for layer in layers])
    table = Table(
        title=f"layers {shared}*" if shared else None,
        caption="errors relative to the layer's output ‖W X‖²; objective: against the drift's target"
        if with_drift
        else "errors relative to the layer's output ‖W X‖²",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold", min_width=18)
    objective = ("objective",) if with_drift else ()
    for name in ("shape", "pattern", "pruned", "start", "result", *objective, "held-out", "swaps", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in layers:
        held_out = "–" if layer.held_out_error is None else f"{layer.held_out_error:.4f}"
        table.add_row(
            layer.name.removeprefix(shared) + (f" [yellow]{layer.fallback}[/]" if layer.fallback else ""),
            f"{layer.rows}×{layer.cols}",
            layer.pattern,
            f"{layer.sparsity:.4f}",
            f"{layer.error_start:.4f}",
            f"{layer.error:.4f}",
            *([f"{layer.objective:.4f}"] if with_drift else []),
            held_out,
            f"{layer.swaps}",
            f"{layer.seconds:.2f}",
        )
    return table


def consumer_table(consumers: Sequence[ConsumerRecord]) -> Table:
    """What became of the layers that lost inputs: one line for each."""
    shared = _shared_prefix([each.name for each in consumers])
    table = Table(
        title=f"units of layers {shared}*" if shared else None,
        caption="objective relative to the layer's output ‖W X‖², with its old weights and with the new ones",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold", min_width=18)
    for name in ("units", "stay", "start", "result", "swaps", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in consumers:
        table.add_row(
            each.name.removeprefix(shared),
            f"{each.units} {each.kind}",
            f"{each.kept}",
            f"{each.objective_start:.4f}",
            f"{each.objective:.4f}",
            f"{each.swaps}",
            f"{each.seconds:.2f}",
        )
    return table


def _shared_prefix(names: Sequence[str]) -> str:
    """The dotted words with which all names begin."""
    words = [name.split(".") for name in names]
    shared = list(itertools.takewhile(lambda each: len(set(each)) == 1, zip(*words, strict=False)))
    return "".join(f"{word[0]}." for word in shared) if len(names) > 1 else ""


def key_values(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns without borders."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
