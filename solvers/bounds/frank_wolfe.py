"""The dual gap of the Frank-Wolfe algorithm on the relaxed mask.

Roux, Zimmer, d'Aspremont and Pokutta (*SparseFW*, arXiv 2510.13713) relax the mask of a row to [0, 1] and
minimise the error, which is convex, by the Frank-Wolfe algorithm (Jaggi, ICML 2013, algorithms 1 and 2). Each
step already has a certificate. With x the pruned part of a row and v the vertex of smallest ``∇f(x)ᵀv``,

    gap(x) = ∇f(x)ᵀ(x - v),    f(x) - gap(x) = min over relaxed masks of the tangent of f at x ≤ min f.

So that is a lower bound of the error of every mask, in any step. A step has the length that is best on its
line, ``gap / (2 dᵀAd)`` for ``d = v - x`` and at most 1; the authors take ``2 / (t + 2)``. All is in float64,
and the best tangent is evaluated anew, less the rounding of its sums (`relaxed_rows`).

It is the relaxation of the `naive` tier, whose gradient steps prove the same value in fewer steps; here
nothing is projected. Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from .layer_tier import LayerTier
from .relaxed_rows import BATCH_ENTRIES, certified_tangent, smallest_eigenvalue, unit_correlation


@final
@dataclass(frozen=True)
class FrankWolfe(LayerTier):
    """Bound of the plain relaxation by Frank-Wolfe steps, all rows in batches.

    Args:
        steps: most steps.
        precision: gap as a share of the relaxed error at which a batch stops.
    """

    name: ClassVar[str] = "frank-wolfe"

    steps: int = 2000
    precision: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.precision >= 0:
            raise InputError(
                "frank-wolfe takes steps until a share is reached: expected steps ≥ 0 and precision ≥ 0, "
                f"found {self.steps} and {self.precision:g}"
            )

    def bound_rows(self, problem: LayerProblem, deadline: float) -> Tensor:
        """Step, and certify the best point of each row; rows that are not reached get the bound 0."""
        convex = unit_correlation(problem)
        lowest = min(0.0, smallest_eigenvalue(convex))
        convex.diagonal().sub_(lowest)
        bounds = torch.zeros(problem.rows, dtype=torch.float64, device=problem.device)
        pruned, block = problem.pattern.block - problem.pattern.keep, problem.pattern.block
        size = max(1, BATCH_ENTRIES // problem.cols)
        for first in range(0, problem.rows, size):
            if time.monotonic() >= deadline:
                break
            rows = slice(first, first + size)
            y = problem.scaled_weight[rows]
            linear = lowest * y**2
            constant = torch.zeros(len(y), dtype=torch.float64, device=y.device)
            if problem.drift is not None and problem.scaled_drift is not None:
                linear = linear + 2 * y * problem.scaled_drift[rows]
                constant = problem.drift.constant[rows]
            x = self._best_point(convex, y, linear, constant, (pruned, block), deadline)
            bounds[rows] = certified_tangent(
                convex, torch.zeros_like(y), y, linear, constant, x, pruned, block
            )
        return bounds.clamp_min(0)

    def _best_point(
        self,
        convex: Tensor,
        y: Tensor,
        linear: Tensor,
        constant: Tensor,
        pattern: tuple[int, int],
        deadline: float,
    ) -> Tensor:
        """The point of each row whose tangent is the highest bound (rows, cols).

        Args:
            convex: A (cols, cols), positive semidefinite.
            y: scaled weights (rows, cols).
            linear: of f (rows, cols).
            constant: of f (rows,).
            pattern: how many are pruned of how many.
            deadline: on ``time.monotonic()``.
        """
        pruned, block = pattern
        x = torch.full_like(y, pruned / block)
        moved = (y * x) @ convex
        best, highest = x, torch.full_like(constant, -torch.inf)
        for step in range(self.steps + 1):
            gradient = 2 * y * moved + linear
            lowest = gradient.view(len(y), -1, block).topk(pruned, dim=-1, largest=False).indices
            vertex = torch.zeros_like(y).view(len(y), -1, block).scatter_(-1, lowest, 1.0).view_as(y)
            direction = vertex - x
            gap = -(gradient * direction).sum(1)
            value = (moved * y * x).sum(1) + (linear * x).sum(1) + constant
            higher = value - gap > highest
            best = torch.where(higher[:, None], x, best)
            highest = torch.where(higher, value - gap, highest)
            settled = value - highest <= self.precision * value.abs()
            if step == self.steps or bool(settled.all()) or time.monotonic() >= deadline:
                break
            ahead = (y * direction) @ convex
            curvature = (ahead * y * direction).sum(1)
            length = torch.where(curvature > 0, gap / (2 * curvature), 1.0).clamp(0, 1)[:, None]
            x = x + length * direction
            moved = moved + length * ahead
        return best
