"""Swaps of units that lower the error after least squares, to a certified local optimum.

With ``B`` and ``Ŵ`` of the kept columns (see ``kept_inverse``) and ``V = B A_KP``, dropping ``u`` and adding
``p`` changes the error after the update by

    tr S Ŵ_u B_uu⁻¹ Ŵ_uᵀ - tr S r' s'⁻¹ r'ᵀ,
    s' = s_p + V_upᵀ B_uu⁻¹ V_up,      r' = r_p + Ŵ_u B_uu⁻¹ V_up,

exactly, for all pairs at once from products of matrices that an iteration makes anyway. The best pair is
exchanged until none lowers the error.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.units import UnitProblem
from ..base import Budget, Status
from .base import UnitOutcome, UnitSolver
from .kept_inverse import KeptInverse
from .structured_obs import StructuredOBS

# A decrease below this share of the error is rounding: the error itself is a difference of sums that large.
LEAST_DECREASE = 1e-9
# Swaps before both matrices are made anew.
REFRESH = 64


@final
@dataclass(frozen=True)
class DropAddSwap(UnitSolver):
    """1-swap search on the error after least squares, from a warm start or from structured OBS.

    Args:
        max_swaps: 0 for as many as lower the error.

    Stats: ``swaps``.
    """

    name: ClassVar[str] = "drop-add-swap"

    max_swaps: int = 0

    def __post_init__(self) -> None:
        if self.max_swaps < 0:
            raise InputError(f"swaps are a count: expected at least 0, found {self.max_swaps}")

    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """Exchange the best pair again and again."""
        deadline = budget.deadline()
        if init is None:
            init = StructuredOBS().run(problem, None, budget).kept
        state = KeptInverse(problem, init)
        least = LEAST_DECREASE * problem.total
        swaps, fresh = 0, True
        while True:
            if time.monotonic() > deadline:
                return UnitOutcome(state.kept, Status.TIME_LIMIT, {"swaps": swaps})
            change, drop, add = best_pair(problem, state)
            if change >= -least:
                if fresh:
                    return UnitOutcome(state.kept, Status.LOCAL_OPTIMUM, {"swaps": swaps})
                state.refresh()  # what many updates have left in the matrices is not to end a search
                fresh = True
                continue
            if self.max_swaps and swaps == self.max_swaps:
                return UnitOutcome(state.kept, Status.ITERATION_LIMIT, {"swaps": swaps})
            state.drop(drop)
            state.add(add)
            swaps += 1
            fresh = swaps % REFRESH == 0
            if fresh:
                state.refresh()


def best_pair(problem: UnitProblem, state: KeptInverse) -> tuple[float, int, int]:
    """The change of the error after the update by the best swap, the unit it drops and the one it adds."""
    changes = swap_changes(problem, state)
    best = int(changes.argmin())
    kept, pruned = state.kept.nonzero()[:, 0], (~state.kept).nonzero()[:, 0]
    drop, add = kept[best // len(pruned)], pruned[best % len(pruned)]
    return float(changes.flatten()[best]), int(drop), int(add)


def swap_changes(problem: UnitProblem, state: KeptInverse) -> Tensor:
    """Change of the error after the update by every swap (kept units, pruned units), inf across blocks."""
    kept, pruned = state.kept.nonzero()[:, 0], (~state.kept).nonzero()[:, 0]
    width, count = problem.width, (len(kept), len(pruned))
    inside, outside = problem.columns[kept].flatten(), problem.columns[pruned].flatten()
    across = problem.ridged[inside][:, outside]
    through = state.inverse[inside][:, inside] @ across
    missing = problem.target[:, outside] - state.weight[:, inside] @ across
    own = state.blocks(state.inverse, kept)  # B_uu
    weights = state.weight_products(kept)  # Ŵ_uᵀ S Ŵ_u
    schur = _schur(problem, across, through, pruned)
    wanted = torch.einsum(
        "rpa,rpb->pab",
        missing.view(len(missing), -1, width),
        problem.weighed(missing).view(len(missing), -1, width),
    )
    mixed = (problem.weighed(state.weight)[:, inside].T @ missing).view(count[0], width, count[1], width)
    solved = torch.linalg.inv(own)  # B_uu⁻¹
    shares = torch.einsum("uab,ubpc->upac", solved, through.view(count[0], width, count[1], width))
    crossed = torch.einsum("uapb,upac->upbc", mixed, shares)
    after = wanted + crossed + crossed.mT
    after = after + torch.einsum("upac,uab,upbd->upcd", shares, weights, shares)
    grown = schur + torch.einsum("uapc,upad->upcd", through.view(count[0], width, count[1], width), shares)
    gains = (after / grown)[..., 0, 0] if width == 1 else _trace(torch.linalg.solve(grown, after))
    changes = _trace(solved @ weights)[:, None] - gains
    block = problem.pattern.block
    return changes.masked_fill((kept // block)[:, None] != (pruned // block)[None], torch.inf)


def _schur(problem: UnitProblem, across: Tensor, through: Tensor, pruned: Tensor) -> Tensor:
    """``s_p = A_pp - A_pK B A_Kp`` (len(pruned), width, width)."""
    columns = problem.columns[pruned]
    own = problem.ridged[columns[:, :, None], columns[:, None, :]]
    shape = (len(across), len(pruned), problem.width)
    return own - torch.einsum("kpa,kpb->pab", across.view(shape), through.view(shape))


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
