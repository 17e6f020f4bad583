"""What is launched, one program for each row: the descent, the tabu walk, the best swap."""

from __future__ import annotations

import triton
import triton.language as tl

from .lines import make_swap, narrow_blocks, two_lines
from .pairs import find_bounds, search_lines


@triton.jit
def descend_rows(  # type: ignore[no-untyped-def]
    R,
    inside_R,
    root,
    q,
    delta,
    flags,
    level,
    levels,
    lows,
    bounds,
    queue,
    limits,
    most,
    made_of,
    none_left_of,
    cols,
    block,
    STEEPEST: tl.constexpr,
    NARROW: tl.constexpr,
    ONE: tl.constexpr,
    RANKS: tl.constexpr,
    PROBES: tl.constexpr,
    LEVELS: tl.constexpr,
    SLACK: tl.constexpr,
    TOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVEL_BLOCKS: tl.constexpr,
    LEVEL_WIDE: tl.constexpr,
    LINES: tl.constexpr,
    LINE_WIDE: tl.constexpr,
):
    """Swap until none is left or ``most`` (rows,) are made; below 0, a row is left alone.

    ``q``, ``delta``, ``flags`` (rows, cols) are brought up to date, so that a launch goes on where another
    ended; ``made_of`` and ``none_left_of`` (rows,) are results.
    """
    row = tl.program_id(0).to(tl.int64)
    q += row * cols
    delta += row * cols
    flags += row * cols
    level += row * cols
    levels += row * (LEVELS + 1)
    lows += row * (cols // block) * (LEVELS + 1)
    bounds += row * cols
    queue += row * cols
    limit = -tl.load(limits + row)
    left = tl.load(most + row)
    made = tl.zeros((), tl.int64)
    none_left = tl.zeros((), tl.int32)
    known_u = tl.full((), -1, tl.int32)
    known_p = tl.full((), -1, tl.int32)
    going = left >= 0
    while going:
        best = limit
        best_u = tl.full((), -1, tl.int32)
        best_p = tl.full((), -1, tl.int32)
        if NARROW:
            best, best_u, best_p = narrow_blocks(
                inside_R, q, delta, flags, best, best_u, best_p, cols, block, CHUNK
            )
        else:
            rank = tl.zeros((), tl.int32)
            ranks = tl.full((), 1 if STEEPEST else RANKS, tl.int32)
            while (rank < ranks) & (best_u < 0):
                best, best_u, best_p = two_lines(
                    R, q, delta, flags, root, best, best_u, best_p, known_u, known_p, cols, block,
                    True, TOP, BLOCKS, WIDE,
                )  # fmt: skip
                known_u = tl.full((), -1, tl.int32)
                known_p = tl.full((), -1, tl.int32)
                rank += 1
            if (rank > 1) | (best_u < 0) | (not ONE):
                tl.debug_barrier()
                for start in range(0, cols, CHUNK):
                    j = start + tl.arange(0, CHUNK)
                    tl.store(flags + j, tl.load(flags + j, mask=j < cols, other=0) & 1, mask=j < cols)
                tl.debug_barrier()
            if STEEPEST or best_u < 0:
                find_bounds(
                    q, delta, flags, root, level, levels, lows, bounds, cols, block,
                    TOP, SLACK, LEVELS, LEVEL_BLOCKS, LEVEL_WIDE, CHUNK,
                )  # fmt: skip
                best, best_u, best_p = search_lines(
                    R, q, delta, flags, root, bounds, queue, best, best_u, best_p, cols, block,
                    STEEPEST, TOP, PROBES, ONE, CHUNK, LINES, LINE_WIDE,
                )  # fmt: skip
        improves = (best_u >= 0) & (best < limit)
        none_left = tl.where(improves, 0, 1).to(tl.int32)
        going = improves & (made < left)
        if going:
            next_u, next_p = make_swap(R, q, delta, flags, best_u, best_p, cols, TOP, CHUNK)
            tl.store(flags + best_u, tl.zeros((), tl.int8))
            tl.store(flags + best_p, tl.full((), 1, tl.int8))
            tl.debug_barrier()
            if ONE:
                known_u = next_u
                known_p = next_p
            made += 1
    tl.store(made_of + row, made)
    tl.store(none_left_of + row, none_left)


@triton.jit
def best_of_rows(  # type: ignore[no-untyped-def]
    R,
    inside_R,
    root,
    q,
    delta,
    flags,
    level,
    levels,
    lows,
    bounds,
    queue,
    change_of,
    pruned_of,
    restored_of,
    cols,
    block,
    NARROW: tl.constexpr,
    ONE: tl.constexpr,
    PROBES: tl.constexpr,
    LEVELS: tl.constexpr,
    SLACK: tl.constexpr,
    TOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVEL_BLOCKS: tl.constexpr,
    LEVEL_WIDE: tl.constexpr,
    LINES: tl.constexpr,
    LINE_WIDE: tl.constexpr,
):
    """The swap with the lowest Δ of a row: (Δ, u, p), u = -1 in a row without any."""
    row = tl.program_id(0).to(tl.int64)
    q += row * cols
    delta += row * cols
    flags += row * cols
    best = tl.zeros((), q.dtype.element_ty) + TOP
    best_u = tl.full((), -1, tl.int32)
    best_p = tl.full((), -1, tl.int32)
    if NARROW:
        best, best_u, best_p = narrow_blocks(
            inside_R, q, delta, flags, best, best_u, best_p, cols, block, CHUNK
        )
    else:
        level += row * cols
        levels += row * (LEVELS + 1)
        lows += row * (cols // block) * (LEVELS + 1)
        bounds += row * cols
        queue += row * cols
        best, best_u, best_p = two_lines(
            R,
            q,
            delta,
            flags,
            root,
            best,
            best_u,
            best_p,
            best_u,
            best_p,
            cols,
            block,
            False,
            TOP,
            BLOCKS,
            WIDE,
        )
        find_bounds(
            q, delta, flags, root, level, levels, lows, bounds, cols, block,
            TOP, SLACK, LEVELS, LEVEL_BLOCKS, LEVEL_WIDE, CHUNK,
        )  # fmt: skip
        best, best_u, best_p = search_lines(
            R, q, delta, flags, root, bounds, queue, best, best_u, best_p, cols, block,
            True, TOP, PROBES, ONE, CHUNK, LINES, LINE_WIDE,
        )  # fmt: skip
    tl.store(change_of + row, best)
    tl.store(pruned_of + row, best_u)
    tl.store(restored_of + row, best_p)


@triton.jit
def walk_rows(  # type: ignore[no-untyped-def]
    R,
    inside_R,
    root,
    q,
    delta,
    flags,
    held,
    best_flags,
    limits,
    moves_of,
    gained_of,
    patience,
    tenure,
    cols,
    block,
    NARROW: tl.constexpr,
    TOP: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tabu walk from an optimum, see ``reference``; what a move has moved is held for ``tenure`` moves.

    ``held`` (rows, 2 · tenure), full of -1, is work space. ``best_flags`` (rows, cols), ``moves_of`` and
    ``gained_of`` (rows,) are results; ``best_flags`` begins as a copy of ``flags``.
    """
    row = tl.program_id(0).to(tl.int64)
    q += row * cols
    delta += row * cols
    flags += row * cols
    best_flags += row * cols
    held += row * 2 * tenure
    limit = tl.load(limits + row)
    none = tl.full((), -1, tl.int32)
    moves = tl.zeros((), tl.int32)
    last_gain = tl.zeros((), tl.int32)
    error = tl.zeros((), tl.float64)
    best_error = tl.zeros((), tl.float64)
    gained = tl.zeros((), tl.int32)
    going = moves >= 0
    while going:
        change = tl.zeros((), q.dtype.element_ty) + TOP
        u = none
        p = none
        if NARROW:
            change, u, p = narrow_blocks(inside_R, q, delta, flags, change, u, p, cols, block, CHUNK)
        else:
            change, u, p = two_lines(
                R, q, delta, flags, root, change, u, p, none, none, cols, block, False, TOP, BLOCKS, WIDE
            )
        going = u >= 0
        if going:
            make_swap(R, q, delta, flags, u, p, cols, TOP, CHUNK)
            slot = held + 2 * (moves % tenure)
            freed_u = tl.load(slot)
            freed_p = tl.load(slot + 1)
            flag_u = tl.load(flags + freed_u, mask=freed_u >= 0, other=0) & 1
            flag_p = tl.load(flags + freed_p, mask=freed_p >= 0, other=0) & 1
            tl.debug_barrier()
            tl.store(flags + freed_u, flag_u, mask=freed_u >= 0)
            tl.store(flags + freed_p, flag_p, mask=freed_p >= 0)
            tl.store(flags + u, tl.full((), 4, tl.int8))
            tl.store(flags + p, tl.full((), 5, tl.int8))
            tl.store(slot, u)
            tl.store(slot + 1, p)
            tl.debug_barrier()
            error += change.to(tl.float64)
            moves += 1
            if error < best_error - limit:
                best_error = error
                last_gain = moves
                gained = tl.full((), 1, tl.int32)
                for start in range(0, cols, CHUNK):
                    j = start + tl.arange(0, CHUNK)
                    flag = tl.load(flags + j, mask=j < cols, other=0) & 1
                    tl.store(best_flags + j, flag, mask=j < cols)
            going = moves - last_gain < patience
    tl.store(moves_of + row, moves)
    tl.store(gained_of + row, gained)
