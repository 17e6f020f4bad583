"""Thanos against its published steps in float64, written without the product's code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparseswaps as ss


def layer(
    pattern: str, family: str, seed: int, cols: int = 24, rows: int = 5
) -> tuple[ss.LayerProblem, np.ndarray, np.ndarray]:
    """A problem whose Gram matrix is that of its activations (cols, tokens) to the last bit of float64."""
    inputs = ss.synthetic_activations(family, cols, 80, seed).T
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64)
    problem = ss.LayerProblem(weight, ss.Gram(inputs @ inputs.T), ss.parse_pattern(pattern, cols))
    return problem, inputs.numpy(), weight.numpy()


def thanos_by_hand(
    weight: np.ndarray, inputs: np.ndarray, kind: str, sparsity: float, blocksize: int
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1: what is kept of the columns from a block on is solved for, given what the block loses."""
    w = weight.copy()
    rows, cols = w.shape
    norms = np.sqrt((inputs**2).sum(1))
    moment = inputs @ inputs.T
    live = norms > 0
    w[:, ~live] = 0
    size = np.diag(moment)[live].mean()
    moment[~live, ~live] = size
    moment += 0.01 * size * np.eye(cols)
    pruned = np.zeros((rows, cols), dtype=bool)
    quota = int(cols * sparsity)
    for first in range(0, cols, blocksize):
        last = min(first + blocksize, cols)
        scores = np.abs(w) * norms
        # of equal scores the lowest index is kept
        entries = [(scores[r, c], -r * cols - c, r, c) for r in range(rows) for c in range(first, cols)]
        if kind == "layer":
            marked = sorted(entries)[: rows * quota - int(pruned.sum())]
        elif kind == "row":
            marked = []
            for row in range(rows):
                marked += sorted(e for e in entries if e[2] == row)[: quota - int(pruned[row].sum())]
        else:
            marked = []
            for row in range(rows):
                for group in range(first, last, 4):
                    marked += sorted(e for e in entries if e[2] == row and group <= e[3] < group + 4)[:2]
        for _, _, row, col in marked:
            pruned[row, col] |= col < last
        for row in range(rows):
            gone = np.flatnonzero(pruned[row, :last] & (np.arange(last) >= first))
            rest = np.setdiff1d(np.arange(first, cols), gone)
            # the change of the rest that is best once the weights of `gone` are zero
            w[row, rest] += np.linalg.solve(
                moment[np.ix_(rest, rest)], moment[np.ix_(rest, gone)] @ w[row, gone]
            )
            w[row, gone] = 0
    return ~pruned, w


@pytest.mark.parametrize("blocksize", [8, 12, 512])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("0.5", 0.5), ("0.3", 0.3), ("2:4", 0.5), ("layer:0.5", 0.5), ("layer:0.7", 0.7)],
)
@pytest.mark.parametrize("family", ["correlated", "zero-channels"])
def test_thanos_takes_the_published_steps(pattern: str, sparsity: float, blocksize: int, family: str) -> None:
    problem, inputs, weight = layer(pattern, family, seed=1)
    kind = "2:4" if ":4" in pattern else "layer" if pattern.startswith("layer") else "row"
    kept, by_hand = thanos_by_hand(weight, inputs, kind, sparsity, blocksize)
    solution = ss.solve(problem, ss.Thanos(blocksize=blocksize))
    assert np.array_equal(solution.mask.numpy(), kept)
    # float64 all along: what is left is the rounding of two ways to solve
    np.testing.assert_allclose(solution.weight.numpy(), by_hand, rtol=1e-8, atol=1e-10)


def test_thanos_does_not_depend_on_how_many_rows_are_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _, _ = layer("layer:0.5", "correlated", seed=2, rows=12)
    whole = ss.solve(problem, ss.Thanos(blocksize=8))
    monkeypatch.setattr("sparseswaps.solvers.updates.thanos.BATCH_ENTRIES", 1)
    single = ss.solve(problem, ss.Thanos(blocksize=8))
    assert torch.equal(single.mask, whole.mask)
    torch.testing.assert_close(single.weight, whole.weight, rtol=1e-10, atol=1e-12)


def test_one_block_of_thanos_is_least_squares_on_the_mask_of_wanda() -> None:
    problem, inputs, weight = layer("0.5", "correlated", seed=3)
    solution = ss.solve(problem, ss.Thanos(damping=0.0))
    assert torch.equal(solution.mask, ss.solve(problem, ss.Wanda()).mask)
    for row in range(problem.rows):
        kept = solution.mask[row].numpy()
        best = np.linalg.lstsq(inputs[kept].T, weight[row] @ inputs, rcond=None)[0]
        np.testing.assert_allclose(solution.weight[row].numpy()[kept], best, rtol=1e-7, atol=1e-9)


def test_what_thanos_refuses() -> None:
    problem, _, _ = layer("0.5", "rank-one", seed=4)
    with pytest.raises(ss.InvalidProblemError, match="thanos factors the Gram matrix of the layer"):
        ss.solve(problem, ss.Thanos(damping=0.0))
    with pytest.raises(ss.NoIncumbentError, match="time_limit"):
        ss.solve(problem, ss.Thanos(), budget=ss.Budget(seconds=0))
    with pytest.raises(ss.InputError, match="a block of thanos has columns: expected at least 1, found 0"):
        ss.Thanos(blocksize=0)
    with pytest.raises(ss.InputError, match="damping of thanos is a share: expected at least 0, found -1"):
        ss.Thanos(damping=-1.0)
