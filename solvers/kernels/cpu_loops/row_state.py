"""The state of one row: filling it, the change of a swap, making a swap."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compilation import Array, compiled
from .minima import big_of


@compiled
def aligned(rows: int, cols: int, like: Array) -> Array:
    """Uninitialised (rows, at least cols) in the dtype of ``like``, each row on a cache line of its own."""
    lane = 64 // like.itemsize
    width = (cols + lane - 1) // lane * lane
    buffer = np.empty(rows * width + lane, like.dtype)
    offset = (-(buffer.ctypes.data // like.itemsize)) % lane
    return buffer[offset : offset + rows * width].reshape(rows, width)


@compiled
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


@compiled
def swap_change(R: Array, delta: Array, kept_q: Array, pruned_q: Array, pruned: int, restored: int) -> Any:
    """Δ(u, p) of one pair."""
    two = delta.dtype.type(2)
    return (kept_q[pruned] + pruned_q[restored]) + two * delta[pruned] * delta[restored] * R[pruned, restored]


@compiled
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
