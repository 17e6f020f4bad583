"""Which experts of a mixture to keep: experts as columns of a layer of one row.

The mixture's output is a sum over experts, ``y(t) = Σ_e c_e(t)`` and what else it adds, with the contribution
``c_e(t) = g_e(t) f_e(t)`` of the gate and the expert, zero where the router sends the token elsewhere. With
``x_e = 1`` where an expert is pruned, and a target that lies ``d(t)`` above the mixture's own output,

    Σ_t ‖d + Σ_e x_e c_e‖² = xᵀ Q x + 2 hᵀ x + const,
    Q_ee' = Σ_t ⟨c_e, c_e'⟩,   h_e = Σ_t ⟨c_e, d⟩,   const = Σ_t ‖d‖²,

a ``LayerProblem`` with the weights one and the Gram matrix ``Q``: every solver, bound and certificate holds
as it stands, and the least squares of a ``UnitProblem`` are then one factor for each expert that stays.

This is the error of taking contributions away. A smaller router does more: it sends the tokens of a missing
expert to others, and gates that sum to one are divided anew. No quadratic of ``x`` says that; runs measure it
beside (``pruning.expert_pruning``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InvalidProblemError
from .gram import Gram
from .layer import Drift, LayerProblem
from .products import full_precision
from .units import RIDGE, UnitProblem

if TYPE_CHECKING:
    from .pattern import SparsityPattern


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertProblem(UnitProblem):
    """Which experts of a mixture to keep.

    Args:
        routed: tokens that the router sends to each expert (experts,).
        norms: ``Σ_t ‖c_e(t)‖`` of each (experts,).
    """

    routed: Tensor
    norms: Tensor


class ExpertSums:
    """Sums over tokens of which an ``ExpertProblem`` is made.

    Args:
        experts: how many there are.
        device: where the sums are.
        drift: whether a target is given beside the contributions.

    Attributes:
        tokens: how many were summed.
    """

    def __init__(self, experts: int, device: torch.device, drift: bool = False) -> None:
        self.tokens = 0
        self._quadratic = torch.zeros((experts, experts), dtype=torch.float64, device=device)
        self._linear = self._quadratic.new_zeros(experts) if drift else None
        self._constant = self._quadratic.new_zeros(())
        self._routed = torch.zeros(experts, dtype=torch.long, device=device)
        self._norms = self._quadratic.new_zeros(experts)

    def update(self, contributions: Tensor, experts: Tensor, missing: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            contributions: of each token's experts (tokens, slots, channels).
            experts: which ones (tokens, slots); a negative number says none.
            missing: ``d`` (tokens, channels), as was said at the start.

        Raises:
            InvalidProblemError: for NaN or Inf.
        """
        kind = torch.promote_types(contributions.dtype, torch.float32)
        values = contributions.to(kind).masked_fill((experts < 0)[..., None], 0)
        with full_precision():
            pairs = (values @ values.mT).double()  # (tokens, slots, slots)
            towards = None if missing is None else (values @ missing.to(kind)[..., None])[..., 0].double()
        if not bool(torch.isfinite(pairs).all()):
            raise InvalidProblemError("outputs of experts: expected finite values, found NaN or Inf")
        where = experts.clamp(min=0)
        size = len(self._norms)
        flat = where[:, :, None] * size + where[:, None, :]
        self._quadratic.view(-1).index_add_(0, flat.flatten(), pairs.flatten())
        self._routed += torch.bincount(experts[experts >= 0], minlength=size)
        self._norms.index_add_(0, where.flatten(), pairs.diagonal(dim1=1, dim2=2).sqrt().flatten())
        if towards is not None and missing is not None and self._linear is not None:
            self._linear.index_add_(0, where.flatten(), towards.flatten())
            self._constant += missing.double().square().sum()
        self.tokens += len(values)

    def factors(self, ridge: float = RIDGE) -> Tensor:
        """By what each contribution is multiplied (experts,) so that ``d`` is least: ``1 + (Q + λI)⁻¹ h``.

        Args:
            ridge: λ towards 1, as a share of the mean diagonal of ``Q``.

        Raises:
            InvalidProblemError: for sums without a target.
        """
        if self._linear is None:
            raise InvalidProblemError("factors of experts: expected sums with a target, found none")
        quadratic = (self._quadratic + self._quadratic.T) / 2
        quadratic.diagonal().add_(ridge * float(quadratic.diagonal().mean()))
        if not float(quadratic.diagonal().max()):
            return torch.ones_like(self._linear)
        factor = torch.linalg.cholesky(quadratic)
        return 1 + torch.cholesky_solve(self._linear[:, None], factor)[:, 0]

    def error(self, factors: Tensor | None = None) -> float:
        """``Σ_t ‖d - Σ_e (γ_e - 1) c_e‖²`` with ``factors`` γ (experts,), all 1 by default."""
        if self._linear is None or factors is None:
            return float(self._constant)
        change = factors - 1
        quadratic = float(change @ self._quadratic @ change)
        return max(0.0, float(self._constant) - 2 * float(self._linear @ change) + quadratic)

    @property
    def output_norm(self) -> float:
        """``Σ_t ‖Σ_e c_e(t)‖²``: the error of keeping no expert, without a target."""
        return float(self._quadratic.sum())

    def problem(self, pattern: SparsityPattern, ridge: float = RIDGE, name: str = "") -> ExpertProblem:
        """What the sums say, for a pattern of experts that stay."""
        quadratic = (self._quadratic + self._quadratic.T) / 2
        drift = None
        if self._linear is not None:
            # an expert without tokens costs nothing, whatever rounding says
            linear = self._linear.masked_fill(quadratic.diagonal() <= 0, 0)
            drift = Drift(linear[None], self._constant[None])
        ones = torch.ones((1, len(quadratic)), dtype=torch.float64, device=quadratic.device)
        layer = LayerProblem(ones, Gram(quadratic, self.tokens), pattern, drift, name=name)
        columns = torch.arange(len(quadratic), device=quadratic.device)[:, None]
        return ExpertProblem(
            layer=layer,
            columns=columns,
            pattern=pattern,
            ridge=ridge,
            routed=self._routed.clone(),
            norms=self._norms.clone(),
        )
