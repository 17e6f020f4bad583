"""Swap tabu search (Glover, ORSA Journal on Computing 1, 1989, on the swaps of SparseSwaps).

From a 1-swap optimum, keep making the better of two candidate swaps even when it raises the error; the
weights of the last few swaps may not move, so the walk leaves the optimum instead of stepping back. The
best mask met on the way is descended to a certified 1-swap optimum again, and walked from again, until a
walk brings nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ..base import Budget, Group, Outcome, Solver
from ..kernels.interface import DescentOptions
from ..scores import warm_start
from .local_search import descend_layer
from .one_swap import overall_status, row_statuses

# Moves without improvement at effort 1.
PATIENCE = 150


@final
@dataclass(frozen=True)
class Tabu(Solver):
    """1-swap descent, then tabu walks; never worse than its start.

    Args:
        effort: a walk stops after ``150 · effort`` moves without improvement.
        tenure: moves for which a moved weight stays.
        tolerance: an improvement is at least this share of the row's starting error.

    The warm start is ``init``, or Wanda's mask if there is none. Stats per row: ``swaps`` (all moves) and
    ``certified`` (1 where the row is a certified 1-swap optimum).
    """

    name: ClassVar[str] = "tabu"
    group: ClassVar[Group] = Group.LOCAL_SEARCH

    effort: float = 1.0
    tenure: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.effort) and self.effort > 0):
            raise InputError(
                f"effort multiplies the length of a walk: expected more than 0, found {self.effort}"
            )
        if self.tenure < 1:
            raise InputError(f"tenure counts moves: expected at least 1, found {self.tenure}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is a share: expected 0 ≤ tolerance < 1, found {self.tolerance}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Descend and walk; rows that a time limit cuts off keep the warm start."""
        deadline = budget.deadline()
        start = warm_start(problem, init)
        patience = max(1, math.ceil(PATIENCE * self.effort))
        options = DescentOptions(self.tolerance, patience=patience, tenure=self.tenure)
        descent = descend_layer(problem, start, options, budget, deadline)
        statuses = row_statuses(descent.converged, descent.swaps, None)
        return Outcome(
            descent.mask,
            overall_status(statuses),
            row_statuses=statuses,
            stats={"swaps": descent.swaps, "certified": descent.converged.to(torch.int64)},
        )
