"""Wrappers around every solver: nothing of what a member covers is lost, and nothing is claimed beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import conformance
import pytest
import torch

import sparseswaps as ss
from sparseswaps.problems.pattern import Coupling
from sparseswaps.solvers.registry import parse_solver, solver_text
from sparseswaps.solvers.search.held_out_stop import with_held_out_stop

# One of each registered solver, and chains.
MEMBERS = [kind() for kind in ss.SOLVERS.values()] + [ss.Chain(ss.Magnitude(), ss.Tabu(effort=0.2))]
WRAPPERS: list[Callable[[ss.Solver], ss.Solver]] = [
    ss.Chain,
    lambda solver: ss.Chain(ss.Wanda(), solver),
    ss.BestOf,
    lambda solver: ss.BestOf(ss.Wanda(), solver),
    ss.RowSweeps,
    lambda solver: ss.AlternatingReconstruction(search=solver),
]


def wrapped() -> list[tuple[ss.Solver, ss.Solver]]:
    """Every wrapper around every solver that it takes, with that solver."""
    found = []
    for wrap in WRAPPERS:
        for member in MEMBERS:
            try:
                found.append((wrap(member), member))
            except ss.InputError:  # sweeps and turns take no weight updates
                assert member.group is ss.Group.WEIGHT_UPDATE
    return found


@pytest.mark.parametrize(("wrapper", "member"), wrapped(), ids=lambda each: repr(each)[:60])
def test_wrappers_cover_what_their_members_do(wrapper: ss.Solver, member: ss.Solver) -> None:
    inner, outer = member.covers, wrapper.covers
    assert set(inner.requires) <= set(outer.requires)
    assert set(member.missing()) <= set(wrapper.missing())
    assert outer.couplings == inner.couplings
    assert inner.rows_alone or not outer.rows_alone
    if not isinstance(wrapper, ss.AlternatingReconstruction):
        assert wrapper.drift_by_default == member.drift_by_default
        assert wrapper.group is member.group or (wrapper.group, member.group) == (
            ss.Group.BOUND,
            ss.Group.BOUND,
        )


def layer_of(coupling: Coupling, metric: bool) -> ss.LayerProblem:
    plain = ss.synthetic_layer("correlated", 4, 8, "0.5")
    pattern = ss.LayerBudget(4, 8) if coupling is Coupling.LAYER else plain.pattern
    if not metric:
        return ss.LayerProblem(plain.weight, plain.gram, pattern)
    gradients = torch.randn((30, 4), generator=torch.Generator().manual_seed(0))
    return ss.LayerProblem(
        plain.weight, plain.gram, pattern, metric=ss.output_metric(gradients.T @ gradients)
    )


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("coupling", list(Coupling))
def test_what_is_covered_runs_and_what_is_not_is_refused(coupling: Coupling, metric: bool) -> None:
    problem = layer_of(coupling, metric)
    ran = refused = 0
    for solver in [*MEMBERS, *(wrapper for wrapper, _ in wrapped())]:
        if solver.missing():
            with pytest.raises(ss.SolverNotInstalledError, match="run pip install"):
                ss.solve(problem, solver)
            continue
        covers = solver.covers
        covered = coupling in covers.couplings and (covers.metric or not metric)
        # a sweep knows the budgets of rows, or the layer's without a metric
        covered &= not (metric and covers.swept and coupling is Coupling.LAYER)
        if not covered:
            refused += 1
            with pytest.raises(ss.UnsupportedProblemError, match=f"solver {solver.name} on a layer"):
                ss.solve(problem, solver)
        elif slow(solver):
            continue
        else:
            ran += 1
            assert problem.is_feasible(ss.solve(problem, solver).mask), solver
    assert ran > 10
    assert refused > 10 or (coupling is Coupling.BLOCK and not metric)


def slow(solver: ss.Solver) -> bool:
    """Exact solvers by other programs, bounds by semidefinite programs: tested by themselves."""
    return any(name in repr(solver) for name in ("SCIP", "HiGHS", "Sdp", "Dnn", "Qcr"))


def test_best_of_keeps_a_budget_of_the_layer() -> None:
    problem = layer_of(Coupling.LAYER, metric=False)
    members = (ss.Wanda(), ss.OneSwap())
    best = ss.solve(problem, ss.BestOf(*members))
    assert problem.is_feasible(best.mask)
    assert best.objective == min(ss.solve(problem, each).objective for each in members)


def test_best_of_compares_coupled_layers_as_a_whole() -> None:
    problem = layer_of(Coupling.BLOCK, metric=True)
    members = [ss.Random(seed=seed) for seed in range(6)]
    best = ss.solve(problem, ss.BestOf(*members))
    assert best.objective == min(ss.solve(problem, each).objective for each in members)


def test_held_out_stops_reach_into_chains() -> None:
    problem, held_out = (conformance.problem("correlated", "0.5", seed=0) for _ in range(2))
    chain = ss.Chain(ss.Magnitude(), ss.OneSwap(), ss.Reconstruction())
    stopped = with_held_out_stop(chain, held_out)
    assert isinstance(stopped, ss.Chain)
    assert [type(each) for each in stopped.solvers] == [ss.Magnitude, ss.HeldOutStop, ss.Reconstruction]
    assert ss.solve(problem, stopped).weight is not None
    with pytest.raises(ss.InputError, match="expected a 1-swap search, found Tabu"):
        with_held_out_stop(ss.Tabu(), held_out)


@pytest.mark.parametrize("solver", [*MEMBERS, *conformance.SOLVERS], ids=repr)
def test_texts_of_solvers_are_read_back(solver: ss.Solver) -> None:
    text = solver_text(solver)
    if isinstance(solver, ss.BestOf):
        assert text == repr(solver)
    else:
        assert parse_solver(text) == solver


@final
@dataclass(frozen=True)
class Odd(ss.Solver):
    """Not in the registry."""

    name: ClassVar[str] = "one-swap"
    group: ClassVar[ss.Group] = ss.Group.SCORE

    def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, budget: ss.Budget) -> ss.Outcome:
        raise AssertionError("never reached")


def test_a_solver_of_somebody_else_has_no_text_of_ours() -> None:
    assert solver_text(Odd()) == "Odd()"


def test_sequence_is_called_chain_now() -> None:
    with pytest.warns(FutureWarning, match="Sequence is called Chain now"):
        assert ss.Sequence is ss.Chain
