"""SparseFW: the mask relaxed to [0, 1], minimised by the Frank-Wolfe algorithm, then thresholded.

Roux, Zimmer, d'Aspremont and Pokutta, *Don't Be Greedy, Just Relax! Pruning LLMs via Frank-Wolfe*, arXiv
2510.13713, algorithm 2. With the Gram matrix G the error of a relaxed mask m of a row w is the convex

    f(m) = rᵀ G r + 2 hᵀ r + const,    r = w∘(1 - m),    ∇f(m) = -2 w∘(G r + h),

h being the drift. Of the k weights that are to be kept the ⌊α k⌋ of highest saliency are fixed, all others
are free. Step t = 0 … T - 1 moves them towards a vertex of the relaxed masks (equations 8, 9 and 12, appendix
D for N:M):

    m ← (1 - η) m + η v,    η = 2 / (t + 2),    v = 1 for the most negative entries of ∇f, within the budget,

and 0 for all others: a vertex has fewer ones than the budget allows where fewer entries are negative. The
mask keeps what is fixed and the largest entries of m. As the first η is 1, the warm start shows in the first
gradient and in what is fixed.

Where the algorithm is silent: the gradient is that of fixed and free weights together. Weights are fixed
among those of the warm start, so that each budget has room for them; of each row, or of the layer for a layer
budget. For N:M it is of each row too: of the two that a group keeps α = 0.9 would fix as many as α = 0.5, and
the authors' table 2 tells them apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.layer import LayerProblem
from ...problems.pattern import Coupling
from ..base import ANY_COUPLING, Budget, Covers, Group, Outcome, Solver, Status
from ..scores import ria_scores

SALIENCIES = ("wanda", "ria")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@final
@dataclass(frozen=True)
class SparseFW(Solver):
    """Frank-Wolfe on the relaxed mask (see the module).

    The published method knows no drift, so that none is its default; with one it minimises the error with
    drift. Thresholding may leave a mask that is worse than the warm start's.

    Args:
        steps: T.
        alpha: α in [0, 1], share of the kept weights that is fixed; 0 relaxes all, 1 is the warm start.
        saliency: ``wanda`` or ``ria`` (the authors' equation 6, with the whole norm of the inputs): which
            weights are fixed, and the warm start where none is given.
        dtype: of the steps, ``float64`` or ``float32``.

    Stat per row: ``residual``, mean distance between the relaxed mask and the mask.
    """

    name: ClassVar[str] = "sparsefw"
    group: ClassVar[Group] = Group.LOCAL_SEARCH
    covers: ClassVar[Covers] = Covers(couplings=ANY_COUPLING, rows_alone=False, drift_by_default=False)

    steps: int = 2000
    alpha: float = 0.9
    saliency: str = "wanda"
    dtype: str = "float64"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"steps of sparsefw: expected at least 0, found {self.steps}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha of sparsefw is a share: expected 0 to 1, found {self.alpha:g}")
        if self.saliency not in SALIENCIES:
            raise InputError(
                f"saliency of sparsefw: expected {' or '.join(SALIENCIES)}, found {self.saliency!r}"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype of sparsefw: expected {' or '.join(DTYPES)}, found {self.dtype!r}")

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Fix, step and threshold; a time limit leaves fewer steps, before the first the warm start."""
        deadline = budget.deadline()
        scores = problem.scaled_weight.abs() if self.saliency == "wanda" else ria_scores(problem, 1.0)
        start = problem.pattern.top_k(scores) if init is None else init
        fixed = most_salient(problem, start, scores, self.alpha)
        vertices = _Vertices(problem, start & ~fixed, fixed)
        dtype = DTYPES[self.dtype]
        matrix = problem.gram.correlation64.to(dtype)
        # one unit keeps every entry in the range of float32
        unit = problem.scaled_weight.abs().amax().clamp_min(1e-300)
        scaled = (problem.scaled_weight / unit).to(dtype)
        drift = None if problem.scaled_drift is None else (problem.scaled_drift / unit).to(dtype)
        relaxed, status = start.to(dtype), Status.FINISHED
        for step in range(self.steps):
            if time.monotonic() >= deadline:
                status = Status.TIME_LIMIT
                break
            cost = (scaled * (1 - relaxed)) @ matrix
            if drift is not None:
                cost += drift
            # half the gradient, of which the order and the signs count
            relaxed.lerp_(vertices.towards(-scaled * cost).to(dtype), 2 / (step + 2))
            budget.report(step * problem.rows // max(1, self.steps), problem.rows)
        mask = problem.pattern.top_k(relaxed.masked_fill(fixed, 2.0))
        residual = (relaxed - mask.to(dtype)).abs().mean(1).double()
        return Outcome(mask, status, stats={"residual": residual})


def most_salient(problem: LayerProblem, start: Tensor, scores: Tensor, share: float) -> Tensor:
    """The ``share`` of the weights kept by ``start`` (rows, cols) with the highest scores, bool."""
    lines = scores.masked_fill(~start, -1.0)
    kept = start
    if problem.pattern.couples is Coupling.LAYER:
        lines, kept = lines.view(1, -1), start.view(1, -1)
    # every line keeps the same number; rounding must not turn 0.9 * 10 into 8
    count = int(share * int(kept[0].sum()) + 1e-9)
    chosen = torch.zeros_like(kept)
    order = lines.argsort(dim=1, descending=True, stable=True)[:, :count]
    return chosen.scatter_(1, order, True).view_as(start)


class _Vertices:
    """The vertices of the relaxed masks of a layer, some of whose weights are fixed."""

    def __init__(self, problem: LayerProblem, free: Tensor, fixed: Tensor) -> None:
        self._fixed = fixed
        whole = problem.pattern.couples is Coupling.LAYER
        self._shape = (1, -1) if whole else (-1, problem.pattern.block)
        room = free.reshape(self._shape).sum(1, keepdim=True)
        self._most = int(room.max())
        self._within = torch.arange(self._most, device=free.device) < room

    def towards(self, gradient: Tensor) -> Tensor:
        """The vertex (rows, cols) with the smallest product with ``gradient``, bool; 1 where fixed."""
        lines = gradient.masked_fill(self._fixed, 0).reshape(self._shape)
        vertex = torch.zeros_like(lines, dtype=torch.bool)
        if self._most:
            found = lines.topk(self._most, dim=1, largest=False)
            vertex.scatter_(1, found.indices, (found.values < 0) & self._within)
        return vertex.view_as(gradient) | self._fixed
