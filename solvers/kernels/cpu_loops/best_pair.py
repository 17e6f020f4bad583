"""The search over all pairs of a row that reads few of them.

It uses ``|R_up| ≤ √(ρ_u ρ_p)``, ``ρ_j = max_{i≠j} |R_ij|``, so with ``s_j = |y_j| √ρ_j``

    Δ(u, p) ≥ q_u + q_p - 2 s_u s_p

and only pairs whose bound beats the incumbent are looked up in ``R``. The bound is monotone in
floating point as well: ``s`` is rounded up by more than the products lose.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..scaling import BOUND_ROUNDING, LEVELS, probes
from .compilation import Array, compiled
from .minima import CHUNK, argmin, big_of, line_argmin, lower
from .row_state import swap_change

# Bounds are tested for so many pairs at once before they are tested one by one.
PAIR_CHUNK = 16
# Pairs whose bound beats the incumbent are looked up so many at a time.
PAIR_LIST = 1024

probed_lines = compiled(probes)


@compiled
def load_spread(weight: Array, root: Array, spread: Array, level: Array, levels: Array) -> None:
    """Fill ``s_j = |y_j| √ρ_j`` and put it on a grid: the least level from 1 with ``levels[level_j] ≥ s_j``.

    The grid is quadratic because a few outlier channels are far wider than the rest.

    Args:
        weight: ``y`` (cols,).
        root: ``√ρ`` (cols,), rounded up.
        spread: ``s``, a result (cols,).
        level: levels, a result (cols,), integers.
        levels: the grid (LEVELS + 1,), from 0 on, a result.
    """
    widest = weight.dtype.type(0)
    for j in range(len(weight)):
        spread[j] = abs(weight[j]) * root[j]
        widest = max(widest, spread[j])
    for g in range(LEVELS + 1):
        levels[g] = widest * weight.dtype.type((g / LEVELS) ** 2)
    share = weight.dtype.type(1) / widest if widest > 0 else weight.dtype.type(0)
    for j in range(len(weight)):
        g = min(LEVELS, max(1, int(np.sqrt(spread[j] * share) * LEVELS)))
        # the root is rounded: one step either way
        while g > 1 and levels[g - 1] >= spread[j]:
            g -= 1
        while g < LEVELS and levels[g] < spread[j]:
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
def load_bounds(
    values: Array,
    spread: Array,
    level: Array,
    levels: Array,
    lowest: Array,
    first: int,
    last: int,
    bounds: Array,
) -> None:
    """``values_j + f(s_j)`` over [first, last) into ``bounds`` (cols,), see ``reference``.

    ``lowest`` (LEVELS + 1,) is f at the levels.
    """
    slack = values.dtype.type(BOUND_ROUNDING)
    none = values.dtype.type(0)
    for j in range(first, last):
        g = level[j]
        width = levels[g] - levels[g - 1]
        share = (levels[g] - spread[j]) / width if width > 0 else none
        low = lowest[g] + share * (lowest[g - 1] - lowest[g])
        bounds[j] = values[j] + low - slack * (abs(values[j]) + abs(low))


@compiled
def best_pair(
    R: Array,
    delta: Array,
    spread: Array,
    level: Array,
    levels: Array,
    kept_q: Array,
    pruned_q: Array,
    block: int,
    limit: Any,
    first_line: bool,
    lists: Array,
    work: Array,
) -> tuple[Any, int, int]:
    """The best swap with Δ ≤ ``limit``, or with ``first_line`` that of the first line that has any.

    Lines come in the order of ``reference``: a few with the lowest bounds, then the others by their index.

    Args:
        R: correlation (cols, cols).
        delta: ``δ`` (cols,).
        spread: ``s`` (cols,).
        level: level of each ``s`` (cols,), see ``load_spread``.
        levels: the grid (LEVELS + 1,).
        kept_q: ``a`` (cols,).
        pruned_q: ``b`` (cols,).
        block: width of the pattern's blocks.
        limit: Δ of a known swap, or the threshold of acceptance.
        first_line: whether the first line with a swap below ``limit`` is enough.
        lists: work space (5, cols + PAIR_LIST), integers; the third row is left alone.
        work: work space (6, cols).

    Returns:
        (Δ, u, p), or (``limit``, -1, -1) if there is none.
    """
    cols = len(delta)
    two = delta.dtype.type(2)
    big = big_of(delta)
    lowest, bounds = work[5, : LEVELS + 1], work[4, :cols]
    for first in range(0, cols, block):
        lowest_by_level(pruned_q, spread, levels, first, first + block, lowest)
        load_bounds(kept_q, spread, level, levels, lowest, first, first + block, bounds)
    best = limit
    best_u = -1
    best_p = -1
    for _ in range(probed_lines(cols)):
        u = argmin(bounds, 0, cols)
        if bounds[u] > best:
            return best, best_u, best_p
        bounds[u] = big
        first = u // block * block
        p = line_argmin(pruned_q, delta, R[u], two * delta[u], first, first + block)
        change = swap_change(R, delta, kept_q, pruned_q, u, p)
        if change < best or (change == best and not first_line and (best_u < 0 or u < best_u)):
            best, best_u, best_p = change, u, p
        if first_line and best_u >= 0:
            return best, best_u, best_p
    for first in range(0, cols, block):
        best, best_u, best_p = best_by_bounds(
            R, delta, spread, level, levels, kept_q, pruned_q, first, first + block, bounds,
            best, best_u, best_p, first_line, lists, work,
        )  # fmt: skip
        if first_line and best_u >= 0:
            break
    return best, best_u, best_p


@compiled
def best_by_bounds(
    R: Array,
    delta: Array,
    spread: Array,
    level: Array,
    levels: Array,
    kept_q: Array,
    pruned_q: Array,
    first: int,
    last: int,
    bounds: Array,
    best: Any,
    best_u: int,
    best_p: int,
    first_line: bool,
    lists: Array,
    work: Array,
) -> tuple[Any, int, int]:
    """The better of the incumbent (Δ, u, p) and the swaps of a block [first, last), see ``best_pair``.

    ``bounds`` (cols,) are those of the lines that are left.
    """
    two = delta.dtype.type(2)
    big = big_of(delta)
    lowest, of_pruned = work[5, : LEVELS + 1], work[2]
    kept_list, pruned_list = lists[0], lists[1]
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
    load_bounds(pruned_q, spread, level, levels, lowest, first, last, of_pruned)
    values, widths = work[0], work[3]
    count = 0
    for j in range(first, last):
        if of_pruned[j] <= best:
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
        if first_line and best_u >= 0 and u != best_u:
            break
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
            if found + PAIR_CHUNK > PAIR_LIST:
                best, best_u, best_p = best_of_list(
                    R, delta, kept_q, pruned_q, pairs_u, pairs_p, found, best, best_u, best_p, first_line
                )
                found = 0
    return best_of_list(R, delta, kept_q, pruned_q, pairs_u, pairs_p, found, best, best_u, best_p, first_line)


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
    first_line: bool,
) -> tuple[Any, int, int]:
    """The best of the first ``count`` listed pairs and of the incumbent (Δ, u, p).

    With ``first_line`` only pairs of the first line with a better one count.
    """
    for k in range(count):
        u, p = pairs_u[k], pairs_p[k]
        if first_line and best_u >= 0 and u != best_u:
            break
        change = swap_change(R, delta, kept_q, pruned_q, u, p)
        if change < best or (change == best and not first_line and (best_u < 0 or u < best_u)):
            best, best_u, best_p = change, u, p
    return best, best_u, best_p
