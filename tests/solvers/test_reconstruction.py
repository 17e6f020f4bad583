"""Least squares on kept weights, against ``numpy.linalg.lstsq`` on raw activations."""

from __future__ import annotations

from dataclasses import replace

import conformance
import numpy as np
import pytest
import torch

import sparseswaps as ss

METHODS = ("cholesky", "conjugate-gradients")


def raw_least_squares(target: np.ndarray, inputs: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """New weights (cols,) of one row and their error, from activations alone."""
    weight = np.zeros(len(inputs))
    weight[kept] = np.linalg.lstsq(inputs[kept].T, target, rcond=None)[0]
    return weight, float(((target - weight @ inputs) ** 2).sum())


def coupled_problem(
    seed: int, rows: int = 4, cols: int = 10
) -> tuple[ss.LayerProblem, torch.Tensor, torch.Tensor]:
    """A layer with any target and an output metric; inputs (cols, tokens), target (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = ss.synthetic_activations("correlated", cols, 60, seed)
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64).float()
    noise = torch.randn((60, rows), generator=generator, dtype=torch.float64)
    target = inputs @ weight.double().T + 0.3 * noise
    gradients = torch.randn((30, rows), generator=generator, dtype=torch.float64)
    gradients[:, 1:] += gradients[:, :1]  # rows that pull together
    metric = ss.output_metric(gradients.T @ gradients)
    pattern = ss.SparsityPattern.per_row(cols, 0.5)
    return ss.LayerProblem.from_target(weight, inputs, target, pattern, metric), inputs.T, target.T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("drift", [False, True])
def test_equals_least_squares_on_raw_activations(method: str, pattern: str, drift: bool) -> None:
    for family in ("correlated", "weakly-correlated", "huge-range"):
        problem, inputs, dense = conformance.with_raw(family, pattern, drift, rows=5, cols=24)
        start = ss.solve(problem, ss.Wanda())
        solver = ss.Reconstruction(method=method, tolerance=1e-9)
        solution = ss.solve(problem, solver, init=start)
        assert torch.equal(solution.mask, start.mask)
        assert solution.status is ss.Status.FINISHED
        for row in range(problem.rows):
            target = (problem.weight[row].double() @ dense).numpy()
            _, error = raw_least_squares(target, inputs.numpy(), solution.mask[row].numpy())
            ours = float(((target - (solution.weight[row].double() @ inputs).numpy()) ** 2).sum())
            # a Gram of float32 products and weights rounded to float32: 1e-6 of the row's output
            assert ours <= error + 1e-6 * float((target**2).sum()), (family, row)
            assert ours >= error * (1 - 1e-9)


def test_weights_are_those_of_least_squares() -> None:
    problem, inputs, dense = conformance.with_raw("weakly-correlated", "0.5", True, rows=5, cols=24)
    for method in METHODS:
        solution = ss.solve(problem, ss.Reconstruction(method=method, damping=0.0, tolerance=1e-10))
        for row in range(problem.rows):
            target = (problem.weight[row].double() @ dense).numpy()
            weight, _ = raw_least_squares(target, inputs.numpy(), solution.mask[row].numpy())
            # float32 products in the Gram, times a condition number of about 10
            np.testing.assert_allclose(solution.weight[row].numpy(), weight, rtol=1e-5, atol=1e-5)


def test_conjugate_gradients_equal_cholesky() -> None:
    problem = ss.synthetic_layer("correlated", 32, 128, "0.5", seed=2)
    direct = ss.solve(problem, ss.Reconstruction(method="cholesky"))
    iterative = ss.solve(problem, ss.Reconstruction(method="conjugate-gradients", tolerance=1e-10))
    # both weights are rounded to float32
    torch.testing.assert_close(iterative.weight, direct.weight, rtol=1e-5, atol=1e-7)
    assert bool((iterative.stats["residual"] <= 1e-10).all())
    assert bool((iterative.stats["iterations"] > 1).all())
    assert bool((direct.stats["residual"] <= 1e-10).all())
    torch.testing.assert_close(iterative.row_objectives, direct.row_objectives, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_no_row_is_worse_than_its_mask_alone(method: str) -> None:
    for family in conformance.FAMILIES:
        for drift in (False, True):
            problem = conformance.problem(family, "0.5", drift, seed=4)
            for start in (ss.Wanda(), ss.Random(seed=2)):
                mask = ss.solve(problem, start)
                solution = ss.solve(problem, ss.Reconstruction(method=method), init=mask)
                assert bool((solution.row_objectives <= mask.row_objectives).all()), problem.name


def test_singular_layers_state_the_damping_that_they_took() -> None:
    for family in ("duplicates", "collinear", "rank-one", "zero-channels"):
        problem = conformance.problem(family, "0.25", seed=1)
        solution = ss.solve(problem, ss.Reconstruction(method="cholesky", damping=0.0))
        damping = solution.stats["damping"]
        assert bool(((damping == 0) | (damping >= 1e-8)).all())
        if family in ("collinear", "rank-one"):  # nine kept weights on a Gram of rank at most 3
            assert bool((damping > 0).all())
        size = solution.weight.double() * problem.gram.scale
        # damping holds the weights back: none explodes, measured in units of the row's output
        assert float(size.abs().max()) <= 1e3 * float((problem.weight.double() * problem.gram.scale).norm())


def test_a_matrix_that_no_damping_repairs_is_an_error() -> None:
    from sparseswaps.solvers.updates.least_squares import by_cholesky

    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    cost, kept = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ss.InvalidProblemError, match=r"damping of at most 0\.1 .*, found 1 rows"):
        by_cholesky(indefinite, cost, kept, 0.0)


def test_iterations_that_do_not_suffice_are_stated() -> None:
    problem = ss.synthetic_layer("correlated", 8, 64, "0.5")
    start = ss.solve(problem, ss.Wanda())
    errors = []
    for most in (1, 3, 10):
        solver = ss.Reconstruction(method="conjugate-gradients", tolerance=1e-12, max_iterations=most)
        solution = ss.solve(problem, solver, init=start)
        assert solution.status is ss.Status.ITERATION_LIMIT
        assert bool((solution.stats["iterations"] == most).all())
        assert bool((solution.stats["residual"] > 1e-12).all())
        errors.append(solution.objective)
    assert [start.objective, *errors] == sorted([start.objective, *errors], reverse=True)


def test_layer_budgets_with_empty_and_full_rows() -> None:
    problem, inputs, _ = conformance.with_raw("correlated", "0.5", rows=4, cols=12)
    problem = ss.LayerProblem(problem.weight, problem.gram, ss.LayerBudget(6, 12))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[1] = True
    mask[2, :5] = True
    mask[3, 5:] = True
    for method in METHODS:
        solution = ss.solve(problem, ss.Reconstruction(method=method, tolerance=1e-9), init=mask)
        assert solution.row_objectives[1] == 0
        assert torch.equal(solution.weight[1], problem.weight[1])
        for row in range(4):
            target = (problem.weight[row].double() @ inputs).numpy()
            _, error = raw_least_squares(target, inputs.numpy(), mask[row].numpy())
            # as above: 1e-6 of the row's output
            assert float(solution.row_objectives[row]) == pytest.approx(error, abs=1e-6 * (target**2).sum())


def test_dead_channels_keep_their_weights() -> None:
    problem = conformance.problem("zero-channels", "0.25", seed=3)
    dead = problem.gram.dead
    assert bool(dead.any())
    mask = ss.solve(problem, ss.Random(seed=1)).mask
    assert bool(mask[:, dead].any())
    for method in METHODS:
        weight = ss.solve(problem, ss.Reconstruction(method=method), init=mask).weight
        assert torch.equal(weight[:, dead], (problem.weight * mask)[:, dead])


def test_iterations_end_at_the_coupled_least_squares() -> None:
    for seed in range(3):
        problem, inputs, target = coupled_problem(seed)
        start = ss.solve(problem, ss.Wanda())
        kept = start.mask.nonzero().numpy()
        values, vectors = np.linalg.eigh(problem.metric.numpy())
        root = vectors * np.sqrt(values) @ vectors.T
        # one column per kept weight: what it adds to S^½ Ŵ X̂
        design = np.stack([np.outer(root[:, i], inputs[j].numpy()).ravel() for i, j in kept], axis=1)
        wanted = (root @ target.numpy()).ravel()
        found = np.linalg.lstsq(design, wanted, rcond=None)[0]
        best = float(((wanted - design @ found) ** 2).sum())
        errors = []
        for iterations in (1, 2, 5, 20, 2000):
            solver = ss.Reconstruction(damping=0.0, tolerance=1e-9, coupled_iterations=iterations)
            solution = ss.solve(problem, solver, init=start)
            ours = float(((wanted - (root @ (solution.weight.double() @ inputs).numpy()).ravel()) ** 2).sum())
            # float32 products in the Gram and float32 weights, each 1e-6 of the weighed target
            assert solution.objective == pytest.approx(ours, abs=2e-6 * (wanted**2).sum())
            errors.append(ours)
            done = float(solution.stats["coupled_residual"][0]) <= 1e-9
            assert solution.status is (ss.Status.FINISHED if done else ss.Status.ITERATION_LIMIT)
        assert errors == sorted(errors, reverse=True)
        assert errors[0] < start.objective
        assert best * (1 - 1e-9) <= errors[-1] <= best + 2e-6 * (wanted**2).sum()
        assert int(solution.stats["coupled_iterations"][0]) < 2000
        assert float(solution.stats["coupled_residual"][0]) <= 1e-9


def test_a_nearly_singular_metric_is_no_obstacle() -> None:
    """Outputs that cost nothing, and outputs that cost the same: S has nearly rank one."""
    problem, _, _ = coupled_problem(1, rows=12)
    direction = torch.ones(12, 1, dtype=torch.float64)
    direction[:4] = 0
    problem = replace(problem, metric=direction @ direction.T + 1e-8 * torch.eye(12, dtype=torch.float64))
    start = ss.solve(problem, ss.Wanda())
    errors = [
        ss.solve(problem, ss.Reconstruction(coupled_iterations=iterations), init=start).objective
        for iterations in (1, 4, 50)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < start.objective


def test_time_limit_keeps_the_old_weights() -> None:
    problem = ss.synthetic_layer("correlated", 8, 64, "0.5")
    solution = ss.solve(problem, ss.Reconstruction(), budget=ss.Budget(seconds=0))
    assert solution.status is ss.Status.TIME_LIMIT
    assert torch.equal(solution.weight, problem.weight * solution.mask)
    assert bool((solution.stats["unchanged"] == 1).all())


def test_options_that_are_refused() -> None:
    for options, message in [
        ({"damping": -1.0}, "expected 0 to 1, found -1"),
        ({"method": "lu"}, "expected one of auto, cholesky, conjugate-gradients, found 'lu'"),
        ({"tolerance": 0.0}, "expected 0 < tolerance < 1, found 0"),
        ({"coupled_iterations": 0}, "coupled_iterations is a count: expected at least 1, found 0"),
    ]:
        with pytest.raises(ss.InputError, match=message):
            ss.Reconstruction(**options)
