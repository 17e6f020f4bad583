"""What a study leaves behind: plain frozen rows (standard library only).

A study is a plan of work units; each unit is one solver on one layer problem, or one whole model
pruned and measured. ``study.database`` stores these rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidFileError
from .run import LayerRecord


@dataclass(frozen=True)
class UnitRecord:
    """One solver on one layer problem.

    Attributes:
        unit: stable id, a hash of everything that determines the result.
        study: name of the study.
        source: model, file or synthetic family that the problem comes from.
        calibration: text of the Gram matrix, "" where there is none; samples: its windows.
        layer: name; block: index of its block, -1 for none; kind: type inside the block.
        rows, cols: shape of the problem; pattern: as asked for; sparsity: pruned share.
        problem: id of the problem: units with the same one can be compared row by row.
        label: name of the solver in tables; method: the same without what is varied; start: its warm
            start; options: JSON of what is varied; solver: full description; group: kind of method.
        seed: of everything random in it; budget: seconds given to the solver.
        status: why it stopped, or ``error``, ``crashed``, ``time_limit``, ``memory_limit`` if it failed;
        failure: reason, "" if it did not fail.
        objective, bound: summed over rows; norm: ``‖W X‖_F²``; None if it failed.
        held_out, held_out_norm: objective and norm on held-out text, None without any.
        seconds: of the solver's run; peak_memory_mb: largest resident set of its process.
        machine: JSON of device and versions.
    """

    unit: str
    study: str
    source: str
    calibration: str
    samples: int
    layer: str
    block: int
    kind: str
    rows: int
    cols: int
    pattern: str
    sparsity: float
    problem: str
    label: str
    method: str
    start: str
    options: str
    solver: str
    group: str
    seed: int
    budget: float | None
    status: str
    failure: str
    objective: float | None
    bound: float | None
    norm: float | None
    held_out: float | None
    held_out_norm: float | None
    seconds: float
    peak_memory_mb: float
    machine: str


@dataclass(frozen=True)
class RowRecord:
    """One matrix row of a unit.

    Attributes:
        unit: id of the unit; row: index in the layer.
        objective, bound: error of the row and its proven lower bound.
        status: why the solver stopped there.
        seconds: time spent on the row; the unit's share where the solver does not say.
        swaps: swaps made, None where the solver does not say.
    """

    unit: str
    row: int
    objective: float
    bound: float
    status: str
    seconds: float
    swaps: int | None


@dataclass(frozen=True)
class TraceRecord:
    """Objective and bound of a unit's layer after some seconds."""

    unit: str
    seconds: float
    objective: float
    bound: float


@dataclass(frozen=True)
class ModelRecord:
    """One whole model, pruned and measured (see ``pruning.PruneReport``).

    Attributes:
        unit, study, label, method, start, options, solver, group, seed: as in ``UnitRecord``.
        model: name.
        settings: JSON of everything that determines the result, by the names of ``PruneSettings``, texts
            without their folders; ``option`` reads one.
        changed: JSON list of the options that were not at their defaults.
        sparsity: achieved.
        calibration_hash: of the calibration windows; evaluation_windows: how many the evaluation had.
        status, failure: as in ``UnitRecord``; the figures are None if it failed.
        error_start, error, held_out_error: mean relative layer errors.
        perplexity_dense, perplexity, cosine: measures of the model.
        seconds: whole run; seconds_layers: searches alone; peak_memory_mb: of the process.
        machine: JSON of device and versions.
    """

    unit: str
    study: str
    label: str
    method: str
    start: str
    options: str
    solver: str
    group: str
    seed: int
    model: str
    settings: str
    changed: str
    sparsity: float | None
    calibration_hash: str
    evaluation_windows: int
    status: str
    failure: str
    error_start: float | None
    error: float | None
    held_out_error: float | None
    perplexity_dense: float | None
    perplexity: float | None
    cosine: float | None
    seconds: float
    seconds_layers: float | None
    peak_memory_mb: float
    machine: str

    def option(self, name: str) -> Any:
        """The option ``name`` of the run's settings, None where it was not set."""
        return _values(self.settings).get(name)

    def apart(self, *names: str) -> tuple[tuple[str, str], ...]:
        """Every option but ``names`` and the seed: what tells runs apart, of which means are taken."""
        values = _values(self.settings)
        return tuple(
            (name, json.dumps(values[name])) for name in sorted(values) if name not in (*names, "seed")
        )

    @property
    def pattern(self) -> str:
        """Of the masks as asked for; behind the units, where some went, or these alone."""
        parts = [self.option("units"), self.option("pattern")]
        return " ".join(str(part) for part in parts if part not in (None, "none"))

    @property
    def mode(self) -> str:
        """``sequential`` or ``one-shot``."""
        return str(self.option("mode"))

    @property
    def objective(self) -> str:
        """Text of what layers were fitted to."""
        return str(self.option("objective"))

    @property
    def calibration(self) -> str:
        """Name of the calibration text."""
        return str(self.option("calibration") or "")

    @property
    def samples(self) -> int:
        """Calibration windows."""
        return int(self.option("samples") or 0)

    @property
    def length(self) -> int:
        """Tokens per window."""
        return int(self.option("length") or 0)

    @property
    def evaluation(self) -> str:
        """Name of the evaluation text."""
        return str(self.option("evaluation") or "")

    @property
    def setting(self) -> tuple[object, ...]:
        """What a comparison of methods holds fixed: model, pattern and texts."""
        return (self.model, *(json.dumps(self.option(name)) for name in HELD_FIXED))

    @property
    def fitted(self) -> str:
        """How layers were fitted, for people: ``sequential, drift 0.75, metric, refined twice``."""
        return ", ".join([self.mode, *self.extras])

    @property
    def extras(self) -> list[str]:
        """What was done beyond the paper's error in every layer at one sparsity."""
        changed = json.loads(self.changed)
        parts = [] if self.objective == "plain" else [objective_name(self.objective)]
        for name in changed:
            if name not in (*HELD_FIXED, *NAMED):
                words = _WORDS.get(name, name.replace("_", " "))
                value = self.option(name)
                shown = " ".join(map(str, value)) if isinstance(value, list) else value
                parts.append(f"{words} {shown}")
        return parts


# Options that a comparison of methods holds fixed, and those that tables name in columns of their own.
HELD_FIXED = (
    "pattern", "units", "multiple_of", "calibration", "samples", "length", "evaluation", "evaluation_limit",
    "add_bos",
)  # fmt: skip
NAMED = ("solver", "unit_solver", "start", "seed", "mode", "objective")
_WORDS = {"refine": "refinement", "update": "then"}


@functools.cache
def _values(settings: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(settings)
    return found


def objective_name(objective: str) -> str:
    """The text of an objective (``drift=0.75,metric``) for people: ``drift 0.75, metric``."""
    return objective.replace("=", " ").replace(",", ", ")


@dataclass(frozen=True)
class ModelLayer:
    """One layer of a whole-model run."""

    unit: str
    record: LayerRecord


@dataclass(frozen=True)
class LayerBoundRecord:
    """Proven lower bound of one layer of a whole-model run, beside what its solver reached there.

    Attributes:
        unit: id of the unit; layer: name; tier: which bound (see ``solvers.bound``).
        objective, bound: summed over rows, on the inputs that the layer received in this run.
        status: why the bound stopped; seconds: its wall-clock time.
    """

    unit: str
    layer: str
    tier: str
    objective: float
    bound: float
    status: str
    seconds: float


@dataclass(frozen=True)
class SizeRecord:
    """How large and how fast a smaller model is, beside the dense one.

    Attributes:
        unit: id of the unit.
        parameters_dense, parameters: numbers in their weights; megabytes_dense, megabytes: what is saved of
            them, in 10⁶ bytes.
        prefill, decode: how many times as many tokens per second the smaller model has, of a prompt and
            behind it; prefill_low, prefill_high, decode_low, decode_high: the ends of their 95 % intervals;
            None where it was not measured.
        workload: JSON of what was measured, on what device; "" for nothing.
    """

    unit: str
    parameters_dense: int
    parameters: int
    megabytes_dense: float
    megabytes: float
    prefill: float | None = None
    prefill_low: float | None = None
    prefill_high: float | None = None
    decode: float | None = None
    decode_low: float | None = None
    decode_high: float | None = None
    workload: str = ""


@dataclass(frozen=True)
class UnitResult:
    """Everything that one unit found, written in one transaction."""

    layer: UnitRecord | None = None
    model: ModelRecord | None = None
    rows: tuple[RowRecord, ...] = ()
    trace: tuple[TraceRecord, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    bounds: tuple[LayerBoundRecord, ...] = ()
    sizes: tuple[SizeRecord, ...] = ()

    @property
    def record(self) -> UnitRecord | ModelRecord:
        """The unit's own row."""
        found = self.layer or self.model
        if found is None:
            raise ValueError("a unit's result: expected the row of a layer or of a model, found neither")
        return found


@dataclass(frozen=True)
class PlannedUnit:
    """A unit before it runs.

    Attributes:
        unit: stable id; study: name of the study; label: of its solver.
        spec: everything needed to run it, plain values.
        limit: seconds after which it is killed.
    """

    unit: str
    study: str
    label: str
    spec: Mapping[str, Any]
    limit: float


@dataclass(frozen=True)
class StudyRows:
    """All results of a database, in an order that does not depend on when they were written."""

    studies: tuple[Mapping[str, Any], ...]
    units: tuple[UnitRecord, ...]
    rows: tuple[RowRecord, ...]
    traces: tuple[TraceRecord, ...]
    models: tuple[ModelRecord, ...]
    layers: tuple[ModelLayer, ...]
    bounds: tuple[LayerBoundRecord, ...] = ()
    sizes: tuple[SizeRecord, ...] = ()


# Columns of units and models that hold JSON, and what it is; empty in those that failed.
_JSON_COLUMNS = {"options": dict, "machine": dict, "settings": dict, "changed": list}


def check_rows(rows: StudyRows, where: str) -> StudyRows:
    """``rows`` of the file ``where`` if everything that reports read from their texts can be read.

    Raises:
        InvalidFileError: naming the column.
    """
    for study in rows.studies:
        units = study.get("units", 0)
        if not isinstance(study.get("name"), str) or isinstance(units, bool) or not isinstance(units, int):
            raise InvalidFileError(
                f"{where}: expected facts with a name and a number of units, found "
                f"{json.dumps(study, ensure_ascii=False)[:60]}"
            )
    everything: list[UnitRecord | ModelRecord] = [*rows.units, *rows.models]
    for record in everything:
        for column, kind in _JSON_COLUMNS.items():
            text = getattr(record, column, "")
            if isinstance(text, str) and text and not isinstance(_value(text), kind):
                raise InvalidFileError(
                    f"{where}, unit {record.unit}: expected JSON of a {kind.__name__} in column {column}, "
                    f"found {text[:60]!r}"
                )
    return rows


@functools.cache
def _value(text: str) -> Any:
    """The value of a JSON text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
