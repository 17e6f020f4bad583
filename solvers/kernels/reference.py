"""The swap kernels in plain torch: the specification, and the oracle of every faster twin.

Scaled form: ``R = corr(G)``, ``y_j = w_j √G_jj``, ``δ_j = +y_j`` if kept and ``-y_j`` if pruned,
``c = R (y∘(1-m)) + h/√diag(G)`` and ``q_j = δ_j² + 2 δ_j c_j``. Pruning kept ``u`` and restoring
pruned ``p`` changes the error of a row by (SparseSwaps, arXiv 2512.10922, section 3)

    Δ(u, p) = q_u + q_p + 2 δ_u δ_p R_up,    then  c ← c + δ_u R_:u + δ_p R_:p,   δ_u, δ_p ← -δ_u, -δ_p
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of Δ that are held at once.
DELTA_ENTRIES = 1 << 24


class Descent(NamedTuple):
    """Result of a descent.

    Attributes:
        mask: the final masks (rows, cols), bool.
        swaps: how many swaps each row made (rows,), int64.
        converged: rows in which no swap improves by more than the threshold (rows,), bool.
    """

    mask: Tensor
    swaps: Tensor
    converged: Tensor


def descend_best(
    correlation: Tensor,
    scaled_weight: Tensor,
    scaled_drift: Tensor | None,
    mask: Tensor,
    block: int,
    threshold: Tensor,
    max_swaps: int | None = None,
    deadline: float = float("inf"),
) -> Descent:
    """Steepest descent: in each row make the best swap until none improves.

    Args:
        correlation: ``R`` (cols, cols).
        scaled_weight: ``y`` (rows, cols), same dtype.
        scaled_drift: ``h/√diag(G)`` (rows, cols) or None.
        mask: warm start (rows, cols), bool.
        block: width of the pattern's blocks; swaps stay inside one.
        threshold: a swap is made only if Δ < -threshold of its row (rows,), at least 0.
        max_swaps: the most swaps per row.
        deadline: stop at this moment of ``time.monotonic()``.
    """
    rows, cols = scaled_weight.shape
    mask = mask.clone()
    swaps = torch.zeros(rows, dtype=torch.int64, device=mask.device)
    converged = torch.zeros(rows, dtype=torch.bool, device=mask.device)
    blocks = cols // block
    inside = torch.stack([correlation[i : i + block, i : i + block] for i in range(0, cols, block)])
    size = max(1, DELTA_ENTRIES // (cols * block))
    for first in range(0, rows, size):
        active = torch.arange(first, min(first + size, rows), device=mask.device)
        delta, cost = _state(correlation, scaled_weight, scaled_drift, mask, active)
        while len(active) and time.monotonic() < deadline:
            q = (delta * delta + 2 * delta * cost).view(-1, blocks, block)
            step = delta.view(-1, blocks, block)
            kept = mask[active].view(-1, blocks, block)
            change = q[..., :, None] + q[..., None, :] + 2 * step[..., :, None] * step[..., None, :] * inside
            change.masked_fill_(~(kept[..., :, None] & ~kept[..., None, :]), torch.inf)
            best, pair = change.flatten(1).min(1)
            improves = best < -threshold[active]
            converged[active[~improves]] = True
            if max_swaps is not None:
                improves &= swaps[active] < max_swaps
            active, pair, delta, cost = active[improves], pair[improves], delta[improves], cost[improves]
            # pair counts (block, u in block, p in block)
            start = pair // (block * block) * block
            pruned, restored = start + pair // block % block, start + pair % block
            row = torch.arange(len(active), device=mask.device)
            cost = cost + delta[row, pruned, None] * correlation[pruned]
            cost = cost + delta[row, restored, None] * correlation[restored]
            delta[row, pruned] *= -1
            delta[row, restored] *= -1
            mask[active, pruned] = False
            mask[active, restored] = True
            swaps[active] += 1
    return Descent(mask, swaps, converged)


def _state(
    correlation: Tensor, scaled_weight: Tensor, scaled_drift: Tensor | None, mask: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """``δ`` and ``c`` of some rows, each (len(rows), cols)."""
    weight = scaled_weight[rows]
    kept = mask[rows]
    cost = weight.masked_fill(kept, 0) @ correlation
    if scaled_drift is not None:
        cost = cost + scaled_drift[rows]
    return torch.where(kept, weight, -weight), cost
