"""The statistics of the reports, one documented function each, on plain arrays.

Objectives are layer or row errors, never negative, and smaller is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

# An objective this close to the best known one, relatively, is the same mask up to rounding.
SAME = 1e-6


def gap(objective: ArrayLike, bound: ArrayLike) -> Floats:
    """``(objective - bound) / objective`` elementwise, at least 0, and 0 where the objective is 0.

    With a proven lower bound it is an upper bound on the distance to the optimum, relative to the
    objective, and lies in [0, 1].
    """
    x, low = np.asarray(objective, float), np.asarray(bound, float)
    share = np.divide(x - low, x, out=np.zeros(np.broadcast(x, low).shape), where=x > 0)
    result: Floats = np.maximum(share, 0.0)
    return result


def reference_gap(objective: ArrayLike, best: ArrayLike) -> Floats:
    """``(objective - best) / objective`` against the best known objective: ``gap`` to a reference."""
    return gap(objective, best)


def excess(objective: ArrayLike, best: ArrayLike) -> Floats:
    """``objective / best - 1``: how much more than the reference; 0 if both are 0, ∞ if only it is."""
    x, low = np.asarray(objective, float), np.asarray(best, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(low > 0, x / low - 1, np.where(x > 0, np.inf, 0.0))
    result: Floats = np.maximum(share, 0.0)
    return result


def ecdf(values: ArrayLike) -> tuple[Floats, Floats]:
    """Empirical distribution function: distinct values in order and the share of values up to each.

    ``F(x) = #{i : v_i ≤ x} / n`` (van der Vaart, *Asymptotic Statistics*, 1998, section 19.1).
    """
    ordered = np.sort(np.asarray(values, float))
    if ordered.size == 0:
        return ordered, ordered
    distinct, counts = np.unique(ordered, return_counts=True)
    return distinct, np.cumsum(counts) / ordered.size


def shifted_geometric_mean(values: ArrayLike, shift: float) -> float:
    """``exp(mean(log(v + s))) - s`` (Achterberg, *Constraint Integer Programming*, 2007, appendix A.3).

    The shift keeps tiny values from ruling the mean.

    Raises:
        ValueError: for no values, or values not above ``-shift``.
    """
    array = np.asarray(values, float)
    if array.size == 0 or array.min() + shift <= 0:
        raise ValueError(
            f"shifted geometric mean: expected values above {-shift:g}, found "
            f"{'none' if array.size == 0 else f'{array.min():g}'}"
        )
    return float(np.exp(np.log(array + shift).mean()) - shift)


def par10(seconds: ArrayLike, solved: ArrayLike, limit: float) -> float:
    """Mean time, where an instance that was not solved within ``limit`` counts ten times the limit.

    Penalised average runtime (Hutter, Hoos, Leyton-Brown, Stützle, JAIR 36, 2009).
    """
    time, done = np.asarray(seconds, float), np.asarray(solved, bool)
    if time.size == 0:
        raise ValueError("PAR10: expected at least one time, found none")
    return float(np.where(done & (time <= limit), time, 10 * limit).mean())


def performance_profile(costs: ArrayLike, ratios: ArrayLike) -> Floats:
    """``ρ_s(τ) = #{p : t_ps ≤ τ min_s t_ps} / n`` (Dolan, Moré, Math. Programming 91, 2002, section 2).

    Ranks read from a profile can change when a solver leaves, because the minimum does
    (Gould, Scott, ACM TOMS 43, 2016).

    Args:
        costs: time or error of each solver on each instance (instances, solvers), ∞ for a failure;
            0 is best and only 0 is within any factor of it.
        ratios: the τ at which to evaluate (points,), each at least 1.

    Returns:
        Share of instances (points, solvers).
    """
    table, tau = np.asarray(costs, float), np.asarray(ratios, float)
    best = table.min(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(best > 0, table / best, np.where(table == best, 1.0, np.inf))
    relative = np.where(np.isfinite(table), relative, np.inf)
    ordered = np.sort(relative, axis=0)
    shares = [np.searchsorted(column, tau, side="right") / len(table) for column in ordered.T]
    return np.stack(shares, axis=1)


def primal_gap(objective: ArrayLike, best: float) -> Floats:
    """``|opt - x| / max(|opt|, |x|)``, 0 where both are 0 (Berthold, OR Letters 41, 2013, section 2)."""
    x = np.asarray(objective, float)
    size = np.maximum(np.abs(x), abs(best))
    result: Floats = np.divide(np.abs(x - best), size, out=np.zeros_like(x), where=size > 0)
    return result


def primal_integral(seconds: Sequence[float], objectives: Sequence[float], best: float, end: float) -> float:
    """``∫₀ᵀ p(t) dt`` of the primal gap ``p``, 1 before the first incumbent (Berthold 2013, section 3).

    Args:
        seconds: when each incumbent was found, ascending.
        objectives: of the incumbents.
        best: the optimum or the best known objective.
        end: ``T``; incumbents found later do not count.
    """
    time = np.clip(np.asarray(seconds, float), 0.0, end)
    if time.size == 0:
        return float(end)
    gaps = np.concatenate([[1.0], primal_gap(objectives, best)])
    steps = np.diff(np.concatenate([[0.0], time, [end]]))
    return float(gaps @ steps)


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[Floats], float] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron, Tibshirani, *An Introduction to the Bootstrap*, 1993, section 13.3).

    Args:
        values: independent observations (n,).
        statistic: of a sample, the mean by default.
        confidence: share of the interval.
        resamples: samples drawn with replacement.
        seed: the same seed gives the same interval.
    """
    array = np.asarray(values, float)
    if array.size == 0:
        raise ValueError("bootstrap: expected at least one value, found none")
    generator = np.random.default_rng(seed)
    of = statistic or (lambda sample: float(sample.mean()))
    draws = [of(array[generator.integers(0, array.size, array.size)]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(of(array), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same instances.

    Attributes:
        count: instances; wins, ties, losses: of the first method (smaller is a win).
        change: geometric mean of first / second, minus 1, with its bootstrap interval.
        p_value: two-sided Wilcoxon signed-rank test of the logarithms, 1 if all are equal.
    """

    count: int
    wins: int
    ties: int
    losses: int
    change: Interval
    p_value: float

    @property
    def better(self) -> bool:
        """Whether the first is smaller beyond doubt: interval below 0 and p < 0.05."""
        return self.change.high < 0 and self.p_value < 0.05

    @property
    def worse(self) -> bool:
        """Whether the first is larger beyond doubt."""
        return self.change.low > 0 and self.p_value < 0.05


def compare(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Comparison:
    """Paired comparison of positive costs, by their ratios.

    Wilcoxon, *Biometrics Bulletin* 1, 1945, through ``scipy.stats.wilcoxon`` with zero differences
    dropped; ratios within 1e-6 of 1 are ties.

    Args:
        first: costs of one method (n,).
        second: costs of the other on the same instances (n,).
        seed: of the bootstrap.

    Raises:
        ValueError: for different lengths, none at all, or costs that are not positive.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.size == 0 or min(a.min(), b.min()) <= 0:
        raise ValueError(
            "paired comparison: expected two equally long lists of positive costs, "
            f"found {a.size} and {b.size}"
        )
    logs = np.log(a / b)
    logs[np.abs(logs) <= SAME] = 0.0
    moved = logs[logs != 0]
    p_value = float(stats.wilcoxon(moved).pvalue) if moved.size else 1.0
    mean = bootstrap_interval(logs, seed=seed)
    change = Interval(*(float(np.expm1(value)) for value in (mean.estimate, mean.low, mean.high)))
    return Comparison(
        a.size, int((logs < 0).sum()), int((logs == 0).sum()), int((logs > 0).sum()), change, p_value
    )
