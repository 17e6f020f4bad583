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

from ...errors import InvalidOutcomeError
from ...problems.row_program import BoolArray, RowProgram
from ..backends.factored import FEASIBILITY_TOLERANCE, factored, rounded, safe_bound
from ..backends.library import Claim, LibrarySolver
from ..base import Covers, Status

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
class Gurobi(LibrarySolver):
    """Branch and cut by Gurobi on the QCR program, row by row.

    Args:
        time_limit, node_limit, gap_limit, jobs, seed: as of every ``LibrarySolver``.
    """

    name: ClassVar[str] = "gurobi"
    covers: ClassVar[Covers] = Covers(requires=("gurobipy",))

    def claim(self, program: RowProgram, start: BoolArray, deadline: float) -> Claim:
        """Build the model of one program, run it and read what it says."""
        library: Any = importlib.import_module("gurobipy")
        shape = factored(program, deadline)
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
            x = model.addMVar(program.size, vtype=library.GRB.BINARY)
            x.Start = start.astype(np.float64)
            for begin, end, count in zip(
                program.starts[:-1], program.starts[1:], program.counts, strict=True
            ):
                model.addConstr(x[int(begin) : int(end)].sum() == float(count))
            model.setObjective(x @ shape.matrix() @ x + shape.linear @ x + shape.constant)
            model.optimize()
            if model.Status not in STATUS_MAP:
                raise InvalidOutcomeError(
                    f"solver gurobi on a row of {program.size} weights: expected one of the status codes "
                    f"{', '.join(map(str, STATUS_MAP))}, found {model.Status}"
                )
            found = start
            if model.SolCount > 0:
                point = rounded(program, np.asarray(x.X, dtype=np.float64))
                if point is not None:
                    found = point
            lower = safe_bound(float(model.ObjBound), shape.allowance)
            return Claim(found, lower, STATUS_MAP[model.Status], float(model.NodeCount))
