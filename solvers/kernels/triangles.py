"""Triangle inequalities of a moment matrix: finding violated ones and stepping their multipliers, in numba.

Kinds and signs are those of ``bounds.triangles``; moment indices are those of the variables plus 1.
"""

from __future__ import annotations

import numba


@numba.njit(cache=True)
def most_violated(Y, smallest, histogram):  # type: ignore[no-untyped-def]
    """Count, per bin of width 1 / len(histogram), how many triples violate by at least ``smallest``."""
    n = len(Y) - 1
    bins = len(histogram)
    for i in range(1, n + 1):
        for j in range(i + 1, n + 1):
            for k in range(j + 1, n + 1):
                worst, _ = _violation(Y, i, j, k)
                if worst >= smallest:
                    histogram[min(bins - 1, int(worst * bins))] += 1


@numba.njit(cache=True)
def _violation(Y, i, j, k):  # type: ignore[no-untyped-def]
    """Largest violation of the four inequalities of a triple, and which: its centre's place, 3 for kind 1."""
    a, b, c = Y[i, j], Y[i, k], Y[j, k]
    worst, which = a + b - Y[0, i] - c, 0
    other = a + c - Y[0, j] - b
    if other > worst:
        worst, which = other, 1
    other = b + c - Y[0, k] - a
    if other > worst:
        worst, which = other, 2
    other = Y[0, i] + Y[0, j] + Y[0, k] - a - b - c - 1.0
    if other > worst:
        worst, which = other, 3
    return worst, which


@numba.njit(cache=True)
def collect(Y, smallest, corners, kinds):  # type: ignore[no-untyped-def]
    """Fill ``corners`` (most, 3) and ``kinds`` with triples violating by ``smallest``; returns how many."""
    n, most = len(Y) - 1, len(kinds)
    found = 0
    for i in range(1, n + 1):
        for j in range(i + 1, n + 1):
            for k in range(j + 1, n + 1):
                worst, which = _violation(Y, i, j, k)
                if worst < smallest or found == most:
                    continue
                corners[found, 0], corners[found, 1], corners[found, 2] = i - 1, j - 1, k - 1
                if which == 1:
                    corners[found, 0], corners[found, 1] = j - 1, i - 1
                elif which == 2:
                    corners[found, 0], corners[found, 1], corners[found, 2] = k - 1, i - 1, j - 1
                kinds[found] = 1 if which == 3 else 0
                found += 1
    return found


@numba.njit(cache=True)
def ascend(Y, before, corners, kinds, weights, steps, A):  # type: ignore[no-untyped-def]
    """One projected step of the multipliers at ``2 Y - before``; ``A`` becomes the matrix of their sum.

    Args:
        Y: moment matrix (n + 1, n + 1).
        before: the one of the last step.
        corners: variables of each triangle, the centre first (m, 3).
        kinds: 0 or 1 (m,).
        weights: multipliers (m,), changed in place.
        steps: step lengths (m,).
        A: symmetric (n + 1, n + 1), overwritten: ``<A, Y>`` is the weighted sum of the violations.
    """
    A[:] = 0.0
    for t in range(len(weights)):
        i, j, k = corners[t, 0] + 1, corners[t, 1] + 1, corners[t, 2] + 1
        violated = -(2.0 * Y[j, k] - before[j, k]) + (2.0 * Y[0, i] - before[0, i]) * (2 * kinds[t] - 1)
        arms = 2.0 * (Y[i, j] + Y[i, k]) - before[i, j] - before[i, k]
        if kinds[t] == 0:
            violated += arms
        else:
            violated += 2.0 * (Y[0, j] + Y[0, k]) - before[0, j] - before[0, k] - arms - 1.0
        weight = max(0.0, weights[t] + steps[t] * violated)
        weights[t] = weight
        if weight == 0.0:
            continue
        half = 0.5 * weight
        arm = half if kinds[t] == 0 else -half
        A[i, j] += arm
        A[i, k] += arm
        A[j, k] -= half
        A[0, i] -= arm
        if kinds[t] == 1:
            A[0, j] += half
            A[0, k] += half
            A[0, 0] -= 0.5 * weight
    # each entry was added on one side of the diagonal only
    n = len(A)
    for i in range(n):
        for j in range(i, n):
            A[i, j] += A[j, i]
            A[j, i] = A[i, j]
