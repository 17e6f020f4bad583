"""Triangle inequalities: what every 0/1 point satisfies and the doubly nonnegative relaxation does not.

For three variables of a 0/1 point, with ``X_ij`` in place of ``x_i x_j``,

    kind 0 (centre i)    X_ij + X_ik - x_i - X_jk ≤ 0
    kind 1               x_i + x_j + x_k - X_ij - X_ik - X_jk - 1 ≤ 0

The slack of each is a quadratic function of x that is never negative on 0/1 points, so any multipliers
``μ ≥ 0`` may be taken off an objective and dropped. Once one of the variables is fixed the slack is a product
of two nonnegative factors, once two are fixed it is a nonnegative linear function of the third.

Source: Padberg, The Boolean quadric polytope, Mathematical Programming 45 (1989); with semidefinite
relaxations: Rendl, Rinaldi, Wiegele, Mathematical Programming 121 (2010).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...problems.row_program import FloatArray, IntArray, Restriction

# Resolution of the search for the worst violations, which lie between 0 and 1.
BINS = 1000


@dataclass(frozen=True, eq=False)
class Triangles:
    """Some triangle inequalities with their multipliers.

    Attributes:
        corners: the three variables, the centre first (m, 3).
        kinds: 0 or 1 (m,).
        weights: multipliers ``μ`` (m,), not negative.
    """

    corners: IntArray
    kinds: npt.NDArray[np.int8]
    weights: FloatArray

    @classmethod
    def none(cls) -> Triangles:
        """No triangles."""
        return cls(np.zeros((0, 3), dtype=np.int64), np.zeros(0, dtype=np.int8), np.zeros(0))

    def __len__(self) -> int:
        return len(self.kinds)

    def keep(self, which: npt.NDArray[np.generic] | slice) -> Triangles:
        """Those that ``which`` selects, by index or by truth."""
        return Triangles(self.corners[which], self.kinds[which], self.weights[which])

    def scaled(self, factor: float) -> Triangles:
        """The same with every multiplier times ``factor``."""
        return Triangles(self.corners, self.kinds, self.weights * factor)

    def matrix(self, size: int) -> FloatArray:
        """``A`` (size + 1, size + 1) with ``<A, Y>`` the weighted sum of the violations of a matrix Y."""
        A = np.zeros((size + 1, size + 1))
        if len(self):
            self.keep(slice(None)).ascend(A.copy(), A.copy(), np.zeros(len(self)), A)
        return A

    def ascend(self, Y: FloatArray, before: FloatArray, steps: FloatArray, A: FloatArray) -> None:
        """Step the multipliers in place along the violations of ``2 Y - before``; ``A`` becomes `matrix`."""
        from ..kernels.triangles import ascend

        ascend(Y, before, self.corners, self.kinds, self.weights, steps, A)

    def restrict(self, restriction: Restriction) -> Triangles:
        """Those whose variables are all free, in the numbers of the restricted program."""
        place = np.full(len(restriction.fixed), -1, dtype=np.int64)
        place[restriction.free] = np.arange(len(restriction.free))
        inner = self.keep(np.flatnonzero((place[self.corners] >= 0).all(axis=1)))
        return Triangles(place[inner.corners], inner.kinds, inner.weights)

    def renew(self, Y: FloatArray, smallest: float, most: int) -> Triangles:
        """Drop those without a multiplier; add up to ``most`` that ``Y`` violates by ``smallest`` or more."""
        from ..kernels.triangles import collect, most_violated

        histogram = np.zeros(BINS, dtype=np.int64)
        most_violated(Y, smallest, histogram)
        worst_first = np.cumsum(histogram[::-1])
        beyond = int(np.searchsorted(worst_first, most, side="right"))
        if beyond < BINS:
            smallest = max(smallest, (BINS - beyond) / BINS)
        corners = np.zeros((min(most, int(histogram.sum())), 3), dtype=np.int64)
        kinds = np.zeros(len(corners), dtype=np.int8)
        found = collect(Y, smallest, corners, kinds)
        old = self.keep(self.weights > 0)
        new = Triangles(corners[:found], kinds[:found], np.zeros(found))
        size = len(Y)
        new = new.keep(~np.isin(new._keys(size), old._keys(size)))
        return Triangles(
            np.concatenate([old.corners, new.corners]),
            np.concatenate([old.kinds, new.kinds]),
            np.concatenate([old.weights, new.weights]),
        )

    def _keys(self, size: int) -> IntArray:
        """One number per inequality."""
        i, j, k = self.corners.T
        return np.asarray(((i * size + j) * size + k) * 2 + self.kinds, dtype=np.int64)

    def overlaps(self, size: int) -> FloatArray:
        """How crowded the entries of each triangle are (m,): the longest steps are their inverse.

        The diagonal step of Pock and Chambolle (ICCV 2011): per triangle, the number of triangles in each
        of its entries over how often that entry stands in a moment matrix (pairs twice, variables three
        times), summed.
        """
        i, j, k = self.corners.T
        second = self.kinds == 1
        pairs = np.zeros((size, size))
        for one, other in ((i, j), (i, k), (j, k)):
            np.add.at(pairs, (np.minimum(one, other), np.maximum(one, other)), 1.0)
        pairs += pairs.T
        single = np.bincount(i, minlength=size)
        single += np.bincount(j[second], minlength=size) + np.bincount(k[second], minlength=size)
        arms = (pairs[i, j] + pairs[i, k] + pairs[j, k]) / 2
        return np.asarray(arms + (single[i] + np.where(second, single[j] + single[k], 0)) / 3)
