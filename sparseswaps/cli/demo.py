"""``demo``: the main job on the bundled model, offline, ending in a report with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Quiet, check_output
from .output import console, progress_bars, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the report.")] = Path("demo-report"),
    quiet: Quiet = False,
) -> None:
    """Prune the bundled model with magnitude, Wanda, 1-swap, and 1-swap with drift; compare them.

    Needs neither network nor GPU: the model is in the package, the text is Python's own standard
    library, of which some modules are held out for evaluation.
    """
    from ..demo import run_demo

    check_output(out)
    quiet_libraries()
    with progress_bars(quiet) as bars:
        table, page = run_demo(out, bars)
    console.print(table)
    console.print(f"report: {page.resolve()}", soft_wrap=True)
