"""Mask and weights in turns, against raw activations and best subset selection by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import pytest
import torch

import sparseswaps as ss
from sparseswaps.solvers.updates.alternating_reconstruction import revalued


def layer(
    pattern: str, seed: int, metric: bool = False, rows: int = 4, cols: int = 12
) -> tuple[ss.LayerProblem, torch.Tensor, torch.Tensor]:
    """A layer with any target; inputs (cols, tokens), target (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = ss.synthetic_activations("correlated", cols, 50, seed)
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64).float()
    target = inputs @ weight.double().T
    target = target + 0.3 * target.std() * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    gradients = torch.randn((30, rows), generator=generator, dtype=torch.float64)
    gradients[:, 1:] += gradients[:, :1]  # rows that pull together
    parsed = ss.parse_pattern(pattern, cols)
    made = ss.LayerProblem.from_target(
        weight, inputs, target, parsed, ss.output_metric(gradients.T @ gradients) if metric else None
    )
    return made, inputs.T, target.T


@pytest.mark.parametrize("metric", [False, True])
def test_revalued_layers_have_the_error_of_their_weights(metric: bool) -> None:
    problem, inputs, target = layer("0.5", 1, metric)
    start = ss.solve(problem, ss.Reconstruction())
    other = revalued(problem, start.mask, start.weight)
    assert other.objective(start.mask) == pytest.approx(start.objective, rel=1e-9)
    size = float((target**2).sum())
    for seed in range(5):
        mask = ss.solve(problem, ss.Random(seed=seed)).mask
        error = target - (other.weight * mask) @ inputs
        cost = problem.metric if metric else torch.eye(problem.rows).double()
        raw = float((cost * (error @ error.T)).sum())
        # the Gram is summed from float32 products: 1e-6 of what cancels
        assert other.objective(mask) == pytest.approx(raw, abs=1e-5 * size)


@pytest.mark.parametrize(
    ("pattern", "metric"),
    # sweeps over rows cover no budget of a whole layer
    [("0.5", False), ("2:4", False), ("layer:0.5", False), ("0.5", True), ("2:4", True)],
)
def test_turns_never_raise_the_error(pattern: str, metric: bool) -> None:
    gained = 0
    for seed in range(4):
        problem, _, _ = layer(pattern, seed, metric, rows=6, cols=24)
        swaps = ss.RowSweeps() if metric else ss.OneSwap()
        mask = ss.solve(problem, swaps)
        fixed = ss.solve(problem, ss.Reconstruction(), init=mask)
        solution = ss.solve(problem, ss.AlternatingReconstruction(), init=mask)
        errors = [point.objective for point in solution.trace]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == pytest.approx(fixed.objective, rel=1e-12)
        assert solution.objective == pytest.approx(errors[-1], rel=1e-12)
        if not metric and not pattern.startswith("layer"):
            assert bool((solution.row_objectives <= fixed.row_objectives).all())
        assert int(solution.stats["turns"].max()) <= len(errors) - 1
        gained += solution.objective < 0.999 * fixed.objective
    assert gained >= 2


def test_ends_where_no_swap_with_a_new_value_improves() -> None:
    """Every swap of the final mask, the restored weight at its best value, on the raw activations."""
    for seed in range(3):
        problem, inputs, target = layer("0.5", seed)
        solver = ss.AlternatingReconstruction(tolerance=0.0, rounds=50, reconstruction=ss.Reconstruction(0.0))
        solution = ss.solve(problem, solver)
        assert solution.status is ss.Status.LOCAL_OPTIMUM
        for row in range(problem.rows):
            mask, weight = solution.mask[row], solution.weight[row].double()
            now = float(((target[row] - weight @ inputs) ** 2).sum())
            for u, p in itertools.product(mask.nonzero().flatten(), (~mask).nonzero().flatten()):
                swapped = weight.clone()
                swapped[u] = 0
                # v_p is the best value while u is still kept, as in the search
                swapped[p] = (target[row] - weight @ inputs) @ inputs[p] / (inputs[p] @ inputs[p])
                error = float(((target[row] - swapped @ inputs) ** 2).sum())
                # 1e-6 of the error is the search's tolerance, 1e-6 of the target that of a float32 Gram
                assert error >= now * (1 - 1e-6) - 1e-6 * float((target[row] ** 2).sum())


def test_close_to_the_best_subset() -> None:
    """Enumeration of all masks of each row, each with its own least squares on raw activations."""
    fixed, turned, best = 0.0, 0.0, 0.0
    for seed in range(6):
        problem, inputs, target = layer("0.5", seed, rows=3, cols=10)
        start = ss.solve(problem, ss.OneSwap())
        first = ss.solve(problem, ss.Reconstruction(), init=start)
        solution = ss.solve(problem, ss.AlternatingReconstruction(), init=start)
        for row in range(problem.rows):
            errors = []
            for kept in itertools.combinations(range(10), 5):
                part = inputs[list(kept)].numpy()
                found = np.linalg.lstsq(part.T, target[row].numpy(), rcond=None)[0]
                errors.append(float(((target[row].numpy() - found @ part) ** 2).sum()))
            smallest = min(errors)
            ours = float(solution.row_objectives[row])
            # a Gram of float32 products: 1e-6 of the target
            assert ours >= smallest - 1e-6 * float((target[row] ** 2).sum())
            fixed += float(first.row_objectives[row]) / smallest - 1
            turned += ours / smallest - 1
            best += ours <= smallest * 1.0001
    assert turned < 0.5 * fixed  # at most half of what least squares alone leaves
    assert best >= 9  # of 18 rows at the optimum


def test_limits() -> None:
    problem, _, _ = layer("0.5", 1, rows=6, cols=24)
    plain = ss.solve(problem, ss.Reconstruction())
    none = ss.solve(problem, ss.AlternatingReconstruction(rounds=0))
    assert none.status is ss.Status.ITERATION_LIMIT
    assert torch.equal(none.weight, plain.weight)
    late = ss.solve(problem, ss.AlternatingReconstruction(), budget=ss.Budget(seconds=0))
    assert late.status is ss.Status.TIME_LIMIT
    assert torch.equal(late.weight, problem.weight * late.mask)


@final
@dataclass(frozen=True)
class NeedsAbsent(ss.Solver):
    """Needs a library that does not exist."""

    name: ClassVar[str] = "absent"
    group: ClassVar[ss.Group] = ss.Group.LOCAL_SEARCH
    covers: ClassVar[ss.Covers] = ss.Covers(requires=("no_such_library_at_all",))

    def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, budget: ss.Budget) -> ss.Outcome:
        raise AssertionError("never reached")


def test_any_search_takes_turns() -> None:
    problem, _, _ = layer("0.5", 2, metric=True, rows=5, cols=16)
    plain = ss.solve(problem, ss.Reconstruction()).objective
    for search in (ss.Tabu(effort=0.2), ss.RowSweeps(sweeps=1), ss.Wanda()):
        assert ss.solve(problem, ss.AlternatingReconstruction(search=search)).objective <= plain
    with pytest.raises(ss.SolverNotInstalledError, match="pip install no_such_library_at_all"):
        ss.solve(problem, ss.AlternatingReconstruction(search=NeedsAbsent()))


def test_options_that_are_refused() -> None:
    with pytest.raises(ss.InputError, match="expected at least 0, found -1"):
        ss.AlternatingReconstruction(rounds=-1)
    with pytest.raises(ss.InputError, match="expected 0 ≤ tolerance < 1, found 1"):
        ss.AlternatingReconstruction(tolerance=1.0)
    with pytest.raises(ss.InputError, match="a solver that leaves weights as they are, found SparseGPT"):
        ss.AlternatingReconstruction(search=ss.SparseGPT())
