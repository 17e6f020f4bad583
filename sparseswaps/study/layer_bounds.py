"""Certified gaps of whole models: every layer's error is bounded from below as it is pruned.

In sequential pruning each layer's problem exists only while the layer is pruned, as its inputs depend on
the layers before it. So the bound is computed there: right after the solver, on the same problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from torch import Tensor

from ..problems import LayerProblem
from ..problems.pattern import LayerBudget
from ..records.run import LayerRecord
from ..records.study import LayerBoundRecord
from ..solvers import Budget, Group, Outcome, Solver, bound


@final
@dataclass(frozen=True, eq=False, repr=False)
class BoundedSolver(Solver):
    """A solver whose every layer is bounded from below as well.

    Args:
        solver: chooses the masks, and is what records call this.
        unit: id of the work unit.
        tier: of the bound, see ``solvers.bound``.
        seconds: time for the bound of each layer, None for no limit.

    What it finds is added to ``found``. Problems that no tier covers have no bound there: an output metric,
    a pattern whose rows share one budget, and kept weights that change.
    """

    name: ClassVar[str] = "bounded"

    solver: Solver
    unit: str
    tier: str
    seconds: float | None
    found: list[LayerBoundRecord] = field(default_factory=list)

    @property
    def group(self) -> Group:  # type: ignore[override]  # that of the solver
        """Group of the solver."""
        return self.solver.group

    @property
    def layer_budget(self) -> bool:  # type: ignore[override]  # that of the solver
        """Whether the solver covers patterns whose rows share one budget."""
        return self.solver.layer_budget

    @property
    def metric(self) -> bool:  # type: ignore[override]  # that of the solver
        """Whether the solver accepts an output metric."""
        return self.solver.metric

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Solve, then bound."""
        outcome = self.solver.run(problem, init, budget)
        covered = problem.metric is None and not isinstance(problem.pattern, LayerBudget)
        if outcome.mask is not None and outcome.weight is None and covered:
            proven = bound(problem, self.tier, Budget(self.seconds), outcome.mask)
            self.found.append(
                LayerBoundRecord(
                    unit=self.unit,
                    layer=problem.name,
                    tier=proven.tier,
                    objective=problem.objective(outcome.mask),
                    bound=proven.total,
                    status=str(proven.status),
                    seconds=proven.seconds,
                )
            )
        return outcome

    def __repr__(self) -> str:
        return repr(self.solver)


def without_bounds(
    layers: tuple[LayerRecord, ...], bounds: list[LayerBoundRecord]
) -> tuple[LayerRecord, ...]:
    """Records of layers with the seconds of their solver alone."""
    spent = {record.layer: record.seconds for record in bounds}
    return tuple(replace(layer, seconds=layer.seconds - spent.get(layer.name, 0.0)) for layer in layers)
