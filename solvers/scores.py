"""Masks from a saliency score: no search, the yardsticks of the field.

Each score keeps the largest entries of every row or block; ties go to the lowest index. A score looks at no
output error, so it runs under any output metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..problems.layer import LayerProblem
from .base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status


@final
@dataclass(frozen=True)
class Random(Solver):
    """A uniformly random mask with the pattern; the same seed gives the same mask on every device."""

    name: ClassVar[str] = "random"
    group: ClassVar[Group] = Group.SCORE
    covers: ClassVar[Covers] = Covers(ANY_COUPLING, metric=True, rows_alone=False)

    seed: int = 0

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Draw the mask."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(problem.weight.shape, generator=generator, dtype=torch.float64)
        return Outcome(problem.pattern.top_k(scores).to(problem.device), Status.FINISHED)


@final
@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the largest ``|w|`` (Han et al., NeurIPS 2015)."""

    name: ClassVar[str] = "magnitude"
    group: ClassVar[Group] = Group.SCORE
    covers: ClassVar[Covers] = Covers(ANY_COUPLING, metric=True)

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Score and select."""
        return Outcome(problem.pattern.top_k(problem.weight.abs()), Status.FINISHED)


@final
@dataclass(frozen=True)
class Wanda(Solver):
    """Keep the largest ``|w_j| ‖X_j‖`` (Sun et al., ICLR 2024, eq. 1)."""

    name: ClassVar[str] = "wanda"
    group: ClassVar[Group] = Group.SCORE
    covers: ClassVar[Covers] = Covers(ANY_COUPLING, metric=True)

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Score and select."""
        return Outcome(problem.pattern.top_k(problem.scaled_weight.abs()), Status.FINISHED)


@final
@dataclass(frozen=True)
class RIA(Solver):
    """Relative importance and activations (Zhang et al., ICLR 2024, eqs. 3 and 5).

    Keep the largest ``(|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|) ‖X_j‖^alpha``. The authors' code
    uses alpha = 0.5; one restatement of the score leaves the exponent out (alpha = 1).
    """

    name: ClassVar[str] = "ria"
    group: ClassVar[Group] = Group.SCORE
    covers: ClassVar[Covers] = Covers(ANY_COUPLING, metric=True, rows_alone=False)

    alpha: float = 0.5

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Score and select."""
        return Outcome(problem.pattern.top_k(ria_scores(problem, self.alpha)), Status.FINISHED)


def ria_scores(problem: LayerProblem, alpha: float) -> Tensor:
    """``(|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|) ‖X_j‖^alpha`` (rows, cols), float64."""
    size = problem.weight.double().abs()
    tiny = torch.finfo(torch.float64).tiny  # rows or columns of zeros score 0
    of_row = size / size.sum(1, keepdim=True).clamp_min(tiny)
    of_column = size / size.sum(0, keepdim=True).clamp_min(tiny)
    return (of_row + of_column) * problem.gram.scale**alpha


def warm_start(problem: LayerProblem, init: Tensor | None) -> Tensor:
    """``init`` (rows, cols), or Wanda's mask where none is given: where every search starts."""
    return problem.pattern.top_k(problem.scaled_weight.abs()) if init is None else init
