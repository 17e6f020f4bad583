"""Certified gaps of whole models: every layer's error is bounded from below as it is pruned.

In sequential pruning each layer's problem exists only while the layer is pruned, as its inputs depend on
the layers before it. So the bound is computed there: right after the solver, on the same problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..problems import LayerProblem
from ..records.study import LayerBoundRecord
from ..solvers import Budget, RowSplit, Solution, bound
from ..solvers.bounding import AUTO, tier_of


@dataclass(frozen=True, eq=False)
class BoundedLayers:
    """Bounds the layers of a run that it watches (``prune(..., on_layer=...)``).

    Args:
        unit: id of the work unit.
        tier: of the bound, see ``solvers.bound``.
        seconds: time for the bound of each layer, None for no limit.

    What it finds is added to ``found``. Problems that no tier covers have no bound there: an output metric,
    a pattern whose rows share one budget, and kept weights that change.
    """

    unit: str
    tier: str
    seconds: float | None
    found: list[LayerBoundRecord] = field(default_factory=list)

    def __call__(self, problem: LayerProblem, solution: Solution) -> None:
        """Bound one layer."""
        covered = (RowSplit() if self.tier == AUTO else tier_of(self.tier)).covers
        if problem.metric is not None and not covered.metric:
            return
        if solution.weight is not None or problem.pattern.couples not in covered.couplings:
            return
        proven = bound(problem, self.tier, Budget(self.seconds), solution.mask)
        self.found.append(
            LayerBoundRecord(
                unit=self.unit,
                layer=problem.name,
                tier=proven.tier,
                objective=solution.objective,
                bound=proven.total,
                status=str(proven.status),
                seconds=proven.seconds,
            )
        )
