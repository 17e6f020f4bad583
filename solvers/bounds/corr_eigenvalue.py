"""One eigenvalue of corr(G): the cheapest bound.

With ``λ`` the smallest eigenvalue of ``R = corr(G)``, an error is at least ``λ Σ y_j² x_j + 2 Σ y_j t_j x_j +
const``, whose smallest value is a sum of smallest entries. Nothing is relaxed, so it takes no time and grows
weak where ``G`` is near singular. Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from .layer_tier import LayerTier
from .relaxed_rows import separable_bounds, smallest_eigenvalue, unit_correlation


@final
@dataclass(frozen=True)
class CorrEigenvalue(LayerTier):
    """Bound of each row by the smallest eigenvalue of the correlation matrix."""

    name: ClassVar[str] = "corr-eigenvalue"

    def bound_rows(self, problem: LayerProblem, deadline: float) -> Tensor:
        """One eigenvalue and a selection per row."""
        lowest = smallest_eigenvalue(unit_correlation(problem))
        diagonal = torch.full((problem.cols,), lowest, dtype=torch.float64, device=problem.device)
        return separable_bounds(problem, diagonal)
