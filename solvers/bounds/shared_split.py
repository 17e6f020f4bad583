"""One diagonal per layer: the bound that scales to the layers of large language models.

A diagonal ``δ`` with ``R - Diag(δ) ⪰ 0`` turns into a linear cost, which is exact on 0/1 points; the rest is
relaxed row by row in batches (`relaxed_rows`). The diagonal is the largest one weighted by where the relaxed
rows are fractional, ``c_j = Σ_rows y_j² x_j (1 - x_j)`` (`max_trace`), averaged over the
rounds because the weights of the last round alone make them oscillate. Its positive semidefiniteness is
checked once more in float64. It starts from ``δ = λ`` for every channel, the smallest eigenvalue of R, so
rows never end below the `corr_eigenvalue` tier, nor below the `naive` one by more than its precision.

Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from .layer_tier import LayerTier
from .max_trace import max_trace_diagonal
from .relaxed_rows import (
    RelaxedRows,
    float_named,
    relax_rows,
    separable_bounds,
    smallest_eigenvalue,
    unit_correlation,
)

# Share of the remaining time that the search for a diagonal may take.
DIAGONAL_SHARE = 0.4


@final
@dataclass(frozen=True)
class SharedSplit(LayerTier):
    """Bound of all rows with one diagonal per layer.

    Args:
        rounds: diagonals to find, each followed by a relaxation.
        steps: most gradient steps of a relaxation.
        precision: relative duality gap of a relaxation and of the search for a diagonal.
        dtype: of the gradient steps, ``float32`` or ``float64``; the bound is computed in float64.
    """

    name: ClassVar[str] = "shared-split"

    rounds: int = 4
    steps: int = 400
    precision: float = 1e-3
    dtype: str = "float32"

    def bound_rows(self, problem: LayerProblem, deadline: float) -> Tensor:
        """Alternate between the diagonal and the relaxed rows; keep the best bound of each row."""
        correlation = unit_correlation(problem)
        lowest = smallest_eigenvalue(correlation)
        even = torch.full((problem.cols,), lowest, dtype=torch.float64, device=problem.device)
        bounds = separable_bounds(problem, even)
        # the same diagonal for every channel is a start that no interrupted search falls below
        convex = correlation - torch.diag(even)
        first = relax_rows(
            problem, convex, even, self.steps, self.precision, deadline, float_named(self.dtype)
        )
        bounds = torch.maximum(bounds, first.bounds)
        weights = (problem.scaled_weight**2).sum(0)
        weights = weights / weights.sum().clamp_min(1e-300)
        for _ in range(self.rounds):
            if time.monotonic() >= deadline or not float(weights.sum()) > 0:
                break
            relaxed = self._relaxed(problem, correlation, weights, deadline)
            bounds = torch.maximum(bounds, relaxed.bounds)
            spread = relaxed.spread
            if not relaxed.complete or not float(spread.sum()) > 0:
                break
            weights = (weights + spread / spread.sum()) / 2
        return bounds

    def _relaxed(
        self, problem: LayerProblem, correlation: Tensor, weights: Tensor, deadline: float
    ) -> RelaxedRows:
        """Relax with the best diagonal for ``weights`` that the search reaches in its share of the time."""
        now = time.monotonic()
        diagonal = max_trace_diagonal(
            correlation,
            weights,
            tolerance=self.precision * float(weights.sum()),
            deadline=now + DIAGONAL_SHARE * (deadline - now),
        )
        convex = correlation - torch.diag(diagonal)
        diagonal = diagonal + min(0.0, smallest_eigenvalue(convex))
        convex = correlation - torch.diag(diagonal)
        return relax_rows(
            problem, convex, diagonal, self.steps, self.precision, deadline, float_named(self.dtype)
        )
