"""The contract of every solver, checked with oracles that share no code with the product."""

from __future__ import annotations

import itertools

import conformance
import pytest
import torch

import sparseswaps as ss

CASES = list(itertools.product(conformance.FAMILIES, conformance.PATTERNS, (False, True)))


def raw_error(
    problem: ss.LayerProblem,
    mask: torch.Tensor,
    inputs: torch.Tensor,
    dense: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """‖wᵀX - (m∘ŵ)ᵀX̂‖² of each row, from activations alone; ŵ = w unless ``kept`` weights were updated."""
    weight = problem.weight.double()
    new = weight if kept is None else kept.double()
    return ((weight @ dense - (new * mask) @ inputs) ** 2).sum(1)


def tolerance(
    problem: ss.LayerProblem, dense: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """The Gram is summed from float32 products: 1e-6 of the row's output, which is what cancels."""
    sizes = problem.weight.double().abs()
    if kept is not None:
        sizes = torch.maximum(sizes, kept.double().abs())
    return 1e-6 * ((sizes @ dense.abs()) ** 2).sum(1) + 1e-30


def all_masks(pattern: ss.SparsityPattern, cols: int) -> torch.Tensor:
    """Every mask of a row (masks, cols), by brute force."""
    blocks = []
    for choice in itertools.combinations(range(pattern.block), pattern.keep):
        block = torch.zeros(pattern.block, dtype=torch.bool)
        block[list(choice)] = True
        blocks.append(block)
    return torch.stack([torch.cat(each) for each in itertools.product(blocks, repeat=cols // pattern.block)])


@pytest.mark.parametrize("solver", conformance.SOLVERS, ids=repr)
def test_contract(solver: ss.Solver) -> None:
    for family, pattern, drift in CASES:
        problem, inputs, dense = conformance.with_raw(family, pattern, drift)
        solution = ss.solve(problem, solver)
        label = f"{solver} on {problem.name}"
        kept = solution.mask.view(problem.rows, -1, problem.pattern.block).sum(-1)
        assert bool((kept == problem.pattern.keep).all()), label
        raw = raw_error(problem, solution.mask, inputs, dense, solution.weight)
        slack = tolerance(problem, dense, solution.weight)
        assert (solution.weight is not None) == (solver.group is ss.Group.WEIGHT_UPDATE), label
        if solution.weight is not None:
            assert solution.weight.dtype == problem.weight.dtype, label
            assert not bool(solution.weight[~solution.mask].any()), label
        assert bool(((solution.row_objectives - raw).abs() <= slack).all()), label
        assert bool((solution.row_bounds <= solution.row_objectives).all()), label
        assert solution.solver == repr(solver)
        if solver.group is ss.Group.EXACT and solution.status is ss.Status.FINISHED:
            masks = all_masks(problem.pattern, problem.cols)
            for row in range(problem.rows):
                weight = problem.weight[row].double()
                best = ((weight @ dense - (masks * weight) @ inputs) ** 2).sum(1).min()
                assert abs(float(solution.row_objectives[row] - best)) <= float(slack[row]), label


@pytest.mark.parametrize("solver", conformance.SOLVERS, ids=repr)
def test_same_result_twice(solver: ss.Solver) -> None:
    problem = conformance.problem("correlated", "0.5", drift=True)
    first, second = ss.solve(problem, solver), ss.solve(problem, solver)
    assert torch.equal(first.mask, second.mask)
    if first.weight is not None:
        assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    "solver",
    # DSnoT follows the mean error of an output, not the layer error, which may rise
    [s for s in conformance.SOLVERS if s.group is ss.Group.LOCAL_SEARCH and not isinstance(s, ss.DSnoT)],
    ids=repr,
)
def test_local_search_is_never_worse_than_its_start(solver: ss.Solver) -> None:
    for family, pattern, drift in CASES:
        problem = conformance.problem(family, pattern, drift, seed=1)
        start = ss.solve(problem, ss.Random(seed=5))
        solution = ss.solve(problem, solver, init=start)
        # float64 rounding of a row's output is all that may be lost
        slack = 1e-12 * problem.output_norms()
        if not isinstance(solver, ss.Chain):  # a sequence starts from its own first member
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


def test_sequence_starts_each_member_from_the_one_before() -> None:
    problem = conformance.problem("correlated", "0.5")
    chained = ss.solve(problem, ss.Chain(ss.Magnitude(), ss.OneSwap()))
    by_hand = ss.solve(problem, ss.OneSwap(), init=ss.solve(problem, ss.Magnitude()))
    assert torch.equal(chained.mask, by_hand.mask)


def test_sequence_changes_weights_only_if_its_last_member_does() -> None:
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


def test_sequence_under_an_output_metric() -> None:
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
    assert not ss.Chain(ss.OneSwap(), ss.BranchAndBound()).metric


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
