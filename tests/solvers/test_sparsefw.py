"""SparseFW and its dual gap against their published steps, on raw activations, without the product's code."""

from __future__ import annotations

import itertools

import conformance
import numpy as np
import pytest
import torch

import sparseswaps as ss


def layer(
    pattern: str, drift: bool, seed: int, cols: int = 20, rows: int = 6
) -> tuple[ss.LayerProblem, np.ndarray, np.ndarray, np.ndarray]:
    """A problem with its inputs (cols, tokens), weights and target (rows, tokens)."""
    inputs = ss.synthetic_activations("correlated", cols, 80, seed).T.numpy()
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, cols))
    target = weight @ inputs + (random.standard_normal((rows, 80)) if drift else 0)
    gram = ss.Gram(torch.from_numpy(inputs @ inputs.T))
    missing = target - weight @ inputs
    terms = None
    if drift:
        terms = ss.Drift(torch.from_numpy(missing @ inputs.T), torch.from_numpy((missing**2).sum(1)))
    problem = ss.LayerProblem(torch.from_numpy(weight), gram, ss.parse_pattern(pattern, cols), terms)
    return problem, inputs, weight, target


def lines_of(pattern: str, rows: int, cols: int) -> list[list[tuple[int, int]]]:
    """The weights that share a budget, by row and column."""
    width = 4 if pattern == "2:4" else cols
    if pattern.startswith("layer"):
        return [[(row, col) for row in range(rows) for col in range(cols)]]
    return [
        [(row, col) for col in range(first, first + width)]
        for row in range(rows)
        for first in range(0, cols, width)
    ]


def sparsefw_by_hand(
    inputs: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    pattern: str,
    scores: np.ndarray,
    steps: int,
    alpha: float,
) -> np.ndarray:
    """Algorithm 2 with a gradient from the output error, one weight after the other."""
    rows, cols = weight.shape
    lines = lines_of(pattern, rows, cols)
    relaxed, fixed = np.zeros((rows, cols)), np.zeros((rows, cols), dtype=bool)
    for line in lines:
        for entry in sorted(line, key=lambda e: -scores[e])[: len(line) // 2]:
            relaxed[entry] = 1
    for group in lines if pattern != "2:4" else lines_of("row", rows, cols):
        kept = sorted((entry for entry in group if relaxed[entry]), key=lambda e: -scores[e])
        for entry in kept[: int(alpha * len(kept) + 1e-9)]:
            fixed[entry] = True
    rooms = [len(line) // 2 - sum(fixed[entry] for entry in line) for line in lines]
    for step in range(steps):
        gradient = -2 * weight * ((target - (relaxed * weight) @ inputs) @ inputs.T)
        vertex = fixed.astype(float)
        for line, room in zip(lines, rooms, strict=True):
            free = sorted((entry for entry in line if not fixed[entry]), key=lambda e: gradient[e])
            for entry in free[:room]:
                vertex[entry] = gradient[entry] < 0 or vertex[entry]
        relaxed = relaxed + 2 / (step + 2) * (vertex - relaxed)
    mask = fixed.copy()
    for line, room in zip(lines, rooms, strict=True):
        for entry in sorted((entry for entry in line if not fixed[entry]), key=lambda e: -relaxed[e])[:room]:
            mask[entry] = True
    return mask


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "layer:0.5"])
@pytest.mark.parametrize(("alpha", "saliency"), [(0.9, "wanda"), (0.0, "wanda"), (0.5, "ria")])
@pytest.mark.parametrize("drift", [False, True])
def test_sparsefw_takes_the_published_steps(pattern: str, alpha: float, saliency: str, drift: bool) -> None:
    problem, inputs, weight, target = layer(pattern, drift, seed=3)
    size = np.abs(weight)
    scores = size * np.sqrt((inputs**2).sum(1))
    if saliency == "ria":
        scores = scores / size.sum(1, keepdims=True) + scores / size.sum(0)
    for steps in (1, 2, 150):
        by_hand = sparsefw_by_hand(inputs, weight, target, pattern, scores, steps, alpha)
        solution = ss.solve(problem, ss.SparseFW(steps=steps, alpha=alpha, saliency=saliency))
        assert np.array_equal(solution.mask.numpy(), by_hand), steps


def test_sparsefw_lowers_the_error_of_its_warm_start() -> None:
    problem = ss.synthetic_layer("correlated", 32, 96, "0.5", seed=1)
    wanda = ss.solve(problem, ss.Wanda())
    for alpha in (0.5, 0.9):
        found = ss.solve(problem, ss.SparseFW(steps=400, alpha=alpha))
        assert found.objective < 0.95 * wanda.objective
        assert bool((found.stats["residual"] > 0).any())
        single = ss.solve(problem, ss.SparseFW(steps=400, alpha=alpha, dtype="float32"))
        assert single.objective == pytest.approx(found.objective, rel=0.02)
    assert torch.equal(ss.solve(problem, ss.SparseFW(steps=5, alpha=1.0)).mask, wanda.mask)
    ria = ss.solve(problem, ss.RIA())
    assert torch.equal(ss.solve(problem, ss.SparseFW(alpha=1.0), init=ria).mask, ria.mask)
    assert not ss.SparseFW().drift_by_default


def test_sparsefw_out_of_time_has_its_warm_start() -> None:
    problem, _, _, _ = layer("0.5", False, seed=4)
    late = ss.solve(problem, ss.SparseFW(), budget=ss.Budget(seconds=0))
    assert late.status is ss.Status.TIME_LIMIT
    assert torch.equal(late.mask, ss.solve(problem, ss.Wanda()).mask)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (ss.SparseFW, {"steps": -1}, "expected at least 0, found -1"),
        (ss.SparseFW, {"alpha": 1.5}, "expected 0 to 1, found 1.5"),
        (ss.SparseFW, {"saliency": "sparsegpt"}, "expected wanda or ria, found 'sparsegpt'"),
        (ss.SparseFW, {"dtype": "bfloat16"}, "expected float32 or float64, found 'bfloat16'"),
        (ss.FrankWolfe, {"steps": -2}, "expected steps ≥ 0 and precision ≥ 0, found -2"),
    ],
)
def test_options_that_are_not_possible(
    solver: type[ss.Solver], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ss.InputError, match=message):
        solver(**options)


def gap_bounds_by_hand(
    inputs: np.ndarray, weight: np.ndarray, target: np.ndarray, pattern: str, steps: int
) -> np.ndarray:
    """Highest ``f(x) - gap(x)`` of each row over the points of the Frank-Wolfe algorithm."""
    rows, cols = weight.shape
    width = 4 if pattern == "2:4" else cols
    bounds = np.full(rows, -np.inf)
    for row in range(rows):
        columns = weight[row][:, None] * inputs
        x = np.full(cols, 0.5)
        for _ in range(steps + 1):
            error = target[row] - (1 - x) @ columns
            gradient = 2 * columns @ error
            vertex = np.zeros(cols)
            for first in range(0, cols, width):
                vertex[first + np.argsort(gradient[first : first + width])[: width // 2]] = 1
            direction = vertex - x
            bounds[row] = max(bounds[row], error @ error + gradient @ direction)
            along = direction @ columns
            x = x + min(1.0, -(gradient @ direction) / (2 * along @ along)) * direction
    return bounds


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("drift", [False, True])
def test_the_dual_gap_is_that_of_the_published_steps(pattern: str, drift: bool) -> None:
    problem, inputs, weight, target = layer(pattern, drift, seed=6)
    for steps in (0, 1, 40):
        by_hand = gap_bounds_by_hand(inputs, weight, target, pattern, steps)
        found = ss.bound(problem, ss.FrankWolfe(steps=steps, precision=0.0)).row_bounds.numpy()
        # rounding of float64, and of the smallest eigenvalue that is taken off
        np.testing.assert_allclose(found, by_hand.clip(0), rtol=1e-8, atol=1e-8 * (target**2).sum())
    exact = ss.bound(problem, ss.Naive(dtype="float64", steps=4000, precision=1e-6)).total
    slow = ss.bound(problem, ss.FrankWolfe(steps=4000, precision=1e-6)).total
    assert 0.98 * exact <= slow <= exact * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_the_dual_gap_never_exceeds_an_optimum(scale: float) -> None:
    """12,600 rows, every family, pattern and drift, each against all of its masks."""
    for number, (family, drift) in enumerate(itertools.product(conformance.FAMILIES, (False, True))):
        pattern = conformance.PATTERNS[number % len(conformance.PATTERNS)]
        made, _, _ = conformance.with_raw(family, pattern, drift, seed=number, rows=180, cols=8)
        # weights and inputs are scaled apart
        weight, gram = made.weight.double() * scale, made.gram.matrix / scale**0.5
        terms = made.drift and ss.Drift(made.drift.linear * scale**0.5, made.drift.constant * scale**1.5)
        problem = ss.LayerProblem(weight, gram, made.pattern, terms)
        best = torch.full((180,), torch.inf, dtype=torch.float64)
        for kept in conformance.all_masks(made.pattern, 8):
            lost = weight * ~kept
            error = ((lost @ gram) * lost).sum(1)
            if terms is not None:
                error = error + 2 * (terms.linear * lost).sum(1) + terms.constant
            best = torch.minimum(best, error)
        size = ((weight.abs() @ gram.abs()) * weight.abs()).sum(1)
        if terms is not None:
            size = size + 2 * (terms.linear.abs() * weight.abs()).sum(1) + terms.constant
        for steps in (0, 3, 60):
            # straight from the tier: `solve` would refuse or clip what is above its own mask's error
            bounds = ss.FrankWolfe(steps=steps).run(problem, None, ss.Budget()).row_bounds
            assert bounds is not None
            assert bool((bounds <= best.clamp_min(0) + 1e-13 * size).all()), (family, pattern, drift, steps)
            if family == "weakly-correlated" and not drift and steps == 60:
                assert float((bounds / best).mean()) > 0.3
