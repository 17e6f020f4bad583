"""Units of a layer's inputs: the quadratic, the error after least squares, their solvers, by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparseswaps as ss
from sparseswaps.errors import InputError, InvalidOutcomeError, InvalidPatternError, InvalidProblemError
from sparseswaps.problems.units import UnitProblem
from sparseswaps.solvers.units import (
    OSSCAR,
    DropAddSwap,
    FlapScore,
    StructuredOBS,
    UnitMagnitude,
    UnitMasks,
    UnitSolver,
    WandaSp,
    solve_units,
)
from sparseswaps.solvers.units.base import UnitOutcome
from sparseswaps.solvers.units.drop_add_swap import swap_changes
from sparseswaps.solvers.units.kept_inverse import KeptInverse

UNITS = 8


def made(
    width: int = 1, metric: bool = False, drift: bool = True, seed: int = 0, block: int = UNITS
) -> tuple[UnitProblem, Tensor, Tensor]:
    """A problem, its inputs (tokens, cols) and targets (tokens, rows)."""
    generator = torch.Generator().manual_seed(seed)
    cols = UNITS * width
    inputs = ss.synthetic_activations("correlated", cols, 200, seed).double()
    inputs /= inputs.std()
    weight = torch.randn((5, cols), generator=generator, dtype=torch.float64)
    target = inputs @ weight.T
    if drift:
        target = target + torch.randn((200, 5), generator=generator, dtype=torch.float64)
    root = torch.randn((5, 9), generator=generator, dtype=torch.float64)
    layer = ss.LayerProblem.from_target(
        weight,
        inputs,
        target,
        ss.SparsityPattern(cols // 2, cols),
        root @ root.T / 9 + 0.1 * torch.eye(5, dtype=torch.float64) if metric else None,
    )
    if not drift:
        layer = replace(layer, drift=None)
    columns = torch.randperm(cols, generator=generator).view(UNITS, width)
    return UnitProblem(layer, columns, ss.SparsityPattern(block // 2, block)), inputs, target


CASES = [(1, False), (1, True), (2, False), (3, True)]


def choices(problem: UnitProblem) -> list[Tensor]:
    """All allowed choices of units."""
    block, keep = problem.pattern.block, problem.pattern.keep
    one = [[i in kept for i in range(block)] for kept in itertools.combinations(range(block), keep)]
    of_blocks = itertools.product(one, repeat=UNITS // block)
    return [torch.tensor(list(itertools.chain(*parts))) for parts in of_blocks]


def regression_error(problem: UnitProblem, inputs: Tensor, target: Tensor, kept: Tensor) -> float:
    """Least squares with the ridge as rows of its own, by a solver that knows no normal equations."""
    columns = problem.columns[kept].flatten()
    scale = (problem.ridge * float(inputs.square().sum(0).mean())) ** 0.5
    eye = scale * torch.eye(inputs.shape[1], dtype=torch.float64)
    seen = torch.cat([inputs, eye])
    wanted = torch.cat([target, eye @ problem.weight.T])
    found = torch.linalg.lstsq(seen[:, columns], wanted).solution
    missing = wanted - seen[:, columns] @ found
    metric = problem.layer.metric
    metric = torch.eye(5, dtype=torch.float64) if metric is None else metric
    return float((metric * (missing.T @ missing)).sum())


@pytest.mark.parametrize(("width", "metric"), CASES)
@pytest.mark.parametrize("drift", [False, True])
def test_the_row_has_the_error_of_the_layer(width: int, metric: bool, drift: bool) -> None:
    problem, inputs, target = made(width, metric, drift)
    row = problem.as_row()
    weighing = torch.eye(5, dtype=torch.float64) if problem.layer.metric is None else problem.layer.metric
    for kept in choices(problem):
        missing = target - inputs @ (problem.weight * problem.mask(kept)).T
        raw = float((weighing * (missing.T @ missing)).sum())
        # sums of float32 products in the Gram matrix
        assert problem.error(kept) == pytest.approx(raw, rel=1e-5)
        assert float(row.row_objectives(kept[None])) == pytest.approx(problem.error(kept), rel=1e-9)


@pytest.mark.parametrize(("width", "metric"), CASES)
def test_the_error_after_least_squares(width: int, metric: bool) -> None:
    problem, inputs, target = made(width, metric)
    for kept in choices(problem)[::7]:
        raw = regression_error(problem, inputs, target, kept)
        assert problem.updated_error(kept) == pytest.approx(raw, rel=1e-5)  # float32 products, as above
        assert problem.error(kept, problem.updated(kept)) <= problem.updated_error(kept) * (1 + 1e-9)


def centred_case(seed: int, metric: bool = False) -> tuple[UnitProblem, Tensor, Tensor]:
    """A problem whose inputs have means far from zero, with those, its inputs and targets."""
    problem, inputs, _ = made(2, metric, drift=False, seed=seed)
    shift = torch.randn(inputs.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = inputs + 2 * shift
    gram = ss.Gram(inputs.T @ inputs, len(inputs), inputs.mean(0))
    return replace(problem, layer=replace(problem.layer, gram=gram)), inputs, inputs @ problem.weight.T


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("update", [False, True])
def test_a_bias_absorbs_the_means(metric: bool, update: bool) -> None:
    """Against least squares with a column of ones, or a bias that is the mean of what is missing."""
    for seed in range(4):
        problem, inputs, target = centred_case(seed, metric)
        weighing = torch.eye(5, dtype=torch.float64) if problem.layer.metric is None else problem.layer.metric
        for solver in (FlapScore(), StructuredOBS(), DropAddSwap(), UnitMasks(ss.BranchAndBound())):
            found = solve_units(problem, solver, update=update, bias=True)
            columns = problem.columns[found.kept].flatten()
            centre = inputs - inputs.mean(0)
            if update:
                scale = (problem.ridge * float(centre.square().sum(0).mean())) ** 0.5
                eye = scale * torch.eye(inputs.shape[1], dtype=torch.float64)
                seen = torch.cat(
                    [
                        torch.cat([inputs, torch.ones(len(inputs), 1)], 1)[:, [*columns, -1]],
                        torch.cat([eye[:, columns], torch.zeros(len(eye), 1)], 1),
                    ]
                )
                solution = torch.linalg.lstsq(seen, torch.cat([target, eye @ problem.weight.T])).solution
                weight, bias = solution[:-1].T, solution[-1]
            else:
                weight = problem.weight[:, columns]
                bias = (target - inputs[:, columns] @ weight.T).mean(0)
            assert found.bias is not None
            torch.testing.assert_close(found.weight[:, columns], weight, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(found.bias, bias, rtol=1e-6, atol=1e-8)
            missing = target - inputs[:, columns] @ weight.T - bias
            assert found.error == pytest.approx(float((weighing * (missing.T @ missing)).sum()), rel=1e-6)
            # the same units without a bias lose the means as well
            assert found.error < problem.error(found.kept, found.weight)
            if not update and isinstance(solver, UnitMasks):
                best = min(problem.centred().error(kept) for kept in choices(problem))
                assert found.error == pytest.approx(best, rel=1e-6)


def test_biases_that_cannot_be() -> None:
    problem, _, _ = made(drift=True)
    with pytest.raises(InvalidProblemError, match="centred inputs: expected a layer without drift"):
        solve_units(problem, FlapScore(), bias=True)
    problem, _, _ = centred_case(0)
    without = replace(problem, layer=replace(problem.layer, gram=ss.Gram(problem.layer.gram.matrix)))
    with pytest.raises(InvalidProblemError, match="found no means"):
        solve_units(without, FlapScore(), bias=True)
    with pytest.raises(InvalidProblemError, match="bias of a layer: expected means of its inputs"):
        without.bias(without.weight)
    assert solve_units(problem, StructuredOBS()).bias is None


@given(seed=st.integers(0, 30), case=st.sampled_from(CASES), block=st.sampled_from([4, 8]))
def test_drops_adds_and_swaps_are_what_they_say(seed: int, case: tuple[int, bool], block: int) -> None:
    problem, _, _ = made(*case, seed=seed, block=block)
    options = choices(problem)
    kept = options[seed % len(options)]
    state = KeptInverse(problem, kept)
    before = problem.updated_error(kept)
    slack = 1e-9 * problem.total
    inside, outside = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]

    def after(drop: int | None, add: int | None) -> float:
        other = kept.clone()
        if drop is not None:
            other[drop] = False
        if add is not None:
            other[add] = True
        return problem.updated_error(other)

    for unit, cost in zip(inside.tolist(), state.drop_costs(inside).tolist(), strict=True):
        assert abs(after(unit, None) - before - cost) <= slack
    changes = swap_changes(problem, state)
    for (row, drop), (col, add) in itertools.product(enumerate(inside.tolist()), enumerate(outside.tolist())):
        if drop // block == add // block:
            assert abs(after(drop, add) - before - float(changes[row, col])) <= slack
        else:
            assert float(changes[row, col]) == float("inf")
    state.drop(int(inside[0]))
    state.add(int(outside[0]))
    fresh = KeptInverse(problem, state.kept)
    for found, expected in ((state.inverse, fresh.inverse), (state.weight, fresh.weight)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


SOLVERS: list[UnitSolver] = [
    WandaSp(),
    FlapScore(),
    UnitMagnitude(),
    UnitMasks(),
    UnitMasks(ss.BranchAndBound()),
    StructuredOBS(),
    OSSCAR(),
    OSSCAR(drops=2, swaps=1),
    DropAddSwap(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=[f"{solver.name}-{i}" for i, solver in enumerate(SOLVERS)])
@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize(("width", "metric"), CASES)
def test_solvers_of_units(solver: UnitSolver, block: int, width: int, metric: bool) -> None:
    problem, _, _ = made(width, metric, block=block)
    found = solve_units(problem, solver)
    assert found.error_masked == pytest.approx(problem.error(found.kept))
    assert found.error <= found.error_masked
    assert found.error == pytest.approx(problem.error(found.kept, found.weight))
    assert not bool((found.weight * ~problem.mask(found.kept)).any())
    errors = {tuple(kept.tolist()): problem.updated_error(kept) for kept in choices(problem)}
    own = errors[tuple(found.kept.tolist())]
    if isinstance(solver, DropAddSwap):  # no swap of the enumeration is better
        swapped = [
            error
            for kept, error in errors.items()
            if sum(a != b for a, b in zip(kept, found.kept.tolist(), strict=True)) == 2
        ]
        assert own <= min(swapped) + 1e-8 * problem.total
    if isinstance(solver, UnitMasks) and isinstance(solver.solver, ss.BranchAndBound):
        best = min(problem.error(kept) for kept in choices(problem))
        assert found.error_masked == pytest.approx(best, rel=1e-6)


def test_swaps_end_below_where_they_begin() -> None:
    better = 0
    for seed in range(12):
        problem, _, _ = made(2, True, seed=seed)
        start = solve_units(problem, UnitMagnitude())
        swapped = solve_units(problem, DropAddSwap(), start)
        assert problem.updated_error(swapped.kept) <= problem.updated_error(start.kept) + 1e-9 * problem.total
        better += swapped.stats["swaps"] > 0
    assert better >= 6


def published_osscar(problem: UnitProblem, drops: int, swaps: int, iterations: int) -> list[int]:
    """The steps as the paper has them, every cost and gain by solving two systems anew (one block)."""

    def error(kept: set[int]) -> float:
        columns = problem.columns[sorted(kept)].flatten()
        target = problem.weight @ problem.ridged + problem.linear
        weight = torch.linalg.solve(problem.ridged[columns][:, columns], target[:, columns].T).T
        return -float((problem.weighed(target)[:, columns] * weight).sum())

    kept = set(range(problem.units))
    total = problem.pattern.block - problem.pattern.keep
    rounds = max(1, total // drops)
    for number in range(rounds):
        size = total // rounds + (number < total % rounds)
        costs = {unit: error(kept - {unit}) - error(kept) for unit in kept}
        kept -= set(sorted(costs, key=lambda unit: costs[unit])[:size])
    best = error(kept)
    for _ in range(iterations):
        count = min(swaps, len(kept) - 1, problem.units - len(kept))
        costs = {unit: error(kept - {unit}) for unit in kept}
        other = kept - set(sorted(costs, key=lambda unit: costs[unit])[:count])
        gains = {unit: error(other | {unit}) for unit in set(range(problem.units)) - other}
        other |= set(sorted(gains, key=lambda unit: gains[unit])[:count])
        if not error(other) < best:
            break
        kept, best = other, error(other)
    return sorted(kept)


@pytest.mark.parametrize("options", [(1, 1, 30), (2, 2, 30), (3, 1, 1), (10, 3, 0)])
def test_osscar_takes_its_published_steps(options: tuple[int, int, int]) -> None:
    accepted = 0
    for seed, case in itertools.product(range(4), CASES):
        problem, _, _ = made(*case, seed=seed)
        found = solve_units(problem, OSSCAR(*options))
        assert found.kept.nonzero()[:, 0].tolist() == published_osscar(problem, *options), (seed, case)
        accepted += found.stats["swaps"]
    assert (accepted > 0) == (options[2] > 0)


def test_osscar_between_greedy_and_the_swap_optimum() -> None:
    """Removal one by one is structured OBS; its local search ends where single swaps may still help."""
    for seed in range(6):
        problem, _, _ = made(2, True, seed=seed)
        greedy = problem.updated_error(solve_units(problem, StructuredOBS()).kept)
        plain = solve_units(problem, OSSCAR(drops=1, iterations=0))
        assert problem.updated_error(plain.kept) == pytest.approx(greedy, rel=1e-12)
        searched = solve_units(problem, OSSCAR(drops=1, swaps=1))
        assert problem.updated_error(searched.kept) <= greedy * (1 + 1e-12)
        swapped = solve_units(problem, DropAddSwap(), searched)
        assert problem.updated_error(swapped.kept) <= problem.updated_error(searched.kept) * (1 + 1e-9)
    limited = solve_units(problem, OSSCAR(), budget=ss.Budget(seconds=0))
    assert limited.status == ss.Status.TIME_LIMIT
    for options in ({"drops": 0}, {"swaps": 0}, {"iterations": -1}):
        with pytest.raises(InputError, match="of OSSCAR: expected at least"):
            OSSCAR(**options)


def test_dead_and_doubled_channels() -> None:
    """A channel without input, and two that are the same: the Gram matrix is singular, the ridge is not."""
    inputs = ss.synthetic_activations("correlated", 8, 100, 0).double()
    inputs[:, 3], inputs[:, 5] = 0, inputs[:, 4]
    weight = torch.randn((4, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = ss.LayerProblem.from_target(weight, inputs, inputs @ weight.T, ss.SparsityPattern(4, 8))
    problem = UnitProblem(layer, torch.arange(8)[:, None], ss.SparsityPattern(6, 8))
    for solver in (StructuredOBS(), DropAddSwap(), UnitMasks()):
        found = solve_units(problem, solver)
        assert not found.kept[3]
    obs = solve_units(problem, StructuredOBS())
    assert int(obs.kept[4]) + int(obs.kept[5]) == 1
    # what the other of the two carried is carried by the one that is kept
    assert obs.error <= 1e-3 * float(layer.output_norms().sum())


def test_units_that_are_refused() -> None:
    problem, _, _ = made()
    with pytest.raises(InvalidProblemError, match="expected 8 columns, found a tensor"):
        UnitProblem(problem.layer, torch.zeros((8, 1), dtype=torch.long), problem.pattern)
    with pytest.raises(InvalidProblemError, match="ridge is positive"):
        UnitProblem(problem.layer, problem.columns, problem.pattern, ridge=0.0)
    with pytest.raises(InvalidPatternError):
        UnitProblem(problem.layer, problem.columns, ss.SparsityPattern(2, 3))
    with pytest.raises(InvalidProblemError, match="centred inputs: expected a layer without drift"):
        problem.as_row(centred=True)
    with pytest.raises(InvalidProblemError, match="warm start"):
        solve_units(problem, DropAddSwap(), torch.ones(8, dtype=torch.bool))

    class Greedy(UnitSolver):
        name = "keeps-all"

        def run(self, problem, init, budget):  # type: ignore[no-untyped-def]
            return UnitOutcome(torch.ones(problem.units, dtype=torch.bool), ss.Status.FINISHED)

    with pytest.raises(InvalidOutcomeError, match="keeps-all"):
        solve_units(problem, Greedy())
