"""What kernels take and give: the problem at its scale, how to search it, what came out.

``reference`` is the specification of the functions in ``Kernels``; every twin has them all, with the same
arguments, which mypy checks where ``kernels_for`` hands a twin out. Notation as in ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Square roots of ρ are enlarged by this share so that bounds hold for rounded products in float32.
BOUND_SLACK = 1e-5


@dataclass(frozen=True, eq=False)
class ScaledProblem:
    """Rows of a layer, each at its own scale (see ``scaling``); all floats but ``constant`` of one dtype.

    Attributes:
        correlation: ``R`` (cols, cols).
        weight: ``y`` (rows, cols).
        drift: ``h/√diag(G)`` (rows, cols) at the same scales, or None.
        constant: the drift's constant (rows,) at the squared scales, float64, or None.
        block: width of the pattern's blocks; swaps stay inside one.
        largest_correlation: ``ρ_j = max_{i≠j} |R_ij|`` (cols,), or None if it is to be computed on demand.
    """

    correlation: Tensor
    weight: Tensor
    drift: Tensor | None
    constant: Tensor | None
    block: int
    largest_correlation: Tensor | None = None

    def rows(self, chosen: slice | Tensor) -> ScaledProblem:
        """The chosen rows, by a slice, their numbers (n,) or a flag for each (rows,)."""
        return replace(
            self,
            weight=self.weight[chosen],
            drift=None if self.drift is None else self.drift[chosen],
            constant=None if self.constant is None else self.constant[chosen],
        )

    def root(self) -> Tensor:
        """``√ρ`` (cols,) in the dtype of ``correlation``, rounded up."""
        largest = self.largest_correlation
        if largest is None:
            largest = (self.correlation - torch.diag(self.correlation.diagonal())).abs().amax(1)
        return (largest.double().sqrt() * (1 + BOUND_SLACK)).to(self.correlation.dtype)


@dataclass(frozen=True)
class DescentOptions:
    """How to descend.

    Attributes:
        tolerance: share of the row's starting error that counts as an improvement.
        max_swaps: the most swaps per row, None for no limit.
        search: ``lazy`` or ``best``.
        patience: moves of a tabu walk without improvement after which it stops; 0 for no walk.
        tenure: moves for which a moved weight stays, at least 1.
    """

    tolerance: float
    max_swaps: int | None = None
    search: str = "lazy"
    patience: int = 0
    tenure: int = 1


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


def unsolved(mask: Tensor) -> Descent:
    """The result before the first look at any row: the warm start ``mask`` (rows, cols)."""
    swaps = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    converged = torch.zeros_like(swaps, dtype=torch.bool)
    error = torch.full_like(swaps, torch.nan, dtype=torch.float64)
    return Descent(mask.clone(), swaps, converged, torch.ones_like(converged), error)


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


class Kernels(Protocol):
    """The functions of every twin; their arguments are documented in ``reference``."""

    def descend(
        self,
        problem: ScaledProblem,
        mask: Tensor,
        options: DescentOptions,
        deadline: float = ...,
        report: Callable[[int], None] | None = ...,
    ) -> Descent:
        """Swap inside rows until none improves."""

    def best_swaps(self, problem: ScaledProblem, mask: Tensor) -> BestSwaps:
        """The swap with the lowest Δ of each row."""

    def prune(
        self, problem: ScaledProblem, mask: Tensor, keep: int, deadline: float = ...
    ) -> tuple[Tensor, Tensor]:
        """Backward greedy until each block keeps ``keep``."""

    def exchange_rows(
        self,
        correlation: Tensor,
        delta: Tensor,
        q: Tensor,
        mask: Tensor,
        limit: float,
        deadline: float = ...,
    ) -> Tensor:
        """Swap between rows until none improves."""
