"""Triangle inequalities: true at every 0/1 point, sharp as cuts, and never a wrong bound or proof."""

from __future__ import annotations

import itertools

import conformance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseswaps as ss
from sparseswaps.problems.row_program import RowProgram, restrict, row_program
from sparseswaps.solvers.bounds.convex_split import split_with
from sparseswaps.solvers.bounds.dnn import iterate, iterate_with_cuts, split_of, start_state
from sparseswaps.solvers.bounds.triangles import Triangles


def random_triangles(generator: np.random.Generator, size: int, number: int) -> Triangles:
    corners = np.array([generator.permutation(size)[:3] for _ in range(number)], dtype=np.int64)
    return Triangles(
        corners.reshape(-1, 3),
        generator.integers(0, 2, number).astype(np.int8),
        generator.random(number) * generator.integers(0, 2, number),
    )


def moment_matrix(point: np.ndarray) -> np.ndarray:
    lifted = np.concatenate([[1.0], point])
    return np.outer(lifted, lifted)


def slack(triangles: Triangles, point: np.ndarray) -> np.ndarray:
    x, y, z = point[triangles.corners].T
    return np.where(triangles.kinds == 0, x + y * z - x * y - x * z, 1 - x - y - z + x * y + x * z + y * z)


def small_program(seed: int, pattern: str = "0.5", drift: bool = False, cols: int = 12) -> RowProgram:
    problem, _, _ = conformance.with_raw(
        conformance.FAMILIES[seed % len(conformance.FAMILIES)], pattern, drift, seed, 1, cols
    )
    program = row_program(problem, 0)
    return program.rescaled(program.cheapest(program.quadratic.diagonal()))


def smallest_objective(program: RowProgram) -> float:
    """By enumeration of all allowed selections."""
    blocks = [
        itertools.combinations(range(start, end), count)
        for start, end, count in zip(program.starts[:-1], program.starts[1:], program.counts, strict=True)
    ]
    best = np.inf
    for choice in itertools.product(*(list(block) for block in blocks)):
        point = np.zeros(program.size)
        point[list(itertools.chain(*choice))] = 1
        best = min(best, program.objective(point))
    return best


def test_slacks_are_never_negative_and_match_the_matrix() -> None:
    generator = np.random.default_rng(0)
    triangles = random_triangles(generator, 7, 60)
    matrix = triangles.matrix(7)
    assert np.array_equal(matrix, matrix.T)
    for bits in itertools.product((0.0, 1.0), repeat=7):
        point = np.array(bits)
        slacks = slack(triangles, point)
        assert slacks.min() >= 0
        violations = float((matrix * moment_matrix(point)).sum())
        assert violations == pytest.approx(-float(triangles.weights @ slacks), abs=1e-12)


def test_the_worst_violations_are_found() -> None:
    generator = np.random.default_rng(1)
    Y = np.clip(moment_matrix(generator.random(9)) + 0.3 * generator.standard_normal((10, 10)), 0, 1)
    Y = (Y + Y.T) / 2
    every = []
    for i, j, k in itertools.combinations(range(1, 10), 3):
        a, b, c = Y[i, j], Y[i, k], Y[j, k]
        x, y, z = Y[0, [i, j, k]]
        every.append(max(a + b - x - c, a + c - y - b, b + c - z - a, x + y + z - a - b - c - 1))
    all_found = Triangles.none().renew(Y, 0.02, 10_000)
    assert len(all_found) == sum(worst >= 0.02 for worst in every)
    few = Triangles.none().renew(Y, 0.02, 10)
    assert 0 < len(few) <= 10
    own = Triangles(few.corners, few.kinds, np.eye(len(few))[0])
    worst = float((own.matrix(9) * Y).sum())
    # the search sorts violations into bins of a thousandth
    assert worst >= sorted(every)[-11] - 2e-3
    # known ones with a multiplier stay, without one they go, and none comes twice
    again = own.renew(Y, 0.02, 10_000)
    assert len(again) == len(all_found)
    assert again.weights.sum() == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(0, 40), steps=st.integers(0, 90))
def test_any_cuts_give_a_bound(seed: int, number: int, steps: int) -> None:
    generator = np.random.default_rng(seed)
    program = small_program(seed, ("0.5", "2:4", "0.25")[seed % 3], seed % 2 == 1)
    best = smallest_objective(program)
    rounding = 1e-12 * program.magnitude
    size = np.abs(program.quadratic).max()
    triangles = random_triangles(generator, program.size, number).scaled(size)
    split = split_with(program, size * generator.standard_normal(program.size), None, triangles)
    assert split.bound() <= best + rounding
    state = iterate(program, start_state(program), steps // 3)
    state = iterate_with_cuts(program, state, steps)
    assert split_of(program, state).bound() <= best + rounding


def test_a_split_with_cuts_is_its_objective() -> None:
    generator = np.random.default_rng(3)
    program = small_program(1, "2:4", True)
    triangles = random_triangles(generator, program.size, 30)
    split = split_with(program, generator.random(12), generator.random((12, 12)), triangles)
    for _ in range(30):
        x = program.cheapest(generator.standard_normal(12)).astype(np.float64)
        value = x @ split.convex @ x + split.linear @ x + x @ split.nonnegative @ x + split.constant
        value += float(triangles.weights @ slack(triangles, x))
        assert value == pytest.approx(program.objective(x), rel=1e-9)


def test_restriction_keeps_the_triangles_among_free_variables() -> None:
    generator = np.random.default_rng(4)
    program = small_program(2)
    triangles = random_triangles(generator, program.size, 200)
    decided = np.full(program.size, -1, dtype=np.int8)
    decided[[1, 5]] = [0, 1]
    restriction = restrict(program, decided)
    inner = triangles.restrict(restriction)
    point = generator.random(program.size)
    free = np.array([not set(corner) & {1, 5} for corner in triangles.corners.tolist()])
    assert np.allclose(slack(inner, point[restriction.free]), slack(triangles, point)[free])
    assert np.array_equal(inner.weights, triangles.weights[free])


def test_cuts_close_a_large_part_of_the_gap() -> None:
    problem = ss.synthetic_layer("correlated", 3, 64, "0.5", seed=4)
    best = ss.solve(problem, ss.BranchAndBound())
    plain = ss.solve(problem, ss.Dnn(cuts=False), init=best)
    cut = ss.solve(problem, ss.Dnn(), init=best)
    assert bool((cut.row_bounds >= plain.row_bounds).all())
    assert bool((cut.row_bounds <= best.row_objectives).all())
    assert float(cut.row_gaps.mean()) <= 0.6 * float(plain.row_gaps.mean())


def test_a_search_with_cuts_equals_enumeration() -> None:
    from sparseswaps.solvers.kernels.branch_and_bound import new_dropped, new_levels, search

    generator = np.random.default_rng(5)
    for seed in range(40):
        program = small_program(seed, ("0.5", "2:4", "0.25")[seed % 3], seed % 2 == 1)
        size = np.abs(program.quadratic).max()
        # a bad split, so that slacks and N return all over the tree
        triangles = random_triangles(generator, program.size, 60).scaled(0.2 * size)
        nonnegative = 0.2 * size * generator.random((program.size, program.size))
        split = split_with(program, np.zeros(program.size), nonnegative, triangles)
        worst = program.cheapest(-program.quadratic.diagonal())
        levels = new_levels(
            split.convex,
            split.linear,
            split.constant,
            program.starts,
            program.counts,
            worst,
            program.objective(worst) * (1 + 1e-9) + 1e-9,
        )
        dropped = new_dropped(
            program.size, split.nonnegative, triangles.corners, triangles.kinds, triangles.weights
        )
        done = search(
            split.convex,
            dropped,
            program.quadratic,
            program.linear,
            program.constant,
            levels,
            1e-9,
            2 * split.allowance,
            1_000_000,
            1 << 40,
        )
        assert done
        best = smallest_objective(program)
        assert program.objective(levels.incumbent) <= best + 1e-8 * abs(best) + 1e-11 * program.magnitude
