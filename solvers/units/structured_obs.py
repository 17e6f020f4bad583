"""Backward greedy on the error after least squares: structured optimal brain surgeon.

Unit after unit goes whose loss raises that error least, until the pattern's number is left (ZipLM, Kurtic et
al., NeurIPS 2023, section 3, with the output metric and the drift in the error). Ties go to the lower index.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...problems.units import UnitProblem
from ..base import Budget, Status
from .base import UnitOutcome, UnitSolver
from .kept_inverse import KeptInverse

# Rank updates before both matrices are made anew.
REFRESH = 512


@final
@dataclass(frozen=True)
class StructuredOBS(UnitSolver):
    """Drop the unit that costs least after the update, again and again. A warm start is not looked at."""

    name: ClassVar[str] = "structured-obs"

    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """Drop units; at a time limit the cheapest of what is left go at once."""
        deadline = budget.deadline()
        state = KeptInverse(problem)
        block, spare = problem.pattern.block, problem.pattern.block - problem.pattern.keep
        left = torch.full((problem.units // block,), spare, device=state.kept.device)
        total = int(left.sum())
        for done in range(total):
            costs = torch.full((problem.units,), torch.inf, dtype=torch.float64, device=state.kept.device)
            units = (state.kept & (left > 0).repeat_interleave(block)).nonzero()[:, 0]
            costs[units] = state.drop_costs(units)
            if time.monotonic() > deadline:
                order = problem.pattern.top_k(costs.masked_fill(~state.kept, -torch.inf)[None])[0]
                return UnitOutcome(order, Status.TIME_LIMIT, {"drops": done})
            unit = int(costs.argmin())
            state.drop(unit)
            left[unit // block] -= 1
            if done % REFRESH == REFRESH - 1:
                state.refresh()
            budget.report(done + 1, total)
        return UnitOutcome(state.kept, Status.FINISHED, {"drops": total})
