"""The descent in plain torch: the specification, and the oracle of every faster twin.

Scaled form: ``R = corr(G)``, ``y_j = w_j √G_jj``, ``δ_j = +y_j`` if kept and ``-y_j`` if pruned,
``c = R (y∘(1-m)) + h/√diag(G)`` and ``q_j = δ_j² + 2 δ_j c_j``. Pruning kept ``u`` and restoring
pruned ``p`` changes the error of a row by (SparseSwaps, arXiv 2512.10922, section 3)

    Δ(u, p) = q_u + q_p + 2 δ_u δ_p R_up,    then  c ← c + δ_u R_:u + δ_p R_:p,   δ_u, δ_p ← -δ_u, -δ_p

Two searches, both until no swap has Δ < -limit, half the tolerated share of the row's starting error:

- ``best``: the swap with the lowest Δ, the paper's steepest descent.
- ``lazy``: per block, u0 and p0 have the lowest q of the kept and of the pruned weights; the candidate is
  u0 with its best partner or p0 with its best partner, whichever is lower. The best candidate of all
  blocks is taken. Only if none improves, the swap with the lowest Δ of all is taken.

Ties go to the lowest (u, p). Blocks of at most ``NARROW_BLOCK`` columns have few pairs: there both
searches are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .scaling import NARROW_BLOCK, REFRESHES, rounding_noise

# Entries of Δ that are held at once.
DELTA_ENTRIES = 1 << 24


class Descent(NamedTuple):
    """Result of a descent.

    Attributes:
        mask: the final masks (rows, cols), bool.
        swaps: how many swaps each row made (rows,), int64.
        converged: rows in which freshly computed costs show no improving swap (rows,), bool.
        resolved: rows that the dtype can decide (rows,), bool; the others are to be redone in a wider one.
        error: starting error of each row (rows,), float64; NaN for rows that the deadline cut off.
    """

    mask: Tensor
    swaps: Tensor
    converged: Tensor
    resolved: Tensor
    error: Tensor


class BestSwaps(NamedTuple):
    """The best swap of each row, improving or not.

    Attributes:
        change: Δ (rows,), float64, at the squared scale of the row.
        pruned: u (rows,), int64.
        restored: p (rows,), int64.
    """

    change: Tensor
    pruned: Tensor
    restored: Tensor


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
    largest_correlation: Tensor | None = None,  # a bound for the faster twins
    report: Callable[[int], None] | None = None,
) -> Descent:
    """Descend row by row; all floats of one dtype.

    Args:
        correlation: ``R`` (cols, cols).
        scaled_weight: ``y`` (rows, cols), each row at its own scale (see ``scaling``).
        scaled_drift: ``h/√diag(G)`` (rows, cols) at the same scales, or None.
        constant: the drift's constant (rows,) at the squared scales, or None.
        mask: warm start (rows, cols), bool.
        block: width of the pattern's blocks; swaps stay inside one.
        tolerance: share of the row's starting error that counts as an improvement.
        max_swaps: the most swaps per row.
        search: ``lazy`` or ``best``.
        deadline: stop at this moment of ``time.monotonic()``.
        largest_correlation: ``ρ`` (cols,), not needed here.
        report: called with the number of rows done since the last call.
    """
    rows, cols = scaled_weight.shape
    mask = mask.clone()
    swaps = torch.zeros(rows, dtype=torch.int64, device=mask.device)
    converged = torch.zeros(rows, dtype=torch.bool, device=mask.device)
    resolved = torch.ones_like(converged)
    error = torch.full((rows,), torch.nan, dtype=torch.float64, device=mask.device)
    size = max(1, DELTA_ENTRIES // (cols * block))
    for first in range(0, rows, size):
        active = torch.arange(first, min(first + size, rows), device=mask.device)
        limit = torch.zeros(len(active), dtype=torch.float64, device=mask.device)
        for refresh in range(REFRESHES):
            if time.monotonic() >= deadline or not len(active):
                break
            drift = None if scaled_drift is None else scaled_drift[active]
            state = _Rows(correlation, scaled_weight[active], drift, mask[active], block)
            if refresh == 0:
                start = state.error() + (0 if constant is None else constant[active].double())
                error[active] = start.clamp_min(0)
                limit = tolerance * error[active] / 2
            noise = rounding_noise(scaled_weight[active], drift, mask[active])
            if scaled_weight.dtype == torch.float32:
                hopeless = noise > limit
                resolved[active[hopeless]] = False
                state.keep(~hopeless)
                active, limit = active[~hopeless], limit[~hopeless]
            else:
                limit = torch.maximum(limit, noise)
            again, calm = _descend_batch(state, active, mask, swaps, limit, max_swaps, search, deadline)
            converged[active[calm]] = True
            active, limit = active[again], limit[again]
        else:
            resolved[active] = False
        if report is not None:
            report(min(first + size, rows) - first)
    return Descent(mask, swaps, converged, resolved, error)


def best_swaps(
    correlation: Tensor,
    scaled_weight: Tensor,
    scaled_drift: Tensor | None,
    mask: Tensor,
    block: int,
    largest_correlation: Tensor | None = None,
) -> BestSwaps:
    """The swap with the lowest Δ of each row, from freshly computed costs; arguments as of ``descend``."""
    rows, cols = scaled_weight.shape
    size = max(1, DELTA_ENTRIES // (cols * block))
    parts = []
    for first in range(0, rows, size):
        part = slice(first, first + size)
        drift = None if scaled_drift is None else scaled_drift[part]
        state = _Rows(correlation, scaled_weight[part], drift, mask[part], block)
        parts.append(state.best_swap(torch.zeros(1, device=mask.device), "best"))
    change, pruned, restored = (torch.cat(column) for column in zip(*parts, strict=True))
    return BestSwaps(change.double(), pruned, restored)


def _descend_batch(
    state: _Rows,
    rows: Tensor,
    mask: Tensor,
    swaps: Tensor,
    limit: Tensor,
    max_swaps: int | None,
    search: str,
    deadline: float,
) -> tuple[Tensor, Tensor]:
    """Swap until nothing is left; (rows to look at again, rows that were at an optimum), both bool."""
    made = torch.zeros(len(rows), dtype=torch.int64, device=mask.device)
    none_left = torch.zeros(len(rows), dtype=torch.bool, device=mask.device)
    where = torch.arange(len(rows), device=mask.device)
    while len(where) and time.monotonic() < deadline:
        change, pruned, restored = state.best_swap(limit[where], search)
        improves = change < -limit[where]
        none_left[where[~improves]] = True
        if max_swaps is not None:
            improves &= swaps[rows[where]] < max_swaps
        state.keep(improves)
        where, pruned, restored = where[improves], pruned[improves], restored[improves]
        state.swap(pruned, restored)
        mask[rows[where]] = state.mask
        swaps[rows[where]] += 1
        made[where] += 1
    return none_left & (made > 0), none_left & (made == 0)


class _Rows:
    """State of some rows: ``δ``, ``c`` (rows, cols) and their masks."""

    def __init__(self, correlation: Tensor, weight: Tensor, drift: Tensor | None, mask: Tensor, block: int):
        self.correlation = correlation
        self.mask = mask.clone()
        self.block = block
        self.delta = torch.where(mask, weight, -weight)
        self.drift = torch.zeros_like(weight) if drift is None else drift
        self.cost = weight.masked_fill(mask, 0) @ correlation + self.drift

    def error(self) -> Tensor:
        """``Σ_pruned y (c + h)`` of each row, float64."""
        pruned = (-self.delta).double().masked_fill(self.mask, 0)
        return (pruned * (self.cost.double() + self.drift.double())).sum(1)

    def keep(self, chosen: Tensor) -> None:
        """Forget the other rows."""
        self.mask, self.delta = self.mask[chosen], self.delta[chosen]
        self.cost, self.drift = self.cost[chosen], self.drift[chosen]

    def best_swap(self, limit: Tensor, search: str) -> tuple[Tensor, Tensor, Tensor]:
        """(Δ, u, p) of the swap that the search chooses in each row."""
        rows, cols = self.delta.shape
        shape = (rows, cols // self.block, self.block)
        q = (self.delta * self.delta + 2 * self.delta * self.cost).view(shape)
        inside = torch.stack(
            [self.correlation[i : i + self.block, i : i + self.block] for i in range(0, cols, self.block)]
        )
        step, kept = self.delta.view(shape), self.mask.view(shape)
        change = q[..., :, None] + q[..., None, :] + 2 * step[..., :, None] * step[..., None, :] * inside
        change.masked_fill_(~(kept[..., :, None] & ~kept[..., None, :]), torch.inf)
        every = change.flatten(1)
        if search == "lazy" and self.block > NARROW_BLOCK:
            u0 = _first_argmin(q.masked_fill(~kept, torch.inf))
            p0 = _first_argmin(q.masked_fill(kept, torch.inf))
            index = torch.arange(self.block, device=q.device)
            on_line = (index[:, None] == u0[..., None, None]) | (index == p0[..., None, None])
            candidates = change.masked_fill(~on_line, torch.inf).flatten(1)
            stuck = candidates.amin(1) >= -limit
            every = torch.where(stuck[:, None], every, candidates)
        pair = _first_argmin(every)
        start = pair // self.block**2 * self.block
        pruned, restored = start + pair // self.block % self.block, start + pair % self.block
        return every.gather(1, pair[:, None]).squeeze(1), pruned, restored

    def swap(self, pruned: Tensor, restored: Tensor) -> None:
        """Prune and restore one weight in every row."""
        row = torch.arange(len(pruned), device=pruned.device)
        self.cost = self.cost + self.delta[row, pruned, None] * self.correlation[pruned]
        self.cost = self.cost + self.delta[row, restored, None] * self.correlation[restored]
        self.delta[row, pruned] *= -1
        self.delta[row, restored] *= -1
        self.mask[row, pruned] = False
        self.mask[row, restored] = True


def _first_argmin(values: Tensor) -> Tensor:
    """Index of the first minimum along the last dimension."""
    index = torch.arange(values.shape[-1], device=values.device)
    lowest = values == values.amin(-1, keepdim=True)
    return torch.where(lowest, index, values.shape[-1]).amin(-1)
