"""The descent of a tile of rows, and the best swap of each."""

from __future__ import annotations

import numpy as np

from ..scaling import LEVELS, NARROW_BLOCK, RANKS, REFRESHES, WALKS
from .best_pair import PAIR_LIST, best_pair, load_spread
from .candidates import all_pairs, ranked_lines
from .compilation import Array, compiled
from .costs import add_costs, first_costs, judge
from .minima import big_of
from .row_state import aligned, load_row, make_swap
from .tabu import walk_row

# Incremental updates of q are renewed after this many swaps per column, long before rounding matters.
SWAPS_PER_REFRESH = 4


@compiled
def descend_tile(
    R: Array,
    root: Array,
    weight: Array,
    drift: Array,
    has_drift: bool,
    constant: Array,
    mask: Array,
    block: int,
    tolerance: float,
    max_swaps: int,
    steepest: bool,
    patience: int,
    tenure: int,
    swaps: Array,
    converged: Array,
    resolved: Array,
    error: Array,
) -> None:
    """Descend the rows of one tile and walk on with tabu; the last four arguments (rows,) are results."""
    rows, cols = weight.shape
    cost = np.empty((rows, cols), np.float64)
    work = aligned(11, max(cols, LEVELS + 1), weight)
    lists = np.empty((5, cols + PAIR_LIST), np.int32)
    before = np.empty((rows, cols), np.bool_)
    wanted = np.ones(rows, np.bool_)
    limit = np.empty(rows, np.float64)
    walking = np.full(rows, patience > 0)
    for refresh in range(REFRESHES):
        if refresh == 0:
            first_costs(R, weight, drift, has_drift, mask, before, cost)
        else:
            add_costs(R, weight, mask, before, wanted, cost)
        again = False
        for r in range(rows):
            if not wanted[r]:
                continue
            drift_row = drift[r] if has_drift else drift[0]
            noise, row_error, fits = judge(weight[r], drift_row, has_drift, mask[r], cost[r])
            if refresh == 0:
                error[r] = max(0.0, row_error + constant[r])
                limit[r] = tolerance * error[r] / 2
            if noise > limit[r] or not fits:
                # float64 is the last resort: there, rounding itself becomes the threshold
                if weight.itemsize == 4:
                    resolved[r] = False
                    wanted[r] = False
                    continue
                limit[r] = noise
            load_row(weight[r], mask[r], cost[r], work[0], work[1], work[2])
            load_spread(weight[r], root, work[3], lists[2], work[4])
            left = max_swaps - swaps[r]
            made, none_left = descend_row(R, mask[r], block, -limit[r], left, steepest, work, lists)
            swaps[r] += made
            changed = made > 0
            if none_left and walking[r]:
                walking[r] = False
                for _ in range(WALKS):
                    made, gained = walk_row(R, mask[r], block, limit[r], patience, tenure, work)
                    swaps[r] += made
                    if not gained:
                        break
                    changed = True
                    left = max_swaps - swaps[r]
                    made, none_left = descend_row(R, mask[r], block, -limit[r], left, False, work, lists)
                    swaps[r] += made
            wanted[r] = changed and (none_left or swaps[r] < max_swaps)
            converged[r] = none_left and not changed
            again |= wanted[r]
        if not again:
            return
    for r in range(rows):
        if wanted[r]:
            resolved[r] = False


@compiled
def descend_row(
    R: Array,
    mask: Array,
    block: int,
    threshold: float,
    max_swaps: int,
    steepest: bool,
    work: Array,
    lists: Array,
) -> tuple[int, bool]:
    """Swap until nothing is left or a limit is reached: (swaps, whether no swap has Δ < threshold).

    Args:
        R: correlation (cols, cols).
        mask: kept weights (cols,), also the result.
        block: width of the pattern's blocks.
        threshold: Δ below which a swap is made, at most 0.
        max_swaps: the most swaps.
        steepest: make the best swap each time.
        work: loaded state of the row (11, at least cols): δ, a, b, s, the levels of s, work space.
        lists: integers (5, cols + PAIR_LIST), the third row holding the level of each s.
    """
    cols = len(mask)
    delta, kept_q, pruned_q, spread = work[0, :cols], work[1, :cols], work[2, :cols], work[3, :cols]
    level, levels = lists[2, :cols], work[4, : LEVELS + 1]
    limit = delta.dtype.type(threshold)
    made = 0
    while True:
        best = limit
        pruned = -1
        restored = -1
        if block <= NARROW_BLOCK:
            for first in range(0, cols, block):
                change, u, p = all_pairs(R, delta, mask, kept_q, pruned_q, first, first + block)
                if change < best:
                    best, pruned, restored = change, u, p
        else:
            ranks = 1 if steepest else RANKS
            best, pruned, restored = ranked_lines(R, delta, kept_q, pruned_q, block, limit, ranks, work[5:])
            if steepest or pruned < 0:
                first_line = not steepest
                change, u, p = best_pair(
                    R,
                    delta,
                    spread,
                    level,
                    levels,
                    kept_q,
                    pruned_q,
                    block,
                    best,
                    first_line,
                    lists,
                    work[5:],
                )
                if u >= 0 and change < limit:
                    best, pruned, restored = change, u, p
        if pruned < 0:
            return made, True
        if made >= max_swaps or made >= SWAPS_PER_REFRESH * cols:
            return made, False
        make_swap(R, delta, mask, kept_q, pruned_q, pruned, restored)
        made += 1


@compiled
def best_swaps_of_tile(
    R: Array,
    root: Array,
    weight: Array,
    drift: Array,
    has_drift: bool,
    mask: Array,
    block: int,
    change: Array,
    pruned: Array,
    restored: Array,
) -> None:
    """The swap with the lowest Δ of each row of a tile; the last three arguments (rows,) are results."""
    rows, cols = weight.shape
    cost = np.empty((rows, cols), np.float64)
    work = aligned(11, max(cols, LEVELS + 1), weight)
    lists = np.empty((5, cols + PAIR_LIST), np.int32)
    first_costs(R, weight, drift, has_drift, mask, np.empty(mask.shape, np.bool_), cost)
    delta, kept_q, pruned_q, spread = work[0, :cols], work[1, :cols], work[2, :cols], work[3, :cols]
    level, levels = lists[2, :cols], work[4, : LEVELS + 1]
    for r in range(rows):
        load_row(weight[r], mask[r], cost[r], delta, kept_q, pruned_q)
        load_spread(weight[r], root, spread, level, levels)
        best, best_u, best_p = big_of(delta) / delta.dtype.type(2), -1, -1
        if block <= NARROW_BLOCK:
            for first in range(0, cols, block):
                low, u, p = all_pairs(R, delta, mask[r], kept_q, pruned_q, first, first + block)
                if low < best:
                    best, best_u, best_p = low, u, p
        else:
            best, best_u, best_p = best_pair(
                R, delta, spread, level, levels, kept_q, pruned_q, block, best, False, lists, work[5:]
            )
        change[r] = best if best_u >= 0 else np.inf
        pruned[r] = max(best_u, 0)
        restored[r] = max(best_p, 0)
