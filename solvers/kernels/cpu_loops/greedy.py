"""Backward greedy of a tile of rows."""

from __future__ import annotations

import numpy as np

from .compilation import Array, compiled
from .costs import first_costs
from .minima import add_line_argmin, argmin, big_of
from .row_state import aligned, load_row


@compiled
def prune_tile(
    R: Array,
    weight: Array,
    drift: Array,
    has_drift: bool,
    mask: Array,
    block: int,
    keep: int,
) -> None:
    """Prune the weight with the lowest q, again and again, until ``keep`` of each block are left.

    Args:
        R: correlation (cols, cols).
        weight: ``y`` (rows, cols).
        drift: scaled drift (rows, cols), used if ``has_drift``.
        has_drift: whether there is one.
        mask: start, at least ``keep`` kept in each block; the result (rows, cols).
        block: width of the pattern's blocks.
        keep: weights that each block keeps.
    """
    rows, cols = weight.shape
    cost = np.empty((rows, cols), np.float64)
    first_costs(R, weight, drift, has_drift, mask, np.empty(mask.shape, np.bool_), cost)
    work = aligned(3, cols, weight)
    delta, kept_q, pruned_q = work[0, :cols], work[1, :cols], work[2, :cols]
    two = delta.dtype.type(2)
    big = big_of(delta)
    left = np.empty(cols // block, np.int64)
    for r in range(rows):
        load_row(weight[r], mask[r], cost[r], delta, kept_q, pruned_q)
        todo = 0
        for b in range(len(left)):
            left[b] = -keep
            for j in range(b * block, (b + 1) * block):
                left[b] += mask[r, j]
            todo += left[b]
            if left[b] == 0:
                kept_q[b * block : (b + 1) * block] = big
        u = argmin(kept_q, 0, cols)
        for _ in range(todo):
            mask[r, u] = False
            b = u // block
            left[b] -= 1
            kept_q[u] = big
            if left[b] == 0:
                kept_q[b * block : (b + 1) * block] = big
            u = add_line_argmin(kept_q, delta, R[u], two * delta[u])
