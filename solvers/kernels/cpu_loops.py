"""The inner loops of the CPU kernels (numba).

They share one file because numba's cache on disk notices changes of a function's own file only: what
they import from ``scaling`` is compiled in, so a changed constant there needs a change here.

Notation as in ``reference``. A row keeps three vectors (cols,):

    δ_j,    a_j = q_j where kept, BIG where pruned,    b_j = q_j where pruned, BIG where kept

so that minima over kept or pruned weights need no branch: adding ``2 δ_j (...)`` to BIG leaves it
far above every real value, because rows are scaled to errors of about 1 (see ``scaling``).

A *line* is the minimum of Δ(u, ·) or Δ(·, p) over one row of ``R``. The exact search for the best
swap uses ``|R_up| ≤ √(ρ_u ρ_p)``, ``ρ_j = max_{i≠j} |R_ij|``, so with ``s_j = |y_j| √ρ_j``

    Δ(u, p) ≥ q_u + q_p - 2 s_u s_p

and only pairs whose bound beats the incumbent are looked up in ``R``. The bound is monotone in
floating point as well: ``s`` is rounded up by more than the products lose.

Functions work on columns [first, last), one block of the pattern. Ties go to the lowest index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic

from .scaling import LARGEST_FLOAT32, NARROW_BLOCK, NOISE, RANKS, REFRESHES, WALKS

# Without NaNs and signed zeros LLVM vectorises minima; sums keep their order, so results are repeatable.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz", "contract"},
}
# Minima are taken over chunks of this many columns, then the index is looked up inside one chunk.
CHUNK = 128
# Bounds are tested for so many pairs at once before they are tested one by one.
PAIR_CHUNK = 16
# Whole lines that the exact search looks at before it tests pairs.
PROBES = 16
# Levels of s for the bounds of a whole line.
LEVELS = 32
# Products of at most this many pruned weights are summed before they go to float64, over so many columns
# at once that the partial sums stay in the first cache and the rows of R in the second.
SPAN = 128
WIDTH = 512

# Incremental updates of q are renewed after this many swaps per column, long before rounding matters.
SWAPS_PER_REFRESH = 4

Array = np.ndarray[Any, Any]


def _lower(_context: Any, left: Any, right: Any) -> Any:
    """The smaller of two floats, marked as free of NaN so that LLVM vectorises minima over a loop."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered("<", *values, flags=flags), *values, flags=flags)

    return left(left, right), generate


lower: Any = intrinsic(_lower)


@njit(**OPTIONS)
def big_of(vector: Array) -> Any:
    """A value above every Δ that leaves room for updates, in the dtype of ``vector``."""
    if vector.itemsize == 4:
        return vector.dtype.type(1e30)
    return vector.dtype.type(1e290)


@njit(**OPTIONS)
def aligned(rows: int, cols: int, like: Array) -> Array:
    """Uninitialised (rows, at least cols) in the dtype of ``like``, each row on a cache line of its own."""
    lane = 64 // like.itemsize
    width = (cols + lane - 1) // lane * lane
    buffer = np.empty(rows * width + lane, like.dtype)
    offset = (-(buffer.ctypes.data // like.itemsize)) % lane
    return buffer[offset : offset + rows * width].reshape(rows, width)


@njit(**OPTIONS)
def load_row(weight: Array, mask: Array, cost: Array, delta: Array, kept_q: Array, pruned_q: Array) -> None:
    """Fill ``δ``, ``a`` and ``b`` from ``y``, a mask and ``c``, each (cols,)."""
    big = big_of(delta)
    two = delta.dtype.type(2)
    for j in range(len(weight)):
        y = weight[j]
        step = y if mask[j] else -y
        q = step * step + two * step * delta.dtype.type(cost[j])
        delta[j] = step
        kept_q[j] = q if mask[j] else big
        pruned_q[j] = big if mask[j] else q


@njit(**OPTIONS)
def argmin(values: Array, first: int, last: int) -> int:
    """Lowest index of the minimum of ``values`` over [first, last)."""
    best = big_of(values)
    at = first
    for start in range(first, last, CHUNK):
        part = values[start : min(start + CHUNK, last)]
        low = part[0]
        for i in range(len(part)):
            low = lower(part[i], low)
        if low < best:
            best = low
            at = start
    for j in range(at, min(at + CHUNK, last)):
        if values[j] == best:
            return j
    return at


@njit(**OPTIONS)
def line_argmin(values: Array, delta: Array, correlation: Array, factor: Any, first: int, last: int) -> int:
    """Lowest index of the minimum of ``values_j + factor δ_j R_j`` over [first, last)."""
    best = big_of(values)
    at = first
    for start in range(first, last, CHUNK):
        stop = min(start + CHUNK, last)
        part, step, line = values[start:stop], delta[start:stop], correlation[start:stop]
        low = best
        for i in range(len(part)):
            low = lower(part[i] + (factor * step[i]) * line[i], low)
        if low < best:
            best = low
            at = start
    # the chunk's own minimum again, one by one: rounding may differ, the choice is repeatable
    best = big_of(values)
    index = at
    for j in range(at, min(at + CHUNK, last)):
        value = values[j] + (factor * delta[j]) * correlation[j]
        if value < best:
            best = value
            index = j
    return index


@njit(**OPTIONS)
def swap_change(R: Array, delta: Array, kept_q: Array, pruned_q: Array, pruned: int, restored: int) -> Any:
    """Δ(u, p) of one pair."""
    two = delta.dtype.type(2)
    return (kept_q[pruned] + pruned_q[restored]) + two * delta[pruned] * delta[restored] * R[pruned, restored]


@njit(**OPTIONS)
def two_lines(
    R: Array,
    delta: Array,
    kept_q: Array,
    pruned_q: Array,
    lowest_kept: int,
    lowest_pruned: int,
    first: int,
    last: int,
) -> tuple[Any, int, int]:
    """The better of u0's best partner and p0's best partner: (Δ, u, p).

    Args:
        R: correlation (cols, cols).
        delta: ``δ`` (cols,).
        kept_q: ``a`` (cols,).
        pruned_q: ``b`` (cols,).
        lowest_kept: u0, the kept weight of the block with the lowest q.
        lowest_pruned: p0, the pruned weight of the block with the lowest q.
        first: where the block begins.
        last: where it ends.
    """
    two = delta.dtype.type(2)
    partner = line_argmin(pruned_q, delta, R[lowest_kept], two * delta[lowest_kept], first, last)
    other = line_argmin(kept_q, delta, R[lowest_pruned], two * delta[lowest_pruned], first, last)
    change = swap_change(R, delta, kept_q, pruned_q, lowest_kept, partner)
    other_change = swap_change(R, delta, kept_q, pruned_q, other, lowest_pruned)
    if other_change < change:
        return other_change, other, lowest_pruned
    return change, lowest_kept, partner


@njit(**OPTIONS)
def ranked_lines(
    R: Array, delta: Array, kept_q: Array, pruned_q: Array, block: int, limit: Any, ranks: int, work: Array
) -> tuple[Any, int, int]:
    """Two lines per block, of the lowest q, the second lowest and so on, until a swap has Δ < ``limit``.

    Returns (Δ, u, p) of the best candidate of the first rank that has one, or (``limit``, -1, -1).

    Args:
        R: correlation (cols, cols).
        delta: ``δ`` (cols,).
        kept_q: ``a`` (cols,).
        pruned_q: ``b`` (cols,).
        block: width of the pattern's blocks.
        limit: what Δ must stay below.
        ranks: how many ranks to try.
        work: work space (2, cols).
    """
    cols = len(delta)
    big = big_of(delta)
    kept_left, pruned_left = kept_q, pruned_q
    best, best_u, best_p = limit, -1, -1
    for rank in range(ranks):
        if rank == 1:
            kept_left, pruned_left = work[0], work[1]
            kept_left[:cols] = kept_q
            pruned_left[:cols] = pruned_q
            for first in range(0, cols, block):
                kept_left[argmin(kept_q, first, first + block)] = big
                pruned_left[argmin(pruned_q, first, first + block)] = big
        for first in range(0, cols, block):
            last = first + block
            u0, p0 = argmin(kept_left, first, last), argmin(pruned_left, first, last)
            change, u, p = two_lines(R, delta, kept_q, pruned_q, u0, p0, first, last)
            if change < best:
                best, best_u, best_p = change, u, p
            if rank > 0:
                kept_left[u0] = big
                pruned_left[p0] = big
        if best_u >= 0:
            break
    return best, best_u, best_p


@njit(**OPTIONS)
def all_pairs(
    R: Array, delta: Array, mask: Array, kept_q: Array, pruned_q: Array, first: int, last: int
) -> tuple[Any, int, int]:
    """Best swap of a narrow block by looking at every pair: (Δ, u, p)."""
    two = delta.dtype.type(2)
    best = big_of(delta)
    best_u = first
    best_p = first
    for u in range(first, last):
        if mask[u]:
            factor = two * delta[u]
            for p in range(first, last):
                if not mask[p]:
                    change = (kept_q[u] + pruned_q[p]) + factor * delta[p] * R[u, p]
                    if change < best:
                        best = change
                        best_u = u
                        best_p = p
    return best, best_u, best_p


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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


@njit(**OPTIONS)
def make_swap(
    R: Array, delta: Array, mask: Array, kept_q: Array, pruned_q: Array, pruned: int, restored: int
) -> None:
    """Prune kept ``u``, restore pruned ``p`` and bring the state up to date."""
    two = delta.dtype.type(2)
    big = big_of(delta)
    cross = two * delta[pruned] * delta[restored] * R[pruned, restored]
    q_u = -kept_q[pruned] - cross
    q_p = -pruned_q[restored] - cross
    from_u = two * delta[pruned]
    from_p = two * delta[restored]
    of_u = R[pruned]
    of_p = R[restored]
    for j in range(len(delta)):
        change = delta[j] * (from_u * of_u[j] + from_p * of_p[j])
        kept_q[j] += change
        pruned_q[j] += change
    delta[pruned] = -delta[pruned]
    delta[restored] = -delta[restored]
    mask[pruned] = False
    mask[restored] = True
    kept_q[pruned] = big
    pruned_q[pruned] = q_u
    kept_q[restored] = q_p
    pruned_q[restored] = big


@njit(**OPTIONS)
def first_costs(
    R: Array, weight: Array, drift: Array, has_drift: bool, mask: Array, before: Array, cost: Array
) -> None:
    """``c = R (y∘(1-m)) + h`` of a tile of rows.

    Args:
        R: correlation (cols, cols).
        weight: ``y`` (rows, cols).
        drift: scaled drift (rows, cols), used if ``has_drift``.
        has_drift: whether there is one.
        mask: kept weights (rows, cols).
        before: a copy of ``mask``, a result for ``add_costs`` (rows, cols).
        cost: result (rows, cols), float64.
    """
    for r in range(len(weight)):
        for i in range(weight.shape[1]):
            cost[r, i] = drift[r, i] if has_drift else 0.0
    before[:] = True
    add_costs(R, weight, mask, before, np.ones(len(weight), np.bool_), cost)


@njit(**OPTIONS)
def add_costs(R: Array, weight: Array, mask: Array, before: Array, wanted: Array, cost: Array) -> None:
    """``c ← c + R (y∘(b-m))`` of the wanted rows of a tile, and ``b ← m``.

    Products run in the dtype of ``R`` over at most ``SPAN`` columns and are summed in float64, always in
    the same order: the result depends neither on the tile nor on threads, and its rounding does not
    grow with the width of the layer. Weights that did not move cost nothing.

    Args:
        R: correlation (cols, cols).
        weight: ``y`` (rows, cols).
        mask: kept weights ``m`` (rows, cols).
        before: mask ``b`` that ``cost`` belongs to (rows, cols).
        wanted: rows to bring up to date (rows,), bool.
        cost: ``c`` (rows, cols), float64.
    """
    rows, cols = weight.shape
    spans = (cols + SPAN - 1) // SPAN
    moved = np.empty((rows, cols), np.int32)
    amounts = np.empty((rows, cols), weight.dtype)
    starts = np.zeros((rows, spans + 1), np.int64)
    for r in range(rows):
        count = 0
        if wanted[r]:
            for span in range(spans):
                starts[r, span] = count
                for j in range(span * SPAN, min((span + 1) * SPAN, cols)):
                    if mask[r, j] != before[r, j] and weight[r, j] != 0:
                        moved[r, count] = j - span * SPAN
                        amounts[r, count] = -weight[r, j] if mask[r, j] else weight[r, j]
                        count += 1
            before[r] = mask[r]
        starts[r, spans] = count
    part = aligned(1, WIDTH, R)[0]
    # rows of R lie a power of two apart in wide layers and would evict each other from the cache
    packed = aligned(SPAN, WIDTH, R)
    for left in range(0, cols, WIDTH):
        width = min(WIDTH, cols - left)
        for span in range(spans):
            top = span * SPAN
            packed[: min(SPAN, cols - top), :width] = R[top : top + SPAN, left : left + width]
            for r in range(rows):
                start, stop = starts[r, span], starts[r, span + 1]
                if start < stop:
                    add_rows(packed, moved[r, start:stop], amounts[r, start:stop], part)
                    total = cost[r, left : left + width]
                    for i in range(width):
                        total[i] += part[i]


@njit(**OPTIONS)
def add_rows(rows: Array, index: Array, amounts: Array, total: Array) -> None:
    """``total = Σ_k amounts_k rows[index_k]``, eight terms at a time, in order."""
    total[:] = 0
    width = len(total)
    k = 0
    while k + 8 <= len(index):
        y0, y1, y2, y3 = amounts[k], amounts[k + 1], amounts[k + 2], amounts[k + 3]
        y4, y5, y6, y7 = amounts[k + 4], amounts[k + 5], amounts[k + 6], amounts[k + 7]
        r0, r1, r2, r3 = rows[index[k]], rows[index[k + 1]], rows[index[k + 2]], rows[index[k + 3]]
        r4, r5, r6, r7 = rows[index[k + 4]], rows[index[k + 5]], rows[index[k + 6]], rows[index[k + 7]]
        for i in range(width):
            value = total[i] + y0 * r0[i]
            value += y1 * r1[i]
            value += y2 * r2[i]
            value += y3 * r3[i]
            value += y4 * r4[i]
            value += y5 * r5[i]
            value += y6 * r6[i]
            total[i] = value + y7 * r7[i]
        k += 8
    while k < len(index):
        y0 = amounts[k]
        r0 = rows[index[k]]
        for i in range(width):
            total[i] += y0 * r0[i]
        k += 1


@njit(**OPTIONS)
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
    lists = np.empty((5, cols + PAIR_CHUNK), np.int32)
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


@njit(**OPTIONS)
def walk_row(
    R: Array,
    mask: Array,
    block: int,
    limit: float,
    patience: int,
    tenure: int,
    work: Array,
) -> tuple[int, bool]:
    """Tabu walk from a local optimum: (moves, whether it found an error lower by more than ``limit``).

    Each move is the better of the two candidates of a lazy step, improving or not; the weights of the
    last ``tenure`` moves may not move. Their q are taken out of the state, so no minimum sees them, and
    kept up to date beside it. The walk ends ``patience`` moves after its best mask and leaves the state
    and ``mask`` there.

    Args:
        R: correlation (cols, cols).
        mask: where the walk starts and, as a result, the best mask it met (cols,).
        block: width of the pattern's blocks.
        limit: what counts as an improvement.
        patience: moves without improvement after which it stops.
        tenure: moves for which a moved weight stays.
        work: the row's state as ``descend_row`` leaves it.
    """
    cols = len(mask)
    delta, kept_q, pruned_q = work[0, :cols], work[1, :cols], work[2, :cols]
    two = delta.dtype.type(2)
    big = big_of(delta)
    half = big / two
    held = np.full(2 * tenure, -1, np.int64)
    held_q = np.empty(2 * tenure, delta.dtype)
    best_state = np.empty((3, cols), delta.dtype)
    best_mask = np.empty(cols, np.bool_)
    at_best = True
    gained = False
    level = 0.0
    best_level = 0.0
    moves = 0
    last_gain = 0
    while True:
        if at_best:
            # the state of the best mask, with nothing held
            best_mask[:] = mask
            for k in range(3):
                best_state[k] = work[k, :cols]
            for h in range(2 * tenure):
                if held[h] >= 0:
                    best_state[1 if mask[held[h]] else 2, held[h]] = held_q[h]
            at_best = False
        change, u, p = half, -1, -1
        if moves - last_gain < patience:
            if block <= NARROW_BLOCK:
                for first in range(0, cols, block):
                    last = first + block
                    found, found_u, found_p = all_pairs(R, delta, mask, kept_q, pruned_q, first, last)
                    if found < change:
                        change, u, p = found, found_u, found_p
            else:
                change, u, p = ranked_lines(R, delta, kept_q, pruned_q, block, half, 1, work[5:])
        if u < 0:
            break
        from_u, from_p = two * delta[u], two * delta[p]
        make_swap(R, delta, mask, kept_q, pruned_q, u, p)
        # afterwards, because the two rows of R are in the cache by now
        for h in range(2 * tenure):
            j = held[h]
            if j >= 0:
                held_q[h] += delta[j] * (from_u * R[u, j] + from_p * R[p, j])
        slot = 2 * (moves % tenure)
        for h in range(slot, slot + 2):
            j = held[h]
            if j >= 0:
                if mask[j]:
                    kept_q[j] = held_q[h]
                else:
                    pruned_q[j] = held_q[h]
        held[slot], held[slot + 1] = u, p
        held_q[slot], held_q[slot + 1] = pruned_q[u], kept_q[p]
        pruned_q[u] = big
        kept_q[p] = big
        level += change
        moves += 1
        if level < best_level - limit:
            best_level = level
            last_gain = moves
            at_best = True
            gained = True
    mask[:] = best_mask
    for k in range(3):
        work[k, :cols] = best_state[k]
    return moves, gained


@njit(**OPTIONS)
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


@njit(**OPTIONS)
def add_line_argmin(values: Array, delta: Array, correlation: Array, factor: Any) -> int:
    """Add ``factor δ_j R_j`` to ``values``; lowest index of the minimum of the result."""
    cols = len(values)
    best = big_of(values)
    at = 0
    for start in range(0, cols, CHUNK):
        stop = min(start + CHUNK, cols)
        part, step, line = values[start:stop], delta[start:stop], correlation[start:stop]
        low = best
        for i in range(len(part)):
            value = part[i] + (factor * step[i]) * line[i]
            part[i] = value
            low = lower(value, low)
        if low < best:
            best = low
            at = start
    for j in range(at, min(at + CHUNK, cols)):
        if values[j] == best:
            return j
    return at


@njit(**OPTIONS)
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
    lists = np.empty((5, cols + PAIR_CHUNK), np.int32)
    first_costs(R, weight, drift, has_drift, mask, np.empty(mask.shape, np.bool_), cost)
    delta, kept_q, pruned_q, spread = work[0, :cols], work[1, :cols], work[2, :cols], work[3, :cols]
    level, levels = lists[2, :cols], work[4, : LEVELS + 1]
    for r in range(rows):
        load_row(weight[r], mask[r], cost[r], delta, kept_q, pruned_q)
        load_spread(weight[r], root, spread, level, levels)
        best, best_u, best_p = big_of(delta), -1, -1
        for first in range(0, cols, block):
            if block <= NARROW_BLOCK:
                low, u, p = all_pairs(R, delta, mask[r], kept_q, pruned_q, first, first + block)
            else:
                u0 = argmin(kept_q, first, first + block)
                p0 = argmin(pruned_q, first, first + block)
                known, u, p = two_lines(R, delta, kept_q, pruned_q, u0, p0, first, first + block)
                low, u, p = best_pair(
                    R,
                    delta,
                    spread,
                    level,
                    levels,
                    kept_q,
                    pruned_q,
                    first,
                    first + block,
                    known,
                    lists,
                    work[5:],
                )
            if low < best:
                best, best_u, best_p = low, u, p
        change[r] = best
        pruned[r] = best_u
        restored[r] = best_p


@njit(**OPTIONS)
def judge(
    weight: Array, drift: Array, has_drift: bool, mask: Array, cost: Array
) -> tuple[float, float, bool]:
    """(noise of Δ, error of the row without the drift's constant, whether the dtype's range suffices)."""
    norm = 0.0
    largest = 0.0
    largest_any = 0.0
    largest_drift = 0.0
    error = 0.0
    for j in range(len(weight)):
        y = np.float64(weight[j])
        size = abs(y)
        largest_any = max(largest_any, size)
        linear = np.float64(drift[j]) if has_drift else 0.0
        largest_drift = max(largest_drift, abs(linear))
        if not mask[j]:
            norm += size * size
            largest = max(largest, size)
            error += y * (cost[j] + linear)
    single = weight.itemsize == 4
    epsilon = 2.0**-24 if single else 2.0**-53
    noise = NOISE * epsilon * largest * (np.sqrt(norm) + largest_drift)
    return noise, error, not single or largest_any <= LARGEST_FLOAT32


@njit(**OPTIONS)
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
        lists: integers (5, cols + PAIR_CHUNK), the third row holding the level of each s.
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
                known = best
                for first in range(0, cols, block):
                    change, u, p = best_pair(
                        R,
                        delta,
                        spread,
                        level,
                        levels,
                        kept_q,
                        pruned_q,
                        first,
                        first + block,
                        known,
                        lists,
                        work[5:],
                    )
                    if u >= 0 and change < limit and (change < best or first <= pruned):
                        best, pruned, restored = change, u, p
                        known = change
        if pruned < 0:
            return made, True
        if made >= max_swaps or made >= SWAPS_PER_REFRESH * cols:
            return made, False
        make_swap(R, delta, mask, kept_q, pruned_q, pruned, restored)
        made += 1


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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
