"""Iterated local search on one row program, in numba.

With ``f(x) = xᵀQx + 2qᵀx`` and ``c = Qx + q``, keeping pruned ``u`` and pruning kept ``v`` changes f by

    Δ(u, v) = Q_uu - 2 c_u + Q_vv + 2 c_v - 2 Q_uv,      then  c ← c + Q_:v - Q_:u

(SparseSwaps, arXiv 2512.10922, section 3, in the variables of the row program). Swaps stay inside a block.
"""

from __future__ import annotations

import numba
import numpy as np

# A swap below this share of |f| is rounding.
RELATIVE_IMPROVEMENT = 1e-12


@numba.njit(cache=True)
def best_swap(Q, c, x, starts, tabu, now, aspiration):  # type: ignore[no-untyped-def]
    """Best (u, v, Δ): tabu swaps count only if Δ < ``aspiration``; u = -1 if there is none."""
    best, best_u, best_v = np.inf, -1, -1
    for block in range(len(starts) - 1):
        low, high = starts[block], starts[block + 1]
        for u in range(low, high):
            if not x[u]:
                continue
            part = Q[u, u] - 2.0 * c[u]
            for v in range(low, high):
                if x[v]:
                    continue
                change = part + Q[v, v] + 2.0 * c[v] - 2.0 * Q[u, v]
                if change < best and (change < aspiration or (tabu[u] <= now and tabu[v] <= now)):
                    best, best_u, best_v = change, u, v
    return best_u, best_v, best


@numba.njit(cache=True)
def _swap(Q, c, x, u, v):  # type: ignore[no-untyped-def]
    x[u] = False
    x[v] = True
    for j in range(len(c)):
        c[j] += Q[v, j] - Q[u, j]


@numba.njit(cache=True)
def _costs(Q, q, x):  # type: ignore[no-untyped-def]
    """``c = Qx + q`` and f(x)."""
    c = q.copy()
    for i in range(len(x)):
        if x[i]:
            for j in range(len(c)):
                c[j] += Q[i, j]
    value = 0.0
    for i in range(len(x)):
        if x[i]:
            value += c[i] + q[i]
    return c, value


@numba.njit(cache=True)
def _descend(Q, q, x, starts, untouched):  # type: ignore[no-untyped-def]
    """Best swaps until none improves; returns f.

    Rounding of the updated costs is relative to the largest f on the way, so each pass accepts what is
    above that and the next one starts from fresh costs.
    """
    c, value = _costs(Q, q, x)
    while True:
        begun = value
        smallest = RELATIVE_IMPROVEMENT * abs(begun)
        moved = False
        while True:
            u, v, change = best_swap(Q, c, x, starts, untouched, 0, -np.inf)
            if u < 0 or change >= -smallest:
                break
            _swap(Q, c, x, u, v)
            moved = True
        if not moved:
            return value
        c, value = _costs(Q, q, x)
        if value >= begun - smallest:
            return value


@numba.njit(cache=True)
def _tabu(Q, q, x, best, best_value, starts, tenure, patience):  # type: ignore[no-untyped-def]
    """Swap tabu: always the best allowed swap, until ``patience`` moves in a row improve nothing."""
    c, value = _costs(Q, q, x)
    tabu = np.zeros(len(x), dtype=np.int64)
    now, idle = 1, 0
    smallest = RELATIVE_IMPROVEMENT * abs(best_value)
    while idle < patience:
        u, v, change = best_swap(Q, c, x, starts, tabu, now, best_value - value - smallest)
        if u < 0:
            break
        _swap(Q, c, x, u, v)
        value += change
        tabu[u] = now + tenure
        tabu[v] = now + tenure
        now += 1
        idle += 1
        if value < best_value - smallest:
            c, value = _costs(Q, q, x)
            if value < best_value - smallest:
                best_value = value
                best[:] = x
                idle = 0
    return best_value


@numba.njit(cache=True)
def _draw(state, bound):  # type: ignore[no-untyped-def]
    """A number below ``bound`` (splitmix64: Steele, Lea, Flood, OOPSLA 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.int64((z >> np.uint64(1)) % np.uint64(bound))


@numba.njit(cache=True)
def _member(x, low, size, pruned, state):  # type: ignore[no-untyped-def]
    """A random variable of a block that is pruned or kept; -1 if there is none."""
    shift = _draw(state, size)
    for k in range(size):
        j = low + (shift + k) % size
        if x[j] == pruned:
            return j
    return -1


@numba.njit(cache=True)
def search(Q, q, starts, x, kicks, strength, tenure, patience, seed):  # type: ignore[no-untyped-def]
    """Descent and tabu from ``x``, then ``kicks`` times: random swaps, descent, keep if better.

    Args:
        Q: (n, n) float64.
        q: (n,) float64.
        starts: block boundaries (blocks + 1,).
        x: start (n,), bool; left as it is.
        kicks: how many kicks.
        strength: random swaps per kick, at most.
        tenure: moves for which a swapped variable stays.
        patience: non-improving tabu moves before it stops, 0 for no tabu.
        seed: of the kicks.

    Returns:
        The best point (n,), bool.
    """
    state = np.array([seed], dtype=np.uint64)
    point = x.copy()
    untouched = np.zeros(len(x), dtype=np.int64)
    best_value = _descend(Q, q, point, starts, untouched)
    best = point.copy()
    if patience > 0:
        best_value = _tabu(Q, q, point, best, best_value, starts, tenure, patience)
    for _ in range(kicks):
        point[:] = best
        for _ in range(2 + _draw(state, max(1, strength - 1))):
            block = _draw(state, len(starts) - 1)
            low, size = starts[block], starts[block + 1] - starts[block]
            u = _member(point, low, size, True, state)
            v = _member(point, low, size, False, state)
            if u >= 0 and v >= 0:
                point[u] = False
                point[v] = True
        value = _descend(Q, q, point, starts, untouched)
        if value < best_value - RELATIVE_IMPROVEMENT * abs(best_value):
            best_value = value
            best[:] = point
    return best
