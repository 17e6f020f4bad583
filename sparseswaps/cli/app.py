"""Commands, and how a failed one ends: one sentence on standard error and a non-zero exit code."""

from __future__ import annotations

import sys

import typer

from ..errors import InputError, SparseswapsError
from . import demo, inspect, prune, solve, study, zero_shot
from .output import error_console

app = typer.Typer(
    name="sparseswaps",
    help="Choose which weights of a model to keep, and prove how good the choice is.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prune.register(app)
inspect.register(app)
solve.register(app)
study.register(app)
zero_shot.register(app)
demo.register(app)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        error_console.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SparseswapsError as error:
        error_console.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        error_console.print("[bold]interrupted[/]")
        sys.exit(130)


def _plain(error: Exception) -> str:
    """The message with square brackets kept from being read as markup."""
    return str(error).replace("[", r"\[")
