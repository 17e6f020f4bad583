"""1-swap local search that stops where held-out data say that it only fits the calibration data.

The search runs in stages of doubling length. After each stage the error of every row is also taken on a
second problem, the same layer on held-out tokens; a row whose held-out error has risen goes back to
its last mask and stops (early stopping: Prechelt, *Early stopping - but when?*, 1998). With plenty of
calibration tokens nothing ever stops early, and the result is that of 1-swap.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError, InvalidProblemError
from ...problems.layer import LayerProblem
from ..base import Budget, Covers, Group, Outcome, Solver, Status
from ..compose import Chain
from ..scores import warm_start
from .one_swap import OneSwap, overall_status


@final
@dataclass(frozen=True, eq=False)
class HeldOutStop(Solver):
    """1-swap in stages, each row stopped when its held-out error rises.

    Args:
        held_out: the layer's problem on held-out tokens: the same weight and pattern.
        search: the 1-swap search; its ``max_swaps`` limits all stages together.
        first: swaps per row of the first stage; each further stage may make twice as many.

    Stats per row: ``swaps``, and ``stopped`` (1 where held-out error ended the search).
    """

    name: ClassVar[str] = "held-out-stop"
    group: ClassVar[Group] = Group.LOCAL_SEARCH
    covers: ClassVar[Covers] = Covers(rows_alone=False)  # the held-out problem is that of all rows

    held_out: LayerProblem
    search: OneSwap = field(default_factory=OneSwap)
    first: int = 4

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Search from the warm start; rows that a time limit cuts off keep their last mask."""
        check = self.held_out
        if check.weight.shape != problem.weight.shape or not torch.equal(check.weight, problem.weight):
            raise InvalidProblemError(
                "held-out stop: expected a held-out problem with the same weight, found "
                f"{tuple(check.weight.shape)} for {tuple(problem.weight.shape)}"
            )
        deadline = budget.deadline()
        mask = warm_start(problem, init).clone()
        error = check.row_objectives(mask)
        swaps = torch.zeros(problem.rows, dtype=torch.int64)
        stopped = torch.zeros(problem.rows, dtype=torch.int64)
        statuses = [Status.TIME_LIMIT] * problem.rows
        limit = float("inf") if self.search.max_swaps is None else self.search.max_swaps
        active = torch.arange(problem.rows)
        stage = self.first
        while len(active) and time.monotonic() < deadline:
            allowed = int(min(stage, limit - int(swaps[active].max())))
            part = problem.slice_rows(active.to(problem.device))
            outcome = replace(self.search, max_swaps=allowed).run(part, mask[active], Budget())
            if outcome.mask is None or outcome.row_statuses is None:
                break  # never with 1-swap, whose outcomes have both
            found = check.slice_rows(active.to(problem.device)).row_objectives(outcome.mask)
            worse = (found > error[active]).cpu()
            ended = torch.tensor([status is not Status.ITERATION_LIMIT for status in outcome.row_statuses])
            made = outcome.stats["swaps"].cpu()
            better = active[~worse]
            mask[better], error[better] = outcome.mask[~worse], found[~worse]
            swaps[better] += made[~worse]
            stopped[active[worse]] = 1
            ended |= worse | (swaps[active] >= limit)
            for row, status in zip(active.tolist(), outcome.row_statuses, strict=True):
                statuses[row] = status
            active = active[~ended]
            stage *= 2
            budget.report(problem.rows - len(active), problem.rows)
        for row in active.tolist():
            statuses[row] = Status.TIME_LIMIT
        return Outcome(
            mask, overall_status(statuses), row_statuses=statuses, stats={"swaps": swaps, "stopped": stopped}
        )


def with_held_out_stop(solver: Solver, held_out: LayerProblem) -> Solver:
    """``solver`` with every 1-swap search in it stopped by the layer's problem on held-out tokens.

    Raises:
        InputError: if there is none in it.
    """
    if isinstance(solver, OneSwap):
        return HeldOutStop(held_out, solver)
    if isinstance(solver, Chain) and solver.covers.held_out_stop:
        return Chain(
            *(
                with_held_out_stop(member, held_out) if member.covers.held_out_stop else member
                for member in solver.solvers
            )
        )
    raise InputError(f"held-out stop: expected a 1-swap search, found {solver!r}")
