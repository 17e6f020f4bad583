"""Iterated local search on single rows: kicks, descent and tabu (Lourenço, Martin, Stützle, 2003).

From the warm start, best 1-swaps until none improves, then swap tabu (Glover, 1989) around that optimum, then
``kicks`` times: some random swaps from the best mask, best 1-swaps, kept if better. Work per swap is the
square of the block width, so it is meant for rows of up to some hundred weights, where it nearly always
finds the optimum that the exact solvers prove.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ...problems.row_program import BoolArray, RowProgram
from ..base import Budget, Covers, Group, Outcome, Solver, Status
from ..row_wise import RowResult, better, solve_rows


@final
@dataclass(frozen=True)
class IteratedLocalSearch(Solver):
    """Kicks and descents around the best mask of each row.

    Args:
        kicks: kicks per row.
        strength: most random swaps of a kick.
        tenure: moves for which tabu leaves a swapped weight alone.
        patience: non-improving moves before tabu stops, 0 for no tabu.
        seed: of the kicks; the same seed gives the same mask.
        jobs: processes that share the rows.

    The warm start is ``init``, or Wanda's mask if there is none.
    """

    name: ClassVar[str] = "iterated-local-search"
    group: ClassVar[Group] = Group.LOCAL_SEARCH
    covers: ClassVar[Covers] = Covers(requires=("numba",))

    kicks: int = 200
    strength: int = 16
    tenure: int = 7
    patience: int = 200
    seed: int = 0
    jobs: int = 1

    def __post_init__(self) -> None:
        for name in ("kicks", "strength", "tenure", "patience"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is a count: expected at least 0, found {getattr(self, name)}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Search every row."""
        return solve_rows(problem, init, budget, self._solve_row, self.jobs)

    def _solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        found = self.improve(program.rescaled(start), start)
        return RowResult(better(program, found, start), 0.0, Status.ITERATION_LIMIT)

    def improve(self, program: RowProgram, start: BoolArray) -> BoolArray:
        """The best selection (n,) found from ``start`` (n,) in one program."""
        from ..kernels.iterated_local_search import search

        if program.size == 0:
            return start
        found: BoolArray = search(
            program.quadratic,
            program.linear,
            program.starts,
            start,
            self.kicks,
            self.strength,
            self.tenure,
            self.patience,
            self.seed,
        )
        return found
