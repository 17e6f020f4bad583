"""The doubly nonnegative bound of a row, by an alternating direction method of multipliers.

    min <C, Y>   over Y = [[1, xᵀ], [x, X]] ⪰ 0,  diag(X) = x,  0 ≤ Y ≤ 1,  Y a_b = 0,   a_b = (-s_b, 1_b)

with ``C = [[0, qᵀ], [q, Q]]``. The sums ``Y a_b = 0`` remove one dimension per block (facial reduction), and
there trace(Y) = 1 + Σ s_b. One step projects on that spectral set (one eigendecomposition), one on the
entrywise constraints, and Z is the multiplier of their agreement.

Triangle inequalities (`triangles`) that Y violates join as cuts: their multipliers μ take projected gradient
steps beside Z, from an extrapolated Y, and enter C as the matrix of their weighted sum (a primal-dual step as
in Condat, Journal of Optimization Theory and Applications 158 (2013)). They halve what the relaxation leaves.

Any Z and μ give a bound: entries of ``C + A(μ) + Z`` above 0 are the nonnegative part N of a convex split,
and the best diagonal for the rest follows from one max-cut semidefinite program (`qcr`). The split is
certified in float64, so the iteration may stop at any moment.

Source: Oliveira, Wolkowicz, Xu, Mathematical Programming Computation 10 (2018), ADMM for the quadratic
assignment problem; with cuts: de Meijer, Sotirov, INFORMS Journal on Computing 36 (2024); Burer, Mathematical
Programming 120 (2009). Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import numpy as np
import scipy.linalg

from ...problems.row_program import BoolArray, FloatArray, Restriction, RowProgram
from .convex_split import ConvexSplit, split_with, with_triangles
from .presolve import Reduced, descended, reduced_cost_fixing
from .qcr import qcr_diagonal, qcr_split
from .row_tier import RowTier
from .triangles import Triangles

# Step length of the multiplier update: above 1 and below the golden ratio; with cuts, which are a third
# block, longer steps than 1 oscillate.
RELAXATION, RELAXATION_WITH_CUTS = 1.6, 1.0
# Presolve is repeated while it fixes at least this share of what is left.
WORTH_REPEATING = 0.05
# Penalty of disagreement, in median diagonal entries of Q: without and with cuts.
PENALTY, PENALTY_WITH_CUTS = 0.2, 0.6
# Share of the longest step that the multipliers of the cuts take; 0.4 oscillates on measured rows.
CUT_STEP = 0.25
# Steps between two searches for cuts, most new cuts of each and the smallest violation they need.
CUT_EVERY, CUT_MOST, CUT_VIOLATION = 30, 3000, 0.02
# Steps before the first cuts: what the start violates says little.
PLAIN_STEPS = 100


@dataclass(frozen=True, eq=False)
class DnnState:
    """Where the iteration stands.

    Attributes:
        Y: moment matrix of the entrywise constraints (n + 1, n + 1).
        Z: multiplier of the agreement of both sides (n + 1, n + 1), in units of ``scale``.
        scale: cost by which C was divided.
        residual: largest entry of the disagreement.
        triangles: the cuts, with multipliers in units of ``scale``.
    """

    Y: FloatArray
    Z: FloatArray
    scale: float
    residual: float
    triangles: Triangles = field(default_factory=Triangles.none)


def start_state(program: RowProgram) -> DnnState:
    """The rank-one start at the middle of each block."""
    point = np.concatenate([[1.0], program.center()])
    Y = np.outer(point, point)
    Y[np.diag_indices(len(Y))] = point
    scale = float(np.median(program.quadratic.diagonal()))
    if scale <= 0:
        scale = max(float(program.quadratic.diagonal().mean()), 1e-300)
    return DnnState(Y, np.zeros_like(Y), scale, np.inf)


def restrict_state(state: DnnState, restriction: Restriction) -> DnnState:
    """The state after fixing variables: their rows fold into the homogenising one."""
    keep = np.concatenate([[0], restriction.free + 1])
    ones = np.flatnonzero(restriction.fixed) + 1
    Z = state.Z[np.ix_(keep, keep)].copy()
    folded = state.Z[np.ix_(keep, ones)].sum(1)
    Z[0] += folded
    Z[:, 0] += folded
    Z[0, 0] += float(state.Z[np.ix_(ones, ones)].sum())
    return replace(
        state,
        Y=state.Y[np.ix_(keep, keep)].copy(),
        Z=Z,
        residual=np.inf,
        triangles=state.triangles.restrict(restriction),
    )


def iterate(
    program: RowProgram,
    state: DnnState,
    iterations: int,
    deadline: float = float("inf"),
    tolerance: float = 1e-5,
) -> DnnState:
    """``iterations`` steps, fewer when the residual falls below ``tolerance`` or the time is up."""
    cuts = len(state.triangles) > 0
    penalty = PENALTY_WITH_CUTS if cuts else PENALTY
    relaxation = RELAXATION_WITH_CUTS if cuts else RELAXATION
    n = program.size
    cost = np.zeros((n + 1, n + 1))
    cost[1:, 1:] = program.quadratic / state.scale
    cost[0, 1:] = program.linear / state.scale
    cost[1:, 0] = cost[0, 1:]
    normals = _normals(program)
    trace = 1.0 + float(program.counts.sum())
    Y, Z, residual = state.Y, state.Z, state.residual
    triangles = replace(state.triangles, weights=state.triangles.weights.copy())
    cut_cost = triangles.matrix(n)
    steps = CUT_STEP * penalty / triangles.overlaps(n)
    inner = np.arange(1, n + 1)
    for _ in range(iterations):
        if time.monotonic() > deadline or residual < tolerance:
            break
        R = _spectral_projection(Y + Z / penalty, normals, trace)
        M = R - (cost + cut_cost + Z) / penalty
        diagonal = np.clip((M[inner, inner] + 2 * M[0, 1:]) / 3, 0.0, 1.0)
        before = Y
        Y = np.clip(M, 0.0, 1.0)
        Y[0, 0] = 1.0
        Y[0, 1:] = diagonal
        Y[1:, 0] = diagonal
        Y[inner, inner] = diagonal
        if cuts:
            triangles.ascend(Y, before, steps, cut_cost)
        disagreement = Y - R
        Z = Z + relaxation * penalty * disagreement
        residual = float(np.abs(disagreement).max())
    return DnnState(Y, Z, state.scale, residual, triangles)


def iterate_with_cuts(
    program: RowProgram, state: DnnState, iterations: int, deadline: float = float("inf")
) -> DnnState:
    """``iterations`` steps with violated triangle inequalities as cuts, renewed on the way."""
    while iterations > 0 and time.monotonic() <= deadline:
        # the multipliers of new cuts are still to come: agreement so far says nothing
        triangles = state.triangles.renew(state.Y, CUT_VIOLATION, CUT_MOST)
        state = replace(state, triangles=triangles, residual=np.inf)
        state = iterate(program, state, min(iterations, CUT_EVERY), deadline)
        iterations -= CUT_EVERY
    return state


def split_of(program: RowProgram, state: DnnState, deadline: float = float("inf")) -> ConvexSplit:
    """The certified convex split of the current multipliers, with the best diagonal for its N."""
    triangles = state.triangles.keep(state.triangles.weights > 0).scaled(state.scale)
    shifted = with_triangles(program, triangles)
    nonnegative = np.maximum(shifted.quadratic + state.scale * state.Z[1:, 1:], 0.0)
    np.fill_diagonal(nonnegative, 0.0)
    rest = replace(shifted, quadratic=shifted.quadratic - nonnegative)
    return split_with(program, qcr_diagonal(rest, deadline=deadline), nonnegative, triangles)


def _normals(program: RowProgram) -> FloatArray:
    """Orthonormal basis (n + 1, blocks) of the vectors a_b."""
    normals = np.zeros((program.size + 1, len(program.counts)))
    for block, (start, end) in enumerate(zip(program.starts[:-1], program.starts[1:], strict=True)):
        normals[0, block] = -float(program.counts[block])
        normals[1 + start : 1 + end, block] = 1.0
    return np.asarray(scipy.linalg.qr(normals, mode="economic", check_finite=False)[0])


def _spectral_projection(matrix: FloatArray, normals: FloatArray, trace: float) -> FloatArray:
    """Nearest positive semidefinite matrix that is 0 on ``normals`` and has the given trace."""
    product = matrix @ normals
    corner = normals.T @ product
    correction = (product - normals @ (corner / 2)) @ normals.T
    faced = matrix - correction - correction.T
    # the directions of the normals leave the spectrum downwards, so the simplex projection skips them
    below = 2.0 * (trace + float(np.abs(faced).sum(1).max()))
    values, vectors = np.linalg.eigh(faced - below * (normals @ normals.T))
    kept = _simplex(values, trace)
    used = kept > 0
    return np.asarray((vectors[:, used] * kept[used]) @ vectors[:, used].T)


def _simplex(values: FloatArray, total: float) -> FloatArray:
    """Euclidean projection of ascending ``values`` on the nonnegative vectors with sum ``total``."""
    descending = values[::-1]
    excess = (np.cumsum(descending) - total) / np.arange(1, len(values) + 1)
    last = int(np.flatnonzero(descending > excess)[-1])
    return np.asarray(np.maximum(values - excess[last], 0.0))


@final
@dataclass(frozen=True)
class Dnn(RowTier):
    """Bound of each row by its doubly nonnegative relaxation (see the module).

    Args:
        iterations: steps of the alternating direction method.
        cuts: whether triangle inequalities join after the first steps.
        jobs: processes that share the rows.
    """

    name: ClassVar[str] = "dnn"

    iterations: int = 400
    cuts: bool = True
    jobs: int = 1

    def bound_row(self, program: RowProgram, start: BoolArray, deadline: float) -> float:
        """Bound of one rescaled program: fixing by the QCR bound, then this relaxation of what is left."""
        # what fixing excludes costs at least as much as this selection
        threshold = program.objective(descended(program, start))
        reduced, lower = Reduced.nothing(program), -np.inf
        while True:
            split = qcr_split(reduced.program, deadline=deadline)
            _, point = split.relax()
            bound, decided = reduced_cost_fixing(split, point, threshold)
            lower = max(lower, min(bound, threshold))
            fixed = int((decided >= 0).sum())
            if bound >= threshold or not fixed:
                break
            smaller, _ = reduced.fix(decided)
            if smaller.infeasible:
                return threshold
            if smaller.program.size == 0:
                break
            reduced = smaller
            if fixed < WORTH_REPEATING * len(decided):
                break
        if lower < threshold and time.monotonic() < deadline:
            plain = min(PLAIN_STEPS, self.iterations) if self.cuts else self.iterations
            state = iterate(reduced.program, start_state(reduced.program), plain, deadline)
            state = iterate_with_cuts(reduced.program, state, self.iterations - plain, deadline)
            split = split_of(reduced.program, state, deadline)
            lower = max(lower, min(split.bound(), threshold))
        return lower
