"""The contract of every solver, checked with oracles that share no code with the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import conformance
import pytest
import torch

import sparseswaps as ss
from sparseswaps.testing import (
    CASES,
    check_claims,
    check_objectives,
    check_repeats,
    check_rows_alone,
    check_solver,
    raw_error,
    tolerance,
)


@pytest.mark.parametrize("check", [check_objectives, check_claims, check_repeats, check_rows_alone])
@pytest.mark.parametrize("solver", conformance.SOLVERS, ids=repr)
def test_contract(solver: ss.Solver, check: Callable[[ss.Solver], None]) -> None:
    check(solver)


@pytest.mark.parametrize(
    "solver",
    # DSnoT follows the mean error of an output and SparseFW a relaxation, not the layer error, which may rise
    [
        s
        for s in conformance.SOLVERS
        if s.group is ss.Group.LOCAL_SEARCH and not isinstance(s, (ss.DSnoT, ss.SparseFW))
    ],
    ids=repr,
)
def test_local_search_is_never_worse_than_its_start(solver: ss.Solver) -> None:
    for family, pattern, drift in CASES:
        problem = conformance.problem(family, pattern, drift, seed=1)
        start = ss.solve(problem, ss.Random(seed=5))
        solution = ss.solve(problem, solver, init=start)
        # float64 rounding of a row's output is all that may be lost
        slack = 1e-12 * problem.output_norms()
        if not isinstance(solver, ss.Chain):  # a chain starts from its own first member
            assert bool((solution.row_objectives <= start.row_objectives + slack).all()), problem.name


@pytest.mark.parametrize("search", ["best", "lazy"])
def test_one_swap_ends_where_no_swap_improves(search: str) -> None:
    """Every single swap of the final mask is tried on the raw activations."""
    for family, pattern, drift in CASES:
        problem, inputs, dense = conformance.with_raw(family, pattern, drift, seed=2)
        start = ss.solve(problem, ss.Wanda())
        solution = ss.solve(problem, ss.OneSwap(search=search), init=start)
        assert solution.status is ss.Status.LOCAL_OPTIMUM
        slack = tolerance(problem, dense)
        for row in range(problem.rows):
            mask = solution.mask[row]
            now = float(raw_error(problem, solution.mask, inputs, dense)[row])
            # the solver's own tolerance is 1e-6 of the starting error
            allowed = 1e-6 * float(start.row_objectives[row]) + 2 * float(slack[row])
            for u in torch.nonzero(mask).flatten().tolist():
                for p in torch.nonzero(~mask).flatten().tolist():
                    if u // problem.pattern.block != p // problem.pattern.block:
                        continue
                    swapped = solution.mask.clone()
                    swapped[row, u], swapped[row, p] = False, True
                    assert float(raw_error(problem, swapped, inputs, dense)[row]) >= now - allowed, (
                        problem.name
                    )


def test_closed_form_of_a_swap() -> None:
    """Δ(u, p) of the paper equals the recomputed difference of errors, with and without drift."""
    for drift in (False, True):
        problem, inputs, dense = conformance.with_raw("correlated", "0.5", drift)
        mask = ss.solve(problem, ss.Wanda()).mask
        gram, weight = problem.gram.matrix, problem.weight.double()
        cost = (weight * ~mask) @ gram + (problem.drift.linear if problem.drift else 0)
        before = raw_error(problem, mask, inputs, dense)
        for row in range(problem.rows):
            w, c = weight[row], cost[row]
            for u in torch.nonzero(mask[row]).flatten().tolist():
                for p in torch.nonzero(~mask[row]).flatten().tolist():
                    change = (
                        2 * w[u] * c[u] + w[u] ** 2 * gram[u, u] - 2 * w[p] * c[p] + w[p] ** 2 * gram[p, p]
                    )
                    change -= 2 * w[u] * w[p] * gram[u, p]
                    swapped = mask.clone()
                    swapped[row, u], swapped[row, p] = False, True
                    after = raw_error(problem, swapped, inputs, dense)
                    torch.testing.assert_close(
                        change, after[row] - before[row], rtol=1e-5, atol=1e-6 * float(before[row])
                    )


def test_result_does_not_depend_on_the_row_batch() -> None:
    problem = ss.synthetic_layer("correlated", 24, 48, "0.5", seed=4)
    whole = ss.solve(problem, ss.OneSwap()).mask
    single = torch.cat([ss.solve(problem.slice_rows(slice(r, r + 1)), ss.OneSwap()).mask for r in range(24)])
    assert torch.equal(whole, single)


def test_max_swaps_is_honest() -> None:
    problem = ss.synthetic_layer("correlated", 16, 64, "0.5")
    errors = []
    for swaps in (0, 1, 3, 1000):
        solution = ss.solve(problem, ss.OneSwap(max_swaps=swaps, search="best"))
        assert int(solution.stats["swaps"].max()) <= swaps
        errors.append(solution.objective)
        if swaps == 0:
            assert solution.objective == ss.solve(problem, ss.Wanda()).objective
            assert solution.status is ss.Status.ITERATION_LIMIT
    assert errors == sorted(errors, reverse=True)
    assert solution.status is ss.Status.LOCAL_OPTIMUM


def test_chain_starts_each_member_from_the_one_before() -> None:
    problem = conformance.problem("correlated", "0.5")
    chained = ss.solve(problem, ss.Chain(ss.Magnitude(), ss.OneSwap()))
    by_hand = ss.solve(problem, ss.OneSwap(), init=ss.solve(problem, ss.Magnitude()))
    assert torch.equal(chained.mask, by_hand.mask)


def test_chain_changes_weights_only_if_its_last_member_does() -> None:
    problem = conformance.problem("correlated", "0.5")
    swapped = ss.solve(problem, ss.OneSwap())
    chain = ss.Chain(ss.OneSwap(), ss.Reconstruction())
    chained, by_hand = ss.solve(problem, chain), ss.solve(problem, ss.Reconstruction(), init=swapped)
    assert chain.group is ss.Group.WEIGHT_UPDATE
    assert torch.equal(chained.weight, by_hand.weight)
    assert chained.objective == by_hand.objective < swapped.objective
    back = ss.Chain(ss.Reconstruction(), ss.OneSwap())
    assert back.group is ss.Group.LOCAL_SEARCH
    assert ss.solve(problem, back).weight is None
    assert ss.solve(problem, back).objective == swapped.objective
    assert ss.Chain(ss.Reconstruction(), ss.Wanda()).group is ss.Group.SCORE


def test_chain_under_an_output_metric() -> None:
    plain = ss.synthetic_layer("correlated", 6, 16, "0.5")
    gradients = torch.randn((20, 6), generator=torch.Generator().manual_seed(0))
    gradients[:, 1:] += gradients[:, :1]
    problem = ss.LayerProblem(
        plain.weight, plain.gram, plain.pattern, metric=ss.output_metric(gradients.T @ gradients)
    )
    chained = ss.solve(problem, ss.Chain(ss.Magnitude(), ss.OneSwap(), ss.Reconstruction()))
    swept = ss.solve(problem, ss.RowSweeps(), init=ss.solve(problem, ss.Magnitude()))
    by_hand = ss.solve(problem, ss.Reconstruction(), init=swept)
    assert torch.equal(chained.weight, by_hand.weight)
    assert chained.objective == by_hand.objective < swept.objective
    assert not ss.Chain(ss.OneSwap(), ss.BranchAndBound()).covers.metric


def test_best_of_scores_updated_weights() -> None:
    """A row's choice is scored with the weights that go with it, and brings them along."""
    problem = ss.synthetic_layer("correlated", 32, 16, "0.5")
    members = [ss.RIA(), ss.Chain(ss.Random(seed=1), ss.Reconstruction())]
    each = [ss.solve(problem, member) for member in members]
    best = ss.solve(problem, ss.BestOf(*members))
    objectives = torch.stack([solution.row_objectives for solution in each])
    assert torch.equal(best.row_objectives, objectives.amin(0))
    assert objectives.argmin(0).unique().numel() == 2
    for row, choice in enumerate(objectives.argmin(0).tolist()):
        kept = problem.weight * each[0].mask if choice == 0 else each[1].weight
        assert torch.equal(best.weight[row], kept[row])


def test_best_of_takes_the_best_of_each_row() -> None:
    problem = ss.synthetic_layer("correlated", 32, 16, "0.5")
    members = [ss.Random(seed=s) for s in range(4)]
    best = ss.solve(problem, ss.BestOf(*members)).row_objectives
    each = torch.stack([ss.solve(problem, m).row_objectives for m in members])
    assert torch.equal(best, each.amin(0))


@final
@dataclass(frozen=True)
class ByNeighbours(ss.Solver):
    """Looks at all rows and does not say so: keeps what the rows before a row did not."""

    name: ClassVar[str] = "by-neighbours"
    group: ClassVar[ss.Group] = ss.Group.SCORE
    covers: ClassVar[ss.Covers] = ss.Covers()

    def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, budget: ss.Budget) -> ss.Outcome:
        return ss.Outcome(problem.pattern.top_k(problem.weight.cumsum(0)), ss.Status.FINISHED)


def test_the_contract_finds_rows_that_do_not_stand_alone() -> None:
    with pytest.raises(AssertionError, match=r"ByNeighbours\(\) on .*: expected rows slice\(1, 4"):
        check_solver(ByNeighbours())


def test_capabilities_that_are_not_in_covers_are_refused() -> None:
    with pytest.raises(TypeError, match="solver Old: expected layer_budget as part of covers"):
        type("Old", (ss.Solver,), {"layer_budget": True})
