"""QCR: the best diagonal perturbation of a row, from one semidefinite program of max-cut type.

With ``x = (1 + z)/2``, ``z ∈ {-1, 1}^n`` and a homogenising ``z_0 = 1`` the objective is ``(1, z)ᵀ C (1, z)``
and a block's sum is ``a_bᵀ(1, z) = 0``, ``a_b = (n_b - 2 s_b, 1_b)``. Adding ``u Σ a_b a_bᵀ`` changes nothing
on allowed points, and

    max Σ_i y_i   subject to   C + u Σ_b a_b a_bᵀ - Diag(y) ⪰ 0

gives ``D = 4 y``, for which ``Q - Diag(D)`` is positive semidefinite on the face: the perturbation of
Billionnet, Elloumi and Plateau (Discrete Applied Mathematics 157, 2009, theorem 1). The split is then
relaxed to [0, 1], which adds the box to the Shor bound.

Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch

from ...problems.row_program import BoolArray, FloatArray, RowProgram
from .convex_split import ConvexSplit, split_with
from .max_trace import max_trace_diagonal
from .row_tier import RowTier

# Weight of the squared sum of a block of n_b variables, times n_b, in mean diagonal entries of Q: a larger
# one changes the bound of measured rows by less than a per mille, a ten times smaller one by percents.
SUM_WEIGHT = 2000.0
# Duality gap of the semidefinite program, in units of a program whose good masks cost about 100.
TOLERANCE = 0.02


def qcr_diagonal(
    program: RowProgram, tolerance: float = TOLERANCE, deadline: float = float("inf")
) -> FloatArray:
    """The diagonal ``D`` (n,) of the QCR perturbation; any interior-point iterate will do."""
    n = program.size
    Q = program.quadratic
    mean = max(float(Q.diagonal().mean()), 1e-300)
    homogeneous = np.zeros((n + 1, n + 1))
    homogeneous[1:, 1:] = Q / (4 * mean)
    row = (Q.sum(1) / 4 + program.linear / 2) / mean
    homogeneous[0, 1:] = row
    homogeneous[1:, 0] = row
    for start, end, count in zip(program.starts[:-1], program.starts[1:], program.counts, strict=True):
        normal = np.zeros(n + 1)
        normal[0] = float(end - start) - 2.0 * float(count)
        normal[1 + start : 1 + end] = 1.0
        homogeneous += SUM_WEIGHT / (4 * float(end - start)) * np.outer(normal, normal)
    # the corner is free: whatever is added there comes back in y_0
    homogeneous[0, 0] = max(1.0, float(np.abs(row).sum()))
    diagonal = max_trace_diagonal(
        torch.from_numpy(homogeneous),
        torch.ones(n + 1, dtype=torch.float64),
        tolerance=tolerance / mean,
        deadline=deadline,
    )
    return 4 * mean * np.asarray(diagonal[1:].numpy(), dtype=np.float64)


def qcr_split(
    program: RowProgram, tolerance: float = TOLERANCE, deadline: float = float("inf")
) -> ConvexSplit:
    """The convex split of the QCR perturbation."""
    if program.size == 0:
        return split_with(program, np.zeros(0))
    return split_with(program, qcr_diagonal(program, tolerance, deadline))


@final
@dataclass(frozen=True)
class Qcr(RowTier):
    """Bound of each row by its best diagonal perturbation (see the module).

    Args:
        tolerance: duality gap of the semidefinite program, in per cent of a good mask's error.
        jobs: processes that share the rows.
    """

    name: ClassVar[str] = "qcr"

    tolerance: float = TOLERANCE
    jobs: int = 1

    def bound_row(self, program: RowProgram, start: BoolArray, deadline: float) -> float:
        """Bound of one rescaled program."""
        return qcr_split(program, self.tolerance, deadline).bound()
