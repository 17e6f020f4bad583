"""Thanos: all weights that a row loses in a block of columns go at once, and its others make up for them.

Ilin and Richtárik, *Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model Compression*,
arXiv 2504.05346, algorithm 1, with the constants of the authors' program. Blocks of ``blocksize`` columns are
visited from left to right. With ``H = G + λ I`` and the columns before j fixed, a row w that loses its
weights S of the block at j becomes the w' of least ``(w' - w) H (w' - w)ᵀ`` over all columns from j on,

    w_{j:} ← w_{j:} - μ K_{S,:},    μ K_{S,S} = w_S,    K = (H_{j:,j:})⁻¹

a system of |S| equations for each row. SparseGPT goes column by column, and what it has pruned in a block is
made up for by weights that it prunes later; here by those that stay alone.

Which weights of a block are pruned follows from Wanda's score ``|w_j| ‖X_j‖`` with the weights as they are
when the block is reached:

- A layer budget: of *all columns from there on* as many are marked as the layer still has to prune, and
  those in the block are pruned (the authors' global residual mask).
- Equal sparsity per row: the published choice does not give it; here each row marks what it has to prune.
- N:M: in each group of M columns the M - N of lowest score.

As in `sparsegpt`, ``(H_{j:,j:})⁻¹ = U_{j:,j:}ᵀ U_{j:,j:}`` for the triangular factor of ``H⁻¹``: one
factorisation is all the inverses that the authors compute. Rows that they can leave dense (*outlier rows*, a
share α) have no N:M pattern; this is α = 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ...problems.pattern import Coupling, Pattern
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status
from .sparsegpt import inverse_factor

# Entries of the systems of equations that are solved at once.
BATCH_ENTRIES = 1 << 23


@final
@dataclass(frozen=True)
class Thanos(Solver):
    """Prune block by block of columns, several weights of a row at once (see the module).

    It sees the Gram matrix alone: drift, output metric and warm start do not enter. Channels whose input is
    always zero lose their weights, as in `sparsegpt`.

    Args:
        blocksize: columns per block; rounded to groups of M for N:M patterns.
        damping: share of the mean diagonal of G that is added to its diagonal.

    Raises:
        InvalidProblemError: if the damped Gram matrix cannot be factored; more damping helps.
    """

    name: ClassVar[str] = "thanos"
    group: ClassVar[Group] = Group.WEIGHT_UPDATE
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, metric=True, rows_alone=False)

    blocksize: int = 512
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.blocksize < 1:
            raise InputError(f"a block of thanos has columns: expected at least 1, found {self.blocksize}")
        if not self.damping >= 0:
            raise InputError(f"damping of thanos is a share: expected at least 0, found {self.damping:g}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """One pass over the blocks; a time limit before its end leaves no mask."""
        deadline = budget.deadline()
        factor = inverse_factor(problem, self.damping, self.name)
        pattern = problem.pattern
        weight = problem.weight.double().masked_fill(problem.gram.dead, 0)
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        group = pattern.block if _grouped(pattern, problem.cols) else 1
        width = max(1, self.blocksize // group) * group
        for first in range(0, problem.cols, width):
            if time.monotonic() >= deadline:
                return Outcome(None, Status.TIME_LIMIT)
            block = slice(first, min(first + width, problem.cols))
            scores = weight[:, first:].abs() * problem.gram.scale[first:]
            mask[:, block] = _kept(scores, mask[:, :first], pattern)[:, : block.stop - first]
            inverse = factor[block, block].T @ factor[block, first:]
            weight[:, first:] -= _multipliers(weight[:, block], ~mask[:, block], inverse) @ inverse
            weight[:, block] = weight[:, block].masked_fill(~mask[:, block], 0)
            budget.report(block.stop * problem.rows // problem.cols, problem.rows)
        return Outcome(mask, Status.FINISHED, weight=weight.to(problem.weight.dtype))


def _grouped(pattern: Pattern, cols: int) -> bool:
    return pattern.couples is Coupling.BLOCK and not pattern.is_per_row(cols)


def _kept(scores: Tensor, before: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the remaining columns (rows, remaining), if they were pruned now.

    Args:
        scores: of the remaining columns (rows, remaining).
        before: mask of the columns before them (rows, columns).
        pattern: of the layer.
    """
    rows, remaining = scores.shape
    if _grouped(pattern, before.shape[1] + remaining):
        return pattern.top_k(scores)
    each = pattern.block - pattern.keep
    if pattern.couples is Coupling.LAYER:
        lines, left = scores.reshape(1, -1), (each * rows - (~before).sum()).reshape(1, 1)
    else:
        lines, left = scores, each - (~before).sum(1, keepdim=True)
    # of equal scores the lowest index is kept
    order = lines.flip(1).argsort(dim=1, stable=True)
    stays = torch.arange(lines.shape[1], device=scores.device) >= left
    kept = torch.zeros_like(lines, dtype=torch.bool).scatter_(1, lines.shape[1] - 1 - order, stays)
    return kept.view_as(scores)


def _multipliers(weight: Tensor, pruned: Tensor, inverse: Tensor) -> Tensor:
    """``μ`` of each row (rows, columns), 0 where a weight is kept.

    Args:
        weight: of the block (rows, columns).
        pruned: of the block (rows, columns), bool.
        inverse: first rows of ``(H_{j:,j:})⁻¹`` (columns, remaining).
    """
    multipliers = torch.zeros_like(weight)
    counts = pruned.sum(1, keepdim=True)
    most = int(counts.max())
    if most == 0:
        return multipliers
    # pruned columns first, in their order
    indices = (~pruned).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    valid = torch.arange(most, device=weight.device) < counts
    targets = weight.gather(1, indices).masked_fill(~valid, 0)
    for start in range(0, len(weight), max(1, BATCH_ENTRIES // most**2)):
        rows = slice(start, start + max(1, BATCH_ENTRIES // most**2))
        chosen, real = indices[rows], valid[rows]
        systems = inverse[chosen[:, :, None], chosen[:, None, :]]
        # what only fills a row up stands alone in its equation
        systems.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
        found = torch.linalg.solve(systems, targets[rows, :, None])[..., 0]
        multipliers[rows] = multipliers[rows].scatter(1, chosen, found.masked_fill(~real, 0))
    return multipliers
