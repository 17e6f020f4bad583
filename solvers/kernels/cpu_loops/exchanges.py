"""Swaps between rows."""

from __future__ import annotations

import numpy as np

from .compilation import Array, compiled
from .minima import argmin


@compiled
def exchange_loop(
    R: Array, delta: Array, q: Array, mask: Array, limit: float, max_moves: int, touched: Array
) -> bool:
    """Swap between rows until none improves: whether it got there within ``max_moves``.

    Args:
        R: correlation (cols, cols).
        delta: ``δ`` (rows, cols), brought up to date.
        q: ``q`` (rows, cols), brought up to date.
        mask: kept weights (rows, cols), the result.
        limit: Δ of an exchange must be below ``-limit``.
        max_moves: the most exchanges.
        touched: exchanges of each row (rows,), added to.
    """
    rows = len(q)
    lowest = np.empty((2, rows))
    column = np.empty((2, rows), np.int64)
    for r in range(rows):
        lowest_moves(q[r], mask[r], r, lowest, column)
    for _ in range(max_moves):
        a = argmin(lowest[0], 0, rows)
        b = argmin(lowest[1], 0, rows)
        if a == b:
            # the second best on either side
            kept, pruned = lowest[0, a], lowest[1, b]
            lowest[0, a], lowest[1, b] = 1e300, 1e300
            other_a, other_b = argmin(lowest[0], 0, rows), argmin(lowest[1], 0, rows)
            if kept + lowest[1, other_b] <= lowest[0, other_a] + pruned:
                b = other_b
            else:
                a = other_a
            same = b if a == other_a else a
            lowest[0, same], lowest[1, same] = kept, pruned
        if a == b or not lowest[0, a] + lowest[1, b] < -limit:
            return True
        for r, j in ((a, column[0, a]), (b, column[1, b])):
            step = delta[r]
            factor = 2 * step[j]
            own = q[r, j]
            line = R[j]
            value = q[r]
            for i in range(len(value)):
                value[i] += (factor * step[i]) * line[i]
            value[j] = -own
            step[j] = -step[j]
            mask[r, j] = not mask[r, j]
            touched[r] += 1
            lowest_moves(value, mask[r], r, lowest, column)
    return False


@compiled
def lowest_moves(q: Array, mask: Array, row: int, lowest: Array, column: Array) -> None:
    """Lowest q of the kept and of the pruned weights of a row, into (2, rows) arrays."""
    for side in range(2):
        lowest[side, row] = 1e300
        column[side, row] = -1
    for j in range(len(q)):
        side = 0 if mask[j] else 1
        if q[j] < lowest[side, row]:
            lowest[side, row] = q[j]
            column[side, row] = j
