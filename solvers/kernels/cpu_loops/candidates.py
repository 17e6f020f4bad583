"""Candidates for the next swap: two lines per block, or every pair of a narrow block."""

from __future__ import annotations

from typing import Any

from .compilation import Array, compiled
from .minima import argmin, big_of, line_argmin
from .row_state import swap_change


@compiled
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


@compiled
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


@compiled
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
