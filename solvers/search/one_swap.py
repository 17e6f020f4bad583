"""1-swap local search (SparseSwaps, arXiv 2512.10922, algorithm 1).

From a warm start, prune one kept and restore one pruned weight of a row (of a block with N:M) as
long as that lowers the row's error. The Gram matrix gives the effect of every swap in closed form, so
the end is certified: with freshly computed costs no swap of a certified row lowers its error by more
than the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedProblemError
from ...problems.layer import LayerProblem
from ...problems.pattern import Coupling
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status
from ..kernels.interface import DescentOptions
from ..scores import warm_start
from .layer_budget import descend_budget
from .local_search import descend_layer

SEARCHES = ("lazy", "best")


@final
@dataclass(frozen=True)
class OneSwap(Solver):
    """Swap until none improves.

    ``search="best"`` makes the best swap of the row each time, as the paper does. ``search="lazy"``
    makes the better of two cheap candidates (the best partner of the weight that is cheapest to prune,
    and of the one that is best to restore) and looks at all pairs only when neither improves: the same
    kind of optimum, several times faster. Nothing is limited by default: every row ends at a certified
    1-swap optimum.

    Args:
        max_swaps: the most swaps per row (the paper's T_max), None for no limit.
        tolerance: a swap must improve the row by this share of its starting error.
        search: ``lazy`` or ``best``.

    The warm start is ``init``, or Wanda's mask if there is none. Stats per row: ``swaps`` and
    ``certified`` (1 where the row is a certified 1-swap optimum). With a ``LayerBudget`` weights also move
    between rows (stat ``exchanges``), see ``layer_budget``.
    """

    name: ClassVar[str] = "one-swap"
    group: ClassVar[Group] = Group.LOCAL_SEARCH
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, held_out_stop=True)

    max_swaps: int | None = None
    tolerance: float = 1e-6
    search: str = "lazy"

    def __post_init__(self) -> None:
        if self.max_swaps is not None and self.max_swaps < 0:
            raise InputError(f"max_swaps counts swaps: expected at least 0, found {self.max_swaps}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is a share: expected 0 ≤ tolerance < 1, found {self.tolerance}")
        if self.search not in SEARCHES:
            raise InputError(f"search of 1-swap: expected {' or '.join(SEARCHES)}, found {self.search!r}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Descend from the warm start; rows that a time limit cuts off keep it."""
        deadline = budget.deadline()
        start = warm_start(problem, init)
        if problem.pattern.couples is Coupling.LAYER:
            if self.max_swaps is not None:
                raise UnsupportedProblemError(
                    f"one-swap with the budget of a whole layer: expected no limit of swaps per row, "
                    f"found max_swaps = {self.max_swaps}"
                )
            return descend_budget(problem, start, self.tolerance, self.search, budget)
        options = DescentOptions(self.tolerance, self.max_swaps, self.search)
        descent = descend_layer(problem, start, options, budget, deadline)
        statuses = row_statuses(descent.converged, descent.swaps, self.max_swaps)
        return Outcome(
            descent.mask,
            overall_status(statuses),
            row_statuses=statuses,
            stats={"swaps": descent.swaps, "certified": descent.converged.to(torch.int64)},
        )


def row_statuses(converged: Tensor, swaps: Tensor, max_swaps: int | None) -> list[Status]:
    """Why each row stopped: at an optimum, at the limit of swaps, or else for lack of time."""
    most = float("inf") if max_swaps is None else max_swaps
    return [
        Status.LOCAL_OPTIMUM if done else Status.ITERATION_LIMIT if made >= most else Status.TIME_LIMIT
        for done, made in zip(converged.tolist(), swaps.tolist(), strict=True)
    ]


def overall_status(statuses: list[Status]) -> Status:
    """Why the layer stopped: the most severe limit that any row met."""
    for status in (Status.TIME_LIMIT, Status.ITERATION_LIMIT):
        if status in statuses:
            return status
    return Status.LOCAL_OPTIMUM
