"""Bounds hold for any input and however early they stop; their order and their certificates."""

from __future__ import annotations

import itertools

import conformance
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparseswaps as ss
from sparseswaps.errors import InputError, UnsupportedProblemError
from sparseswaps.problems.row_program import RowProgram, row_program
from sparseswaps.solvers.bounds.convex_split import face_basis, split_with
from sparseswaps.solvers.bounds.max_trace import max_trace_diagonal
from sparseswaps.solvers.bounds.relaxed_rows import semidefinite, smallest_eigenvalue
from sparseswaps.solvers.bounds.row_split import RowSplit
from sparseswaps.solvers.bounds.sdp import sdp_relaxation


def optima(problem: ss.LayerProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest error of each row over all masks, without the product's code, and its rounding (rows,)."""
    pattern = problem.pattern
    blocks = problem.cols // pattern.block
    choices = list(itertools.combinations(range(pattern.block), pattern.block - pattern.keep))
    pruned = torch.zeros(len(choices) ** blocks, problem.cols, dtype=torch.float64)
    for number, selection in enumerate(itertools.product(choices, repeat=blocks)):
        for block, indices in enumerate(selection):
            pruned[number, [block * pattern.block + j for j in indices]] = 1
    weight, gram = problem.weight.double(), problem.gram.matrix
    best = torch.full((problem.rows,), torch.inf, dtype=torch.float64)
    for mask in pruned:
        r = weight * mask
        error = ((r @ gram) * r).sum(1)
        if problem.drift is not None:
            error = error + 2 * (problem.drift.linear * r).sum(1) + problem.drift.constant
        best = torch.minimum(best, error)
    size = ((weight.abs() @ gram.abs()) * weight.abs()).sum(1)
    if problem.drift is not None:
        size = size + 2 * (problem.drift.linear.abs() * weight.abs()).sum(1) + problem.drift.constant
    return best.clamp_min(0), 1e-13 * size


def many_rows(seed: int, rows: int, cols: int = 8) -> ss.LayerProblem:
    family = conformance.FAMILIES[seed % len(conformance.FAMILIES)]
    pattern = ("0.5", "2:4", "0.25", "1:4", "3:4")[seed // 2 % 5]
    problem, _, _ = conformance.with_raw(family, pattern, seed % 2 == 1, seed, rows, cols)
    return problem


def row_bounds(problem: ss.LayerProblem, tier: ss.Solver, seconds: float | None = None) -> torch.Tensor:
    # straight from the tier: `solve` would refuse or clip what is above its own mask's error
    bounds = tier.run(problem, None, ss.Budget(seconds)).row_bounds
    assert bounds is not None
    return bounds


@settings(max_examples=14, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 80), rounds=st.integers(0, 2))
def test_layer_tiers_never_exceed_an_optimum(seed: int, steps: int, rounds: int) -> None:
    problem = many_rows(seed, 800)
    best, slack = optima(problem)
    for tier in (
        ss.CorrEigenvalue(),
        ss.Naive(steps=steps),
        ss.Naive(steps=steps, dtype="float64"),
        ss.SharedSplit(rounds=rounds, steps=steps, precision=10.0 ** -(steps % 5)),
    ):
        bounds = row_bounds(problem, tier)
        assert bool((bounds <= best + slack).all()), (tier, problem.name)
        assert bool((bounds >= 0).all())


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 80), channels=st.integers(1, 8))
def test_diagonals_per_row_never_exceed_an_optimum(seed: int, steps: int, channels: int) -> None:
    problem = many_rows(seed, 60)
    best, slack = optima(problem)
    for tier in (
        RowSplit(channels=channels, steps=steps),
        RowSplit(channels=channels, steps=steps, dtype="float64", precision=10.0 ** -(steps % 5)),
    ):
        bounds = row_bounds(problem, tier)
        assert bool((bounds <= best + slack).all()), (tier, problem.name)
        assert bool((bounds >= 0).all())


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), steps=st.integers(0, 60), tolerance=st.floats(1e-3, 1e3))
def test_row_tiers_never_exceed_an_optimum(seed: int, steps: int, tolerance: float) -> None:
    problem = many_rows(seed, 20)
    best, slack = optima(problem)
    for tier in (ss.Qcr(tolerance=tolerance), ss.Dnn(iterations=steps)):
        bounds = row_bounds(problem, tier)
        assert bool((bounds <= best + slack).all()), (tier, problem.name)


@pytest.mark.parametrize(
    "tier", ["corr-eigenvalue", "naive", "frank-wolfe", "shared-split", "row-split", "qcr", "dnn"]
)
@pytest.mark.parametrize("seconds", [0.0, 1e-3, 0.02])
def test_a_bound_that_is_cut_off_still_holds(tier: str, seconds: float) -> None:
    problem = ss.synthetic_layer("correlated", 4, 16, "0.5", seed=8)
    best = ss.solve(problem, ss.Enumeration())
    found = ss.bound(problem, tier, ss.Budget(seconds))
    assert bool((found.row_bounds <= best.row_objectives).all())
    if seconds == 0.0:
        assert found.status is ss.Status.TIME_LIMIT


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "4:8"])
@pytest.mark.parametrize("drift", [False, True])
def test_stronger_tiers_are_stronger(pattern: str, drift: bool) -> None:
    problem, _, _ = conformance.with_raw("correlated", pattern, drift, seed=2, rows=6, cols=24)
    best = ss.solve(problem, ss.BranchAndBound())
    totals = [
        ss.bound(problem, tier, init=best).total
        for tier in ("corr-eigenvalue", "naive", "shared-split", "qcr", "dnn")
    ]
    assert totals[0] <= totals[2]
    assert totals[1] <= totals[2] * (1 + 1e-3)  # its relaxation is solved to 1e-3
    assert totals[2] <= totals[3] * (1 + 1e-3)
    assert totals[3] <= totals[4] * (1 + 1e-3)
    assert totals[4] <= best.objective


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_dnn_reaches_the_value_that_cvxpy_states(pattern: str) -> None:
    problem = ss.synthetic_layer("correlated", 2, 12, pattern, seed=5)
    best = ss.solve(problem, ss.BranchAndBound())
    ours = row_bounds(problem, ss.Dnn(iterations=2000, cuts=False))
    stated = row_bounds(problem, ss.Sdp())
    for row in range(problem.rows):
        program = row_program(problem, row).rescaled(~best.mask[row].numpy())
        claimed, _ = sdp_relaxation(program)
        # the box of the relaxed split can lift ours a little above the semidefinite value
        assert float(ours[row]) / program.unit == pytest.approx(claimed, rel=0.02)
        assert float(stated[row]) / program.unit == pytest.approx(claimed, rel=0.02)
        assert float(ours[row]) <= float(best.row_objectives[row])


def test_sdp_refuses_rows_that_it_cannot_hold() -> None:
    with pytest.raises(UnsupportedProblemError, match="at most 48"):
        ss.bound(ss.synthetic_layer("correlated", 1, 64, "0.5"), "sdp")


def test_any_multipliers_give_a_bound() -> None:
    generator = np.random.default_rng(0)
    for seed in range(60):
        problem, _, _ = conformance.with_raw(
            conformance.FAMILIES[seed % 7], ("0.5", "2:4")[seed % 2], seed % 3 == 0, seed, 1, 8
        )
        best, slack = optima(problem)
        program = row_program(problem, 0)
        program = program.rescaled(program.cheapest(program.quadratic.diagonal()))
        size = np.abs(program.quadratic).max()
        split = split_with(
            program,
            size * generator.standard_normal(8),
            size * generator.standard_normal((8, 8)) * generator.integers(0, 2),
        )
        assert split.bound() * program.unit <= float(best[0] + slack[0])
        lower, _ = split.tangent(generator.random(8))
        assert lower * program.unit <= float(best[0] + slack[0])


def test_a_split_is_its_objective() -> None:
    problem, _, _ = conformance.with_raw("correlated", "2:4", True, 1, 1, 8)
    program = row_program(problem, 0)
    generator = np.random.default_rng(1)
    split = split_with(program, generator.random(8), generator.random((8, 8)))
    assert bool((split.nonnegative >= 0).all())
    for _ in range(20):
        x = program.cheapest(generator.standard_normal(8)).astype(np.float64)
        value = x @ split.convex @ x + split.linear @ x + x @ split.nonnegative @ x + split.constant
        assert value == pytest.approx(program.objective(x), rel=1e-9)


def test_the_face_basis_spans_the_face() -> None:
    program = RowProgram(
        np.eye(9),
        np.zeros(9),
        0.0,
        np.array([0, 2, 6, 9], dtype=np.int64),
        np.array([1, 2, 1], dtype=np.int64),
    )
    root = np.random.default_rng(2).random(9) + 0.1
    basis = face_basis(program, root)
    assert basis.shape == (9, 6)
    assert np.allclose(basis.T @ basis, np.eye(6))
    for start, end in ((0, 2), (2, 6), (6, 9)):
        assert np.allclose(root[start:end] @ basis[start:end], 0)


def test_the_largest_diagonal_leaves_a_semidefinite_rest() -> None:
    gram = ss.synthetic_layer("correlated", 1, 40, "0.5", seed=3).gram.correlation64
    weights = torch.linspace(0.1, 2.0, 40, dtype=torch.float64)
    diagonal = max_trace_diagonal(gram, weights, tolerance=1e-4 * float(weights.sum()))
    assert smallest_eigenvalue(gram - torch.diag(diagonal)) >= -1e-9
    even = float(torch.linalg.eigvalsh(gram)[0]) * float(weights.sum())
    assert float((weights * diagonal).sum()) > even
    early = max_trace_diagonal(gram, weights, tolerance=1e-4, iterations=2)
    assert smallest_eigenvalue(gram - torch.diag(early)) >= -1e-9


@pytest.mark.parametrize("lowest", [1e-3, 0.0, -1e-3])
def test_the_smallest_eigenvalue_is_never_overstated(lowest: float) -> None:
    basis, _ = torch.linalg.qr(torch.randn(1100, 1100, dtype=torch.float64))
    values = torch.linspace(lowest, 2.0, 1100, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    for size in (1100, 600):
        part = (matrix[:size, :size] + matrix[:size, :size].T) / 2
        exact = float(torch.linalg.eigvalsh(part)[0])
        found = smallest_eigenvalue(part)
        assert found <= exact + 1e-12
        assert found >= exact - 0.02 * abs(exact) - (1e-8 if lowest >= 0 else 4 * abs(exact))


def test_auto_picks_by_size_and_budget() -> None:
    small = ss.synthetic_layer("correlated", 2, 32, "0.5")
    assert ss.bound(small).tier == "dnn"
    assert ss.bound(small, budget=ss.Budget(5.0)).tier == "shared-split, dnn"
    wide = ss.synthetic_layer("weakly-correlated", 2, 660, "0.5")
    assert ss.bound(wide, budget=ss.Budget(0.5)).tier == "row-split"
    middle = ss.synthetic_layer("weakly-correlated", 1, 260, "0.5")
    assert ss.bound(middle, budget=ss.Budget(0.5)).tier == "row-split, qcr"


def test_any_solution_can_be_checked_against_a_bound() -> None:
    problem = ss.synthetic_layer("correlated", 4, 32, "0.5", seed=1)
    found = ss.bound(problem, "dnn")
    best = ss.solve(problem, ss.BranchAndBound())
    wanda = ss.solve(problem, ss.Wanda())
    true_gap = (wanda.objective - best.objective) / wanda.objective
    assert true_gap <= found.gap(problem, wanda.mask) <= 1
    assert bool((found.row_gaps(problem, best) < 0.2).all())
    assert found.gap(problem, best) < found.gap(problem, wanda)
    with pytest.raises(InputError, match="channels is a count"):
        RowSplit(channels=0)
    with pytest.raises(InputError, match="unknown bound"):
        ss.bound(problem, "simplex")


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_diagonals_per_row_beat_one_per_layer_on_wide_rows(pattern: str) -> None:
    problem = ss.synthetic_layer("correlated", 6, 512, pattern, seed=1)
    best = ss.solve(problem, ss.OneSwap())
    naive = ss.bound(problem, "naive", init=best)
    per_row = ss.bound(problem, "row-split", init=best)
    eigenvalue = ss.bound(problem, "corr-eigenvalue", init=best)
    assert bool((per_row.row_bounds >= eigenvalue.row_bounds).all())
    assert bool((per_row.row_bounds >= naive.row_bounds * (1 - 1e-3)).all())
    assert per_row.gap(problem, best) <= 0.8 * naive.gap(problem, best)


def test_one_factorisation_proves_what_is_semidefinite() -> None:
    basis, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
    for lowest, holds in ((1e-6, True), (-1e-6, False), (-1e-15, False)):
        values = torch.linspace(lowest, 2.0, 60, dtype=torch.float64)
        matrix = (basis * values) @ basis.T
        assert semidefinite((matrix + matrix.T) / 2) is holds
