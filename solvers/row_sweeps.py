"""Sweeps over the rows of a layer that an output metric couples.

Under ``tr(S E Eᵀ)`` the error seen from row i is, up to a constant, ``S_ii`` times

    r_iᵀ G r_i + 2 h'_iᵀ r_i,      h'_i = h_i + Σ_{j≠i} (S_ij / S_ii) P_j,      P_j = G r_j + h_j = X̂ E_jᵀ:

the row's own problem with a shifted linear term. Solving row after row, each from its present mask,
never raises the layer's error, and ends where no row can improve alone (block coordinate descent). Rows
of a batch are solved at once as if the others of the batch stood still; where the true change of the
layer's error, which is computed, is not a decrease, the batch is solved again in halves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import InputError
from ..problems.layer import LayerProblem
from ..problems.metric import CoupledErrors
from .base import Budget, Covers, Group, Outcome, Solver, Status
from .search.one_swap import OneSwap


@final
@dataclass(frozen=True)
class RowSweeps(Solver):
    """Minimise the coupled error of a layer with a solver of single rows.

    Without an output metric this is the solver itself.

    Args:
        solver: solves the rows, from their present masks.
        sweeps: how often every row is solved again; fewer when no row changes any more.
        batches: a sweep solves its rows in so many batches (at least one row each).
        seed: of the order of the rows.
        alone: whether the rows are first solved as if they were not coupled, which a start from a score
            needs and a start from an earlier solution of the coupled layer does not.
    """

    name: ClassVar[str] = "row-sweeps"

    solver: Solver = field(default_factory=OneSwap)
    sweeps: int = 2
    batches: int = 16
    seed: int = 0
    alone: bool = True

    def __post_init__(self) -> None:
        if self.sweeps < 1 or self.batches < 1:
            raise InputError(
                f"sweeps over rows: expected at least one sweep and one batch, found {self.sweeps} and "
                f"{self.batches}"
            )

        if self.solver.group is Group.WEIGHT_UPDATE:
            raise InputError(
                "sweeps over rows choose masks: expected a solver that keeps the weights, "
                f"found {self.solver!r}"
            )

    @property
    def group(self) -> Group:
        """The group of the rows' solver."""
        return self.solver.group

    @property
    def covers(self) -> Covers:
        """What the rows' solver covers, and any output metric with budgets of rows or blocks."""
        return replace(self.solver.covers, metric=True, swept=True, held_out_stop=False)

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Solve the rows alone, then sweep; stats are those of the first pass plus ``changed`` rows."""
        if problem.metric is None:
            return self.solver.run(problem, init, budget)
        deadline = budget.deadline()
        first = Outcome(init, Status.FINISHED)
        if self.alone or init is None:
            first = self.solver.run(replace(problem, metric=None), init, replace(budget, progress=None))
        if first.mask is None:
            return first
        mask = first.mask.clone()
        errors = CoupledErrors(problem, problem.weight.double().masked_fill(mask, 0))
        generator = torch.Generator().manual_seed(self.seed)
        changed = torch.zeros(problem.rows, dtype=torch.int64)
        status = Status.ITERATION_LIMIT
        done, total = 0, self.sweeps * problem.rows
        for _ in range(self.sweeps):
            before = changed.clone()
            order = torch.randperm(problem.rows, generator=generator)
            for rows in torch.tensor_split(order, min(self.batches, problem.rows)):
                if time.monotonic() > deadline:
                    return Outcome(mask, Status.TIME_LIMIT, stats={**first.stats, "changed": changed})
                changed[self._solve(errors, mask, rows.to(problem.device), deadline)] += 1
                done += len(rows)
                budget.report(done * problem.rows // total, problem.rows)
            if torch.equal(before, changed):
                status = Status.LOCAL_OPTIMUM
                break
        return Outcome(mask, status, stats={**first.stats, "changed": changed})

    def _solve(self, errors: CoupledErrors, mask: Tensor, rows: Tensor, deadline: float) -> Tensor:
        """Solve some rows in the layer's present state; returns those whose mask changed, on the CPU."""
        part = errors.rows_alone(rows)
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        found = self.solver.run(part, mask[rows], Budget(left)).mask
        if found is None:
            return rows[:0].cpu()
        moved = (found != mask[rows]).any(1)
        if not bool(moved.any()):
            return rows[:0].cpu()
        if errors.try_lost(rows, part.weight.double().masked_fill(found, 0)):
            mask[rows] = found
            return rows[moved].cpu()
        if len(rows) == 1:
            return rows[:0].cpu()
        halves = [self._solve(errors, mask, half, deadline) for half in rows.tensor_split(2)]
        return torch.cat(halves)


def sweeping(solver: Solver) -> Solver:
    """``solver`` itself where it accepts an output metric, else in sweeps over rows."""
    return solver if solver.covers.metric else RowSweeps(solver)
