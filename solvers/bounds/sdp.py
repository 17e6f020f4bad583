"""The doubly nonnegative relaxation stated in cvxpy: the readable oracle for small rows.

    min <Q, X> + 2qᵀx + const   over [[1, xᵀ], [x, X]] ⪰ 0,  diag(X) = x,  X ≥ 0,  1ᵀx_b = s_b,  X 1_b = s_b x

No point of the relaxation is strictly feasible (X 1_b = s_b x), so solvers may end as inaccurate; their
objective is never used. The multipliers of X ≥ 0 become the nonnegative part of a convex split, which is
certified in float64 like every other bound (`convex_split`). Covers per-row and N:M patterns and drift.
"""

from __future__ import annotations

import importlib
import time
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from ...errors import UnsupportedProblemError
from ...problems.row_program import BoolArray, FloatArray, RowProgram
from ..base import Covers
from .convex_split import split_with
from .qcr import qcr_diagonal, qcr_split
from .row_tier import RowTier


def sdp_relaxation(program: RowProgram, seconds: float | None = None) -> tuple[float, FloatArray]:
    """Value of the relaxation as the solver claims it, and the multipliers ``N`` (n, n) of X ≥ 0.

    The multipliers are 0 where the solver stopped without any.
    """
    cp = importlib.import_module("cvxpy")  # optional, and its names carry no types
    n = program.size
    moment = cp.Variable((n + 1, n + 1), PSD=True)
    x, X = moment[0, 1:], moment[1:, 1:]
    nonnegative = X >= 0
    constraints = [moment[0, 0] == 1, cp.diag(X) == x, nonnegative]
    for start, end, count in zip(program.starts[:-1], program.starts[1:], program.counts, strict=True):
        indicator = np.zeros(n)
        indicator[start:end] = 1.0
        constraints += [indicator @ x == float(count), X @ indicator == float(count) * x]
    cost = cp.sum(cp.multiply(program.quadratic, X)) + 2 * (program.linear @ x) + program.constant
    relaxation = cp.Problem(cp.Minimize(cost), constraints)
    limit = {} if seconds is None else {"time_limit": max(seconds, 1e-3)}
    try:
        with warnings.catch_warnings():
            # an inaccurate solution has multipliers as good as any
            warnings.simplefilter("ignore", UserWarning)
            relaxation.solve(solver=cp.CLARABEL, **limit)
    except cp.error.SolverError:  # it gives up on badly scaled rows, or on the time limit
        return -np.inf, np.zeros((n, n))
    multipliers = nonnegative.dual_value
    if multipliers is None or not bool(np.isfinite(multipliers).all()):
        return -np.inf, np.zeros((n, n))
    return float(relaxation.value), np.asarray(multipliers, dtype=np.float64)


@final
@dataclass(frozen=True)
class Sdp(RowTier):
    """Bound of each row by the semidefinite program as cvxpy solves it.

    Args:
        largest: widest row that it accepts; the effort grows with the sixth power of the width.
        jobs: processes that share the rows.

    Raises (from ``run``):
        UnsupportedProblemError: if rows are wider than ``largest``.
    """

    name: ClassVar[str] = "sdp"
    covers: ClassVar[Covers] = Covers(requires=("cvxpy", "numba"))

    largest: int = 48
    jobs: int = 1

    def bound_row(self, program: RowProgram, start: BoolArray, deadline: float) -> float:
        """Bound of one rescaled program."""
        if program.size > self.largest:
            raise UnsupportedProblemError(
                f"bound {self.name} states a dense semidefinite program: expected rows of at most "
                f"{self.largest} weights, found {program.size}"
            )
        plain = qcr_split(program, deadline=deadline).bound()
        seconds = None if deadline == float("inf") else deadline - time.monotonic()
        if seconds is not None and seconds <= 0:
            return plain
        _, multipliers = sdp_relaxation(program, seconds)
        nonnegative = np.maximum((multipliers + multipliers.T) / 2, 0.0)
        np.fill_diagonal(nonnegative, 0.0)
        rest = replace(program, quadratic=program.quadratic - nonnegative)
        return max(plain, split_with(program, qcr_diagonal(rest), nonnegative).bound())
