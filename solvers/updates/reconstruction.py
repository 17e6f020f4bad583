"""Least squares on the kept weights of a mask.

For a mask M (of ``init``, or Wanda's) the new weights Ŵ minimise, row by row,

    ‖t_i - ŵ_i X̂‖²   over ŵ_i supported on the mask,

``t_i`` being the row's target (``w_i X̂`` without drift). In terms of the lost weight ``l = w - ŵ``, fixed to
w where the mask prunes, that is ``lᵀ G l + 2 hᵀ l`` up to a constant, and its normal equations are

    G_KK l_K = -(h_K + G_KP w_P)

(the exact update of which SparseGPT, Frantar and Alistarh, ICML 2023, section 3.1, and ADMM, Boža, TMLR 2024,
section 3, are approximations). ``least_squares`` says how they are solved.

Output metric: under ``tr(S E Eᵀ)`` the rows are coupled, and the normal equations are those of ``S ⊗ G`` on
all kept weights of the layer. They are solved at once, from the rows' own least squares on, by conjugate
gradients that know S (``least_squares``); every iteration lowers the layer's error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status
from ..scores import warm_start
from .least_squares import KeptSolve, by_cholesky, by_conjugate_gradients, coupled_by_conjugate_gradients

METHODS = ("auto", "cholesky", "conjugate-gradients")
# Weights of the rows that are solved at once: six float64 tensors of this size are alive.
BATCH_WEIGHTS = 1 << 23


@final
@dataclass(frozen=True)
class Reconstruction(Solver):
    """Least squares on the kept weights of ``init``, or of Wanda's mask (see the module).

    No row ends worse than with its old kept weights: where rounding or the damping would raise its error, it
    keeps them, and the stat ``unchanged`` says so. Under an output metric that holds for the layer.

    Args:
        damping: share of the Gram matrix's diagonal that is added to it. The default is what the rounding of
            a Gram matrix from float32 products asks for; more holds the weights closer to the dense ones.
        method: ``cholesky``, ``conjugate-gradients``, or ``auto``: Cholesky up to ``cholesky_cols`` columns.
        cholesky_cols: width up to which ``auto`` chooses Cholesky.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: the most iterations of conjugate gradients; rows that need more have the status
            ``iteration_limit``.
        coupled_iterations: under an output metric, the most iterations of conjugate gradients on all rows at
            once; a layer that needs more has the status ``iteration_limit``. More lower the layer's error
            further (``benchmarks/least_squares.py``).

    Stats per row, of its last solve: ``iterations`` of conjugate gradients, relative ``residual`` of the
    normal equations, ``damping`` (a row whose matrix cannot be factored gets ten times as much until it
    can), ``unchanged``; under an output metric ``coupled_iterations`` and ``coupled_residual`` of the layer.
    """

    name: ClassVar[str] = "reconstruction"
    group: ClassVar[Group] = Group.WEIGHT_UPDATE
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, metric=True, rows_alone=False)

    damping: float = 1e-6
    method: str = "auto"
    cholesky_cols: int = 256
    tolerance: float = 1e-6
    max_iterations: int = 500
    coupled_iterations: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InputError(f"damping is a share of the diagonal: expected 0 to 1, found {self.damping:g}")
        if self.method not in METHODS:
            raise InputError(
                f"method of reconstruction: expected one of {', '.join(METHODS)}, found {self.method!r}"
            )
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is a share: expected 0 < tolerance < 1, found {self.tolerance:g}")
        for name in ("max_iterations", "coupled_iterations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is a count: expected at least 1, found {getattr(self, name)}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Solve for the kept weights; rows that a time limit cuts off keep the old ones."""
        deadline = budget.deadline()
        mask = warm_start(problem, init)
        dense = problem.weight.double()
        lost = dense.masked_fill(mask, 0)
        alone = replace(problem, metric=None)
        solver = _Rows(self, problem.gram.correlation64, deadline, _empty_stats(problem))
        for rows in _batches(problem):
            lost[rows] = solver.solve(alone.slice_rows(rows), mask[rows], lost[rows], rows)
            budget.report(int(rows[-1]) + 1, problem.rows)
        if problem.metric is not None:
            lost = solver.together(problem, problem.metric, mask, lost)
        weight = (dense - lost).masked_fill(~mask, 0).to(problem.weight.dtype)
        weight = _never_worse(problem, mask, weight, solver.stats)
        statuses = solver.statuses()
        limits = (Status.TIME_LIMIT, Status.ITERATION_LIMIT)
        overall = next((limit for limit in limits if limit in statuses), Status.FINISHED)
        stats = {name: values for name, values in solver.stats.items() if name not in ("late", "short")}
        return Outcome(mask, overall, row_statuses=statuses, stats=stats, weight=weight)


class _Rows:
    """Solves rows of a layer and keeps count of what became of them."""

    def __init__(
        self, options: Reconstruction, correlation: Tensor, deadline: float, stats: dict[str, Tensor]
    ) -> None:
        self._options = options
        self._correlation = correlation
        self._deadline = deadline
        self.stats = stats

    def solve(self, part: LayerProblem, mask: Tensor, lost: Tensor, rows: Tensor) -> Tensor:
        """New lost weight (len(rows), cols) of the rows ``part``, from ``lost``; the old if time is up."""
        if time.monotonic() >= self._deadline:
            self.stats["late"][rows] = 1
            return lost
        found = self._kept(part, mask, lost)
        for name in ("iterations", "residual", "damping"):
            self.stats[name][rows] = getattr(found, name)
        late = time.monotonic() >= self._deadline
        self.stats["late"][rows] = int(late) * (~found.converged).to(torch.int64)
        self.stats["short"][rows] = (~found.converged).to(torch.int64)
        live = mask & ~part.gram.dead
        return torch.where(live, found.lost / part.gram.scale.clamp_min(1e-300), lost)

    def _kept(self, part: LayerProblem, mask: Tensor, lost: Tensor) -> KeptSolve:
        options = self._options
        correlation = self._correlation
        cost = part.scaled_weight.masked_fill(mask, 0) @ correlation
        if part.scaled_drift is not None:
            cost += part.scaled_drift
        live = mask & ~part.gram.dead
        if options.method == "cholesky" or (options.method == "auto" and part.cols <= options.cholesky_cols):
            return by_cholesky(correlation, cost, live, options.damping)
        return by_conjugate_gradients(
            correlation,
            cost,
            live,
            options.damping,
            lost * part.gram.scale,
            options.tolerance,
            options.max_iterations,
            self._deadline,
        )

    def together(self, problem: LayerProblem, metric: Tensor, mask: Tensor, alone: Tensor) -> Tensor:
        """Lost weight (rows, cols) of all rows under an output metric (rows, rows).

        It starts at the rows' own least squares ``alone``, or at the mask alone where that is better.
        """
        dense = problem.weight.double()
        starts = [alone, dense.masked_fill(mask, 0)]
        best = min(starts, key=lambda lost: problem.objective(mask, dense - lost))
        live = mask & ~problem.gram.dead
        found = coupled_by_conjugate_gradients(
            metric,
            self._correlation,
            problem.scaled_drift,
            live,
            self._options.damping,
            best * problem.gram.scale,
            self._options.tolerance,
            self._options.coupled_iterations,
            self._deadline,
        )
        self.stats["coupled_iterations"].fill_(found.iterations)
        self.stats["coupled_residual"].fill_(found.residual)
        short = int(found.residual > self._options.tolerance)
        self.stats["short"].fill_(short)
        self.stats["late"].fill_(short * (time.monotonic() >= self._deadline))
        return torch.where(live, found.lost / problem.gram.scale.clamp_min(1e-300), best)

    def statuses(self) -> Sequence[Status]:
        """Why each row stopped."""
        return [
            Status.TIME_LIMIT if late else Status.ITERATION_LIMIT if short else Status.FINISHED
            for late, short in zip(self.stats["late"].tolist(), self.stats["short"].tolist(), strict=True)
        ]


def _batches(problem: LayerProblem) -> tuple[Tensor, ...]:
    """Indices of the rows that are solved at once."""
    rows = torch.arange(problem.rows, device=problem.device)
    return rows.tensor_split(-(-problem.rows * problem.cols // BATCH_WEIGHTS))


def _empty_stats(problem: LayerProblem) -> dict[str, Tensor]:
    reals = ["residual", "damping"] + ["coupled_residual"] * (problem.metric is not None)
    counts = ["iterations", "unchanged", "late", "short"]
    counts += ["coupled_iterations"] * (problem.metric is not None)
    stats = {name: torch.zeros(problem.rows, dtype=torch.float64, device=problem.device) for name in reals}
    for name in counts:
        stats[name] = torch.zeros(problem.rows, dtype=torch.int64, device=problem.device)
    return stats


def _never_worse(problem: LayerProblem, mask: Tensor, weight: Tensor, stats: dict[str, Tensor]) -> Tensor:
    """``weight`` (rows, cols) where it is no worse than the old kept weights; with a metric, all or none."""
    old = problem.weight * mask
    before, after = problem.row_objectives(mask), problem.row_objectives(mask, weight)
    if problem.metric is None:
        worse = ~(after <= before)
    else:
        worse = ~(after.sum() <= before.sum()).expand(problem.rows)
    stats["unchanged"] = (worse | (weight == old).all(1)).to(torch.int64)
    return torch.where(worse[:, None], old, weight)
