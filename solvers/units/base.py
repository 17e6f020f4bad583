"""What chooses units, and the one function that runs and checks it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InvalidOutcomeError, InvalidProblemError
from ...problems.products import full_precision
from ...problems.units import UnitProblem
from ..base import Budget, Status

# Rounding between the error of a row of units and that of their layer, relative.
BOUND_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class UnitOutcome:
    """What a solver of units found.

    Attributes:
        kept: kept units (units,), bool.
        status: why it stopped.
        stats: counters.
        bound: proven: no choice has a smaller error with the old weights; None without such a proof.
    """

    kept: Tensor
    status: Status
    stats: Mapping[str, int] = field(default_factory=dict)
    bound: float | None = None


@dataclass(frozen=True, eq=False)
class UnitSolution:
    """What ``solve_units`` has checked and scored in float64.

    Attributes:
        solver: its ``repr``.
        kept: kept units (units,), bool.
        weight: the consumer's weights (rows, cols), float64, zero in pruned columns; the old ones without an
            update.
        error: of the consumer with these weights.
        error_masked: with its old weights.
        status: why the solver stopped.
        stats: counters.
        seconds: of the solver's own run.
        bound: proven: no choice has a smaller ``error_masked``; None where nothing was proven.
        bias: what is added to that of the consumer (rows,), float64; the errors are those with it. None
            without.
    """

    solver: str
    kept: Tensor
    weight: Tensor
    error: float
    error_masked: float
    status: Status
    stats: Mapping[str, int]
    seconds: float
    bound: float | None = None
    bias: Tensor | None = None

    @property
    def gap(self) -> float | None:
        """How far ``error_masked`` may be from the least, as a share of it; None without a bound."""
        if self.bound is None:
            return None
        return max(0.0, 1 - self.bound / self.error_masked) if self.error_masked > 0 else 0.0


class UnitSolver(ABC):
    """One algorithm; concrete ones are final frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """Choose units, from those of ``init`` (units,) if given."""


def solve_units(
    problem: UnitProblem,
    solver: UnitSolver,
    init: Tensor | UnitSolution | None = None,
    budget: Budget | None = None,
    update: bool = True,
    bias: bool = False,
) -> UnitSolution:
    """Run ``solver``, check what it says, and update the kept columns by least squares.

    Args:
        problem: the units and their consumer.
        solver: any solver of units.
        init: warm start (units,), bool, with the pattern, or an earlier solution.
        budget: limits; none by default.
        update: whether the weights of kept columns are updated; never to a larger error than the old ones.
        bias: whether a bias absorbs the means of what is missing, in what the solver sees too (FLAP).

    Raises:
        InvalidProblemError: if ``init`` does not fit, or a layer with a bias cannot be centred.
        InvalidOutcomeError: if what the solver keeps does not have the pattern.
    """
    given = init.kept if isinstance(init, UnitSolution) else init
    if given is not None and not _fits(problem, given):
        raise InvalidProblemError(
            f"the warm start has the pattern {problem.pattern} of {problem.units} units: expected such a "
            f"mask, found {tuple(given.shape)} {given.dtype} with {int(given.sum())} kept"
        )
    original = problem
    if bias:
        problem = problem.centred()
    begin = time.perf_counter()
    with full_precision():
        outcome = solver.run(problem, given, budget or Budget())
    seconds = time.perf_counter() - begin
    kept = outcome.kept
    if not _fits(problem, kept):
        raise InvalidOutcomeError(
            f"solver {solver.name}: expected {problem.pattern} of {problem.units} units, found "
            f"{tuple(kept.shape)} {kept.dtype} with {int(kept.sum())} kept"
        )
    masked = problem.error(kept)
    weight, error = problem.weight.masked_fill(~problem.mask(kept), 0), masked
    if update:
        found = problem.updated(kept)
        found_error = problem.error(kept, found)
        if found_error <= masked:
            weight, error = found, found_error
    if outcome.bound is not None and outcome.bound > masked * (1 + BOUND_SLACK):
        raise InvalidOutcomeError(
            f"solver {solver.name}: expected a bound below its own error {masked:.9g}, found "
            f"{outcome.bound:.9g}"
        )
    return UnitSolution(
        repr(solver),
        kept,
        weight,
        error,
        masked,
        outcome.status,
        dict(outcome.stats),
        seconds,
        outcome.bound,
        original.bias(weight) if bias else None,
    )


def _fits(problem: UnitProblem, kept: Tensor) -> bool:
    if kept.shape != (problem.units,) or kept.dtype != torch.bool:
        return False
    return problem.pattern.allows(kept[None])
