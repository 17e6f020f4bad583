"""Swaps between rows, many at a time, for devices where one at a time is slow.

Twin of ``reference.exchange_rows``. A swap between two rows changes the error by the sum of two single moves,
and rows do not see each other: swaps of disjoint pairs of rows may be made together. A round pairs the row
with the cheapest weight to prune with the one that has the best weight to restore, the second cheapest with
the second best, and so on, and makes those that improve; a row takes part once. It ends at the same kind of
optimum: no swap between rows improves.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

# Weights that are brought up to date together: bounds the memory of a round.
ROUND_WEIGHTS = 1 << 24


def exchange_rows(
    correlation: Tensor,
    delta: Tensor,
    q: Tensor,
    mask: Tensor,
    limit: float,
    deadline: float = float("inf"),
) -> Tensor:
    """Swap between rows until none improves, see ``reference.exchange_rows``."""
    rows, cols = q.shape
    size = max(1, ROUND_WEIGHTS // cols)
    touched = torch.zeros(rows, dtype=torch.int64, device=q.device)
    lowest = torch.empty((2, rows), dtype=q.dtype, device=q.device)
    column = torch.empty((2, rows), dtype=torch.int64, device=q.device)

    def renew(chosen: Tensor) -> None:
        for side, free in enumerate((mask[chosen], ~mask[chosen])):
            lowest[side, chosen], column[side, chosen] = q[chosen].masked_fill(~free, torch.inf).min(1)

    def move(chosen: Tensor, moved: Tensor) -> None:
        index = torch.arange(len(chosen), device=q.device)
        state, step, kept = q[chosen], delta[chosen], mask[chosen]
        own = -state[index, moved]
        state += 2 * step[index, moved, None] * step * correlation[moved]
        state[index, moved] = own
        step[index, moved] *= -1
        kept[index, moved] ^= True
        q[chosen], delta[chosen], mask[chosen] = state, step, kept
        touched[chosen] += 1

    for first in range(0, rows, size):
        renew(torch.arange(first, min(first + size, rows), device=q.device))
    while rows > 1 and time.monotonic() < deadline:
        pruning, restoring = _disjoint(lowest, limit)
        if not len(pruning):
            break
        chosen = torch.cat([pruning, restoring])
        moved = torch.cat([column[0, pruning], column[1, restoring]])
        for first in range(0, len(chosen), size):
            part = slice(first, first + size)
            move(chosen[part], moved[part])
            renew(chosen[part])
    return touched


def _disjoint(lowest: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Disjoint pairs of rows (a, b) whose exchange has Δ < ``-limit``, none only if there is none at all."""
    rows = lowest.shape[1]
    order = lowest.argsort(dim=1, stable=True)
    a, b = order
    index = torch.arange(rows, device=lowest.device)
    place = torch.empty_like(order)
    place[0, a], place[1, b] = index, index
    first_use = place.amin(0)
    improves = lowest[0, a] + lowest[1, b] < -limit
    chosen = improves & (a != b) & (first_use[a] == index) & (first_use[b] == index)
    if bool(chosen.any()):
        return a[chosen], b[chosen]
    # the same row is first on both sides: the better of its two exchanges with the second ones
    others = torch.stack([torch.stack([a[0], b[1]]), torch.stack([a[1], b[0]])])
    change = lowest[0, others[:, 0]] + lowest[1, others[:, 1]]
    best = others[change.argmin()][None]
    best = best[(change.min() < -limit).expand(1)]
    return best[:, 0], best[:, 1]
