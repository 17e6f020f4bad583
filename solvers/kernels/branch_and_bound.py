"""Depth-first branch and bound over one row program, in numba.

The objective is split as ``f(x) = xᵀPx + linᵀx + xᵀNx + Σ_t μ_t s_t(x) + constant`` on 0/1 points, with
``P`` positive semidefinite on ``{e : 1ᵀe_b = 0}``, ``N ≥ 0`` elementwise with a zero diagonal and slacks
``s_t ≥ 0`` of triangle inequalities (``ConvexSplit``). At a node the free variables relax to [0, 1] and what
is never negative is dropped between free ones; row ``N_i`` returns as a linear cost once ``x_i`` is fixed to
1, a slack once two of its variables are fixed. From any ``x`` of the relaxation, with its gradient ``g``,

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
# Rounds of pair steps at a node whose relaxation is known to stay below the threshold: below the root the
# sharper point would save a tenth of the nodes and cost a quarter of the time.
ROUNDS, ROOT_ROUNDS = 0, 60
# Pair steps per round: the number of free variables over this, and a few more.
STEPS_SHARE = 4
# A pair with less curvature than this exchanges all it can.
FLAT = 1e-300
# Compiler freedoms that keep infinities and signs but let loops over a block run in vector registers.
FAST = {"reassoc", "contract", "arcp"}
# Entries this close to 0 or 1 are set there: sums of blocks stay exact to rounding.
SNAP = 1e-13


class Dropped(NamedTuple):
    """The terms of a split that are never negative; ``n`` variables, ``m`` triangles.

    Attributes:
        nonnegative: ``N`` (n, n), or (0, 0) for none.
        corners: variables of each triangle, the centre first (m, 3).
        kinds: 0 or 1 (m,), as in ``bounds.triangles``.
        weights: ``μ`` (m,).
        first: where the triangles of each variable start in ``members``, and their end (n + 1,).
        members: triangles by variable (3 m,).
    """

    nonnegative: npt.NDArray[np.float64]
    corners: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int8]
    weights: npt.NDArray[np.float64]
    first: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]


def new_dropped(
    n: int,
    nonnegative: npt.NDArray[np.float64],
    corners: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int8],
    weights: npt.NDArray[np.float64],
) -> Dropped:
    """The terms with the triangles listed by variable."""
    flat = corners.ravel()
    first = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=n))]).astype(np.int64)
    members = np.argsort(flat, kind="stable").astype(np.int64) // 3
    return Dropped(nonnegative, corners, kinds, weights, first, members)


class Levels(NamedTuple):
    """State of a search, one row per depth; ``n`` variables, ``blocks`` blocks.

    Fixed variables stay in the arrays: loops over whole rows of P are much faster than gathered ones.

    Attributes:
        x: point of the relaxation (depths, n).
        g: gradient there (depths, n).
        lin: linear costs, with those of the variables fixed to 1 (depths, n).
        open: 1.0 where a variable is free, else 0.0 (depths, n).
        value: -1 free, 0, 1 (depths, n).
        need: ones that each block still needs (depths, blocks).
        left: free variables of each block (depths, blocks).
        constant: what returned slacks add (depths,).
        bound: best bound of the node (depths,).
        branch: variable that was branched on (depths,).
        pending: value of the second child, -1 if it is done (depths,).
        starts: first variable of each block and their end (blocks + 1,).
        state: depth, phase, nodes and leaves so far (4,).
        incumbent: best point (n,), bool.
        upper: its objective (1,).
    """

    x: npt.NDArray[np.float64]
    g: npt.NDArray[np.float64]
    lin: npt.NDArray[np.float64]
    open: npt.NDArray[np.float64]
    value: npt.NDArray[np.int8]
    need: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    constant: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]
    branch: npt.NDArray[np.int64]
    pending: npt.NDArray[np.int8]
    starts: npt.NDArray[np.int64]
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
        x=np.zeros((depths, n)),
        g=np.zeros((depths, n)),
        lin=np.zeros((depths, n)),
        open=np.ones((depths, n)),
        value=np.full((depths, n), -1, dtype=np.int8),
        need=np.zeros((depths, blocks), dtype=np.int64),
        left=np.zeros((depths, blocks), dtype=np.int64),
        constant=np.zeros(depths),
        bound=np.full(depths, -np.inf),
        branch=np.zeros(depths, dtype=np.int64),
        pending=np.full(depths, -1, dtype=np.int8),
        starts=starts.astype(np.int64),
        state=np.zeros(4, dtype=np.int64),
        incumbent=incumbent.copy(),
        upper=np.array([upper]),
    )
    sizes = np.diff(starts)
    levels.x[0] = np.repeat(counts / np.maximum(sizes, 1), sizes)
    levels.lin[0] = lin
    levels.g[0] = 2 * (P @ levels.x[0]) + lin
    levels.need[0] = counts
    levels.left[0] = sizes
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
def linearised(x, g, lin, open, constant, starts, need, left, inside, outside, scratch):  # type: ignore[no-untyped-def]
    """φ(x) and the bound from the tangent at x.

    Also fills, per block with freedom, the largest gradient among the chosen smallest ones (``inside``) and
    the smallest among the others (``outside``): the reduced costs are measured against them.
    """
    phi, tangent = 0.0, 0.0
    for k in range(len(x)):
        phi += x[k] * (g[k] + lin[k])
        tangent += open[k] * g[k] * x[k]
    phi = constant + 0.5 * phi
    chosen = 0.0
    for block in range(len(need)):
        if left[block] == 0:
            continue
        size, count = 0, need[block]
        for k in range(starts[block], starts[block + 1]):
            if open[k] > 0.0:
                scratch[size] = g[k]
                size += 1
        values = scratch[:size]
        _smallest(values, count)
        largest = -np.inf
        for k in range(count):
            chosen += values[k]
            largest = max(largest, values[k])
        smallest = np.inf
        for k in range(count, size):
            smallest = min(smallest, values[k])
        inside[block] = largest
        outside[block] = smallest
    return phi, phi - tangent + chosen


@numba.njit(cache=True)
def _move(P, x, g, k, step):  # type: ignore[no-untyped-def]
    """x_k += step, with its effect on the gradient."""
    x[k] += step
    row = P[k]
    twice = 2.0 * step
    for t in range(len(g)):
        g[t] += twice * row[t]


@numba.njit(cache=True)
def _repair(P, x, g, open, starts, need, left):  # type: ignore[no-untyped-def]
    """Bring each block's sum back to its count, along the cheapest gradients first."""
    for block in range(len(need)):
        if left[block] == 0:
            continue
        low, high = starts[block], starts[block + 1]
        missing = float(need[block])
        for k in range(low, high):
            missing -= open[k] * x[k]
        while abs(missing) > SNAP:
            best = -1
            for k in range(low, high):
                if open[k] == 0.0:
                    continue
                if missing > 0 and x[k] < 1.0 and (best < 0 or g[k] < g[best]):
                    best = k
                if missing < 0 and x[k] > 0.0 and (best < 0 or g[k] > g[best]):
                    best = k
            if best < 0:
                break
            step = min(missing, 1.0 - x[best]) if missing > 0 else max(missing, -x[best])
            _move(P, x, g, best, step)
            missing -= step


@numba.njit(cache=True)
def slack(kind, x, y, z):  # type: ignore[no-untyped-def]
    """Slack of a triangle inequality at numbers 0 and 1, ``x`` being the centre."""
    if kind == 0:
        return x + y * z - x * y - x * z
    return 1 - x - y - z + x * y + x * z + y * z


@numba.njit(cache=True)
def _return_slacks(dropped, i, value, g, lin):  # type: ignore[no-untyped-def]
    """Slacks that fixing ``x_i`` leaves with one free variable become its cost; returns the constant."""
    added = 0.0
    for entry in range(dropped.first[i], dropped.first[i + 1]):
        t = dropped.members[entry]
        a, b, c = dropped.corners[t]
        free = (value[a] < 0) + (value[b] < 0) + (value[c] < 0)
        if free != 1:
            continue
        j = a if value[a] < 0 else (b if value[b] < 0 else c)
        value[j] = 0
        none = slack(dropped.kinds[t], value[a], value[b], value[c])
        value[j] = 1
        change = dropped.weights[t] * (slack(dropped.kinds[t], value[a], value[b], value[c]) - none)
        value[j] = -1
        added += dropped.weights[t] * none
        g[j] += change
        lin[j] += change
    return added


@numba.njit(cache=True)
def _fix(P, dropped, x, g, lin, open, value, starts, need, left, decision):  # type: ignore[no-untyped-def]
    """Fix the variables whose ``decision`` is 0 or 1; returns the constant they add (NaN: impossible)."""
    N = dropped.nonnegative
    has_n = N.shape[0] > 0
    has_triangles = len(dropped.weights) > 0
    added = 0.0
    for block in range(len(need)):
        for i in range(starts[block], starts[block + 1]):
            if decision[i] < 0 or value[i] >= 0:
                continue
            value[i] = decision[i]
            open[i] = 0.0
            left[block] -= 1
            step = decision[i] - x[i]
            if step != 0.0:
                _move(P, x, g, i, step)
                x[i] = decision[i]
            if decision[i] == 1:
                need[block] -= 1
                if has_n:
                    row = N[i]
                    for t in range(len(g)):
                        cost = 2.0 * open[t] * row[t]
                        lin[t] += cost
                        g[t] += cost
            if has_triangles:
                added += _return_slacks(dropped, i, value, g, lin)
        if need[block] < 0 or need[block] > left[block]:
            return np.nan
    _repair(P, x, g, open, starts, need, left)
    return added


@numba.njit(cache=True, fastmath=FAST)
def _best_partner(row, diagonal, x, g, open, gains, i):  # type: ignore[no-untyped-def]
    """The variable whose exchange with ``i`` lowers φ most, by how much and with which step."""
    own, room, slope_i = diagonal[i], 1.0 - x[i], g[i]
    for k in range(len(x)):
        slope = max(g[k] - slope_i, 0.0)
        curvature = max(2.0 * (own + diagonal[k] - 2.0 * row[k]), FLAT)
        length = min(min(room, open[k] * x[k]), slope / curvature)
        gains[k] = length * (slope - 0.5 * curvature * length)
    j = 0
    for k in range(len(x)):
        if gains[k] > gains[j]:
            j = k
    slope = g[j] - slope_i
    curvature = max(2.0 * (own + diagonal[j] - 2.0 * row[j]), FLAT)
    return j, gains[j], min(min(room, x[j]), slope / curvature)


@numba.njit(cache=True)
def _pair_steps(P, diagonal, x, g, open, starts, left, gains, steps, smallest_gain):  # type: ignore[no-untyped-def]
    """About ``steps`` pairwise steps, cycling over the blocks; returns whether any moved."""
    active = 0
    for block in range(len(left)):
        active += left[block] > 0
    moved_at_all = False
    for _ in range(max(1, steps // max(1, active))):
        moved = False
        for block in range(len(left)):
            if left[block] == 0:
                continue
            # slices from 0 on, because an index that could be negative keeps loops out of vector registers
            low, high = starts[block], starts[block + 1]
            x_b, g_b, open_b = x[low:high], g[low:high], open[low:high]
            i, lowest = -1, np.inf
            for k in range(len(x_b)):
                if g_b[k] < lowest and x_b[k] < 1.0 and open_b[k] > 0.0:
                    i, lowest = k, g_b[k]
            if i < 0:
                continue
            row = P[low + i]
            j, gain, step = _best_partner(
                row[low:high], diagonal[low:high], x_b, g_b, open_b, gains[low:high], i
            )
            if not gain > smallest_gain:
                continue
            moved = True
            x_b[i] += step
            x_b[j] -= step
            if x_b[j] < SNAP:
                x_b[j] = 0.0
            if x_b[i] > 1.0 - SNAP:
                x_b[i] = 1.0
            other = P[low + j]
            twice = 2.0 * step
            for t in range(len(g)):
                g[t] += twice * (row[t] - other[t])
        moved_at_all |= moved
        if not moved:
            break
    return moved_at_all


@numba.njit(cache=True)
def minimise(P, lin, constant, starts, counts, x, precision, rounds):  # type: ignore[no-untyped-def]
    """Best tangent bound of the relaxation φ over [0, 1] with the block sums; ``x`` ends at the best point.

    Stops when the duality gap is ``precision`` of |φ|, or after ``rounds`` rounds of n / 2 + 4 pair steps.
    """
    n, blocks = len(lin), len(counts)
    g = lin.copy()
    for i in range(n):
        if x[i] != 0.0:
            for j in range(n):
                g[j] += 2.0 * x[i] * P[i, j]
    diagonal = np.diag(P).copy()
    left = starts[1:] - starts[:-1]
    free, gains, scratch = np.ones(n), np.empty(n), np.empty(n)
    inside, outside = np.empty(blocks), np.empty(blocks)
    best = -np.inf
    kept = x.copy()
    for _ in range(rounds):
        phi, lower = linearised(x, g, lin, free, constant, starts, counts, left, inside, outside, scratch)
        if lower > best:
            best = lower
            kept[:] = x
        if phi - best <= precision * abs(phi):
            break
        if not _pair_steps(P, diagonal, x, g, free, starts, left, gains, n // 2 + 4, 1e-15 * abs(phi)):
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
def _forced(starts, need, left, value, decision):  # type: ignore[no-untyped-def]
    """Mark blocks that have no freedom left; returns whether there is one."""
    any_forced = False
    for block in range(len(need)):
        if left[block] > 0 and (need[block] == 0 or need[block] == left[block]):
            any_forced = True
            for k in range(starts[block], starts[block + 1]):
                if value[k] < 0:
                    decision[k] = 0 if need[block] == 0 else 1
    return any_forced


@numba.njit(cache=True)
def _reduced_costs(g, value, starts, left, inside, outside, slack, decision):  # type: ignore[no-untyped-def]
    """Mark what a bound with ``slack`` left to the threshold fixes; returns whether there is any."""
    any_fixed = False
    for block in range(len(inside)):
        if left[block] == 0:
            continue
        for k in range(starts[block], starts[block + 1]):
            if value[k] >= 0:
                continue
            if g[k] <= inside[block]:
                if outside[block] - g[k] >= slack and outside[block] > inside[block]:
                    decision[k] = 1
                    any_fixed = True
            elif g[k] - inside[block] >= slack:
                decision[k] = 0
                any_fixed = True
    return any_fixed


@numba.njit(cache=True)
def _look(P, diagonal, dropped, Q, q, constant, levels, depth, relative, absolute, work):  # type: ignore[no-untyped-def]
    """Bound and reduce the node at ``depth``; returns the variable to branch on, -1 if it is closed."""
    x, g, lin, open = levels.x[depth], levels.g[depth], levels.lin[depth], levels.open[depth]
    value, need, left = levels.value[depth], levels.need[depth], levels.left[depth]
    starts = levels.starts
    n, blocks = len(x), len(need)
    decision = np.empty(n, dtype=np.int8)
    gains, scratch = np.empty(n), np.empty(n)
    inside, outside = np.empty(blocks), np.empty(blocks)
    rounds, most = 0, ROOT_ROUNDS if depth == 0 else ROUNDS
    stuck = False
    while True:
        decision[:] = -1
        if _forced(starts, need, left, value, decision):
            levels.constant[depth] += _fix(P, dropped, x, g, lin, open, value, starts, need, left, decision)
            continue
        size = left.sum()
        if size == 0:
            _leaf(Q, q, constant, value, levels)
            return -1
        phi, lower = linearised(
            x, g, lin, open, levels.constant[depth], starts, need, left, inside, outside, scratch
        )
        levels.bound[depth] = max(levels.bound[depth], lower)
        threshold = levels.upper[0] - max(relative * abs(levels.upper[0]), absolute)
        if levels.bound[depth] >= threshold:
            return -1
        if _reduced_costs(g, value, starts, left, inside, outside, threshold - lower, decision):
            added = _fix(P, dropped, x, g, lin, open, value, starts, need, left, decision)
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
        steps = size // STEPS_SHARE + 4
        work[0] -= n * steps
        stuck = not _pair_steps(P, diagonal, x, g, open, starts, left, gains, steps, 1e-14 * abs(threshold))
    branch, best = -1, -1.0
    for k in range(n):
        if value[k] < 0:
            score = (Q[k, k] + 1e-9 * abs(threshold)) * x[k] * (1.0 - x[k])
            if score > best:
                branch, best = k, score
    return branch


@numba.njit(cache=True)
def _child(P, dropped, levels, depth, branch):  # type: ignore[no-untyped-def]
    """Copy the node at ``depth`` to the next depth and fix the branching variable; False if impossible."""
    levels.x[depth + 1] = levels.x[depth]
    levels.g[depth + 1] = levels.g[depth]
    levels.lin[depth + 1] = levels.lin[depth]
    levels.open[depth + 1] = levels.open[depth]
    levels.value[depth + 1] = levels.value[depth]
    levels.need[depth + 1] = levels.need[depth]
    levels.left[depth + 1] = levels.left[depth]
    levels.bound[depth + 1] = levels.bound[depth]
    levels.pending[depth + 1] = -1
    decision = np.full(levels.x.shape[1], -1, dtype=np.int8)
    decision[levels.branch[depth]] = branch
    added = _fix(
        P,
        dropped,
        levels.x[depth + 1],
        levels.g[depth + 1],
        levels.lin[depth + 1],
        levels.open[depth + 1],
        levels.value[depth + 1],
        levels.starts,
        levels.need[depth + 1],
        levels.left[depth + 1],
        decision,
    )
    levels.constant[depth + 1] = levels.constant[depth] + added
    return not np.isnan(added)


@numba.njit(cache=True)
def search(  # type: ignore[no-untyped-def]
    P, dropped, Q, q, constant, levels, relative, absolute, node_limit, work_limit
):
    """Search until the tree is done, ``node_limit`` nodes were seen or ``work_limit`` is used up.

    Args:
        P: convex part (n, n).
        dropped: what is never negative.
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
    diagonal = np.diag(P).copy()
    while state[PHASE] != DONE and work[0] > 0:
        depth = state[DEPTH]
        if state[PHASE] == LOOK:
            if state[NODES] >= node_limit:
                return False
            state[NODES] += 1
            work[0] -= len(q)
            branch = _look(P, diagonal, dropped, Q, q, constant, levels, depth, relative, absolute, work)
            if branch < 0:
                state[PHASE] = BACK
                continue
            levels.branch[depth] = branch
            first = 1 if levels.x[depth, branch] >= 0.5 else 0
            levels.pending[depth] = 1 - first
            if _child(P, dropped, levels, depth, first):
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
            if levels.bound[depth] < threshold and _child(P, dropped, levels, depth, second):
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
