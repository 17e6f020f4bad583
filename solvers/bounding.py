"""``bound``: a lower bound of the layer error that any mask can be checked against."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..problems.layer import LayerProblem
from .base import Budget, Group, Solution, Solver, Status, relative_gap, solve
from .bounds import Dnn, Qcr, RowSplit, SharedSplit
from .registry import SOLVERS, parse_solver

# Names of the tiers.
TIERS = tuple(name for name, kind in SOLVERS.items() if kind().group is Group.BOUND)
AUTO = "auto"
# Widest rows for which a tier takes seconds per row (dnn) and about one second (qcr) on one core.
DNN_COLS = 256
QCR_COLS = 640
# Share of a time budget that the tier for all rows may take before the rows are bounded one by one.
LAYER_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class LayerBound:
    """Proven lower bounds of a layer.

    Attributes:
        tier: which tiers gave them, strongest last.
        row_bounds: lower bound of each row's error (rows,), float64.
        status: whether every row was bounded with the last tier, or a limit came first.
        seconds: wall-clock time.
    """

    tier: str
    row_bounds: Tensor
    status: Status
    seconds: float

    @property
    def total(self) -> float:
        """Lower bound of the error of any allowed mask of the layer."""
        return float(self.row_bounds.sum())

    def row_gaps(self, problem: LayerProblem, mask: Tensor | Solution) -> Tensor:
        """How far each row of ``mask`` can be above its optimum: (error - bound) / error (rows,)."""
        kept = mask.mask if isinstance(mask, Solution) else mask
        return relative_gap(problem.row_objectives(kept), self.row_bounds.to(problem.device))

    def gap(self, problem: LayerProblem, mask: Tensor | Solution) -> float:
        """The same for the error of the layer."""
        kept = mask.mask if isinstance(mask, Solution) else mask
        error = torch.tensor(problem.objective(kept), dtype=torch.float64)
        return float(relative_gap(error, torch.tensor(self.total, dtype=torch.float64)))


def bound(
    problem: LayerProblem,
    tier: Solver | str = AUTO,
    budget: Budget | None = None,
    init: Tensor | Solution | None = None,
) -> LayerBound:
    """Bound the error of every row of ``problem`` from below.

    Args:
        problem: the layer, with any pattern, with or without drift.
        tier: a solver of the group *bound* or its text, such as ``shared-split:steps=60``, or ``auto``: rows
            of at most 256 weights by ``dnn``, of at most 640 by ``row-split`` and ``qcr``, whichever is
            higher, wider ones by ``row-split``; with a time limit ``shared-split`` comes before ``dnn`` and
            rows that it does not reach keep that bound.
        budget: limits; the bounds hold whenever they stop it.
        init: a good mask; it only sets the scale of the row programs.

    Raises:
        InputError: for an unknown tier.
        SolverNotInstalledError: if the library of a tier is missing.
    """
    budget = budget or Budget()
    began = time.monotonic()
    if tier == AUTO:
        tiers, status, bounds = _auto(problem, budget, init)
    else:
        solver = tier_of(tier)
        solution = solve(problem, solver, init, budget)
        tiers, status, bounds = solver.name, solution.status, solution.row_bounds
    return LayerBound(tiers, bounds, status, time.monotonic() - began)


def tier_of(tier: Solver | str) -> Solver:
    """The solver that is meant.

    Raises:
        InputError: if it is none of the group *bound*.
    """
    known = not isinstance(tier, str) or tier.partition(":")[0] in SOLVERS
    solver = parse_solver(tier) if isinstance(tier, str) and known else tier
    if isinstance(solver, str) or solver.group is not Group.BOUND:
        raise InputError(f"unknown bound: expected {AUTO} or one of {', '.join(TIERS)}, found {tier!r}")
    return solver


def _auto(
    problem: LayerProblem, budget: Budget, init: Tensor | Solution | None
) -> tuple[str, Status, Tensor]:
    rows: Solver | None = None
    if problem.cols <= QCR_COLS and not Dnn().missing():
        rows = Dnn() if problem.cols <= DNN_COLS else Qcr()
    if budget.seconds is None and isinstance(rows, Dnn):
        solution = solve(problem, rows, init, budget)
        return rows.name, solution.status, solution.row_bounds
    deadline = budget.deadline()
    share = 1.0 if rows is None else LAYER_SHARE
    first = None if budget.seconds is None else share * budget.seconds
    layer = SharedSplit() if isinstance(rows, Dnn) else RowSplit()
    solution = solve(problem, layer, init, Budget(first, budget.progress if rows is None else None))
    if rows is None:
        return layer.name, solution.status, solution.row_bounds
    bounds = solution.row_bounds
    rest = None if budget.seconds is None else max(0.0, deadline - time.monotonic())
    solution = solve(problem, rows, init, Budget(rest, budget.progress))
    return f"{layer.name}, {rows.name}", solution.status, torch.maximum(bounds, solution.row_bounds)
