"""Solvers made of solvers."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import InputError
from ..problems.layer import LayerProblem
from ..problems.pattern import Coupling
from .base import Budget, Covers, Group, Outcome, Solver, Status
from .row_sweeps import sweeping


def _strongest_group(solvers: Iterable[Solver]) -> Group:
    """The most powerful group among ``solvers``: what a table files the combination under."""
    order = [Group.SCORE, Group.LOCAL_SEARCH, Group.BOUND, Group.EXACT, Group.WEIGHT_UPDATE]
    return max((solver.group for solver in solvers), key=order.index)


def _covered_by_all(solvers: Sequence[Solver]) -> Covers:
    """What all cover, with the local searches that see each row alone swept over rows under a metric."""
    return functools.reduce(operator.and_, (_sweeping(solver).covers for solver in solvers))


def _sweeping(solver: Solver) -> Solver:
    """``solver``, in sweeps over rows where it is a local search that sees each row alone."""
    return sweeping(solver) if solver.group is Group.LOCAL_SEARCH else solver


def _remaining(budget: Budget, deadline: float) -> Budget:
    if deadline == float("inf"):
        return budget
    return replace(budget, seconds=max(0.0, deadline - time.monotonic()))


@final
@dataclass(frozen=True, init=False, repr=False)
class Chain(Solver):
    """Run solvers one after another, each from the mask of the one before.

    ``Chain(Magnitude(), OneSwap())`` is 1-swap from magnitude's mask, ``Chain(OneSwap(), Reconstruction())``
    least squares on the mask of 1-swap. Members hand on masks, never weights: status, bounds, stats and new
    weights are the last solver's. Under an output metric those local searches among the members that see each
    row alone sweep over the rows (``RowSweeps``). Drift is the default where it is the last member's.
    """

    name: ClassVar[str] = "chain"

    solvers: tuple[Solver, ...]

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise InputError("a chain of solvers has members: expected at least one, found none")
        object.__setattr__(self, "solvers", solvers)

    @property
    def group(self) -> Group:
        """The last member's where it updates weights, else the most powerful group that keeps them."""
        if self.solvers[-1].group is Group.WEIGHT_UPDATE:
            return Group.WEIGHT_UPDATE
        return _strongest_group(solver for solver in self.solvers if solver.group is not Group.WEIGHT_UPDATE)

    @property
    def covers(self) -> Covers:
        """What all members cover; a held-out stop needs one that it can stop."""
        return replace(
            _covered_by_all(self.solvers),
            drift_by_default=self.solvers[-1].drift_by_default,
            held_out_stop=any(solver.covers.held_out_stop for solver in self.solvers),
        )

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Run the members in order."""
        deadline = budget.deadline()
        first, *others = self.solvers if problem.metric is None else map(_sweeping, self.solvers)
        outcome = first.run(problem, init, budget)
        for solver in others:
            outcome = solver.run(problem, outcome.mask, _remaining(budget, deadline))
        return outcome

    def __repr__(self) -> str:
        return " → ".join(repr(solver) for solver in self.solvers)


def without_weight_updates(solver: Solver) -> Solver:
    """What chooses the masks: of a chain the members that keep weights, any other solver itself."""
    members = solver.solvers if isinstance(solver, Chain) else ()
    choosing = [member for member in members if member.group is not Group.WEIGHT_UPDATE]
    return Chain(*choosing) if choosing else solver


@final
@dataclass(frozen=True, init=False, repr=False)
class BestOf(Solver):
    """Run several solvers and keep, row by row, the best mask, with the weights that its solver gave it.

    Where rows are coupled, by an output metric or a budget that they share, the best mask of the whole layer
    is kept. Bounds are the best of each row; those of a member bound the error of masks with unchanged
    weights, so that with a member that updates weights there are none.
    """

    name: ClassVar[str] = "best-of"

    solvers: tuple[Solver, ...]

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise InputError("a choice of solvers has members: expected at least one, found none")
        object.__setattr__(self, "solvers", solvers)

    @property
    def group(self) -> Group:
        """The most powerful group among the members."""
        return _strongest_group(self.solvers)

    @property
    def covers(self) -> Covers:
        """What all members cover."""
        return replace(
            _covered_by_all(self.solvers),
            drift_by_default=any(solver.drift_by_default for solver in self.solvers),
            held_out_stop=False,
        )

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Run all members and select."""
        deadline = budget.deadline()
        coupled = problem.metric is not None or problem.pattern.couples is not Coupling.BLOCK
        best: Tensor | None = None
        kept = problem.weight
        best_errors = torch.full((problem.rows,), torch.inf, dtype=torch.float64, device=problem.device)
        bounds: Tensor | None = None
        statuses = [Status.FINISHED] * problem.rows
        for solver in self.solvers if problem.metric is None else map(_sweeping, self.solvers):
            outcome = solver.run(problem, init, _remaining(budget, deadline))
            if outcome.row_bounds is not None:
                own = outcome.row_bounds.to(best_errors)
                bounds = own if bounds is None else torch.maximum(bounds, own)
            if outcome.mask is None:
                continue
            errors = problem.row_objectives(outcome.mask, outcome.weight)
            better = errors < best_errors
            if coupled:
                better = (errors.sum() < best_errors.sum()).expand_as(errors)
            best = outcome.mask if best is None else torch.where(better[:, None], outcome.mask, best)
            kept = torch.where(
                better[:, None], problem.weight if outcome.weight is None else outcome.weight, kept
            )
            best_errors = torch.where(better, errors, best_errors)
            of_rows = outcome.row_statuses or [outcome.status] * problem.rows
            statuses = [
                new if chosen else old
                for new, old, chosen in zip(of_rows, statuses, better.tolist(), strict=True)
            ]
        if best is None or self.group is not Group.WEIGHT_UPDATE:
            return Outcome(best, Status.FINISHED, row_bounds=bounds, row_statuses=statuses)
        return Outcome(best, Status.FINISHED, row_statuses=statuses, weight=kept * best)

    def __repr__(self) -> str:
        return f"BestOf({', '.join(repr(solver) for solver in self.solvers)})"
