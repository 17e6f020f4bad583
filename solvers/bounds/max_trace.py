"""Largest weighted diagonal that can be taken off a matrix: max cᵀD subject to M - Diag(D) ⪰ 0.

The dual is min <M, X> over X ⪰ 0 with diag(X) = c; both are solved by the primal-dual interior-point
method of Helmberg, Rendl, Vanderbei and Wolkowicz (SIAM Journal on Optimization 6, 1996, section 3: the
semidefinite relaxation of max-cut). Every iterate has M - Diag(D) positive definite, so it may stop at
any moment; the caller checks that once more in float64.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

# Share of the way to the boundary of the cone that a shortened step takes.
TO_BOUNDARY = 0.95
STEP_SHRINK = 0.8
SMALLEST_STEP = 1e-5
# Weights below this share of their sum count as this share: the dual must stay inside its cone.
SMALLEST_WEIGHT = 1e-12


def max_trace_diagonal(
    matrix: Tensor,
    weights: Tensor,
    tolerance: float,
    iterations: int = 60,
    deadline: float = float("inf"),
) -> Tensor:
    """The diagonal ``D`` (n,), float64.

    Args:
        matrix: ``M`` (n, n), symmetric with a positive diagonal, float64.
        weights: ``c`` (n,), not negative, with a positive sum.
        tolerance: duality gap, in units of cᵀD, at which it stops.
        iterations: most steps.
        deadline: stop at this moment of ``time.monotonic()``.
    """
    scale = matrix.diagonal().sqrt()
    M = matrix / scale[:, None] / scale[None, :]
    c = weights * scale**2
    total = c.sum()
    c = (c / total).clamp_min(SMALLEST_WEIGHT)
    n = len(c)
    X = torch.diag(c)
    # diagonally dominant, so the start is inside the cone
    D = 1.0 - 1.1 * M.abs().sum(1)
    slack = M - torch.diag(D)
    factor = _cholesky(slack)
    barrier = float((slack * X).sum()) / (2 * n)
    primal, dual = 1.0, 1.0
    for _ in range(iterations):
        gap = float((M * X).sum()) - float(c @ D)
        if factor is None or gap * float(total) < tolerance or time.monotonic() > deadline:
            break
        inverse = torch.cholesky_inverse(factor)
        direction = _solve(inverse * X, barrier * inverse.diagonal() - c)
        if direction is None:
            break
        change = barrier * inverse - X - (inverse * direction[None, :]) @ X
        change = (change + change.T) / 2
        primal = _primal_step(X, change, min(1.0, primal / STEP_SHRINK**3))
        dual, next_factor = _dual_step(slack, direction, min(1.0, dual / STEP_SHRINK**3))
        if primal < SMALLEST_STEP and dual < SMALLEST_STEP:
            break
        X = X + primal * change
        D = D - dual * direction
        slack = M - torch.diag(D)
        factor = next_factor if next_factor is not None else _cholesky(slack)
        barrier = float((X * slack).sum()) / (2 * n)
        if primal + dual > 1.6:
            barrier /= 2
        if primal + dual > 1.9:
            barrier /= 5
    return D * scale**2


def _cholesky(matrix: Tensor) -> Tensor | None:
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) else factor


def _solve(matrix: Tensor, right: Tensor) -> Tensor | None:
    """Solve a positive definite system, with a growing ridge where rounding made it indefinite."""
    root = matrix.diagonal().clamp_min(1e-300).rsqrt()
    scaled = matrix * root[:, None] * root[None, :]
    ridge = 1e-13
    while ridge < 1e-3:
        scaled.diagonal().add_(ridge)
        factor = _cholesky(scaled)
        if factor is not None:
            return root * torch.cholesky_solve((root * right)[:, None], factor)[:, 0]
        ridge *= 100
    return None


def _primal_step(X: Tensor, change: Tensor, step: float) -> float:
    """Longest step found on the way down from ``step``, a bit longer than the last one."""
    while _cholesky(X + step * change) is None and step > SMALLEST_STEP:
        step *= STEP_SHRINK
    return step if step == 1.0 else TO_BOUNDARY * step


def _dual_step(slack: Tensor, direction: Tensor, step: float) -> tuple[float, Tensor | None]:
    """The same for the dual, with the factor of the new slack where it is known already."""
    factor = _cholesky(slack + step * torch.diag(direction))
    if factor is not None and step == 1.0:
        return step, factor
    while factor is None and step > SMALLEST_STEP:
        step *= STEP_SHRINK
        factor = _cholesky(slack + step * torch.diag(direction))
    return TO_BOUNDARY * step, None
