"""Least squares on the kept weights of many rows that share one Gram matrix.

In the scaled form ``R = corr(G)``, ``b = h / √diag(G)`` and with the lost part ``a = (w - ŵ) √diag(G)`` of a
row, fixed to ``y = w √diag(G)`` where its mask prunes and free on the kept weights K, the row's error is
``aᵀ R a + 2 bᵀ a`` up to a constant. With ``c = R a⁰ + b``, ``a⁰`` being ``y`` on pruned weights and 0 on
kept ones, it is smallest for

    (R_KK + λ I) a_K = -c_K

The damping λ adds ``λ Σ_K G_jj (w_j - ŵ_j)²``: a share of the mean diagonal of ``R``, which is 1, so no
channel's scale matters. Two ways to solve it, both batched over rows in float64:

- **Cholesky** factors of ``R_KK + λ I``, one per row: ``Σ |K|³ / 3`` operations.
- **Conjugate gradients** (Hestenes and Stiefel, 1952) on all rows at once, preconditioned with the diagonal
  of ``G``, which is what scaling to ``R`` does: one product (rows, cols) x (cols, cols) per iteration.

Under an output metric S the rows are coupled: ``P_K (S A R + λ diag(S) A) = -P_K S (A⁰ R + B)``, ``P_K``
keeping the kept entries of a layer. There conjugate gradients are preconditioned with ``P_K (S + ε I)⁻¹``,
which is the inverse of what S does where nothing is pruned and R is the identity.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidProblemError

# Entries of the float64 matrices that are factored at once: 256 MB.
FACTOR_ENTRIES = 1 << 25
# A row whose matrix cannot be factored is tried with ten times the damping, up to this one. A valid Gram
# matrix has no eigenvalue of corr(G) below -1e-4, so that a thousand times as much always suffices.
SMALLEST_DAMPING, LARGEST_DAMPING = 1e-8, 0.1

# Share of the mean diagonal of an output metric that is added to it before it preconditions.
PRECONDITIONER_SHIFT = 1e-2


class KeptSolve(NamedTuple):
    """What became of some rows.

    Attributes:
        lost: ``a`` (rows, cols) on kept weights, 0 elsewhere, float64.
        iterations: of conjugate gradients (rows,), int64; 0 for Cholesky.
        residual: ``‖(R_KK + λ I) a_K + c_K‖ / ‖c_K‖`` (rows,), float64; 0 where ``c_K`` is 0.
        damping: λ of each row (rows,), float64.
        converged: whether the residual is within the tolerance (rows,), bool.
    """

    lost: Tensor
    iterations: Tensor
    residual: Tensor
    damping: Tensor
    converged: Tensor


def by_cholesky(correlation: Tensor, cost: Tensor, kept: Tensor, damping: float) -> KeptSolve:
    """Solve row by row with Cholesky factors.

    Args:
        correlation: ``R`` (cols, cols), float64.
        cost: ``c`` (rows, cols), float64.
        kept: K (rows, cols), bool; live channels only.
        damping: λ; rows that cannot be factored with it get ten times as much until they can.

    Raises:
        InvalidProblemError: if a row cannot be factored with the largest damping.
    """
    rows = len(cost)
    lost = torch.zeros_like(cost)
    residual = torch.zeros(rows, dtype=torch.float64, device=cost.device)
    dampings = torch.full_like(residual, damping)
    counts = kept.sum(1)
    # rows of a batch are padded to the widest: neighbours in this order have nearly the same width
    order = counts.argsort(stable=True)
    first = 0
    while first < rows:
        last = first + max(1, FACTOR_ENTRIES // max(1, int(counts[order[-1]]) ** 2))
        batch = order[first:last]
        width = int(counts[batch].max())
        first = last
        if width == 0:
            continue
        columns = (~kept[batch]).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        valid = kept[batch].gather(1, columns)
        matrix = correlation[columns[:, :, None], columns[:, None, :]]
        matrix *= valid[:, :, None] & valid[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_((~valid).double())
        right = -cost[batch].gather(1, columns) * valid
        solved, used = _factored(matrix, right, dampings[batch])
        missing = torch.einsum("rij,rj->ri", matrix, solved) + used[:, None] * solved - right
        residual[batch] = missing.norm(dim=1) / _positive(right.norm(dim=1))
        dampings[batch] = used
        lost[batch] = torch.zeros_like(cost[batch]).scatter(1, columns, solved * valid)
    zeros = torch.zeros(rows, dtype=torch.int64, device=cost.device)
    return KeptSolve(lost, zeros, residual, dampings, torch.ones_like(zeros, dtype=torch.bool))


def _factored(matrix: Tensor, right: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions (rows, width) of damped systems (rows, width, width), and the damping that they took."""
    damping = damping.clone()
    solved = torch.zeros_like(right)
    left = torch.arange(len(matrix), device=matrix.device)
    while len(left):
        damped = matrix[left]
        damped.diagonal(dim1=1, dim2=2).add_(damping[left, None])
        factor, info = torch.linalg.cholesky_ex(damped)
        done = info == 0
        good = left[done]
        solved[good] = torch.cholesky_solve(right[good, :, None], factor[done]).squeeze(2)
        left = left[~done]
        if len(left):
            damping[left] = (10 * damping[left]).clamp_min(SMALLEST_DAMPING)
            if float(damping[left].max()) > LARGEST_DAMPING:
                raise InvalidProblemError(
                    "least squares on kept weights: expected a Gram matrix that can be factored with a "
                    f"damping of at most {LARGEST_DAMPING:g} of its diagonal, found {len(left)} rows that "
                    "cannot"
                )
    return solved, damping


def by_conjugate_gradients(
    correlation: Tensor,
    cost: Tensor,
    kept: Tensor,
    damping: float,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
    deadline: float,
) -> KeptSolve:
    """Solve all rows at once with conjugate gradients; every iteration lowers every row's damped error.

    Args:
        correlation: ``R`` (cols, cols), float64.
        cost: ``c`` (rows, cols), float64.
        kept: K (rows, cols), bool; live channels only.
        damping: λ.
        start: first guess of ``a`` (rows, cols), float64; only its kept part counts.
        tolerance: relative residual at which a row is done.
        max_iterations: the most iterations of a row.
        deadline: when to stop, on ``time.monotonic()``.
    """
    lost = start * kept
    scale = _positive((cost * kept).norm(dim=1))
    residual = -cost * kept - _product(correlation, lost, kept, damping)
    direction = residual.clone()
    squared = (residual * residual).sum(1)
    iterations = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    sizes = squared.sqrt() / scale
    running = sizes > tolerance
    found, left = lost.clone(), torch.arange(len(cost), device=cost.device)
    for _ in range(max_iterations):
        if not bool(running.any()) or time.monotonic() >= deadline:
            break
        if int(running.sum()) < 0.75 * len(left):  # finished rows leave the product
            found[left] = lost
            left, lost, residual = left[running], lost[running], residual[running]
            direction, squared, kept = direction[running], squared[running], kept[running]
            running = running[running]
        moved = _product(correlation, direction, kept, damping)
        curvature = (direction * moved).sum(1)
        # no curvature is left but that of rounding: the row has what these numbers can give it
        running &= curvature > 0
        step = torch.where(running, squared / _positive(curvature), 0.0)[:, None]
        lost += step * direction
        residual -= step * moved
        before, squared = squared, (residual * residual).sum(1)
        iterations[left] += running
        sizes[left] = squared.sqrt() / scale[left]
        running &= sizes[left] > tolerance
        direction = residual + (squared / _positive(before))[:, None] * direction
    found[left] = lost
    dampings = torch.full_like(sizes, damping)
    return KeptSolve(found, iterations, sizes, dampings, sizes <= tolerance)


class CoupledSolve(NamedTuple):
    """What became of a layer whose rows are coupled.

    Attributes:
        lost: ``A`` (rows, cols) on kept weights, 0 elsewhere, float64.
        iterations: of conjugate gradients.
        residual: of the normal equations, relative to their right-hand side.
    """

    lost: Tensor
    iterations: int
    residual: float


def coupled_by_conjugate_gradients(
    metric: Tensor,
    correlation: Tensor,
    drift: Tensor | None,
    kept: Tensor,
    damping: float,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
    deadline: float,
) -> CoupledSolve:
    """Solve all rows of a layer under an output metric; every iteration lowers the layer's damped error.

    Args:
        metric: ``S`` (rows, rows), float64.
        correlation: ``R`` (cols, cols), float64.
        drift: ``B`` (rows, cols), float64, None without.
        kept: K (rows, cols), bool; live channels only.
        damping: λ.
        start: the lost part ``A`` (rows, cols), float64: fixed where it is pruned, a first guess elsewhere.
        tolerance: relative residual at which the layer is done.
        max_iterations: the most iterations.
        deadline: when to stop, on ``time.monotonic()``.
    """
    diagonal = metric.diagonal()[:, None]
    share = PRECONDITIONER_SHIFT * float(diagonal.mean())
    inverse = torch.cholesky_inverse(
        torch.linalg.cholesky(
            metric + share * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        )
    )

    def product(lost: Tensor) -> Tensor:
        return (metric @ (lost @ correlation) + damping * diagonal * lost).mul_(kept)

    fixed = start.masked_fill(kept, 0) @ correlation
    right = -(metric @ (fixed if drift is None else fixed + drift)).mul_(kept)
    lost = start * kept
    residual = right - product(lost)
    scale = float(right.norm()) or 1.0
    size = float(residual.norm()) / scale
    better = (inverse @ residual).mul_(kept)
    direction, squared = better, (residual * better).sum()
    done = 0
    while done < max_iterations and size > tolerance and time.monotonic() < deadline:
        moved = product(direction)
        curvature = (direction * moved).sum()
        if not bool(curvature > 0):  # no curvature is left but that of rounding
            break
        step = squared / curvature
        lost += step * direction
        residual -= step * moved
        done += 1
        size = float(residual.norm()) / scale
        better = (inverse @ residual).mul_(kept)
        before, squared = squared, (residual * better).sum()
        direction = better + squared / before * direction
    return CoupledSolve(lost, done, size)


def _product(correlation: Tensor, lost: Tensor, kept: Tensor, damping: float) -> Tensor:
    return torch.addmm(lost, lost, correlation, beta=damping).mul_(kept)


def _positive(values: Tensor) -> Tensor:
    """``values``, with 1 in place of 0, to divide by."""
    return torch.where(values > 0, values, 1.0)
