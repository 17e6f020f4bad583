"""The naive relaxation: x in [0, 1] instead of {0, 1}, nothing else.

The Gram matrix is positive semidefinite only up to rounding, so its smallest eigenvalue, where negative, is
taken off as a diagonal (`relaxed_rows`). Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from .layer_tier import LayerTier
from .relaxed_rows import float_named, relax_rows, smallest_eigenvalue, unit_correlation


@final
@dataclass(frozen=True)
class Naive(LayerTier):
    """Bound of the plain relaxation, all rows in batches.

    Args:
        steps: most gradient steps.
        precision: relative duality gap at which a batch stops.
        dtype: of the gradient steps, ``float32`` or ``float64``; the bound is computed in float64.
    """

    name: ClassVar[str] = "naive"

    steps: int = 400
    precision: float = 1e-3
    dtype: str = "float32"

    def bound_rows(self, problem: LayerProblem, deadline: float) -> Tensor:
        """Relax with the diagonal 0, or slightly below it."""
        correlation = unit_correlation(problem)
        lowest = min(0.0, smallest_eigenvalue(correlation))
        diagonal = torch.full((problem.cols,), lowest, dtype=torch.float64, device=problem.device)
        correlation.diagonal().sub_(lowest)
        return relax_rows(
            problem, correlation, diagonal, self.steps, self.precision, deadline, float_named(self.dtype)
        ).bounds
