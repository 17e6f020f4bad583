"""Gurobi as an exact solver of single rows, for those who have it (gurobipy).

The row is the factored QCR program (`backends.factored`), rescaled so that a good mask costs about 100, as
one convex mixed-integer quadratic program: minimise ``xᵀ(LᵀL)x + linᵀx`` over the blocks' sums. The objective
of a mask is recomputed in float64 from the row; the dual bound counts less its tolerances. Covers per-row and
N:M patterns and drift.

Building, limits and results are tested against a stand-in of the few gurobipy calls used here; no run with a
licensed Gurobi is part of the tests.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from torch import Tensor

from ..errors import InvalidOutcomeError
from ..problems.layer import LayerProblem
from ..problems.row_program import BoolArray, RowProgram
from .backends.factored import FEASIBILITY_TOLERANCE, factored, rounded, safe_bound, settled
from .base import Budget, Group, Outcome, Solver, Status
from .bounds.presolve import thinned
from .row_wise import RowResult, better, check_jobs, check_limits, row_deadline, solve_rows

# Why Gurobi stopped, by its status code.
STATUS_MAP = {
    2: Status.FINISHED,  # OPTIMAL
    7: Status.ITERATION_LIMIT,
    8: Status.NODE_LIMIT,
    9: Status.TIME_LIMIT,
    11: Status.INTERRUPTED,
    13: Status.FINISHED,  # SUBOPTIMAL: tolerances could not be met; the gap says how far it came
    17: Status.MEMORY_LIMIT,
}


@final
@dataclass(frozen=True)
class Gurobi(Solver):
    """Branch and cut by Gurobi on the QCR program, row by row.

    Args:
        time_limit: seconds per row, None for no limit.
        node_limit: nodes per row, None for no limit.
        gap_limit: relative gap at which a row counts as finished.
        seed: of Gurobi.
        jobs: processes that share the rows.
    """

    name: ClassVar[str] = "gurobi"
    group: ClassVar[Group] = Group.EXACT
    requires: ClassVar[tuple[str, ...]] = ("gurobipy",)

    time_limit: float | None = None
    node_limit: int | None = None
    gap_limit: float = 1e-6
    seed: int = 0
    jobs: int = 1

    def __post_init__(self) -> None:
        check_limits(self.time_limit, self.node_limit, self.gap_limit)
        check_jobs(self.jobs)

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Solve row by row."""
        return solve_rows(problem, init, budget, self._solve_row, self.jobs)

    def _solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        deadline = row_deadline(deadline, self.time_limit)
        reduced, inner, threshold = thinned(program, start)
        scaled = reduced.program
        if scaled.size == 0:
            return settled(program, reduced, start, threshold)
        library: Any = importlib.import_module("gurobipy")
        shape = factored(scaled, deadline)
        with library.Env(params={"OutputFlag": 0}) as environment, library.Model(env=environment) as model:
            for name, value in (
                ("Threads", 1),
                ("Seed", self.seed),
                ("MIPGap", self.gap_limit),
                ("FeasibilityTol", FEASIBILITY_TOLERANCE),
                ("IntFeasTol", FEASIBILITY_TOLERANCE),
                ("NodeLimit", float("inf") if self.node_limit is None else self.node_limit),
            ):
                model.setParam(name, value)
            if deadline != float("inf"):
                model.setParam("TimeLimit", max(0.01, deadline - time.monotonic()))
            x = model.addMVar(scaled.size, vtype=library.GRB.BINARY)
            x.Start = inner.astype(np.float64)
            for begin, end, count in zip(scaled.starts[:-1], scaled.starts[1:], scaled.counts, strict=True):
                model.addConstr(x[int(begin) : int(end)].sum() == float(count))
            model.setObjective(x @ shape.matrix() @ x + shape.linear @ x + shape.constant)
            model.optimize()
            if model.Status not in STATUS_MAP:
                raise InvalidOutcomeError(
                    f"solver gurobi on a row of {scaled.size} weights: expected one of the status codes "
                    f"{', '.join(map(str, STATUS_MAP))}, found {model.Status}"
                )
            found = start
            if model.SolCount > 0:
                point = rounded(scaled, np.asarray(x.X, dtype=np.float64))
                if point is not None:
                    found = better(program, reduced.expand(point), start)
            lower = min(safe_bound(float(model.ObjBound), shape.allowance), threshold)
            return RowResult(
                found,
                float(np.nextafter(max(0.0, lower) * scaled.unit, 0.0)),
                STATUS_MAP[model.Status],
                {"nodes": float(model.NodeCount)},
            )
