"""Mask and weights in turns: swaps with the weights at hand, least squares for the mask at hand.

Least squares on a mask's kept weights leaves the mask as it was chosen for the dense weights. Here the mask
is searched again with the weights that it would have. With the new weights ŵ of mask M, the product of output
errors and inputs is ``P = H + (W - Ŵ) G`` (rows, cols). P is 0 on kept weights, and a pruned weight that came
back alone would best take the value, at the gain in the row's error,

    v_j = P_j / G_jj,      P_j² / G_jj

Let ``V = Ŵ`` where M keeps and v where it prunes. A mask search on V in place of W with the same target, that
is with the drift

    H' = H + (W - V) G,      T - V X̂ = (T - W X̂) + (W - V) X̂,

starts at the error of Ŵ and weighs each kept weight at its own value against pruned weights at theirs. Then
least squares on its mask, and so on until no weight moves: no step raises the error. It ends near the
swap-inescapable minima of best subset selection (Hazimeh and Mazumder, *Operations Research* 68, 2020), in
whose swaps the restored weight alone is optimised as well.

Output metric: P becomes ``S P`` and the value ``(S P)_ij / (S_ii G_jj)``; the search sweeps over rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import Drift, LayerProblem
from ...problems.pattern import Coupling
from ..base import Budget, Covers, Group, Outcome, Solver, Status, TracePoint
from ..row_sweeps import sweeping
from ..scores import warm_start
from ..search.one_swap import OneSwap
from .reconstruction import Reconstruction


@final
@dataclass(frozen=True)
class AlternatingReconstruction(Solver):
    """Search of the mask and least squares on its kept weights, in turns (see the module).

    The warm start is the mask ``init``, or Wanda's if there is none. Rows end no worse than least squares on
    it; with an output metric or a layer budget, which tie the rows together, the layer does.

    Args:
        rounds: the most turns of search and least squares.
        tolerance: a turn that lowers the layer's error by less than this share of it is the last.
        search: chooses masks for given weights, from the present mask.
        reconstruction: least squares; its stats are those of each row's last turn.

    Stats: those of ``reconstruction`` and ``turns``, in how many a row's mask changed. The trace holds the
    layer's error after each turn. The status is ``local_optimum`` where a search moves no weight.
    """

    name: ClassVar[str] = "alternating-reconstruction"
    group: ClassVar[Group] = Group.WEIGHT_UPDATE

    rounds: int = 10
    tolerance: float = 1e-4
    search: Solver = field(default_factory=OneSwap)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise InputError(f"rounds are counted: expected at least 0, found {self.rounds}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is a share: expected 0 ≤ tolerance < 1, found {self.tolerance:g}")
        if self.search.group is Group.WEIGHT_UPDATE:
            raise InputError(
                "the search of alternating reconstruction: expected a solver that leaves weights as they "
                f"are, found {self.search!r}"
            )

    @property
    def covers(self) -> Covers:
        """What search and least squares cover; under an output metric the search sweeps over rows."""
        return sweeping(self.search).covers & self.reconstruction.covers

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Take turns until no weight moves; rows that have come to rest are left out."""
        begun, deadline = time.monotonic(), budget.deadline()
        search = self.search if problem.metric is None else sweeping(self.search)
        state = _State(problem, warm_start(problem, init))
        state.take(self.reconstruction.run(problem, state.mask, _left(deadline)), state.all)
        trace = [TracePoint(time.monotonic() - begun, state.error())]
        active, status = state.all, Status.ITERATION_LIMIT
        for turn in range(self.rounds):
            if time.monotonic() >= deadline:
                status = Status.TIME_LIMIT
                break
            part = problem if len(active) == problem.rows else problem.slice_rows(active)
            mask = state.mask[active]
            found = search.run(revalued(part, mask, state.weight[active]), mask, _left(deadline)).mask
            moved = (found != mask).any(1) if found is not None else mask.new_zeros(len(mask))
            if found is None or not bool(moved.any()):
                status = Status.LOCAL_OPTIMUM if time.monotonic() < deadline else Status.TIME_LIMIT
                break
            if not state.coupled:
                active, found = active[moved], found[moved]
                part = problem.slice_rows(active)
            before = trace[-1].objective
            state.take(self.reconstruction.run(part, found, _left(deadline)), active)
            trace.append(TracePoint(time.monotonic() - begun, state.error()))
            budget.report((turn + 1) * problem.rows // self.rounds, problem.rows)
            if trace[-1].objective >= before * (1 - self.tolerance):
                status = Status.FINISHED
                break
        return Outcome(state.mask, status, trace=trace, stats=state.stats, weight=state.weight)


def revalued(problem: LayerProblem, mask: Tensor, weight: Tensor) -> LayerProblem:
    """The layer with V in place of W and the same target (see the module).

    Args:
        problem: the layer.
        mask: kept weights (rows, cols), bool.
        weight: Ŵ (rows, cols), zero where pruned.
    """
    gram, dense, new = problem.gram.matrix, problem.weight.double(), weight.double()
    drift = problem.drift
    linear = torch.zeros_like(dense) if drift is None else drift.linear
    value = linear + (dense - new) @ gram
    if problem.metric is not None:
        value = problem.metric @ value / problem.metric.diagonal()[:, None]
    value = torch.where(problem.gram.dead, 0.0, value / gram.diagonal().clamp_min(1e-300))
    values = torch.where(mask, new, value)
    lost = dense - values
    product = lost @ gram
    shifted = (linear + product).masked_fill(problem.gram.dead, 0)
    if problem.metric is None:
        constant = (lost * (product + 2 * linear)).sum(1)
        if drift is not None:
            constant += drift.constant
        return replace(problem, weight=values, drift=Drift(shifted, constant.clamp_min(0)))
    mixed = lost @ linear.T
    covariance = product @ lost.T + mixed + mixed.T
    if drift is not None and drift.covariance is not None:
        covariance += drift.covariance
    constant = covariance.diagonal().clamp_min(0).clone()
    return replace(problem, weight=values, drift=Drift(shifted, constant, covariance))


class _State:
    """Best mask and weights so far.

    Args:
        problem: the layer.
        mask: warm start (rows, cols), bool.
    """

    def __init__(self, problem: LayerProblem, mask: Tensor) -> None:
        self._problem = problem
        self.coupled = problem.metric is not None or problem.pattern.couples is Coupling.LAYER
        self.all = torch.arange(problem.rows, device=problem.device)
        self.mask = mask.clone()
        self.weight = problem.weight * mask
        self.stats: dict[str, Tensor] = {
            "turns": torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
        }
        self._errors = problem.row_objectives(self.mask)

    def error(self) -> float:
        """Error of the layer."""
        return float(self._errors.sum().clamp_min(0))

    def take(self, outcome: Outcome, rows: Tensor) -> None:
        """Take over the rows (indices) of ``outcome`` that are better; all or none where rows are coupled."""
        if outcome.mask is None or outcome.weight is None:
            return
        mask, weight = self.mask.clone(), self.weight.clone()
        mask[rows], weight[rows] = outcome.mask, outcome.weight
        part = self._problem if self.coupled else self._problem.slice_rows(rows)
        errors = self._errors.clone()
        errors[rows] = part.row_objectives(outcome.mask, outcome.weight)
        better = errors < self._errors
        if self.coupled:
            better = (errors.sum() < self._errors.sum()).expand_as(better)
        self.stats["turns"] += better & (mask != self.mask).any(1)
        self._errors = torch.where(better, errors, self._errors)
        self.mask = torch.where(better[:, None], mask, self.mask)
        self.weight = torch.where(better[:, None], weight, self.weight)
        for name, values in outcome.stats.items():
            kept = self.stats.setdefault(name, torch.zeros_like(self._errors, dtype=values.dtype))
            kept[rows] = values


def _left(deadline: float) -> Budget:
    """The time that is left until ``deadline`` on ``time.monotonic()``."""
    return Budget(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
