"""The loop around the inner loops: fresh costs, swaps until none is left, walks, and again.

What the swaps of a search leave behind is looked at once more with costs from scratch, in float64: what is
called converged does not rest on the small updates of the search. ``reference`` and ``cuda`` share this; what
they do with some rows is a ``Steps``.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

from .interface import Descent, DescentOptions, ScaledProblem
from .scaling import REFRESHES, WALKS, rounding_noise

# Columns of R that are widened to float64 together.
COST_COLS = 1024


class Steps(Protocol):
    """What is done with some rows between two computations of their costs."""

    def swap(
        self, problem: ScaledProblem, cost: Tensor, mask: Tensor, limit: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Swap until none is left: (swaps made (rows,), rows in which no swap is left (rows,), bool).

        Args:
            problem: the rows.
            cost: ``c`` (rows, cols), float64.
            mask: kept weights (rows, cols), brought up to date.
            limit: Δ must be below ``-limit`` (rows,), float64.
            left: the most swaps (rows,).
        """

    def walk(
        self, problem: ScaledProblem, cost: Tensor, mask: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tabu walks: (best masks, moves made (rows,), whether they gained more than ``limit`` (rows,))."""


def descend_batch(
    problem: ScaledProblem, found: Descent, options: DescentOptions, deadline: float, steps: Steps
) -> None:
    """Descend some rows: ``found`` holds the warm start and becomes the result, in place."""
    mask, swaps, converged, resolved, error = found
    active = torch.arange(len(mask), device=mask.device)
    limit = torch.zeros_like(error)
    most = torch.iinfo(torch.int64).max if options.max_swaps is None else options.max_swaps
    walks = _Walks(problem, found, steps)
    for refresh in range(REFRESHES + (2 * WALKS if options.patience else 0)):
        if time.monotonic() >= deadline or not len(active):
            break
        part, kept = problem.rows(active), mask[active]
        cost = costs(part, kept)
        now = _errors(part, kept, cost)
        if refresh == 0:
            error[:] = (now + (0 if part.constant is None else part.constant.double())).clamp_min(0)
            limit[:] = options.tolerance * error / 2
        noise = rounding_noise(part.weight, part.drift, kept)
        if part.weight.dtype == torch.float32:
            clear = noise <= limit[active]
            resolved[active[~clear]] = False
            active, part, kept, cost, now = (
                active[clear],
                part.rows(clear),
                kept[clear],
                cost[clear],
                now[clear],
            )
        else:
            limit[active] = torch.maximum(limit[active], noise)
        if not len(active):
            break
        made, none_left = steps.swap(part, cost, kept, limit[active], most - swaps[active])
        mask[active] = kept
        swaps[active] += made
        calm = none_left & (made == 0)
        again = (made > 0) & (none_left | (swaps[active] < most))
        if options.patience:
            again, calm = walks.go_on(active, again, calm, cost, now, limit[active])
        converged[active[calm]] = True
        active = active[again]
    else:
        resolved[active] = False


def costs(problem: ScaledProblem, mask: Tensor) -> Tensor:
    """``c = R (y∘(1-m)) + h`` (rows, cols) from products in float64, which no setting makes coarser."""
    weight = problem.weight
    cost = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    if problem.drift is not None:
        cost += problem.drift
    for first in range(0, weight.shape[1], COST_COLS):
        part = slice(first, first + COST_COLS)
        pruned = weight[:, part].double().masked_fill(mask[:, part], 0)
        cost.addmm_(pruned, problem.correlation[part].double())
    return cost


def _errors(problem: ScaledProblem, mask: Tensor, cost: Tensor) -> Tensor:
    """``Σ_pruned y (c + h)`` of each row, without the drift's constant, float64."""
    pruned = problem.weight.double().masked_fill(mask, 0)
    return (pruned * (cost if problem.drift is None else cost + problem.drift)).sum(1)


class _Walks:
    """Tabu walks of a batch of rows, and the best optimum that each row has walked from."""

    def __init__(self, problem: ScaledProblem, found: Descent, steps: Steps):
        self.problem, self.found, self.steps = problem, found, steps
        self.made = torch.zeros_like(found.swaps)
        self.optimum = found.mask.clone()
        self.optimum_error = torch.full_like(found.error, torch.inf)

    def go_on(
        self, rows: Tensor, again: Tensor, calm: Tensor, cost: Tensor, error: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Walk from every new optimum: (rows to look at again, rows that settle at their best), both bool.

        Args:
            rows: which rows of the batch these are (n,).
            again: those that are to be looked at again anyway (n,), bool.
            calm: those that are at an optimum (n,), bool.
            cost: their costs, which belong to the masks of those that are calm (n, cols), float64.
            error: errors of those that are calm, without the drift's constant (n,), float64.
            limit: what counts as an improvement (n,), float64.
        """
        mask = self.found.mask
        lower = error < self.optimum_error[rows] - limit
        ready = calm & lower & (self.made[rows] < WALKS)
        walkers = rows[ready]
        self.optimum[walkers], self.optimum_error[walkers] = mask[walkers], error[ready]
        self.made[walkers] += 1
        best, moves, gained = self.steps.walk(
            self.problem.rows(walkers), cost[ready], mask[walkers], limit[ready]
        )
        self.found.swaps[walkers] += moves
        gained &= self.made[walkers] < WALKS
        mask[walkers[gained]] = best[gained]
        again, calm = again.clone(), calm.clone()
        again[ready], calm[ready] = gained, ~gained
        settled = rows[calm]
        mask[settled] = torch.where(self.made[settled, None] > 0, self.optimum[settled], mask[settled])
        return again, calm
