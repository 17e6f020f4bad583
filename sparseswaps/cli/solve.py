"""``solve`` and ``bound``: a solver, or a lower bound, on an instance file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from ..errors import InputError
from ..models.loading import resolve_device
from ..problems import LayerProblem, load_instance
from ..solvers import Budget, Solution
from ..solvers import bound as lower_bound
from ..solvers import solve as run_solver
from ..solvers.bounding import AUTO, TIERS, tier_of
from ..solvers.registry import parse_solver
from .options import Quiet, check_seconds
from .output import console, key_values, print_json, progress_bars

SHOWN_ROWS = 64


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(solve)
    app.command()(bound)


def solve(
    instance: Annotated[Path, typer.Argument(help="Instance file, from the command extract.")],
    solver: Annotated[str, typer.Option(help="NAME or NAME:option=value,...")] = "one-swap",
    start: Annotated[str | None, typer.Option(help="Solver whose mask is the warm start.")] = None,
    rows: Annotated[str | None, typer.Option(help="Only these rows, FIRST:END.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds per row for solvers that work row by row, else in all.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds for everything.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Run a solver on an instance and show what it found, row by row.

    [bold]Examples[/]

    sparseswaps solve instance.safetensors --solver one-swap

    sparseswaps solve instance.safetensors --solver branch-and-bound --rows 0:64 --time-limit 10

    sparseswaps solve instance.safetensors --solver ria:alpha=1 --json
    """
    target, chosen = resolve_device(device), parse_solver(solver)
    begun_by = None if start is None else parse_solver(start)
    check_seconds("time limit", time_limit)
    check_seconds("budget", budget)
    if time_limit is not None and any(x.name == "time_limit" for x in dataclasses.fields(chosen)):  # type: ignore[arg-type]  # all are dataclasses
        chosen = dataclasses.replace(chosen, time_limit=time_limit)  # type: ignore[type-var]  # likewise
    elif time_limit is not None:
        budget = time_limit if budget is None else min(budget, time_limit)
    problem = slice_problem(load_instance(instance), rows).to(target)
    with progress_bars(quiet) as bars:
        init = None if begun_by is None else run_solver(problem, begun_by)
        solution = run_solver(problem, chosen, init, Budget(budget, bars.rows))
    if json:
        print_json(solution_values(problem, solution))
    else:
        print_solution(problem, solution)


def bound(
    instance: Annotated[Path, typer.Argument(help="Instance file, from the command extract.")],
    tier: Annotated[
        str, typer.Option(help=f"auto, or {', '.join(TIERS)}; with options as in `shared-split:steps=60`.")
    ] = "auto",
    solver: Annotated[str, typer.Option(help="Its mask is compared with the bound.")] = "one-swap",
    rows: Annotated[str | None, typer.Option(help="Only these rows, FIRST:END.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for the bound; it holds whenever it stops.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Prove that no mask of an instance has a smaller error than the bound, and compare a solver's mask.

    [bold]Examples[/]

    sparseswaps bound instance.safetensors

    sparseswaps bound instance.safetensors --tier dnn --rows 0:16 --solver tabu
    """
    target, chosen = resolve_device(device), parse_solver(solver)
    check_seconds("budget", budget)
    if tier != AUTO:
        tier_of(tier)
    problem = slice_problem(load_instance(instance), rows).to(target)
    with progress_bars(quiet) as bars:
        found = run_solver(problem, chosen)
        proven = lower_bound(problem, tier, Budget(budget, bars.rows), init=found)
    solution = dataclasses.replace(
        found,
        solver=f"{found.solver} against {proven.tier}",
        row_bounds=torch.minimum(proven.row_bounds.to(found.row_bounds), found.row_objectives),
        status=proven.status,
        row_statuses=(proven.status,) * problem.rows,
        stats={},
        seconds=proven.seconds,
    )
    if json:
        print_json(solution_values(problem, solution))
    else:
        print_solution(problem, solution)


def slice_problem(problem: LayerProblem, rows: str | None) -> LayerProblem:
    """The problem of rows ``FIRST:END``, all of them for None.

    Raises:
        InputError: if the text is no such range or leaves no row.
    """
    if rows is None:
        return problem
    first, colon, end = rows.partition(":")
    try:
        chosen = slice(int(first or 0), int(end) if end else None)
    except ValueError:
        chosen = slice(0, 0)
    if not colon or len(range(problem.rows)[chosen]) == 0:
        raise InputError(
            f"rows of {problem.name}: expected FIRST:END within 0:{problem.rows}, found {rows!r}"
        )
    return problem.slice_rows(chosen)


def solution_values(problem: LayerProblem, solution: Solution) -> dict[str, object]:
    """A solution as plain values."""
    return {
        "instance": problem.name,
        "solver": solution.solver,
        "status": str(solution.status),
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "rows": [
            {
                "row": row,
                "objective": float(solution.row_objectives[row]),
                "bound": float(solution.row_bounds[row]),
                "gap": float(solution.row_gaps[row]),
                "status": str(solution.row_statuses[row]),
                **{name: float(values[row]) for name, values in solution.stats.items()},
            }
            for row in range(problem.rows)
        ],
    }


def print_solution(problem: LayerProblem, solution: Solution) -> None:
    """A table of rows and a summary."""
    table = Table(title=problem.name)
    for name in ("row", "objective", "bound", "gap", *solution.stats, "status"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in range(min(problem.rows, SHOWN_ROWS)):
        table.add_row(
            str(row),
            f"{float(solution.row_objectives[row]):.6g}",
            f"{float(solution.row_bounds[row]):.6g}",
            f"{float(solution.row_gaps[row]):.3%}",
            *(f"{float(values[row]):g}" for values in solution.stats.values()),
            str(solution.row_statuses[row]),
        )
    console.print(table)
    if problem.rows > SHOWN_ROWS:
        console.print(f"{problem.rows - SHOWN_ROWS} more rows: --rows or --json shows them")
    proven = int((solution.row_gaps <= 1e-6).sum())
    console.print(
        key_values(
            [
                ("solver", solution.solver),
                ("status", str(solution.status)),
                ("error", f"{solution.objective:.8g}, relative {_relative(problem, solution):.6f}"),
                (
                    "bound",
                    f"{solution.bound:.8g}, gap {solution.gap:.3%}",
                ),
                ("proven optimal", f"{proven} of {problem.rows} rows (gap at most 1e-6)"),
                ("seconds", f"{solution.seconds:.3f}"),
            ]
        )
    )


def _relative(problem: LayerProblem, solution: Solution) -> float:
    norm = float(torch.sum(problem.output_norms()))
    return solution.objective / norm if norm > 0 else 0.0
