"""What the bounds that treat all rows of a layer at once share."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from ..base import Budget, Covers, Group, Outcome, Solver, Status
from ..scores import warm_start


class LayerTier(Solver):
    """A bound of all rows at once. Concrete tiers are frozen dataclasses."""

    group: ClassVar[Group] = Group.BOUND
    covers: ClassVar[Covers] = Covers(rows_alone=False)

    @abstractmethod
    def bound_rows(self, problem: LayerProblem, deadline: float) -> Tensor:
        """Lower bounds (rows,), valid however early ``deadline`` on ``time.monotonic()`` stops it."""

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Bound every row; the mask is the warm start."""
        deadline = budget.deadline()
        mask = warm_start(problem, init)
        if time.monotonic() >= deadline:
            return Outcome(mask, Status.TIME_LIMIT, torch.zeros(problem.rows, dtype=torch.float64))
        bounds = self.bound_rows(problem, deadline)
        budget.report(problem.rows, problem.rows)
        late = time.monotonic() >= deadline
        return Outcome(mask, Status.TIME_LIMIT if late else Status.FINISHED, bounds)
