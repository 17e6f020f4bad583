"""What ``solve`` refuses, and the definitions it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import conformance
import pytest
import torch
from torch import Tensor

import sparseswaps as ss
from sparseswaps.solvers.base import relative_gap
from sparseswaps.solvers.registry import parse_solver


@final
@dataclass(frozen=True)
class Claims(ss.Solver):
    """Says whatever it is told to say."""

    name: ClassVar[str] = "claims"
    group: ClassVar[ss.Group] = ss.Group.EXACT
    mask: Tensor | None
    bounds: Tensor | None = None

    def run(self, problem: ss.LayerProblem, init: Tensor | None, budget: ss.Budget) -> ss.Outcome:
        return ss.Outcome(self.mask, ss.Status.TIME_LIMIT, row_bounds=self.bounds)


@final
@dataclass(frozen=True)
class NeedsAbsent(ss.Solver):
    """Needs a library that does not exist."""

    name: ClassVar[str] = "absent"
    group: ClassVar[ss.Group] = ss.Group.EXACT
    covers: ClassVar[ss.Covers] = ss.Covers(requires=("no_such_library_at_all",))

    def run(self, problem: ss.LayerProblem, init: Tensor | None, budget: ss.Budget) -> ss.Outcome:
        raise AssertionError("never reached")


PROBLEM = conformance.problem("correlated", "0.5")
WANDA = ss.solve(PROBLEM, ss.Wanda())


def test_false_claims_are_refused() -> None:
    with pytest.raises(ss.InvalidOutcomeError, match="bound above"):
        ss.solve(PROBLEM, Claims(WANDA.mask, WANDA.row_objectives * 1.01))
    with pytest.raises(ss.InvalidOutcomeError, match="without the pattern"):
        ss.solve(PROBLEM, Claims(torch.ones_like(WANDA.mask)))
    with pytest.raises(ss.InvalidOutcomeError, match="bound above"):
        ss.solve(PROBLEM, Claims(WANDA.mask, WANDA.row_objectives * torch.nan))
    with pytest.raises(ss.NoIncumbentError, match="time_limit"):
        ss.solve(PROBLEM, Claims(None))
    with pytest.raises(ss.SolverNotInstalledError, match="pip install no_such_library_at_all"):
        ss.solve(PROBLEM, NeedsAbsent())


def test_a_limit_with_an_incumbent_is_a_solution() -> None:
    solution = ss.solve(PROBLEM, Claims(WANDA.mask, WANDA.row_objectives / 2))
    assert solution.status is ss.Status.TIME_LIMIT
    assert solution.gap == pytest.approx(0.5)
    assert solution.row_statuses == (ss.Status.TIME_LIMIT,) * PROBLEM.rows


def test_warm_starts_are_checked() -> None:
    for wrong in (torch.ones_like(WANDA.mask), WANDA.mask[:, :-1], WANDA.mask.float()):
        with pytest.raises(ss.InvalidProblemError, match="warm start"):
            ss.solve(PROBLEM, ss.OneSwap(), init=wrong)


def test_gap() -> None:
    objective = torch.tensor([4.0, 4.0, 0.0, 4.0])
    bound = torch.tensor([3.0, 0.0, 0.0, 5.0])
    assert relative_gap(objective, bound).tolist() == [0.25, 1.0, 0.0, 0.0]


def test_solvers_from_text() -> None:
    assert parse_solver("wanda") == ss.Wanda()
    assert parse_solver("ria:alpha=1") == ss.RIA(alpha=1.0)
    assert parse_solver("one-swap:max_swaps=5,search=best") == ss.OneSwap(max_swaps=5, search="best")
    assert parse_solver("one-swap:max-swaps=none") == ss.OneSwap()
    assert parse_solver("one-swap+reconstruction") == ss.Chain(ss.OneSwap(), ss.Reconstruction())
    assert parse_solver("ria:alpha=1 + one-swap:max_swaps=5,search=best + reconstruction:damping=1e-2") == (
        ss.Chain(ss.RIA(1.0), ss.OneSwap(max_swaps=5, search="best"), ss.Reconstruction(damping=0.01))
    )
    assert parse_solver("ria:alpha=1e+0+one-swap") == ss.Chain(ss.RIA(1.0), ss.OneSwap())
    for text, message in [
        ("nothing", "unknown solver: expected one of"),
        ("ria:beta=1", "expected option=value with one of alpha, found 'beta=1'"),
        ("ria:alpha=x", "option alpha of solver ria"),
        ("one-swap:max_swaps=-1", "expected at least 0, found -1"),
        ("one-swap+nothing", "unknown solver: expected one of"),
        ("one-swap+", "found ''"),
    ]:
        with pytest.raises(ss.InputError, match=message):
            parse_solver(text)


def test_time_limit_keeps_the_incumbent() -> None:
    problem = ss.synthetic_layer("correlated", 64, 128, "0.5")
    solution = ss.solve(problem, ss.OneSwap(), budget=ss.Budget(seconds=0))
    assert solution.status is ss.Status.TIME_LIMIT
    assert solution.objective <= ss.solve(problem, ss.Wanda()).objective


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gaps_are_computed_in_double_precision(scale: float) -> None:
    """In single precision the objective of this layer is 0 or infinite, or its gap of 3e-9 is 0."""
    problem = ss.synthetic_layer("correlated", 2, 8, "0.5")
    found = ss.solve(problem, ss.BranchAndBound())
    rows = torch.tensor([2.0, 1.0], dtype=torch.float64) * scale**2
    scaled = replace(found, row_objectives=rows, row_bounds=rows * (1 - 3e-9))
    assert scaled.gap == pytest.approx(3e-9, rel=1e-6)
