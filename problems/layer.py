"""One linear layer as a pruning problem.

With weights ``W`` (rows, cols), Gram matrix ``G = X Xᵀ`` and a mask ``M`` (True = kept), the layer
error is ``‖W X - (M∘W) X‖_F² = Σ_rows rᵀ G r`` with ``r = w∘(1 - m)``, the pruned part of a row
(SparseSwaps, arXiv 2512.10922, section 3). With an equal number of kept weights per row or block
the rows decouple.

Drift: when the layer receives ``X̂`` while its target stays ``W X``, the error of a row becomes

    ‖wᵀX - (m∘w)ᵀX̂‖² = rᵀ Ĝ r + 2 hᵀ r + const,
    Ĝ = X̂ X̂ᵀ,   h = X̂ (X - X̂)ᵀ w,   const = ‖wᵀ(X - X̂)‖²

and a strength α moves the target from ``W X̂`` (α = 0) to ``W X`` (α = 1): h scales by α, const by α².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InvalidProblemError
from .gram import Gram, GramAccumulator
from .pattern import Pattern

# Rows of a float64 product that are computed at once: bounds the memory beside the Gram matrix.
ROW_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Drift:
    """How far the layer's inputs have drifted from the dense model's.

    Args:
        linear: ``h`` (rows, cols).
        constant: ``‖wᵀ(X - X̂)‖²`` (rows,).
    """

    linear: Tensor
    constant: Tensor

    @classmethod
    def from_sums(cls, weight: Tensor, sums: GramAccumulator, strength: float) -> Drift:
        """Drift of ``weight`` (rows, cols) at strength α in [0, 1], from an accumulator with drift."""
        if not 0 <= strength <= 1:
            raise InvalidProblemError(f"drift strength is a share: expected 0 ≤ α ≤ 1, found {strength:g}")
        rows = weight.detach().to(sums.cross().device, torch.float64)
        linear = strength * (rows @ sums.cross().T)
        constant = strength**2 * ((rows @ sums.lost()) * rows).sum(1)
        return cls(linear, constant.clamp_min(0))


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Which weights of a linear layer to keep.

    Args:
        weight: ``W`` (rows, cols); half precision is widened to float32.
        gram: ``G`` (cols, cols), a ``Gram`` or a tensor that becomes one.
        pattern: which masks are allowed.
        drift: optional linear and constant term of the error.
        name: shown in messages and reports.

    Raises:
        InvalidProblemError: for wrong shapes, NaN or Inf, or an indefinite Gram matrix.
        InvalidPatternError: if the rows do not divide into the pattern's blocks.
    """

    weight: Tensor
    gram: Gram
    pattern: Pattern
    drift: Drift | None = None
    name: str = ""

    def __post_init__(self) -> None:
        label = f"layer {self.name!r}" if self.name else "the layer"
        weight = self.weight.detach()
        if weight.ndim != 2 or 0 in weight.shape:
            raise InvalidProblemError(
                f"weights of {label} are (rows, cols): expected a matrix, found shape {tuple(weight.shape)}"
            )
        if not weight.is_floating_point():
            raise InvalidProblemError(f"weights of {label} are real: expected floats, found {weight.dtype}")
        if not bool(torch.isfinite(weight).all()):
            raise InvalidProblemError(
                f"weights of {label} are finite: expected no NaN or Inf, "
                f"found {int((~torch.isfinite(weight)).sum())}"
            )
        if weight.dtype not in (torch.float32, torch.float64):
            weight = weight.float()
        cols = weight.shape[1]
        gram = self.gram if isinstance(self.gram, Gram) else Gram(self.gram)
        if gram.cols != cols:
            raise InvalidProblemError(
                f"the Gram matrix of {label} is (cols, cols): expected ({cols}, {cols}), "
                f"found ({gram.cols}, {gram.cols})"
            )
        self.pattern.check_cols(cols)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "gram", gram.to(weight.device))
        if self.drift is not None:
            object.__setattr__(self, "drift", self._checked_drift(self.drift, label))

    def _checked_drift(self, drift: Drift, label: str) -> Drift:
        linear = drift.linear.detach().to(self.weight.device, torch.float64)
        constant = drift.constant.detach().to(self.weight.device, torch.float64)
        if linear.shape != self.weight.shape or constant.shape != (self.rows,):
            raise InvalidProblemError(
                f"drift of {label}: expected a linear term {tuple(self.weight.shape)} and a constant "
                f"({self.rows},), found {tuple(linear.shape)} and {tuple(constant.shape)}"
            )
        if not bool(torch.isfinite(linear).all() and torch.isfinite(constant).all()):
            raise InvalidProblemError(f"drift of {label} is finite: expected no NaN or Inf, found some")
        if bool((constant < 0).any()):
            raise InvalidProblemError(
                f"the constant of the drift of {label} is a squared norm: expected at least 0, "
                f"found {float(constant.min()):g}"
            )
        if bool((linear[:, self.gram.dead] != 0).any()):
            raise InvalidProblemError(
                f"drift of {label}: expected 0 for input channels that are always zero, found another value"
            )
        return Drift(linear, constant)

    @property
    def rows(self) -> int:
        """Number of output channels."""
        return self.weight.shape[0]

    @property
    def cols(self) -> int:
        """Number of input channels."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where weights and Gram matrix are."""
        return self.weight.device

    @cached_property
    def scaled_weight(self) -> Tensor:
        """``y = w √diag(G)`` (rows, cols), float64: with ``R = corr(G)`` the error is ``Σ yᵀRy``."""
        return self.weight.double() * self.gram.scale

    @cached_property
    def scaled_drift(self) -> Tensor | None:
        """``h / √diag(G)`` (rows, cols), float64, 0 for dead channels; None without drift."""
        if self.drift is None:
            return None
        return torch.where(self.gram.dead, 0.0, self.drift.linear / self.gram.scale.clamp_min(1e-300))

    def row_objectives(self, mask: Tensor) -> Tensor:
        """Error of each row under ``mask`` (rows, cols), in float64 (rows,).

        Raises:
            InvalidProblemError: if ``mask`` has another shape or dtype.
        """
        self._check_mask(mask)
        errors = torch.empty(self.rows, dtype=torch.float64, device=self.device)
        for start in range(0, self.rows, ROW_CHUNK):
            rows = slice(start, start + ROW_CHUNK)
            pruned = self.weight[rows].double().masked_fill(mask[rows].to(self.device), 0)
            error = ((pruned @ self.gram.matrix) * pruned).sum(1)
            if self.drift is not None:
                error += 2 * (self.drift.linear[rows] * pruned).sum(1) + self.drift.constant[rows]
            errors[rows] = error
        return errors.clamp_min_(0)  # a squared norm; rounding may say a little less

    def objective(self, mask: Tensor) -> float:
        """Error of the whole layer under ``mask`` (rows, cols)."""
        return float(self.row_objectives(mask).sum())

    def output_norms(self) -> Tensor:
        """``‖wᵀX̂‖²`` of each row (rows,), float64: what relative errors are relative to."""
        dense = torch.empty(self.rows, dtype=torch.float64, device=self.device)
        for start in range(0, self.rows, ROW_CHUNK):
            weight = self.weight[start : start + ROW_CHUNK].double()
            dense[start : start + ROW_CHUNK] = ((weight @ self.gram.matrix) * weight).sum(1)
        return dense.clamp_min_(0)

    def is_feasible(self, mask: Tensor) -> bool:
        """Whether ``mask`` has the layer's shape and the pattern."""
        return mask.shape == self.weight.shape and self.pattern.allows(mask)

    def slice_rows(self, rows: slice | Tensor) -> LayerProblem:
        """The problem of some rows, sharing the Gram matrix."""
        drift = self.drift and Drift(self.drift.linear[rows], self.drift.constant[rows])
        return replace(self, weight=self.weight[rows], drift=drift)

    def to(self, device: torch.device | str) -> LayerProblem:
        """The same problem on another device."""
        return replace(self, weight=self.weight.to(device), gram=self.gram.to(device))

    def _check_mask(self, mask: Tensor) -> None:
        if mask.shape != self.weight.shape or mask.dtype != torch.bool:
            raise InvalidProblemError(
                f"a mask is (rows, cols) and bool: expected {tuple(self.weight.shape)} torch.bool, "
                f"found {tuple(mask.shape)} {mask.dtype}"
            )
