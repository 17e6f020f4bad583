"""Fixing variables of a row program before a search, by reduced costs.

The tangent of a convex split bounds the error of every selection; a variable whose forced change raises that
bound to what a better selection may cost has only one value left. Fixing shrinks the program, which sharpens
the next split, and so on: on rows with outlier channels the doubly nonnegative step converges only then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ...problems.row_program import BoolArray, FloatArray, Restriction, RowProgram, restrict
from .convex_split import EPSILON, ROUNDING_FACTOR, ConvexSplit

# Diagonals whose largest entry exceeds the median by more are first thinned out with one eigenvalue:
# mixed with them, the rounding of a split would swallow the small entries.
WIDE_RANGE = 1e4


@dataclass(frozen=True, eq=False)
class Reduced:
    """A program with the variables fixed so far.

    Attributes:
        program: what is left.
        free: indices of its variables in the original program.
        fixed: values of the fixed variables there; free entries are False.
        infeasible: no selection is better than the threshold.
    """

    program: RowProgram
    free: npt.NDArray[np.int64]
    fixed: BoolArray
    infeasible: bool = False

    @classmethod
    def nothing(cls, program: RowProgram) -> Reduced:
        """The program with nothing fixed."""
        return cls(program, np.arange(program.size), np.zeros(program.size, dtype=np.bool_))

    def expand(self, x: npt.NDArray[np.generic]) -> BoolArray:
        """The selection of the original program."""
        full = self.fixed.copy()
        full[self.free] = np.asarray(x).astype(np.bool_)
        return full

    def fix(self, decided: npt.NDArray[np.int8]) -> tuple[Reduced, Restriction | None]:
        """Fix what ``decided`` (n,) says (-1: nothing); the restriction is None where that is impossible."""
        program = self.program
        ones = np.add.reduceat((decided == 1).astype(np.int64), program.starts[:-1])
        zeros = np.add.reduceat((decided == 0).astype(np.int64), program.starts[:-1])
        if bool((ones > program.counts).any() or (np.diff(program.starts) - zeros < program.counts).any()):
            return Reduced(program, self.free, self.fixed, infeasible=True), None
        restriction = restrict(program, decided)
        fixed = self.expand(restriction.fixed)
        return Reduced(restriction.program, self.free[restriction.free], fixed), restriction


def descended(program: RowProgram, start: BoolArray) -> BoolArray:
    """The 1-swap optimum that best swaps from ``start`` (n,) lead to, in plain numpy."""
    same_block = program.block_of[:, None] == program.block_of[None, :]
    diagonal = program.quadratic.diagonal()
    point, value = start, program.objective(start)
    while program.size:
        c = program.quadratic @ point + program.linear
        change = (diagonal - 2 * c)[:, None] + (diagonal + 2 * c)[None, :] - 2 * program.quadratic
        change[~(same_block & point[:, None] & ~point[None, :])] = np.inf
        u, v = divmod(int(change.argmin()), program.size)
        swapped = point.copy()
        swapped[[u, v]] = [False, True]
        after = program.objective(swapped)
        if not after < value:
            break
        point, value = swapped, after
    return point


def thinned(program: RowProgram, start: BoolArray) -> tuple[Reduced, BoolArray, float]:
    """A rescaled program without the variables that are far too dear, for solvers with absolute tolerances.

    Args:
        program: at its original scale.
        start: an allowed selection (n,), whose cost is what a better one must stay below.

    Returns:
        What is left, rescaled so that a good selection costs about 100; a start for it, 1-swap optimal; and
        the cost, in its units, that every selection excluded by the fixing has at least.
    """
    start = descended(program, start)
    scaled = program.rescaled(start)
    threshold = scaled.objective(start)
    reduced = Reduced.nothing(scaled)
    while reduced.program.size:
        decided = eigenvalue_fixing(reduced.program, threshold)
        if not bool((decided >= 0).any()):
            break
        smaller, _ = reduced.fix(decided)
        if smaller.infeasible:
            break
        reduced = smaller
    inner = start[reduced.free]
    if reduced.program.size and not reduced.program.is_feasible(inner):
        inner = reduced.program.cheapest(reduced.program.quadratic.diagonal() + 2 * reduced.program.linear)
    return reduced, inner, threshold


def reduced_cost_fixing(
    split: ConvexSplit, point: FloatArray, threshold: float
) -> tuple[float, npt.NDArray[np.int8]]:
    """Bound from the tangent at ``point`` and what it fixes: 0, 1 or -1 for nothing (n,)."""
    lower, gradient = split.tangent(point)
    return lower, _fixed_by(split.program, gradient, threshold - lower)


def eigenvalue_fixing(program: RowProgram, threshold: float) -> npt.NDArray[np.int8]:
    """What ``xᵀQx ≥ λ Σ Q_jj x_j`` fixes, λ the smallest eigenvalue of Q scaled to a unit diagonal (n,)."""
    nothing = np.full(program.size, -1, dtype=np.int8)
    diagonal = program.quadratic.diagonal()
    if program.size < 2 or float(diagonal.max()) <= WIDE_RANGE * float(np.median(diagonal)):
        return nothing
    root = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0)), 0.0)
    scaled = program.quadratic * root[:, None] * root[None, :]
    lowest = float(scipy.linalg.eigvalsh(scaled, subset_by_index=[0, 0], check_finite=False)[0])
    lowest -= ROUNDING_FACTOR * EPSILON * program.size * float(np.abs(scaled).sum(1).max())
    cost = min(lowest, 1.0) * diagonal + 2 * program.linear
    # the sum of the smallest costs is small; its own terms, not the large ones, set its rounding
    chosen = program.cheapest(cost)
    lower = float(cost[chosen].sum()) + program.constant
    lower -= ROUNDING_FACTOR * EPSILON * program.size * (float(np.abs(cost[chosen]).sum()) + abs(lower))
    return _fixed_by(program, cost, threshold - lower)


def _fixed_by(program: RowProgram, cost: FloatArray, slack: float) -> npt.NDArray[np.int8]:
    """Variables whose exchange costs at least ``slack`` more than the cheapest selection."""
    decided = np.full(program.size, -1, dtype=np.int8)
    for start, end, count in zip(program.starts[:-1], program.starts[1:], program.counts, strict=True):
        block = cost[start:end]
        ordered = np.sort(block)
        inside, outside = ordered[count - 1], ordered[count]
        chosen = block <= inside
        decided[start:end][~chosen & (block - inside >= slack)] = 0
        if outside > inside:
            decided[start:end][chosen & (outside - block >= slack)] = 1
    return decided
