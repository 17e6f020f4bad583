"""The settings of a run: what determines its result (``PruneSettings``), and what must not (``Machine``).

Every option is one field. Its value may be given as it is or as its text, the same text in Python, on the
command line and in study files; ``plain`` gives the texts back and ``str`` all of them as TOML, which
``parse`` reads. The command line's options, the record of a run, what ``resume`` compares, the columns that
a study sweeps, the key by which reports tell runs apart: all are made from the fields, so that a new option
is a field and its use.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from ..calibration.windows import Windows
from ..errors import InputError
from ..evaluation.beginning import AddBos
from ..models.loading import check_dtype
from ..models.sources import Trust
from ..problems.pattern import PatternRule
from ..problems.units import RIDGE
from ..ranks import Ranks
from ..solvers import Group, OneSwap, Solver, Wanda
from ..solvers.registry import parse_solver, solver_text
from ..solvers.units import DropAddSwap, UnitSolver
from ..solvers.units.registry import parse_unit_solver, unit_solver_text
from .objective import DEFAULT, Objective
from .unit_shares import MULTIPLE, UnitShares

Text = str | os.PathLike[str] | Windows


class Mode(StrEnum):
    """Which activations a layer is fitted to."""

    ONE_SHOT = "one-shot"
    SEQUENTIAL = "sequential"


class Allocation(StrEnum):
    """How the budget is spread over layers."""

    UNIFORM = "uniform"
    KNAPSACK = "knapsack"
    OWL = "owl"


class Unreached(StrEnum):
    """What becomes of layers that no calibration token reaches."""

    DENSE = "dense"
    MAGNITUDE = "magnitude"


class UnitUpdate(StrEnum):
    """What becomes of a consumer's kept columns when others have gone."""

    LEAST_SQUARES = "least-squares"
    BIAS = "bias"
    """They stay as they are, and a bias absorbs the mean of what is missing (FLAP)."""
    NONE = "none"


@dataclass(frozen=True)
class Kind:
    """How the values of an option are read and written.

    Attributes:
        read: from a plain value or a text; raises ``InputError`` or ``ValueError``.
        write: to a plain value: text, number, truth or list of texts.
        sample: type that the command line reads.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value
    sample: type = str


def option(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    """A field of the settings.

    Args:
        default: its value where nothing is said.
        help: one sentence, shown by the command line.
        kind: how it is read and written.
        **more: ``old`` has former flags of the command line that stand for it, by the value that they give,
            or None for the value behind them; ``content`` says that the text names a source whose content is
            compared on resume instead of the name; ``shown`` is what the help says of a default of None.
    """
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind, **more})


def _count(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool | float) or int(value) != float(value):
            raise InputError(f"expected a whole number, found {value!r}")
        if not least <= int(value) < 2**63:  # what fits into a tensor
            raise InputError(f"expected at least {least}, found {value}")
        return int(value)

    return read


def _perhaps(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None or value == "" else read(value)


def _solver(value: Any) -> Solver:
    return value if isinstance(value, Solver) else parse_solver(str(value))


def _choice(choices: type[StrEnum]) -> Callable[[Any], StrEnum]:
    def read(value: Any) -> StrEnum:
        if value not in set(choices):
            raise InputError(f"expected one of {', '.join(choices)}, found {value!r}")
        return choices(value)

    return read


def _texts(value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else tuple(value)
    for each in given:
        if not isinstance(each, str):
            raise InputError(f"expected texts, found {each!r}")
    return given


def _source(value: Any) -> Text:
    if not isinstance(value, str | os.PathLike | Windows):
        raise InputError(f"expected a file, a dataset or windows, found {value!r}")
    return value


def _source_name(value: Text | None) -> str | None:
    return value.source if isinstance(value, Windows) else None if value is None else os.fspath(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"expected true or false, found {value!r}")
    return value


# The pattern of a run that makes the model smaller and has no masks.
NO_MASKS = "none"
# Pruned where nothing is said.
HALF = PatternRule.parse("0.5")


def _pattern(value: Any) -> PatternRule | None:
    if value is None or value == NO_MASKS:
        return None
    return value if isinstance(value, PatternRule) else PatternRule.parse(str(value))


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise InputError(f"expected a number above 0, found {value!r}")
    return float(value)


PATTERN = Kind(_pattern, lambda value: NO_MASKS if value is None else str(value))
UNITS = Kind(
    _perhaps(lambda value: value if isinstance(value, UnitShares) else UnitShares.parse(str(value))),
    lambda value: None if value is None else str(value),
)
UNIT_SOLVER = Kind(
    lambda value: value if isinstance(value, UnitSolver) else parse_unit_solver(str(value)), unit_solver_text
)
SOLVER = Kind(_solver, solver_text)
UPDATE = Kind(_perhaps(_solver), lambda value: None if value is None else solver_text(value))
OBJECTIVE = Kind(lambda value: value if isinstance(value, Objective) else Objective.parse(str(value)), str)
SOURCE = Kind(_perhaps(_source), _source_name)
COUNT = Kind(_count(1), sample=int)
NUMBER = Kind(_count(0), sample=int)
PERHAPS_COUNT = Kind(_perhaps(_count(1)), sample=int)
PERHAPS_NUMBER = Kind(_perhaps(_count(0)), sample=int)
NAMES = Kind(_texts, list, sample=list)


class _Options:
    """What settings and machine share: texts become values, and what is wrong is named."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # its subclasses are dataclasses
            if "kind" not in field.metadata:
                continue
            try:
                value = field.metadata["kind"].read(getattr(self, field.name))
            except InputError as error:
                raise type(error)(f"{field.name}: {error}") from error
            except (TypeError, ValueError, OverflowError) as error:
                raise InputError(f"{field.name}: {error}") from error
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True)
class PruneSettings(_Options):
    """Everything that determines the result of a run, every option once.

    Values are given as they are or as texts: ``PruneSettings("2:4", solver="one-swap:max_swaps=10")``.

    Raises:
        InputError: for a value that cannot be used, naming the option.
    """

    pattern: PatternRule | None = option(
        None,
        "0.5 or 50% of each row, N:M such as 2:4, layer:0.5 of a whole layer, or none beside units.",
        PATTERN,
        shown="0.5; none with --units",
    )
    solver: Solver = option(
        OneSwap(), "Chooses the masks: NAME or NAME:option=value,...; see `solvers`.", SOLVER
    )
    start: Solver = option(Wanda(), "Its warm start: magnitude, wanda, ria, random.", SOLVER)
    calibration: Text = option(
        None,
        "What layers are fitted on: a text, .jsonl or .parquet (FILE:COLUMN), a folder of them, a token file "
        "(.npy), stdlib, a dataset, or inputs of the model (.safetensors, float .npy).",
        SOURCE,
        content=True,
    )
    evaluation: Text | None = option(
        None,
        "The same, for perplexity or cosine and held-out errors.",
        SOURCE,
        content=True,
        old={"--eval": None},
    )
    samples: int = option(128, "Calibration windows.", COUNT)
    length: int | None = option(
        None, "Tokens per window; 2048 by default, at most what the model allows.", PERHAPS_COUNT
    )
    seed: int = option(0, "Of the choice of windows.", NUMBER)
    evaluation_limit: int | None = option(
        None,
        "Use only so many windows of the evaluation text; all by default.",
        PERHAPS_COUNT,
        old={"--eval-windows": None},
    )
    add_bos: AddBos = option(
        AddBos.AUTO,
        "Windows begin with the beginning-of-text token: yes, no, or auto: if the loss is 0.5 lower so.",
        Kind(_choice(AddBos), str),
    )
    mode: Mode = option(
        Mode.SEQUENTIAL,
        "sequential: layers see the pruned part of the model; one-shot: the dense model alone.",
        Kind(_choice(Mode), str),
        old={"--one-shot": "one-shot"},
    )
    objective: Objective = option(
        DEFAULT,
        "What layers are fitted to: plain (the paper's error), default, or parts such as drift=0.75,metric.",
        OBJECTIVE,
    )
    allocation: Allocation = option(
        Allocation.UNIFORM,
        "Spread the sparsity over layers: uniform, knapsack or owl.",
        Kind(_choice(Allocation), str),
    )
    refine: int = option(0, "Passes of refinement against the model's own output (gradients).", NUMBER)
    update: Solver | None = option(
        None, "Then change the kept weights: reconstruction, admm (NAME:option=value).", UPDATE
    )
    units: UnitShares | None = option(
        None,
        "Make the model smaller: shares or numbers of whole units that go, such as channels=0.25,kv-groups=1 "
        "(channels, heads, kv-groups, experts). With a pattern its masks are those of the smaller model.",
        UNITS,
    )
    unit_solver: UnitSolver = option(
        DropAddSwap(),
        "Chooses the units: drop-add-swap, structured-obs, wanda-sp, flap, osscar, unit-magnitude, reap for "
        "experts (proven best by default), or any solver of masks.",
        UNIT_SOLVER,
    )
    unit_update: UnitUpdate = option(
        UnitUpdate.LEAST_SQUARES,
        "Of the weights that read the units that stay: least-squares, none, or a bias for the means of the "
        "others.",
        Kind(_choice(UnitUpdate), str),
    )
    unit_ridge: float = option(
        RIDGE,
        "Of the least squares towards the old weights, a share of the Gram matrix's mean diagonal.",
        Kind(_positive, sample=float),
    )
    multiple_of: int = option(MULTIPLE, "Channels that stay are a multiple of this many.", COUNT)
    include: tuple[str, ...] = option((), "Prune only layers that match, e.g. '*mlp*'; repeatable.", NAMES)
    exclude: tuple[str, ...] = option((), "Keep layers dense that match, beside routers; repeatable.", NAMES)
    prune_routers: bool = option(
        False, "Prune the routers of mixtures of experts too.", Kind(_truth, sample=bool)
    )
    unreached: Unreached = option(
        Unreached.DENSE,
        "Layers that no calibration token reaches: dense or magnitude.",
        Kind(_choice(Unreached), str),
    )
    min_expert_tokens: int | None = option(
        None, "Experts that fewer tokens reach get a fallback; the layer's width by default.", PERHAPS_NUMBER
    )

    def __post_init__(self) -> None:
        stated = self.pattern is not None
        super().__post_init__()
        if self.pattern is None and self.units is None:
            if stated:
                raise InputError("pattern: expected masks or units to prune, found none of both")
            object.__setattr__(self, "pattern", HALF)
        if self.update is not None and self.update.group is not Group.WEIGHT_UPDATE:
            raise InputError(f"update: expected a solver that changes kept weights, found {self.update!r}")
        if self.refine and self.solver.group is Group.WEIGHT_UPDATE:
            raise InputError(
                "refinement chooses among the dense weights: expected a solver of masks, found "
                f"{self.solver!r}"
            )

    @property
    def rule(self) -> PatternRule:
        """The pattern of a run that has masks."""
        if self.pattern is None:
            raise ValueError("pattern: expected one, found none: a run of units alone has no masks")
        return self.pattern

    def check_units(self) -> None:
        """Refuse options that say nothing in a run with these units, or without any.

        Raises:
            InputError: naming the option.
        """
        changed = set(self.changed())
        if self.units is None:
            for name in _OF_UNITS:
                if name in changed:
                    raise InputError(f"{name}: expected units, whose option it is, found none")
            return
        objective = self.objective
        if len(objective.strengths()) > 1:
            raise InputError("units: expected a strength of the drift that is stated, found auto")
        if self.unit_update is UnitUpdate.BIAS and (objective.drift > 0 or objective.residual > 0):
            raise InputError(f"unit_update bias: expected no drift beside it, found {objective}")
        if self.pattern is not None:
            return
        for name in _OF_MASKS:
            if name in changed:
                raise InputError(
                    f"{name}: expected a pattern beside the units, such as 0.5, as it is an option of masks, "
                    "found none"
                )
        if replace(objective, drift=0.0, residual=0.0) != Objective():
            raise InputError(
                f"objective: expected drift and residual drift alone, which units have, found {objective}; a "
                "pattern beside the units has the rest"
            )

    def plain(self) -> dict[str, Any]:
        """Every option as text, number, truth, list of texts or None, ready for JSON and ``from_plain``."""
        return {field.name: field.metadata["kind"].write(getattr(self, field.name)) for field in fields(self)}

    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        standard = PruneSettings().plain()
        return [name for name, value in self.plain().items() if value != standard[name]]

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], where: str = "settings") -> Self:
        """Settings from what ``plain`` gave, or from a part of it.

        Raises:
            InputError: for an unknown option or a value that cannot be used.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"{where}: expected options among {', '.join(known)}, found {name!r}")
        return cls(**values)

    def __str__(self) -> str:
        lines = [f"{name} = {_toml(value)}" for name, value in self.plain().items() if value is not None]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str, where: str = "settings") -> Self:
        """Settings from TOML, what ``str`` writes.

        Raises:
            InputError: if it is no TOML, or as ``from_plain``.
        """
        try:
            return cls.from_plain(tomllib.loads(text), where)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{where}: expected TOML, found {error}") from error

    def compared(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed: plain values, without names of texts."""
        named = [field.name for field in fields(self) if field.metadata.get("content")]
        return {name: value for name, value in self.plain().items() if name not in named}


# Options that are of units alone, and those of masks alone.
_OF_UNITS = ("unit_solver", "unit_update", "unit_ridge", "multiple_of")
_OF_MASKS = (
    "solver", "start", "allocation", "refine", "update", "prune_routers", "unreached", "min_expert_tokens",
)  # fmt: skip


def _toml(value: Any) -> str:
    """A plain value in TOML; strings and lists are written as in JSON, which TOML reads the same."""
    return json.dumps(value, ensure_ascii=False)


def _dtype(value: Any) -> str:
    check_dtype(str(value))
    return str(value)


def _gigabytes(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < 1e9:  # bytes that fit into 64 bits
        raise InputError(f"GB: expected at least 0 and below 1e9, found {value}")
    return float(value)


@dataclass(frozen=True)
class Machine(_Options):
    """Where a run computes and what it may use there, which must not change its masks.

    The kind of device and the dtype, whose rounding decides ties, are recorded and compared on resume.

    Raises:
        InputError: for a value that cannot be used, naming the option.
    """

    device: str = option("auto", "auto, cpu or cuda.", Kind(str))
    dtype: str = option("auto", "auto, float32, bfloat16 or float16: of the computation.", Kind(_dtype))
    offload: bool = option(
        False,
        "Weights stay in the checkpoint's files, one block at a time in memory.",
        Kind(_truth, sample=bool),
    )
    activation_limit: float | None = option(
        None,
        "GB of activations in main memory; the rest goes to files.",
        Kind(_perhaps(_gigabytes), sample=float),
    )
    allow_pickle: bool = option(
        False,
        "Read weights in pickled files, which can run code when they are read.",
        Kind(_truth, sample=bool),
    )
    trust_remote_code: bool = option(
        False, "Import Python files of the checkpoint.", Kind(_truth, sample=bool)
    )
    ranks: Ranks = Ranks()

    @property
    def trust(self) -> Trust:
        """What of the checkpoint may run code."""
        return Trust(self.allow_pickle, self.trust_remote_code)


def split_options(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by name, parted into those of ``PruneSettings`` and those of ``Machine``.

    Raises:
        InputError: for a name that neither has.
    """
    ours, machines = ([field.name for field in fields(kind)] for kind in (PruneSettings, Machine))
    for name in values:
        if name not in ours and name not in machines:
            raise InputError(f"options: expected names among {', '.join(ours + machines)}, found {name!r}")
    return (
        {name: value for name, value in values.items() if name in ours},
        {name: value for name, value in values.items() if name in machines},
    )
