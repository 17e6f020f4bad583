"""One row of a layer problem as a binary quadratic program, the form every exact solver works on.

With ``x_j = 1`` where weight j is pruned, the error of a row is

    f(x) = xᵀQx + 2qᵀx + const,    Q = diag(w) G diag(w),   q = h∘w,    1ᵀx_b = s_b in each block b

(`layer`: ``G`` Gram matrix, ``h`` and ``const`` the drift). At raw scale (1e-6 to 1e-8) the
absolute tolerances of integer programming libraries swallow the objective and wrong masks are called
optimal, so a program is divided by ``unit`` until a good mask costs about 100; whatever a solver
claims is multiplied back and recomputed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .layer import LayerProblem

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# What a good mask of a rescaled row costs: far above the absolute tolerances (1e-6 to 1e-9) of
# every library and far below the values (1e+15) at which they start to distrust their input.
TARGET_OBJECTIVE = 100.0
# An objective below this share of the sum of all |terms| is rounding: it is not scaled up to 100.
SMALLEST_SHARE = 1e-9


@dataclass(frozen=True, eq=False)
class RowProgram:
    """min xᵀQx + 2qᵀx + constant over x in {0, 1}^n with a fixed number of ones per block.

    Args:
        quadratic: ``Q`` (n, n), symmetric, positive semidefinite up to rounding.
        linear: ``q`` (n,); its weight in the objective is 2.
        constant: error of the empty selection.
        starts: first variable of each block and n at the end (blocks + 1,).
        counts: ones per block (blocks,).
        unit: error of the original row per unit of this program.
    """

    quadratic: FloatArray
    linear: FloatArray
    constant: float
    starts: IntArray
    counts: IntArray
    unit: float = 1.0

    @property
    def size(self) -> int:
        """Number of variables n."""
        return len(self.linear)

    @cached_property
    def magnitude(self) -> float:
        """Largest value that a sum of terms of f can reach on the way: what rounding is relative to."""
        terms = np.abs(self.quadratic).sum(1) + 2 * np.abs(self.linear)
        return float(sum(block.sum() for block in self._largest(terms)) + abs(self.constant))

    @cached_property
    def block_of(self) -> IntArray:
        """Block of each variable (n,)."""
        return np.repeat(np.arange(len(self.counts)), np.diff(self.starts))

    def objective(self, x: npt.NDArray[np.generic]) -> float:
        """f(x) in float64 for any x (n,)."""
        point = np.asarray(x, dtype=np.float64)
        return float(point @ self.quadratic @ point + 2 * (self.linear @ point) + self.constant)

    def is_feasible(self, x: npt.NDArray[np.generic]) -> bool:
        """Whether x (n,) is 0 or 1 with the right number of ones in each block."""
        point = np.asarray(x)
        binary = bool(np.isin(point, (0, 1)).all())
        return binary and bool(
            (np.add.reduceat(point.astype(np.int64), self.starts[:-1]) == self.counts).all()
        )

    def center(self) -> FloatArray:
        """The point with equal entries in each block (n,)."""
        return np.asarray((self.counts / np.diff(self.starts))[self.block_of], dtype=np.float64)

    def cheapest(self, cost: FloatArray) -> BoolArray:
        """The allowed selection (n,) with the smallest ``cost`` (n,); ties go to the lowest index."""
        chosen = np.zeros(self.size, dtype=np.bool_)
        for start, end, count in zip(self.starts[:-1], self.starts[1:], self.counts, strict=True):
            chosen[start + np.argsort(cost[start:end], kind="stable")[:count]] = True
        return chosen

    def scaled(self, divisor: float) -> RowProgram:
        """The same program with every term divided by ``divisor``."""
        return replace(
            self,
            quadratic=self.quadratic / divisor,
            linear=self.linear / divisor,
            constant=self.constant / divisor,
            unit=self.unit * divisor,
        )

    def rescaled(self, x: npt.NDArray[np.generic]) -> RowProgram:
        """The program scaled so that the feasible point ``x`` (n,) costs about 100."""
        reference = max(self.objective(x), SMALLEST_SHARE * self.magnitude)
        return self.scaled(reference / TARGET_OBJECTIVE) if reference > 0 else self

    def _largest(self, terms: FloatArray) -> list[FloatArray]:
        return [
            np.sort(terms[start:end])[len(terms[start:end]) - count :]
            for start, end, count in zip(self.starts[:-1], self.starts[1:], self.counts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Restriction:
    """A program in which some variables are fixed, and the way back.

    Attributes:
        program: the program of the free variables; blocks without freedom are gone.
        free: their indices in the original program (m,).
        fixed: values of the fixed variables in the original program (n,); free entries are False.
    """

    program: RowProgram
    free: IntArray
    fixed: BoolArray

    def expand(self, x: npt.NDArray[np.generic]) -> BoolArray:
        """The full point (n,) of a point (m,) of the restricted program."""
        full = self.fixed.copy()
        full[self.free] = np.asarray(x).astype(np.bool_)
        return full


def restrict(program: RowProgram, decided: npt.NDArray[np.int8]) -> Restriction:
    """Fix variables: ``decided`` (n,) holds 0 or 1 where a variable is fixed and -1 where it is free.

    Blocks that have no freedom left are fixed as well. The counts must still be reachable.
    """
    decided = decided.copy()
    for block, count in enumerate(program.counts):
        inside = slice(program.starts[block], program.starts[block + 1])
        ones = int((decided[inside] == 1).sum())
        free = decided[inside] < 0
        if ones == count:
            decided[inside][free] = 0
        elif ones + int(free.sum()) == count:
            decided[inside][free] = 1
    free_index = np.flatnonzero(decided < 0)
    fixed = decided == 1
    Q = program.quadratic
    ones_index = np.flatnonzero(fixed)
    linear = program.linear[free_index] + Q[np.ix_(free_index, ones_index)].sum(1)
    constant = (
        program.constant
        + float(Q[np.ix_(ones_index, ones_index)].sum())
        + 2 * float(program.linear[ones_index].sum())
    )
    blocks, sizes = np.unique(program.block_of[free_index], return_counts=True)
    taken = np.bincount(program.block_of[ones_index], minlength=len(program.counts))
    inner = RowProgram(
        quadratic=np.ascontiguousarray(Q[np.ix_(free_index, free_index)]),
        linear=linear,
        constant=constant,
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        counts=(program.counts - taken)[blocks].astype(np.int64),
        unit=program.unit,
    )
    return Restriction(inner, free_index.astype(np.int64), fixed)


def row_program(problem: LayerProblem, row: int) -> RowProgram:
    """The program of one row of ``problem``, at its original scale (``unit`` is 1)."""
    weight = problem.weight[row].double().cpu().numpy()
    gram = problem.gram.matrix.cpu().numpy()
    linear = np.zeros_like(weight)
    constant = 0.0
    if problem.drift is not None:
        linear = problem.drift.linear[row].double().cpu().numpy() * weight
        constant = float(problem.drift.constant[row])
    block = problem.pattern.block
    blocks = problem.cols // block
    return RowProgram(
        quadratic=weight[:, None] * gram * weight[None, :],
        linear=linear,
        constant=constant,
        starts=np.arange(blocks + 1, dtype=np.int64) * block,
        counts=np.full(blocks, block - problem.pattern.keep, dtype=np.int64),
    )
