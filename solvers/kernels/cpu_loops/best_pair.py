"""The exact search for the best swap of a block.

It uses ``|R_up| ≤ √(ρ_u ρ_p)``, ``ρ_j = max_{i≠j} |R_ij|``, so with ``s_j = |y_j| √ρ_j``

    Δ(u, p) ≥ q_u + q_p - 2 s_u s_p

and only pairs whose bound beats the incumbent are looked up in ``R``. The bound is monotone in
floating point as well: ``s`` is rounded up by more than the products lose.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compilation import Array, compiled
from .minima import CHUNK, argmin, big_of, line_argmin, lower
from .row_state import swap_change

# Bounds are tested for so many pairs at once before they are tested one by one.
PAIR_CHUNK = 16
# Whole lines that the exact search looks at before it tests pairs.
PROBES = 16
# Levels of s for the bounds of a whole line.
LEVELS = 32


@compiled
def load_spread(weight: Array, root: Array, spread: Array, level: Array, levels: Array) -> None:
    """Fill ``s_j = |y_j| √ρ_j`` and put it on a grid: the least level with ``levels[level_j] ≥ s_j``.

    The grid is quadratic because a few outlier channels are far wider than the rest.

    Args:
        weight: ``y`` (cols,).
        root: ``√ρ`` (cols,), rounded up.
        spread: ``s``, a result (cols,).
        level: levels, a result (cols,), integers.
        levels: the grid (LEVELS + 1,), a result.
    """
    widest = weight.dtype.type(0)
    for j in range(len(weight)):
        spread[j] = abs(weight[j]) * root[j]
        widest = max(widest, spread[j])
    for g in range(LEVELS + 1):
        levels[g] = widest * weight.dtype.type((g / LEVELS) ** 2)
    levels[LEVELS] = widest
    share = weight.dtype.type(1) / widest if widest > 0 else weight.dtype.type(0)
    for j in range(len(weight)):
        g = min(LEVELS, int(np.sqrt(spread[j] * share) * LEVELS))
        while levels[g] < spread[j]:
            g += 1
        level[j] = g


@compiled
def lowest_by_level(
    values: Array, spread: Array, levels: Array, first: int, last: int, lowest: Array
) -> None:
    """``min_j (values_j - 2 t s_j)`` over [first, last) for every level t, into ``lowest`` (LEVELS + 1,)."""
    big = big_of(values)
    two = values.dtype.type(2)
    lowest[:] = big
    for start in range(first, last, CHUNK):
        stop = min(start + CHUNK, last)
        part, width = values[start:stop], spread[start:stop]
        for g in range(LEVELS + 1):
            reach = two * levels[g]
            low = lowest[g]
            for i in range(len(part)):
                low = lower(part[i] - reach * width[i], low)
            lowest[g] = low


@compiled
def best_pair(
    R: Array,
    delta: Array,
    spread: Array,
    level: Array,
    levels: Array,
    kept_q: Array,
    pruned_q: Array,
    first: int,
    last: int,
    limit: Any,
    lists: Array,
    work: Array,
) -> tuple[Any, int, int]:
    """The best swap of a block with Δ ≤ ``limit``: (Δ, u, p), or (``limit``, -1, -1) if there is none.

    Args:
        R: correlation (cols, cols).
        delta: ``δ`` (cols,).
        spread: ``s`` (cols,).
        level: level of each ``s`` (cols,), see ``load_spread``.
        levels: the grid (LEVELS + 1,).
        kept_q: ``a`` (cols,).
        pruned_q: ``b`` (cols,).
        first: where the block begins.
        last: where it ends.
        limit: Δ of a known swap, or the threshold of acceptance.
        lists: work space (5, cols + PAIR_CHUNK), integers; the third row is left alone.
        work: work space (6, cols).
    """
    two = delta.dtype.type(2)
    big = big_of(delta)
    lowest = work[5, : LEVELS + 1]
    kept_list, pruned_list = lists[0], lists[1]
    lowest_by_level(pruned_q, spread, levels, first, last, lowest)
    # a few whole lines with the lowest bounds: the best swap is nearly always on one of them
    bounds = work[4]
    for j in range(first, last):
        bounds[j] = kept_q[j] + lowest[level[j]]
    best = limit
    best_u = -1
    best_p = -1
    for _ in range(PROBES):
        u = argmin(bounds, first, last)
        if bounds[u] > best:
            break
        bounds[u] = big
        p = line_argmin(pruned_q, delta, R[u], two * delta[u], first, last)
        change = swap_change(R, delta, kept_q, pruned_q, u, p)
        if change < best or (change == best and (best_u < 0 or u < best_u)):
            best, best_u, best_p = change, u, p
    # the rest by its bounds
    values, widths = work[0], work[1]
    kept_count = 0
    for j in range(first, last):
        if bounds[j] <= best:
            kept_list[kept_count] = j
            values[kept_count] = kept_q[j]
            widths[kept_count] = spread[j]
            kept_count += 1
    if kept_count == 0:
        return best, best_u, best_p
    lowest_by_level(values, widths, levels, 0, kept_count, lowest)
    values, widths = work[2], work[3]
    count = 0
    for j in range(first, last):
        if pruned_q[j] + lowest[level[j]] <= best:
            pruned_list[count] = j
            values[count] = pruned_q[j]
            widths[count] = spread[j]
            count += 1
    # pairs whose bound beats the incumbent are gathered first: their entries of R are far apart, and
    # independent loads overlap
    pairs_u, pairs_p = lists[3], lists[4]
    found = 0
    for k in range(kept_count):
        u = kept_list[k]
        reach = two * spread[u]
        q = kept_q[u]
        for start in range(0, count, PAIR_CHUNK):
            stop = min(start + PAIR_CHUNK, count)
            part, width = values[start:stop], widths[start:stop]
            low = big
            for i in range(len(part)):
                low = lower((q + part[i]) - reach * width[i], low)
            if low > best:
                continue
            for i in range(start, stop):
                pairs_u[found] = u
                pairs_p[found] = pruned_list[i]
                found += (q + values[i]) - reach * widths[i] <= best
            if found + PAIR_CHUNK > last - first or found > 1024:
                best, best_u, best_p = best_of_list(
                    R, delta, kept_q, pruned_q, pairs_u, pairs_p, found, best, best_u, best_p
                )
                found = 0
    best, best_u, best_p = best_of_list(
        R, delta, kept_q, pruned_q, pairs_u, pairs_p, found, best, best_u, best_p
    )
    return best, best_u, best_p


@compiled
def best_of_list(
    R: Array,
    delta: Array,
    kept_q: Array,
    pruned_q: Array,
    pairs_u: Array,
    pairs_p: Array,
    count: int,
    best: Any,
    best_u: int,
    best_p: int,
) -> tuple[Any, int, int]:
    """The best of the first ``count`` listed pairs and of the incumbent (Δ, u, p)."""
    for k in range(count):
        u, p = pairs_u[k], pairs_p[k]
        change = swap_change(R, delta, kept_q, pruned_q, u, p)
        if change < best or (change == best and (best_u < 0 or u < best_u)):
            best, best_u, best_p = change, u, p
    return best, best_u, best_p
