"""Run a method that knows one row on every row of a layer, in this process or over several."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..problems.layer import LayerProblem
from ..problems.row_program import BoolArray, RowProgram, row_program
from .base import Budget, Group, Outcome, Solver, Status, TracePoint, relative_gap
from .scores import warm_start


@dataclass(frozen=True, eq=False)
class RowResult:
    """What a method claims about one row.

    Attributes:
        pruned: best selection, True where pruned (cols,).
        bound: proven lower bound of the row's error, at its original scale.
        status: why it stopped.
        stats: counters, such as ``nodes``.
    """

    pruned: BoolArray
    bound: float
    status: Status
    stats: Mapping[str, float] = field(default_factory=dict)


# Program at its original scale, start (True = pruned) and deadline on time.monotonic() to result.
SolveRow = Callable[[RowProgram, BoolArray, float], RowResult]


def check_jobs(jobs: int) -> None:
    """Raise ``InputError`` unless ``jobs`` counts processes."""
    if jobs < 1:
        raise InputError(f"jobs counts processes: expected at least 1, found {jobs}")


@dataclass(frozen=True)
class RowSolver(Solver):
    """An exact solver of one row at a time. Concrete solvers are final frozen dataclasses.

    Args:
        time_limit: seconds per row, None for no limit.
        node_limit: nodes per row, None for no limit.
        gap_limit: relative gap at which a row counts as finished. Proofs that tolerances or rounding leave
            above it end as ``precision_limit``.
        jobs: processes that share the rows.
    """

    group: ClassVar[Group] = Group.EXACT

    time_limit: float | None = None
    node_limit: int | None = None
    gap_limit: float = 1e-6
    jobs: int = 1

    def __post_init__(self) -> None:
        time_limit, node_limit, gap_limit = self.time_limit, self.node_limit, self.gap_limit
        if time_limit is not None and not time_limit >= 0:
            raise InputError(
                f"time_limit is seconds per row: expected at least 0 or None, found {time_limit}"
            )
        if node_limit is not None and node_limit < 1:
            raise InputError(
                f"node_limit counts nodes per row: expected at least 1 or None, found {node_limit}"
            )
        if not 0 <= gap_limit < 1:
            raise InputError(f"gap_limit is a relative gap: expected 0 ≤ gap_limit < 1, found {gap_limit}")
        check_jobs(self.jobs)

    @abstractmethod
    def solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        """Solve one program at its original scale from the allowed selection ``start`` (n,).

        ``deadline`` on ``time.monotonic()`` is that of the row, its time limit included.
        """

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Solve row by row."""
        return solve_rows(problem, init, budget, self._limited, self.jobs, self.gap_limit)

    def _limited(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        for point in (start, program.cheapest(program.quadratic.diagonal() + 2 * program.linear)):
            if program.objective(point) <= 0:  # nothing costs less than nothing, so nobody need be asked
                return RowResult(point, 0.0, Status.FINISHED, {"nodes": 0.0})
        if self.time_limit is not None:
            deadline = min(deadline, time.monotonic() + self.time_limit)
        return self.solve_row(program, start, deadline)


def solve_rows(
    problem: LayerProblem,
    init: Tensor | None,
    budget: Budget,
    solve_row: SolveRow,
    jobs: int = 1,
    gap_limit: float | None = None,
) -> Outcome:
    """Solve every row of ``problem`` from ``init`` or Wanda's mask.

    Rows that the budget cuts off before they start keep the warm start and the bound 0. A keyboard
    interrupt ends the call with what is there, as status ``interrupted``.

    Args:
        problem: the layer.
        init: warm start (rows, cols) or None.
        budget: its seconds are shared by all rows.
        solve_row: the method; must be picklable if ``jobs`` is above 1.
        jobs: processes; with 1 the rows run in this one.
        gap_limit: of an exact method, whose rows have finished where the computed gap is no larger.
    """
    check_jobs(jobs)
    deadline = budget.deadline()
    began = time.monotonic()
    home = problem.device
    start = warm_start(problem, init).cpu()
    # single rows are solved on the CPU: the Gram matrix goes there once, not for every row
    problem = problem.to("cpu")
    pruned = (~start).numpy()
    mask = start.clone()
    objectives = problem.row_objectives(start)
    bounds = torch.zeros(problem.rows, dtype=torch.float64)
    statuses = [Status.TIME_LIMIT] * problem.rows
    stats: dict[str, Tensor] = {}
    trace = [TracePoint(0.0, float(objectives.sum()))]
    tasks = ((row, row_program(problem, row), pruned[row]) for row in range(problem.rows))
    done = 0
    try:
        for row, result in _results(tasks, solve_row, deadline, jobs):
            chosen = torch.from_numpy(~result.pruned)
            mask[row] = chosen
            objectives[row] = _one_row(problem, row, chosen)
            bounds[row] = min(max(result.bound, 0.0), float(objectives[row]))
            statuses[row] = result.status
            if gap_limit is not None and result.status is Status.FINISHED:
                found = relative_gap(objectives[row], bounds[row])
                statuses[row] = Status.FINISHED if float(found) <= gap_limit else Status.PRECISION_LIMIT
            for name, value in result.stats.items():
                stats.setdefault(name, torch.zeros(problem.rows, dtype=torch.float64))[row] = value
            done += 1
            elapsed = time.monotonic() - began
            trace.append(TracePoint(elapsed, float(objectives.sum()), float(bounds.sum())))
            budget.report(done, problem.rows)
    except KeyboardInterrupt:
        return Outcome(mask.to(home), Status.INTERRUPTED, bounds, statuses, trace, stats)
    return Outcome(mask.to(home), overall(statuses), bounds, statuses, trace, stats)


def overall(statuses: Iterable[Status]) -> Status:
    """One status for a layer: what stopped the first row that did not finish, else the common one."""
    found = set(statuses)
    for status in (
        Status.INTERRUPTED,
        Status.MEMORY_LIMIT,
        Status.TIME_LIMIT,
        Status.NODE_LIMIT,
        Status.ITERATION_LIMIT,
        Status.PRECISION_LIMIT,
        Status.LOCAL_OPTIMUM,
    ):
        if status in found:
            return status
    return Status.FINISHED


Task = tuple[int, RowProgram, BoolArray]


def _timed(task: Task, solve_row: SolveRow, deadline: float) -> tuple[int, RowResult | None]:
    """The result of one row with its wall-clock and processor seconds, None if it is too late for it."""
    row, program, start = task
    began, cpu = time.monotonic(), time.process_time()
    if began >= deadline:
        return row, None
    result = solve_row(program, start, deadline)
    times = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
    return row, replace(result, stats={**result.stats, **times})


def _timed_alone(task: Task, solve_row: SolveRow, deadline: float) -> tuple[int, RowResult | None]:
    """``_timed`` in a worker process, where one thread per process is right."""
    torch.set_num_threads(1)
    return _timed(task, solve_row, deadline)


def _results(
    tasks: Iterable[Task], solve_row: SolveRow, deadline: float, jobs: int
) -> Iterator[tuple[int, RowResult]]:
    if jobs == 1:
        outcomes: Iterable[tuple[int, RowResult | None]] = (
            _timed(task, solve_row, deadline) for task in tasks
        )
    else:
        from joblib import Parallel, delayed

        # fresh interpreters (loky): safe beside threads of torch and numba, and needs no __main__ guard
        pool = Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs")
        outcomes = pool(delayed(_timed_alone)(task, solve_row, deadline) for task in tasks)
    for row, result in outcomes:
        if result is not None:
            yield row, result


def _one_row(problem: LayerProblem, row: int, kept: Tensor) -> float:
    """Error of one row in float64, as the layer scores it."""
    return float(problem.slice_rows(slice(row, row + 1)).row_objectives(kept[None])[0])


def better(program: RowProgram, candidate: BoolArray, current: BoolArray) -> BoolArray:
    """Whichever costs less; ``current`` on a tie, so a warm start is never given up for nothing."""
    return candidate if program.objective(candidate) < program.objective(current) else np.asarray(current)
