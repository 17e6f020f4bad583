"""ALPS: mask and weights together by ADMM with a growing penalty, then conjugate gradients on the mask found.

Meng, Behdin, Wang and Mazumder, *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models*, NeurIPS 2024, with the constants of the authors' program. Weights are first multiplied by
the norms of the inputs, ``y = w √diag(G + λ I)``, and ``R`` is ``G + λ I`` divided by them on both sides, so
that its diagonal is 1 (the authors' pre-processing). The problem with a bounded number of weights,

    min  ½ tr((Ŷ - Y) R (Ŷ - Y)ᵀ)   with Ŷ = D and D of the pattern,

is split by ADMM (section 3.1); P keeps the entries of largest size that the pattern allows:

    Ŷ ← (Y R - V + ρ D) (R + ρ I)⁻¹,    D ← P(Ŷ + V / ρ),    V ← V + ρ (Ŷ - D)

from ``D = P(Y), V = 0``. One eigendecomposition of R gives the inverse for every ρ. Every third iteration ρ
follows the number s of weights that entered or left the mask since the last time, of k that are kept: it
grows by 1.3 where s > 0.1 k, by 1.2 where s > 0.005 k, by 1.1 where s > 0, and s = 0 ends the iteration. As
long as s has never been above 0.005 k the first ρ was too large: it is divided by 5, and the iteration starts
again if s > 0. After 30 iterations s < 0.0003 k ends it too.

The mask is that of P(Ŷ). On it the weights are improved from there by ten steps of conjugate gradients on
``Ŷ R = Y R``, each row with a step length of its own and residuals set to zero where the mask prunes (section
3.2, algorithm 2). Its Jacobi preconditioner is the identity, for R has a unit diagonal.

The authors have budgets of a whole layer and N:M. Equal sparsity per row is added here, and drift: then
``B = H / √diag(G + λ I)`` is added to ``Y R``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Growth of ρ where more than this share of the kept weights has changed, largest share first.
GROWTH = ((0.1, 1.3), (0.005, 1.2))
SLOW_GROWTH = 1.1
SHRINK = 5.0
LARGEST_RHO = 1e6
# After so many iterations a change below this share ends them.
SETTLED_AFTER, SETTLED = 30, 0.0003


@final
@dataclass(frozen=True)
class ALPS(Solver):
    """ADMM-based layer-wise pruning with a support that settles (see the module).

    Without drift it is the published method; the output metric does not enter, nor does a warm start.
    Channels whose input is always zero count with the damping alone.

    Args:
        rho: ρ of the first iterations.
        iterations: most iterations of ADMM.
        update_every: iterations between two changes of ρ.
        refine_steps: steps of conjugate gradients at the end.
        damping: λ, as a share of the mean diagonal of G.
        dtype: of the iterations, ``float32`` as in the authors' program, or ``float64``; the
            eigendecomposition is in float64.

    Stat per row: ``iterations``, how many of ADMM were made.
    """

    name: ClassVar[str] = "alps"
    group: ClassVar[Group] = Group.WEIGHT_UPDATE
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, metric=True, rows_alone=False)

    rho: float = 0.1
    iterations: int = 300
    update_every: int = 3
    refine_steps: int = 10
    damping: float = 0.01
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.rho > 0 or not self.damping >= 0:
            raise InputError(
                f"weights of alps: expected rho > 0 and damping ≥ 0, found {self.rho:g} and {self.damping:g}"
            )
        if self.iterations < 1 or self.update_every < 1 or self.refine_steps < 0:
            raise InputError(
                "steps of alps: expected iterations ≥ 1, update_every ≥ 1 and refine_steps ≥ 0, found "
                f"{self.iterations}, {self.update_every} and {self.refine_steps}"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype of alps: expected {' or '.join(DTYPES)}, found {self.dtype!r}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Iterate and refine; a time limit ends it early, with the mask of the iteration that it reached."""
        layer = _scaled(problem, self.damping, DTYPES[self.dtype])
        now, steps, status = self._iterate(problem, layer, budget)
        mask = problem.pattern.top_k(now.abs())
        now = now * mask
        if status is not Status.TIME_LIMIT:
            now = _refined(layer, now, mask, self.refine_steps)
        budget.report(problem.rows, problem.rows)
        weight = (now.double() / layer.norms).to(problem.weight.dtype)
        made = torch.full((problem.rows,), steps, dtype=torch.int64, device=mask.device)
        return Outcome(mask, status, stats={"iterations": made}, weight=weight)

    def _iterate(self, problem: LayerProblem, layer: _Scaled, budget: Budget) -> tuple[Tensor, int, Status]:
        """``Ŷ`` (rows, cols) of the last iteration, how many there were, and why there were no more."""
        deadline = budget.deadline()
        choose = problem.pattern.top_k
        now, dual = layer.dense, torch.zeros_like(layer.dense)
        before = choose(now.abs())
        kept, first = int(before.sum()), now * before
        sparse = first
        penalty = _Penalty(self.rho)
        inverse = layer.inverse(penalty.rho)
        for step in range(1, self.iterations + 1):
            if time.monotonic() >= deadline:
                return now, step - 1, Status.TIME_LIMIT
            now = (layer.pull - dual + penalty.rho * sparse) @ inverse
            shifted = now + dual / penalty.rho
            support = choose(shifted.abs())
            sparse = shifted * support
            dual = dual + penalty.rho * (now - sparse)
            budget.report(step * problem.rows // (self.iterations + 1), problem.rows)
            if step % self.update_every:
                continue
            changed, before = int((support != before).sum()), support
            if penalty.settles(changed, kept, step):
                return now, step, Status.FINISHED
            if penalty.restarts(changed, kept):
                now, sparse, dual = layer.dense, first, torch.zeros_like(dual)
            inverse = layer.inverse(penalty.rho)
        return now, self.iterations, Status.ITERATION_LIMIT


class _Scaled(NamedTuple):
    """A layer in units of its inputs' norms.

    Attributes:
        norms: ``√diag(G + λ I)`` (cols,), float64.
        matrix: ``R`` (cols, cols).
        values: eigenvalues of R (cols,), float64.
        vectors: eigenvectors of R (cols, cols), float64.
        dense: ``Y`` (rows, cols).
        pull: ``Y R``, with drift ``Y R + B`` (rows, cols).
    """

    norms: Tensor
    matrix: Tensor
    values: Tensor
    vectors: Tensor
    dense: Tensor
    pull: Tensor

    def inverse(self, rho: float) -> Tensor:
        """``(R + ρ I)⁻¹`` (cols, cols) in the dtype of the iterations."""
        return ((self.vectors / (self.values + rho)) @ self.vectors.T).to(self.matrix.dtype)


def _scaled(problem: LayerProblem, damping: float, dtype: torch.dtype) -> _Scaled:
    matrix = problem.gram.matrix.clone()
    diagonal = matrix.diagonal()
    diagonal += damping * diagonal.mean()
    norms = matrix.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    matrix /= norms * norms[:, None]
    dense = problem.weight.double() * norms
    pull = dense @ matrix
    if problem.drift is not None:
        pull += problem.drift.linear / norms
    values, vectors = torch.linalg.eigh(matrix)
    # rounding leaves eigenvalues of singular matrices a little below zero
    return _Scaled(norms, matrix.to(dtype), values.clamp_min(0), vectors, dense.to(dtype), pull.to(dtype))


class _Penalty:
    """ρ, as it follows the changes of the mask."""

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self._grown = False

    def settles(self, changed: int, kept: int, step: int) -> bool:
        """Whether the mask has settled in iteration ``step``, ``changed`` of ``kept`` weights being new."""
        return self._grown and (changed == 0 or (step > SETTLED_AFTER and changed < SETTLED * kept))

    def restarts(self, changed: int, kept: int) -> bool:
        """Move ρ; whether the iteration starts again with it."""
        for share, factor in GROWTH:
            if changed > share * kept:
                self._grown = True
                self.rho = min(self.rho * factor, LARGEST_RHO)
                return False
        if self._grown:
            self.rho = min(self.rho * SLOW_GROWTH, LARGEST_RHO)
            return False
        self.rho /= SHRINK
        return changed > 0


def _refined(layer: _Scaled, start: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on the kept weights of all rows at once (rows, cols)."""
    point = start
    residual = (layer.pull - point @ layer.matrix) * mask
    size = residual.square().sum(1, keepdim=True)
    direction = residual
    for _ in range(steps):
        ahead = direction @ layer.matrix
        curvature = (direction * ahead).sum(1, keepdim=True)
        # rows that are solved have a direction of zero
        length = torch.where(curvature > 0, size / curvature, 0.0)
        point = point + length * direction
        residual = (residual - length * ahead) * mask
        size, last = residual.square().sum(1, keepdim=True), size
        direction = residual + torch.where(last > 0, size / last, 0.0) * direction
    return point
