"""The costs ``c`` of a tile of rows from scratch, and what the floating-point type can decide with them."""

from __future__ import annotations

import numpy as np

from ..scaling import LARGEST_FLOAT32, NOISE
from .compilation import Array, compiled
from .row_state import aligned

# Products of at most this many pruned weights are summed before they go to float64, over so many columns
# at once that the partial sums stay in the first cache and the rows of R in the second.
SPAN = 128
WIDTH = 512


@compiled
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


@compiled
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


@compiled
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


@compiled
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
