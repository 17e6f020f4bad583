"""SCIP as an exact solver of single rows (pyscipopt).

Formulations of a row, rescaled so that a good mask costs about 100:

- ``qcr``: ``y = L x``, ``t_i ≥ y_i²``, minimise ``Σ t_i + linᵀx`` after the QCR perturbation
  (`backends.factored`).
- ``direct``: ``t ≥ xᵀQx``, minimise ``t + 2qᵀx``.
- ``mccormick``: ``z_ij = x_i x_j`` by the inequalities of McCormick (Mathematical Programming 10, 1976), the
  textbook linearisation.

The objective of a mask is always recomputed in float64 from the row, never taken from SCIP, whose absolute
tolerances are what rescaling keeps harmless; its dual bound counts less its tolerances. Covers per-row and
N:M patterns and drift.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from ...errors import InputError, InvalidOutcomeError
from ...problems.row_program import BoolArray, RowProgram
from ..backends.factored import (
    FEASIBILITY_TOLERANCE,
    FactoredProgram,
    factored,
    product_allowance,
    rounded,
    safe_bound,
)
from ..backends.library import Claim, LibrarySolver
from ..base import Covers, Status

# Why SCIP stopped. `gaplimit` is success: limits/gap is the solver's gap_limit.
STATUS_MAP = {
    "optimal": Status.FINISHED,
    "gaplimit": Status.FINISHED,
    "timelimit": Status.TIME_LIMIT,
    "nodelimit": Status.NODE_LIMIT,
    "totalnodelimit": Status.NODE_LIMIT,
    "stallnodelimit": Status.NODE_LIMIT,
    "memlimit": Status.MEMORY_LIMIT,
    "userinterrupt": Status.INTERRUPTED,
    "terminate": Status.INTERRUPTED,
}
FORMULATIONS = ("qcr", "direct", "mccormick")


@final
@dataclass(frozen=True)
class SCIP(LibrarySolver):
    """Branch and cut by SCIP, row by row.

    Args:
        formulation: ``qcr``, ``direct`` or ``mccormick``.
        time_limit, node_limit, gap_limit, jobs, seed: as of every ``LibrarySolver``.
    """

    name: ClassVar[str] = "scip"
    covers: ClassVar[Covers] = Covers(requires=("pyscipopt",))

    formulation: str = "qcr"

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            raise InputError(
                f"formulation of scip: expected one of {', '.join(FORMULATIONS)}, found {self.formulation!r}"
            )
        super().__post_init__()

    def claim(self, program: RowProgram, start: BoolArray, deadline: float) -> Claim:
        """Build the model of one program, run it and read what it says."""
        library = importlib.import_module("pyscipopt")
        model = library.Model()
        model.hideOutput()
        x = [model.addVar(vtype="B", name=f"x{j}") for j in range(program.size)]
        for begin, end, count in zip(program.starts[:-1], program.starts[1:], program.counts, strict=True):
            model.addCons(library.quicksum(x[begin:end]) == int(count))
        build = {"qcr": _qcr, "direct": _direct, "mccormick": _mccormick}[self.formulation]
        allowance, auxiliary = build(library, model, x, program, start, deadline)
        _warm_start(model, x, start, auxiliary)
        self._set_limits(model, deadline)
        model.optimize()
        status = model.getStatus()
        if status not in STATUS_MAP:
            raise InvalidOutcomeError(
                f"solver scip on a row of {program.size} weights: expected one of the statuses "
                f"{', '.join(STATUS_MAP)}, found {status!r}"
            )
        found = start
        if model.getNSols() > 0:
            best = model.getBestSol()
            point = rounded(program, np.array([model.getSolVal(best, variable) for variable in x]))
            if point is not None:
                found = point
        lower = safe_bound(float(model.getDualbound()), allowance)
        return Claim(found, lower, STATUS_MAP[status], float(model.getNTotalNodes()))

    def _set_limits(self, model: Any, deadline: float) -> None:
        model.setParam("numerics/feastol", FEASIBILITY_TOLERANCE)
        model.setParam("limits/gap", self.gap_limit)
        model.setParam("randomization/randomseedshift", self.seed)
        model.setParam("parallel/maxnthreads", 1)
        if deadline != float("inf"):
            model.setParam(
                "limits/time", min(1e20, max(0.01, deadline - time.monotonic()))
            )  # 1e20 is its infinity
        if self.node_limit is not None:
            model.setParam("limits/totalnodes", self.node_limit)


# A formulation returns what tolerances can move its bound by, and its auxiliary variables with their values
# at the warm start: SCIP takes a start only if it says the value of every variable.
Formulated = tuple[float, list[tuple[Any, float]]]


def _qcr(
    library: Any, model: Any, x: list[Any], program: RowProgram, start: BoolArray, deadline: float
) -> Formulated:
    shape: FactoredProgram = factored(program, deadline)
    values = shape.factor @ start
    auxiliary = []
    squares = []
    for row, lowest, highest, value in zip(shape.factor, shape.lowest, shape.highest, values, strict=True):
        y = model.addVar(lb=float(lowest), ub=float(highest))
        t = model.addVar(lb=0.0)
        model.addCons(library.quicksum(float(a) * v for a, v in zip(row, x, strict=True)) == y)
        model.addCons(y * y <= t)
        squares.append(t)
        auxiliary += [(y, float(value)), (t, float(value) ** 2 + FEASIBILITY_TOLERANCE)]
    linear = library.quicksum(float(a) * v for a, v in zip(shape.linear, x, strict=True))
    model.setObjective(library.quicksum(squares) + linear + shape.constant)
    return shape.allowance, auxiliary


def _direct(
    library: Any, model: Any, x: list[Any], program: RowProgram, start: BoolArray, deadline: float
) -> Formulated:
    Q = program.quadratic
    # a nonlinear objective is refused, so the quadratic form goes below a variable
    t = model.addVar(lb=None)
    products = [float(Q[j, j]) * x[j] * x[j] for j in range(program.size)]
    products += [float(2 * Q[i, j]) * x[i] * x[j] for i in range(program.size) for j in range(i)]
    model.addCons(library.quicksum(products) <= t)
    linear = library.quicksum(float(2 * a) * v for a, v in zip(program.linear, x, strict=True))
    model.setObjective(t + linear + program.constant)
    value = float(start @ Q @ start)
    return product_allowance(program) + FEASIBILITY_TOLERANCE * max(1.0, value), [(t, value * (1 + 1e-9))]


def _mccormick(
    library: Any, model: Any, x: list[Any], program: RowProgram, start: BoolArray, deadline: float
) -> Formulated:
    Q = program.quadratic
    terms = [float(Q[j, j] + 2 * program.linear[j]) * x[j] for j in range(program.size)]
    auxiliary = []
    for i in range(program.size):
        for j in range(i):
            z = model.addVar(lb=0.0, ub=1.0)
            # only the side that the cost pushes against is needed
            if Q[i, j] > 0:
                model.addCons(z >= x[i] + x[j] - 1)
            else:
                model.addCons(z <= x[i])
                model.addCons(z <= x[j])
            terms.append(float(2 * Q[i, j]) * z)
            auxiliary.append((z, float(start[i] and start[j])))
    model.setObjective(library.quicksum(terms) + program.constant)
    return product_allowance(program), auxiliary


def _warm_start(model: Any, x: list[Any], start: BoolArray, auxiliary: list[tuple[Any, float]]) -> None:
    solution = model.createSol()
    for variable, value in zip(x, start, strict=True):
        model.setSolVal(solution, variable, float(value))
    for variable, value in auxiliary:
        model.setSolVal(solution, variable, value)
    model.addSol(solution)
