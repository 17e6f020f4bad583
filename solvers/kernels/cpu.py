"""The descent on CPUs: numba, threads over tiles of rows. Twin of ``reference.descend``.

A tile of rows computes its ``c`` together (one pass over ``R`` serves them all), then each row
descends by itself. A row that finds no more swap gets its ``c`` afresh and looks again: what is
called converged rests on freshly computed costs. Threads take the next tile as they become free;
rows never see each other, so neither threads nor tiles change the result.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_state import (
    BOUND_SLACK,
    LEVELS,
    OPTIONS,
    Array,
    add_costs,
    all_pairs,
    best_pair,
    load_row,
    load_spread,
    make_swap,
    two_lines,
)
from .reference import Descent
from .scaling import LARGEST_FLOAT32, NARROW_BLOCK, NOISE, REFRESHES

# Rows that share one pass over R; fewer when there are few rows or when time is short.
TILE = 32
# Incremental updates of q are renewed after this many swaps per column, long before rounding matters.
SWAPS_PER_REFRESH = 4

UNLIMITED = np.iinfo(np.int64).max


def descend(
    correlation: Tensor,
    scaled_weight: Tensor,
    scaled_drift: Tensor | None,
    constant: Tensor | None,
    mask: Tensor,
    block: int,
    tolerance: float,
    max_swaps: int | None = None,
    search: str = "lazy",
    deadline: float = float("inf"),
    largest_correlation: Tensor | None = None,
    report: Callable[[int], None] | None = None,
) -> Descent:
    """Descend row by row, see ``reference.descend``; all floats of one dtype, float32 or float64.

    Args:
        correlation: ``R`` (cols, cols).
        scaled_weight: ``y`` (rows, cols), each row at its own scale (see ``scaling``).
        scaled_drift: ``h/√diag(G)`` (rows, cols) at the same scales, or None.
        constant: the drift's constant (rows,) at the squared scales, float64, or None.
        mask: warm start (rows, cols), bool.
        block: width of the pattern's blocks.
        tolerance: a swap must lower the row's error by this share of its starting error.
        max_swaps: the most swaps per row.
        search: ``lazy`` or ``best``.
        deadline: rows not begun at this moment of ``time.monotonic()`` keep the warm start.
        largest_correlation: ``ρ`` (cols,); computed if not given.
        report: called with the number of rows done since the last call.
    """
    rows = len(scaled_weight)
    R = correlation.contiguous().numpy()
    dtype = R.dtype
    weight = scaled_weight.contiguous().numpy()
    has_drift = scaled_drift is not None
    drift = np.zeros((1, 1), dtype) if scaled_drift is None else scaled_drift.contiguous().numpy()
    offset = np.zeros(rows) if constant is None else constant.double().numpy()
    if largest_correlation is None:
        largest_correlation = (correlation - torch.diag(correlation.diagonal())).abs().amax(1)
    root = (largest_correlation.double().sqrt() * (1 + BOUND_SLACK)).numpy().astype(dtype)
    kept = mask.clone().contiguous().numpy()
    swaps = np.zeros(rows, np.int64)
    converged = np.zeros(rows, np.bool_)
    resolved = np.ones(rows, np.bool_)
    error = np.full(rows, np.nan)
    most = UNLIMITED if max_swaps is None else max_swaps

    def work(first: int, last: int) -> None:
        _descend_tile(
            R,
            root,
            weight[first:last],
            drift[first:last] if has_drift else drift,
            has_drift,
            offset[first:last],
            kept[first:last],
            block,
            tolerance,
            most,
            search == "best",
            swaps[first:last],
            converged[first:last],
            resolved[first:last],
            error[first:last],
        )
        if report is not None:
            report(last - first)

    for_tiles(work, rows, deadline)
    return Descent(*(torch.from_numpy(array) for array in (kept, swaps, converged, resolved, error)))


def for_tiles(work: Callable[[int, int], None], rows: int, deadline: float = float("inf")) -> None:
    """Call ``work(first, last)`` for tiles of rows from torch's number of threads, until ``deadline``."""
    threads = max(1, torch.get_num_threads())
    largest = TILE if deadline == float("inf") else TILE // 4
    tile = max(1, min(largest, rows // (4 * threads)))
    numbers = itertools.count()
    count = -(-rows // tile)
    failed = False

    def worker() -> None:
        nonlocal failed
        while (number := next(numbers)) < count and not failed:
            if time.monotonic() >= deadline:
                return
            try:
                work(number * tile, min((number + 1) * tile, rows))
            except BaseException:
                failed = True
                raise

    if threads == 1 or count == 1:
        worker()
        return
    with ThreadPoolExecutor(min(threads, count)) as pool:
        futures = [pool.submit(worker) for _ in range(min(threads, count))]
        try:
            for future in futures:
                future.result()
        except BaseException:
            failed = True
            raise


@njit(**OPTIONS)
def _descend_tile(
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
    swaps: Array,
    converged: Array,
    resolved: Array,
    error: Array,
) -> None:
    """Descend the rows of one tile; the last four arguments (rows,) are results."""
    rows, cols = weight.shape
    cost = np.empty((rows, cols), np.float64)
    work = np.empty((10, max(cols, LEVELS + 1)), weight.dtype)
    lists = np.empty((3, cols), np.int32)
    wanted = np.ones(rows, np.bool_)
    limit = np.empty(rows, np.float64)
    for refresh in range(REFRESHES):
        add_costs(R, weight, drift, has_drift, mask, wanted, cost)
        again = False
        for r in range(rows):
            if not wanted[r]:
                continue
            drift_row = drift[r] if has_drift else drift[0]
            noise, row_error, fits = _judge(weight[r], drift_row, has_drift, mask[r], cost[r])
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
            made, none_left = _descend_row(
                R,
                root,
                weight[r],
                mask[r],
                cost[r],
                block,
                -limit[r],
                max_swaps - swaps[r],
                steepest,
                work,
                lists,
            )
            swaps[r] += made
            if made == 0 and none_left:
                converged[r] = True
            if made == 0 or (swaps[r] >= max_swaps and not none_left):
                wanted[r] = False
            else:
                again = True
        if not again:
            return
    for r in range(rows):
        if wanted[r]:
            resolved[r] = False


@njit(**OPTIONS)
def _judge(
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
def _descend_row(
    R: Array,
    root: Array,
    weight: Array,
    mask: Array,
    cost: Array,
    block: int,
    threshold: float,
    max_swaps: int,
    steepest: bool,
    work: Array,
    lists: Array,
) -> tuple[int, bool]:
    """Swap until nothing is left or a limit is reached: (swaps, whether no swap has Δ < threshold)."""
    cols = len(weight)
    delta, kept_q, pruned_q, spread = work[0, :cols], work[1, :cols], work[2, :cols], work[3, :cols]
    load_row(weight, mask, cost, delta, kept_q, pruned_q)
    level, levels = lists[2], work[4, : LEVELS + 1]
    load_spread(weight, root, spread, level, levels)
    limit = weight.dtype.type(threshold)
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
            for first in range(0, cols, block):
                change, u, p = two_lines(R, delta, kept_q, pruned_q, first, first + block)
                if change < best:
                    best, pruned, restored = change, u, p
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
