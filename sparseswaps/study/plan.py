"""From a study to its work units: every problem with every solver, pattern, seed and budget."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models.contents import file_hash
from ..pruning.pipeline import with_stated_drifts
from ..pruning.settings import NO_MASKS, Mode, PruneSettings
from ..records.study import PlannedUnit
from ..solvers.units.registry import unit_solvers
from .problems import TEXTS, contents_of, layers_of, resolve_files
from .schema import ModelSet, ProblemSet, SolverChoice, Study

# A unit that says nothing about time is expected to take this long, in seconds.
GUESS_LAYER, GUESS_MODEL = 5.0, 60.0
# A unit is killed after this many budgets and this many seconds more, unless the study says otherwise.
BUDGETS, STARTUP = 3.0, 60.0
# Without a budget and a limit a unit may take this long.
NO_LIMIT = 24 * 3600.0


@dataclass(frozen=True)
class CostEstimate:
    """What is ahead.

    Attributes:
        units: work units that are not finished.
        seconds: expected, on ``jobs`` processes: means of finished units of the same solver where
            there are some, else budgets.
        most: if every unit takes as long as it may; None where one has no limit of its own.
        measured: units whose expectation comes from finished ones.
    """

    units: int
    seconds: float
    most: float | None
    measured: int


def unit_id(study: str, spec: Mapping[str, Any]) -> str:
    """Stable id of a unit: a hash of the study's name and everything that determines the result."""
    text = json.dumps([study, spec], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_units(study: Study) -> list[PlannedUnit]:
    """All work units of ``study`` in the order in which they run.

    Layers of models are looked up, so the models must be there; nothing is computed.

    Raises:
        InputError: if a model, a file or a layer does not exist.
    """
    units: dict[str, PlannedUnit] = {}
    for problems in study.problems:
        for spec in _layer_specs(study, problems):
            _add(units, study, spec)
    for models in study.models:
        for spec in _model_specs(study, models):
            _add(units, study, spec)
    if not units:
        raise InputError(f"study {study.name}: expected at least one work unit, found none")
    return list(units.values())


def _add(units: dict[str, PlannedUnit], study: Study, spec: dict[str, Any]) -> None:
    # limits, machines and what things are called do not determine the result
    identity = unit_id(study.name, {key: value for key, value in spec.items() if key != "machine"})
    full = {**spec, "folder": str(study.folder), "memory_mb": study.memory_mb}
    limit = study.hard_seconds or (
        BUDGETS * spec["seconds"] + STARTUP if spec.get("seconds") is not None else NO_LIMIT
    )
    units[identity] = PlannedUnit(identity, study.name, spec["solver"]["label"], full, limit)


def _solver_spec(choice: SolverChoice) -> dict[str, Any]:
    return {
        "label": choice.label,
        "method": choice.method,
        "solvers": list(choice.solvers),
        "start": choice.start,
        "options": dict(choice.options),
    }


def _chosen(study: Study, labels: Iterable[str]) -> list[SolverChoice]:
    wanted = tuple(labels)
    if not wanted:
        return list(study.solvers)
    return [
        choice
        for choice in study.solvers
        if any(choice.label == label or choice.label.startswith(label + ", ") for label in wanted)
    ]


def _layer_specs(study: Study, problems: ProblemSet) -> Iterable[dict[str, Any]]:
    solvers = _chosen(study, problems.solvers)
    patterns = problems.patterns or study.patterns
    if NO_MASKS in patterns:
        raise InputError(f"study {study.name}: expected patterns of its problems, found {NO_MASKS}")
    if unit := next((each.label for each in solvers if _of_units(each)), None):
        raise InputError(
            f"study {study.name}: expected solvers of masks for its problems, found {unit}, which chooses "
            "units"
        )
    for seed, problem in itertools.product(study.seeds, _problem_specs(study, problems)):
        for pattern, seconds, choice in itertools.product(patterns, study.seconds, solvers):
            yield {
                "kind": "layer",
                "problem": problem,
                "pattern": pattern,
                "seed": seed,
                "seconds": seconds,
                "solver": _solver_spec(choice),
            }


def _problem_specs(study: Study, problems: ProblemSet) -> list[dict[str, Any]]:
    base = {"kind": problems.kind, "name": problems.name, "rows": problems.rows}
    if problems.kind == "family":
        return [{**base, "source": problems.source, "cols": cols} for cols in problems.cols]
    widths = problems.cols or (0,)
    if problems.kind == "files":
        files = resolve_files(problems.source.split("\n"), study.folder)
        return [
            {
                **base,
                "name": problems.name or Path(file).stem,
                "source": file,
                "contents": {file: file_hash(study.folder / file)},
                "cols": cols,
            }
            for file in files
            for cols in widths
        ]
    specs = []
    layers = layers_of(problems.source, study.folder, problems.include, problems.exclude)
    for texts in itertools.product(problems.calibration, problems.held_out):
        contents = contents_of(problems.source, texts, study.folder)
        for samples, layer, cols in itertools.product(problems.samples, layers, widths):
            if cols > layer.cols:
                continue
            specs.append(
                {
                    **base,
                    "source": problems.source,
                    "contents": contents,
                    "calibration": texts[0],
                    "held_out": texts[1],
                    "samples": samples,
                    "length": problems.length,
                    "add_bos": problems.add_bos,
                    "layer": layer.name,
                    "cols": 0 if cols == layer.cols else cols,
                }
            )
    return list({json.dumps(spec, sort_keys=True): spec for spec in specs}.values())


def _model_specs(study: Study, models: ModelSet) -> Iterable[dict[str, Any]]:
    patterns = models.patterns or study.patterns
    choices = _chosen(study, models.solvers)
    known: dict[tuple[str, ...], dict[str, str | None]] = {}
    combinations = itertools.product(models.seeds or study.seeds, patterns, *models.options.values(), choices)
    for seed, pattern, *tried, choice in combinations:
        settings = {
            "pattern": pattern,
            "seed": seed,
            **dict(zip(models.options, tried, strict=True)),
            **_chosen_by(study, pattern, choice),
        }
        run = with_stated_drifts(PruneSettings.from_plain(settings))
        if run.mode is Mode.ONE_SHOT and run.objective.needs_dense_stream:
            continue
        bound: dict[str, Any] = {}
        if models.bound:
            bound = {"bound": models.bound, "bound_seconds": models.bound_seconds}
        speed = {"speed": dict(models.speed)} if models.speed else {}
        texts = tuple(settings.get(name) or "" for name in TEXTS)
        if texts not in known:
            known[texts] = contents_of(models.model, texts, study.folder)
        yield {
            "kind": "model",
            "model": models.model,
            "contents": known[texts],
            "name": models.name,
            "settings": settings,
            "machine": dict(models.machine),
            "solver": _solver_spec(choice),
            **bound,
            **speed,
        }


def _of_units(choice: SolverChoice) -> bool:
    """Whether a solver chooses units and no masks."""
    return any(text.partition(":")[0] in unit_solvers() for text in choice.solvers)


def _chosen_by(study: Study, pattern: str, choice: SolverChoice) -> dict[str, str]:
    """Options of a run that say who chooses: masks, or units where there are no masks."""
    text = "+".join(choice.solvers)
    if pattern == NO_MASKS:
        if choice.start:
            raise InputError(
                f"study {study.name}, solver {choice.label}: expected no start where it chooses units, found "
                f"{choice.start}"
            )
        return {"unit_solver": text}
    if _of_units(choice):
        raise InputError(
            f"study {study.name}, solver {choice.label}: expected the pattern {NO_MASKS} where it chooses "
            f"units, found {pattern}"
        )
    return {"solver": text, **({"start": choice.start} if choice.start else {})}


def estimate_cost(
    units: Iterable[PlannedUnit], mean_seconds: Mapping[str, float], jobs: int = 1
) -> CostEstimate:
    """Expected and largest time of ``units`` on ``jobs`` processes.

    Args:
        units: not finished.
        mean_seconds: of finished units by label.
        jobs: processes.
    """
    units = list(units)
    count, seconds, most, measured = 0, 0.0, 0.0, 0
    for unit in units:
        count += 1
        most += unit.limit
        if unit.label in mean_seconds:
            measured += 1
            seconds += mean_seconds[unit.label]
        elif unit.spec.get("seconds") is not None:
            seconds += unit.spec["seconds"]
        else:
            seconds += GUESS_MODEL if unit.spec["kind"] == "model" else GUESS_LAYER
    limited = all(unit.limit != NO_LIMIT for unit in units)
    return CostEstimate(count, seconds / jobs, most / jobs if limited else None, measured)


def plan_summary(units: Iterable[PlannedUnit]) -> list[tuple[str, str, int]]:
    """Units by source and solver label: (source, label, units), in order of first appearance."""
    counts = Counter(
        (str((unit.spec if unit.spec["kind"] == "model" else unit.spec["problem"])["name"]), unit.label)
        for unit in units
    )
    return [(source, label, count) for (source, label), count in counts.items()]
