"""The descent on CPUs: numba, threads over tiles of rows. Twin of ``reference.descend``.

A tile of rows computes its ``c`` together (one pass over ``R`` serves them all), then each row
descends by itself. A row that finds no more swap gets its ``c`` from products in float64 sums again
(over the weights that moved) and looks again: what is called converged does not rest on the small
updates of the search. Threads take the next tile as they become free;
rows never see each other, so neither threads nor tiles change the result.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .cpu_loops import BOUND_SLACK, Array, best_swaps_of_tile, descend_tile, exchange_loop, prune_tile
from .reference import BestSwaps, Descent

# Rows that share one pass over R; fewer when there are few rows or when time is short.
TILE = 128
# Swaps between rows that are made between two looks at the clock.
EXCHANGES = 10_000
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
    patience: int = 0,
    tenure: int = 1,
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
        patience: moves of a tabu walk without improvement after which it stops; 0 for no walk.
        tenure: moves for which a moved weight stays, at least 1.
        deadline: rows not begun at this moment of ``time.monotonic()`` keep the warm start.
        largest_correlation: ``ρ`` (cols,); computed if not given.
        report: called with the number of rows done since the last call.
    """
    rows = len(scaled_weight)
    R = correlation.contiguous().numpy()
    weight = scaled_weight.contiguous().numpy()
    has_drift = scaled_drift is not None
    drift = np.zeros((1, 1), R.dtype) if scaled_drift is None else scaled_drift.contiguous().numpy()
    offset = np.zeros(rows) if constant is None else constant.double().numpy()
    root = _root(correlation, largest_correlation)
    kept = mask.clone().contiguous().numpy()
    swaps = np.zeros(rows, np.int64)
    converged = np.zeros(rows, np.bool_)
    resolved = np.ones(rows, np.bool_)
    error = np.full(rows, np.nan)
    most = UNLIMITED if max_swaps is None else max_swaps

    def work(first: int, last: int) -> None:
        descend_tile(
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
            patience,
            tenure,
            swaps[first:last],
            converged[first:last],
            resolved[first:last],
            error[first:last],
        )
        if report is not None:
            report(last - first)

    for_tiles(work, rows, deadline)
    return Descent(*(torch.from_numpy(array) for array in (kept, swaps, converged, resolved, error)))


def best_swaps(
    correlation: Tensor,
    scaled_weight: Tensor,
    scaled_drift: Tensor | None,
    mask: Tensor,
    block: int,
    largest_correlation: Tensor | None = None,
) -> BestSwaps:
    """The swap with the lowest Δ of each row, see ``reference.best_swaps``; arguments as of ``descend``."""
    rows = len(scaled_weight)
    R = correlation.contiguous().numpy()
    root = _root(correlation, largest_correlation)
    weight = scaled_weight.contiguous().numpy()
    has_drift = scaled_drift is not None
    drift = np.zeros((1, 1), R.dtype) if scaled_drift is None else scaled_drift.contiguous().numpy()
    kept = mask.contiguous().numpy()
    change = np.empty(rows)
    pruned = np.empty(rows, np.int64)
    restored = np.empty(rows, np.int64)

    def work(first: int, last: int) -> None:
        best_swaps_of_tile(
            R,
            root,
            weight[first:last],
            drift[first:last] if has_drift else drift,
            has_drift,
            kept[first:last],
            block,
            change[first:last],
            pruned[first:last],
            restored[first:last],
        )

    for_tiles(work, rows)
    return BestSwaps(torch.from_numpy(change), torch.from_numpy(pruned), torch.from_numpy(restored))


def prune(
    correlation: Tensor,
    scaled_weight: Tensor,
    scaled_drift: Tensor | None,
    mask: Tensor,
    block: int,
    keep: int,
    deadline: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """Backward greedy, see ``reference.prune``; arguments as of ``descend``."""
    rows = len(scaled_weight)
    R = correlation.contiguous().numpy()
    weight = scaled_weight.contiguous().numpy()
    has_drift = scaled_drift is not None
    drift = np.zeros((1, 1), R.dtype) if scaled_drift is None else scaled_drift.contiguous().numpy()
    kept = mask.clone().contiguous().numpy()
    finished = np.zeros(rows, np.bool_)

    def work(first: int, last: int) -> None:
        part = drift[first:last] if has_drift else drift
        prune_tile(R, weight[first:last], part, has_drift, kept[first:last], block, keep)
        finished[first:last] = True

    for_tiles(work, rows, deadline)
    return torch.from_numpy(kept), torch.from_numpy(finished)


def exchange_rows(
    correlation: Tensor,
    delta: Tensor,
    q: Tensor,
    mask: Tensor,
    limit: float,
    deadline: float = float("inf"),
) -> Tensor:
    """Swap between rows until none improves, see ``reference.exchange_rows``; one thread."""
    touched = torch.zeros(len(q), dtype=torch.int64)
    state = delta.numpy(), q.numpy(), mask.numpy()
    while time.monotonic() < deadline:
        if exchange_loop(correlation.numpy(), *state, limit, EXCHANGES, touched.numpy()):
            break
    return touched


def _root(correlation: Tensor, largest: Tensor | None) -> Array:
    """``√ρ`` (cols,), rounded up, in the dtype of ``correlation``."""
    if largest is None:
        largest = (correlation - torch.diag(correlation.diagonal())).abs().amax(1)
    root = largest.double().sqrt() * (1 + BOUND_SLACK)
    array: Array = root.to(correlation.dtype).numpy()
    return array


def for_tiles(work: Callable[[int, int], None], rows: int, deadline: float = float("inf")) -> None:
    """Call ``work(first, last)`` for tiles of rows from torch's number of threads, until ``deadline``."""
    threads = max(1, torch.get_num_threads())
    largest = TILE if deadline == float("inf") else TILE // 16
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
