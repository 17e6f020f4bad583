"""SparseGPT: mask and weights in one pass over the columns.

Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*, ICML 2023,
Algorithm 1. With ``H = G + λ I``, ``H⁻¹ = Uᵀ U`` and U upper triangular, the first row of ``(H_{j:,j:})⁻¹``,
the inverse once the columns before j are fixed, is ``U_jj U_{j,j:}``. Columns are visited from left to right;
where the mask prunes w_j all later weights of the row make up for it (the OBS update),

    e = w_j / U_jj,      w_{j:} ← w_{j:} - e U_{j,j:}

lazily: inside a block of ``blocksize`` columns at once, behind it when the block is done. The mask of a block
is chosen when its first column is reached, by what pruning a weight would cost then: ``w_j² / U_jj²``.

Which weights of a block are pruned:

- N:M: in each group of M columns the M - N cheapest, when its first column is reached, as published.
- A layer budget: the cheapest of the block's weights *of all rows*, as published; the numbers of the blocks
  add up to the exact budget (the published code's threshold ``≤`` may prune one more per block).
- Equal sparsity per row: the published choice does not give it. Here each row prunes its cheapest weights of
  the block, and the blocks' numbers, shared in proportion to their columns, add up to the pattern.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError, InvalidProblemError
from ...problems.layer import LayerProblem
from ...problems.pattern import Coupling
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status
from ..scores import warm_start

MASKS = ("adaptive", "fixed")


@final
@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prune column by column and let the later weights of the row make up for it (see the module).

    It sees the Gram matrix alone: drift and output metric do not enter. Channels whose input is always zero
    lose their weights, as in the published code; its diagonal entry of 1 for them, which moves the mean that
    damping is a share of, depends on the scale of the data and is the mean of the others here. Nothing makes
    the result better than the mask with its old weights, though it nearly always is.

    Args:
        blocksize: columns per block; rounded to groups of M for N:M patterns.
        damping: share of the mean diagonal of G that is added to its diagonal.
        mask: ``adaptive``, or ``fixed`` to update the weights of ``init``'s (or Wanda's) mask only.

    Raises:
        InvalidProblemError: if the damped Gram matrix cannot be factored; more damping helps.
    """

    name: ClassVar[str] = "sparsegpt"
    group: ClassVar[Group] = Group.WEIGHT_UPDATE
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, metric=True, rows_alone=False)

    blocksize: int = 128
    damping: float = 0.01
    mask: str = "adaptive"

    def __post_init__(self) -> None:
        if self.blocksize < 1:
            raise InputError(f"a block of sparsegpt has columns: expected at least 1, found {self.blocksize}")
        if not self.damping >= 0:
            raise InputError(f"damping of sparsegpt is a share: expected at least 0, found {self.damping:g}")
        if self.mask not in MASKS:
            raise InputError(f"mask of sparsegpt: expected {' or '.join(MASKS)}, found {self.mask!r}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """One pass over the columns; a time limit before its end leaves no mask."""
        deadline = budget.deadline()
        factor = inverse_factor(problem, self.damping, self.name)
        choice = _Choice(problem, warm_start(problem, init) if self.mask == "fixed" else None)
        weight = problem.weight.double().masked_fill(problem.gram.dead, 0)
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        width = choice.blocks_of(self.blocksize)
        for first in range(0, problem.cols, width):
            if time.monotonic() >= deadline:
                return Outcome(None, Status.TIME_LIMIT)
            block = slice(first, min(first + width, problem.cols))
            errors = _prune_block(weight, mask, factor, block, choice)
            weight[:, block.stop :] -= errors @ factor[block, block.stop :]
            budget.report(block.stop * problem.rows // problem.cols, problem.rows)
        new = weight.masked_fill(~mask, 0).to(problem.weight.dtype)
        return Outcome(mask, Status.FINISHED, weight=new)


def inverse_factor(problem: LayerProblem, damping: float, solver: str) -> Tensor:
    """``U`` (cols, cols), upper triangular with ``Uᵀ U = (G + λ I)⁻¹``, float64.

    Args:
        problem: the layer; channels whose input is always zero get the mean diagonal of the others.
        damping: λ, as a share of that mean.
        solver: who asks, for messages.

    Raises:
        InvalidProblemError: if the damped Gram matrix cannot be factored.
    """
    hessian = problem.gram.matrix.clone()
    dead = problem.gram.dead
    diagonal = hessian.diagonal()
    size = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal.masked_fill_(dead, size)
    diagonal += damping * size
    lower, info = torch.linalg.cholesky_ex(hessian)
    if int(info) == 0:
        upper: Tensor
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(info) == 0 and bool(torch.isfinite(upper).all()):
            return upper
    label = f"layer {problem.name!r}" if problem.name else "the layer"
    raise InvalidProblemError(
        f"{solver} factors the Gram matrix of {label}: expected it positive definite with a damping of "
        f"{damping:g} of its mean diagonal, found a matrix that is not; use more damping"
    )


class _Choice:
    """Which weights are pruned, asked for when their columns are reached."""

    def __init__(self, problem: LayerProblem, fixed: Tensor | None) -> None:
        self._pattern = problem.pattern
        self._fixed = fixed
        self._cols = problem.cols
        self._grouped = problem.pattern.couples is Coupling.BLOCK and not problem.pattern.is_per_row(
            problem.cols
        )

    def blocks_of(self, blocksize: int) -> int:
        """``blocksize`` rounded to whole groups of the pattern."""
        group = self._pattern.block if self._grouped else 1
        return max(1, blocksize // group) * group

    def opens(self, column: int, first: bool) -> int:
        """For how many columns from ``column`` on the mask is chosen there; 0 for none."""
        if self._grouped:
            return self._pattern.block if column % self._pattern.block == 0 else 0
        return self._cols if first else 0

    def kept(self, costs: Tensor, first: int) -> Tensor:
        """Mask of the columns from ``first`` on, given what pruning them costs (rows, columns)."""
        last = first + costs.shape[1]
        if self._fixed is not None:
            return self._fixed[:, first:last]
        lines = costs.reshape(1, -1) if self._pattern.couples is Coupling.LAYER else costs
        pruned = self._pruned(len(costs) // len(lines), last) - self._pruned(len(costs) // len(lines), first)
        kept = torch.ones_like(lines, dtype=torch.bool)
        # ties go to the highest index, so that the lowest is kept
        cheapest = lines.flip(1).argsort(dim=1, stable=True)[:, :pruned]
        return kept.scatter_(1, lines.shape[1] - 1 - cheapest, False).view_as(costs)

    def _pruned(self, rows: int, column: int) -> int:
        """How many weights of ``rows`` rows together are pruned left of ``column``."""
        pattern = self._pattern
        return rows * (pattern.block - pattern.keep) * column // pattern.block


def _prune_block(weight: Tensor, mask: Tensor, factor: Tensor, block: slice, choice: _Choice) -> Tensor:
    """Prune the columns of ``block`` in place; returns their errors ``e`` (rows, columns).

    Args:
        weight: present weights (rows, cols), float64.
        mask: kept weights so far (rows, cols), bool.
        factor: U (cols, cols).
        block: columns.
        choice: which weights are pruned.
    """
    now = weight[:, block]
    errors = torch.zeros_like(now)
    part = factor[block, block]
    for i in range(now.shape[1]):
        column = block.start + i
        if opened := choice.opens(column, first=i == 0):
            ahead = slice(i, min(i + opened, now.shape[1]))
            costs = (now[:, ahead] / part.diagonal()[ahead]).square()
            mask[:, column : column + costs.shape[1]] = choice.kept(costs, column)
        errors[:, i] = now[:, i].masked_fill(mask[:, column], 0) / part[i, i]
        now[:, i:] -= errors[:, i, None] * part[i, i:]
    return errors
