"""Equal sparsity per layer: weights move between rows, and the certificate covers that too."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swap_oracle import smallest_change

import sparseswaps as ss
from sparseswaps.problems.synthetic import FAMILIES
from sparseswaps.solvers import kernels
from sparseswaps.solvers.kernels import exchange_rounds, reference
from sparseswaps.solvers.search.layer_budget import single_moves


def layer(
    family: str, rows: int, cols: int, sparsity: float, seed: int, drift: bool = False
) -> ss.LayerProblem:
    base = ss.synthetic_layer(family, rows, cols, seed=seed)
    # rows that matter differently, as in real layers
    weight = base.weight.double() * torch.linspace(0.5, 2.0, rows, dtype=torch.float64)[:, None]
    linear = None
    if drift:
        generator = torch.Generator().manual_seed(seed)
        lost = 0.1 * torch.randn((cols, cols), generator=generator, dtype=torch.float64)
        gram = base.gram.matrix
        constant = ((weight @ lost @ gram @ lost.T) * weight).sum(1).clamp_min(0)
        linear = ss.Drift(weight @ lost @ gram, constant)
    return ss.LayerProblem(weight, base.gram, ss.LayerBudget.parse(f"layer:{sparsity}", cols), linear)


def best_exchange_by_definition(problem: ss.LayerProblem, mask: torch.Tensor) -> float:
    """Lowest change of the error: prune any kept weight of one row, restore any of another."""
    weight, gram = problem.weight.double().numpy(), problem.gram.matrix.numpy()
    linear = np.zeros_like(weight) if problem.drift is None else problem.drift.linear.numpy()

    def error(row, kept):
        pruned = np.where(kept, 0, weight[row])
        return pruned @ gram @ pruned + 2 * linear[row] @ pruned

    lowest = []
    for row in range(problem.rows):
        kept = mask[row].numpy()
        now = error(row, kept)
        change = {True: np.inf, False: np.inf}
        for j in range(problem.cols):
            flipped = kept.copy()
            flipped[j] = not kept[j]
            change[bool(kept[j])] = min(change[bool(kept[j])], error(row, flipped) - now)
        lowest.append(change)
    return min(
        (lowest[a][True] + lowest[b][False] for a, b in itertools.permutations(range(problem.rows), 2)),
        default=np.inf,
    )


@given(
    family=st.sampled_from(FAMILIES),
    rows=st.integers(1, 6),
    cols=st.integers(2, 24),
    sparsity=st.sampled_from((0.5, 0.6, 0.8)),
    seed=st.integers(0, 1000),
    drift=st.booleans(),
    search=st.sampled_from(("lazy", "best")),
    rounds=st.booleans(),
)
def test_certified_in_both_neighbourhoods(
    family: str, rows: int, cols: int, sparsity: float, seed: int, drift: bool, search: str, rounds: bool
) -> None:
    problem = layer(family, rows, cols, sparsity, seed, drift)
    begin = ss.solve(problem, ss.Random(seed))
    with pytest.MonkeyPatch.context() as patch:
        if rounds:
            fast = kernels.kernels_for(problem.device)
            patch.setattr(fast, "exchange_rows", exchange_rounds.exchange_rows)
        solution = ss.solve(problem, ss.OneSwap(search=search), begin)
    assert solution.status is ss.Status.LOCAL_OPTIMUM
    assert int(solution.mask.sum()) == problem.pattern.keep * rows
    size = (problem.scaled_weight**2).sum(1)
    if problem.scaled_drift is not None:
        size = size + (problem.scaled_drift**2).sum(1)
    # float64 sums of terms of this size
    rounding = 1e-12 * float(size.max())
    assert solution.objective <= begin.objective + rounding * rows
    exchange_limit = 1e-6 * float(begin.row_objectives.mean()) + rounding
    assert best_exchange_by_definition(problem, solution.mask) >= -exchange_limit
    linear = None if problem.drift is None else problem.drift.linear
    mixed = [row for row in range(rows) if 0 < int(solution.mask[row].sum()) < cols]
    lowest = smallest_change(problem.weight, problem.gram.matrix, solution.mask, cols, linear)
    # rows change hands between weights: their reference is the largest error they had on the way
    reference = max(float(begin.row_objectives.max()), float(solution.row_objectives.max()))
    assert all(lowest[row] >= -1e-6 * reference - rounding for row in mixed)


@pytest.mark.parametrize("drift", [False, True])
def test_certificate_names_the_best_exchange(drift: bool) -> None:
    problem = layer("correlated", 5, 20, 0.5, 3, drift)
    mask = ss.solve(problem, ss.Wanda()).mask
    found = ss.certify(problem, mask)
    assert found.smallest_exchange == pytest.approx(best_exchange_by_definition(problem, mask), rel=1e-9)
    assert not found.holds
    a, u, b, p = found.exchange
    swapped = mask.clone()
    assert swapped[a, u]
    assert not swapped[b, p]
    swapped[a, u], swapped[b, p] = False, True
    change = problem.objective(swapped) - problem.objective(mask)
    assert change == pytest.approx(found.smallest_exchange, rel=1e-9)
    solution = ss.solve(problem, ss.OneSwap())
    reference = ss.solve(problem, ss.Wanda()).row_objectives
    assert ss.certify(
        problem, solution.mask, reference=torch.maximum(reference, solution.row_objectives)
    ).holds


def test_beats_equal_sparsity_of_rows() -> None:
    shared = layer("correlated", 24, 96, 0.5, 1)
    equal = ss.LayerProblem(shared.weight, shared.gram, ss.SparsityPattern.per_row(96, 0.5))
    assert ss.solve(shared, ss.OneSwap()).objective < ss.solve(equal, ss.OneSwap()).objective
    assert ss.solve(shared, ss.OneSwap()).stats["exchanges"].sum() > 0


def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layer("correlated", 6, 40, 0.6, 2)
    fast = ss.solve(problem, ss.OneSwap())
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    slow = ss.solve(problem, ss.OneSwap())
    assert torch.equal(fast.mask, slow.mask)
    assert torch.equal(fast.stats["exchanges"], slow.stats["exchanges"])


def test_rounds_of_exchanges_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_rounds, "ROUND_WEIGHTS", 5 * 60)  # rows in several parts
    for seed in range(3):
        problem = layer("correlated", 32, 60, 0.6, seed)
        begin = ss.solve(problem, ss.Wanda()).mask
        found = {}
        for name, module in (("one", reference), ("rounds", exchange_rounds)):
            mask = begin.clone()
            delta, state = single_moves(problem, mask, slice(None))
            exchanges = module.exchange_rows(problem.gram.correlation64, delta, state, mask, 0.0)
            assert int(exchanges.sum()) >= int((mask != begin).sum()) > 0
            fresh = single_moves(problem, mask, slice(None))
            # both updated in float64 by a few terms of size 1 at most
            for ours, theirs in zip((delta, state), fresh, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(state.abs().max()))
            found[name] = mask
        # the same neighbourhood, another order: an optimum that is about as good or better
        assert problem.objective(found["rounds"]) <= 1.02 * problem.objective(found["one"])
        assert problem.objective(found["rounds"]) < problem.objective(begin)


def test_time_limit_and_unsupported_solvers() -> None:
    problem = layer("correlated", 4, 20, 0.5, 1)
    stopped = ss.solve(problem, ss.OneSwap(), budget=ss.Budget(seconds=0.0))
    assert stopped.status is ss.Status.TIME_LIMIT
    assert torch.equal(stopped.mask, ss.solve(problem, ss.Wanda()).mask)
    for solver in (ss.Tabu(), ss.Greedy(), ss.Enumeration(), ss.BestOf(ss.Wanda(), ss.Tabu())):
        with pytest.raises(Exception, match="budget of a whole layer"):
            ss.solve(problem, solver)
    best = ss.solve(problem, ss.BestOf(ss.Wanda(), ss.OneSwap()))
    assert best.objective == ss.solve(problem, ss.OneSwap()).objective
    with pytest.raises(Exception, match="expected no limit of swaps"):
        ss.solve(problem, ss.OneSwap(max_swaps=3))
    assert ss.solve(problem, ss.Chain(ss.Magnitude(), ss.OneSwap())).status is ss.Status.LOCAL_OPTIMUM


def test_pattern() -> None:
    pattern = ss.parse_pattern("layer:50%", 10)
    assert pattern == ss.LayerBudget(5, 10)
    assert ss.parse_pattern("0.5", 10) == ss.SparsityPattern(5, 10)
    assert pattern.sparsity == 0.5
    assert not pattern.is_per_row(10)
    scores = torch.tensor([[1.0, 2.0, 3.0, 3.0], [3.0, 0.0, 5.0, 0.0]])
    expected = torch.tensor([[False, False, True, True], [True, False, True, False]])
    assert torch.equal(ss.LayerBudget(2, 4).top_k(scores), expected)
    assert ss.LayerBudget(2, 4).allows(expected)
    assert not ss.LayerBudget(2, 4).allows(torch.ones_like(expected))
    for text in ("layer:2", "layer:2:4", "layer", "layer:0"):
        with pytest.raises(ValueError, match="expected"):
            ss.LayerBudget.parse(text, 8)
    with pytest.raises(ValueError, match="expected 10 columns"):
        pattern.check_cols(12)
    with pytest.raises(ValueError, match="expected 0 < keep"):
        ss.LayerBudget(4, 4)


def test_instance_files_keep_it(tmp_path: Path) -> None:
    problem = layer("correlated", 3, 12, 0.5, 1)
    ss.save_instance(problem, tmp_path / "layer.safetensors")
    assert ss.load_instance(tmp_path / "layer.safetensors").pattern == problem.pattern
