"""Backward greedy: prune one weight at a time at its exact marginal cost.

From a denser Wanda mask, prune in each row the kept weight whose removal costs least,

    q_u = y_u² + 2 y_u c_u,    c = R y_pruned + h/√diag(G)      (symbols of ``kernels.reference``)

update ``c`` and repeat until the pattern's count is reached; a block of an N:M pattern is closed once
it keeps N. The order matters: several weights at a time, or forward selection, end far worse on
correlated layers, because each removal changes what the next one costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ...problems.pattern import SparsityPattern
from ..base import Budget, Group, Outcome, Solver, Status
from ..kernels import kernels_for
from ..kernels.scaling import LARGEST_FLOAT32
from ..scores import warm_start
from .local_search import FLOAT32_COLS, at_scale, row_batches, scaled_rows


@final
@dataclass(frozen=True)
class Greedy(Solver):
    """Backward greedy from a denser Wanda mask.

    Args:
        share: share of each block's pruned weights that greedy chooses, one by one; Wanda's score
            chooses the others first. 0.6 starts a row of 50 % from density 0.8.

    It starts from scores, not from ``init``; rows whose ``init`` is better keep it, and so do rows that a
    time limit cuts off (Wanda's mask without one).
    """

    name: ClassVar[str] = "greedy"
    group: ClassVar[Group] = Group.LOCAL_SEARCH

    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(
                f"greedy's share of the pruned weights: expected 0 < share ≤ 1, found {self.share}"
            )

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Prune row by row."""
        deadline = budget.deadline()
        pattern = problem.pattern
        keep = pattern.keep + math.ceil((pattern.block - pattern.keep) * self.share)
        if keep == pattern.block:
            dense = torch.ones_like(problem.weight, dtype=torch.bool)
        else:
            dense = SparsityPattern(keep, pattern.block).top_k(problem.scaled_weight.abs())
        mask = torch.empty_like(dense)
        finished = torch.zeros(problem.rows, dtype=torch.bool, device=problem.device)
        for rows in row_batches(problem):
            # the scale is that of all weights: with nothing pruned yet there is no other
            scaled = scaled_rows(problem, torch.zeros_like(dense), rows)
            single = problem.cols >= FLOAT32_COLS
            if scaled.drift is not None:
                single &= bool(scaled.drift.abs().amax() < LARGEST_FLOAT32)
            correlation = problem.gram.correlation if single else problem.gram.correlation64
            part = at_scale(problem, scaled, correlation)
            found, done = kernels_for(problem.device).prune(part, dense[rows], pattern.keep, deadline)
            mask[rows], finished[rows] = found, done
            budget.report(rows.stop, problem.rows)
        if not bool(finished.all()):
            mask = torch.where(finished[:, None], mask, warm_start(problem, init))
        if init is not None:
            worse = problem.row_objectives(mask) > problem.row_objectives(init)
            mask = torch.where(worse[:, None], init, mask)
        statuses = [Status.FINISHED if done else Status.TIME_LIMIT for done in finished.tolist()]
        overall = Status.FINISHED if bool(finished.all()) else Status.TIME_LIMIT
        return Outcome(mask, overall, row_statuses=statuses)
