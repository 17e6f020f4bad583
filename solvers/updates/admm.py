"""Weights of a pruned layer by ADMM, for a given mask or with the mask chosen on the way.

Boža, *Fast and Effective Weight Update for Pruned Large Language Models*, TMLR 2024. Weights and Gram matrix
are first divided and multiplied by the norms of the inputs (the paper's preconditioning), ``y = w √diag(G)``,
``R = corr(G)``. The problem

    min  ½ tr((Ŷ - Y)(R + δ I)(Ŷ - Y)ᵀ) + tr(B (Y - Ŷ)ᵀ)   with Ŷ zero where the mask prunes,

``B = H / √diag(G)`` being the drift, splits into weights Ŷ without and Z with the mask (section 3):

    Z ← M ∘ (Ŷ + U),    U ← U + Ŷ - Z,    Ŷ ← (Y (R + δ I) + B + ρ (Z - U)) (R + (δ + ρ) I)⁻¹

from ``Ŷ = Y, U = 0``; the weights are ``M ∘ (Ŷ + U)`` at the end. One inverse serves all iterations.

Gradual mask (section 4): in iteration t of the first T the mask prunes the entries of ``|Ŷ + U|`` that are
smallest, a share ``1 - (1 - t / T)³`` of those that the pattern prunes in the end (the cubic schedule of Zhu
and Gupta, 2017): of each row, or of the layer for a layer budget; for N:M of all entries that are not among
the N largest of their group.
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

MASKS = ("fixed", "gradual")


@final
@dataclass(frozen=True)
class ADMM(Solver):
    """Alternating direction method of multipliers on the weights (see the module).

    Without drift it is the published method; the output metric does not enter. Weights of channels whose
    input is always zero keep their values. Nothing makes the result better than the mask with its old
    weights, though it nearly always is.

    Args:
        mask: ``fixed`` updates the weights of ``init``'s (or Wanda's) mask; ``gradual`` chooses the mask.
        iterations: how many.
        gradual_steps: T, iterations in which a gradual mask grows.
        rho: ρ, weight of the constraint.
        damping: δ, share of the diagonal of G that is added to it.

    Stat per row: ``primal``, ``‖Ŷ - Z‖ / ‖Z‖`` at the end.

    Raises:
        InvalidProblemError: if the damped Gram matrix cannot be factored; more damping helps.
    """

    name: ClassVar[str] = "admm"
    group: ClassVar[Group] = Group.WEIGHT_UPDATE
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, metric=True, rows_alone=False)

    mask: str = "fixed"
    iterations: int = 20
    gradual_steps: int = 15
    rho: float = 1.0
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise InputError(f"mask of admm: expected {' or '.join(MASKS)}, found {self.mask!r}")
        if not 1 <= self.gradual_steps <= self.iterations:
            raise InputError(
                "steps of admm: expected 1 ≤ gradual_steps ≤ iterations, found gradual_steps = "
                f"{self.gradual_steps} and iterations = {self.iterations}"
            )
        if not self.rho > 0 or not self.damping >= 0:
            raise InputError(
                f"weights of admm: expected rho > 0 and damping ≥ 0, found {self.rho:g} and {self.damping:g}"
            )

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Iterate; a time limit ends it early, or leaves no mask where that is still to be chosen."""
        deadline = budget.deadline()
        dense = problem.scaled_weight
        matrix = problem.gram.correlation64
        # dead channels have a diagonal of 0, the others of 1
        matrix.diagonal().add_(self.damping * matrix.diagonal().mean())
        pull = dense @ matrix
        if problem.scaled_drift is not None:
            pull += problem.scaled_drift
        inverse = self._inverse(problem, matrix)
        mask = warm_start(problem, init)
        now, dual = dense, torch.zeros_like(dense)
        target = dense * mask
        status = Status.FINISHED
        for step in range(1, self.iterations + 1):
            if time.monotonic() >= deadline:
                status = Status.TIME_LIMIT
                break
            if self.mask == "gradual" and step <= self.gradual_steps:
                mask = gradual_mask(now + dual, problem, step, self.gradual_steps)
            target = (now + dual) * mask
            dual = dual + now - target
            now = (pull + self.rho * (target - dual)) @ inverse
            budget.report(step * problem.rows // self.iterations, problem.rows)
        if status is Status.TIME_LIMIT and self.mask == "gradual" and step <= self.gradual_steps:
            return Outcome(None, status)
        final = (now + dual) * mask
        primal = (now - target).norm(dim=1) / target.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        weight = torch.where(
            problem.gram.dead, problem.weight.double() * mask, final / problem.gram.scale.clamp_min(1e-300)
        )
        return Outcome(mask, status, stats={"primal": primal}, weight=weight.to(problem.weight.dtype))

    def _inverse(self, problem: LayerProblem, matrix: Tensor) -> Tensor:
        """``(R + (δ + ρ) I)⁻¹`` (cols, cols) from the damped ``R + δ I``."""
        shifted = matrix.clone()
        shifted.diagonal().add_(self.rho)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:
            label = f"layer {problem.name!r}" if problem.name else "the layer"
            raise InvalidProblemError(
                f"admm factors the Gram matrix of {label}: expected it positive definite with "
                f"{self.rho + self.damping:g} added to its scaled diagonal, found a matrix that is not"
            )
        return torch.cholesky_inverse(lower)


def gradual_mask(values: Tensor, problem: LayerProblem, step: int, steps: int) -> Tensor:
    """Mask (rows, cols) of iteration ``step`` of ``steps``; the last has the pattern.

    Args:
        values: ``Ŷ + U`` (rows, cols).
        problem: its pattern.
        step: from 1 to ``steps``.
        steps: T.
    """
    sizes, pattern = values.abs(), problem.pattern
    if step == steps:
        return pattern.top_k(sizes)
    share = 1 - (1 - step / steps) ** 3
    pruned = pattern.block - pattern.keep
    if pattern.is_per_row(problem.cols):
        return _without_smallest(sizes, int(share * pruned))
    if pattern.couples is Coupling.BLOCK:
        sizes = sizes.masked_fill(pattern.top_k(sizes), torch.inf)
    in_all = problem.weight.numel() // pattern.block * pruned
    return _without_smallest(sizes.reshape(1, -1), int(share * in_all)).view_as(values)


def _without_smallest(sizes: Tensor, pruned: int) -> Tensor:
    """Mask (lines, entries) without the ``pruned`` smallest of each line; ties keep the lowest index."""
    kept = torch.ones_like(sizes, dtype=torch.bool)
    smallest = sizes.flip(1).argsort(dim=1, stable=True)[:, :pruned]
    return kept.scatter_(1, sizes.shape[1] - 1 - smallest, False)
