"""Certificates of 1-swap optimality, independent of the search that found the mask.

A row is a 1-swap optimum when no swap allowed by the pattern lowers its error. Checked in float64
from freshly computed costs ``c``, over all pairs: with (SparseSwaps, arXiv 2512.10922, section 3)

    Δ(u, p) = q_u + q_p + 2 δ_u δ_p R_up      (see ``kernels.reference`` for the symbols)

a row is certified if its smallest Δ is at least ``-tolerance`` times a reference error, by default
its own; a search that started elsewhere is usually held to its starting error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import InputError, InvalidProblemError
from ...problems.layer import LayerProblem
from ...problems.pattern import Coupling
from ..kernels import kernels_for
from ..kernels.scaling import rounding_noise
from .layer_budget import best_exchange, exchange_limit
from .local_search import at_scale, row_batches, scaled_rows


@dataclass(frozen=True, eq=False)
class Certificate:
    """What ``certify`` found.

    Attributes:
        certified: rows without an improving swap (rows,), bool.
        smallest_change: smallest Δ of any swap of the row (rows,), float64.
        pruned: column that this swap prunes (rows,), int64.
        restored: column that this swap restores (rows,), int64.
        limit: a row is certified if its smallest Δ is at least ``-limit`` (rows,), float64.
        tolerance: share of the reference error that counts as an improvement.
        smallest_exchange: smallest Δ of any swap between rows, where the pattern allows them (a
            ``LayerBudget``); else infinite.
        exchange: that swap: (row a, column pruned in it, row b, column restored in it).
        exchange_limit: exchanges are certified if the smallest Δ is at least ``-exchange_limit``.
    """

    certified: Tensor
    smallest_change: Tensor
    pruned: Tensor
    restored: Tensor
    limit: Tensor
    tolerance: float
    smallest_exchange: float = float("inf")
    exchange: tuple[int, int, int, int] = (0, 0, 0, 0)
    exchange_limit: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether every row is certified, and every exchange where the pattern allows them."""
        return bool(self.certified.all()) and self.smallest_exchange >= -self.exchange_limit

    @property
    def share(self) -> float:
        """Certified share of the rows."""
        return float(self.certified.double().mean())


def certify(
    problem: LayerProblem,
    mask: Tensor,
    tolerance: float = 1e-6,
    reference: Tensor | None = None,
) -> Certificate:
    """Check every swap of every row in float64.

    Args:
        problem: the layer.
        mask: a mask (rows, cols) with the pattern.
        tolerance: share of the reference error that counts as an improvement.
        reference: errors that ``tolerance`` is a share of (rows,); by default those of ``mask``.

    Raises:
        InvalidProblemError: if ``mask`` has not the pattern or ``reference`` not the shape.
        InputError: if ``tolerance`` is no share.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance is a share: expected 0 ≤ tolerance < 1, found {tolerance}")
    if not problem.is_feasible(mask):
        raise InvalidProblemError(
            f"a certificate needs a mask with the pattern {problem.pattern} and shape "
            f"{tuple(problem.weight.shape)}: expected such a mask, found {tuple(mask.shape)} {mask.dtype} "
            f"with {int(mask.sum())} kept"
        )
    if reference is None:
        reference = problem.row_objectives(mask)
    if reference.shape != (problem.rows,):
        raise InvalidProblemError(
            f"reference errors are (rows,): expected ({problem.rows},), found {tuple(reference.shape)}"
        )
    mask = mask.to(problem.device)
    correlation = problem.gram.correlation64
    changes, pruned, restored, noises = [], [], [], []
    for rows in row_batches(problem):
        scaled = scaled_rows(problem, mask, rows)
        part = at_scale(problem, scaled, correlation)
        best = kernels_for(problem.device).best_swaps(part, mask[rows])
        square = scaled.scale * scaled.scale
        changes.append(best.change * square)
        pruned.append(best.pruned)
        restored.append(best.restored)
        noises.append(rounding_noise(scaled.weight, scaled.drift, mask[rows]) * square)
    change = torch.cat(changes)
    limit = torch.maximum(tolerance * reference.to(change), torch.cat(noises))
    found = Certificate(change >= -limit, change, torch.cat(pruned), torch.cat(restored), limit, tolerance)
    if problem.pattern.couples is Coupling.BLOCK:
        return found
    exchange_change, exchange = best_exchange(problem, mask)
    return replace(
        found,
        smallest_exchange=exchange_change,
        exchange=exchange,
        exchange_limit=exchange_limit(problem, reference, tolerance),
    )
