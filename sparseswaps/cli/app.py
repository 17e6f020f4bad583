"""Commands, and how a failed one ends: one sentence on standard error and a non-zero exit code.

So does one that fails in a way that nobody has foreseen: its traceback is in a file that the sentence names.

A command's module, and with it torch and transformers, is imported when the command is called: ``--help``
and a mistyped command answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
import traceback
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from ..errors import InputError, SparseswapsError, found_of, is_full

# Module of each command, and the first sentence of its help.
COMMANDS = {
    "prune": ("prune", "Prune a model, layer by layer; measure, save and verify it."),
    "evaluate": (
        "prune",
        "Perplexity of a causal model, or cosine of an encoder's embeddings to a reference model's.",
    ),
    "apply": ("prune", "Put a mask file on a model and save the result."),
    "verify": (
        "prune",
        "Prove that every layer has the pattern and that kept weights equal the dense ones bit for bit.",
    ),
    "extract": (
        "inspect",
        "Write layers of a model as instance files: weights, Gram matrix of the dense model, pattern.",
    ),
    "solvers": (
        "inspect",
        "List the solvers: name, group, options, and what to install where something is missing.",
    ),
    "solve": ("solve", "Run a solver on an instance and show what it found, row by row."),
    "bound": (
        "solve",
        "Prove that no mask of an instance has a smaller error than the bound, and compare a solver's mask.",
    ),
    "study": (
        "study",
        "Run a study: problems × solvers × patterns × seeds. Stop it at any time; it resumes.",
    ),
    "report": (
        "study",
        "Write the report of a record: a page that needs no network, its Markdown twin, figures, CSV, LaTeX.",
    ),
    "merge": ("study", "Take the finished units of other records, for instance of other machines."),
    "export": (
        "study",
        "Write every table of a record as CSV, or as Parquet files, which are a record of their own.",
    ),
    "zero-shot": (
        "zero_shot",
        "Zero-shot accuracy on BoolQ, RTE, HellaSwag, WinoGrande, ARC and OpenBookQA, or on other tasks.",
    ),
    "bench": (
        "bench",
        "Tokens per second of a model, its memory and file size; beside another one, in turns.",
    ),
    "demo": (
        "demo",
        "Prune a small model with Wanda, 1-swap and others; compare them in a table and a report.",
    ),
}


class LazyGroup(TyperGroup):
    """Commands that are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the help shows of a command."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1], rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, with its own options."""
        name, command, rest = super().resolve_command(ctx, args)
        return (name, command if name is None else load(name), rest)


@functools.cache
def load(name: str) -> Any:
    """The command ``name``, imported."""
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    commands = typer.Typer(rich_markup_mode="rich", context_settings=SETTINGS)
    commands.callback()(lambda: None)
    module.register(commands)
    command: Any = get_group(commands).commands[name]
    command.context_settings = SETTINGS  # its own, as it remembers the help option of its first context
    return command


SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="sparseswaps",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


@app.callback()
def _sparseswaps() -> None:
    """Choose which weights of a model to keep, and prove how good the choice is."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    try:
        code = _run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("[bold]interrupted[/]")
        code = 130
    except BrokenPipeError:  # whoever read the output has stopped, and so has the command
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _run() -> int:
    """The exit code of the command; whatever is wrong has been said."""
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except SparseswapsError as error:
        _say(f"[bold red]error:[/] {_plain(error)}")
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        raise
    except Exception as error:
        _say(f"[bold red]error:[/] {_unexpected(error)}")
        return 1
    return 0


def _unexpected(error: Exception) -> str:
    """The sentence for what nobody has foreseen; the traceback goes to a file."""
    if is_full(error):
        place = getattr(error, "filename", None)
        return _plain(f"disk{f' of {place}' if place else ''}: expected room on it, found it full")
    what = _plain(f"{type(error).__name__}: {found_of(error)}"[:300])
    try:
        number, name = tempfile.mkstemp(prefix="sparseswaps-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8") as log:
            log.write(f"sparseswaps {' '.join(sys.argv[1:])}\n")
            traceback.print_exception(error, file=log)
    except OSError as failed:
        return f"something unexpected happened, {what} (its log cannot be written: {found_of(failed)})"
    return f"something unexpected happened, {what}; the traceback is in {name}"


def _say(text: str) -> None:
    from .output import error_console

    error_console.print(text, highlight=False, soft_wrap=True)


def _plain(error: Exception | str) -> str:
    """The message on one line, with square brackets kept from being read as markup."""
    return " ".join(str(error).split()).replace("[", r"\[")
