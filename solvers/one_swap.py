"""1-swap local search (SparseSwaps, arXiv 2512.10922, algorithm 1).

From a warm start, prune one kept and restore one pruned weight of a row (of a block with N:M) as
long as that lowers the row's error. The Gram matrix gives the effect of every swap in closed form.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from ..errors import InputError
from ..problems.layer import LayerProblem
from .base import Budget, Group, Outcome, Solver, Status
from .kernels import reference
from .scores import warm_start


@final
@dataclass(frozen=True)
class OneSwap(Solver):
    """Best swap per row until none improves.

    Args:
        max_swaps: the most swaps per row (the paper's T_max), None for no limit.
        tolerance: a swap must improve the row by this share of its starting error.

    The warm start is ``init``, or Wanda's mask if there is none.
    """

    name: ClassVar[str] = "one-swap"
    group: ClassVar[Group] = Group.LOCAL_SEARCH

    max_swaps: int | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_swaps is not None and self.max_swaps < 0:
            raise InputError(f"max_swaps counts swaps: expected at least 0, found {self.max_swaps}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is a share: expected 0 ≤ tolerance < 1, found {self.tolerance}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Descend from the warm start."""
        deadline = budget.deadline()
        start = warm_start(problem, init)
        threshold = self.tolerance * problem.row_objectives(start)
        descent = reference.descend_best(
            problem.gram.correlation64,
            problem.scaled_weight,
            problem.scaled_drift,
            start,
            problem.pattern.block,
            threshold,
            self.max_swaps,
            deadline,
        )
        if bool(descent.converged.all()):
            status = Status.LOCAL_OPTIMUM
        elif time.monotonic() >= deadline:
            status = Status.TIME_LIMIT
        else:
            status = Status.ITERATION_LIMIT
        return Outcome(descent.mask, status, stats={"swaps": descent.swaps})
