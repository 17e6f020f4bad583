"""Branch and bound for single rows, with presolve, QCR and doubly nonnegative splits.

A row goes through these stages and stops as soon as it is proven:

1. an incumbent from iterated local search;
2. the QCR split (`bounds.qcr`), reduced-cost fixing until nothing more is fixed, and a short search;
3. the doubly nonnegative split (`bounds.dnn`) of what is left and a short search, then twice a longer look
   for an incumbent, the split with triangle inequalities as cuts, which halve its gap, and a longer search;
4. where that is not enough, best first over parts of the program, divided at the variable that the relaxation
   leaves most open, each with fixing, a split and a search of its own.

The search (`kernels.branch_and_bound`) is depth first and fixes variables by reduced costs at every node.
Patterns: per row and any N:M, each block of a row keeping its own sum. Drift is covered.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from ...problems.row_program import BoolArray, RowProgram
from ..base import Covers, Status
from ..bounds.convex_split import ConvexSplit
from ..bounds.dnn import (
    PLAIN_STEPS,
    WORTH_REPEATING,
    DnnState,
    iterate,
    iterate_with_cuts,
    restrict_state,
    split_of,
    start_state,
)
from ..bounds.presolve import Reduced, eigenvalue_fixing, reduced_cost_fixing
from ..bounds.qcr import qcr_split
from ..row_wise import RowResult, RowSolver, better
from ..search.iterated_local_search import IteratedLocalSearch

# Gradient entries that the search updates between two looks at the clock, about 10 ms.
WORK_PER_SLICE = 5_000_000
# Nodes of the search with the QCR split before the doubly nonnegative split is worth its time.
QCR_NODES = 1500
# Steps of the doubly nonnegative iteration with cuts and nodes of the search in each round.
DNN_ROUNDS = ((0, 1_500), (360, 100_000), (400, 400_000))
# The same for each part, once the program is divided.
PART_STEPS, PART_NODES = 60, 15_000
# Kicks and their strength in the second search for an incumbent, before a split with cuts.
MORE_KICKS, MORE_STRENGTH = 1500, 32
UNLIMITED = np.iinfo(np.int64).max


@final
@dataclass(frozen=True)
class BranchAndBound(RowSolver):
    """Prove the best mask of each row (see the module).

    Args:
        time_limit, node_limit, gap_limit, jobs: as of every ``RowSolver``.
        incumbent: finds the first incumbent from the warm start.

    A row ends as ``finished`` (its gap is at most ``gap_limit``, up to rounding), ``time_limit`` or
    ``node_limit``, in each case with its incumbent and a proven bound. Stats per row: ``nodes``, ``seconds``,
    ``cpu_seconds``, ``search_seconds`` (processor time inside the tree) and ``fixed`` (by presolve).
    """

    name: ClassVar[str] = "branch-and-bound"
    covers: ClassVar[Covers] = Covers(requires=("numba",))

    incumbent: IteratedLocalSearch = field(default_factory=IteratedLocalSearch)

    def solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        """Find an incumbent and prove it."""
        found = self.incumbent.improve(program.rescaled(start), start)
        found = better(program, found, start)
        scaled = program.rescaled(found)
        # a tenth of the limit is left for rounding: the gap that is computed in the end is within it
        again = replace(
            self.incumbent,
            kicks=max(self.incumbent.kicks, MORE_KICKS),
            strength=max(self.incumbent.strength, MORE_STRENGTH),
            seed=self.incumbent.seed + 1,
        )
        proof = _Proof(scaled, found, again, 0.9 * self.gap_limit, self.node_limit, deadline)
        status = proof.run()
        best = better(program, proof.best, found)
        return RowResult(
            best,
            float(np.nextafter(max(0.0, proof.bound) * scaled.unit, 0.0)),
            status,
            {"nodes": proof.nodes, "search_seconds": proof.search_seconds, "fixed": proof.fixed},
        )


class _Proof:
    """One row's way to a proof: the incumbent, the bound and what is fixed so far."""

    def __init__(
        self,
        program: RowProgram,
        incumbent: BoolArray,
        again: IteratedLocalSearch,
        gap_limit: float,
        node_limit: int | None,
        deadline: float,
    ) -> None:
        self.program = program
        self.best = incumbent
        self.again = again
        self.upper = program.objective(incumbent)
        self.bound = -np.inf
        self.gap_limit = gap_limit
        self.node_limit = UNLIMITED if node_limit is None else node_limit
        self.deadline = deadline
        self.reduced = Reduced.nothing(program)
        self.state: DnnState | None = None
        self.closed = False  # presolve alone has shown that nothing is better than the threshold
        self.branch = 0  # variable that the last relaxation would branch on
        self.nodes = 0
        self.search_seconds = 0.0
        # largest rounding allowance of the splits that were used
        self.allowance = 0.0

    @property
    def fixed(self) -> int:
        """Variables that presolve fixed."""
        return self.program.size - self.reduced.program.size

    @property
    def threshold(self) -> float:
        """Selections that cost at least this much need not be found."""
        return self.upper - max(self.gap_limit * abs(self.upper), 2 * self.allowance)

    def run(self) -> Status:
        """Go through the stages; sets ``best`` and ``bound``."""
        while self._shrink(eigenvalue_fixing(self.reduced.program, self.threshold)):
            continue
        if self._search(self._qcr(), QCR_NODES):
            return self._proven()
        for steps, nodes in DNN_ROUNDS:
            if stopped := self._stopped():
                return stopped
            if steps:
                # rows that come this far are hard: a better incumbent pays in everything that follows
                self._offer(self.again.improve(self.program, self.best))
            if self._search(self._doubly_nonnegative(steps), nodes):
                return self._proven()
        return self._divide()

    def _divide(self) -> Status:
        """Best first over parts of the program, each with its own split of what is left in it."""
        parts = [(self.bound, 0, self.reduced, self.state)]
        made = 1
        while parts and parts[0][0] < self.threshold - self.allowance:
            if stopped := self._stopped():
                # what was fixed or pruned away costs at least the threshold
                self.bound = min(parts[0][0], self.threshold - self.allowance)
                return stopped
            self.bound, _, self.reduced, self.state = heapq.heappop(parts)
            self.closed = False
            if self._search(self._doubly_nonnegative(PART_STEPS), PART_NODES):
                continue
            for value in (0, 1):
                decided = np.full(self.reduced.program.size, -1, dtype=np.int8)
                decided[self.branch] = value
                child, restriction = self.reduced.fix(decided)
                if child.infeasible or restriction is None:
                    continue
                if child.program.size == 0:
                    self._offer(child.fixed)
                    continue
                state = None if self.state is None else restrict_state(self.state, restriction)
                heapq.heappush(parts, (self.bound, made, child, state))
                made += 1
        return self._proven()

    def _stopped(self) -> Status | None:
        if self.nodes >= self.node_limit:
            return Status.NODE_LIMIT
        return Status.TIME_LIMIT if time.monotonic() >= self.deadline else None

    def _proven(self) -> Status:
        self.bound = self.threshold - self.allowance
        return Status.FINISHED

    def _qcr(self) -> ConvexSplit | None:
        """The QCR split of what presolve leaves, None if it leaves nothing."""
        while not self.closed:
            split = qcr_split(self.reduced.program, deadline=self.deadline)
            if not self._tighten(split):
                return split
        return None

    def _doubly_nonnegative(self, steps: int) -> ConvexSplit | None:
        """The doubly nonnegative split after ``steps`` more steps, None if fixing leaves nothing."""
        while not self.closed:
            program = self.reduced.program
            if self.state is None:
                self.state = iterate(program, start_state(program), PLAIN_STEPS, self.deadline)
            self.state = iterate_with_cuts(program, self.state, steps, self.deadline)
            split = split_of(program, self.state, self.deadline)
            if not self._tighten(split):
                return split
        return None

    def _tighten(self, split: ConvexSplit) -> bool:
        """Take up the bound of ``split`` and fix by it; returns whether the program shrank."""
        self.allowance = max(self.allowance, split.allowance)
        _, point = split.relax()
        self.branch = int((split.program.quadratic.diagonal() * point * (1 - point)).argmax())
        lower, decided = reduced_cost_fixing(split, point, self.threshold)
        self.bound = max(self.bound, min(lower, self.threshold - self.allowance))
        if lower >= self.threshold:
            self.closed = True
            return True
        return self._shrink(decided)

    def _shrink(self, decided: npt.NDArray[np.int8]) -> bool:
        """Fix variables if they are enough to repeat a step (a search fixes the few by itself)."""
        if self.closed or int((decided >= 0).sum()) < max(1, WORTH_REPEATING * len(decided)):
            return False
        self.reduced, restriction = self.reduced.fix(decided)
        if restriction is not None and self.state is not None:
            self.state = restrict_state(self.state, restriction)
        if self.reduced.infeasible:
            self.closed = True
        elif self.reduced.program.size == 0:
            self._offer(self.reduced.fixed)
            self.closed = True
        return True

    def _offer(self, candidate: BoolArray) -> None:
        """Take a selection of the whole row as incumbent if it is better."""
        value = self.program.objective(candidate)
        if value < self.upper:
            self.best, self.upper = candidate, value

    def _search(self, split: ConvexSplit | None, nodes: int) -> bool:
        """Search with ``split`` for at most ``nodes`` nodes; returns whether the tree is done."""
        from ..kernels.branch_and_bound import NODES, new_dropped, new_levels, open_bound, search

        if split is None or self.closed:
            return True
        inner = split.program
        levels = new_levels(
            split.convex,
            split.linear,
            split.constant,
            inner.starts,
            inner.counts,
            np.zeros(inner.size, dtype=np.bool_),
            self.upper,
        )
        cuts = split.triangles
        dropped = new_dropped(inner.size, split.nonnegative, cuts.corners, cuts.kinds, cuts.weights)
        limit = min(nodes, self.node_limit - self.nodes)
        began = time.thread_time()
        done = False
        while not done and levels.state[NODES] < limit and time.monotonic() < self.deadline:
            done = search(
                split.convex,
                dropped,
                inner.quadratic,
                inner.linear,
                inner.constant,
                levels,
                self.gap_limit,
                2 * self.allowance,
                limit,
                WORK_PER_SLICE,
            )
        if levels.upper[0] < self.upper:
            self._offer(self.reduced.expand(levels.incumbent))
        self.search_seconds += time.thread_time() - began
        self.nodes += int(levels.state[NODES])
        if not done:
            # what was fixed or pruned away costs at least the threshold
            self.bound = max(self.bound, min(open_bound(levels), self.threshold) - self.allowance)
        return done
