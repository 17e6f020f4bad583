"""Study files: what is to be compared, as TOML, checked before anything runs.

    name = "small"
    patterns = ["50%", "2:4"]
    seeds = [0, 1]
    seconds = [10.0]

    [limits]
    memory_mb = 4000

    [defaults]                       # keys of [[problem]] and [[model]] that hold unless they say otherwise
    length = 256

    [models.demo]                    # a model and the keys that go with it wherever it is named
    model = "demo"
    calibration = "stdlib"
    evaluation = "stdlib-held-out"

    [[problem]]
    family = "correlated"            # or files = [...], or model = "..." with calibration = "..."
    rows = 4
    cols = [32, 64]

    [[solver]]
    solver = "one-swap"
    label = "1-swap"
    start = ["wanda", "magnitude"]   # lists are swept
    options = { max_swaps = [1, 10] }

    [[model]]
    model = ["demo", "path/to/another"]
    samples = [16]                   # any option of ``PruneSettings`` and ``Machine``; lists are swept
    calibration = "text.txt"
    variants = [                     # the entry with these keys changed, once for each
      { bound = "shared-split", bound_seconds = 60 },  # certified gap of every layer; leave it out for none
      { refine = 1 },
    ]

    [[model]]                        # smaller models: units go, by the solvers of the study
    model = "demo"
    patterns = ["none"]
    units = ["channels=0.3", "channels=0.5"]
    unit_update = ["least-squares", "none"]
    speed = { prompt = 256, new = 16, rounds = 5 }   # of the saved model beside the dense one
    calibration = "text.txt"

A variant comes before its entry, the entry before ``[models.NAME]``, and this before ``[defaults]``. Every
key that does not exist, is missing or has another type is an error that names it.
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, SparseswapsError
from ..evaluation.beginning import AddBos
from ..evaluation.speed import Workload
from ..problems.pattern import PatternRule
from ..problems.synthetic import FAMILIES
from ..pruning.settings import NO_MASKS, Machine, PruneSettings
from ..solvers import Chain, Solver
from ..solvers.bounding import AUTO, tier_of
from ..solvers.registry import parse_solver
from ..solvers.units.registry import parse_unit_solver, unit_solvers
from .checked_table import REQUIRED, CheckedTable


@dataclass(frozen=True)
class SolverChoice:
    """One line of the comparison.

    Attributes:
        label: its name in tables; method: the name without what is varied.
        solvers: texts of the solvers that run one after another (see ``parse_solver``).
        start: text of the solver whose mask is the warm start, "" for none.
        options: what is varied, by name.
    """

    label: str
    method: str
    solvers: tuple[str, ...]
    start: str
    options: Mapping[str, Any]

    def build(self) -> Solver:
        """The solver object."""
        solvers = [parse_solver(text) for text in self.solvers]
        return solvers[0] if len(solvers) == 1 else Chain(*solvers)


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one kind.

    Attributes:
        kind: ``family``, ``files`` or ``model``.
        source: family, file patterns joined by a line break, or model; name: of it in tables.
        rows: rows of a synthetic layer, or sampled from each layer; 0 is all.
        cols: widths; for layers of files and models, of sub-blocks; empty is the whole width.
        calibration, samples, length, add_bos, held_out, include, exclude: of a model; each calibration and
            held-out text and each number of samples is tried.
        patterns, solvers: in place of the study's own; empty for all.
    """

    kind: str
    source: str
    name: str
    rows: int
    cols: tuple[int, ...]
    patterns: tuple[str, ...]
    solvers: tuple[str, ...]
    calibration: tuple[str, ...] = ("",)
    samples: tuple[int, ...] = (0,)
    length: int = 0
    add_bos: str = str(AddBos.AUTO)
    held_out: tuple[str, ...] = ("",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


# Options of a run that a study names elsewhere.
ELSEWHERE = ("pattern", "solver", "start", "seed")


@dataclass(frozen=True)
class ModelSet:
    """Whole models to prune and measure.

    Attributes:
        model: directory, hub name, ``demo``, or ``package:NAME/FOLDER`` inside an installed package;
            name: of it in tables.
        options: plain values of the options of ``PruneSettings`` by name, each of which is tried. Without an
            objective it is the paper's error, that comparisons start from.
        machine: options of ``Machine``; the CPU where nothing is said, and never part of a unit's id.
        patterns, solvers, seeds: in place of the study's own; empty for all.
        speed: of the saved model beside the dense one: fields of ``Workload`` by name; empty for none.
        bound: tier of the lower bound of every layer (see ``solvers.bound``), "" for none;
            bound_seconds: its time for each layer, 0 for no limit.
    """

    model: str
    name: str
    options: Mapping[str, tuple[Any, ...]]
    machine: Mapping[str, Any]
    patterns: tuple[str, ...]
    solvers: tuple[str, ...]
    seeds: tuple[int, ...]
    bound: str
    bound_seconds: float
    speed: Mapping[str, int]


@dataclass(frozen=True)
class Study:
    """A validated study.

    Attributes:
        name, title, description: what it is called and about.
        folder: where relative paths start.
        patterns, seeds, seconds: each combined with every problem and solver; None is no time budget.
        memory_mb: hard limit of a unit's resident memory, 0 for none.
        hard_seconds: hard limit of a unit's time, 0 for three budgets and a minute.
        problems, solvers, models: what is combined.
    """

    name: str
    title: str
    description: str
    folder: Path
    patterns: tuple[str, ...]
    seeds: tuple[int, ...]
    seconds: tuple[float | None, ...]
    memory_mb: float
    hard_seconds: float
    problems: tuple[ProblemSet, ...]
    solvers: tuple[SolverChoice, ...]
    models: tuple[ModelSet, ...]


def short_name(model: str) -> str:
    """What tables call a model or file that has no name of its own: the last telling part of its path."""
    parts = [part for part in model.split("/") if part not in ("", ".", "..", "model")]
    return parts[-1].removeprefix("package:") if parts else model


def load_study(path: str | os.PathLike[str]) -> Study:
    """Read a study file.

    Raises:
        InputError: if it is missing, no TOML, or has a key that is wrong, which the message names.
    """
    source = Path(path)
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"study file {source}: expected a readable file, found {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"study file {source}: expected TOML, found {error}") from error
    return parse_study(values, source.parent, f"study file {source}")


def parse_study(values: Mapping[str, Any], folder: Path | None = None, name: str = "study") -> Study:
    """A study from plain values, as a study file holds them.

    Args:
        values: see the module.
        folder: where relative paths start, the current directory by default.
        name: what messages call it.

    Raises:
        InputError: for a key that is wrong, which the message names.
    """
    table = CheckedTable(values, name, "")
    title = table.text("name")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", title):
        table.wrong("name", "lower-case letters, digits and dashes", title)
    patterns = table.texts("patterns", ["50%"])
    _check_patterns(table, "patterns", patterns)
    limits = table.table("limits")
    memory, hard = limits.number("memory_mb", 0.0), limits.number("seconds", 0.0)
    limits.finish()
    solvers = tuple(choice for entry in table.tables("solver") for choice in _solver_choices(entry))
    labels = [choice.label for choice in solvers]
    for label in labels:
        if labels.count(label) > 1:
            table.wrong("solver", "different labels", f"{label!r} twice")
    entries = _Entries(table.named_tables("models"), table.table("defaults"))
    study = Study(
        name=title,
        title=table.text("title", title),
        description=table.text("description", "").strip(),
        folder=folder or Path(),
        patterns=patterns,
        seeds=table.integers("seeds", [0]),
        seconds=table.numbers("seconds", []) or (None,),
        memory_mb=memory,
        hard_seconds=hard,
        problems=tuple(_problem_set(each, labels) for each in entries.plain(table.tables("problem"))),
        solvers=solvers,
        models=tuple(_model_set(each, labels) for each in entries.plain(table.tables("model"))),
    )
    if not solvers:
        table.wrong("solver", "at least one [[solver]]", "none")
    if not study.problems and not study.models:
        table.wrong("problem", "at least one [[problem]] or [[model]]", "none")
    entries.finish()
    table.finish()
    return study


def _solver_choices(table: CheckedTable) -> list[SolverChoice]:
    """An entry with its lists of options and starts multiplied out."""
    texts = table.texts("solver")
    starts = table.texts("start", [""])
    options = table.table("options")
    swept = {key: options.any_list(key) for key in options.values}
    if swept and len(texts) > 1:
        table.wrong("options", "none where several solvers run one after another", ", ".join(swept))
    method = table.text("label", " → ".join(texts))
    table.finish()
    varied = [key for key, values in swept.items() if len(values) > 1]
    choices = []
    for start, *values in itertools.product(starts, *swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        text = ",".join(f"{key}={_as_option(value)}" for key, value in chosen.items())
        solvers = texts if not text else (f"{texts[0]}{',' if ':' in texts[0] else ':'}{text}",)
        label = method + "".join(f", {key.replace('_', ' ')} {_as_option(chosen[key])}" for key in varied)
        if len(starts) > 1:
            label += f", from {start or 'its own start'}"
        choice = SolverChoice(label, method, solvers, start, chosen)
        for key, each in (("solver", choice.solvers), ("start", (start,) if start else ())):
            try:
                for one in each:
                    if key == "start" or one.partition(":")[0] not in unit_solvers():
                        parse_solver(one)
                    else:
                        parse_unit_solver(one)
            except (SparseswapsError, ValueError, TypeError) as error:
                table.wrong(key, "a solver", str(error))
        choices.append(choice)
    return choices


def _as_option(value: Any) -> str:
    return "none" if value is None else str(value)


class _Entries:
    """What ``[[problem]]`` and ``[[model]]`` have in common: models by name, defaults, lists, variants.

    Args:
        models: tables ``[models.NAME]``.
        defaults: table ``[defaults]``.
    """

    def __init__(self, models: Mapping[str, CheckedTable], defaults: CheckedTable) -> None:
        self._models = {
            name: table.over([], model=table.text("model"), name=table.text("name", name))
            for name, table in models.items()
        }
        self._named: set[str] = set()
        self._defaults = defaults

    def plain(self, entries: Iterable[CheckedTable]) -> Iterator[CheckedTable]:
        """Each entry as plain ones, to be read before the next: each model with each variant."""
        for entry in entries:
            _check_filled(entry, ["variants"])
            variants = entry.tables("variants") or [entry.over([])]
            sets = [each for variant in variants for each in self._of_sources(variant, entry)]
            for _, table in sorted(sets, key=lambda each: each[0]):
                yield table
            entry.finish()

    def _of_sources(self, variant: CheckedTable, entry: CheckedTable) -> list[tuple[int, CheckedTable]]:
        """A variant with all that holds for it, for every model or family in its list, numbered."""
        table = variant.over([entry, self._defaults])
        kind = next((key for key in ("model", "family") if key in table.values), None)
        if kind is None:
            return [(0, table)]
        _check_filled(table, [kind])
        sources = table.texts(kind)
        if len(sources) > 1 and "name" in table.values:
            table.wrong("name", f"one {kind} where it has a name", f"{len(sources)}")
        found = []
        for place, source in enumerate(sources):
            below, chosen = [entry, self._defaults], source
            if kind == "model" and source in self._models:
                self._named.add(source)
                below.insert(1, self._models[source])
                chosen = self._models[source].text("model")
            found.append((place, variant.over(below, **{kind: chosen})))
        return found

    def finish(self) -> None:
        """Refuse keys that no entry takes, and models that none names."""
        for name, table in self._models.items():
            if name not in self._named:
                table.wrong("model", f"an entry with model = {name!r}", "none")
            table.finish()
        self._defaults.finish()


def _problem_set(table: CheckedTable, labels: Sequence[str]) -> ProblemSet:
    kinds = [kind for kind in ("family", "files", "model") if kind in table.values]
    if len(kinds) != 1:
        table.wrong("family", "exactly one of family, files and model", " and ".join(kinds) or "none")
    kind = kinds[0]
    source = "\n".join(table.texts(kind))
    if kind == "family" and source not in FAMILIES:
        table.wrong("family", f"one of {', '.join(FAMILIES)}", repr(source))
    cols = table.integers("cols", REQUIRED if kind == "family" else [], least=2)
    rows = table.integer("rows", 8 if kind == "family" else 0, least=1 if kind == "family" else 0)
    patterns, solvers = _choices(table, labels)
    name = table.text("name", "")
    # files are called by their own names
    found = ProblemSet(
        kind, source, name or ("" if kind == "files" else short_name(source)), rows, cols, patterns, solvers
    )
    if kind == "model":
        _check_filled(table, ["calibration", "held_out", "samples"])
        found = replace(
            found,
            calibration=table.texts("calibration"),
            samples=table.integers("samples", [128], least=1),
            length=table.integer("length", 0, least=0),
            add_bos=_add_bos(table),
            held_out=table.texts("held_out", [""]),
            include=table.texts("include", []),
            exclude=table.texts("exclude", []),
        )
    table.finish()
    return found


def _add_bos(table: CheckedTable) -> str:
    try:
        return str(AddBos.read(table.text("add_bos", str(AddBos.AUTO))))
    except InputError as error:
        table.refuse("add_bos", error)


def _model_set(table: CheckedTable, labels: Sequence[str]) -> ModelSet:
    patterns, solvers = _choices(table, labels)
    seeds = table.integers("seeds", [])
    model = table.text("model")
    table.texts("calibration")
    table.texts("evaluation")
    values = {"objective": "plain", **table.values}
    found = ModelSet(
        model=model,
        name=table.text("name", short_name(model)),
        options={
            field.name: _tried(table, field, values)
            for field in fields(PruneSettings)
            if field.name not in ELSEWHERE
        },
        machine={
            field.name: _one_of(table, field, table.option(field.name))
            for field in fields(Machine)
            if "kind" in field.metadata and field.name in table.values
        },
        patterns=patterns,
        solvers=solvers,
        seeds=seeds,
        bound=table.text("bound", ""),
        bound_seconds=table.number("bound_seconds", 0.0),
        speed=_speed(table),
    )
    if found.bound not in ("", AUTO):
        try:
            tier_of(found.bound)
        except InputError as error:
            table.refuse("bound", error)
    if found.bound_seconds and "bound" not in table.values:
        table.wrong("bound_seconds", "bound, the tier that the time is for", "none")
    for name in ELSEWHERE:
        if name in table.values:
            table.wrong(name, f"{name}s of the study, or of [[solver]]", repr(table.values[name]))
    table.finish()
    return found


def _speed(table: CheckedTable) -> dict[str, int]:
    """What is measured of saved models; nothing unless a study asks for it."""
    if "speed" not in table.values:
        return {}
    given = table.table("speed")
    standard = Workload()
    found = {
        field.name: given.integer(field.name, getattr(standard, field.name), least=0)
        for field in fields(Workload)
    }
    given.finish()
    try:
        Workload(**found)
    except InputError as error:
        table.refuse("speed", error)
    return found


def _tried(table: CheckedTable, field: Field[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Plain values of one option that are tried, its default if the study does not name it."""
    table.option(field.name)
    if field.name not in values:
        return (field.metadata["kind"].write(field.default),)
    given = values[field.name]
    if field.metadata["kind"].sample is list:  # a list is one value, a list of lists several
        several = isinstance(given, list) and any(isinstance(each, list) for each in given)
    else:
        several = isinstance(given, list)
        _check_filled(table, [field.name])
    return tuple(_one_of(table, field, each) for each in (given if several else [given]))


def _check_filled(table: CheckedTable, keys: Sequence[str]) -> None:
    """Refuse lists without a value, of which nothing would be made."""
    for key in keys:
        if table.values.get(key) == []:
            table.wrong(key, "at least one value", "none")


def _one_of(table: CheckedTable, field: Field[Any], value: Any) -> Any:
    """``value`` as the option's plain value."""
    kind = field.metadata["kind"]
    try:
        return kind.write(kind.read(value))
    except (SparseswapsError, ValueError, TypeError) as error:
        table.refuse(field.name, error)


def _choices(table: CheckedTable, labels: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patterns and solver labels of one entry; a method's name stands for all its variants."""
    patterns = table.texts("patterns", [])
    _check_patterns(table, "patterns", patterns)
    solvers = table.texts("solvers", [])
    for label in solvers:
        if not any(label == known or known.startswith(label + ", ") for known in labels):
            table.wrong("solvers", f"labels of [[solver]]: {', '.join(labels)}", repr(label))
    return patterns, solvers


def _check_patterns(table: CheckedTable, key: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern == NO_MASKS:
            continue
        try:
            PatternRule.parse(pattern)
        except InputError as error:
            table.wrong(key, "sparsity patterns", str(error))
