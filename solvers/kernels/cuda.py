"""The descent on CUDA devices: Triton, one program per row. Twin of ``reference.descend``.

Each program descends its row to the end without a word from the host, so rows that converge early free
their place for others. State beside ``R`` is ``q``, ``δ`` and the mask, O(rows · cols). The certificate
needs no ``R`` for most pairs: for each kept u the bound of its whole line,

    q_u + min_p (q_p - 2 s_u s_p),     s_j = |y_j| √ρ_j,     |R_up| ≤ √(ρ_u ρ_p),

comes from ``q`` and ``s`` alone, and only lines whose bound beats the incumbent are read.
Costs come from float64 products; float32 products, which a setting may turn into tf32, are not used.
Greedy, tabu walks and exchanges between rows run the torch reference on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .interface import Descent, DescentOptions, ScaledProblem, unsolved
from .reference import best_swaps, exchange_rows, prune
from .scaling import NARROW_BLOCK, RANKS, REFRESHES, rounding_noise

__all__ = ["best_swaps", "descend", "exchange_rows", "prune"]

# Columns that a program looks at together, and kept weights whose bounds it computes together.
BLOCK = 1024
LINES = 16
LINE_BLOCK = 256
# Incremental updates of q are renewed after this many swaps per column.
SWAPS_PER_REFRESH = 4
# Columns of R that are widened to float64 together.
COST_COLS = 1024
# Above every Δ, with room for updates; float64 uses the same.
BIG = 1e30


def descend(
    problem: ScaledProblem,
    mask: Tensor,
    options: DescentOptions,
    deadline: float = float("inf"),
    report: Callable[[int], None] | None = None,
) -> Descent:
    """Descend row by row, see ``reference.descend``; halves the batch of rows when memory runs out."""
    if options.patience:
        return reference.descend(problem, mask, options, deadline, report)
    root = problem.root().contiguous()
    rows = len(mask)
    size = rows
    first = 0
    parts: list[Descent] = []
    while first < rows:
        batch = slice(first, min(first + size, rows))
        try:
            part = _descend_batch(problem.rows(batch), root, mask[batch], options, deadline)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            torch.cuda.empty_cache()
            continue
        parts.append(part)
        if report is not None:
            report(batch.stop - batch.start)
        first = batch.stop
    return Descent(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _descend_batch(
    problem: ScaledProblem, root: Tensor, mask: Tensor, options: DescentOptions, deadline: float
) -> Descent:
    """Descend some rows; a refresh of the costs between launches, as in the specification."""
    found = unsolved(mask)
    mask, swaps, converged, resolved, error = found
    limit = torch.zeros_like(error)
    active = torch.arange(len(mask), device=mask.device)
    most = torch.iinfo(torch.int64).max if options.max_swaps is None else options.max_swaps
    for refresh in range(REFRESHES):
        if time.monotonic() >= deadline or not len(active):
            break
        part, kept = problem.rows(active), mask[active]
        cost = _costs(part, kept)
        if refresh == 0:
            pruned = part.weight.double().masked_fill(kept, 0)
            start = (pruned * (cost if part.drift is None else cost + part.drift.double())).sum(1)
            error[:] = (start + (0 if part.constant is None else part.constant.double())).clamp_min(0)
            limit[:] = options.tolerance * error / 2
        noise = rounding_noise(part.weight, part.drift, kept)
        if part.weight.dtype == torch.float32:
            clear = noise <= limit[active]
            resolved[active[~clear]] = False
            active, part, kept, cost = active[clear], part.rows(clear), kept[clear], cost[clear]
        else:
            limit[active] = torch.maximum(limit[active], noise)
        if not len(active):
            break
        left = (most - swaps[active]).clamp_max(SWAPS_PER_REFRESH * mask.shape[1])
        made, none_left = launch(part, root, cost, kept, limit[active], left, options.search)
        mask[active] = kept
        swaps[active] += made
        converged[active[none_left & (made == 0)]] = True
        active = active[(made > 0) & (none_left | (swaps[active] < most))]
    else:
        resolved[active] = False
    return found


def _costs(problem: ScaledProblem, mask: Tensor) -> Tensor:
    """``c = R (y∘(1-m)) + h`` (rows, cols) from products in float64."""
    weight = problem.weight
    cost = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    if problem.drift is not None:
        cost += problem.drift
    for first in range(0, weight.shape[1], COST_COLS):
        part = slice(first, first + COST_COLS)
        pruned = weight[:, part].double().masked_fill(mask[:, part], 0)
        cost.addmm_(pruned, problem.correlation[part].double())
    return cost


def launch(
    problem: ScaledProblem,
    root: Tensor,
    cost: Tensor,
    mask: Tensor,
    limit: Tensor,
    most: Tensor,
    search: str,
) -> tuple[Tensor, Tensor]:
    """Run the kernel: (swaps made (rows,), rows in which no swap is left (rows,)).

    Args:
        problem: the rows.
        root: ``√ρ`` (cols,), rounded up.
        cost: ``c`` (rows, cols), float64.
        mask: kept weights (rows, cols), the result.
        limit: Δ must be below ``-limit`` (rows,).
        most: the most swaps (rows,).
        search: ``lazy`` or ``best``.
    """
    weight = problem.weight
    rows, cols = weight.shape
    delta = torch.where(mask, weight, -weight).contiguous()
    wide = delta.double()
    q = (wide * wide + 2 * wide * cost).to(weight.dtype).contiguous()
    flags = mask.to(torch.int8).contiguous()
    made = torch.zeros(rows, dtype=torch.int64, device=weight.device)
    none_left = torch.zeros(rows, dtype=torch.int32, device=weight.device)
    descend_rows[(rows,)](
        problem.correlation.contiguous(),
        root,
        q,
        delta,
        flags,
        limit.to(weight.dtype).contiguous(),
        most.contiguous(),
        made,
        none_left,
        cols,
        problem.block,
        NARROW=problem.block <= NARROW_BLOCK,
        STEEPEST=search == "best",
        **kernel_options(),
    )
    mask.copy_(flags.bool())
    return made, none_left.bool()


def kernel_options() -> dict[str, Any]:
    """Compile-time constants of the kernel."""
    return {"MAX_RANKS": RANKS, "TOP": BIG, "WIDE": BLOCK, "LINES": LINES, "LINE_WIDE": LINE_BLOCK}


@triton.jit
def lowest(q, flags, flag, first, last, TOP: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lowest index of the minimum of ``q`` over [first, last) where ``flags`` equals ``flag``."""
    best = tl.full((WIDE,), TOP, q.dtype.element_ty)
    index = tl.zeros((WIDE,), tl.int32) + last
    for start in range(first, last, WIDE):
        j = start + tl.arange(0, WIDE)
        inside = j < last
        value = tl.load(q + j, mask=inside, other=TOP)
        chosen = inside & (tl.load(flags + j, mask=inside, other=-1) == flag)
        better = chosen & (value < best)
        best = tl.where(better, value, best)
        index = tl.where(better, j, index)
    low = tl.min(best, 0)
    return tl.min(tl.where(best == low, index, last), 0)


@triton.jit
def line(  # type: ignore[no-untyped-def]
    q, delta, flags, entries, factor, kept, first, last, TOP: tl.constexpr, WIDE: tl.constexpr
):
    """Minimum of ``q_j + factor δ_j R_j`` over [first, last) where the weight is ``kept``: (value, index)."""
    best = tl.full((WIDE,), TOP, q.dtype.element_ty)
    index = tl.zeros((WIDE,), tl.int32) + last
    for start in range(first, last, WIDE):
        j = start + tl.arange(0, WIDE)
        inside = j < last
        step = tl.load(delta + j, mask=inside, other=0.0)
        value = tl.load(q + j, mask=inside, other=TOP)
        value += factor * step * tl.load(entries + j, mask=inside, other=0.0)
        chosen = inside & ((tl.load(flags + j, mask=inside, other=-1) & 1) == kept)
        better = chosen & (value < best)
        best = tl.where(better, value, best)
        index = tl.where(better, j, index)
    low = tl.min(best, 0)
    return low, tl.min(tl.where(best == low, index, last), 0)


@triton.jit
def narrow(  # type: ignore[no-untyped-def]
    R, q, delta, flags, limit, cols, block, WIDE: tl.constexpr
):
    """Best swap below ``limit`` inside narrow blocks: (Δ, u, p), u = -1 if there is none."""
    best = tl.zeros((WIDE,), q.dtype.element_ty) + limit
    pair = tl.full((WIDE,), -1, tl.int64)
    for start in range(0, cols, WIDE):
        u = start + tl.arange(0, WIDE)
        inside = u < cols
        base = u // block * block
        of_u = tl.load(q + u, mask=inside, other=0.0)
        step_u = 2 * tl.load(delta + u, mask=inside, other=0.0)
        kept = inside & (tl.load(flags + u, mask=inside, other=0) == 1)
        for offset in range(0, block):
            p = base + offset
            valid = kept & (tl.load(flags + p, mask=inside, other=1) == 0)
            value = of_u + tl.load(q + p, mask=inside, other=0.0)
            value += (
                step_u
                * tl.load(delta + p, mask=inside, other=0.0)
                * tl.load(R + u.to(tl.int64) * cols + p, mask=valid, other=0.0)
            )
            better = valid & (value < best)
            best = tl.where(better, value, best)
            pair = tl.where(better, u.to(tl.int64) * cols + p, pair)
    low = tl.min(best, 0)
    last_pair = cols.to(tl.int64) * cols
    chosen = tl.min(tl.where((best == low) & (pair >= 0), pair, last_pair), 0)
    found = chosen < last_pair
    u = tl.where(found, (chosen // cols).to(tl.int32), -1)
    p = tl.where(found, (chosen % cols).to(tl.int32), -1)
    return low, u, p


@triton.jit
def exact(  # type: ignore[no-untyped-def]
    R,
    root,
    q,
    delta,
    flags,
    best,
    best_u,
    best_p,
    cols,
    first,
    last,
    TOP: tl.constexpr,
    WIDE: tl.constexpr,
    LINES: tl.constexpr,
    LINE_WIDE: tl.constexpr,
):
    """The best swap of a block if it is at least as good as the incumbent (Δ, u, p)."""
    for start in range(first, last, LINES):
        u = start + tl.arange(0, LINES)
        inside = u < last
        kept = inside & (tl.load(flags + u, mask=inside, other=0) == 1)
        of_u = tl.load(q + u, mask=inside, other=0.0)
        reach = tl.abs(tl.load(delta + u, mask=inside, other=0.0)) * tl.load(root + u, mask=inside, other=0.0)
        low = tl.full((LINES,), TOP, q.dtype.element_ty)
        for left in range(first, last, LINE_WIDE):
            p = left + tl.arange(0, LINE_WIDE)
            within = p < last
            free = within & (tl.load(flags + p, mask=within, other=1) == 0)
            of_p = tl.where(free, tl.load(q + p, mask=within, other=0.0), TOP)
            width = tl.abs(tl.load(delta + p, mask=within, other=0.0))
            width *= tl.load(root + p, mask=within, other=0.0)
            low = tl.minimum(low, tl.min(of_p[None, :] - 2 * reach[:, None] * width[None, :], 1))
        # as much slack as the sum may lose
        bound = tl.where(kept, of_u + low - 1e-6 * (tl.abs(of_u) + tl.abs(low)), TOP)
        lowest_bound = tl.min(bound, 0)
        while lowest_bound <= best:
            chosen = tl.min(tl.where(bound == lowest_bound, u, last), 0)
            factor = 2 * tl.load(delta + chosen)
            _, p = line(q, delta, flags, R + chosen.to(tl.int64) * cols, factor, 0, first, last, TOP, WIDE)
            at = tl.minimum(p, last - 1)
            change = tl.load(q + chosen) + tl.load(q + at)
            change += factor * tl.load(delta + at) * tl.load(R + chosen.to(tl.int64) * cols + at)
            better = (p < last) & ((change < best) | ((change == best) & ((best_u < 0) | (chosen < best_u))))
            best = tl.where(better, change, best)
            best_u = tl.where(better, chosen, best_u)
            best_p = tl.where(better, p, best_p)
            bound = tl.where(u == chosen, TOP, bound)
            lowest_bound = tl.min(bound, 0)
    return best, best_u, best_p


@triton.jit
def descend_rows(  # type: ignore[no-untyped-def]
    R,
    root,
    q,
    delta,
    flags,
    limits,
    most,
    made_of,
    none_left_of,
    cols,
    block,
    NARROW: tl.constexpr,
    STEEPEST: tl.constexpr,
    MAX_RANKS: tl.constexpr,
    TOP: tl.constexpr,
    WIDE: tl.constexpr,
    LINES: tl.constexpr,
    LINE_WIDE: tl.constexpr,
):
    """Descend one row per program, see the module.

    ``flags`` (rows, cols): 1 kept, 0 pruned; 2 is added while a weight's line has been tried. ``q`` and
    ``delta`` (rows, cols) are work space; ``made_of`` and ``none_left_of`` (rows,) are results.
    """
    row = tl.program_id(0).to(tl.int64)
    q += row * cols
    delta += row * cols
    flags += row * cols
    limit = -tl.load(limits + row)
    left = tl.load(most + row)
    made = tl.zeros((), tl.int64)
    none_left = tl.zeros((), tl.int32)
    going = left >= 0
    while going:
        best = limit
        best_u = tl.full((), -1, tl.int32)
        best_p = tl.full((), -1, tl.int32)
        if NARROW:
            best, best_u, best_p = narrow(R, q, delta, flags, limit, cols, block, WIDE)
        else:
            rank = tl.zeros((), tl.int32)
            ranks = tl.full((), 1 if STEEPEST else MAX_RANKS, tl.int32)
            while (rank < ranks) & (best_u < 0):
                for first in range(0, cols, block):
                    last = first + block
                    u0 = lowest(q, flags, 1, first, last, TOP, WIDE)
                    p0 = lowest(q, flags, 0, first, last, TOP, WIDE)
                    has_u = u0 < last
                    has_p = p0 < last
                    u0 = tl.minimum(u0, last - 1)
                    p0 = tl.minimum(p0, last - 1)
                    row_u = R + u0.to(tl.int64) * cols
                    row_p = R + p0.to(tl.int64) * cols
                    step_u = 2 * tl.load(delta + u0)
                    step_p = 2 * tl.load(delta + p0)
                    _, p1 = line(q, delta, flags, row_u, step_u, 0, first, last, TOP, WIDE)
                    _, u1 = line(q, delta, flags, row_p, step_p, 1, first, last, TOP, WIDE)
                    has_u &= p1 < last
                    has_p &= u1 < last
                    p1 = tl.minimum(p1, last - 1)
                    u1 = tl.minimum(u1, last - 1)
                    change = tl.load(q + u0) + tl.load(q + p1)
                    change += step_u * tl.load(delta + p1) * tl.load(row_u + p1)
                    other = tl.load(q + u1) + tl.load(q + p0)
                    other += step_p * tl.load(delta + u1) * tl.load(row_p + u1)
                    change = tl.where(has_u, change, TOP)
                    other = tl.where(has_p, other, TOP)
                    swapped = other < change
                    change = tl.minimum(change, other)
                    better = change < best
                    best = tl.where(better, change, best)
                    best_u = tl.where(better, tl.where(swapped, u1, u0), best_u)
                    best_p = tl.where(better, tl.where(swapped, p0, p1), best_p)
                    tl.debug_barrier()
                    tl.store(flags + u0, (tl.load(flags + u0) | 2).to(tl.int8))
                    tl.store(flags + p0, (tl.load(flags + p0) | 2).to(tl.int8))
                    tl.debug_barrier()
                rank += 1
            for start in range(0, cols, WIDE):
                j = start + tl.arange(0, WIDE)
                inside = j < cols
                tl.store(flags + j, tl.load(flags + j, mask=inside, other=0) & 1, mask=inside)
            tl.debug_barrier()
            if STEEPEST or best_u < 0:
                for first in range(0, cols, block):
                    best, best_u, best_p = exact(
                        R,
                        root,
                        q,
                        delta,
                        flags,
                        best,
                        best_u,
                        best_p,
                        cols,
                        first,
                        first + block,
                        TOP,
                        WIDE,
                        LINES,
                        LINE_WIDE,
                    )
        improves = (best_u >= 0) & (best < limit)
        none_left = tl.where(improves, 0, 1).to(tl.int32)
        going = improves & (made < left)
        if going:
            row_u = R + best_u.to(tl.int64) * cols
            row_p = R + best_p.to(tl.int64) * cols
            step_u = tl.load(delta + best_u)
            step_p = tl.load(delta + best_p)
            cross = 2 * step_u * step_p * tl.load(row_u + best_p)
            q_u = -tl.load(q + best_u) - cross
            q_p = -tl.load(q + best_p) - cross
            tl.debug_barrier()
            for start in range(0, cols, WIDE):
                j = start + tl.arange(0, WIDE)
                inside = j < cols
                change = 2 * step_u * tl.load(row_u + j, mask=inside, other=0.0)
                change += 2 * step_p * tl.load(row_p + j, mask=inside, other=0.0)
                value = tl.load(q + j, mask=inside, other=0.0)
                value += tl.load(delta + j, mask=inside, other=0.0) * change
                value = tl.where(j == best_u, q_u, tl.where(j == best_p, q_p, value))
                tl.store(q + j, value, mask=inside)
            tl.debug_barrier()
            tl.store(delta + best_u, -step_u)
            tl.store(delta + best_p, -step_p)
            tl.store(flags + best_u, tl.zeros((), tl.int8))
            tl.store(flags + best_p, tl.full((), 1, tl.int8))
            tl.debug_barrier()
            made += 1
    tl.store(made_of + row, made)
    tl.store(none_left_of + row, none_left)
