"""What a solver is, and the one function that runs and checks any of them.

A solver proposes a mask and perhaps bounds; ``solve`` scores it: objectives are recomputed in
float64 from weights and Gram matrix, feasibility is checked, and a bound above its own mask's error
is refused. Why a solver stopped (``Status``) and how good its mask is (``gap``) are two facts.
"""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import (
    InvalidOutcomeError,
    InvalidProblemError,
    NoIncumbentError,
    SolverNotInstalledError,
    UnsupportedProblemError,
)
from ..problems.layer import LayerProblem
from ..problems.pattern import Coupling
from ..problems.products import full_precision

# Bounds and objectives are computed in float64 by different routes; more than this is a false proof.
BOUND_TOLERANCE = 1e-6


class Group(StrEnum):
    """What kind of method a solver is; tables never mix weight updates with the others."""

    SCORE = "score"
    LOCAL_SEARCH = "local search"
    EXACT = "exact"
    BOUND = "bound"
    WEIGHT_UPDATE = "weight update"


class Status(StrEnum):
    """Why a solver stopped; how good its mask is is a gap that was computed.

    An exact solver has finished a row where the computed gap is at most its gap limit; a proof that rounding
    or a library's tolerances leave above that has reached its limit of precision.
    """

    FINISHED = "finished"
    PRECISION_LIMIT = "precision_limit"
    LOCAL_OPTIMUM = "local_optimum"
    ITERATION_LIMIT = "iteration_limit"
    TIME_LIMIT = "time_limit"
    NODE_LIMIT = "node_limit"
    MEMORY_LIMIT = "memory_limit"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Covers:
    """What a solver can do, declared once as a value; wrappers combine those of their members with ``&``.

    Attributes:
        couplings: what may share one budget in the pattern (see ``problems.pattern``).
        metric: whether it accepts an output metric: it minimises the coupled error, or looks at none.
        swept: whether it does so in sweeps over rows, which need a budget of their own (see ``row_sweeps``).
        rows_alone: whether what it finds for a row depends, bit for bit, on that row, the Gram matrix and the
            options alone, so that processes may share a layer's rows. Seeds of random numbers that run
            through the rows and products of all rows at once (whose rounding depends on how many there are)
            do not.
        requires: libraries that it imports, by module name.
        drift_by_default: whether a search is run with drift where nothing else is asked for; of scores and
            weight updates, which never are, it says nothing.
        held_out_stop: whether it can stop a row where held-out data say so (see ``held_out_stop``).
    """

    couplings: frozenset[Coupling] = frozenset({Coupling.BLOCK})
    metric: bool = False
    swept: bool = False
    rows_alone: bool = True
    requires: tuple[str, ...] = ()
    drift_by_default: bool = True
    held_out_stop: bool = False

    def __and__(self, other: Covers) -> Covers:
        """What both cover, with what either requires."""
        return Covers(
            self.couplings & other.couplings,
            self.metric and other.metric,
            self.swept or other.swept,
            self.rows_alone and other.rows_alone,
            tuple(dict.fromkeys(self.requires + other.requires)),
            self.drift_by_default and other.drift_by_default,
            self.held_out_stop and other.held_out_stop,
        )


# Couplings of solvers that also take the budget of a whole layer.
ANY_COUPLING = frozenset(Coupling)


@dataclass(frozen=True)
class Budget:
    """Limits of one ``solve`` call.

    Args:
        seconds: wall-clock limit for the whole problem, None for none.
        progress: called with (rows done, rows in all) now and then.
    """

    seconds: float | None = None
    progress: Callable[[int, int], None] | None = None

    def deadline(self) -> float:
        """The moment on ``time.monotonic()`` at which a solver that starts now must stop."""
        return float("inf") if self.seconds is None else time.monotonic() + self.seconds

    def report(self, done: int, total: int) -> None:
        """Tell whoever listens how many rows are done."""
        if self.progress is not None:
            self.progress(done, total)


@dataclass(frozen=True)
class TracePoint:
    """State of a solver after ``seconds``: incumbent's objective and proven bound of the layer."""

    seconds: float
    objective: float
    bound: float = 0.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver claims.

    Args:
        mask: the best mask found (rows, cols), or None if a limit came first.
        status: why it stopped, for the whole layer.
        row_bounds: proven lower bounds of the row errors (rows,), or None.
        row_statuses: why each row stopped, or None where that says nothing more than ``status``.
        trace: objective and bound against time.
        stats: counters per row, such as ``swaps`` or ``nodes``, each (rows,).
        weight: new values of the kept weights (rows, cols), zero where pruned, from solvers of the group
            *weight update*; None where kept weights stay as they are.
    """

    mask: Tensor | None
    status: Status
    row_bounds: Tensor | None = None
    row_statuses: Sequence[Status] | None = None
    trace: Sequence[TracePoint] = ()
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """What ``solve`` has checked and rescored.

    Attributes:
        solver: label of the solver, its ``repr``.
        mask: kept weights (rows, cols), bool.
        row_objectives: error of each row in float64 (rows,).
        row_bounds: proven lower bound of each row's error (rows,); 0 where nothing better is known.
        status: why the solver stopped.
        row_statuses: the same for each row.
        trace: objective and bound against time.
        stats: counters per row, each (rows,).
        seconds: wall-clock time of the solver's own run.
        weight: kept weights after an update (rows, cols), zero where pruned; None where they are unchanged.
    """

    solver: str
    mask: Tensor
    row_objectives: Tensor
    row_bounds: Tensor
    status: Status
    row_statuses: tuple[Status, ...]
    trace: tuple[TracePoint, ...]
    stats: Mapping[str, Tensor]
    seconds: float
    weight: Tensor | None = None

    @property
    def objective(self) -> float:
        """Error of the layer."""
        return float(self.row_objectives.sum().clamp_min(0))

    @property
    def bound(self) -> float:
        """Proven lower bound of the error of any allowed mask of the layer."""
        return float(self.row_bounds.sum())

    @property
    def gap(self) -> float:
        """(objective - bound) / objective of the layer, 0 when both are 0."""
        sums = torch.tensor([self.objective, self.bound], dtype=torch.float64)
        return float(relative_gap(sums[0], sums[1]))

    @property
    def row_gaps(self) -> Tensor:
        """Gap of each row (rows,)."""
        return relative_gap(self.row_objectives, self.row_bounds)


def relative_gap(objective: Tensor, bound: Tensor) -> Tensor:
    """(objective - bound) / objective elementwise, at least 0, and 0 where the objective is 0."""
    gap = (objective - bound) / torch.where(objective > 0, objective, 1.0)
    return torch.where(objective > 0, gap, 0.0).clamp_min(0)


class Solver(ABC):
    """One algorithm. Concrete solvers are final frozen dataclasses whose fields are their options.

    ``group`` and ``covers`` are class attributes, or properties where they depend on the fields.

    Class attributes:
        name: what the command line calls it.
        group: what kind of method it is.
        covers: what it can do.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def group(self) -> Group:
        """What kind of method it is."""

    @property
    def covers(self) -> Covers:
        """What it can do: rows one by one, without output metric, unless it says otherwise."""
        return Covers()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old in ("requires", "layer_budget", "metric"):
            if old in vars(cls):
                raise TypeError(f"solver {cls.__name__}: expected {old} as part of covers = Covers(...)")

    @abstractmethod
    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Solve ``problem``, from the mask ``init`` (rows, cols) if one is given."""

    @property
    def drift_by_default(self) -> bool:
        """Whether models are pruned with drift where nothing else is asked for: searches that look at it."""
        return self.group in (Group.LOCAL_SEARCH, Group.EXACT) and self.covers.drift_by_default

    def missing(self) -> tuple[str, ...]:
        """Required libraries that are not installed."""
        return tuple(name for name in self.covers.requires if importlib.util.find_spec(name) is None)


def check_covered(problem: LayerProblem, solver: Solver) -> None:
    """Refuse a solver that cannot run here or does not cover what the problem has.

    Raises:
        SolverNotInstalledError: if a library is missing.
        UnsupportedProblemError: naming solver, problem and the missing part.
    """
    if missing := solver.missing():
        raise SolverNotInstalledError(
            f"solver {solver.name} needs {' and '.join(missing)}: expected it to be installed, "
            f"found none; run pip install {' '.join(missing)}"
        )
    label = f"layer {problem.name!r}" if problem.name else "a layer"
    covers = solver.covers
    if problem.pattern.couples not in covers.couplings:
        wanted = " or ".join(_COUPLED[each] for each in Coupling if each in covers.couplings)
        raise UnsupportedProblemError(
            f"solver {solver.name} on {label}: expected a pattern whose budget is that of {wanted}, found "
            f"the budget of {_COUPLED[problem.pattern.couples]} ({problem.pattern})"
        )
    if problem.metric is not None and not covers.metric:
        raise UnsupportedProblemError(
            f"solver {solver.name} on {label} sees each row alone: expected no output metric, found one; use "
            "RowSweeps(solver), or coupled_row(problem), which states the layer as one row"
        )
    if problem.metric is not None and covers.swept and problem.pattern.couples is not Coupling.BLOCK:
        raise UnsupportedProblemError(
            f"solver {solver.name} on {label} sweeps over rows: expected a pattern of rows or blocks under "
            f"an output metric, found the budget of a whole layer ({problem.pattern})"
        )


_COUPLED = {Coupling.BLOCK: "a row or block", Coupling.LAYER: "a whole layer"}


def solve(
    problem: LayerProblem,
    solver: Solver,
    init: Tensor | Solution | None = None,
    budget: Budget | None = None,
) -> Solution:
    """Run ``solver`` on ``problem`` and check what it says.

    Args:
        problem: the layer.
        solver: any solver object.
        init: warm start, a mask (rows, cols) with the pattern or an earlier solution.
        budget: limits; none by default.

    Raises:
        InvalidProblemError: if ``init`` does not fit.
        SolverNotInstalledError: if a library is missing.
        UnsupportedProblemError: if the solver does not cover the pattern or the output metric.
        NoIncumbentError: if a limit was reached before any mask was found.
        InvalidOutcomeError: if the solver's mask or bound does not hold what it claims.
    """
    check_covered(problem, solver)
    if isinstance(init, Solution):
        init = init.mask
    if init is not None and not problem.is_feasible(init):
        raise InvalidProblemError(
            f"the warm start has the pattern {problem.pattern} and shape {tuple(problem.weight.shape)}: "
            f"expected such a mask, found {tuple(init.shape)} {init.dtype} with {int(init.sum())} kept"
        )
    budget = budget or Budget()
    start = time.perf_counter()
    with full_precision():
        outcome = solver.run(problem, None if init is None else init.to(problem.device), budget)
    seconds = time.perf_counter() - start
    return _checked(problem, solver, outcome, seconds)


def _checked(problem: LayerProblem, solver: Solver, outcome: Outcome, seconds: float) -> Solution:
    mask = outcome.mask
    if mask is None:
        raise NoIncumbentError(
            f"solver {solver.name} stopped ({outcome.status}) early: expected a mask, found none"
        )
    if not problem.is_feasible(mask):
        raise InvalidOutcomeError(
            f"solver {solver.name} returned a mask without the pattern {problem.pattern}: "
            f"shape {tuple(mask.shape)}, {int(mask.sum())} kept"
        )
    weight = None if outcome.weight is None else _checked_weight(problem, solver, mask, outcome.weight)
    objectives = problem.row_objectives(mask, weight)
    bounds = torch.zeros_like(objectives)
    if outcome.row_bounds is not None:
        bounds = outcome.row_bounds.to(objectives).clamp_min(0)
        excess = bounds - objectives
        # the bound of a row is computed from terms of the size of its whole output
        slack = BOUND_TOLERANCE * torch.maximum(objectives, 1e-6 * problem.output_norms())
        if not bool((excess <= slack).all()):
            row = int((excess - slack).argmax())
            raise InvalidOutcomeError(
                f"solver {solver.name} claims a bound above its own mask's error in row {row}: "
                f"bound {float(bounds[row]):.9g}, error {float(objectives[row]):.9g}"
            )
        bounds = torch.minimum(bounds, objectives)
    statuses = outcome.row_statuses or [outcome.status] * problem.rows
    return Solution(
        solver=repr(solver),
        mask=mask,
        row_objectives=objectives,
        row_bounds=bounds,
        status=outcome.status,
        row_statuses=tuple(statuses),
        trace=tuple(outcome.trace),
        stats=dict(outcome.stats),
        seconds=seconds,
        weight=weight,
    )


def _checked_weight(problem: LayerProblem, solver: Solver, mask: Tensor, weight: Tensor) -> Tensor:
    if weight.shape != problem.weight.shape or not bool(torch.isfinite(weight).all()):
        raise InvalidOutcomeError(
            f"solver {solver.name} returned new weights: expected finite values "
            f"{tuple(problem.weight.shape)}, found {tuple(weight.shape)} with "
            f"{int((~torch.isfinite(weight)).sum())} NaN or Inf"
        )
    if bool((weight[~mask] != 0).any()):
        raise InvalidOutcomeError(
            f"solver {solver.name} returned new weights: expected zeros where its mask prunes, found others"
        )
    return weight.detach().to(problem.weight)
