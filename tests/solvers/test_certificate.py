"""Certificates agree with every swap written out, and cannot be fooled."""

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


@pytest.mark.parametrize("pattern", ["0.5", "0.25", "2:4", "36:72"])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_all_pairs(family: str, pattern: str) -> None:
    problem = ss.synthetic_layer(family, 4, 72, pattern, seed=1)
    for solver in (ss.Wanda(), ss.OneSwap(), ss.OneSwap(max_swaps=2), ss.Random(1)):
        mask = ss.solve(problem, solver).mask
        found = ss.certify(problem, mask)
        lowest = smallest_change(problem.weight, problem.gram.matrix, mask, problem.pattern.block)
        # both sum in float64 terms of the size of the row's output
        slack = 1e-13 * problem.output_norms().numpy() + 1e-13 * (problem.scaled_weight**2).sum(1).numpy()
        np.testing.assert_array_less(np.abs(found.smallest_change.numpy() - lowest), slack + 1e-300)
        limit = 1e-6 * problem.row_objectives(mask).numpy()
        clear = np.abs(lowest + limit) > slack
        assert (found.certified.numpy() == (lowest >= -limit))[clear].all()


@given(
    family=st.sampled_from(("correlated", "weakly-correlated", "huge-range")),
    cols=st.integers(2, 40),
    seed=st.integers(0, 10_000),
    steps=st.integers(0, 30),
)
def test_names_a_swap_that_does_what_it_says(family: str, cols: int, seed: int, steps: int) -> None:
    problem = ss.synthetic_layer(family, 2, cols, ss.SparsityPattern((cols + 1) // 2, cols), seed=seed)
    solution = ss.solve(problem, ss.Chain(ss.Random(seed), ss.OneSwap(max_swaps=steps)))
    found = ss.certify(problem, solution.mask)
    row = torch.arange(2)
    assert solution.mask[row, found.pruned].all()
    assert not solution.mask[row, found.restored].any()
    swapped = solution.mask.clone()
    swapped[row, found.pruned] = False
    swapped[row, found.restored] = True
    change = problem.row_objectives(swapped) - solution.row_objectives
    slack = 1e-12 * problem.output_norms()
    assert bool(((change - found.smallest_change).abs() <= slack).all())


def test_refuses_masks_one_swap_from_the_optimum() -> None:
    problem = ss.synthetic_layer("correlated", 6, 64, "0.5", seed=2)
    solution = ss.solve(problem, ss.OneSwap())
    assert ss.certify(problem, solution.mask).holds
    for row in range(6):
        worse = solution.mask.clone()
        kept, pruned = worse[row].nonzero()[0], (~worse[row]).nonzero()[-1]
        worse[row, kept], worse[row, pruned] = False, True
        found = ss.certify(problem, worse)
        assert not found.certified[row]
        assert int(found.certified.sum()) == 5
        assert found.share == pytest.approx(5 / 6)


def test_without_numba_it_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ss.synthetic_layer("duplicates", 4, 64, "0.5", seed=2)
    mask = ss.solve(problem, ss.OneSwap(max_swaps=4)).mask
    fast = ss.certify(problem, mask)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.kernels_for(torch.device("cpu")) is reference
    slow = ss.certify(problem, mask)
    torch.testing.assert_close(fast.smallest_change, slow.smallest_change, rtol=1e-9, atol=1e-12)
    assert torch.equal(fast.certified, slow.certified)


def test_reference_error_and_tolerance_set_the_limit() -> None:
    problem = ss.synthetic_layer("correlated", 3, 40, "0.5", seed=2)
    mask = ss.solve(problem, ss.OneSwap(max_swaps=1)).mask
    found = ss.certify(problem, mask)
    assert not found.holds
    assert ss.certify(problem, mask, reference=-1e7 * found.smallest_change).holds
    assert ss.certify(problem, mask, tolerance=0.999).limit == pytest.approx(
        0.999 * problem.row_objectives(mask).numpy()
    )


def test_refuses_what_does_not_fit() -> None:
    problem = ss.synthetic_layer("correlated", 3, 40, "0.5")
    mask = ss.solve(problem, ss.Wanda()).mask
    with pytest.raises(ValueError, match="expected such a mask"):
        ss.certify(problem, torch.ones_like(mask))
    with pytest.raises(ValueError, match="expected 0 ≤ tolerance"):
        ss.certify(problem, mask, tolerance=1.5)
    with pytest.raises(ValueError, match=r"expected \(3,\)"):
        ss.certify(problem, mask, reference=torch.ones(2))
