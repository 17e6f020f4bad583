"""Units chosen by any solver of masks, for the error without an update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from ...problems.units import UnitProblem
from ..base import Budget, Solver, solve
from ..search.one_swap import OneSwap
from .base import UnitOutcome, UnitSolver


@final
@dataclass(frozen=True)
class UnitMasks(UnitSolver):
    """Solve the row ``UnitProblem.as_row`` with any solver of masks, a search or an exact one.

    Args:
        solver: of the row.
        centred: whether a bias absorbs the mean of what is pruned.
    """

    name: ClassVar[str] = "unit-masks"

    solver: Solver = field(default_factory=OneSwap)
    centred: bool = False

    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """The row's mask, and what was proven of the row, which is the error with the old weights."""
        row = problem.as_row(self.centred)
        found = solve(row, self.solver, None if init is None else init[None], budget)
        proven = found.bound if found.bound > 0 and not self.centred else None
        return UnitOutcome(found.mask[0], found.status, bound=proven)
