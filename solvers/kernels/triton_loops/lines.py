"""Minima over a row, and the two lines of a lazy step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_index(values, index, none):  # type: ignore[no-untyped-def]
    """Least ``index`` of the minima of ``values`` along the last axis (blocks, columns): (blocks,).

    ``none`` where there is none: lanes that saw nothing hold it.
    """
    low = tl.min(values, 1)
    return tl.min(tl.where(values == low[:, None], index, none), 1)


@triton.jit
def lowest_of_blocks(  # type: ignore[no-untyped-def]
    q, flags, column, end, cols, block, TOP: tl.constexpr
):
    """Columns of the lowest q of kept and of pruned weights of each block, neither tried nor held."""
    low_u = tl.zeros_like(column).to(q.dtype.element_ty) + TOP
    low_p = low_u
    at_u = tl.zeros_like(column) + cols
    at_p = at_u
    for start in range(0, block, column.shape[1]):
        j = column + start
        inside = j < end[:, None]
        value = tl.load(q + j, mask=inside, other=TOP)
        flag = tl.load(flags + j, mask=inside, other=-1)
        lower = (flag == 1) & (value < low_u)
        low_u = tl.where(lower, value, low_u)
        at_u = tl.where(lower, j, at_u)
        lower = (flag == 0) & (value < low_p)
        low_p = tl.where(lower, value, low_p)
        at_p = tl.where(lower, j, at_p)
    return first_index(low_u, at_u, cols), first_index(low_p, at_p, cols)


@triton.jit
def partners(single, slack, factor, line, j, free, most, low, at):  # type: ignore[no-untyped-def]
    """Lane by lane the lower of Δ = ``single + factor R_j`` and ``low``, with its column.

    Of the ``free`` columns only those are read whose bound ``single - slack`` is at most ``most``.
    """
    looked = free & (single - slack <= most)
    change = single + factor * tl.load(line + j, mask=looked, other=0.0)
    lower = looked & (change < low)
    return tl.where(lower, change, low), tl.where(lower, j, at)


@triton.jit
def two_lines(  # type: ignore[no-untyped-def]
    R,
    q,
    delta,
    flags,
    root,
    best,
    best_u,
    best_p,
    known_u,
    known_p,
    cols,
    block,
    MARK: tl.constexpr,
    TOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The better of the incumbent (Δ, u, p) and the lazy candidates of all blocks.

    ``known_u`` and ``known_p`` are the columns with the lowest q of a row that is one block, or -1 if that is
    to be found. ``MARK`` remembers whose lines were tried in vain, so that the next call takes the next ones.
    Of a line only pairs are read whose bound is as low as Δ(u0, p0) and as the incumbent.
    """
    for group in range(0, cols, BLOCKS * block):
        base = group + tl.arange(0, BLOCKS) * block
        end = tl.where(base < cols, base + block, 0)
        column = base[:, None] + tl.arange(0, WIDE)[None, :]
        u0 = tl.zeros_like(base) + known_u
        p0 = tl.zeros_like(base) + known_p
        if known_u < 0:
            u0, p0 = lowest_of_blocks(q, flags, column, end, cols, block, TOP)
        has_u = u0 < cols
        has_p = p0 < cols
        q_u = tl.load(q + u0, mask=has_u, other=0.0)[:, None]
        q_p = tl.load(q + p0, mask=has_p, other=0.0)[:, None]
        step_u = 2 * tl.load(delta + u0, mask=has_u, other=0.0)[:, None]
        step_p = 2 * tl.load(delta + p0, mask=has_p, other=0.0)[:, None]
        reach_u = tl.abs(step_u) * tl.load(root + u0, mask=has_u, other=0.0)[:, None]
        reach_p = tl.abs(step_p) * tl.load(root + p0, mask=has_p, other=0.0)[:, None]
        line_u = R + u0.to(tl.int64)[:, None] * cols
        line_p = R + p0.to(tl.int64)[:, None] * cols
        both = (has_u & has_p)[:, None]
        most = (q_u + q_p) + step_u * (0.5 * step_p) * tl.load(line_u + p0[:, None], mask=both, other=0.0)
        most = tl.where(both, tl.minimum(most, best), best)
        low_u = tl.zeros_like(column).to(q.dtype.element_ty) + TOP
        low_p = low_u
        at_u = tl.zeros_like(column) + cols
        at_p = at_u
        for start in range(0, block, WIDE):
            j = column + start
            inside = j < end[:, None]
            value = tl.load(q + j, mask=inside, other=TOP)
            step = tl.load(delta + j, mask=inside, other=0.0)
            flag = tl.load(flags + j, mask=inside, other=-1) & 5
            spread = tl.abs(step) * tl.load(root + j, mask=inside, other=0.0)
            free = (flag == 0) & has_u[:, None]
            low_u, at_u = partners(
                q_u + value, reach_u * spread, step_u * step, line_u, j, free, most, low_u, at_u
            )
            free = (flag == 1) & has_p[:, None]
            low_p, at_p = partners(
                q_p + value, reach_p * spread, step_p * step, line_p, j, free, most, low_p, at_p
            )
        partner = first_index(low_u, at_u, cols)
        other = first_index(low_p, at_p, cols)
        of_u0 = tl.min(low_u, 1)
        of_p0 = tl.min(low_p, 1)
        turned = of_p0 < of_u0
        change = tl.minimum(of_u0, of_p0)
        # the first of the best blocks
        low = tl.min(change, 0)
        first = tl.min(tl.where(change == low, base, cols), 0)
        u = tl.sum(tl.where(base == first, tl.where(turned, other, u0), 0), 0)
        p = tl.sum(tl.where(base == first, tl.where(turned, p0, partner), 0), 0)
        better = low < best
        best = tl.where(better, low, best)
        best_u = tl.where(better, u, best_u)
        best_p = tl.where(better, p, best_p)
        if MARK and best_u < 0:
            tl.debug_barrier()
            tl.store(flags + u0, tl.full((BLOCKS,), 3, tl.int8), mask=has_u)
            tl.store(flags + p0, tl.full((BLOCKS,), 2, tl.int8), mask=has_p)
            tl.debug_barrier()
    return best, best_u, best_p


@triton.jit
def narrow_blocks(  # type: ignore[no-untyped-def]
    inside_R, q, delta, flags, best, best_u, best_p, cols, block, WIDE: tl.constexpr
):
    """The better of the incumbent (Δ, u, p) and all swaps inside narrow blocks.

    ``inside_R`` (cols, block) are the entries of ``R`` inside the blocks.
    """
    low = tl.zeros((WIDE,), q.dtype.element_ty) + best
    pair = tl.full((WIDE,), -1, tl.int64)
    for start in range(0, cols, WIDE):
        u = start + tl.arange(0, WIDE)
        inside = u < cols
        base = u // block * block
        of_u = tl.load(q + u, mask=inside, other=0.0)
        step_u = 2 * tl.load(delta + u, mask=inside, other=0.0)
        kept = inside & (tl.load(flags + u, mask=inside, other=0) == 1)
        for offset in range(0, block):
            p = base + offset
            valid = kept & (tl.load(flags + p, mask=inside, other=1) == 0)
            change = of_u + tl.load(q + p, mask=inside, other=0.0)
            entries = tl.load(inside_R + u.to(tl.int64) * block + offset, mask=valid, other=0.0)
            change += step_u * tl.load(delta + p, mask=inside, other=0.0) * entries
            lower = valid & (change < low)
            low = tl.where(lower, change, low)
            pair = tl.where(lower, u.to(tl.int64) * cols + p, pair)
    lowest = tl.min(low, 0)
    none = cols.to(tl.int64) * cols
    first = tl.min(tl.where((low == lowest) & (pair >= 0), pair, none), 0)
    found = first < none
    best_u = tl.where(found, (first // cols).to(tl.int32), best_u)
    best_p = tl.where(found, (first % cols).to(tl.int32), best_p)
    return tl.where(found, lowest, best), best_u, best_p


@triton.jit
def make_swap(  # type: ignore[no-untyped-def]
    R, q, delta, flags, u, p, cols, TOP: tl.constexpr, WIDE: tl.constexpr
):
    """Prune kept ``u``, restore pruned ``p``: columns of the lowest q of kept and of pruned weights then.

    Flags of the two are left to the caller, tried marks and holds of the others do not count.
    """
    line_u = R + u.to(tl.int64) * cols
    line_p = R + p.to(tl.int64) * cols
    step_u = tl.load(delta + u)
    step_p = tl.load(delta + p)
    cross = 2 * step_u * step_p * tl.load(line_u + p)
    tl.debug_barrier()
    low_u = tl.full((1, WIDE), TOP, q.dtype.element_ty)
    low_p = low_u
    at_u = tl.zeros((1, WIDE), tl.int32) + cols
    at_p = at_u
    for start in range(0, cols, WIDE):
        j = start + tl.arange(0, WIDE)[None, :]
        inside = j < cols
        change = 2 * step_u * tl.load(line_u + j, mask=inside, other=0.0)
        change += 2 * step_p * tl.load(line_p + j, mask=inside, other=0.0)
        value = tl.load(q + j, mask=inside, other=0.0)
        moved = (j == u) | (j == p)
        value = tl.where(moved, -value - cross, value + tl.load(delta + j, mask=inside, other=0.0) * change)
        tl.store(q + j, value, mask=inside)
        kept = (tl.load(flags + j, mask=inside, other=0) & 1) != 0
        kept = (kept | (j == p)) & (j != u)
        lower = kept & (value < low_u)
        low_u = tl.where(lower, value, low_u)
        at_u = tl.where(lower, j, at_u)
        lower = inside & (kept == 0) & (value < low_p)
        low_p = tl.where(lower, value, low_p)
        at_p = tl.where(lower, j, at_p)
    tl.debug_barrier()
    tl.store(delta + u, -step_u)
    tl.store(delta + p, -step_p)
    next_u = tl.min(first_index(low_u, at_u, cols), 0)
    next_p = tl.min(first_index(low_p, at_p, cols), 0)
    return next_u, next_p
