"""The steps of the CUDA kernel on one row, replayed on the CPU and counted.

Notation as in ``sparseswaps.solvers.kernels.reference``, all arithmetic in float32 as on the device. A row
is one block of its pattern, as with unstructured sparsity. After some ranks of two lines without an
improvement come the lines of all kept weights, by bounds that need no ``R``:

    b_u = q_u + f(s_u),   f(t) = min_p (q_p - 2 t s_p),   s_j = |y_j| √ρ_j

``f`` is computed for every ``s_u``, or on a grid of ``t`` and between two of its points by the chord: a
minimum of affine functions is concave and lies above its chords.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from sparseswaps.solvers.kernels.scaling import LEVELS, probes

Array = np.ndarray[Any, Any]

# Lines that are looked at together.
GROUP = 16
# Entries of R that one transaction of 32 bytes brings.
SECTOR = 8
BIG = np.float32(1e30)
ONE, TWO, SLACK = np.float32(1), np.float32(2), np.float32(1e-6)


class Count(IntEnum):
    """What is counted; the ``last_`` ones belong to searches of all lines that found nothing.

    ``lines`` were compared with the threshold pair by pair, ``pairs`` of them were below it, in so many
    ``sectors``; ``rank_sectors`` are those of the pairs of ranks that can beat the first one looked at.
    """

    swaps = 0
    ranks = 1
    rank_sectors = 2
    searches = 3
    lines = 4
    pairs = 5
    sectors = 6
    last_searches = 7
    last_lines = 8
    last_pairs = 9
    last_sectors = 10


class Row(NamedTuple):
    """State of a row, each (cols,): ``q``, ``δ``, the mask, ``s``."""

    q: Array
    delta: Array
    kept: Array
    spread: Array


compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
probed_lines = compiled(probes)


@compiled
def line_bounds(row: Row, chords: bool) -> Array:
    """``b_u`` of every kept weight, ``BIG`` for the others (cols,)."""
    q, _, kept, spread = row
    pruned = np.flatnonzero(~kept)
    values, widths = q[pruned], spread[pruned]
    grid, lowest = np.empty(LEVELS + 1, np.float32), np.full(LEVELS + 1, BIG, np.float32)
    if chords:
        for g in range(LEVELS + 1):
            grid[g] = spread.max() * np.float32((g / LEVELS) ** 2)
            for k in range(len(values)):
                lowest[g] = min(lowest[g], values[k] - TWO * grid[g] * widths[k])
    bound = np.full(len(q), BIG, np.float32)
    for u in np.flatnonzero(kept):
        low = BIG
        if chords:
            g = 1
            while g < LEVELS and grid[g] < spread[u]:
                g += 1
            share = (grid[g] - spread[u]) / (grid[g] - grid[g - 1]) if grid[g] > grid[g - 1] else ONE
            low = lowest[g] + share * (lowest[g - 1] - lowest[g])
        else:
            for k in range(len(values)):
                low = min(low, values[k] - TWO * spread[u] * widths[k])
        bound[u] = q[u] + low - SLACK * (abs(q[u]) + abs(low))
    return bound


@compiled
def best_partner(R: Array, row: Row, u: int, limit: Any, counts: Array) -> tuple[Any, int]:
    """Lowest Δ of the line of ``u`` and its p; counts the pairs whose bound is at most ``limit``."""
    q, delta, kept, spread = row
    best, found, sector = BIG, -1, -1
    counts[Count.lines] += 1
    for p in range(len(q)):
        if not kept[p]:
            change = q[u] + q[p] + TWO * delta[u] * delta[p] * R[u, p]
            if change < best:
                best, found = change, p
            if q[u] + q[p] - TWO * spread[u] * spread[p] <= limit:
                counts[Count.pairs] += 1
                if p // SECTOR != sector:
                    sector = p // SECTOR
                    counts[Count.sectors] += 1
    return best, found


@compiled
def rank_sectors(row: Row, line: int, wanted: bool, low: Any, known: Any) -> int:
    """Sectors of the partners in a line of a rank whose bound is not above a known Δ."""
    q, _, kept, spread = row
    sector, count = -1, 0
    for j in range(len(q)):
        under = kept[j] == wanted and low + q[j] - TWO * spread[line] * spread[j] <= known
        if under and j // SECTOR != sector:
            sector = j // SECTOR
            count += 1
    return count


@compiled
def ranked(R: Array, row: Row, limit: Any, ranks: int, counts: Array) -> tuple[Any, int, int]:
    """Two lines of the lowest q, the second lowest and so on, until a swap has Δ below ``limit``."""
    q, delta, kept, _ = row
    tried = np.zeros(len(q), np.bool_)
    for _ in range(ranks):
        u0, p0, low_u, low_p = -1, -1, BIG, BIG
        for j in range(len(q)):
            if not tried[j]:
                if kept[j]:
                    if q[j] < low_u:
                        low_u, u0 = q[j], j
                elif q[j] < low_p:
                    low_p, p0 = q[j], j
        if u0 < 0 or p0 < 0:
            break
        change, other, p1, u1 = BIG, BIG, -1, -1
        for j in range(len(q)):
            if kept[j]:
                value = low_p + q[j] + TWO * delta[p0] * delta[j] * R[p0, j]
                if value < other:
                    other, u1 = value, j
            else:
                value = low_u + q[j] + TWO * delta[u0] * delta[j] * R[u0, j]
                if value < change:
                    change, p1 = value, j
        counts[Count.ranks] += 1
        known = min(limit, low_u + low_p + TWO * delta[u0] * delta[p0] * R[u0, p0])
        counts[Count.rank_sectors] += rank_sectors(row, u0, False, low_u, known)
        counts[Count.rank_sectors] += rank_sectors(row, p0, True, low_p, known)
        if min(change, other) < limit:
            return (other, u1, p0) if other < change else (change, u0, p1)
        tried[u0] = tried[p0] = True
    return limit, -1, -1


@compiled
def best_of_lines(
    R: Array, row: Row, chords: bool, known: Any, u: int, p: int, counts: Array
) -> tuple[Any, int, int]:
    """The lowest Δ of all if it is at least as good as a known swap (Δ, u, p).

    Groups of lines by index; those of a group by their bounds while these are not above the incumbent.
    """
    bound = line_bounds(row, chords)
    best, best_u, best_p = known, u, p
    for first in range(0, len(bound), GROUP):
        group = bound[first : first + GROUP]
        while True:
            k = group.argmin()
            if group[k] > best:
                break
            group[k] = BIG
            change, partner = best_partner(R, row, first + k, best, counts)
            if change < best or (change == best and (best_u < 0 or first + k < best_u)):
                best, best_u, best_p = change, first + k, partner
    return best, best_u, best_p


@compiled
def first_of_lines(R: Array, row: Row, limit: Any, counts: Array) -> tuple[Any, int, int]:
    """The first line with a Δ below ``limit`` and its best partner: lowest bounds first, then by index."""
    bound = line_bounds(row, True)
    under = np.flatnonzero(bound < limit)
    order = under[np.argsort(bound[under], kind="mergesort")]
    order[probed_lines(len(bound)) :].sort()
    for first in range(0, len(order), GROUP):
        best, best_u, best_p = limit, -1, -1
        for u in order[first : first + GROUP]:
            change, partner = best_partner(R, row, u, limit, counts)
            if best_u < 0 and change < limit:
                best, best_u, best_p = change, u, partner
        if best_u >= 0:
            return best, best_u, best_p
    return limit, -1, -1


@compiled
def lowest_of_lines(R: Array, row: Row, known: Any, u: int, p: int, counts: Array) -> tuple[Any, int, int]:
    """As ``best_of_lines``, groups of the lowest bounds first, then by index."""
    bound = line_bounds(row, True)
    order = np.argsort(bound, kind="mergesort")
    order[probed_lines(len(bound)) :].sort()
    best, best_u, best_p = known, u, p
    for first in range(0, len(order), GROUP):
        group = order[first : first + GROUP]
        threshold = best
        for u in group:
            if bound[u] <= threshold:
                change, partner = best_partner(R, row, u, threshold, counts)
                if change < best or (change == best and (best_u < 0 or u < best_u)):
                    best, best_u, best_p = change, u, partner
    return best, best_u, best_p


@compiled
def make_swap(R: Array, row: Row, u: int, p: int) -> None:
    """Prune ``u``, restore ``p`` and bring the state up to date."""
    q, delta, kept, _ = row
    cross = TWO * delta[u] * delta[p] * R[u, p]
    q_u, q_p = -q[u] - cross, -q[p] - cross
    from_u, from_p = TWO * delta[u], TWO * delta[p]
    for j in range(len(q)):
        q[j] += delta[j] * (from_u * R[u, j] + from_p * R[p, j])
    q[u], q[p] = q_u, q_p
    delta[u], delta[p] = -delta[u], -delta[p]
    kept[u], kept[p] = False, True


@compiled
def descend(
    R: Array, row: Row, limit: Any, chords: bool, first: bool, steepest: bool, ranks: int, counts: Array
) -> int:
    """Swap until no Δ is below ``limit``: how many swaps were made.

    Args:
        R: correlation (cols, cols).
        row: its state, brought up to date.
        limit: what Δ must stay below.
        chords: whether bounds of lines come from chords.
        first: whether the first line that improves is taken, the lowest bounds first, else the best of all.
        steepest: whether all lines are looked at for every swap, for the best of all.
        ranks: how many ranks are tried before all lines are.
        counts: added to (len(Count),).
    """
    made = 0
    own = np.zeros_like(counts)
    shift = Count.last_searches - Count.searches
    while True:
        best, u, p = ranked(R, row, limit, 1 if steepest else ranks, counts)
        if steepest or u < 0:
            own[:] = 0
            if steepest and first:
                best, u, p = lowest_of_lines(R, row, best, u, p, own)
            elif first:
                best, u, p = first_of_lines(R, row, limit, own)
            else:
                best, u, p = best_of_lines(R, row, chords, best, u, p, own)
            if u >= 0 and not best < limit:
                u = -1
            own[Count.searches] = 1
            for k in range(Count.searches, Count.last_searches):
                counts[k if u >= 0 else k + shift] += own[k]
        if u < 0:
            return made
        make_swap(R, row, u, p)
        made += 1
        counts[Count.swaps] += 1


@compiled
def best_swap(R: Array, row: Row, groups_by_bound: bool, counts: Array) -> tuple[Any, int, int]:
    """The swap with the lowest Δ, improving or not: what a certificate rests on."""
    best, u, p = ranked(R, row, BIG, 1, counts)
    if groups_by_bound:
        return lowest_of_lines(R, row, best, u, p, counts)
    return best_of_lines(R, row, False, best, u, p, counts)
