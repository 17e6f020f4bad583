"""The descent in plain torch: the specification, and the oracle of every faster twin.

Scaled form: ``R = corr(G)``, ``y_j = w_j √G_jj``, ``δ_j = +y_j`` if kept and ``-y_j`` if pruned,
``c = R (y∘(1-m)) + h/√diag(G)`` and ``q_j = δ_j² + 2 δ_j c_j``. Pruning kept ``u`` and restoring
pruned ``p`` changes the error of a row by (SparseSwaps, arXiv 2512.10922, section 3)

    Δ(u, p) = q_u + q_p + 2 δ_u δ_p R_up,    then  c ← c + δ_u R_:u + δ_p R_:p,   δ_u, δ_p ← -δ_u, -δ_p

Two searches, both until no swap has Δ < -limit, half the tolerated share of the row's starting error:

- ``best``: the swap with the lowest Δ, the paper's steepest descent.
- ``lazy``: per block, u0 and p0 have the lowest q of the kept and of the pruned weights; the candidate is
  u0 with its best partner or p0 with its best partner, whichever is lower, and the best candidate of all
  blocks is taken. If it does not improve, the second lowest q of both sides are tried in the same way, and
  so on. Only if none of ``RANKS`` ranks improves, whole lines Δ(u, ·) are looked at, and the best swap of the
  first one with an improving swap is taken: some lines in the order of their bounds (``probes``), then the
  others in the order of u. No swap is left if no line has any.

The bound of a line, with ``ρ_j = max_{i≠j} |R_ij|`` and ``s_j = |y_j| √ρ_j``, is

    Δ(u, p) ≥ q_u + f(s_u),    f(t) = min_p (q_p - 2 t s_p),    because |R_up| ≤ √(ρ_u ρ_p).

A minimum of affine functions is concave, so f lies above its chords: f is found at ``LEVELS`` levels
``max(s) (g/LEVELS)²`` and at 0, a pass over p each, and interpolated between two of them.

A tabu walk starts from the optimum that the descent reached: each move is the best lazy candidate,
improving or not, of weights that did not move in the last ``tenure`` moves, until ``patience`` moves have
passed since the lowest error. If that is lower by more than the limit, the row goes on from its mask
with a descent and another walk.

Ties go to the lowest (u, p). Blocks of at most ``NARROW_BLOCK`` columns have few pairs: there both
searches are the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import costs, descend_batch
from .interface import BestSwaps, Descent, DescentOptions, ScaledProblem, unsolved
from .scaling import BOUND_ROUNDING, LEVELS, NARROW_BLOCK, RANKS, probes

# Entries of Δ that are held at once.
DELTA_ENTRIES = 1 << 24


def descend(
    problem: ScaledProblem,
    mask: Tensor,
    options: DescentOptions,
    deadline: float = float("inf"),
    report: Callable[[int], None] | None = None,
) -> Descent:
    """Descend row by row.

    Args:
        problem: the rows, at their scales.
        mask: warm start (rows, cols), bool.
        options: how to search.
        deadline: stop at this moment of ``time.monotonic()``; rows not begun by then keep the warm start.
        report: called with the number of rows done since the last call.
    """
    found = unsolved(mask)
    for part in _batches(problem):
        batch = Descent(*(column[part] for column in found))
        descend_batch(problem.rows(part), batch, options, deadline, _Steps(options, deadline))
        if report is not None:
            report(len(batch.mask))
    return found


def best_swaps(problem: ScaledProblem, mask: Tensor) -> BestSwaps:
    """The swap with the lowest Δ of each row, from freshly computed costs.

    Args:
        problem: the rows, at their scales; constants are not needed.
        mask: kept weights (rows, cols), bool.
    """
    parts = []
    for part in _batches(problem):
        rows = problem.rows(part)
        state = _Rows(rows, mask[part], costs(rows, mask[part]))
        parts.append(state.best_swap(torch.zeros(1, device=mask.device), "best"))
    change, pruned, restored = (torch.cat(column) for column in zip(*parts, strict=True))
    return BestSwaps(change.double(), pruned, restored)


def _batches(problem: ScaledProblem) -> list[slice]:
    """Batches of rows of at most ``DELTA_ENTRIES`` pairs."""
    rows, cols = problem.weight.shape
    size = max(1, DELTA_ENTRIES // (cols * problem.block))
    return [slice(first, first + size) for first in range(0, rows, size)]


@dataclass(frozen=True)
class _Steps:
    """Steps of a search in plain torch, see ``batch``; all rows swap at the same time."""

    options: DescentOptions
    deadline: float

    def swap(
        self, problem: ScaledProblem, cost: Tensor, mask: Tensor, limit: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Swap until none is left."""
        state = _Rows(problem, mask, cost)
        made = torch.zeros_like(left)
        none_left = torch.zeros_like(left, dtype=torch.bool)
        where = torch.arange(len(mask), device=mask.device)
        while len(where) and time.monotonic() < self.deadline:
            change, pruned, restored = state.best_swap(limit[where], self.options.search)
            improves = change < -limit[where]
            none_left[where[~improves]] = True
            improves &= made[where] < left[where]
            state.keep(improves)
            where, pruned, restored = where[improves], pruned[improves], restored[improves]
            state.swap(pruned, restored)
            mask[where] = state.mask
            made[where] += 1
        return made, none_left

    def walk(
        self, problem: ScaledProblem, cost: Tensor, mask: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Walk from some optima."""
        state = _Rows(problem, mask, cost)
        patience, tenure = self.options.patience, self.options.tenure
        rows = len(state.mask)
        found = state.mask.clone()
        moves = torch.zeros(rows, dtype=torch.int64, device=found.device)
        gained = torch.zeros(rows, dtype=torch.bool, device=found.device)
        level = torch.zeros(rows, dtype=torch.float64, device=found.device)
        best_level = level.clone()
        last_gain = moves.clone()
        moved = torch.full(found.shape, -tenure - 1, dtype=torch.int64, device=found.device)
        where = torch.arange(rows, device=found.device)
        while len(where):
            free = moves[where, None] - moved > tenure
            change, pruned, restored = state.candidate(state.mask & free, ~state.mask & free)
            going = torch.isfinite(change)
            state.keep(going)
            where, moved = where[going], moved[going]
            state.swap(pruned[going], restored[going])
            level[where] += change[going].double()
            index = torch.arange(len(where), device=found.device)
            moved[index, pruned[going]] = moves[where]
            moved[index, restored[going]] = moves[where]
            moves[where] += 1
            better = level[where] < best_level[where] - limit[where]
            record = where[better]
            best_level[record], last_gain[record] = level[record], moves[record]
            found[record], gained[record] = state.mask[better], True
            going = moves[where] - last_gain[where] < patience
            state.keep(going)
            where, moved = where[going], moved[going]
        return found, moves, gained


def prune(
    problem: ScaledProblem, mask: Tensor, keep: int, deadline: float = float("inf")
) -> tuple[Tensor, Tensor]:
    """Backward greedy: prune the weight with the lowest q until each block keeps ``keep``.

    Args:
        problem: the rows, at their scales; constants are not needed.
        mask: start (rows, cols), bool; each row keeps the same number, each block at least ``keep``.
        keep: weights that each block keeps.
        deadline: rows not finished at this moment of ``time.monotonic()`` are not done.

    Returns:
        Masks (rows, cols) and whether each row is finished (rows,).
    """
    rows, cols = problem.weight.shape
    block = problem.block
    state = _Rows(problem, mask, costs(problem, mask))
    row = torch.arange(rows, device=mask.device)
    todo = int(mask[0].sum()) - keep * (cols // block)
    for _ in range(todo):
        if time.monotonic() >= deadline:
            break
        q = state.delta * state.delta + 2 * state.delta * state.cost
        full = state.mask.view(rows, -1, block).sum(2) <= keep
        closed = full[..., None].expand(-1, -1, block).reshape(rows, cols)
        pruned = _first_argmin(q.masked_fill(closed | ~state.mask, torch.inf))
        state.cost = state.cost + state.delta[row, pruned, None] * state.correlation[pruned]
        state.delta[row, pruned] *= -1
        state.mask[row, pruned] = False
    finished = state.mask.sum(1) == keep * (cols // block)
    return state.mask, finished


def exchange_rows(
    correlation: Tensor,
    delta: Tensor,
    q: Tensor,
    mask: Tensor,
    limit: float,
    deadline: float = float("inf"),
) -> Tensor:
    """Swap between rows until none improves: prune u in row a, restore p in row b ≠ a at Δ = q_u + q_p.

    Args:
        correlation: ``R`` (cols, cols).
        delta: ``δ`` (rows, cols) of all rows at one scale, brought up to date.
        q: ``q`` (rows, cols), brought up to date.
        mask: kept weights (rows, cols), brought up to date.
        limit: Δ must be below ``-limit``.
        deadline: stop at this moment of ``time.monotonic()``.

    Returns:
        How many exchanges each row took part in (rows,).
    """
    rows = len(q)
    touched = torch.zeros(rows, dtype=torch.int64, device=q.device)
    lowest = torch.empty((2, rows), dtype=q.dtype, device=q.device)
    column = torch.empty((2, rows), dtype=torch.int64, device=q.device)

    def renew(row: int) -> None:
        for side, free in enumerate((mask[row], ~mask[row])):
            values = q[row].masked_fill(~free, torch.inf)
            column[side, row] = _first_argmin(values)
            lowest[side, row] = values[column[side, row]]

    for row in range(rows):
        renew(row)
    while rows > 1 and time.monotonic() < deadline:
        a, b = (int(_first_argmin(side)) for side in lowest)
        if a == b:
            others = lowest.clone()
            others[:, a] = torch.inf
            other_a, other_b = (int(_first_argmin(side)) for side in others)
            if lowest[0, a] + lowest[1, other_b] <= lowest[0, other_a] + lowest[1, b]:
                b = other_b
            else:
                a = other_a
        if not lowest[0, a] + lowest[1, b] < -limit:
            break
        for row, j in ((a, int(column[0, a])), (b, int(column[1, b]))):
            own = q[row, j].clone()
            q[row] += 2 * delta[row, j] * delta[row] * correlation[j]
            q[row, j] = -own
            delta[row, j] *= -1
            mask[row, j] = ~mask[row, j]
            touched[row] += 1
            renew(row)
    return touched


class _Rows:
    """State of some rows: ``δ``, ``c`` (rows, cols) and their masks."""

    def __init__(self, problem: ScaledProblem, mask: Tensor, cost: Tensor):
        R, weight, block = problem.correlation, problem.weight, problem.block
        self.correlation = R
        self.inside = torch.stack([R[i : i + block, i : i + block] for i in range(0, len(R), block)])
        self.root = problem.root()
        self.mask = mask.clone()
        self.block = block
        self.delta = torch.where(mask, weight, -weight)
        self.cost = cost.to(weight.dtype)

    def keep(self, chosen: Tensor) -> None:
        """Forget the other rows."""
        self.mask, self.delta, self.cost = self.mask[chosen], self.delta[chosen], self.cost[chosen]

    def best_swap(self, limit: Tensor, search: str) -> tuple[Tensor, Tensor, Tensor]:
        """(Δ, u, p) of the swap that the search chooses in each row."""
        if search == "best" or self.block <= NARROW_BLOCK:
            return self._best_of_pairs(self.mask, ~self.mask)
        change, pruned, restored = self.candidate(self.mask, ~self.mask)
        for rank in range(1, RANKS + 1):
            stuck = (change >= -limit).nonzero().squeeze(1)
            if not len(stuck):
                break
            rows = self.copy_of(stuck)
            if rank < RANKS:
                found = rows.candidate(rows.mask, ~rows.mask, rank)
            else:
                found = rows._first_line(limit[stuck])
            change[stuck], pruned[stuck], restored[stuck] = found
        return change, pruned, restored

    def copy_of(self, chosen: Tensor) -> _Rows:
        """The chosen rows."""
        rows = copy.copy(self)
        rows.keep(chosen)
        return rows

    def candidate(self, kept: Tensor, pruned: Tensor, rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(Δ, u, p) of the best lazy candidate among the given ``kept`` and ``pruned`` (rows, cols).

        ``rank`` counts how many lower q of each side and block are passed over; Δ is infinite where a
        block has no more.
        """
        if self.block <= NARROW_BLOCK:
            return self._best_of_pairs(kept, pruned)
        q, step, inside, shape = self._blocks()
        kept_q = q.masked_fill(~kept.view(shape), torch.inf)
        pruned_q = q.masked_fill(~pruned.view(shape), torch.inf)
        number = torch.arange(shape[1], device=q.device)
        # stable: ties go to the lowest index
        u0 = kept_q.argsort(dim=2, stable=True)[..., rank : rank + 1]
        p0 = pruned_q.argsort(dim=2, stable=True)[..., rank : rank + 1]
        of_u0 = kept_q.gather(2, u0) + pruned_q + 2 * step.gather(2, u0) * step * inside[number, u0[..., 0]]
        of_p0 = pruned_q.gather(2, p0) + kept_q + 2 * step.gather(2, p0) * step * inside[number, p0[..., 0]]
        (change, partner), (other_change, other) = (
            (value[..., None], index[..., None]) for value, index in map(_first_min, (of_u0, of_p0))
        )
        swapped = other_change < change
        change = torch.where(swapped, other_change, change)[..., 0]
        u, p = torch.where(swapped, other, u0)[..., 0], torch.where(swapped, p0, partner)[..., 0]
        best = _first_argmin(change)[:, None]
        start = best[:, 0] * self.block
        return (
            change.gather(1, best)[:, 0],
            start + u.gather(1, best)[:, 0],
            start + p.gather(1, best)[:, 0],
        )

    def _first_line(self, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(Δ, u, p) of the first line with a swap below ``-limit``; Δ is infinite where there is none."""
        line, partner = (side.flatten(1) for side in _first_min(self._changes(self.mask, ~self.mask)))
        bounds = self._line_bounds().masked_fill(~self.mask, torch.inf)
        place = bounds.argsort(dim=1, stable=True).argsort(dim=1)
        index = torch.arange(line.shape[1], device=line.device)
        first = probes(line.shape[1])
        turn = torch.where(place < first, place, first + index)
        u = turn.masked_fill(line >= -limit[:, None], first + line.shape[1]).argmin(1)
        change, inside = (side.gather(1, u[:, None])[:, 0] for side in (line, partner))
        change = change.masked_fill(change >= -limit, torch.inf)
        return change, u, u // self.block * self.block + inside

    def _line_bounds(self) -> Tensor:
        """Lower bounds of Δ(u, ·) for every u (rows, cols), see the module."""
        q, _, _, shape = self._blocks()
        spread = self.delta.abs() * self.root
        levels, level = levels_of(spread)
        others = q.masked_fill(self.mask.view(shape), torch.inf)
        reach = 2 * levels[:, None, :, None] * spread.view(shape)[:, :, None, :]
        lowest = (others[:, :, None, :] - reach).amin(3)
        above, below = lowest.gather(2, level.view(shape)), lowest.gather(2, level.view(shape) - 1)
        top = levels.gather(1, level)
        width = top - levels.gather(1, level - 1)
        share = torch.where(width > 0, (top - spread) / width, 0.0).view(shape)
        bound = above + share * (below - above)
        return (q + bound - BOUND_ROUNDING * (q.abs() + bound.abs())).flatten(1)

    def _changes(self, kept: Tensor, pruned: Tensor) -> Tensor:
        """Δ of all pairs (rows, blocks, block, block), infinite but for the given ``kept`` × ``pruned``."""
        q, step, inside, shape = self._blocks()
        change = q[..., :, None] + q[..., None, :] + 2 * step[..., :, None] * step[..., None, :] * inside
        pairs = kept.view(shape)[..., :, None] & pruned.view(shape)[..., None, :]
        return change.masked_fill_(~pairs, torch.inf)

    def _best_of_pairs(self, kept: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        every = self._changes(kept, pruned).flatten(1)
        pair = _first_argmin(every)
        start = pair // self.block**2 * self.block
        u, p = start + pair // self.block % self.block, start + pair % self.block
        return every.gather(1, pair[:, None]).squeeze(1), u, p

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
        """``q`` and ``δ`` (rows, blocks, block), ``R`` inside the blocks, and that shape."""
        rows, cols = self.delta.shape
        shape = (rows, cols // self.block, self.block)
        q = self.delta * self.delta + 2 * self.delta * self.cost
        return q.view(shape), self.delta.view(shape), self.inside, shape

    def swap(self, pruned: Tensor, restored: Tensor) -> None:
        """Prune and restore one weight in every row."""
        row = torch.arange(len(pruned), device=pruned.device)
        self.cost = self.cost + self.delta[row, pruned, None] * self.correlation[pruned]
        self.cost = self.cost + self.delta[row, restored, None] * self.correlation[restored]
        self.delta[row, pruned] *= -1
        self.delta[row, restored] *= -1
        self.mask[row, pruned] = False
        self.mask[row, restored] = True


def levels_of(spread: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of ``s`` (rows, cols): the grid from 0 on (rows, LEVELS + 1), the number of each s from 1 on."""
    grid = torch.arange(LEVELS + 1, dtype=spread.dtype, device=spread.device) / LEVELS
    levels = (spread.amax(1, keepdim=True) * (grid * grid)).contiguous()
    return levels, torch.searchsorted(levels, spread.contiguous()).clamp_(1, LEVELS)


def _first_min(values: Tensor) -> tuple[Tensor, Tensor]:
    """First minimum along the last dimension, and its index."""
    index = _first_argmin(values)
    return values.gather(-1, index[..., None])[..., 0], index


def _first_argmin(values: Tensor) -> Tensor:
    """Index of the first minimum along the last dimension."""
    index = torch.arange(values.shape[-1], device=values.device)
    lowest = values == values.amin(-1, keepdim=True)
    return torch.where(lowest, index, values.shape[-1]).amin(-1)
