"""Relaxed rows of a layer with one shared diagonal, in batches on any device.

In the layer's normalised form (``R = corr(G)``, ``y = w √diag(G)``, ``t = h/√diag(G)``) a row costs
``(y∘x)ᵀ R (y∘x) + 2 (y∘t)ᵀ x + const``. For any ``δ`` (cols,) with ``A = R - Diag(δ) ⪰ 0`` and 0/1 points

    f(x) = (y∘x)ᵀ A (y∘x) + (δ∘y² + 2 y∘t)ᵀ x + const

is convex, so its tangent at any point, feasible or not, bounds every mask: φ(x) - gᵀx + (sum of the smallest
entries of g in each block). The point is improved by the accelerated projected gradient method (Beck,
Teboulle, SIAM Journal on Imaging Sciences 2, 2009) with restarts, in the metric y², where all rows share one
product with A per step. The last tangent is evaluated in float64, less the rounding of its sums.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem

# Entries of one batch of rows; about ten arrays of this size are alive at once.
BATCH_ENTRIES = 1 << 22
# Steps between two looks at the bound.
STEPS_PER_CHECK = 20
# Below this share of a row's mean y² the metric is floored: a wider range makes the projection stiff.
METRIC_FLOOR = 0.3
EPSILON = torch.finfo(torch.float64).eps
# Widest matrix whose smallest eigenvalue is computed; wider ones are factored instead.
EIGENVALUE_COLS = 1024


class RelaxedRows(NamedTuple):
    """Result of a relaxation.

    Attributes:
        bounds: lower bound of each row's error (rows,), float64.
        spread: ``Σ_rows y_j² x_j (1 - x_j)`` (cols,): where a better diagonal would pay.
        complete: whether every row was looked at before the deadline.
        points: relaxed point of each row that was looked at, else 0 (rows, cols), in the working dtype.
    """

    bounds: Tensor
    spread: Tensor
    complete: bool
    points: Tensor


def unit_correlation(problem: LayerProblem) -> Tensor:
    """``R`` in float64 with ones for dead channels too, whose y is 0 (cols, cols)."""
    correlation = problem.gram.correlation64
    correlation.diagonal().fill_(1.0)
    return correlation


def smallest_eigenvalue(matrix: Tensor) -> float:
    """A lower bound of the smallest eigenvalue of ``matrix`` (n, n), tight to rounding or to 1 %.

    Wide matrices are factored with growing shifts: a Cholesky factorisation that runs to its end proves
    positive definiteness up to (n + 1) ε trace (Rump, BIT Numerical Mathematics 46, 2006).
    """
    n = len(matrix)
    rounding = (n + 1) * EPSILON * float(matrix.diagonal().abs().sum())
    if n <= EIGENVALUE_COLS:
        return float(torch.linalg.eigvalsh(matrix)[0]) - 4 * rounding
    low = -rounding
    while not _positive_definite(matrix, low):
        low *= 4
    if low < -rounding:
        return low - 4 * rounding
    # the smallest eigenvalue is at most the mean of the diagonal
    high = float(matrix.diagonal().mean())
    low = rounding
    if not _positive_definite(matrix, low):
        return -5 * rounding
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        if _positive_definite(matrix, middle):
            low = middle
        else:
            high = middle
    return low - 4 * rounding


def semidefinite(matrix: Tensor) -> bool:
    """Whether one Cholesky factorisation proves ``matrix`` (n, n) positive semidefinite (Rump, 2006)."""
    rounding = (len(matrix) + 1) * EPSILON * float(matrix.diagonal().abs().sum())
    return _positive_definite(matrix, 4 * rounding)


def _positive_definite(matrix: Tensor, shift: float) -> bool:
    shifted = matrix.clone()
    shifted.diagonal().sub_(shift)
    _, info = torch.linalg.cholesky_ex(shifted)
    return int(info) == 0


def relax_rows(
    problem: LayerProblem,
    convex: Tensor,
    diagonal: Tensor,
    steps: int,
    precision: float,
    deadline: float,
    dtype: torch.dtype = torch.float32,
    own: Tensor | None = None,
) -> RelaxedRows:
    """Bound every row with one shared diagonal, and its own on top; rows cut off get the bound 0.

    Args:
        problem: the layer.
        convex: ``A = R - Diag(δ)`` (cols, cols), positive semidefinite, float64.
        diagonal: ``δ`` (cols,), float64.
        steps: most gradient steps.
        precision: relative duality gap at which a batch stops.
        deadline: on ``time.monotonic()``.
        dtype: of the gradient steps; the bound itself is computed in float64.
        own: more diagonal per row (rows, cols), float64, with ``A - Diag(own_r) ⪰ 0`` for each row r.
    """
    working = convex.to(dtype)
    largest = _largest_eigenvalue(working)
    bounds = torch.zeros(problem.rows, dtype=torch.float64, device=problem.device)
    spread = torch.zeros(problem.cols, dtype=torch.float64, device=problem.device)
    size = max(1, BATCH_ENTRIES // problem.cols)
    points = torch.zeros((problem.rows, problem.cols), dtype=dtype, device=problem.device)
    complete = True
    for first in range(0, problem.rows, size):
        if time.monotonic() >= deadline:
            complete = False
            break
        rows = slice(first, first + size)
        y = problem.scaled_weight[rows]
        taken = torch.zeros_like(y) if own is None else own[rows]
        linear = (diagonal + taken) * y**2
        curvature = 2 * 1.05 * (largest + (-taken).amax(1, keepdim=True).clamp_min(0.0))
        constant = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        if problem.drift is not None and problem.scaled_drift is not None:
            linear = linear + 2 * y * problem.scaled_drift[rows]
            constant = problem.drift.constant[rows]
        batch = _Batch(
            working,
            taken,
            y,
            linear,
            constant,
            problem.pattern.block - problem.pattern.keep,
            problem.pattern.block,
            curvature,
            dtype,
        )
        x = batch.descend(steps, precision, deadline).double()
        bounds[rows] = certified_tangent(convex, taken, y, linear, constant, x, batch.count, batch.block)
        points[rows] = x.to(dtype)
        spread += (y**2 * x * (1 - x)).sum(0)
    return RelaxedRows(bounds.clamp_min(0), spread, complete, points)


def separable_bounds(problem: LayerProblem, diagonal: Tensor) -> Tensor:
    """Bound of each row from ``(δ∘y² + 2 y∘t)ᵀ x + const`` alone (rows,), for a valid ``δ``."""
    bounds = torch.zeros(problem.rows, dtype=torch.float64, device=problem.device)
    count = problem.pattern.block - problem.pattern.keep
    size = max(1, BATCH_ENTRIES // problem.cols)
    for first in range(0, problem.rows, size):
        rows = slice(first, first + size)
        y = problem.scaled_weight[rows]
        cost = diagonal * y**2
        if problem.drift is not None and problem.scaled_drift is not None:
            cost = cost + 2 * y * problem.scaled_drift[rows]
        chosen = _smallest(cost, count, problem.pattern.block)
        value = chosen.sum(1)
        magnitude = chosen.abs().sum(1)
        if problem.drift is not None:
            value = value + problem.drift.constant[rows]
            magnitude = magnitude + problem.drift.constant[rows]
        bounds[rows] = value - 4 * problem.cols * EPSILON * magnitude
    return bounds.clamp_min(0)


def _smallest(values: Tensor, count: int, block: int) -> Tensor:
    """The ``count`` smallest entries of each block (rows, blocks * count)."""
    blocks = values.view(len(values), -1, block)
    return blocks.topk(count, dim=-1, largest=False).values.flatten(1)


def _tangent(
    convex: Tensor,
    taken: Tensor,
    y: Tensor,
    linear: Tensor,
    constant: Tensor,
    x: Tensor,
    count: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """φ(x) and the tangent bound of each row (rows,), in the dtype of the arguments."""
    moved = (y * x) @ convex - taken * y * x
    value = (moved * y * x).sum(1) + (linear * x).sum(1) + constant
    gradient = 2 * y * moved + linear
    return value, value - (gradient * x).sum(1) + _smallest(gradient, count, block).sum(1)


def certified_tangent(
    convex: Tensor,
    taken: Tensor,
    y: Tensor,
    linear: Tensor,
    constant: Tensor,
    x: Tensor,
    count: int,
    block: int,
) -> Tensor:
    """The tangent bound in float64, less what its sums can have lost (rows,)."""
    _, lower = _tangent(convex, taken, y, linear, constant, x, count, block)
    # each of the sums has at most cols terms, and entries of A are at most its largest diagonal entry
    largest = convex.diagonal().max().clamp_min(1.0) + taken.abs().amax(1)
    size = largest * y.abs().sum(1) * (y * x).abs().sum(1) + linear.abs().sum(1) + constant
    return lower - 8 * y.shape[1] * EPSILON * size


def _largest_eigenvalue(matrix: Tensor, steps: int = 60) -> float:
    """Largest eigenvalue by power iteration: only the step length depends on it."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    vector += torch.arange(len(matrix), dtype=matrix.dtype, device=matrix.device) / len(matrix)
    value = 1.0
    for _ in range(steps):
        vector = matrix @ (vector / vector.norm())
        value = float(vector.norm())
    return max(value, 1e-12)


class _Batch:
    """Accelerated projected gradient on the rows of one batch."""

    def __init__(
        self,
        convex: Tensor,
        taken: Tensor,
        y: Tensor,
        linear: Tensor,
        constant: Tensor,
        count: int,
        block: int,
        curvature: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.convex, self.taken = convex, taken.to(dtype)
        self.count, self.block = count, block
        # one unit per row keeps every entry in the range of float32
        unit = (y**2).mean(1, keepdim=True).clamp_min(1e-300)
        self.y = (y / unit.sqrt()).to(dtype)
        self.linear = (linear / unit).to(dtype)
        self.constant = (constant / unit[:, 0]).to(dtype)
        self.metric = curvature.to(dtype) * (self.y**2).clamp_min(METRIC_FLOOR)
        self.multiplier = torch.zeros((len(y), y.shape[1] // block, 1), dtype=dtype, device=y.device)

    def descend(self, steps: int, precision: float, deadline: float) -> Tensor:
        """The point of each row with the best bound (rows, cols)."""
        x = torch.full_like(self.y, self.count / self.block)
        ahead, best_x = x, x
        _, best = self._look(x)
        momentum = torch.ones((len(x), 1), dtype=x.dtype, device=x.device)
        for step in range(1, steps + 1):
            moved = self.y * ahead
            gradient = 2 * self.y * (moved @ self.convex - self.taken * moved) + self.linear
            after = self._project(ahead - gradient / self.metric)
            # restart a row whose momentum points uphill (O'Donoghue, Candès, 2015, gradient scheme)
            uphill = (self.metric * (ahead - after) * (after - x)).sum(1, keepdim=True) > 0
            momentum = torch.where(uphill, 1.0, momentum)
            following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
            ahead = after + torch.where(uphill, 0.0, (momentum - 1) / following) * (after - x)
            x, momentum = after, following
            if step % STEPS_PER_CHECK == 0 or step == steps:
                value, lower = self._look(x)
                better = lower > best
                best_x = torch.where(better[:, None], x, best_x)
                best = torch.where(better, lower, best)
                settled = value - best <= precision * value.abs()
                if bool(settled.all()) or time.monotonic() >= deadline:
                    break
        return best_x

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _tangent(
            self.convex, self.taken, self.y, self.linear, self.constant, x, self.count, self.block
        )

    def _project(self, point: Tensor, rounds: int = 10) -> Tensor:
        """Nearest point of [0, 1] with the block sums, in the metric, up to a few Newton steps.

        ``x = clip(point - μ/metric, 0, 1)`` with one μ per block, found by Newton steps from the last one,
        bisecting where they leave the bracket.
        """
        blocks = point.view(len(point), -1, self.block)
        metric = self.metric.view_as(blocks)
        inverse = 1 / metric
        low = ((blocks - 1) * metric).amin(-1, keepdim=True)
        high = (blocks * metric).amax(-1, keepdim=True)
        mu = self.multiplier.clamp(low, high)
        for _ in range(rounds):
            raw = blocks - mu * inverse
            excess = raw.clamp(0, 1).sum(-1, keepdim=True) - self.count
            low = torch.where(excess > 0, mu, low)
            high = torch.where(excess < 0, mu, high)
            inside = torch.where((raw > 0) & (raw < 1), inverse, 0.0).sum(-1, keepdim=True)
            newton = mu + excess / inside.clamp_min(1e-30)
            outside = (newton < low) | (newton > high)
            mu = torch.where(outside, (low + high) / 2, newton)
        self.multiplier = mu
        return (blocks - mu * inverse).clamp(0, 1).view_as(point)


def float_named(dtype: str) -> torch.dtype:
    """The dtype of relaxations that is called so.

    Raises:
        InputError: for anything but ``float32`` and ``float64``.
    """
    if dtype not in ("float32", "float64"):
        raise InputError(f"dtype of a bound: expected float32 or float64, found {dtype!r}")
    return torch.float32 if dtype == "float32" else torch.float64
