"""``solve``: a solver on an instance file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from ..errors import InputError
from ..problems import LayerProblem, load_instance
from ..solvers import Budget, Solution
from ..solvers import solve as run_solver
from ..solvers.registry import parse_solver
from .output import console, key_values, print_json, progress_bars

SHOWN_ROWS = 64


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(solve)


def solve(
    instance: Annotated[Path, typer.Argument(help="Instance file, from the command extract.")],
    solver: Annotated[str, typer.Option(help="NAME or NAME:option=value,...")] = "one-swap",
    start: Annotated[str | None, typer.Option(help="Solver whose mask is the warm start.")] = None,
    rows: Annotated[str | None, typer.Option(help="Only these rows, FIRST:END.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for everything.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Run a solver on an instance and show what it found, row by row.

    [bold]Examples[/]

    sparseswaps solve instance.safetensors --solver one-swap

    sparseswaps solve instance.safetensors --solver ria:alpha=1 --rows 0:64
    """
    problem = slice_problem(load_instance(instance), rows).to(device)
    with progress_bars() as bars:
        init = None if start is None else run_solver(problem, parse_solver(start))
        solution = run_solver(problem, parse_solver(solver), init, Budget(time_limit, bars.rows))
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
