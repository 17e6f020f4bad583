"""1-swap search when the rows of a layer share one budget (equal sparsity per layer).

Weights may then move between rows. A swap between two rows has no interaction term: pruning kept ``u``
of row a and restoring pruned ``p`` of row b changes the layer's error by ``q_u^a + q_p^b``, the sum of
two single moves (symbols of ``kernels.reference``), so the best one is the cheapest weight to prune with
the best weight to restore in another row. The search takes turns: exchanges between rows until none
improves, then swaps inside the rows that changed, until neither finds anything. What it ends at is an
optimum of both neighbourhoods, checked from freshly computed costs.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from ..base import Budget, Outcome, Status
from ..kernels import kernels_for
from ..kernels.interface import DescentOptions
from .local_search import descend_layer, row_batches

# Turns of exchanges and swaps; each lowers the error, and a few suffice.
TURNS = 200


def single_moves(problem: LayerProblem, mask: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
    """``δ`` and ``q`` of some rows under ``mask`` (rows, cols), from scratch, float64 (len(rows), cols)."""
    weight = problem.scaled_weight[rows]
    kept = mask[rows]
    cost = weight.masked_fill(kept, 0) @ problem.gram.correlation64
    if problem.scaled_drift is not None:
        cost += problem.scaled_drift[rows]
    delta = torch.where(kept, weight, -weight)
    return delta, delta * delta + 2 * delta * cost


def best_exchange(problem: LayerProblem, mask: Tensor) -> tuple[float, tuple[int, int, int, int]]:
    """The best swap between two rows from fresh costs: Δ and (row a, pruned u, row b, restored p).

    Δ is infinite for a layer of one row.
    """
    lowest = [torch.empty(problem.rows, dtype=torch.float64, device=problem.device) for _ in range(2)]
    column = [torch.empty(problem.rows, dtype=torch.int64, device=problem.device) for _ in range(2)]
    for rows in row_batches(problem):
        _, q = single_moves(problem, mask, rows)
        for side, free in enumerate((mask[rows], ~mask[rows])):
            lowest[side][rows], column[side][rows] = q.masked_fill(~free, torch.inf).min(1)
    pruned, restored = (side.topk(min(2, problem.rows), largest=False) for side in lowest)
    best, chosen = float("inf"), (0, 0, 0, 0)
    for prune_cost, a in zip(pruned.values.tolist(), pruned.indices.tolist(), strict=True):
        for restore_cost, b in zip(restored.values.tolist(), restored.indices.tolist(), strict=True):
            if a != b and prune_cost + restore_cost < best:
                best = prune_cost + restore_cost
                chosen = (a, int(column[0][a]), b, int(column[1][b]))
    return best, chosen


def exchange_limit(problem: LayerProblem, errors: Tensor, tolerance: float) -> float:
    """What an exchange must gain: the tolerated share of the mean row error, or rounding."""
    rounding = 2.0**-49 * float((problem.scaled_weight**2).sum(1).max())
    return max(tolerance * float(errors.mean()), rounding)


def descend_budget(
    problem: LayerProblem, start: Tensor, tolerance: float, search: str, budget: Budget
) -> Outcome:
    """Descend over swaps inside rows and exchanges between rows.

    Args:
        problem: a layer whose pattern is a ``LayerBudget``.
        start: warm start (rows, cols), bool.
        tolerance: share of the row's (for exchanges, of the mean row's) starting error that counts.
        search: ``lazy`` or ``best``, inside rows.
        budget: limits.
    """
    deadline = budget.deadline()
    options = DescentOptions(tolerance, search=search)
    exchange_rows = kernels_for(problem.device).exchange_rows
    mask = start.clone()
    errors = problem.row_objectives(mask)
    limit = exchange_limit(problem, errors, tolerance) / 2
    swaps = torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
    exchanges = torch.zeros_like(swaps)
    certified = torch.zeros(problem.rows, dtype=torch.bool, device=problem.device)
    delta, q = single_moves(problem, mask, slice(None))
    status = Status.ITERATION_LIMIT
    for _ in range(TURNS):
        if time.monotonic() >= deadline:
            status = Status.TIME_LIMIT
            break
        before = mask.clone()
        exchanges += exchange_rows(problem.gram.correlation64, delta, q, mask, limit, deadline)
        # rows that an exchange touched are no longer certified; every other row still is
        certified &= (mask == before).all(1)
        rows = (~certified).nonzero().squeeze(1)
        if not len(rows):
            status = Status.LOCAL_OPTIMUM
            break
        part = problem.slice_rows(rows)
        descent = descend_layer(part, mask[rows], options, budget, deadline)
        mask[rows] = descent.mask
        swaps[rows] += descent.swaps
        certified[rows] = descent.converged
        delta[rows], q[rows] = single_moves(problem, mask, rows)
    statuses = [Status.LOCAL_OPTIMUM if done else status for done in certified.tolist()]
    stats = {"swaps": swaps, "exchanges": exchanges, "certified": certified.to(torch.int64)}
    return Outcome(mask, status, row_statuses=statuses, stats=stats)
