"""Exact solvers: equal to enumeration and to one another, honest at every limit."""

from __future__ import annotations

import itertools
import subprocess
import sys

import conformance
import numpy as np
import pytest
import torch

import sparseswaps as ss
from sparseswaps.errors import InputError, SolverNotInstalledError
from sparseswaps.problems.row_program import restrict, row_program
from sparseswaps.solvers.bounds.presolve import thinned
from sparseswaps.solvers.exact import branch_and_bound

# Each solver stops at a relative gap of 1e-6; foreign ones give their own tolerances away on top.
LIMIT = 1e-6
GAP = 2e-6
FOREIGN_GAP = 1e-3


def rescaled(problem: ss.LayerProblem, factor: float) -> ss.LayerProblem:
    """The problem with weights (and drift) multiplied: errors scale by the square."""
    drift = problem.drift and ss.Drift(problem.drift.linear * factor, problem.drift.constant * factor**2)
    return ss.LayerProblem(
        problem.weight.double() * factor, problem.gram, problem.pattern, drift, name=problem.name
    )


def rounding(problem: ss.LayerProblem) -> torch.Tensor:
    """What float64 can say about an error that is a difference of large terms (rows,)."""
    weight = problem.weight.double().abs()
    size = ((weight @ problem.gram.matrix.abs()) * weight).sum(1)
    if problem.drift is not None:
        size = size + 2 * (problem.drift.linear.abs() * weight).sum(1) + problem.drift.constant
    return 1e-12 * size


def brute_force(problem: ss.LayerProblem) -> torch.Tensor:
    """Smallest error of each row over all masks (rows,), without the product's code."""
    pattern = problem.pattern
    kept = list(itertools.combinations(range(pattern.block), pattern.keep))
    best = []
    for row in range(problem.rows):
        weight = problem.weight[row].double().numpy()
        gram = problem.gram.matrix.numpy()
        blocks = problem.cols // pattern.block
        pruned = np.ones((len(kept) ** blocks, problem.cols))
        for number, choice in enumerate(itertools.product(kept, repeat=blocks)):
            for block, indices in enumerate(choice):
                pruned[number, [block * pattern.block + j for j in indices]] = 0
        r = pruned * weight
        error = np.einsum("mi,ij,mj->m", r, gram, r)
        if problem.drift is not None:
            error += 2 * r @ problem.drift.linear[row].numpy() + float(problem.drift.constant[row])
        best.append(error.min())
    return torch.tensor(best)


def check_against(problem: ss.LayerProblem, solution: ss.Solution, best: torch.Tensor, gap: float) -> None:
    slack = rounding(problem)
    assert bool((solution.row_objectives <= best * (1 + gap) + slack).all()), problem.name
    assert bool((solution.row_bounds <= best.clamp_min(0) + slack).all()), problem.name


def proofs(solution: ss.Solution) -> bool:
    """Whether every row was closed, and has finished where its gap is within the limit and nowhere else."""
    closed = {True: ss.Status.FINISHED, False: ss.Status.PRECISION_LIMIT}
    return solution.row_statuses == tuple(closed[gap <= LIMIT] for gap in solution.row_gaps.tolist())


def test_branch_and_bound_equals_enumeration_on_random_rows() -> None:
    rows = 0
    patterns = ("0.5", "2:4", "0.6", "4:8", "1:4", "0.25")
    generator = np.random.default_rng(0)
    for number, family in itertools.product(range(24), conformance.FAMILIES):
        pattern = patterns[number % len(patterns)]
        cols = 16 if pattern == "4:8" else (8, 12, 16)[number % 3]
        drift = number % 2 == 1
        plain, _, _ = conformance.with_raw(family, pattern, drift, seed=number, rows=3, cols=cols)
        problem = rescaled(plain, float(10.0 ** generator.uniform(-4, 4)))
        solution = ss.solve(problem, ss.BranchAndBound())
        check_against(problem, solution, ss.solve(problem, ss.Enumeration()).row_objectives, GAP)
        assert proofs(solution)
        resolved = solution.row_objectives > 1e6 * rounding(problem)
        assert bool((solution.row_gaps[resolved] <= GAP).all()), problem.name
        rows += problem.rows
    assert rows >= 500


def test_a_divided_proof_equals_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    # stages so short that the proof is divided into parts even on rows of twelve weights
    monkeypatch.setattr(branch_and_bound, "QCR_NODES", 1)
    monkeypatch.setattr(branch_and_bound, "DNN_ROUNDS", ((5, 1),))
    monkeypatch.setattr(branch_and_bound, "PART_STEPS", 3)
    monkeypatch.setattr(branch_and_bound, "PART_NODES", 1)
    most = 0.0
    for seed in range(28):
        problem, _, _ = conformance.with_raw(
            conformance.FAMILIES[seed % 7], ("0.5", "2:4", "0.25")[seed % 3], seed % 2 == 1, seed, 2, 12
        )
        solution = ss.solve(problem, ss.BranchAndBound())
        check_against(problem, solution, ss.solve(problem, ss.Enumeration()).row_objectives, GAP)
        assert proofs(solution)
        most = max(most, float(solution.stats["nodes"].max()))
    assert most > 10


@pytest.mark.parametrize(
    "solver",
    [
        ss.Enumeration(),
        ss.BranchAndBound(),
        ss.SCIP(),
        ss.SCIP(formulation="direct"),
        ss.SCIP(formulation="mccormick"),
        ss.HiGHS(),
        ss.HiGHS(formulation="mccormick"),
    ],
    ids=repr,
)
def test_exact_solvers_equal_brute_force(solver: ss.Solver) -> None:
    cases = [("correlated", "0.5", 1.0), ("weakly-correlated", "2:4", 1e-4), ("duplicates", "0.25", 1e4)]
    for (family, pattern, factor), drift in itertools.product(cases, (False, True)):
        plain, _, _ = conformance.with_raw(family, pattern, drift, seed=5, rows=2, cols=8)
        problem = rescaled(plain, factor)
        solution = ss.solve(problem, solver)
        assert proofs(solution)
        check_against(problem, solution, brute_force(problem), 1e-5)


@pytest.mark.parametrize("family", conformance.FAMILIES)
def test_foreign_solvers_never_prove_too_much(family: str) -> None:
    for solver, drift in itertools.product((ss.SCIP(), ss.HiGHS()), (False, True)):
        problem, _, _ = conformance.with_raw(family, "0.5", drift, seed=9, rows=1, cols=10)
        solution = ss.solve(problem, solver)
        check_against(problem, solution, ss.solve(problem, ss.Enumeration()).row_objectives, 1e-5)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_exact_solvers_agree_beyond_enumeration(pattern: str) -> None:
    problem = ss.synthetic_layer("correlated", 2, 24, pattern, seed=3)
    solutions = [
        ss.solve(problem, solver) for solver in (ss.BranchAndBound(), ss.SCIP(), ss.HiGHS(time_limit=60))
    ]
    best = solutions[0].row_objectives
    for solution in solutions:
        assert proofs(solution)
        assert bool((solution.row_objectives <= best * (1 + 1e-5)).all())
        assert bool((solution.row_bounds <= best).all())
        assert bool((solution.row_gaps <= FOREIGN_GAP).all())


@pytest.mark.parametrize("pattern", ["0.5", "0.6", "2:4", "4:8"])
def test_branch_and_bound_proves_wider_rows(pattern: str) -> None:
    problem = ss.synthetic_layer("correlated", 2, 64, pattern, seed=1)
    solution = ss.solve(problem, ss.BranchAndBound())
    assert solution.status is ss.Status.FINISHED
    assert bool((solution.row_gaps <= GAP).all())
    assert bool((solution.stats["nodes"] >= 1).all())
    best = ss.solve(problem, ss.IteratedLocalSearch())
    assert bool((best.row_objectives >= solution.row_bounds).all())


def test_a_limit_is_a_solution_with_its_own_status() -> None:
    problem = ss.synthetic_layer("correlated", 2, 96, "0.5", seed=2)
    nodes = ss.solve(problem, ss.BranchAndBound(node_limit=20))
    seconds = ss.solve(problem, ss.BranchAndBound(time_limit=0.005))
    nothing = ss.solve(problem, ss.BranchAndBound(), budget=ss.Budget(seconds=0.0))
    assert set(nodes.row_statuses) == {ss.Status.NODE_LIMIT}
    assert set(seconds.row_statuses) == {ss.Status.TIME_LIMIT}
    assert set(nothing.row_statuses) == {ss.Status.TIME_LIMIT}
    proven = ss.solve(problem, ss.BranchAndBound(gap_limit=0.01))
    assert set(proven.row_statuses) == {ss.Status.FINISHED}
    assert bool((proven.row_gaps <= 0.0101).all())
    for solution in (nodes, seconds, nothing):
        assert bool((solution.row_bounds <= proven.row_objectives).all())
    assert nodes.bound > 0
    assert nothing.bound == 0


def test_foreign_solvers_stop_at_their_limits() -> None:
    problem = ss.synthetic_layer("correlated", 1, 64, "0.5", seed=2)
    best = ss.solve(problem, ss.BranchAndBound())
    start = ss.solve(problem, ss.Wanda())
    for solver in (ss.SCIP(time_limit=0.5), ss.HiGHS(time_limit=0.5)):
        solution = ss.solve(problem, solver, init=start)
        assert solution.status is ss.Status.TIME_LIMIT
        assert solution.objective <= start.objective
        assert solution.bound <= best.objective


def test_highs_does_not_mind_who_used_it_before() -> None:
    """Its scheduler is the process's own, made for the threads of whoever came first."""
    highspy = pytest.importorskip("highspy")
    other = highspy.Highs()
    for option, value in (("output_flag", False), ("threads", 2), ("parallel", "on")):
        other.setOptionValue(option, value)
    other.addVar(0.0, 1.0)
    other.run()
    problem = ss.synthetic_layer("correlated", 1, 12, "0.5")
    found = ss.solve(problem, ss.HiGHS())
    assert proofs(found)
    best = ss.solve(problem, ss.Enumeration())
    # both are exact; HiGHS stops at a relative gap of 1e-6
    assert found.objective <= best.objective * (1 + 1e-5)


def test_warm_start_is_never_given_up_for_something_worse() -> None:
    problem = ss.synthetic_layer("correlated", 3, 32, "0.5", seed=4)
    best = ss.solve(problem, ss.BranchAndBound())
    for solver in (ss.BranchAndBound(time_limit=0.0), ss.IteratedLocalSearch(kicks=0), ss.SCIP(node_limit=1)):
        again = ss.solve(problem, solver, init=best)
        assert bool((again.row_objectives <= best.row_objectives).all())


def test_rows_in_parallel_give_the_same_answer() -> None:
    problem = ss.synthetic_layer("correlated", 4, 32, "0.5", seed=6)
    seen = []
    alone = ss.solve(problem, ss.BranchAndBound())
    budget = ss.Budget(progress=lambda done, total: seen.append((done, total)))
    shared = ss.solve(problem, ss.BranchAndBound(jobs=2), budget=budget)
    assert torch.equal(alone.mask, shared.mask)
    assert torch.equal(alone.row_bounds, shared.row_bounds)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [point.objective for point in shared.trace] == sorted(
        (point.objective for point in shared.trace), reverse=True
    )


def test_an_interrupt_keeps_what_is_there() -> None:
    problem = ss.synthetic_layer("correlated", 3, 16, "0.5", seed=6)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    solution = ss.solve(problem, ss.BranchAndBound(), budget=ss.Budget(progress=stop))
    assert solution.status is ss.Status.INTERRUPTED
    assert solution.row_statuses[0] is ss.Status.FINISHED
    assert solution.row_bounds[0] > 0
    assert solution.row_bounds[1] == 0


def test_iterated_local_search_is_one_swap_optimal_and_repeatable() -> None:
    problem = ss.synthetic_layer("correlated", 6, 48, "0.5", seed=7)
    first = ss.solve(problem, ss.IteratedLocalSearch(seed=1))
    assert torch.equal(first.mask, ss.solve(problem, ss.IteratedLocalSearch(seed=1)).mask)
    assert bool(ss.certify(problem, first.mask).holds)
    assert bool((first.row_objectives <= ss.solve(problem, ss.OneSwap()).row_objectives * (1 + 1e-9)).all())
    exact = ss.solve(problem, ss.BranchAndBound())
    assert bool((first.row_objectives <= exact.row_objectives * 1.02).all())


def test_a_restricted_program_has_the_same_objective() -> None:
    problem, _, _ = conformance.with_raw("correlated", "2:4", True, seed=3, rows=1, cols=12)
    program = row_program(problem, 0)
    generator = np.random.default_rng(0)
    for _ in range(50):
        x = program.cheapest(generator.standard_normal(12))
        decided = np.where(generator.random(12) < 0.4, x.astype(np.int8), -1).astype(np.int8)
        inner = restrict(program, decided)
        point = inner.expand(x[inner.free])
        assert np.array_equal(point, x)
        assert inner.program.objective(x[inner.free]) == pytest.approx(program.objective(x), rel=1e-10)


def test_thinning_keeps_every_better_selection() -> None:
    for seed in range(20):
        problem, _, _ = conformance.with_raw("huge-range", "0.5", seed % 2 == 1, seed=seed, rows=1, cols=10)
        program = row_program(problem, 0)
        start = ~ss.solve(problem, ss.Random(seed)).mask[0].numpy()
        reduced, inner, threshold = thinned(program, start)
        best = ~ss.solve(problem, ss.Enumeration()).mask[0].numpy()
        value = program.objective(best) / reduced.program.unit
        kept = np.array_equal(reduced.expand(best[reduced.free]), best)
        assert kept or value >= threshold * (1 - 1e-9)
        assert reduced.program.size == 0 or reduced.program.is_feasible(inner)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ss.BranchAndBound(time_limit=-1.0),
        lambda: ss.BranchAndBound(node_limit=0),
        lambda: ss.BranchAndBound(gap_limit=1.0),
        lambda: ss.BranchAndBound(jobs=0),
        lambda: ss.SCIP(formulation="simplex"),
        lambda: ss.HiGHS(formulation="qcr"),
        lambda: ss.IteratedLocalSearch(kicks=-1),
    ],
)
def test_impossible_options_are_refused(make: object) -> None:
    with pytest.raises(InputError, match="expected"):
        make()  # type: ignore[operator]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ss.synthetic_layer("correlated", 1, 8, "0.5")
    found = ss.solvers.base.importlib.util.find_spec
    monkeypatch.setattr(
        ss.solvers.base.importlib.util,
        "find_spec",
        lambda name: None if name in ("pyscipopt", "highspy", "gurobipy") else found(name),
    )
    for solver, library in ((ss.SCIP(), "pyscipopt"), (ss.HiGHS(), "highspy"), (ss.Gurobi(), "gurobipy")):
        with pytest.raises(SolverNotInstalledError, match=library):
            ss.solve(problem, solver)
    assert ss.solve(problem, ss.BranchAndBound()).status is ss.Status.FINISHED


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_finished_rows_are_within_the_gap_limit(pattern: str) -> None:
    problem = ss.synthetic_layer("correlated", 6, 32, pattern)
    for limit in (1e-6, 1e-2):
        solution = ss.solve(problem, ss.BranchAndBound(gap_limit=limit))
        assert solution.row_statuses == (ss.Status.FINISHED,) * 6
        assert float(solution.row_gaps.max()) <= limit


@pytest.mark.parametrize(
    "solver", [ss.SCIP(), ss.HiGHS(), ss.HiGHS(formulation="mccormick"), ss.BranchAndBound()], ids=repr
)
@pytest.mark.parametrize("dead", [5, 6, 8, 10])
def test_rows_whose_optimum_is_zero_need_no_solver(solver: ss.Solver, dead: int) -> None:
    """More inputs are always zero than are to be pruned."""
    generator = np.random.default_rng(dead)
    inputs = generator.standard_normal((40, 10))
    inputs[:, generator.permutation(10)[:dead]] = 0
    problem = ss.LayerProblem(
        torch.tensor(generator.standard_normal((3, 10))),
        torch.tensor(inputs.T @ inputs),
        ss.SparsityPattern.per_row(10, 0.5),
    )
    random = ss.solve(problem, ss.Random())
    for init in (None, random):
        solution = ss.solve(problem, solver, init)
        assert solution.row_statuses == (ss.Status.FINISHED,) * 3
        assert solution.objective == solution.bound == solution.gap == 0


@pytest.mark.parametrize("solver", [ss.SCIP(), ss.HiGHS(), ss.BranchAndBound()], ids=repr)
def test_rows_that_cancel_have_finished_only_within_the_gap_limit(solver: ss.Solver) -> None:
    """Pairs of equal inputs with opposite weights: the optimum is 0, the sums are not."""
    generator = np.random.default_rng(1)
    half = generator.standard_normal((40, 5)) * 10.0 ** generator.uniform(-2, 2, 5)
    inputs = np.concatenate([half, half * (1 + 1e-9)], axis=1)
    weight = generator.standard_normal((4, 5))
    problem = ss.LayerProblem(
        torch.tensor(np.concatenate([weight, -weight], axis=1)),
        torch.tensor(inputs.T @ inputs),
        ss.SparsityPattern.per_row(10, 0.4),
    )
    solution = ss.solve(problem, solver)
    assert proofs(solution)
    best = ss.solve(problem, ss.Enumeration())
    assert bool((solution.row_objectives <= best.row_objectives + rounding(problem)).all())


def test_highs_prints_nothing_on_standard_output() -> None:
    pytest.importorskip("highspy")
    script = (
        "import sparseswaps as ss\n"
        "problem = ss.synthetic_layer('correlated', 1, 12, '0.5')\n"
        "ss.solve(problem, ss.HiGHS())\nprint('done')"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "done\n"
