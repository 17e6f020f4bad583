"""HiGHS as an exact solver of single rows (highspy).

HiGHS solves mixed-integer *linear* programs only (it accepts a Hessian and then fails), so a row, rescaled so
that a good mask costs about 100, becomes one of

- ``outer_approximation``: the factored QCR program (`backends.factored`) with ``t_i ≥ y_i²`` replaced by
  tangents ``t_i ≥ 2 v_i y_i - v_i²``. The linear relaxation is cut until it settles, then mixed-integer
  programs alternate with cuts at their solutions (Duran, Grossmann, Mathematical Programming 36, 1986). Every
  such program is a relaxation of the row, so its dual bound is one of the row.
- ``mccormick``: ``z_ij = x_i x_j`` linearised (McCormick, 1976), with ``Σ_j z_ij = s_b x_i`` over each block.

The objective of a mask is recomputed in float64 from the row; dual bounds count less their tolerances. Covers
per-row and N:M patterns and drift.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt

from ...errors import InputError, InvalidOutcomeError
from ...problems.row_program import BoolArray, FloatArray, RowProgram
from ..backends.factored import FEASIBILITY_TOLERANCE, factored, product_allowance, rounded, safe_bound
from ..backends.library import Claim, LibrarySolver
from ..base import Covers, Status
from ..row_wise import better

# Why HiGHS stopped, by the name of its model status.
STATUS_MAP = {
    "kOptimal": Status.FINISHED,
    "kObjectiveBound": Status.FINISHED,
    "kObjectiveTarget": Status.FINISHED,
    "kTimeLimit": Status.TIME_LIMIT,
    "kSolutionLimit": Status.NODE_LIMIT,  # what it reports for mip_max_nodes
    "kIterationLimit": Status.ITERATION_LIMIT,
    "kMemoryLimit": Status.MEMORY_LIMIT,
    "kInterrupt": Status.INTERRUPTED,
    "kUnknown": Status.PRECISION_LIMIT,
}
FORMULATIONS = ("outer_approximation", "mccormick")
# Cuts of the linear relaxation before branching: until the tangents are this close, at most so many times.
ROOT_PRECISION = 1e-3
ROOT_ROUNDS = 60
# A row of the constraint matrix: lower limit, upper limit, columns, coefficients.
Constraint = tuple[float, float, Iterable[int], Iterable[float]]


@final
@dataclass(frozen=True)
class HiGHS(LibrarySolver):
    """Branch and cut by HiGHS, row by row.

    Args:
        formulation: ``outer_approximation`` or ``mccormick``.
        time_limit, node_limit, gap_limit, jobs, seed: as of every ``LibrarySolver``.
    """

    name: ClassVar[str] = "highs"
    covers: ClassVar[Covers] = Covers(requires=("highspy",))

    formulation: str = "outer_approximation"

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            raise InputError(
                f"formulation of highs: expected one of {', '.join(FORMULATIONS)}, found {self.formulation!r}"
            )
        super().__post_init__()

    def claim(self, program: RowProgram, start: BoolArray, deadline: float) -> Claim:
        """Build the model of one program, run it and read what it says."""
        model = _Model(self, program, deadline)
        if self.formulation == "mccormick":
            found, lower, status = _mccormick(model, start)
        else:
            found, lower, status = _outer_approximation(model, start)
        return Claim(found, lower, status, float(model.nodes))


class _Model:
    """One HiGHS instance; every call's return code is checked."""

    def __init__(self, options: HiGHS, program: RowProgram, deadline: float) -> None:
        self.library: Any = importlib.import_module("highspy")
        self.options = options
        self.program = program
        self.deadline = deadline
        self.nodes = 0
        # whoever used HiGHS in this process with other threads left a scheduler that refuses this run
        self.library.Highs.resetGlobalScheduler(True)
        self.highs: Any = self.library.Highs()
        self.infinity = float(self.library.kHighsInf)
        for name, value in (
            ("output_flag", False),
            ("threads", 1),
            ("random_seed", options.seed),
            ("mip_rel_gap", options.gap_limit),
            ("mip_feasibility_tolerance", FEASIBILITY_TOLERANCE),
            ("primal_feasibility_tolerance", FEASIBILITY_TOLERANCE),
            ("dual_feasibility_tolerance", FEASIBILITY_TOLERANCE),
        ):
            self._check(self.highs.setOptionValue(name, value), f"option {name}")

    def load(
        self,
        cost: FloatArray,
        lower: FloatArray,
        upper: FloatArray,
        constraints: list[Constraint],
        constant: float,
    ) -> None:
        """Pass a linear program whose first variables are those of the row."""
        program = self.library.HighsLp()
        program.num_col_, program.num_row_ = len(cost), len(constraints)
        program.col_cost_, program.col_lower_, program.col_upper_ = cost, lower, upper
        program.offset_ = constant
        program.row_lower_ = np.array([row[0] for row in constraints], dtype=np.float64)
        program.row_upper_ = np.array([row[1] for row in constraints], dtype=np.float64)
        columns = [list(row[2]) for row in constraints]
        program.a_matrix_.format_ = self.library.MatrixFormat.kRowwise
        program.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(row) for row in columns])])
        program.a_matrix_.index_ = np.concatenate(columns)
        program.a_matrix_.value_ = np.concatenate([np.asarray(list(row[3]), float) for row in constraints])
        self._check(self.highs.passModel(program), "passModel")

    def sums(self) -> list[Constraint]:
        """The blocks' sums."""
        starts = self.program.starts
        return [
            (float(count), float(count), range(begin, end), [1.0] * int(end - begin))
            for begin, end, count in zip(starts[:-1], starts[1:], self.program.counts, strict=True)
        ]

    def set_integer(self, integer: bool) -> None:
        """Make the row's variables integer or continuous."""
        kind = self.library.HighsVarType
        wanted = kind.kInteger if integer else kind.kContinuous
        for column in range(self.program.size):
            self._check(self.highs.changeColIntegrality(column, wanted), "changeColIntegrality")

    def cut(self, columns: npt.NDArray[np.int32], coefficients: FloatArray, lower: float) -> None:
        """Add ``Σ coefficient · column ≥ lower``."""
        code = self.highs.addRow(lower, self.infinity, len(columns), columns, coefficients)
        self._check(code, "addRow")

    def start_from(self, values: FloatArray) -> None:
        """Offer a complete starting point."""
        solution = self.library.HighsSolution()
        solution.col_value = [float(value) for value in values]
        self._check(self.highs.setSolution(solution), "setSolution")

    def run(self) -> Status:
        """Run within the limits."""
        if self.deadline != float("inf"):
            # the limit counts the time of earlier runs of the instance as well
            left = max(0.01, self.deadline - time.monotonic())
            self._check(self.highs.setOptionValue("time_limit", left + self.highs.getRunTime()), "time_limit")
        if self.options.node_limit is not None:
            nodes = max(1, self.options.node_limit - self.nodes)
            self._check(self.highs.setOptionValue("mip_max_nodes", nodes), "mip_max_nodes")
        if self.highs.run() == self.library.HighsStatus.kError:
            # numerical trouble inside HiGHS: what was proven before stands
            return Status.PRECISION_LIMIT
        name = str(self.highs.getModelStatus()).rsplit(".", 1)[-1]
        if name not in STATUS_MAP:
            raise InvalidOutcomeError(
                f"solver highs on a row of {self.program.size} weights: expected one of the statuses "
                f"{', '.join(STATUS_MAP)}, found {name}"
            )
        return STATUS_MAP[name]

    def values(self) -> FloatArray | None:
        """Values of all variables, None where there is no solution."""
        values = np.asarray(self.highs.getSolution().col_value, dtype=np.float64)
        has_point = (
            self.highs.getInfo().primal_solution_status == self.library.SolutionStatus.kSolutionStatusFeasible
        )
        return values if has_point and len(values) else None

    def dual_bound(self) -> float:
        """Dual bound of the last mixed-integer run, whose nodes are counted here."""
        information = self.highs.getInfo()
        self.nodes += max(0, int(information.mip_node_count))
        return float(information.mip_dual_bound)

    def _check(self, code: Any, call: str) -> None:
        if code == self.library.HighsStatus.kError:
            raise InvalidOutcomeError(f"solver highs: expected {call} to succeed, found {code}")


def _outer_approximation(model: _Model, start: BoolArray) -> tuple[BoolArray, float, Status]:
    program = model.program
    n = program.size
    shape = factored(program, model.deadline)
    rank = len(shape.factor)
    constraints = model.sums()
    for i, row in enumerate(shape.factor):
        constraints.append((0.0, 0.0, [*range(n), n + i], [*row, -1.0]))
    model.load(
        np.concatenate([shape.linear, np.zeros(rank), np.ones(rank)]),
        np.concatenate([np.zeros(n), shape.lowest, np.zeros(rank)]),
        np.concatenate([np.ones(n), shape.highest, np.full(rank, model.infinity)]),
        constraints,
        shape.constant,
    )

    def cut_at(x: FloatArray) -> None:
        for i, value in enumerate(shape.factor @ x):
            columns = np.array([n + i, n + rank + i], dtype=np.int32)
            model.cut(columns, np.array([-2 * value, 1.0]), -(value**2))

    cut_at(start.astype(np.float64))
    cut_at(program.center())
    for _ in range(ROOT_ROUNDS):
        status = model.run()
        values = model.values()
        if status is not Status.FINISHED or values is None:
            break
        squares = float((np.square(shape.factor @ values[:n])).sum())
        if squares - float(values[n + rank :].sum()) <= ROOT_PRECISION * max(1.0, abs(squares)):
            break
        cut_at(values[:n])
    model.set_integer(True)
    best, lower = start, -np.inf
    exact: set[bytes] = set()  # points at which the tangents are exact
    while True:
        if time.monotonic() >= model.deadline:
            return best, lower, Status.TIME_LIMIT
        values = shape.factor @ best
        model.start_from(np.concatenate([best.astype(np.float64), values, np.square(values)]))
        status = model.run()
        if status not in (Status.INTERRUPTED, Status.PRECISION_LIMIT):
            lower = max(lower, safe_bound(model.dual_bound(), shape.allowance))
        values = model.values()
        point = None if values is None else rounded(program, values[:n])
        if point is not None:
            best = better(program, point, best)
        if status is not Status.FINISHED or point is None:
            return best, lower, status
        # the safe bound gives its allowance away, and each program is solved to the gap limit only
        value = program.objective(best)
        if value - lower - 2 * shape.allowance <= 2 * model.options.gap_limit * abs(value):
            return best, lower, Status.FINISHED
        if point.tobytes() in exact:
            return best, lower, Status.FINISHED
        exact.add(point.tobytes())
        if model.options.node_limit is not None and model.nodes >= model.options.node_limit:
            return best, lower, Status.NODE_LIMIT
        cut_at(point.astype(np.float64))


def _mccormick(model: _Model, start: BoolArray) -> tuple[BoolArray, float, Status]:
    program = model.program
    n, Q = program.size, program.quadratic
    pairs = [(i, j) for i in range(n) for j in range(i)]
    column = {pair: n + k for k, pair in enumerate(pairs)}
    constraints = model.sums()
    for (i, j), z in column.items():
        constraints.append((-1.0, model.infinity, [z, i, j], [1.0, -1.0, -1.0]))
        constraints.append((-model.infinity, 0.0, [z, i], [1.0, -1.0]))
        constraints.append((-model.infinity, 0.0, [z, j], [1.0, -1.0]))
    for i in range(n):
        for begin, end, count in zip(program.starts[:-1], program.starts[1:], program.counts, strict=True):
            others = [column[max(i, j), min(i, j)] for j in range(begin, end) if j != i]
            # Σ_j x_i x_j = s_b x_i, where x_i x_i = x_i
            ones = float(count) - (1.0 if begin <= i < end else 0.0)
            constraints.append((0.0, 0.0, [*others, i], [*([1.0] * len(others)), -ones]))
    cost = np.concatenate([Q.diagonal() + 2 * program.linear, [2 * Q[pair] for pair in pairs]])
    model.load(cost, np.zeros(len(cost)), np.ones(len(cost)), constraints, program.constant)
    model.set_integer(True)
    products = [float(start[i] and start[j]) for i, j in pairs]
    model.start_from(np.concatenate([start.astype(np.float64), products]))
    status = model.run()
    lower = -np.inf
    if status is not Status.PRECISION_LIMIT:
        lower = safe_bound(model.dual_bound(), product_allowance(program))
    values = model.values()
    point = None if values is None else rounded(program, values[:n])
    return start if point is None else better(program, point, start), lower, status
