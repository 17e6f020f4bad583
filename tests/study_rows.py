"""Hand-made rows of a study: every figure and table of the report has something to show.

The optimum of row r of problem p is 1 + p + r; every solver's error is a fixed factor above it, so
expected gaps can be read off: a factor f has the gap 1 - 1/f.
"""

import json
from dataclasses import replace

from sparseswaps.records.run import LayerRecord
from sparseswaps.records.study import (
    LayerBoundRecord,
    ModelLayer,
    ModelRecord,
    RowRecord,
    StudyRows,
    TraceRecord,
    UnitRecord,
)

MACHINE = json.dumps({"device": "cpu", "threads": 1, "python": "3.12.0"})
T = {limit: {"max_swaps": limit} for limit in (0, 2, "none")}
# label, method, start, options, group, factor of the even and odd rows, seconds per row, swaps
SOLVERS = [
    ("Wanda", "Wanda", "", {}, "score", (1.6, 1.25), 0.001, None),
    ("random", "random", "", {}, "score", (4.0, 2.5), 0.001, None),
    ("1-swap, from wanda", "1-swap", "wanda", {}, "local search", (1.0, 1.25), 0.01, 3),
    ("1-swap, from random", "1-swap", "random", {}, "local search", (1.25, 1.25), 0.02, 9),
    ("best swaps, max swaps 0", "best swaps", "wanda", T[0], "local search", (1.6, 1.25), 0.001, 0),
    ("best swaps, max swaps 2", "best swaps", "wanda", T[2], "local search", (1.1, 1.25), 0.02, 2),
    ("best swaps, max swaps none", "best swaps", "wanda", T["none"], "local search", (1.0, 1.25), 0.1, 4),
    ("blind, max swaps 0", "blind", "wanda", T[0], "local search", (1.6, 1.25), 0.001, 0),
    ("blind, max swaps none", "blind", "wanda", T["none"], "local search", (1.2, 1.25), 0.05, 5),
    ("branch and bound", "branch and bound", "", {}, "exact", (1.0, 1.0), 1.0, None),
    ("shared split", "shared split", "", {}, "bound", (1.6, 1.25), 0.1, None),
]  # fmt: skip
# how those describe themselves that a section looks for
DESCRIBED = {"1-swap": "OneSwap()", "best swaps": "OneSwap(search='best')", "blind": "AdditiveSwap()"}
# the widest problem is not proven: branch and bound stops there at 80 % of the optimum
WIDTHS = (16, 64, 128)
PATTERNS = ("50%", "2:4")


def bound_factor(label, cols):
    if label == "branch and bound":
        return 1.0 if cols < 128 else 0.8
    return 0.5 if label == "shared split" else 0.0


def layer_units(problems_per_size=2, rows_per_problem=2):
    units, rows, traces = [], [], []
    number = 0
    for cols in WIDTHS:
        for pattern in PATTERNS:
            for copy in range(problems_per_size):
                number += 1
                problem = f"p{number:04d}"
                for label, method, start, options, group, factors, seconds, swaps in SOLVERS:
                    unit = f"{problem}-{label}"
                    errors = []
                    for row in range(rows_per_problem):
                        optimum = 1.0 + number + row
                        error = optimum * factors[row % 2]
                        bound = optimum * bound_factor(label, cols)
                        errors.append((error, bound))
                        status = "finished" if cols < 128 else "time_limit"
                        rows.append(RowRecord(unit, row, error, bound, status, seconds * cols / 16, swaps))
                    objective, bound = map(sum, zip(*errors, strict=True))
                    if label in ("branch and bound", "1-swap, from wanda"):
                        traces += [
                            TraceRecord(unit, 0.0, 1.5 * objective, 0.0),
                            TraceRecord(unit, 0.5 * seconds, objective, 0.5 * bound),
                            TraceRecord(unit, seconds, objective, bound),
                        ]
                    units.append(
                        UnitRecord(
                            unit=unit, study="hand", source="model A", calibration="text", samples=64,
                            layer=f"layers.{copy}.q_proj", block=copy, kind="q_proj", rows=rows_per_problem,
                            cols=cols, pattern=pattern, sparsity=0.5, problem=problem, label=label,
                            method=method, start=start, options=json.dumps(options), group=group, seed=0,
                            solver=DESCRIBED.get(method, f"{method.replace(' ', '').capitalize()}()"),
                            budget=None, status="finished", failure="", objective=objective, bound=bound,
                            norm=100.0, held_out=None, held_out_norm=None,
                            seconds=rows_per_problem * seconds * cols / 16, peak_memory_mb=300.0,
                            machine=MACHINE,
                        )
                    )  # fmt: skip
    return units, rows, traces


def held_out_units():
    """Wanda and 1-swap calibrated on two texts of two sizes."""
    units, rows = [], []
    for text, penalty in (("text", 1.0), ("other", 1.5)):
        for samples in (4, 64):
            for label, method, start, _, group, factors, seconds, _ in (SOLVERS[0], SOLVERS[2]):
                unit = f"held-{text}-{samples}-{label}"
                rows.append(RowRecord(unit, 0, 2.0 * factors[0], 0.0, "finished", seconds, None))
                units.append(
                    UnitRecord(
                        unit=unit, study="hand", source="model A", calibration=text, samples=samples,
                        layer="layers.0.up_proj", block=0, kind="up_proj", rows=1, cols=64, pattern="50%",
                        sparsity=0.5, problem=f"h-{text}-{samples}", label=label, method=method, start=start,
                        options="{}", group=group, solver=method, seed=0, budget=None, status="finished",
                        failure="", objective=2.0 * factors[0], bound=0.0, norm=40.0,
                        held_out=2.0 * factors[0] * penalty * (1 + 4 / samples), held_out_norm=40.0,
                        seconds=seconds, peak_memory_mb=250.0, machine=MACHINE,
                    )
                )  # fmt: skip
    return units, rows


FAILED = UnitRecord(
    unit="z-failed", study="hand", source="model A", calibration="", samples=0, layer="", block=-1, kind="",
    rows=0, cols=0, pattern="50%", sparsity=0.0, problem="", label="branch and bound",
    method="branch and bound", start="", options="{}", solver="bnb", group="", seed=0, budget=None,
    status="memory_limit", failure="memory limit: expected at most 10 MB, found 20 MB", objective=None,
    bound=None, norm=None, held_out=None, held_out_norm=None, seconds=1.0, peak_memory_mb=20.0, machine="{}",
)  # fmt: skip

# label, method, start, options, mode, objective, samples, text, error, held-out error, perplexity, 1 - cosine
RUNS = [
    ("Wanda", "Wanda", "", {}, "sequential", "plain", 64, "text", 0.2, 0.22, 21.0, 0.2),
    ("1-swap", "1-swap", "wanda", {}, "sequential", "plain", 64, "text", 0.1, 0.15, 14.0, 0.1),
    ("1-swap", "1-swap", "wanda", {}, "sequential", "drift=0.5", 64, "text", 0.12, 0.16, 11.0, 0.09),
    ("1-swap", "1-swap", "wanda", {}, "one-shot", "plain", 64, "text", 0.11, 0.17, 15.0, 0.12),
    ("1-swap", "1-swap", "wanda", {}, "sequential", "plain", 4, "text", 0.08, 0.2, 18.0, 0.15),
    ("1-swap", "1-swap", "wanda", {}, "sequential", "plain", 64, "other", 0.09, 0.3, 30.0, 0.25),
    ("1-swap, from random", "1-swap", "random", {}, "sequential", "plain", 64, "text", 0.105, 0.155, 14.5,
     0.11),
    ("blind", "blind", "wanda", {}, "sequential", "plain", 64, "text", 0.13, 0.17, 16.0, 0.13),
    ("best, 1", "best", "", {"max_swaps": 1}, "sequential", "plain", 64, "text", 0.18, 0.2, 19.0, 0.18),
    ("best, none", "best", "", {"max_swaps": "none"}, "sequential", "plain", 64, "text", 0.1, 0.15, 14.0,
     0.1),
]  # fmt: skip


def settings(**options):
    """Settings of a run as a record keeps them."""
    standard = {"length": 256, "evaluation": "held", "seed": 0, "allocation": "uniform", "refine": 0}
    return json.dumps({**standard, **options}, sort_keys=True)


def with_options(record, changed=(), **options):
    """The record with other options; those in ``changed`` are told apart in words."""
    known = [*json.loads(record.changed), *changed]
    values = json.dumps({**json.loads(record.settings), **options}, sort_keys=True)
    return replace(record, settings=values, changed=json.dumps(known))


def model_runs():
    models, layers = [], []
    for model, causal in (("model A", True), ("model E", False)):
        for pattern, harder in (("50%", 1.0), ("60%", 2.0)):
            for number, run in enumerate(RUNS):
                label, method, start, options, mode, objective, samples, text, *figures = run
                error, held_out, ppl, loss = figures
                unit = f"{model}-{pattern}-{number}"
                models.append(
                    ModelRecord(
                        unit=unit, study="hand", label=label, method=method, start=start,
                        options=json.dumps(options), solver=DESCRIBED.get(method, method),
                        group="local search", seed=0, model=model, sparsity=0.5,
                        settings=settings(
                            pattern=pattern, solver=method + json.dumps(options), start=start, mode=mode,
                            objective=objective, calibration=text, samples=samples,
                        ),
                        changed="[]", calibration_hash="c0ffee" * 10, evaluation_windows=32,
                        status="finished", failure="", error_start=0.3, error=error * harder,
                        held_out_error=held_out * harder,
                        perplexity_dense=4.5 if causal else None, perplexity=ppl * harder if causal else None,
                        cosine=None if causal else 1 - loss * harder, seconds=10.0 + number,
                        seconds_layers=5.0, peak_memory_mb=700.0 + number, machine=MACHINE,
                    )
                )  # fmt: skip
                layers += [
                    ModelLayer(
                        unit,
                        LayerRecord(
                            name=f"layers.{block}.{kind}", block=block, kind=kind, rows=8, cols=16,
                            pattern="8:16", sparsity=0.5, tokens=100, dead_channels=0, output_norm=50.0,
                            error_start=0.3,
                            error=error * harder * (1 + block), objective_start=0.3, objective=error * harder,
                            held_out_error_start=None, held_out_error=None, swaps=3, certified_rows=8,
                            status="local_optimum", seconds=0.1,
                        ),
                    )
                    for block in range(2)
                    for kind in ("q_proj", "up_proj")
                ]  # fmt: skip
    return models, layers


def layer_bounds(layers):
    """Bounds at half of the objective in queries and at three quarters in the others, Wanda's not in time."""
    shares = {"q_proj": 0.5, "up_proj": 0.75}
    return tuple(
        LayerBoundRecord(
            layer.unit, layer.record.name, "shared-split", 50.0 * layer.record.objective,
            50.0 * layer.record.objective * shares[layer.record.kind],
            "time_limit" if layer.unit.endswith("-0") else "finished", 2.0,
        )
        for layer in layers
        if layer.unit.endswith(("50%-0", "50%-1", "60%-1"))
    )  # fmt: skip


def study_rows(problems_per_size=2, rows_per_problem=2):
    """All of the above."""
    units, rows, traces = layer_units(problems_per_size, rows_per_problem)
    more_units, more_rows = held_out_units()
    models, layers = model_runs()
    return StudyRows(
        ({"name": "hand", "title": "Hand-made study", "description": "Rows with known gaps.", "units": 1},),
        (*units, *more_units, FAILED),
        (*rows, *more_rows),
        tuple(traces),
        tuple(models),
        tuple(layers),
        layer_bounds(layers),
    )
