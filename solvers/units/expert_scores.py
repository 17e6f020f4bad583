"""Scores of experts that other methods rank by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from ...errors import InvalidProblemError
from ...problems.experts import ExpertProblem
from ...problems.units import UnitProblem
from ..base import Budget, Status
from .base import UnitOutcome, UnitSolver


@final
@dataclass(frozen=True)
class Reap(UnitSolver):
    """Mean of ``g_e(t) ‖f_e(t)‖`` over the tokens that come to an expert (Lasby et al., arXiv 2510.13999).

    The gate ``g`` is the one that the model applies. An expert without tokens has score 0.
    """

    name: ClassVar[str] = "reap"

    def scores(self, problem: UnitProblem) -> Tensor:
        """(experts,), float64.

        Raises:
            InvalidProblemError: for units that are no experts.
        """
        if not isinstance(problem, ExpertProblem):
            raise InvalidProblemError(
                f"solver reap ranks experts: expected an ExpertProblem, found {type(problem).__name__}"
            )
        return problem.norms / problem.routed.clamp(min=1)

    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """Keep the experts of the largest score; a warm start is not looked at."""
        return UnitOutcome(problem.pattern.top_k(self.scores(problem)[None])[0], Status.FINISHED)
