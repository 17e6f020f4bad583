"""Solvers made of solvers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import InputError
from ..problems.layer import LayerProblem
from .base import Budget, Group, Outcome, Solver, Status


def _chain_group(solvers: Iterable[Solver]) -> Group:
    """The most powerful group among ``solvers``: what a table files the combination under."""
    order = [Group.SCORE, Group.LOCAL_SEARCH, Group.BOUND, Group.EXACT, Group.WEIGHT_UPDATE]
    return max((solver.group for solver in solvers), key=order.index)


def _remaining(budget: Budget, deadline: float) -> Budget:
    if deadline == float("inf"):
        return budget
    return replace(budget, seconds=max(0.0, deadline - time.monotonic()))


@final
@dataclass(frozen=True, init=False, repr=False)
class Sequence(Solver):
    """Run solvers one after another, each from the mask of the one before.

    ``Sequence(Magnitude(), OneSwap())`` is 1-swap from magnitude's mask. Status, bounds and stats
    are the last solver's.
    """

    name: ClassVar[str] = "sequence"

    solvers: tuple[Solver, ...]

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise InputError("a sequence of solvers has members: expected at least one, found none")
        object.__setattr__(self, "solvers", solvers)

    @property
    def group(self) -> Group:  # type: ignore[override]  # depends on the members
        """The most powerful group among the members."""
        return _chain_group(self.solvers)

    @property
    def layer_budget(self) -> bool:  # type: ignore[override]  # depends on the members
        """Whether all members cover patterns whose rows share one budget."""
        return all(solver.layer_budget for solver in self.solvers)

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Run the members in order."""
        deadline = budget.deadline()
        outcome = self.solvers[0].run(problem, init, budget)
        for solver in self.solvers[1:]:
            outcome = solver.run(problem, outcome.mask, _remaining(budget, deadline))
        return outcome

    @property
    def metric(self) -> bool:  # type: ignore[override]  # depends on the members
        """Whether all members accept an output metric."""
        return all(solver.metric for solver in self.solvers)

    def missing(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the members
        """Required libraries of any member that are not installed."""
        return tuple(dict.fromkeys(name for solver in self.solvers for name in solver.missing()))

    def __repr__(self) -> str:
        return " → ".join(repr(solver) for solver in self.solvers)


@final
@dataclass(frozen=True, init=False, repr=False)
class BestOf(Solver):
    """Run several solvers and keep, row by row, the best mask; bounds are the best of each row."""

    name: ClassVar[str] = "best-of"

    solvers: tuple[Solver, ...]

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise InputError("a choice of solvers has members: expected at least one, found none")
        object.__setattr__(self, "solvers", solvers)

    @property
    def group(self) -> Group:  # type: ignore[override]  # depends on the members
        """The most powerful group among the members."""
        return _chain_group(self.solvers)

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Run all members and select."""
        deadline = budget.deadline()
        best: Tensor | None = None
        best_errors = torch.full((problem.rows,), torch.inf, dtype=torch.float64, device=problem.device)
        bounds = torch.zeros_like(best_errors)
        statuses = [Status.FINISHED] * problem.rows
        for solver in self.solvers:
            outcome = solver.run(problem, init, _remaining(budget, deadline))
            if outcome.row_bounds is not None:
                bounds = torch.maximum(bounds, outcome.row_bounds.to(bounds))
            if outcome.mask is None:
                continue
            errors = problem.row_objectives(outcome.mask)
            better = errors < best_errors
            best = outcome.mask if best is None else torch.where(better[:, None], outcome.mask, best)
            best_errors = torch.where(better, errors, best_errors)
            of_rows = outcome.row_statuses or [outcome.status] * problem.rows
            statuses = [
                new if chosen else old
                for new, old, chosen in zip(of_rows, statuses, better.tolist(), strict=True)
            ]
        return Outcome(best, Status.FINISHED, row_bounds=bounds, row_statuses=statuses)

    def missing(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the members
        """Required libraries of any member that are not installed."""
        return tuple(dict.fromkeys(name for solver in self.solvers for name in solver.missing()))

    def __repr__(self) -> str:
        return f"BestOf({', '.join(repr(solver) for solver in self.solvers)})"
