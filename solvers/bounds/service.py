"""``bound``: a lower bound of the layer error that any mask can be checked against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ..base import Budget, Solution, Solver, Status, relative_gap, solve
from .corr_eigenvalue import CorrEigenvalue
from .dnn import Dnn
from .naive import Naive
from .qcr import Qcr
from .row_split import RowSplit
from .sdp import Sdp
from .shared_split import SharedSplit

TIERS: dict[str, Callable[[], Solver]] = {
    "corr-eigenvalue": CorrEigenvalue,
    "naive": Naive,
    "shared-split": SharedSplit,
    "row-split": RowSplit,
    "qcr": Qcr,
    "dnn": Dnn,
    "sdp": Sdp,
}
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
    tier: str = "auto",
    budget: Budget | None = None,
    init: Tensor | Solution | None = None,
) -> LayerBound:
    """Bound the error of every row of ``problem`` from below.

    Args:
        problem: the layer, with any pattern, with or without drift.
        tier: one of ``TIERS``, or ``auto``: rows of at most 256 weights by ``dnn``, of at most 640 by
            ``row-split`` and ``qcr``, whichever is higher, wider ones by ``row-split``; with a time limit
            ``shared-split`` comes before ``dnn`` and rows that it does not reach keep that bound.
        budget: limits; the bounds hold whenever they stop it.
        init: a good mask; it only sets the scale of the row programs.

    Raises:
        InputError: for an unknown tier.
        SolverNotInstalledError: if the library of a tier is missing.
    """
    budget = budget or Budget()
    began = time.monotonic()
    if tier == "auto":
        tiers, status, bounds = _auto(problem, budget, init)
    elif tier in TIERS:
        solution = solve(problem, TIERS[tier](), init, budget)
        tiers, status, bounds = tier, solution.status, solution.row_bounds
    else:
        raise InputError(f"unknown bound: expected auto or one of {', '.join(TIERS)}, found {tier!r}")
    return LayerBound(tiers, bounds, status, time.monotonic() - began)


def _auto(
    problem: LayerProblem, budget: Budget, init: Tensor | Solution | None
) -> tuple[str, Status, Tensor]:
    rows = None
    if problem.cols <= QCR_COLS and not Dnn().missing():
        rows = "dnn" if problem.cols <= DNN_COLS else "qcr"
    if budget.seconds is None and rows == "dnn":
        solution = solve(problem, TIERS[rows](), init, budget)
        return rows, solution.status, solution.row_bounds
    deadline = budget.deadline()
    share = 1.0 if rows is None else LAYER_SHARE
    first = None if budget.seconds is None else share * budget.seconds
    layer = "shared-split" if rows == "dnn" else "row-split"
    solution = solve(problem, TIERS[layer](), init, Budget(first, budget.progress if rows is None else None))
    if rows is None:
        return layer, solution.status, solution.row_bounds
    bounds = solution.row_bounds
    rest = None if budget.seconds is None else max(0.0, deadline - time.monotonic())
    solution = solve(problem, TIERS[rows](), init, Budget(rest, budget.progress))
    return f"{layer}, {rows}", solution.status, torch.maximum(bounds, solution.row_bounds)
