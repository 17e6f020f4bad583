"""1-swap without the interaction term: the ablation of SparseSwaps' central formula.

Pruning kept ``u`` and restoring pruned ``p`` changes the error of a row by (arXiv 2512.10922, section 3)

    Δ(u, p) = Δ_u + Δ_p − 2 w_u w_p G_up,   Δ_u = 2 w_u c_u + w_u² G_uu,   Δ_p = −2 w_p c_p + w_p² G_pp

with ``c = G r + h``. Without the last term both sides decouple: the best pair is the cheapest weight to
prune and the most rewarding one to restore, found in O(cols) per swap instead of O(cols²),

    u = argmin Δ_u over kept,   p = argmin Δ_p over pruned,   estimate Δ_u + Δ_p

(in the best block of an N:M pattern). The estimate is wrong by ``−2 w_u w_p G_up``, and most wrong where
it matters: inputs that replace one another have a large ``G_up``. After each swap ``c`` is updated
exactly, so every swap's true Δ is known, and with it the true error.

Nothing makes the true error fall, so the walk may return to a mask that it has left; as the next swap
depends on the mask alone it would repeat itself for ever. Brent's method (*An improved Monte Carlo
factorization algorithm*, BIT 20, 1980, section 2) notices that with one remembered mask per row: remember
the mask after 1, 2, 4, 8, … swaps and stop at a mask that is the remembered one. There are finitely many
masks, so the walk ends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ..base import Budget, Group, Outcome, Solver, Status
from ..kernels.scaling import ScaledRows, rounding_noise
from ..scores import warm_start
from .local_search import row_batches, scaled_rows

ACCEPTS = ("estimate", "error")


@final
@dataclass(frozen=True)
class AdditiveSwap(Solver):
    """1-swap that takes the effects of a swap's two weights as additive (see the module).

    Args:
        max_swaps: the most swaps per row (the paper's T_max), None for no limit.
        accept: ``estimate`` makes every swap whose estimate improves the row, whatever it does to the error,
            and returns the best mask that it met; ``error`` chooses by the estimate too and stops at the
            first swap that would not lower the true error.
        tolerance: a swap must improve the row by this share of its starting error.

    The warm start is ``init``, or Wanda's mask if there is none. Stats per row: ``swaps``, ``worsening``
    (swaps that raised the true error) and ``cycled`` (1 where the walk began to repeat itself). Where
    ``accept = "estimate"`` a row whose estimates all fail or repeat is ``finished``: it need not be a 1-swap
    optimum.
    """

    name: ClassVar[str] = "additive-swap"
    group: ClassVar[Group] = Group.LOCAL_SEARCH

    max_swaps: int | None = None
    accept: str = "estimate"
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_swaps is not None and self.max_swaps < 0:
            raise InputError(f"max_swaps counts swaps: expected at least 0, found {self.max_swaps}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is a share: expected 0 ≤ tolerance < 1, found {self.tolerance}")
        if self.accept not in ACCEPTS:
            raise InputError(
                f"what additive-swap accepts by: expected {' or '.join(ACCEPTS)}, found {self.accept!r}"
            )

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Walk from the warm start; rows that a time limit cuts off return the best mask they met."""
        deadline = budget.deadline()
        start = warm_start(problem, init)
        walks = []
        for rows in row_batches(problem):
            walks.append(
                _walk(
                    problem.gram.correlation64,
                    scaled_rows(problem, start, rows),
                    start[rows],
                    problem.pattern.block,
                    self.tolerance,
                    self.max_swaps,
                    self.accept == "error",
                    deadline,
                )
            )
            budget.report(rows.stop, problem.rows)
        walk = _Walk(*(torch.cat(parts) for parts in zip(*walks, strict=True)))
        most = float("inf") if self.max_swaps is None else self.max_swaps
        statuses = [
            Status.FINISHED if done else Status.ITERATION_LIMIT if made >= most else Status.TIME_LIMIT
            for done, made in zip(walk.finished.tolist(), walk.swaps.tolist(), strict=True)
        ]
        overall = next(
            (limit for limit in (Status.TIME_LIMIT, Status.ITERATION_LIMIT) if limit in statuses),
            Status.FINISHED,
        )
        return Outcome(
            walk.mask,
            overall,
            row_statuses=statuses,
            stats={"swaps": walk.swaps, "worsening": walk.worsening, "cycled": walk.cycled.to(torch.int64)},
        )


class _Walk(NamedTuple):
    """What became of some rows.

    Attributes:
        mask: best mask that each row met (rows, cols), bool.
        swaps, worsening: all swaps, and those that raised the error (rows,), int64.
        finished: rows that no limit stopped (rows,), bool; cycled: those that met a mask again.
    """

    mask: Tensor
    swaps: Tensor
    worsening: Tensor
    finished: Tensor
    cycled: Tensor


def _walk(
    correlation: Tensor,
    scaled: ScaledRows,
    start: Tensor,
    block: int,
    tolerance: float,
    max_swaps: int | None,
    checked: bool,
    deadline: float,
) -> _Walk:
    """Swap in all rows at once, in float64 and at the scale of ``kernels.reference``.

    Args:
        correlation: ``R = corr(G)`` (cols, cols).
        scaled: rows at a common scale.
        start: warm start (rows, cols), bool.
        block: width of the pattern's blocks; swaps stay inside one.
        tolerance: share of the row's starting error that counts as an improvement.
        max_swaps: the most swaps per row.
        checked: stop at the first swap that would not lower the error.
        deadline: stop at this moment of ``time.monotonic()``.
    """
    rows, _ = start.shape
    weight = scaled.weight
    drift = torch.zeros_like(weight) if scaled.drift is None else scaled.drift
    pruned_part = weight.masked_fill(start, 0)
    seen = pruned_part @ correlation
    cost = seen + drift
    error = (pruned_part * (seen + 2 * drift)).sum(1) + scaled.constant
    limit = torch.maximum(tolerance * error.clamp_min(0) / 2, rounding_noise(weight, scaled.drift, start))
    delta = torch.where(start, weight, -weight)
    mask, best, remembered = start.clone(), start.clone(), start.clone()
    level = torch.zeros(rows, dtype=torch.float64, device=start.device)  # error less the starting error
    best_level = level.clone()
    swaps = torch.zeros(rows, dtype=torch.int64, device=start.device)
    worsening, finished = swaps.clone(), torch.zeros_like(swaps, dtype=torch.bool)
    cycled = finished.clone()
    active = torch.arange(rows, device=start.device)
    made = 0
    while len(active) and time.monotonic() < deadline:
        d = delta[active]
        q = d * d + 2 * d * cost[active]
        estimate, u, p = _best_estimate(q, mask[active], block)
        here = torch.arange(len(active), device=start.device)
        change = estimate + 2 * d[here, u] * d[here, p] * correlation[u, p]
        going = estimate < -limit[active]
        if checked:
            going &= change < -limit[active]
        finished[active[~going]] = True
        if made == max_swaps:
            break
        active, u, p, change = active[going], u[going], p[going], change[going]
        moved = delta[active, u, None] * correlation[u] + delta[active, p, None] * correlation[p]
        cost[active] += moved
        delta[active, u] *= -1
        delta[active, p] *= -1
        mask[active, u], mask[active, p] = False, True
        level[active] += change
        swaps[active] += 1
        worsening[active] += change > limit[active]
        record = active[level[active] < best_level[active] - limit[active]]
        best[record], best_level[record] = mask[record], level[record]
        made += 1
        again = (mask[active] == remembered[active]).all(1)
        cycled[active[again]] = finished[active[again]] = True
        active = active[~again]
        if made & (made - 1) == 0:
            remembered[active] = mask[active]
    return _Walk(best, swaps, worsening, finished, cycled)


def _best_estimate(q: Tensor, mask: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest ``q_u + q_p`` of each row inside one block, and its ``u`` and ``p``, each (rows,)."""
    blocks = q.view(len(q), -1, block)
    kept = mask.view(blocks.shape)
    lowest_u, u = blocks.masked_fill(~kept, torch.inf).min(2)
    lowest_p, p = blocks.masked_fill(kept, torch.inf).min(2)
    estimate, chosen = (lowest_u + lowest_p).min(1, keepdim=True)
    start = chosen[:, 0] * block
    return estimate[:, 0], start + u.gather(1, chosen)[:, 0], start + p.gather(1, chosen)[:, 0]
