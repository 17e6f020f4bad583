"""The factored QCR program, as mixed-integer solvers like it.

A convex split without N (`bounds.qcr`) is ``f(x) = xᵀPx + linᵀx + const`` with P positive semidefinite on the
face of the blocks' sums. With Π the projector on the face and x̄ its centre, every allowed x has
``x = x̄ + Π(x - x̄)``, so

    f(x) = xᵀ ΠPΠ x + (lin + 2 ΠPx̄)ᵀ x + x̄ᵀPx̄ + const,      ΠPΠ = LᵀL

is convex everywhere and separable in ``y = Lx``: minimise ``Σ t_i`` with ``t_i ≥ y_i²``. Eigenvalues below
the rounding of ΠPΠ are dropped, which lowers the objective and never raises it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...problems.row_program import BoolArray, FloatArray, RowProgram
from ..base import Status
from ..bounds.convex_split import EPSILON, ROUNDING_FACTOR, face_basis
from ..bounds.presolve import Reduced
from ..bounds.qcr import qcr_split
from ..row_wise import RowResult, better

# Feasibility tolerance that the libraries are asked for; what it can move is taken off their bounds.
FEASIBILITY_TOLERANCE = 1e-7
# The same for their bound itself, as a share: the simplex method proves a bound only to its own tolerance.
BOUND_SHARE = 1e-7
# Eigenvalues below this share of the largest one are dropped from the factor.
SMALLEST_EIGENVALUE = 1e-9


@dataclass(frozen=True, eq=False)
class FactoredProgram:
    """min Σ (L x)_i² + linearᵀx + constant over the 0/1 points of ``program``.

    Attributes:
        program: the row program it stands for.
        factor: ``L`` (rank, n).
        linear: linear cost (n,).
        constant: constant cost.
        lowest: smallest value of each (L x)_i on the relaxation (rank,).
        highest: largest value (rank,).
    """

    program: RowProgram
    factor: FloatArray
    linear: FloatArray
    constant: float
    lowest: FloatArray
    highest: FloatArray

    @property
    def allowance(self) -> float:
        """How far tolerances can put a claimed bound above the truth.

        Each of the ``rank`` squares may be short by the tolerance, and each variable may sit that far from an
        integer or the slope of its cost.
        """
        reach = np.maximum(np.abs(self.lowest), np.abs(self.highest))
        slope = 2 * np.abs(self.factor).T @ reach + np.abs(self.linear)
        return FEASIBILITY_TOLERANCE * (len(self.factor) + 2 * float(reach.sum()) + float(slope.sum()))

    def matrix(self) -> FloatArray:
        """``LᵀL`` (n, n)."""
        return np.asarray(self.factor.T @ self.factor)


def factored(program: RowProgram, deadline: float = float("inf")) -> FactoredProgram:
    """The factored QCR program of a rescaled row program."""
    split = qcr_split(program, deadline=deadline)
    basis = face_basis(program)
    center = program.center()
    inner = basis.T @ split.convex @ basis
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    used = values > SMALLEST_EIGENVALUE * max(float(values[-1]), 0.0) if len(values) else values > 0
    factor = np.sqrt(values[used])[:, None] * (basis @ vectors[:, used]).T
    linear = split.linear + 2 * basis @ (basis.T @ (split.convex @ center))
    constant = split.constant + float(center @ split.convex @ center)
    lowest = np.array([row[program.cheapest(row)].sum() for row in factor])
    highest = np.array([row[program.cheapest(-row)].sum() for row in factor])
    return FactoredProgram(program, factor, linear, constant, lowest, highest)


def product_allowance(program: RowProgram) -> float:
    """The allowance of formulations in the products of variables: what their slopes make of the tolerance."""
    slope = 2 * np.abs(program.quadratic).sum() + 2 * np.abs(program.linear).sum()
    return FEASIBILITY_TOLERANCE * float(slope)


def safe_bound(claimed: float, allowance: float, constant: float = 0.0) -> float:
    """A claimed dual bound of a rescaled program, less its tolerances; -inf where there is none."""
    if not np.isfinite(claimed) or abs(claimed) >= 1e19:
        return -np.inf
    return claimed + constant - allowance - BOUND_SHARE * max(1.0, abs(claimed))


def settled(program: RowProgram, reduced: Reduced, start: BoolArray, threshold: float) -> RowResult:
    """The result of a row that presolve alone has solved: one selection is left."""
    point = better(program, reduced.fixed, start)
    lower = min(reduced.program.constant, threshold)
    lower -= ROUNDING_FACTOR * EPSILON * program.size * max(threshold, abs(reduced.program.constant))
    bound = float(np.nextafter(max(0.0, lower) * reduced.program.unit, 0.0))
    return RowResult(point, bound, Status.FINISHED, {"nodes": 0.0})


def rounded(program: RowProgram, values: FloatArray) -> BoolArray | None:
    """The 0/1 point nearest to a claimed solution (n,), or None where it is not allowed."""
    point = np.round(values).astype(np.bool_)
    return point if program.is_feasible(point) else None
