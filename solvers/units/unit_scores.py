"""Scores of units that other methods rank by, each from the consumer alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from ...problems.units import UnitProblem
from ..base import Budget, Status
from .base import UnitOutcome, UnitSolver


class _Score(UnitSolver):
    """Keeps the units of the largest score."""

    @abstractmethod
    def scores(self, problem: UnitProblem) -> Tensor:
        """(units,), float64."""

    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """A warm start is not looked at."""
        return UnitOutcome(problem.pattern.top_k(self.scores(problem)[None])[0], Status.FINISHED)


@final
@dataclass(frozen=True)
class WandaSp(_Score):
    """``Σ_{j∈u} ‖W_:j‖² G_jj`` plus products inside the unit: the diagonal of Q (An et al., AAAI 2024)."""

    name: ClassVar[str] = "wanda-sp"

    def scores(self, problem: UnitProblem) -> Tensor:
        """The diagonal of the quadratic without drift."""
        return _without_drift(problem).as_row().gram.matrix.diagonal()


@final
@dataclass(frozen=True)
class FlapScore(_Score):
    """The same of centred inputs: how much a unit's output fluctuates (An et al., AAAI 2024, section 4)."""

    name: ClassVar[str] = "flap"

    def scores(self, problem: UnitProblem) -> Tensor:
        """The diagonal of the centred quadratic."""
        return _without_drift(problem).as_row(centred=True).gram.matrix.diagonal()


@final
@dataclass(frozen=True)
class UnitMagnitude(_Score):
    """``Σ_{j∈u} ‖W_:j‖²`` of the consumer's columns."""

    name: ClassVar[str] = "unit-magnitude"

    def scores(self, problem: UnitProblem) -> Tensor:
        """Squared norms."""
        return problem.weight.square().sum(0)[problem.columns].sum(1)


def _without_drift(problem: UnitProblem) -> UnitProblem:
    return replace(problem, layer=replace(problem.layer, drift=None))
