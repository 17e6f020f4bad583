"""The options of ``prune`` on the command line, made from the fields of the settings.

Every field of ``PruneSettings`` and ``Machine`` is a flag of its own name, and so is every part of the
objective: ``--drift 0.75`` is the part ``drift`` of ``--objective drift=0.75``. Former flags keep working,
with one line that says what they are called now.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import InputError, file_errors
from ..pruning.objective import SEARCH_DEFAULT, UNSTATED, Objective
from ..pruning.settings import NO_MASKS, Machine, PruneSettings
from .output import error_console

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Read weights in pickled files, which can run code when they are read."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Import Python files of the checkpoint.")
]


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be written into, before anything is computed.

    Raises:
        InputError: if it is a file, or cannot be made or written.
    """
    with file_errors(f"output {folder}"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output {folder}: expected a directory, found a file")
        parent = folder
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise InputError(f"output {folder}: expected a directory above it, found the file {parent}")
        with tempfile.TemporaryFile(dir=parent):  # the only test that holds for every kind of file system
            pass


def check_count(name: str, value: int | None, least: int = 1, most: int = 2**63 - 1) -> None:
    """Raise ``InputError`` for a number below ``least`` or above ``most``; None is none."""
    if value is not None and not least <= value <= most:
        expected = f"at least {least}" if value < least else f"at most {most}"
        raise InputError(f"{name}: expected {expected}, found {value}")


def check_seconds(name: str, value: float | None) -> None:
    """Raise ``InputError`` for seconds that are no number from 0 on; None is none."""
    if value is not None and not 0 <= value < math.inf:
        raise InputError(f"{name}: expected seconds of at least 0, found {value:g}")


# What each part of the objective does, and former flags of it.
PARTS = {
    "drift": (
        "Aim at the dense outputs with this strength, 0 to 1, or auto (sequential mode). Searches get "
        f"{SEARCH_DEFAULT.drift:g}, and residual drift {SEARCH_DEFAULT.residual:g}, if neither is given; "
        "--drift 0 alone is the paper's error."
    ),
    "residual": "Let layers that write into the residual stream repair its loss, 0 to 1 (sequential mode).",
    "metric": "Weigh errors by what they cost downstream (gradients).",
    "damping": "Of the output metric, a share of its mean diagonal.",
    "sweeps": "Over the rows that the output metric couples.",
    "shrinkage": "Move the Gram matrices towards their diagonals, 0 to 1; for little text.",
    "held_out": "Share of the calibration windows that tells when to stop a row, 0 to 0.5.",
}
FORMER_PARTS = {"residual": "--residual-drift", "metric": "--output-metric"}


@dataclass(frozen=True)
class Flag:
    """A former flag.

    Attributes:
        parameter: name of its parameter; option: what it stands for; value: what it gives, None for its own.
        text: the flag; now: what to write instead.
    """

    parameter: str
    option: str
    value: Any
    text: str
    now: str


def flag_of(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def _former_flags() -> list[Flag]:
    flags = []
    for field in fields(PruneSettings):
        for text, value in field.metadata.get("old", {}).items():
            now = flag_of(field.name) + ("" if value is None else f" {value}")
            flags.append(Flag("former_" + text.strip("-").replace("-", "_"), field.name, value, text, now))
    for part, text in FORMER_PARTS.items():
        flags.append(Flag("former_" + part, part, None, text, flag_of(part)))
    return flags


def _parameter(name: str, kind: Any, flag: str, help: str, **more: Any) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(flag, help=help, **more)]
    default = False if kind is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _field_parameter(field: Field[Any]) -> inspect.Parameter:
    sample = field.metadata["kind"].sample
    kind: Any = bool if sample is bool else list[str] | None if sample is list else sample | None
    shown = field.metadata["kind"].write(field.default)
    more = (
        {}
        if shown in (None, [], False)
        else {"show_default": " ".join(shown) if sample is list else str(shown)}
    )
    if "shown" in field.metadata:
        more = {"show_default": field.metadata["shown"]}
    if sample is str and field.metadata.get("content"):
        more["metavar"] = "FILE_OR_DATASET"
    return _parameter(field.name, kind, flag_of(field.name), field.metadata["help"], **more)


def option_parameters() -> list[inspect.Parameter]:
    """One keyword parameter for each option of settings, objective and machine, and each former flag."""
    parameters = [_field_parameter(field) for field in fields(PruneSettings)]
    for field in fields(Objective):
        kind: Any = bool if field.type == "bool" else str | None
        parameters.append(_parameter(field.name, kind, flag_of(field.name), PARTS.get(field.name, "")))
    parameters += [_field_parameter(field) for field in fields(Machine) if "kind" in field.metadata]
    known = {parameter.name: parameter for parameter in parameters}
    for flag in _former_flags():
        kind = (
            bool
            if flag.value is not None or flag.option == "metric"
            else _bare(known[flag.option].annotation)
        )
        parameters.append(_parameter(flag.parameter, kind, flag.text, f"Now {flag.now}.", hidden=True))
    return parameters


def _bare(annotation: Any) -> Any:
    return annotation.__origin__


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with ``**options`` spelled out as one parameter for each option, for typer to read."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    added = option_parameters()
    command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]  # what inspect reads
    command.__annotations__ |= {parameter.name: parameter.annotation for parameter in added}
    return command


def tell_of_former(flag: str, now: str) -> None:
    """One line for a flag that has another name now."""
    error_console.print(f"note: {flag} is called {now} now", highlight=False, soft_wrap=True)


def read_options(given: Mapping[str, Any], settings_file: Path | None) -> tuple[PruneSettings, Machine]:
    """Settings and machine from the values of ``option_parameters``, those not given None, False or empty.

    Args:
        given: by the names of the parameters.
        settings_file: TOML that ``PruneSettings.parse`` reads; options that are given replace those in it.

    Raises:
        InputError: for a value that cannot be used.
    """
    values = {name: value for name, value in given.items() if value is not None and value is not False}
    values = {name: value for name, value in values.items() if value not in ([], ())}
    for flag in _former_flags():
        if flag.parameter in values:
            value = values.pop(flag.parameter)
            values[flag.option] = value if flag.value is None else flag.value
            error_console.print(
                f"note: {flag.text} is called {flag.now} now", highlight=False, soft_wrap=True
            )
    known = {} if settings_file is None else _from_file(settings_file)
    settings = PruneSettings.from_plain(known, f"settings file {settings_file}")
    if "units" in values and "pattern" not in {**known, **values}:
        values["pattern"] = NO_MASKS
    parts = {field.name: values.pop(field.name) for field in fields(Objective) if field.name in values}
    machine = Machine(**{f.name: values.pop(f.name) for f in fields(Machine) if f.name in values})
    settings = replace(settings, **values)
    return replace(settings, objective=_with_parts(settings.objective, parts)), machine


def _with_parts(objective: Objective, parts: Mapping[str, Any]) -> Objective:
    """The objective with parts of it replaced; a drift that is stated states the residual drift too: none."""
    read: dict[str, Any] = {
        name: value if isinstance(value, bool) else Objective.read_part(name, value)
        for name, value in parts.items()
    }
    if "drift" in read and "residual" not in read and objective.residual == UNSTATED:
        read["residual"] = 0.0
    return replace(objective, **read)


def _from_file(path: Path) -> Mapping[str, Any]:
    """What a settings file says."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"settings file {path}: expected a readable file, found {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"settings file {path}: expected TOML, found {error}") from error
