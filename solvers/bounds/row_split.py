"""One diagonal per row, on the channels where the row is fractional: the strongest bound of wide layers.

In the layer's normalised form (`relaxed_rows`) a diagonal ``δ`` with ``R - Diag(δ) ⪰ 0`` pays where the
relaxed row is fractional, ``c_j = y_j² x_j (1 - x_j)``, and rows differ in where that is: a diagonal shared
by hundreds of rows hardly pays at all. With δ zero outside a set F of channels,

    R - Diag(δ) ⪰ 0   if and only if   M_F - Diag(δ_F) ⪰ 0,    M_F = ((R⁻¹)_FF)⁻¹  (the Schur complement)

so after one inverse per layer the best diagonal for the most fractional channels of a row is a problem of the
size of F (`max_trace`), whatever the width of the layer. One Cholesky factorisation of ``R - Diag(δ)`` in
float64 then proves it; rows whose diagonal fails are not bounded with it. The rows are relaxed in batches
that share R.

Covers per-row and N:M patterns and drift. Rows never end below the `corr_eigenvalue` tier, nor below the
`naive` one by more than its precision.
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
from .max_trace import max_trace_diagonal
from .relaxed_rows import (
    float_named,
    relax_rows,
    semidefinite,
    separable_bounds,
    smallest_eigenvalue,
    unit_correlation,
)

# Share of the time left after the first relaxation that the diagonals may take.
DIAGONAL_SHARE = 0.6
# Lifts R before it is inverted, in units of its diagonal: its inverse stays within float64.
RIDGE = 1e-7
# What y² itself weighs against where the row is fractional: the next relaxation is fractional elsewhere too.
ELSEWHERE = 0.5
# Channels of narrow layers whose diagonal is searched: what a core does in some tenths of a second.
FEWEST_CHANNELS = 320
# Channels below this share of the most fractional one count as settled.
SETTLED = 1e-6


@final
@dataclass(frozen=True)
class RowSplit(LayerTier):
    """Bound of all rows with one diagonal per row (see the module).

    Args:
        channels: most channels of a row whose diagonal is searched, None for a fifth of them and at least
            320; the effort grows with the third power.
        steps: most gradient steps of a relaxation.
        precision: relative duality gap of a relaxation and of the search for a diagonal.
        dtype: of the gradient steps, ``float32`` or ``float64``; the bound is computed in float64.
    """

    name: ClassVar[str] = "row-split"

    channels: int | None = None
    steps: int = 400
    precision: float = 1e-3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.channels is not None and self.channels < 1:
            raise InputError(f"channels is a count: expected at least 1 or None, found {self.channels}")

    def bound_rows(self, problem: LayerProblem, deadline: float) -> Tensor:
        """Relax once, find the diagonal of each row, relax again; keep the better bound of each row."""
        correlation = unit_correlation(problem)
        lowest = smallest_eigenvalue(correlation)
        even = torch.full((problem.cols,), lowest, dtype=torch.float64, device=problem.device)
        bounds = separable_bounds(problem, even)
        base = min(lowest, 0.0)
        convex = correlation - base * torch.eye(problem.cols, dtype=torch.float64, device=problem.device)
        shared = torch.full_like(even, base)
        dtype = float_named(self.dtype)
        first = relax_rows(problem, convex, shared, self.steps, self.precision, deadline, dtype)
        bounds = torch.maximum(bounds, first.bounds)
        found, own = self._diagonals(problem, convex, first.points, deadline)
        if not len(found):
            return bounds
        rows = problem.slice_rows(found)
        second = relax_rows(rows, convex, shared, self.steps, self.precision, deadline, dtype, own)
        bounds[found] = torch.maximum(bounds[found], second.bounds)
        return bounds

    def _diagonals(
        self, problem: LayerProblem, convex: Tensor, points: Tensor, deadline: float
    ) -> tuple[Tensor, Tensor]:
        """Rows for which the time sufficed (found,) and their proven diagonals (found, cols)."""
        now = time.monotonic()
        stop = now + DIAGONAL_SHARE * (deadline - now)
        nothing = torch.zeros(0, dtype=torch.int64, device=convex.device), convex.new_zeros((0, problem.cols))
        if now >= stop:
            return nothing
        lifted = convex.clone()
        lifted.diagonal().add_(RIDGE)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if int(failed):
            return nothing
        inverse = torch.cholesky_inverse(factor)
        found, diagonals = [], []
        for row in range(problem.rows):
            if time.monotonic() >= stop:
                break
            energy = problem.scaled_weight[row].double() ** 2
            point = points[row].double()
            diagonal = self._diagonal(convex, inverse, energy, energy * point * (1 - point), stop)
            if diagonal is not None:
                found.append(row)
                diagonals.append(diagonal)
        if not found:
            return nothing
        return torch.tensor(found, device=convex.device), torch.stack(diagonals)

    def _diagonal(
        self, convex: Tensor, inverse: Tensor, energy: Tensor, spread: Tensor, deadline: float
    ) -> Tensor | None:
        """The diagonal of one row (cols,), None where there is none to take or its proof fails."""
        most = self.channels or max(FEWEST_CHANNELS, len(spread) // 5)
        chosen = spread.topk(min(most, len(spread))).indices
        chosen = chosen[spread[chosen] > SETTLED * spread.max()].sort().values
        if not len(chosen):
            return None
        weights = spread[chosen] / spread[chosen].sum() + ELSEWHERE * energy[chosen] / energy[chosen].sum()
        factor, failed = torch.linalg.cholesky_ex(inverse[chosen][:, chosen])
        if int(failed):
            return None
        schur = torch.cholesky_inverse(factor)
        size = float((weights * schur.diagonal()).sum())
        own = max_trace_diagonal(schur, weights, tolerance=self.precision * size, deadline=deadline)
        diagonal = torch.zeros_like(spread)
        # what the ridge lifted is taken back
        diagonal[chosen] = own - 2 * RIDGE
        rest = convex.clone()
        rest.diagonal().sub_(diagonal)
        return diagonal if semidefinite(rest) else None
