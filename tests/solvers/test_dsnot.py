"""DSnoT against its published steps, row by row in plain Python on raw activations."""

from __future__ import annotations

import conformance
import numpy as np
import pytest
import torch

import sparseswaps as ss


def layer(
    pattern: str, seed: int, family: str = "correlated", rows: int = 6, cols: int = 24
) -> tuple[ss.LayerProblem, np.ndarray]:
    """A layer whose inputs have means (tokens, cols), with a Gram of full float64 precision."""
    inputs = ss.synthetic_activations(family, cols, 90, seed)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(cols, generator=generator, dtype=torch.float64) * inputs.std(0)
    inputs = inputs + shift
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64)
    gram = ss.Gram(inputs.T @ inputs, len(inputs), inputs.mean(0))
    parsed = ss.LayerBudget.parse if pattern.startswith("layer:") else ss.SparsityPattern.parse
    return ss.LayerProblem(weight, gram, parsed(pattern, cols)), inputs.numpy()


def by_hand(
    weight: np.ndarray,
    inputs: np.ndarray,
    kept: np.ndarray,
    group: int | None,
    window: int,
    threshold: float,
    cycles: int,
    power: float = 1.0,
    same_sign: bool = False,
) -> tuple[np.ndarray, int]:
    """One row: new mask (cols,) and swaps."""
    kept = kept.copy()
    effect = window * weight * inputs.mean(0)
    criterion = weight * inputs.mean(0) / inputs.var(0) ** power
    wanda = np.abs(weight) * np.sqrt((inputs**2).sum(0))
    growable, prunable = set(np.flatnonzero(~kept)), set(np.flatnonzero(kept))
    error = effect[~kept].sum()
    started = np.sign(error)
    for swap in range(cycles):
        if abs(error) <= threshold:
            return kept, swap
        sign = np.sign(error)
        grow = [j for j in growable if sign * criterion[j] > 0]
        if not grow:
            return kept, swap
        grown = max(grow, key=lambda j: sign * criterion[j])
        if group is None:
            prune = [j for j in prunable if sign * effect[j] < 0]
        else:
            prune = [j for j in prunable if j // group == grown // group]
        if not prune:
            return kept, swap
        pruned = min(prune, key=lambda j: wanda[j])
        after = error + effect[pruned] - effect[grown]
        if (group is not None or same_sign) and np.sign(after) != started:
            return kept, swap
        growable.remove(grown)
        prunable.remove(pruned)
        kept[grown], kept[pruned] = True, False
        error = after
    return kept, cycles


@pytest.mark.parametrize("pattern", ["0.5", "0.75", "2:4", "layer:0.5"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.0},
        {"same_sign": False},
        {"same_sign": False, "threshold": 0.0},
        {"variance_power": 0.0},
        {"max_cycles": 2, "window": 10},
    ],
    ids=str,
)
def test_published_steps(pattern: str, options: dict[str, float]) -> None:
    moved = 0
    for seed in range(4):
        for family in ("correlated", "weakly-correlated"):
            problem, inputs = layer(pattern, seed, family)
            start = ss.solve(problem, ss.Wanda())
            solver = ss.DSnoT(**options)
            solution = ss.solve(problem, solver, init=start)
            for row in range(problem.rows):
                kept, swaps = by_hand(
                    problem.weight[row].numpy(),
                    inputs,
                    start.mask[row].numpy(),
                    4 if pattern == "2:4" else None,
                    solver.window,
                    solver.threshold,
                    solver.max_cycles,
                    solver.variance_power,
                    solver.same_sign,
                )
                assert np.array_equal(solution.mask[row].numpy(), kept), (family, seed, row)
                assert int(solution.stats["swaps"][row]) == swaps
                moved += swaps
                left = abs(solver.window * (problem.weight[row].numpy() * ~kept) @ inputs.mean(0))
                # rounding of sums of 24 numbers of the size of the largest
                assert float(solution.stats["expected"][row]) == pytest.approx(left, rel=1e-9, abs=1e-8)
    assert moved > 10


def test_expected_errors_fall() -> None:
    problem, inputs = layer("0.5", 1, rows=64)
    start = ss.solve(problem, ss.Wanda())
    solution = ss.solve(problem, ss.DSnoT(), init=start)
    lost = [
        np.abs((problem.weight.numpy() * ~mask.numpy()) @ inputs.mean(0))
        for mask in (start.mask, solution.mask)
    ]
    assert bool((lost[1] <= lost[0]).all())
    assert lost[1].mean() < 0.9 * lost[0].mean()


def test_a_gram_without_means_is_refused() -> None:
    problem = conformance.problem("correlated", "0.5")
    bare = ss.LayerProblem(problem.weight, problem.gram.matrix, problem.pattern)
    with pytest.raises(ss.UnsupportedProblemError, match="expected a Gram matrix with means"):
        ss.solve(bare, ss.DSnoT())


def test_time_limit_keeps_the_warm_start() -> None:
    problem, _ = layer("0.5", 2)
    start = ss.solve(problem, ss.Random(seed=3))
    solution = ss.solve(problem, ss.DSnoT(), init=start, budget=ss.Budget(seconds=0))
    assert solution.status is ss.Status.TIME_LIMIT
    assert torch.equal(solution.mask, start.mask)


def test_options_that_are_refused() -> None:
    with pytest.raises(ss.InputError, match="found -1 and 2048"):
        ss.DSnoT(max_cycles=-1)
    with pytest.raises(ss.InputError, match=r"expected at least 0, found -0\.1 and 1"):
        ss.DSnoT(threshold=-0.1)
    problem, _ = layer("0.5", 2)
    start = ss.solve(problem, ss.Wanda())
    assert torch.equal(ss.solve(problem, ss.DSnoT(max_cycles=0), init=start).mask, start.mask)
