"""What the bounds that are computed row by row share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...problems.layer import LayerProblem
from ...problems.row_program import BoolArray, RowProgram
from ..base import Budget, Covers, Group, Outcome, Solver, Status
from ..row_wise import RowResult, solve_rows


class RowTier(Solver):
    """A bound of one row at a time. Concrete tiers are frozen dataclasses with a field ``jobs``."""

    group: ClassVar[Group] = Group.BOUND
    covers: ClassVar[Covers] = Covers(requires=("numba",))

    jobs: int

    @abstractmethod
    def bound_row(self, program: RowProgram, start: BoolArray, deadline: float) -> float:
        """Lower bound of one program, scaled so that the allowed selection ``start`` (n,) costs about 100.

        It must hold however early ``deadline`` (on ``time.monotonic()``) makes it stop.
        """

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Bound every row; the mask is the warm start."""
        return solve_rows(problem, init, budget, self._solve_row, self.jobs)

    def _solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        scaled = program.rescaled(start)
        lower = max(0.0, self.bound_row(scaled, start, deadline))
        return RowResult(start, float(np.nextafter(lower * scaled.unit, 0.0)), Status.FINISHED)
