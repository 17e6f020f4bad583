"""The descent on CUDA devices: Triton, one program per row. Twin of ``reference.descend``.

Each program descends its row without a word from the host, so rows that converge early free their place for
others (see ``triton_loops``). A launch has a bounded number of rows and of swaps: between launches come
deadlines, progress and interruptions. Costs come from float64 products (see ``batch``); float32 products,
which a setting may turn into tf32, are not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .batch import costs, descend_batch
from .exchange_rounds import exchange_rows
from .interface import BestSwaps, Descent, DescentOptions, ScaledProblem, unsolved
from .reference import levels_of, prune
from .scaling import BOUND_ROUNDING, LEVELS, NARROW_BLOCK, RANKS, probes
from .triton_loops.programs import best_of_rows, descend_rows, walk_rows

__all__ = ["best_swaps", "descend", "exchange_rows", "prune"]

# Rows that are searched together, and the most swaps that each makes before the host looks at the clock.
LAUNCH_ROWS = 4096
LAUNCH_SWAPS = 1024
# Columns that a program looks at together.
TILE = 512
# Levels are reduced over this many columns, and whole lines are searched so many at a time over as many.
LEVEL_TILE = 64
LINES = 16
# Above every Δ, with room for updates; float64 uses the same.
TOP = 1e30
WARPS = 4


def descend(
    problem: ScaledProblem,
    mask: Tensor,
    options: DescentOptions,
    deadline: float = float("inf"),
    report: Callable[[int], None] | None = None,
) -> Descent:
    """Descend row by row, see ``reference.descend``; halves the batch of rows when memory runs out."""
    root = problem.root().contiguous()
    steps = _Steps(options, root, deadline)

    def work(rows: slice) -> Descent:
        found = unsolved(mask[rows])
        descend_batch(problem.rows(rows), found, options, deadline, steps)
        if report is not None:
            report(len(found.mask))
        return found

    parts = in_batches(work, len(mask))
    return Descent(*(torch.cat(column) for column in zip(*parts, strict=True)))


def best_swaps(problem: ScaledProblem, mask: Tensor) -> BestSwaps:
    """The swap with the lowest Δ of each row, see ``reference.best_swaps``."""
    root = problem.root().contiguous()

    def work(rows: slice) -> BestSwaps:
        part, kept = problem.rows(rows), mask[rows]
        state = _State(part, root, costs(part, kept), kept)
        change = torch.empty(len(kept), dtype=part.weight.dtype, device=kept.device)
        pruned, restored = (torch.empty(len(kept), dtype=torch.int32, device=kept.device) for _ in range(2))
        with on(kept.device):
            best_of_rows[(len(kept),)](
                *state.pair_arguments(), change, pruned, restored, *state.widths, **state.constants
            )
        found = pruned >= 0
        return BestSwaps(
            change.double().masked_fill(~found, torch.inf),
            pruned.long().clamp_min(0),
            restored.long().clamp_min(0),
        )

    parts = in_batches(work, len(mask))
    return BestSwaps(*(torch.cat(column) for column in zip(*parts, strict=True)))


def in_batches(work: Callable[[slice], Any], rows: int) -> list[Any]:
    """``work`` on ``LAUNCH_ROWS`` rows at a time, on half as many whenever memory runs out."""
    size = min(rows, LAUNCH_ROWS)
    first = 0
    parts = []
    while first < rows:
        batch = slice(first, min(first + size, rows))
        try:
            parts.append(work(batch))
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            torch.cuda.empty_cache()
            continue
        first = batch.stop
    return parts


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _State:
    """What the programs know of some rows, see ``triton_loops``; arguments in the order of the programs."""

    def __init__(
        self, problem: ScaledProblem, root: Tensor, cost: Tensor, mask: Tensor, all_pairs: bool = True
    ) -> None:
        weight, block = problem.weight, problem.block
        rows, cols = weight.shape
        self.R = problem.correlation.contiguous()
        self.narrow = block <= NARROW_BLOCK
        one = block == cols
        self.inside, self.root = self.R, root
        self.delta = torch.where(mask, weight, -weight).contiguous()
        wide = self.delta.double()
        self.q = wide.mul(cost).mul_(2).addcmul_(wide, wide).to(weight.dtype).contiguous()
        self.flags = mask.to(torch.int8).contiguous()
        self.widths = (cols, block)
        self.constants: dict[str, Any] = {
            "NARROW": self.narrow,
            "ONE": one,
            **launch_options(),
            **tiles(cols, block),
        }
        # stand-ins where lines are not searched for all pairs
        self.level = self.levels = self.lows = self.bounds = self.queue = self.q
        if self.narrow:
            self.inside = torch.cat([self.R[i : i + block, i : i + block] for i in range(0, cols, block)])
            self.inside = self.inside.contiguous()
        elif all_pairs:
            self.levels, level = levels_of(weight.abs() * root)
            self.level = level.to(torch.int8)
            self.lows = weight.new_empty(rows, cols // block * (LEVELS + 1))
            self.bounds = torch.empty_like(self.q)
            self.queue = torch.empty(self.q.shape, dtype=torch.int32, device=weight.device)

    def pair_arguments(self) -> tuple[Tensor, ...]:
        """``R`` and the state."""
        searched = (self.level, self.levels, self.lows, self.bounds, self.queue)
        return (self.R, self.inside, self.root, self.q, self.delta, self.flags, *searched)


def launch_options() -> dict[str, Any]:
    """Options of the compiler: without fusion, products and sums are rounded as in the specification."""
    return {"num_warps": WARPS, "enable_fp_fusion": False}


def tiles(cols: int, block: int) -> dict[str, int | float]:
    """Compile-time constants of the programs for rows of ``cols`` columns in blocks of ``block``."""

    def part(size: int) -> tuple[int, int]:
        wide = min(size, triton.next_power_of_2(block))
        return size // wide, wide

    blocks, wide = part(TILE)
    level_blocks, level_wide = part(LEVEL_TILE)
    return {
        "PROBES": probes(cols),
        "LEVELS": LEVELS,
        "SLACK": BOUND_ROUNDING,
        "TOP": TOP,
        "BLOCKS": blocks,
        "WIDE": wide,
        "CHUNK": min(TILE, triton.next_power_of_2(cols)),
        "LEVEL_BLOCKS": level_blocks,
        "LEVEL_WIDE": level_wide,
        "LINES": LINES,
        "LINE_WIDE": level_wide,
    }


@dataclass(frozen=True, eq=False)
class _Steps:
    """Steps of a search on the device, see ``batch``."""

    options: DescentOptions
    root: Tensor
    deadline: float

    def swap(
        self, problem: ScaledProblem, cost: Tensor, mask: Tensor, limit: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Swap until none is left, ``LAUNCH_SWAPS`` at a time."""
        state = _State(problem, self.root, cost, mask)
        left = left.clone()
        total = torch.zeros_like(left)
        none_left = torch.zeros(len(mask), dtype=torch.int32, device=mask.device)
        limit = limit.to(problem.weight.dtype).contiguous()
        going = torch.ones_like(mask[:, 0])
        constants = {**state.constants, "STEEPEST": self.options.search == "best", "RANKS": RANKS}
        while bool(going.any()) and time.monotonic() < self.deadline:
            most = left.clamp_max(LAUNCH_SWAPS).masked_fill(~going, -1)
            made, calm = torch.zeros_like(left), none_left.clone()
            with on(mask.device):
                descend_rows[(len(mask),)](
                    *state.pair_arguments(), limit, most, made, calm, *state.widths, **constants
                )
            none_left = torch.where(going, calm, none_left)
            total += made
            left -= made
            going &= (none_left == 0) & (left > 0)
        mask.copy_(state.flags == 1)
        return total, none_left.bool()

    def walk(
        self, problem: ScaledProblem, cost: Tensor, mask: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Walk from some optima."""
        rows = len(mask)
        state = _State(problem, self.root, cost, mask, all_pairs=False)
        best = state.flags.clone()
        held = torch.full((rows, 2 * self.options.tenure), -1, dtype=torch.int32, device=mask.device)
        moves, gained = (torch.zeros(rows, dtype=torch.int32, device=mask.device) for _ in range(2))
        walked = ("NARROW", "TOP", "BLOCKS", "WIDE", "CHUNK", *launch_options())
        if rows:
            with on(mask.device):
                walk_rows[(rows,)](
                    state.R, state.inside, state.root, state.q, state.delta, state.flags,
                    held, best, limit, moves, gained,
                    self.options.patience, self.options.tenure, *state.widths,
                    **{name: state.constants[name] for name in walked},
                )  # fmt: skip
        return best == 1, moves.long(), gained.bool()
