"""Statistics against values computed by hand, scipy and their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparseswaps.reports import statistics as s

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def test_gap_by_hand():
    assert s.gap([4.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 1.5]).tolist() == [0.25, 1.0, 0.0, 0.0]
    assert s.reference_gap(10.0, 8.0) == pytest.approx(0.2)
    assert s.excess([4.0, 0.0, 2.0], [3.2, 0.0, 0.0]).tolist() == [pytest.approx(0.25), 0.0, np.inf]


def test_ecdf_by_hand_and_by_scipy():
    x, share = s.ecdf([3.0, 1.0, 1.0, 2.0])
    assert x.tolist() == [1.0, 2.0, 3.0]
    assert share.tolist() == [0.5, 0.75, 1.0]
    values = np.random.default_rng(0).normal(size=50).round(1)
    reference = stats.ecdf(values).cdf
    x, share = s.ecdf(values)
    np.testing.assert_array_equal(x, reference.quantiles)
    np.testing.assert_allclose(share, reference.probabilities, rtol=1e-12)  # sums of shares, rounding
    assert s.ecdf([])[0].size == 0


def test_shifted_geometric_mean_by_hand():
    # (1 + 1)(7 + 1) = 16, its root 4, minus the shift
    assert s.shifted_geometric_mean([1.0, 7.0], 1.0) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="found none"):
        s.shifted_geometric_mean([], 1.0)
    with pytest.raises(ValueError, match="found -2"):
        s.shifted_geometric_mean([-2.0], 1.0)


@given(POSITIVE)
def test_shifted_geometric_mean_without_shift_is_scipys(values):
    # logarithms up to 7 in double precision
    assert s.shifted_geometric_mean(values, 0.0) == pytest.approx(float(stats.gmean(values)), rel=1e-9)


@given(POSITIVE, st.floats(0.1, 100))
def test_shifted_geometric_mean_lies_between_geometric_and_arithmetic(values, shift):
    # the same rounding
    mean = s.shifted_geometric_mean(values, shift)
    assert s.shifted_geometric_mean(values, 0.0) <= mean * (1 + 1e-9) + 1e-9
    assert mean <= np.mean(values) * (1 + 1e-9) + 1e-9


def test_par10_by_hand():
    # solved in 2, not solved: 100, solved but after the limit: 100
    assert s.par10([2.0, 4.0, 11.0], [True, False, True], 10.0) == pytest.approx(202 / 3)
    with pytest.raises(ValueError, match="found none"):
        s.par10([], [], 1.0)


def test_performance_profile_by_hand():
    # three instances, two solvers; ratios to the best: (1, 2), (3, 1), (1, failure)
    costs = [[1.0, 2.0], [3.0, 1.0], [5.0, np.inf]]
    profile = s.performance_profile(costs, [1.0, 2.0, 3.0, 100.0])
    expected = [[2 / 3, 1 / 3], [2 / 3, 2 / 3], [1, 2 / 3], [1, 2 / 3]]
    np.testing.assert_allclose(profile, expected, rtol=1e-12)  # ratios of small integers
    # 0 is best, and only 0 is within a factor of it
    assert s.performance_profile([[0.0, 1.0], [0.0, 0.0]], [1.0, 1e9]).tolist() == [[1, 0.5], [1, 0.5]]
    # where every solver failed, nobody is counted
    assert s.performance_profile([[np.inf, np.inf]], [2.0]).tolist() == [[0, 0]]


def test_primal_integral_by_hand():
    # 1 for two seconds, |4 - 8| / 8 = 0.5 for three, 0 for the last five
    assert s.primal_integral([2.0, 5.0], [8.0, 4.0], 4.0, 10.0) == pytest.approx(2 + 1.5)
    assert s.primal_integral([], [], 1.0, 7.0) == 7.0
    assert s.primal_integral([20.0], [1.0], 1.0, 10.0) == 10.0
    assert s.primal_gap([0.0, 3.0], 0.0).tolist() == [0.0, 1.0]


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(1, 100)), max_size=8))
def test_primal_integral_is_the_riemann_sum_of_the_primal_gap(points):
    points = sorted(points)
    seconds, objectives = [p[0] for p in points], [p[1] for p in points]
    grid = (np.arange(20000) + 0.5) / 2000
    last = np.searchsorted(seconds, grid, side="right") - 1
    gaps = np.where(last < 0, 1.0, s.primal_gap([*objectives, 1.0], 1.0)[last])
    # a step may lie anywhere in a cell of 10 / 20000
    assert s.primal_integral(seconds, objectives, 1.0, 10.0) == pytest.approx(
        gaps.mean() * 10, abs=len(points) * 5e-4 + 1e-9
    )


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=200)
    mine = s.bootstrap_interval(values)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=2)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    # 2000 resamples place each end of a 95 % interval within about 5 % of its width
    assert mine.low == pytest.approx(reference.confidence_interval.low, abs=0.1 * width)
    assert mine.high == pytest.approx(reference.confidence_interval.high, abs=0.1 * width)
    assert mine.low < mine.estimate == values.mean() < mine.high
    assert s.bootstrap_interval(values) == mine
    median = s.bootstrap_interval(values, lambda sample: float(np.median(sample)), resamples=200)
    assert median.low <= np.median(values) <= median.high


def test_compare_counts_and_tests_as_scipy_does():
    generator = np.random.default_rng(3)
    second = generator.uniform(1, 2, 40)
    first = second * generator.uniform(0.7, 1.05, 40)
    first[:5] = second[:5]
    found = s.compare(first, second)
    assert (found.count, found.ties) == (40, 5)
    assert found.wins == int((first < second).sum())
    assert found.wins + found.ties + found.losses == 40
    reference = stats.wilcoxon(np.log(first / second)[5:])
    assert found.p_value == pytest.approx(float(reference.pvalue))
    assert found.change.estimate == pytest.approx(float(stats.gmean(first / second)) - 1)
    assert found.better
    assert not found.worse
    reverse = s.compare(second, first)
    assert reverse.worse
    assert reverse.wins == found.losses


def test_equal_costs_are_neither_better_nor_worse():
    found = s.compare([1.0, 2.0], [1.0, 2.0])
    assert (found.ties, found.p_value, found.better, found.worse) == (2, 1.0, False, False)
    with pytest.raises(ValueError, match="positive costs"):
        s.compare([1.0, 0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="found 1 and 2"):
        s.compare([1.0], [1.0, 1.0])
