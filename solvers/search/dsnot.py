"""Dynamic Sparse no Training: masks refined by the expected error of each output.

Zhang et al., *Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs*, ICLR 2024. With the
means ``μ`` and variances ``σ²`` of the input channels, the error that an output makes on average over a
window of L tokens is

    e = L Σ_pruned w_j μ_j

Each cycle moves a row's e towards 0 with one swap: grow (restore) the pruned weight that is first by
``w_j μ_j / σ_j²`` among those of e's sign (section 3.2), and prune the kept weight of the smallest
``|w_j| ‖X_j‖`` (Wanda's score) among those whose loss moves e towards 0 too. A grown weight stays kept and a
pruned one stays pruned. A row stops at ``|e| ≤ threshold``, after ``max_cycles``, or when a side has no
weight left. With N:M the kept weight that is pruned has the smallest score in the group of the grown one,
whatever its sign, and a swap after which e has another sign than at the start is not made and ends the row.

The layer error is not what it minimises, so it may rise. Where this differs from the authors' code: variances
are those of all tokens, not means of the batches' variances; candidates are never taken from the wrong side
of the sorted lists when the right one is exhausted; all kinds of layers are refined (the code leaves out the
feed-forward ones by default).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedProblemError
from ...problems.layer import LayerProblem
from ...problems.pattern import Coupling
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status
from ..scores import warm_start
from .local_search import row_batches

# A variance below this share of the mean square is rounding of float32 products.
SMALLEST_VARIANCE = 1e-6


@final
@dataclass(frozen=True)
class DSnoT(Solver):
    """Swap weights until the expected error of each output is small (see the module).

    Drift and output metric do not enter. The warm start is ``init``, or Wanda's mask if there is none. Stats
    per row: ``swaps`` and ``expected``, ``|e|`` at the end.

    Args:
        max_cycles: the most swaps per row.
        threshold: ``|e|`` at which a row stops, in units of the layer's output summed over a window.
        window: L, tokens per window; with the default the threshold is that of the authors' code.
        variance_power: exponent of ``σ²`` in the criterion to grow; 0 leaves it out.
        same_sign: also without N:M, end a row before the sign of e changes. The authors' code has it as an
            option that is off; off, ``max_cycles`` swaps let e of narrow rows swing about 0 and raise the
            layer error several times over, so that it is on here.

    Raises:
        UnsupportedProblemError: if the Gram matrix comes without means of the channels.
    """

    name: ClassVar[str] = "dsnot"
    group: ClassVar[Group] = Group.LOCAL_SEARCH
    # it looks at means of errors only, neither at the metric nor at the drift
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, metric=True, drift_by_default=False)

    max_cycles: int = 50
    threshold: float = 0.1
    window: int = 2048
    variance_power: float = 1.0
    same_sign: bool = True

    def __post_init__(self) -> None:
        if self.max_cycles < 0 or self.window < 1:
            raise InputError(
                "cycles and window of dsnot are counts: expected max_cycles ≥ 0 and window ≥ 1, found "
                f"{self.max_cycles} and {self.window}"
            )
        if not self.threshold >= 0 or not self.variance_power >= 0:
            raise InputError(
                "threshold and variance_power of dsnot: expected at least 0, found "
                f"{self.threshold:g} and {self.variance_power:g}"
            )

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Refine the warm start; rows that a time limit cuts off keep it."""
        deadline = budget.deadline()
        if problem.gram.mean is None:
            raise UnsupportedProblemError(
                "dsnot needs the means of the layer's inputs: expected a Gram matrix with means (from a "
                "GramAccumulator), found none"
            )
        mask = warm_start(problem, init).clone()
        swaps = torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
        expected = torch.zeros(problem.rows, dtype=torch.float64, device=problem.device)
        status = Status.FINISHED
        for rows in row_batches(problem):
            if time.monotonic() >= deadline:
                status = Status.TIME_LIMIT
                break
            swaps[rows], expected[rows] = self._refine(problem, problem.gram.mean, mask, rows)
            budget.report(rows.stop, problem.rows)
        return Outcome(mask, status, stats={"swaps": swaps, "expected": expected})

    def _refine(
        self, problem: LayerProblem, mean: Tensor, mask: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Swap in some rows of ``mask``, in place; returns swaps and ``|e|`` (len(rows),)."""
        mask, gram = mask[rows], problem.gram
        effect = self.window * problem.weight[rows].double() * mean
        square = gram.matrix.diagonal() / gram.tokens
        variance = torch.maximum(square - mean**2, SMALLEST_VARIANCE * square)
        gain = torch.where(gram.dead, 0.0, effect / variance.clamp_min(1e-300) ** self.variance_power)
        scores = problem.scaled_weight[rows].abs()
        error = effect.masked_fill(mask, 0).sum(1)
        first = error.sign()
        pattern = problem.pattern
        grouped = pattern.couples is Coupling.BLOCK and not pattern.is_per_row(problem.cols)
        grow = _Queues(gain, ~mask & (gain > 0), ~mask & (gain < 0), self.max_cycles)
        prune = _Queues(scores.copysign(effect), mask & (effect < 0), mask & (effect > 0), self.max_cycles)
        prunable = mask.clone()
        line = torch.arange(len(mask), device=mask.device)
        swaps = torch.zeros_like(line)
        running = torch.ones_like(line, dtype=torch.bool)
        for _ in range(self.max_cycles):
            negative = (error < 0).to(torch.int64)
            grown, can_grow = grow.next(negative)
            if grouped:
                pruned, can_prune = _cheapest_in_group(scores, prunable, grown, pattern.block)
            else:
                pruned, can_prune = prune.next(negative)
            after = error + effect[line, pruned] - effect[line, grown]
            running &= can_grow & can_prune & (error.abs() > self.threshold)
            if grouped or self.same_sign:
                running &= after.sign() == first
            if not bool(running.any()):
                break
            mask[line[running], grown[running]] = True
            mask[line[running], pruned[running]] = False
            prunable[line[running], pruned[running]] = False
            error = torch.where(running, after, error)
            swaps += running
        return swaps, error.abs()


class _Queues:
    """For each row a queue of candidates for either sign of its error, best first.

    Args:
        values: the criterion (rows, cols); its largest come first where the error is positive, its smallest
            where it is negative.
        positive: candidates while the error is positive (rows, cols), bool.
        negative: candidates while it is negative (rows, cols), bool.
        length: how many candidates are needed at most.
    """

    def __init__(self, values: Tensor, positive: Tensor, negative: Tensor, length: int) -> None:
        length = min(length, values.shape[1])
        # stable sorts: of equal candidates the lowest index comes first on every device
        orders = [
            values.masked_fill(~positive, -torch.inf).argsort(dim=1, descending=True, stable=True),
            values.masked_fill(~negative, torch.inf).argsort(dim=1, stable=True),
        ]
        self._order = torch.stack([order[:, :length] for order in orders], dim=1)
        self._length = torch.stack([positive.sum(1), negative.sum(1)], dim=1).clamp_max(length)
        self._taken = torch.zeros_like(self._length)

    def next(self, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The next candidate (rows,) of the queue that ``negative`` (rows,) names, and whether it exists."""
        side = negative[:, None]
        at = self._taken.gather(1, side).squeeze(1)
        valid = at < self._length.gather(1, side).squeeze(1)
        self._taken.scatter_add_(1, side, torch.ones_like(side))
        line = torch.arange(len(at), device=at.device)
        return self._order[line, negative, at.clamp_max(self._order.shape[2] - 1)], valid


def _cheapest_in_group(scores: Tensor, free: Tensor, grown: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The ``free`` weight of the smallest score in the group of ``grown`` (rows,), and whether it exists."""
    columns = (grown - grown % group)[:, None] + torch.arange(group, device=grown.device)
    costs = scores.gather(1, columns).masked_fill(~free.gather(1, columns), torch.inf)
    lowest = costs.min(1)
    return columns.gather(1, lowest.indices[:, None]).squeeze(1), torch.isfinite(lowest.values)
