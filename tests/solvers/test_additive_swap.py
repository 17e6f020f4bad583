"""1-swap without the interaction term, against errors measured on raw activations."""

from __future__ import annotations

import itertools

import conformance
import pytest
import torch

import sparseswaps as ss
from sparseswaps.solvers.registry import parse_solver

CASES = list(itertools.product(("correlated", "weakly-correlated"), ("0.5", "2:4"), (False, True), range(4)))


def errors(weight: torch.Tensor, masks: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Error of one row for many masks (masks, cols), from activations alone."""
    return ((weight @ dense - (masks * weight) @ x) ** 2).sum(1)


def walk_by_hand(
    weight: torch.Tensor,
    mask: torch.Tensor,
    x: torch.Tensor,
    dense: torch.Tensor,
    block: int,
    accept: str,
) -> tuple[torch.Tensor, int, int, bool]:
    """Best mask, swaps, swaps that raised the error, and whether a mask came back, for one row.

    What pruning u or restoring p alone would do to the error is measured; the sum of both is the estimate.
    """
    start = float(errors(weight, mask[None], x, dense)[0])
    limit = 1e-6 * start / 2
    best, best_error, now, swaps, worse = mask.clone(), start, start, 0, 0
    seen = {tuple(mask.tolist())}
    while True:
        flipped = mask ^ torch.eye(len(mask), dtype=torch.bool)
        alone = errors(weight, flipped, x, dense) - now
        estimate, u, p = min(
            (float(alone[u] + alone[p]), u, p)
            for u in torch.nonzero(mask).flatten().tolist()
            for p in torch.nonzero(~mask).flatten().tolist()
            if u // block == p // block
        )
        swapped = mask.clone()
        swapped[u], swapped[p] = False, True
        then = float(errors(weight, swapped[None], x, dense)[0])
        if estimate >= -limit or (accept == "error" and then - now >= -limit):
            return best, swaps, worse, False
        worse += then - now > limit
        mask, now, swaps = swapped, then, swaps + 1
        if now < best_error - limit:
            best, best_error = mask.clone(), now
        if tuple(mask.tolist()) in seen:
            return best, swaps, worse, True
        seen.add(tuple(mask.tolist()))


@pytest.mark.parametrize("accept", ["estimate", "error"])
def test_walks_as_measured_single_flips_say(accept: str) -> None:
    met_again = raised = 0
    for family, pattern, drift, seed in CASES:
        problem, x, dense = conformance.with_raw(family, pattern, drift, seed)
        start = ss.solve(problem, ss.Wanda()).mask
        solution = ss.solve(problem, ss.AdditiveSwap(accept=accept))
        for row in range(problem.rows):
            best, swaps, worse, cycled = walk_by_hand(
                problem.weight[row].double(), start[row], x, dense, problem.pattern.block, accept
            )
            label = f"{problem.name}, row {row}"
            assert torch.equal(solution.mask[row], best), label
            assert bool(solution.stats["cycled"][row]) == cycled, label
            met_again += cycled
            raised += worse
            if not cycled:  # Brent's method may go around more than once before it notices
                assert int(solution.stats["swaps"][row]) == swaps, label
                assert int(solution.stats["worsening"][row]) == worse, label
        assert solution.status is ss.Status.FINISHED
    # the cases show what the ablation is about, or cannot
    assert (raised > 0) == (accept == "estimate")
    assert (met_again > 0) == (accept == "estimate")


def test_orthogonal_inputs_do_not_interact() -> None:
    """With a diagonal Gram matrix the term is zero: both searches end at the optimum."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((8, 24), generator=generator)
    gram = ss.Gram(torch.diag(torch.rand(24, generator=generator, dtype=torch.float64) + 0.1), 100)
    problem = ss.LayerProblem(weight, gram, ss.SparsityPattern.per_row(24, 0.5))
    random = ss.solve(problem, ss.Random(seed=1))
    additive = ss.solve(problem, ss.AdditiveSwap(), init=random)
    assert torch.equal(additive.mask, ss.solve(problem, ss.OneSwap(), init=random).mask)
    assert torch.equal(additive.mask, ss.solve(problem, ss.Wanda()).mask)
    assert int(additive.stats["worsening"].sum()) == 0


def test_limits() -> None:
    problem = ss.synthetic_layer("correlated", 16, 96, "0.5", seed=2)
    wanda = ss.solve(problem, ss.Wanda()).objective
    objectives = []
    for swaps in (0, 1, 4, None):
        solution = ss.solve(problem, ss.AdditiveSwap(max_swaps=swaps))
        objectives.append(solution.objective)
        if swaps is not None:
            assert int(solution.stats["swaps"].max()) <= swaps
            assert solution.status is ss.Status.ITERATION_LIMIT
    assert objectives[0] == wanda
    assert objectives == sorted(objectives, reverse=True)  # the best mask that was met
    late = ss.solve(problem, ss.AdditiveSwap(), budget=ss.Budget(0.0))
    assert late.status is ss.Status.TIME_LIMIT
    assert late.objective == wanda


def test_options() -> None:
    assert parse_solver("additive-swap:accept=error,max_swaps=5") == ss.AdditiveSwap(5, "error")
    with pytest.raises(ss.InputError, match="estimate or error"):
        ss.AdditiveSwap(accept="always")
    with pytest.raises(ss.InputError, match="at least 0"):
        ss.AdditiveSwap(max_swaps=-1)
    with pytest.raises(ss.InputError, match="tolerance"):
        ss.AdditiveSwap(tolerance=1.0)
