"""Depth-first branch and bound over one row program, in numba.

The objective is split as ``f(x) = xᵀPx + linᵀx + xᵀNx + constant`` on 0/1 points, with ``P`` positive
semidefinite on ``{e : 1ᵀe_b = 0}`` and ``N ≥ 0`` elementwise with a zero diagonal (``ConvexSplit``).
At a node the free variables relax to [0, 1] and N is dropped between free ones; row ``N_i`` returns as
a linear cost once ``x_i`` is fixed to 1. From any point ``x`` of the relaxation, with its gradient ``g``,

    f(z) ≥ φ(x) + gᵀ(z - x) ≥ φ(x) - gᵀx + Σ_blocks (sum of the smallest g_j, as many as ones are missing)

holds for every completion z, so the bound is valid however early the inner minimisation stops. The inner
minimisation makes pairwise (SMO) steps inside blocks. At each node a variable is fixed when its reduced
cost, the change of the sum when it enters or leaves the smallest ones, exceeds what is left to prune.

The search state lives in the arrays of ``Levels`` so that a search can pause and resume.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

# Positions in the integer state.
DEPTH, PHASE, NODES, LEAVES = 0, 1, 2, 3
# Phases: look at the node at this depth, or go back to the deepest pending sibling; DONE is final.
LOOK, BACK, DONE = 0, 1, 2
# Inner minimisation of a node stops when the duality gap is this share of what is missing to prune.
NODE_PRECISION = 2e-3
# Rounds of pair steps at a node whose relaxation is known to stay below the threshold.
ROUNDS, ROOT_ROUNDS = 6, 60
# Entries this close to 0 or 1 are set there: sums of blocks stay exact to rounding.
SNAP = 1e-13


class Levels(NamedTuple):
    """State of a search, one row per depth; ``n`` variables, ``blocks`` blocks.

    Attributes:
        free: indices of the free variables (depths, n); the first ``size`` count.
        x: point of the relaxation, by position (depths, n).
        g: gradient there, by position (depths, n).
        lin: linear costs, with those of the variables fixed to 1, by position (depths, n).
        value: -1 free, 0, 1, by variable (depths, n).
        starts: first position of each block (depths, blocks + 1).
        need: ones that each block still needs (depths, blocks).
        constant: cost of the variables fixed to 1 (depths,).
        bound: best bound of the node (depths,).
        position: which position was branched on (depths,).
        pending: value of the second child, -1 if it is done (depths,).
        state: depth, phase, nodes and leaves so far (4,).
        incumbent: best point (n,), bool.
        upper: its objective (1,).
    """

    free: npt.NDArray[np.int64]
    x: npt.NDArray[np.float64]
    g: npt.NDArray[np.float64]
    lin: npt.NDArray[np.float64]
    value: npt.NDArray[np.int8]
    starts: npt.NDArray[np.int64]
    need: npt.NDArray[np.int64]
    constant: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]
    position: npt.NDArray[np.int64]
    pending: npt.NDArray[np.int8]
    state: npt.NDArray[np.int64]
    incumbent: npt.NDArray[np.bool_]
    upper: npt.NDArray[np.float64]


def new_levels(
    P: npt.NDArray[np.float64],
    lin: npt.NDArray[np.float64],
    constant: float,
    starts: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    incumbent: npt.NDArray[np.bool_],
    upper: float,
) -> Levels:
    """State at the root: every variable free, the point in the middle of each block."""
    n, blocks, depths = len(lin), len(counts), len(lin) + 2
    levels = Levels(
        free=np.zeros((depths, n), dtype=np.int64),
        x=np.zeros((depths, n)),
        g=np.zeros((depths, n)),
        lin=np.zeros((depths, n)),
        value=np.full((depths, n), -1, dtype=np.int8),
        starts=np.zeros((depths, blocks + 1), dtype=np.int64),
        need=np.zeros((depths, blocks), dtype=np.int64),
        constant=np.zeros(depths),
        bound=np.full(depths, -np.inf),
        position=np.zeros(depths, dtype=np.int64),
        pending=np.full(depths, -1, dtype=np.int8),
        state=np.zeros(4, dtype=np.int64),
        incumbent=incumbent.copy(),
        upper=np.array([upper]),
    )
    sizes = np.diff(starts)
    levels.free[0] = np.arange(n)
    levels.x[0] = np.repeat(counts / np.maximum(sizes, 1), sizes)
    levels.lin[0] = lin
    levels.g[0] = 2 * (P @ levels.x[0]) + lin
    levels.starts[0] = starts
    levels.need[0] = counts
    levels.constant[0] = constant
    return levels


@numba.njit(cache=True)
def _smallest(values, count):  # type: ignore[no-untyped-def]
    """Partition ``values`` in place: the ``count`` smallest first (0 < count < len)."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if count - 1 <= j:
            high = j
        elif count - 1 >= i:
            low = i
        else:
            return


@numba.njit(cache=True)
def linearised(x, g, lin, constant, starts, need, inside, outside, scratch):  # type: ignore[no-untyped-def]
    """φ(x) and the bound from the tangent at x.

    Also fills, per block, the largest gradient among the chosen smallest ones (``inside``) and the
    smallest among the others (``outside``): the reduced costs are measured against them.
    """
    phi, tangent = constant, 0.0
    for k in range(starts[-1]):
        phi += 0.5 * x[k] * (g[k] + lin[k])
        tangent += g[k] * x[k]
    chosen = 0.0
    for block in range(len(need)):
        low, high, count = starts[block], starts[block + 1], need[block]
        if low == high:
            continue
        values = scratch[: high - low]
        values[:] = g[low:high]
        _smallest(values, count)
        largest = -np.inf
        for k in range(count):
            chosen += values[k]
            largest = max(largest, values[k])
        smallest = np.inf
        for k in range(count, high - low):
            smallest = min(smallest, values[k])
        inside[block] = largest
        outside[block] = smallest
    return phi, phi - tangent + chosen


@numba.njit(cache=True)
def _move(P, free, x, g, size, k, step):  # type: ignore[no-untyped-def]
    """x_k += step, with its effect on the gradient."""
    x[k] += step
    row = P[free[k]]
    for t in range(size):
        g[t] += 2.0 * step * row[free[t]]


@numba.njit(cache=True)
def _repair(P, free, x, g, starts, need):  # type: ignore[no-untyped-def]
    """Bring each block's sum back to its count, along the cheapest gradients first."""
    size = starts[-1]
    for block in range(len(need)):
        low, high = starts[block], starts[block + 1]
        missing = float(need[block])
        for k in range(low, high):
            missing -= x[k]
        while abs(missing) > SNAP and low < high:
            best = -1
            for k in range(low, high):
                if missing > 0 and x[k] < 1.0 and (best < 0 or g[k] < g[best]):
                    best = k
                if missing < 0 and x[k] > 0.0 and (best < 0 or g[k] > g[best]):
                    best = k
            if best < 0:
                break
            step = min(missing, 1.0 - x[best]) if missing > 0 else max(missing, -x[best])
            _move(P, free, x, g, size, best, step)
            missing -= step


@numba.njit(cache=True)
def _fix(P, N, free, x, g, lin, value, starts, need, decision):  # type: ignore[no-untyped-def]
    """Fix the positions whose ``decision`` is 0 or 1; returns the cost they add (NaN: impossible)."""
    size = starts[-1]
    has_n = N.shape[0] > 0
    added = 0.0
    for k in range(size):
        if decision[k] < 0:
            continue
        i = free[k]
        row = P[i]
        if decision[k] == 1:
            added += row[i] + lin[k]
            step = 1.0 - x[k]
            for t in range(size):
                j = free[t]
                lin[t] += 2.0 * row[j]
                g[t] += 2.0 * step * row[j]
            if has_n:
                other = N[i]
                for t in range(size):
                    lin[t] += 2.0 * other[free[t]]
                    g[t] += 2.0 * other[free[t]]
        elif x[k] != 0.0:
            for t in range(size):
                g[t] -= 2.0 * x[k] * row[free[t]]
        value[i] = decision[k]
    write = 0
    for block in range(len(need)):
        low, high = starts[block], starts[block + 1]
        starts[block] = write
        for k in range(low, high):
            if decision[k] == 1:
                need[block] -= 1
            elif decision[k] < 0:
                free[write] = free[k]
                x[write] = x[k]
                g[write] = g[k]
                lin[write] = lin[k]
                write += 1
        if need[block] < 0 or need[block] > write - starts[block]:
            return np.nan
    starts[len(need)] = write
    _repair(P, free, x, g, starts, need)
    return added


@numba.njit(cache=True)
def _pair_steps(P, free, x, g, starts, steps, smallest_gain):  # type: ignore[no-untyped-def]
    """About ``steps`` pairwise steps, cycling over the blocks; returns whether any moved."""
    size, blocks = starts[-1], len(starts) - 1
    moved_at_all = False
    for _ in range(max(1, steps // blocks)):
        moved = False
        for block in range(blocks):
            low, high = starts[block], starts[block + 1]
            i = -1
            for k in range(low, high):
                if x[k] < 1.0 and (i < 0 or g[k] < g[i]):
                    i = k
            if i < 0:
                continue
            row = P[free[i]]
            own, room = row[free[i]], 1.0 - x[i]
            gain, j, step = smallest_gain, -1, 0.0
            for k in range(low, high):
                if x[k] > 0.0 and g[k] > g[i]:
                    slope = g[k] - g[i]
                    curvature = 2.0 * (own + P[free[k], free[k]] - 2.0 * row[free[k]])
                    length = min(room, x[k])
                    if slope < curvature * length:
                        length = slope / curvature
                    decrease = length * (slope - 0.5 * curvature * length)
                    if decrease > gain:
                        gain, j, step = decrease, k, length
            if j < 0:
                continue
            moved = True
            x[i] += step
            x[j] -= step
            if x[j] < SNAP:
                x[j] = 0.0
            if x[i] > 1.0 - SNAP:
                x[i] = 1.0
            other = P[free[j]]
            for t in range(size):
                g[t] += 2.0 * step * (row[free[t]] - other[free[t]])
        moved_at_all |= moved
        if not moved:
            break
    return moved_at_all


@numba.njit(cache=True)
def minimise(P, lin, constant, starts, counts, x, precision, rounds):  # type: ignore[no-untyped-def]
    """Best tangent bound of the relaxation φ over [0, 1] with the block sums; ``x`` ends at the best point.

    Stops when the duality gap is ``precision`` of |φ|, or after ``rounds`` rounds of n / 2 + 4 pair steps.
    """
    n = len(lin)
    g = lin.copy()
    for i in range(n):
        if x[i] != 0.0:
            for j in range(n):
                g[j] += 2.0 * x[i] * P[i, j]
    free = np.arange(n)
    inside, outside, scratch = np.empty(len(counts)), np.empty(len(counts)), np.empty(n)
    best = -np.inf
    kept = x.copy()
    for _ in range(rounds):
        phi, lower = linearised(x, g, lin, constant, starts, counts, inside, outside, scratch)
        if lower > best:
            best = lower
            kept[:] = x
        if phi - best <= precision * abs(phi):
            break
        if not _pair_steps(P, free, x, g, starts, n // 2 + 4, 1e-15 * abs(phi)):
            break
    x[:] = kept
    return best


@numba.njit(cache=True)
def _leaf(Q, q, constant, value, levels):  # type: ignore[no-untyped-def]
    """Score a complete assignment with the original objective."""
    levels.state[LEAVES] += 1
    total = constant
    n = len(value)
    for i in range(n):
        if value[i] == 1:
            total += 2.0 * q[i]
            for j in range(n):
                if value[j] == 1:
                    total += Q[i, j]
    if total < levels.upper[0]:
        levels.upper[0] = total
        for i in range(n):
            levels.incumbent[i] = value[i] == 1


@numba.njit(cache=True)
def _forced(starts, need, decision):  # type: ignore[no-untyped-def]
    """Mark blocks that have no freedom left; returns whether there is one."""
    any_forced = False
    for block in range(len(need)):
        low, high = starts[block], starts[block + 1]
        if low < high and (need[block] == 0 or need[block] == high - low):
            any_forced = True
            for k in range(low, high):
                decision[k] = 0 if need[block] == 0 else 1
    return any_forced


@numba.njit(cache=True)
def _reduced_costs(x, g, starts, inside, outside, slack, decision):  # type: ignore[no-untyped-def]
    """Mark what a bound with ``slack`` left to the threshold fixes; returns whether there is any."""
    any_fixed = False
    for block in range(len(inside)):
        for k in range(starts[block], starts[block + 1]):
            if g[k] <= inside[block]:
                if outside[block] - g[k] >= slack and outside[block] > inside[block]:
                    decision[k] = 1
                    any_fixed = True
            elif g[k] - inside[block] >= slack:
                decision[k] = 0
                any_fixed = True
    return any_fixed


@numba.njit(cache=True)
def _look(P, N, Q, q, constant, levels, depth, relative, absolute, work):  # type: ignore[no-untyped-def]
    """Bound and reduce the node at ``depth``; returns the position to branch on, -1 if it is closed."""
    free, x, g, lin = levels.free[depth], levels.x[depth], levels.g[depth], levels.lin[depth]
    value, starts, need = levels.value[depth], levels.starts[depth], levels.need[depth]
    n, blocks = len(x), len(need)
    decision = np.empty(n, dtype=np.int8)
    inside, outside, scratch = np.empty(blocks), np.empty(blocks), np.empty(n)
    rounds, most = 0, ROOT_ROUNDS if depth == 0 else ROUNDS
    stuck = False
    while True:
        decision[:] = -1
        if _forced(starts, need, decision):
            levels.constant[depth] += _fix(P, N, free, x, g, lin, value, starts, need, decision)
            continue
        size = starts[-1]
        if size == 0:
            _leaf(Q, q, constant, value, levels)
            return -1
        phi, lower = linearised(x, g, lin, levels.constant[depth], starts, need, inside, outside, scratch)
        levels.bound[depth] = max(levels.bound[depth], lower)
        threshold = levels.upper[0] - max(relative * abs(levels.upper[0]), absolute)
        if levels.bound[depth] >= threshold:
            return -1
        if _reduced_costs(x, g, starts, inside, outside, threshold - lower, decision):
            added = _fix(P, N, free, x, g, lin, value, starts, need, decision)
            if np.isnan(added):
                return -1
            levels.constant[depth] += added
            rounds, stuck = 0, False
            continue
        missing = threshold - levels.bound[depth]
        if stuck or phi - levels.bound[depth] <= NODE_PRECISION * missing + 1e-9 * abs(threshold):
            break
        if phi < threshold:
            rounds += 1
            if rounds > most:
                break
        work[0] -= size * (size // 2 + 4)
        stuck = not _pair_steps(P, free, x, g, starts, size // 2 + 4, 1e-14 * abs(threshold))
    branch, best = 0, -1.0
    for k in range(starts[-1]):
        score = (Q[free[k], free[k]] + 1e-9 * abs(threshold)) * x[k] * (1.0 - x[k])
        if score > best:
            branch, best = k, score
    return branch


@numba.njit(cache=True)
def _child(P, N, levels, depth, branch):  # type: ignore[no-untyped-def]
    """Copy the node at ``depth`` to the next depth and fix the branching position; False if impossible."""
    size = levels.starts[depth, -1]
    levels.free[depth + 1, :size] = levels.free[depth, :size]
    levels.x[depth + 1, :size] = levels.x[depth, :size]
    levels.g[depth + 1, :size] = levels.g[depth, :size]
    levels.lin[depth + 1, :size] = levels.lin[depth, :size]
    levels.value[depth + 1] = levels.value[depth]
    levels.starts[depth + 1] = levels.starts[depth]
    levels.need[depth + 1] = levels.need[depth]
    levels.bound[depth + 1] = levels.bound[depth]
    levels.pending[depth + 1] = -1
    decision = np.full(size, -1, dtype=np.int8)
    decision[levels.position[depth]] = branch
    added = _fix(
        P,
        N,
        levels.free[depth + 1],
        levels.x[depth + 1],
        levels.g[depth + 1],
        levels.lin[depth + 1],
        levels.value[depth + 1],
        levels.starts[depth + 1],
        levels.need[depth + 1],
        decision,
    )
    levels.constant[depth + 1] = levels.constant[depth] + added
    return not np.isnan(added)


@numba.njit(cache=True)
def search(  # type: ignore[no-untyped-def]
    P, N, Q, q, constant, levels, relative, absolute, node_limit, work_limit
):
    """Search until the tree is done, ``node_limit`` nodes were seen or ``work_limit`` is used up.

    Args:
        P: convex part (n, n).
        N: nonnegative part (n, n), or (0, 0) for none.
        Q: quadratic term of the original program (n, n).
        q: its linear term (n,).
        constant: its constant.
        levels: the state, from ``new_levels``.
        relative: nodes within this share of the incumbent are closed.
        absolute: and nodes within this distance of it.
        node_limit: most nodes in all.
        work_limit: most gradient entries to update before it pauses.

    Returns:
        Whether the tree is done.
    """
    work = np.array([work_limit])
    state = levels.state
    while state[PHASE] != DONE and work[0] > 0:
        depth = state[DEPTH]
        if state[PHASE] == LOOK:
            if state[NODES] >= node_limit:
                return False
            state[NODES] += 1
            work[0] -= len(q)
            branch = _look(P, N, Q, q, constant, levels, depth, relative, absolute, work)
            if branch < 0:
                state[PHASE] = BACK
                continue
            levels.position[depth] = branch
            first = 1 if levels.x[depth, branch] >= 0.5 else 0
            levels.pending[depth] = 1 - first
            if _child(P, N, levels, depth, first):
                state[DEPTH] = depth + 1
            else:
                state[PHASE] = BACK
        else:
            while depth >= 0 and levels.pending[depth] < 0:
                depth -= 1
            if depth < 0:
                state[PHASE] = DONE
                break
            second = levels.pending[depth]
            levels.pending[depth] = -1
            state[DEPTH] = depth
            threshold = levels.upper[0] - max(relative * abs(levels.upper[0]), absolute)
            if levels.bound[depth] < threshold and _child(P, N, levels, depth, second):
                state[DEPTH] = depth + 1
                state[PHASE] = LOOK
    return state[PHASE] == DONE


def open_bound(levels: Levels) -> float:
    """Smallest bound of all nodes that are still open; infinite when the tree is done."""
    depth, phase = int(levels.state[DEPTH]), int(levels.state[PHASE])
    if phase == DONE:
        return float("inf")
    lowest = levels.bound[depth] if phase == LOOK else np.inf
    above = levels.bound[: depth + 1][levels.pending[: depth + 1] >= 0]
    return float(min(lowest, above.min(initial=np.inf)))
