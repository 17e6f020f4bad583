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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cpu_loops.compilation import Array
from .cpu_loops.descent import best_swaps_of_tile, descend_tile
from .cpu_loops.exchanges import exchange_loop
from .cpu_loops.greedy import prune_tile
from .interface import BestSwaps, Descent, DescentOptions, ScaledProblem, unsolved

# Rows that share one pass over R; fewer when there are few rows or when time is short.
TILE = 128
# Swaps between rows that are made between two looks at the clock.
EXCHANGES = 10_000
UNLIMITED = np.iinfo(np.int64).max


class _Arrays(NamedTuple):
    """A problem as the loops take it: ``R``, ``y``, the scaled drift or a stand-in, whether there is one."""

    R: Array
    weight: Array
    drift: Array
    has_drift: bool

    def tile(self, first: int, last: int) -> _Arrays:
        """Rows [first, last)."""
        drift = self.drift[first:last] if self.has_drift else self.drift
        return self._replace(weight=self.weight[first:last], drift=drift)


def _arrays(problem: ScaledProblem) -> _Arrays:
    R = problem.correlation.contiguous().numpy()
    weight = problem.weight.contiguous().numpy()
    if problem.drift is None:
        return _Arrays(R, weight, np.zeros((1, 1), R.dtype), False)
    return _Arrays(R, weight, problem.drift.contiguous().numpy(), True)


def descend(
    problem: ScaledProblem,
    mask: Tensor,
    options: DescentOptions,
    deadline: float = float("inf"),
    report: Callable[[int], None] | None = None,
) -> Descent:
    """Descend row by row, see ``reference.descend``; rows begun before the deadline are finished."""
    rows = len(mask)
    arrays = _arrays(problem)
    root = problem.root().numpy()
    constant = np.zeros(rows) if problem.constant is None else problem.constant.double().numpy()
    found = unsolved(mask.contiguous())
    kept, *results = (column.numpy() for column in found)
    most = UNLIMITED if options.max_swaps is None else options.max_swaps

    def work(first: int, last: int) -> None:
        R, weight, drift, has_drift = arrays.tile(first, last)
        descend_tile(
            R,
            root,
            weight,
            drift,
            has_drift,
            constant[first:last],
            kept[first:last],
            problem.block,
            options.tolerance,
            most,
            options.search == "best",
            options.patience,
            options.tenure,
            *(result[first:last] for result in results),
        )
        if report is not None:
            report(last - first)

    for_tiles(work, rows, deadline)
    return found


def best_swaps(problem: ScaledProblem, mask: Tensor) -> BestSwaps:
    """The swap with the lowest Δ of each row, see ``reference.best_swaps``."""
    rows = len(mask)
    arrays = _arrays(problem)
    root = problem.root().numpy()
    kept = mask.contiguous().numpy()
    results = np.empty(rows), np.empty(rows, np.int64), np.empty(rows, np.int64)

    def work(first: int, last: int) -> None:
        R, weight, drift, has_drift = arrays.tile(first, last)
        parts = (result[first:last] for result in results)
        best_swaps_of_tile(R, root, weight, drift, has_drift, kept[first:last], problem.block, *parts)

    for_tiles(work, rows)
    return BestSwaps(*(torch.from_numpy(result) for result in results))


def prune(
    problem: ScaledProblem, mask: Tensor, keep: int, deadline: float = float("inf")
) -> tuple[Tensor, Tensor]:
    """Backward greedy, see ``reference.prune``."""
    arrays = _arrays(problem)
    kept = mask.clone().contiguous().numpy()
    finished = np.zeros(len(mask), np.bool_)

    def work(first: int, last: int) -> None:
        prune_tile(*arrays.tile(first, last), kept[first:last], problem.block, keep)
        finished[first:last] = True

    for_tiles(work, len(mask), deadline)
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
