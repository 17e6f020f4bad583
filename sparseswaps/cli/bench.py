"""``bench``: how fast a model is and how much room it takes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import InputError, file_errors
from ..evaluation.speed import Ratio, SpeedReport, Workload
from ..evaluation.speed import bench as run_bench
from ..evaluation.whole_files import write_atomically
from ..models.sources import Trust
from ..pruning.card import CARD_FILE, with_speed
from .options import AllowPickle, Quiet, TrustRemoteCode
from .output import console, print_json, progress_bars, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(bench)


def bench(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a Hugging Face model.")],
    against: Annotated[
        str | None, typer.Option(help="Another model, such as the dense one, measured in turns with it.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens that are decoded behind it.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each model is measured.")] = 7,
    threads: Annotated[int, typer.Option(help="Of the processor; 0 for as many as torch takes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write what was measured into the model's card (README.md).")
    ] = False,
    quiet: Quiet = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")
    ] = False,
) -> None:
    """Tokens per second of a model, its memory and file size; beside another one, in turns.

    [bold]Examples[/]

    sparseswaps bench smaller --against path/to/dense

    sparseswaps bench smaller --against path/to/dense --card

    sparseswaps bench smaller --prompt 2048 --new 128 --batch 8 --device cuda --json
    """
    quiet_libraries()
    readme = Path(model) / CARD_FILE
    if card and not readme.is_file():
        raise InputError(f"bench --card: expected a model card {readme}, found none")
    with progress_bars(quiet) as bars:
        report = run_bench(
            model,
            against,
            Workload(prompt, new, batch, rounds, threads),
            device=device,
            dtype=dtype,
            trust=Trust(allow_pickle, trust_remote_code),
            stage=bars.stage,
        )
    if card:
        with file_errors(f"model card {readme}"):
            mode = readme.stat().st_mode
            write_atomically(readme, with_speed(readme.read_text(encoding="utf-8"), report))
            readme.chmod(mode)
    if json:
        print_json(report.to_json())
        return
    console.print(_table(report))


def _table(report: SpeedReport) -> Table:
    work = report.workload
    threads = f", {report.threads} threads" if report.device == "cpu" else ""
    caption = (
        f"{report.device}{threads}, {report.dtype.removeprefix('torch.')}; {work.batch} x {work.prompt} "
        f"tokens and {work.new} behind them; medians of {work.rounds} rounds in turns, ratios with 95 % "
        "intervals"
    )
    table = Table(caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    on_device = any(speed.device_mb is not None for speed in report.speeds)
    names = ["prefill, tokens/s", "decode, tokens/s", "weights, MB", "files, MB", "parameters"]
    for name in names + (["device, MB"] if on_device else []):
        table.add_column(name, justify="right")
    for speed in report.speeds:
        cells = [
            _median(speed.prefill),
            _median(speed.decode),
            f"{speed.weights_mb:.1f}",
            "–" if speed.files_mb is None else f"{speed.files_mb:.1f}",
            f"{speed.parameters:,}",
        ]
        if on_device:
            cells.append("–" if speed.device_mb is None else f"{speed.device_mb:.0f}")
        table.add_row(speed.model, *cells)
    if len(report.speeds) == 2:
        one, other = report.speeds
        table.add_section()
        table.add_row(
            "ratio",
            _ratio(report.prefill_ratio),
            _ratio(report.decode_ratio),
            f"{one.weights_mb / other.weights_mb:.3f}",
            f"{one.files_mb / other.files_mb:.3f}" if one.files_mb and other.files_mb else "–",
            f"{one.parameters / other.parameters:.3f}",
        )
    return table


def _median(rates: tuple[float, ...]) -> str:
    return f"{statistics.median(rates):.1f}" if rates else "–"


def _ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
