"""One work unit, from its specification to its rows. Runs in a process of its own (``study.child``)."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from ..evaluation.speed import SpeedReport, Workload, bench
from ..machine import peak_memory_mb, versions
from ..problems import LayerProblem
from ..pruning.report import PruneReport
from ..pruning.run import prune
from ..pruning.settings import Machine, PruneSettings
from ..records.run import LayerRecord
from ..records.study import (
    LayerBoundRecord,
    ModelRecord,
    RowRecord,
    SizeRecord,
    TraceRecord,
    UnitRecord,
    UnitResult,
)
from ..solvers import Budget, Group, Outcome, Solution, Solver, solve
from ..solvers.registry import parse_solver
from .layer_bounds import BoundedLayers
from .problems import TEXTS, BuiltProblem, build_problem, require_contents, resolve_model, resolve_text
from .schema import SolverChoice

Blank = TypeVar("Blank", UnitRecord, ModelRecord)
# What solvers of units are, beside the groups of those of masks.
UNITS_GROUP = "units"
# Points of a trace that are kept: enough for a curve, whatever the solver records.
TRACE_POINTS = 64


def execute(unit: str, study: str, spec: Mapping[str, Any], cache: Path) -> UnitResult:
    """Run a unit.

    Args:
        unit: its id.
        study: name of its study.
        spec: from the plan.
        cache: folder of extracted instance files.

    Raises:
        Exception: whatever the solver raises; the caller records it.
    """
    _reset_peak_memory()
    if spec["kind"] == "model":
        return _execute_model(unit, study, spec)
    return _execute_layer(unit, study, spec, cache)


def failed(
    unit: str,
    study: str,
    spec: Mapping[str, Any],
    status: str,
    failure: str,
    seconds: float,
    memory_mb: float,
) -> UnitResult:
    """The row of a unit that has no result: what was asked for, and why there is none."""
    solver = spec["solver"]
    names: dict[str, Any] = {
        "unit": unit,
        "study": study,
        "label": solver["label"],
        "method": solver["method"],
        "start": solver["start"],
        "options": json.dumps(solver["options"], sort_keys=True),
        "solver": " → ".join(solver["solvers"]),
        "group": "",
        "status": status,
        "failure": failure,
        "seconds": seconds,
        "peak_memory_mb": memory_mb,
        "machine": "{}",
    }
    if spec["kind"] == "model":
        settings = PruneSettings.from_plain(spec["settings"])
        names |= {
            "model": spec["name"],
            "seed": settings.seed,
            "settings": json.dumps(_stored_settings(settings.plain()), sort_keys=True),
            "changed": json.dumps(settings.changed()),
        }
        return UnitResult(model=_blank(ModelRecord, names))
    problem = spec["problem"]
    names |= {
        "seed": spec["seed"],
        "pattern": spec["pattern"],
        "source": problem["name"],
        "calibration": _text_name(problem.get("calibration", "")),
        "samples": problem.get("samples", 0),
        "layer": problem.get("layer", ""),
        "rows": problem["rows"],
        "cols": problem["cols"],
        "budget": spec["seconds"],
    }
    return UnitResult(layer=_blank(UnitRecord, names))


_BLANKS: Mapping[str, Any] = {"str": "", "int": 0, "float": 0.0}


def _blank(kind: type[Blank], known: Mapping[str, Any]) -> Blank:
    """A record with the fields that are known; the others are empty."""
    rest = {field.name: _BLANKS.get(str(field.type)) for field in fields(kind)}
    return kind(**{**rest, **known})


def _execute_layer(unit: str, study: str, spec: Mapping[str, Any], cache: Path) -> UnitResult:
    folder = Path(spec["folder"])
    built = build_problem(spec["problem"], spec["pattern"], spec["seed"], folder, cache)
    problem = built.problem
    choice = SolverChoice(**spec["solver"])
    solver = choice.build()
    init = solve(problem, _on_whole_layer(parse_solver(choice.start), built)) if choice.start else None
    solution = solve(problem, _on_whole_layer(solver, built), init, Budget(spec["seconds"]))
    held_out = built.held_out
    record = UnitRecord(
        unit=unit,
        study=study,
        source=built.source,
        calibration=_text_name(spec["problem"].get("calibration", "")),
        samples=spec["problem"].get("samples", 0),
        layer=built.layer,
        block=built.block,
        kind=built.kind,
        rows=problem.rows,
        cols=problem.cols,
        pattern=spec["pattern"],
        sparsity=problem.pattern.sparsity,
        problem=built.identity,
        label=choice.label,
        method=choice.method,
        start=choice.start,
        options=json.dumps(dict(choice.options), sort_keys=True),
        solver=solution.solver,
        group=str(solver.group),
        seed=spec["seed"],
        budget=spec["seconds"],
        status=str(solution.status),
        failure="",
        objective=solution.objective,
        bound=solution.bound,
        norm=float(problem.output_norms().sum()),
        held_out=None if held_out is None else held_out.objective(solution.mask),
        held_out_norm=None if held_out is None else float(held_out.output_norms().sum()),
        seconds=solution.seconds,
        peak_memory_mb=peak_memory_mb(),
        machine=_machine("cpu"),
    )
    return UnitResult(layer=record, rows=_rows(unit, built, solution), trace=_trace(unit, solution))


@final
@dataclass(frozen=True, eq=False, repr=False)
class _WholeLayer(Solver):
    """A score on all rows of a layer, of which a sample is taken: RIA's looks at whole columns."""

    name: ClassVar[str] = "whole-layer"
    group: ClassVar[Group] = Group.SCORE

    score: Solver
    built: BuiltProblem

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Score the whole layer."""
        outcome = self.score.run(self.built.whole, None, budget)
        rows = torch.tensor(self.built.row_indices)
        return Outcome(None if outcome.mask is None else outcome.mask[rows], outcome.status)

    def __repr__(self) -> str:
        return repr(self.score)


def _on_whole_layer(solver: Solver, built: BuiltProblem) -> Solver:
    return _WholeLayer(solver, built) if solver.group is Group.SCORE else solver


def _rows(unit: str, built: BuiltProblem, solution: Solution) -> tuple[RowRecord, ...]:
    problem: LayerProblem = built.problem
    seconds = solution.stats.get("seconds")
    swaps = solution.stats.get("swaps")
    share = solution.seconds / problem.rows
    return tuple(
        RowRecord(
            unit,
            built.row_indices[row],
            float(solution.row_objectives[row]),
            float(solution.row_bounds[row]),
            str(solution.row_statuses[row]),
            share if seconds is None else float(seconds[row]),
            None if swaps is None else int(swaps[row]),
        )
        for row in range(problem.rows)
    )


def _trace(unit: str, solution: Solution) -> tuple[TraceRecord, ...]:
    points = solution.trace
    if len(points) > TRACE_POINTS:
        chosen = np.unique(np.linspace(0, len(points) - 1, TRACE_POINTS).round().astype(int))
        points = tuple(points[index] for index in chosen)
    by_time = {
        point.seconds: TraceRecord(unit, point.seconds, point.objective, point.bound) for point in points
    }
    return tuple(by_time.values())


def _execute_model(unit: str, study: str, spec: Mapping[str, Any]) -> UnitResult:
    folder = Path(spec["folder"])
    choice = SolverChoice(**spec["solver"])
    watch = BoundedLayers(unit, spec["bound"], spec["bound_seconds"] or None) if spec.get("bound") else None
    require_contents(spec["contents"], spec["model"], folder)
    named = {name: spec["settings"][name] for name in TEXTS}
    given = {name: resolve_text(text, folder) for name, text in named.items() if text}
    begin = time.perf_counter()
    model, machine = resolve_model(spec["model"], folder), Machine(**{"device": "cpu", **spec["machine"]})
    with tempfile.TemporaryDirectory(prefix="sparseswaps-") as saved:
        out = Path(saved) / "smaller" if spec.get("speed") else None
        report = prune(
            model,
            PruneSettings.from_plain({**spec["settings"], **given}),
            machine=machine,
            on_layer=watch,
            out=out,
        )
        bounds = () if watch is None else tuple(watch.found)
        seconds = time.perf_counter() - begin - sum(found.seconds for found in bounds)
        speed = None
        if out is not None:
            work = Workload(**spec["speed"])
            speed = bench(out, model, work, device=machine.device, dtype=machine.dtype, trust=machine.trust)
    record = _model_record(unit, study, spec, choice, report, seconds)
    sizes = (_size_record(unit, report, speed),) if report.smaller or speed is not None else ()
    return UnitResult(model=record, layers=report.layers, bounds=bounds, sizes=sizes)


def _size_record(unit: str, report: PruneReport, speed: SpeedReport | None) -> SizeRecord:
    """Size of a model, and its speed where that was measured."""
    found: dict[str, Any] = {}
    if speed is not None:
        for name, ratio in (("prefill", speed.prefill_ratio), ("decode", speed.decode_ratio)):
            if ratio is not None:
                found |= {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
        facts = {"device": speed.device, "dtype": speed.dtype, "threads": speed.threads}
        found["workload"] = json.dumps({**asdict(speed.workload), **facts}, sort_keys=True)
    return SizeRecord(
        unit, report.parameters_dense, report.parameters, report.megabytes_dense, report.megabytes, **found
    )


def _stored_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings as records keep them."""
    return {**plain, **{name: _text_name(plain.get(name) or "") for name in TEXTS}}


def _model_record(
    unit: str, study: str, spec: Mapping[str, Any], choice: SolverChoice, report: PruneReport, seconds: float
) -> ModelRecord:
    settings = report.settings
    return ModelRecord(
        unit=unit,
        study=study,
        label=choice.label,
        method=choice.method,
        start=choice.start,
        options=json.dumps(dict(choice.options), sort_keys=True),
        solver=repr(settings.unit_solver if settings.pattern is None else settings.solver),
        group=_group(settings),
        seed=settings.seed,
        model=spec["name"],
        settings=json.dumps(_stored_settings(settings.plain()), sort_keys=True),
        changed=json.dumps(settings.changed()),
        sparsity=report.sparsity,
        calibration_hash=report.calibration_hash,
        evaluation_windows=report.evaluation_windows,
        status="finished",
        failure="",
        error_start=report.error_start,
        error=report.error,
        held_out_error=report.held_out_error,
        perplexity_dense=report.perplexity_dense,
        perplexity=report.perplexity_pruned,
        cosine=report.cosine,
        seconds=seconds,
        seconds_layers=report.seconds_layers,
        peak_memory_mb=peak_memory_mb(),
        machine=_machine("cpu" if report.peak_device_memory_mb is None else report.device),
    )


def _group(settings: PruneSettings) -> str:
    """Kind of the method that had the last word."""
    if settings.pattern is None:
        return UNITS_GROUP
    return str(settings.solver.group if settings.update is None else settings.update.group)


def _text_name(text: str) -> str:
    """A text without its folders, so that records do not depend on where things lie."""
    file, colon, column = text.partition(":")
    return Path(file).stem + colon + column if text else ""


def _machine(device: str) -> str:
    facts = {"device": device, "threads": torch.get_num_threads(), **versions()}
    return json.dumps(facts, sort_keys=True)


def _reset_peak_memory() -> None:
    """Give freed memory back and start the high-water mark of the resident set again, where the system can.

    What an earlier unit freed stays with the allocator of this process, and would count as this unit's.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none
        if trim is not None:
            trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def to_json(result: UnitResult) -> str:
    """A result as one line of JSON."""
    return json.dumps(asdict(result))


def from_json(text: str) -> UnitResult:
    """The result that ``to_json`` wrote."""
    values = json.loads(text)
    return UnitResult(
        None if values["layer"] is None else UnitRecord(**values["layer"]),
        None if values["model"] is None else ModelRecord(**values["model"]),
        tuple(RowRecord(**row) for row in values["rows"]),
        tuple(TraceRecord(**point) for point in values["trace"]),
        tuple(LayerRecord(**layer) for layer in values["layers"]),
        tuple(LayerBoundRecord(**found) for found in values["bounds"]),
        tuple(SizeRecord(**found) for found in values["sizes"]),
    )
