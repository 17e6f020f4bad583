"""SparseGPT and ADMM against their defining steps in float64, written without the product's code."""

from __future__ import annotations

from collections.abc import Sequence

import conformance
import numpy as np
import pytest
import torch

import sparseswaps as ss


def layer(
    pattern: str, cols: int = 24, rows: int = 5, seed: int = 0, family: str = "correlated"
) -> tuple[ss.LayerProblem, np.ndarray, np.ndarray]:
    """A problem whose Gram matrix is that of its activations (cols, tokens) to the last bit of float64."""
    inputs = ss.synthetic_activations(family, cols, 80, seed).T
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64)
    parsed = ss.LayerBudget.parse if pattern.startswith("layer:") else ss.SparsityPattern.parse
    problem = ss.LayerProblem(weight, ss.Gram(inputs @ inputs.T), parsed(pattern, cols))
    return problem, inputs.numpy(), weight.numpy()


def cheapest(costs: Sequence[float], count: int) -> np.ndarray:
    """Indices of the smallest costs; of equal ones (weights of dead channels) the lowest index stays."""
    return np.lexsort((-np.arange(len(costs)), costs))[:count]


def sparsegpt_by_hand(
    weight: np.ndarray,
    inputs: np.ndarray,
    pattern: str,
    sparsity: float,
    blocksize: int,
    given: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 with a fresh inverse of the remaining Hessian for every column."""
    w = weight.copy()
    rows, cols = w.shape
    hessian = inputs @ inputs.T
    dead = np.diag(hessian) == 0
    w[:, dead] = 0
    size = np.diag(hessian)[~dead].mean()
    hessian[dead, dead] = size
    hessian += 0.01 * size * np.eye(cols)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(cols)]
    kept = np.ones((rows, cols), dtype=bool) if given is None else given.copy()
    for j in range(cols):
        if given is None and pattern == "2:4" and j % 4 == 0:
            for row in range(rows):
                cost = [w[row, j + k] ** 2 / inverses[j + k][0, 0] for k in range(4)]
                kept[row, j + cheapest(cost, 2)] = False
        if given is None and pattern != "2:4" and j % blocksize == 0:
            last = min(j + blocksize, cols)
            cost = np.stack([w[:, k] ** 2 / inverses[k][0, 0] for k in range(j, last)], axis=1)
            if pattern == "row":
                pruned = int(cols * sparsity) * last // cols - int(cols * sparsity) * j // cols
                for row in range(rows):
                    kept[row, j + cheapest(cost[row], pruned)] = False
            else:
                total = rows * int(cols * sparsity)
                pruned = total * last // cols - total * j // cols
                for flat in cheapest(cost.ravel(), pruned):
                    kept[flat // (last - j), j + flat % (last - j)] = False
        for row in range(rows):
            if not kept[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
    return kept, w * kept


@pytest.mark.parametrize("blocksize", [5, 8, 128])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("0.5", 0.5), ("0.3", 0.3), ("2:4", 0.5), ("layer:0.5", 0.5), ("layer:0.7", 0.7)],
)
@pytest.mark.parametrize("family", ["correlated", "zero-channels"])
def test_sparsegpt_takes_the_published_steps(
    blocksize: int, pattern: str, sparsity: float, family: str
) -> None:
    problem, inputs, weight = layer(pattern, family=family, seed=1)
    kind = "2:4" if ":4" in pattern else "layer" if pattern.startswith("layer") else "row"
    kept, by_hand = sparsegpt_by_hand(weight, inputs, kind, sparsity, blocksize, None)
    solution = ss.solve(problem, ss.SparseGPT(blocksize=blocksize))
    assert np.array_equal(solution.mask.numpy(), kept)
    # float64 all along: what is left is the rounding of two ways to invert
    np.testing.assert_allclose(solution.weight.numpy(), by_hand, rtol=1e-8, atol=1e-10)


def test_sparsegpt_with_a_given_mask() -> None:
    problem, inputs, weight = layer("0.5", seed=2)
    start = ss.solve(problem, ss.Random(seed=4))
    kept, by_hand = sparsegpt_by_hand(weight, inputs, "row", 0.5, 128, start.mask.numpy())
    solution = ss.solve(problem, ss.SparseGPT(mask="fixed", blocksize=7), init=start)
    assert torch.equal(solution.mask, start.mask)
    np.testing.assert_allclose(solution.weight.numpy(), by_hand * kept, rtol=1e-8, atol=1e-10)


def test_sparsegpt_states_a_factorisation_that_fails() -> None:
    problem, _, _ = layer("0.5", family="rank-one")
    with pytest.raises(ss.InvalidProblemError, match="with a damping of 0 of its mean diagonal"):
        ss.solve(problem, ss.SparseGPT(damping=0.0))
    assert ss.solve(problem, ss.SparseGPT()).status is ss.Status.FINISHED


def test_sparsegpt_out_of_time_has_no_mask() -> None:
    with pytest.raises(ss.NoIncumbentError, match="time_limit"):
        ss.solve(layer("0.5")[0], ss.SparseGPT(), budget=ss.Budget(seconds=0))


def admm_by_hand(
    weight: np.ndarray,
    inputs: np.ndarray,
    masks: list[np.ndarray] | str,
    steps: int,
    rho: float,
    damping: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The iteration on normalised activations; ``masks`` is a fixed mask or the pattern of a gradual one."""
    norms = np.sqrt((inputs**2).sum(1))
    scaled = inputs / norms[:, None]
    dense = weight * norms
    rows, cols = dense.shape
    moment = scaled @ scaled.T + damping * np.eye(cols)
    now, dual = dense.copy(), np.zeros_like(dense)
    for step in range(steps):
        if isinstance(masks, str) and step < 15:
            share = 1 - (1 - (step + 1) / 15) ** 3
            sizes = np.abs(now + dual)
            kept = np.ones(dense.shape, dtype=bool)
            if masks == "row":
                for row in range(rows):
                    kept[row, np.argsort(sizes[row])[: int(share * (cols // 2) + 1e-9)]] = False
            else:
                if masks == "2:4":
                    for row in range(rows):
                        for first in range(0, cols, 4):
                            sizes[row, first + np.argsort(-sizes[row, first : first + 4])[:2]] = np.inf
                for flat in np.argsort(sizes.ravel())[: int(share * (rows * cols // 2) + 1e-9)]:
                    kept[flat // cols, flat % cols] = False
        elif not isinstance(masks, str):
            kept = masks[0]
        split = (now + dual) * kept
        dual = dual + now - split
        now = np.linalg.solve(moment + rho * np.eye(cols), moment @ dense.T + rho * (split - dual).T).T
    return kept, (now + dual) * kept / norms


@pytest.mark.parametrize(("rho", "damping", "iterations"), [(1.0, 0.1, 20), (0.3, 0.01, 7)])
def test_admm_takes_the_published_steps(rho: float, damping: float, iterations: int) -> None:
    problem, inputs, weight = layer("0.5", seed=3)
    start = ss.solve(problem, ss.Wanda())
    solver = ss.ADMM(rho=rho, damping=damping, iterations=iterations, gradual_steps=1)
    solution = ss.solve(problem, solver, init=start)
    _, by_hand = admm_by_hand(weight, inputs, [start.mask.numpy()], iterations, rho, damping)
    # float64 all along: what is left is the rounding of an inverse against a solve
    np.testing.assert_allclose(solution.weight.numpy(), by_hand, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "layer:0.5"])
def test_admm_chooses_its_mask_gradually_as_published(pattern: str) -> None:
    problem, inputs, weight = layer(pattern, seed=5)
    kind = {"0.5": "row", "2:4": "2:4", "layer:0.5": "layer"}[pattern]
    kept, by_hand = admm_by_hand(weight, inputs, kind, 20, 1.0, 0.1)
    solution = ss.solve(problem, ss.ADMM(mask="gradual"))
    assert np.array_equal(solution.mask.numpy(), kept)
    np.testing.assert_allclose(solution.weight.numpy(), by_hand, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("drift", [False, True])
def test_admm_converges_to_least_squares(drift: bool) -> None:
    problem, _, _ = conformance.with_raw("weakly-correlated", "0.5", drift, rows=4, cols=12, seed=6)
    exact = ss.solve(problem, ss.Reconstruction(damping=0.0))
    solution = ss.solve(problem, ss.ADMM(damping=0.0, iterations=400, gradual_steps=1))
    # both weights are rounded to float32
    torch.testing.assert_close(solution.weight, exact.weight, rtol=1e-5, atol=1e-6)
    assert float(solution.stats["primal"].max()) < 1e-9


def test_admm_keeps_what_time_leaves() -> None:
    problem = layer("0.5")[0]
    solution = ss.solve(problem, ss.ADMM(), budget=ss.Budget(seconds=0))
    assert solution.status is ss.Status.TIME_LIMIT
    torch.testing.assert_close(solution.weight, problem.weight * solution.mask)
    with pytest.raises(ss.NoIncumbentError, match="time_limit"):
        ss.solve(problem, ss.ADMM(mask="gradual"), budget=ss.Budget(seconds=0))


def test_options_that_are_refused() -> None:
    for solver, options, message in [
        (ss.SparseGPT, {"blocksize": 0}, "expected at least 1, found 0"),
        (ss.SparseGPT, {"damping": -0.1}, "expected at least 0, found -0.1"),
        (ss.SparseGPT, {"mask": "own"}, "expected adaptive or fixed, found 'own'"),
        (ss.ADMM, {"mask": "own"}, "expected fixed or gradual, found 'own'"),
        (ss.ADMM, {"iterations": 10}, "found gradual_steps = 15 and iterations = 10"),
        (ss.ADMM, {"rho": 0.0}, "expected rho > 0 and damping ≥ 0, found 0 and 0.1"),
    ]:
        with pytest.raises(ss.InputError, match=message):
            solver(**options)


def test_published_methods_ignore_the_output_metric() -> None:
    problem, _, _ = layer("0.5", seed=7)
    coupled = ss.LayerProblem(
        problem.weight, problem.gram, problem.pattern, metric=torch.eye(problem.rows).double() * 2
    )
    for solver in (ss.SparseGPT(), ss.ADMM(), ss.ADMM(mask="gradual")):
        alone, under = ss.solve(problem, solver), ss.solve(coupled, solver)
        assert torch.equal(alone.weight, under.weight)
        assert under.objective == pytest.approx(2 * alone.objective)
