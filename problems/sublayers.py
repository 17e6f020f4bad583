"""Which sublayers of a model to leave out, from losses that were measured.

With ``L(∅)``, ``L(u)`` and ``L(u, v)`` the model's loss without nothing, one and two of its sublayers, and
``x_u = 1`` for one that is left out,

    L(x) ≈ L(∅) + Σ_u a_u x_u + Σ_{u<v} b_uv x_u x_v,
    a_u = L(u) - L(∅),   b_uv = L(u, v) - L(u) - L(v) + L(∅),

exact for up to two. As ``x_u² = x_u``, any diagonal ``D`` may stand in ``Q = b / 2 + D`` and be taken from
``2 h = a - diag(D)``; with one that makes ``Q`` positive definite this is a ``LayerProblem`` of one row, and
the constant ``hᵀ Q⁻¹ h`` keeps its error positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InvalidProblemError
from .gram import Gram
from .layer import Drift, LayerProblem

if TYPE_CHECKING:
    from .pattern import SparsityPattern

# What the least eigenvalue of Q is, as a share of its largest.
CONDITION = 1e-3


@dataclass(frozen=True, eq=False)
class MeasuredLosses:
    """Losses of a model without some of its units, in nats per token.

    Args:
        dense: ``L(∅)``.
        without: ``L(u, v)`` (units, units), symmetric, ``L(u)`` on its diagonal.

    Raises:
        InvalidProblemError: if that is not such a matrix of finite losses.
    """

    dense: float
    without: Tensor

    def __post_init__(self) -> None:
        losses = self.without
        square = losses.ndim == 2 and losses.shape[0] == losses.shape[1] and len(losses) > 1
        if not square or not torch.equal(losses, losses.T) or not bool(torch.isfinite(losses).all()):
            raise InvalidProblemError(
                "losses without one and two units: expected a symmetric matrix of two or more finite "
                f"numbers, found {tuple(losses.shape)} with {int((~torch.isfinite(losses)).sum())} NaN or Inf"
            )

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.without)

    def predicted(self, gone: Tensor) -> float:
        """What the quadratic says without the units of ``gone`` (units,), bool."""
        one = (self.without.diagonal() - self.dense)[gone].double()
        return self.dense + float(one.sum()) + float(self._pairs()[gone][:, gone].sum()) / 2

    def problem(self, pattern: SparsityPattern, name: str = "") -> LayerProblem:
        """The choice as a problem of one row (1, units); its error is the loss up to a constant."""
        pairs = self._pairs() / 2
        least, largest = torch.linalg.eigvalsh(pairs)[[0, -1]].tolist()
        shift = CONDITION * max(largest - least, 1e-9) - least
        quadratic = pairs + shift * torch.eye(self.units, dtype=torch.float64)
        linear = (self.without.diagonal().double() - self.dense - shift) / 2
        constant = linear @ torch.linalg.solve(quadratic, linear)
        ones = torch.ones((1, self.units), dtype=torch.float64)
        return LayerProblem(ones, Gram(quadratic), pattern, Drift(linear[None], constant[None]), name=name)

    def _pairs(self) -> Tensor:
        """``b`` (units, units), zero on the diagonal."""
        losses = self.without.double()
        single = losses.diagonal()
        return (losses - single[:, None] - single[None] + self.dense).fill_diagonal_(0)
