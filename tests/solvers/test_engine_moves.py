"""Greedy and tabu: what each step does, quality against the 1-swap optimum, and equal twins."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swap_oracle import smallest_change

import sparseswaps as ss
from sparseswaps.problems.synthetic import FAMILIES
from sparseswaps.solvers import kernels
from sparseswaps.solvers.kernels import reference
from sparseswaps.solvers.kernels.interface import DescentOptions
from sparseswaps.solvers.search import local_search


def greedy_by_definition(weight, gram, linear, mask, block, keep):
    """Prune one weight at a time by recomputing the row's error for every choice."""
    mask = mask.copy()

    def error(kept):
        pruned = np.where(kept, 0, weight)
        return pruned @ gram @ pruned + 2 * linear @ pruned

    while mask.sum() > keep * (len(mask) // block):
        best, chosen = np.inf, -1
        for j in np.flatnonzero(mask):
            first = j // block * block
            if mask[first : first + block].sum() > keep:
                mask[j] = False
                value = error(mask)
                mask[j] = True
                if value < best:
                    best, chosen = value, j
        mask[chosen] = False
    return mask


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize(("pattern", "share"), [("0.5", 0.6), ("0.7", 1.0), ("2:4", 0.6), ("12:24", 0.5)])
def test_greedy_prunes_the_cheapest_weight_each_time(pattern: str, share: float, drift: bool) -> None:
    problem = ss.synthetic_layer("correlated", 3, 24, pattern, seed=1)
    gram = problem.gram.matrix
    if drift:
        generator = torch.Generator().manual_seed(2)
        lost = 0.1 * torch.randn((24, 24), generator=generator, dtype=torch.float64)
        weight = problem.weight.double()
        linear = weight @ lost @ gram
        constant = ((weight @ lost @ gram @ lost.T) * weight).sum(1)
        problem = ss.LayerProblem(problem.weight, problem.gram, problem.pattern, ss.Drift(linear, constant))
    block, keep = problem.pattern.block, problem.pattern.keep
    start = keep + int(np.ceil((block - keep) * share))
    scores = problem.scaled_weight.abs()
    dense = (
        torch.ones_like(scores, dtype=torch.bool)
        if start == block
        else ss.SparsityPattern(start, block).top_k(scores)
    )
    found = ss.solve(problem, ss.Greedy(share=share)).mask
    for row in range(3):
        linear_row = problem.drift.linear[row].numpy() if problem.drift else np.zeros(24)
        expected = greedy_by_definition(
            problem.weight[row].double().numpy(), gram.numpy(), linear_row, dense[row].numpy(), block, keep
        )
        assert (found[row].numpy() == expected).all()


@pytest.mark.parametrize("cols", [72, 520])
def test_greedy_equals_the_reference(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ss.synthetic_layer("correlated", 3, cols, "0.5", seed=3)
    fast = ss.solve(problem, ss.Greedy())
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert torch.equal(ss.solve(problem, ss.Greedy()).mask, fast.mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_tabu_is_certified_and_never_worse(family: str) -> None:
    for cols, pattern in ((40, "0.5"), (64, "2:4"), (96, "48:96"), (96, "24:48"), (520, "0.6")):
        problem = ss.synthetic_layer(family, 4, cols, pattern, seed=5, tokens=4 * cols)
        for start in (ss.Wanda(), ss.Random(1)):
            begin = ss.solve(problem, start)
            descent = ss.solve(problem, ss.OneSwap(), begin)
            walk = ss.solve(problem, ss.Tabu(), begin)
            assert walk.status is ss.Status.LOCAL_OPTIMUM
            # both may differ from the exact error by the tolerance
            slack = 1e-6 * begin.row_objectives + 1e-13 * (problem.scaled_weight**2).sum(1)
            assert bool((walk.row_objectives <= descent.row_objectives + slack).all())
            lowest = smallest_change(problem.weight, problem.gram.matrix, walk.mask, problem.pattern.block)
            assert (lowest >= -slack.numpy()).all()


@given(
    cols=st.integers(2, 40),
    seed=st.integers(0, 10_000),
    effort=st.floats(0.01, 1.0),
    tenure=st.integers(1, 30),
    family=st.sampled_from(FAMILIES),
)
def test_tabu_on_any_layer(cols: int, seed: int, effort: float, tenure: int, family: str) -> None:
    problem = ss.synthetic_layer(family, 2, cols, ss.SparsityPattern((cols + 1) // 2, cols), seed=seed)
    begin = ss.solve(problem, ss.Random(seed))
    walk = ss.solve(problem, ss.Tabu(effort=effort, tenure=tenure), begin)
    slack = 1e-6 * begin.row_objectives + 1e-13 * (problem.scaled_weight**2).sum(1)
    lowest = smallest_change(problem.weight, problem.gram.matrix, walk.mask, cols)
    assert (lowest >= -slack.numpy()).all()
    assert bool((walk.row_objectives <= begin.row_objectives + slack).all())


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "44:88"])
def test_tabu_equals_the_reference(pattern: str) -> None:
    cpu = pytest.importorskip("sparseswaps.solvers.kernels.cpu")
    for family in ("correlated", "weakly-correlated", "zero-channels"):
        problem = ss.synthetic_layer(family, 5, 88, pattern, seed=11)
        mask = ss.solve(problem, ss.Wanda()).mask
        scaled = local_search.scaled_rows(problem, mask, slice(0, 5))
        part = local_search.at_scale(problem, scaled, problem.gram.correlation64)
        options = DescentOptions(1e-6, patience=60, tenure=7)
        results = [module.descend(part, mask, options) for module in (reference, cpu)]
        for name, ours, theirs in zip(results[0]._fields, *results, strict=True):
            torch.testing.assert_close(ours, theirs, msg=f"{family} {name}")


def test_quality_on_correlated_layers() -> None:
    problem = ss.synthetic_layer("correlated", 24, 768, "0.5", seed=4, tokens=1536)
    descent = ss.solve(problem, ss.OneSwap()).objective
    greedy = ss.solve(problem, ss.Chain(ss.Greedy(), ss.OneSwap())).objective
    walk = ss.solve(problem, ss.Tabu()).objective
    assert greedy < 0.975 * descent
    assert walk < 0.95 * descent
    assert ss.solve(problem, ss.Chain(ss.Greedy(), ss.Tabu())).objective < min(greedy, walk)


def test_same_mask_for_any_threads() -> None:
    problem = ss.synthetic_layer("correlated", 21, 520, "0.5", seed=5, tokens=1040)
    for solver in (ss.Greedy(), ss.Tabu()):
        whole = ss.solve(problem, solver).mask
        torch.set_num_threads(2)
        try:
            assert torch.equal(ss.solve(problem, solver).mask, whole)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(ss.solve(problem.slice_rows(slice(7, 8)), solver).mask, whole[7:8])


def test_time_limit_keeps_the_warm_start() -> None:
    problem = ss.synthetic_layer("correlated", 6, 128, "0.5", seed=8)
    begin = ss.solve(problem, ss.Random(2))
    for solver in (ss.Greedy(), ss.Tabu()):
        stopped = ss.solve(problem, solver, begin, ss.Budget(seconds=0.0))
        assert stopped.status is ss.Status.TIME_LIMIT
        assert torch.equal(stopped.mask, begin.mask)


@pytest.mark.parametrize(
    "options", [{"effort": 0}, {"effort": float("nan")}, {"tenure": 0}, {"tolerance": -1}]
)
def test_tabu_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ss.Tabu(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0, 1.1])
def test_greedy_options_are_checked(share: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < share ≤ 1"):
        ss.Greedy(share=share)
