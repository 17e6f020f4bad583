"""The search over all pairs of a row that reads few entries of ``R``, see ``reference`` and ``best_pair``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_bounds(  # type: ignore[no-untyped-def]
    q,
    delta,
    flags,
    root,
    level,
    levels,
    lows,
    bounds,
    cols,
    block,
    TOP: tl.constexpr,
    SLACK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Fill ``bounds`` (cols,): of the line of each kept weight, ``TOP`` for the others.

    The minima over a block at every level are kept lane by lane in (BLOCKS, LEVELS, WIDE) and reduced once.
    """
    reach = 2 * tl.load(levels + 1 + tl.arange(0, LEVELS))[None, :, None]
    for group in range(0, cols, BLOCKS * block):
        base = group + tl.arange(0, BLOCKS) * block
        end = tl.where(base < cols, base + block, 0)
        column = base[:, None] + tl.arange(0, WIDE)[None, :]
        low = tl.full((BLOCKS, LEVELS, WIDE), TOP, q.dtype.element_ty)
        low_q = tl.full((BLOCKS, WIDE), TOP, q.dtype.element_ty)
        for start in range(0, block, WIDE):
            j = column + start
            inside = j < end[:, None]
            pruned = (tl.load(flags + j, mask=inside, other=1) & 1) == 0
            value = tl.where(pruned, tl.load(q + j, mask=inside, other=TOP), TOP)
            spread = tl.abs(tl.load(delta + j, mask=inside, other=0.0))
            spread *= tl.load(root + j, mask=inside, other=0.0)
            low = tl.minimum(low, value[:, None, :] - reach * spread[:, None, :])
            low_q = tl.minimum(low_q, value)
        place = base // block * (LEVELS + 1)
        tl.store(lows + place, tl.min(low_q, 1), mask=base < cols)
        place = place[:, None] + 1 + tl.arange(0, LEVELS)[None, :]
        tl.store(lows + place, tl.min(low, 2), mask=(base[:, None] < cols) & (place > 0))
    tl.debug_barrier()
    for start in range(0, cols, CHUNK):
        j = start + tl.arange(0, CHUNK)
        inside = j < cols
        kept = inside & ((tl.load(flags + j, mask=inside, other=0) & 1) != 0)
        spread = tl.abs(tl.load(delta + j, mask=inside, other=0.0)) * tl.load(
            root + j, mask=inside, other=0.0
        )
        number = tl.load(level + j, mask=inside, other=1).to(tl.int32)
        above = tl.load(levels + number, mask=inside, other=0.0)
        width = above - tl.load(levels + number - 1, mask=inside, other=0.0)
        share = tl.where(width > 0, (above - spread) / tl.where(width > 0, width, 1.0), 0.0)
        place = j // block * (LEVELS + 1) + number
        low = tl.load(lows + place, mask=inside, other=0.0)
        low += share * (tl.load(lows + place - 1, mask=inside, other=0.0) - low)
        value = tl.load(q + j, mask=inside, other=0.0)
        bound = value + low - SLACK * (tl.abs(value) + tl.abs(low))
        tl.store(bounds + j, tl.where(kept, bound, TOP), mask=inside)
    tl.debug_barrier()


@triton.jit
def beats(bound, best, ALL: tl.constexpr, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether what has this lower bound is to be looked at: ties with the incumbent only with ``ALL``."""
    return (bound <= best) & (bound < TOP) if ALL else bound < best


@triton.jit
def lowest_bound(bounds, cols, TOP: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest bound and its column."""
    low = tl.full((CHUNK,), TOP, bounds.dtype.element_ty)
    at = tl.zeros((CHUNK,), tl.int32) + cols
    for start in range(0, cols, CHUNK):
        j = start + tl.arange(0, CHUNK)
        bound = tl.load(bounds + j, mask=j < cols, other=TOP)
        lower = bound < low
        low = tl.where(lower, bound, low)
        at = tl.where(lower, j, at)
    lowest = tl.min(low, 0)
    return lowest, tl.min(tl.where(low == lowest, at, cols), 0)


@triton.jit
def lines_of(  # type: ignore[no-untyped-def]
    R,
    q,
    delta,
    flags,
    root,
    u,
    wanted,
    best,
    cols,
    block,
    ALL: tl.constexpr,
    TOP: tl.constexpr,
    ONE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(Δ, p) of the best partners of kept weights ``u`` (lines,) that are ``wanted`` (lines,).

    Only pairs whose bound beats ``best`` are read. ``ONE`` says that a row is one block, so that all have the
    same partners; p is ``cols`` where there is none.
    """
    q_u = tl.load(q + u, mask=wanted, other=0.0)[:, None]
    step_u = 2 * tl.load(delta + u, mask=wanted, other=0.0)[:, None]
    reach = tl.abs(step_u) * tl.load(root + u, mask=wanted, other=0.0)[:, None]
    line = R + u.to(tl.int64)[:, None] * cols
    base = tl.zeros((1, 1), tl.int32) if ONE else (u // block * block)[:, None]
    low = tl.full((u.shape[0], WIDE), TOP, q.dtype.element_ty)
    at = tl.zeros((u.shape[0], WIDE), tl.int32) + cols
    for start in range(0, block, WIDE):
        offset = start + tl.arange(0, WIDE)[None, :]
        p = base + offset
        inside = (offset < block) & (p < cols)
        pruned = (tl.load(flags + p, mask=inside, other=1) & 1) == 0
        value = tl.load(q + p, mask=inside, other=TOP)
        step = tl.load(delta + p, mask=inside, other=0.0)
        spread = tl.abs(step) * tl.load(root + p, mask=inside, other=0.0)
        single = q_u + value
        looked = wanted[:, None] & pruned & beats(single - reach * spread, best, ALL, TOP)
        entries = tl.load(line + p, mask=looked, other=0.0)
        change = single + step_u * step * entries
        lower = looked & (change < low)
        low = tl.where(lower, change, low)
        at = tl.where(lower, p, at)
    lowest = tl.min(low, 1)
    return lowest, tl.min(tl.where(low == lowest[:, None], at, cols), 1)


@triton.jit
def take_line(change, u, p, best, best_u, best_p, cols, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The incumbent or the best of some lines (lines,); without ``ALL`` the first that is better."""
    lane = tl.arange(0, u.shape[0])
    if ALL:
        low = tl.min(change, 0)
        chosen = tl.min(tl.where((change == low) & (p < cols), u, cols), 0)
        better = (chosen < cols) & ((low < best) | ((low == best) & ((best_u < 0) | (chosen < best_u))))
        partner = tl.min(tl.where(u == chosen, p, cols), 0)
    else:
        first = tl.min(tl.where((change < best) & (p < cols), lane, u.shape[0]), 0)
        better = first < u.shape[0]
        chosen = tl.min(tl.where(lane == first, u, cols), 0)
        partner = tl.min(tl.where(lane == first, p, cols), 0)
        low = tl.min(tl.where(lane == first, change, best), 0)
    best = tl.where(better, low, best)
    best_u = tl.where(better, chosen, best_u)
    best_p = tl.where(better, partner, best_p)
    return best, best_u, best_p


@triton.jit
def search_lines(  # type: ignore[no-untyped-def]
    R,
    q,
    delta,
    flags,
    root,
    bounds,
    queue,
    best,
    best_u,
    best_p,
    cols,
    block,
    ALL: tl.constexpr,
    TOP: tl.constexpr,
    PROBES: tl.constexpr,
    ONE: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
    LINE_WIDE: tl.constexpr,
):
    """The best swap of all lines with ``ALL``, else that of the first line that is better than the incumbent.

    A few lines with the lowest ``bounds`` (cols,) come first, then the others in the order of u.
    """
    probes = tl.zeros((), tl.int32)
    more = probes == 0
    while more & (probes < PROBES) & ((best_u < 0) | ALL):
        count = tl.zeros((), tl.int32)
        while more & (count < LINES):
            bound, at = lowest_bound(bounds, cols, TOP, CHUNK)
            more = beats(bound, best, ALL, TOP)
            tl.debug_barrier()
            tl.store(bounds + at, TOP, mask=more)
            tl.store(queue + count, at, mask=more)
            tl.debug_barrier()
            count += more.to(tl.int32)
        best, best_u, best_p = next_lines(
            R, q, delta, flags, root, queue, 0, count, best, best_u, best_p, cols, block,
            ALL, TOP, ONE, LINES, LINE_WIDE,
        )  # fmt: skip
        probes += LINES
        tl.debug_barrier()
    if more & ((best_u < 0) | ALL):
        count = tl.zeros((), tl.int32)
        for start in range(0, cols, CHUNK):
            j = start + tl.arange(0, CHUNK)
            wanted = beats(tl.load(bounds + j, mask=j < cols, other=TOP), best, ALL, TOP)
            place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(queue + place, j, mask=wanted)
            count += tl.sum(wanted.to(tl.int32), 0)
        tl.debug_barrier()
        turn = tl.zeros((), tl.int32)
        while (turn < count) & ((best_u < 0) | ALL):
            best, best_u, best_p = next_lines(
                R, q, delta, flags, root, queue, turn, count, best, best_u, best_p, cols, block,
                ALL, TOP, ONE, LINES, LINE_WIDE,
            )  # fmt: skip
            turn += LINES
    return best, best_u, best_p


@triton.jit
def next_lines(  # type: ignore[no-untyped-def]
    R,
    q,
    delta,
    flags,
    root,
    queue,
    turn,
    count,
    best,
    best_u,
    best_p,
    cols,
    block,
    ALL: tl.constexpr,
    TOP: tl.constexpr,
    ONE: tl.constexpr,
    LINES: tl.constexpr,
    LINE_WIDE: tl.constexpr,
):
    """The incumbent (Δ, u, p) and the next lines of ``queue`` from ``turn`` on, ``count`` in all."""
    k = turn + tl.arange(0, LINES)
    u = tl.load(queue + k, mask=k < count, other=0)
    change, p = lines_of(R, q, delta, flags, root, u, k < count, best, cols, block, ALL, TOP, ONE, LINE_WIDE)
    return take_line(change, u, p, best, best_u, best_p, cols, ALL)
