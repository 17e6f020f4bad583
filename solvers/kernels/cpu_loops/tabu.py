"""The tabu walk of one row."""

from __future__ import annotations

import numpy as np

from ..scaling import NARROW_BLOCK
from .candidates import all_pairs, ranked_lines
from .compilation import Array, compiled
from .minima import big_of
from .row_state import make_swap


@compiled
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
