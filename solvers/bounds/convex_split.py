"""Convex splits of a row program: the certificate behind every bound of a single row.

A split writes the objective, on the allowed 0/1 points, as

    f(x) = xᵀPx + linᵀx + xᵀNx + Σ_t μ_t s_t(x) + const,
    N ≥ 0 elementwise, diag(N) = 0,    μ ≥ 0,    eᵀPe ≥ 0 whenever 1ᵀe_b = 0

where ``s_t(x) ≥ 0`` are the slacks of triangle inequalities (`triangles`), quadratic functions of x. It comes
from any multipliers ``D`` (n,), ``N`` (n, n) and ``μ``: P is Q less N, Diag(D) and the quadratic part of
``Σ μ_t s_t``, and lin likewise, because ``x_j² = x_j``. Whatever the multipliers, P is made positive
semidefinite on the face of the blocks' sums by a shift along diag(Q) that is computed in float64 and widened
by the rounding of the eigenvalue; dropping N and the slacks then leaves a convex relaxation, whose tangent at
any point bounds f. So a bound never rests on a solver's own claim.

Source: QCR, Billionnet, Elloumi, Plateau, Discrete Applied Mathematics 157 (2009); with N it is the dual
of the doubly nonnegative relaxation (Burer, Mathematical Programming 120 (2009), section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import scipy.linalg

from ...problems.row_program import FloatArray, RowProgram
from .triangles import Triangles

# Rounding of a float64 sum of n terms is at most n ε of their magnitude; products of such sums and the
# incremental updates of a search stay within this multiple of it.
ROUNDING_FACTOR = 16.0
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class ConvexSplit:
    """f = xᵀPx + linᵀx + xᵀNx + Σ μ_t s_t(x) + const of one program.

    Attributes:
        program: whose objective is split.
        convex: ``P`` (n, n), positive semidefinite on the face.
        linear: ``lin`` (n,).
        nonnegative: ``N`` (n, n), or (0, 0) where there is none.
        constant: ``const``.
        triangles: the slacks ``s_t`` and their multipliers ``μ``.
    """

    program: RowProgram
    convex: FloatArray
    linear: FloatArray
    nonnegative: FloatArray
    constant: float
    triangles: Triangles = field(default_factory=Triangles.none)

    @property
    def allowance(self) -> float:
        """What rounding can add to a tangent bound, in units of the program."""
        largest = np.abs(self.convex).sum(1) + np.abs(self.linear)
        ones = max(1.0, float(self.program.counts.sum()))
        size = max(float(largest.max(initial=0.0)) * ones, self.program.magnitude)
        # every slack is a sum of at most seven terms of size 1
        size += 7 * float(self.triangles.weights.sum())
        return ROUNDING_FACTOR * EPSILON * float(np.sqrt(max(1, self.program.size))) * size

    def bound(self, precision: float = 1e-4, rounds: int = 2000) -> float:
        """Lower bound of f, by minimising the relaxation to ``precision`` of its value."""
        lower, _ = self.relax(precision, rounds)
        return lower

    def relax(self, precision: float = 1e-4, rounds: int = 2000) -> tuple[float, FloatArray]:
        """The bound, and the point of the relaxation it was taken at (n,)."""
        from ..kernels.branch_and_bound import minimise

        point = self.program.center()
        if self.program.size == 0:
            return self.constant, point
        lower: float = minimise(
            self.convex,
            self.linear,
            self.constant,
            self.program.starts,
            self.program.counts,
            point,
            precision,
            rounds,
        )
        return lower - self.allowance, point

    def tangent(self, point: FloatArray) -> tuple[float, FloatArray]:
        """Bound from the tangent at ``point`` (n,), and the gradient there (n,)."""
        gradient = 2 * (self.convex @ point) + self.linear
        value = float(point @ self.convex @ point + self.linear @ point) + self.constant
        cheapest = float(gradient[self.program.cheapest(gradient)].sum())
        return value - float(gradient @ point) + cheapest - self.allowance, gradient


def split_with(
    program: RowProgram,
    diagonal: FloatArray,
    nonnegative: FloatArray | None = None,
    triangles: Triangles | None = None,
) -> ConvexSplit:
    """The split of any multipliers ``D`` (n,), ``N`` (n, n) and ``μ``.

    Negative entries of N are dropped; ``D`` is on top of the diagonal that the triangles leave.
    """
    n = program.size
    triangles = triangles or Triangles.none()
    shifted = with_triangles(program, triangles)
    convex = shifted.quadratic - np.diag(diagonal)
    if nonnegative is None:
        nonnegative = np.zeros((0, 0))
    else:
        nonnegative = np.maximum((nonnegative + nonnegative.T) / 2, 0.0)
        np.fill_diagonal(nonnegative, 0.0)
        convex = convex - nonnegative
    linear = 2 * shifted.linear + diagonal
    if n:
        weights = shift_weights(program)
        shift = face_shift(convex, weights, program)
        convex[np.diag_indices(n)] += shift * weights
        linear = linear - shift * weights
    return ConvexSplit(program, convex, linear, nonnegative, shifted.constant, triangles)


def with_triangles(program: RowProgram, triangles: Triangles) -> RowProgram:
    """The program with ``Σ μ_t s_t(x)`` taken off its objective."""
    if not len(triangles):
        return program
    A = triangles.matrix(program.size)
    return replace(
        program,
        quadratic=program.quadratic + A[1:, 1:],
        linear=program.linear + A[0, 1:],
        constant=program.constant + float(A[0, 0]),
    )


def shift_weights(program: RowProgram) -> FloatArray:
    """Positive weights (n,) along which a matrix is shifted: diag(Q), floored against zeros."""
    diagonal = program.quadratic.diagonal()
    floor = 1e-6 * max(float(diagonal.mean()), 1e-300)
    return np.maximum(diagonal, floor)


def face_shift(matrix: FloatArray, weights: FloatArray, program: RowProgram) -> float:
    """Smallest σ ≥ 0 with ``matrix + σ Diag(weights)`` positive semidefinite on the face, plus rounding."""
    if program.size == len(program.counts):
        return 0.0
    root = 1 / np.sqrt(weights)
    scaled = matrix * root[:, None] * root[None, :]
    basis = face_basis(program, root)
    inner = basis.T @ scaled @ basis
    lowest = float(
        scipy.linalg.eigh(
            (inner + inner.T) / 2, eigvals_only=True, subset_by_index=[0, 0], check_finite=False
        )[0]
    )
    # the eigenvalue routine is backward stable: its error is a small multiple of n ε times the norm
    rounding = ROUNDING_FACTOR * EPSILON * program.size * float(np.abs(scaled).sum(1).max())
    return max(0.0, rounding - lowest)


def face_basis(program: RowProgram, root: FloatArray | None = None) -> FloatArray:
    """Orthonormal basis (n, n - blocks) of the vectors v for which ``root∘v`` sums to 0 in each block.

    Each block takes the columns of a Householder reflection that maps the block's normal vector to an
    axis, so the basis is orthonormal to rounding at any size.
    """
    n = program.size
    root = np.ones(n) if root is None else root
    basis = np.zeros((n, n - len(program.counts)))
    column = 0
    for start, end in zip(program.starts[:-1], program.starts[1:], strict=True):
        size = int(end - start)
        normal = root[start:end] / np.linalg.norm(root[start:end])
        reflection = normal.copy()
        reflection[0] += 1.0 if normal[0] >= 0 else -1.0
        householder = np.eye(size) - 2 * np.outer(reflection, reflection) / (reflection @ reflection)
        basis[start:end, column : column + size - 1] = householder[:, 1:]
        column += size - 1
    return basis
