"""One linear layer as a pruning problem.

With weights ``W`` (rows, cols), Gram matrix ``G = X Xᵀ`` and a mask ``M`` (True = kept), the layer
error is ``‖W X - (M∘W) X‖_F² = Σ_rows rᵀ G r`` with ``r = w∘(1 - m)``, the pruned part of a row
(SparseSwaps, arXiv 2512.10922, section 3). With an equal number of kept weights per row or block
the rows decouple.

Drift: when the layer receives ``X̂`` while its target stays ``W X``, the error of a row becomes

    ‖wᵀX - (m∘w)ᵀX̂‖² = rᵀ Ĝ r + 2 hᵀ r + const,
    Ĝ = X̂ X̂ᵀ,   h = X̂ (X - X̂)ᵀ w,   const = ‖wᵀ(X - X̂)‖²

and a strength α moves the target from ``W X̂`` (α = 0) to ``W X`` (α = 1): h scales by α, const by α².
Any target ``T`` (rows, tokens) gives ``h = X̂ (T - W X̂)ᵀ`` and ``const = ‖T - W X̂‖²`` row by row; for
layers that write into the residual stream ``T = W X̂ + α W (X - X̂) + β s`` lets them repair what the
stream has lost (*residual drift*, strength β): ``s = r - c r̂`` of the dense and pruned stream ``r``, ``r̂``,
each token's ``c`` the one that brings them nearest, for the normalisation layers that read the stream forget
its scale.

Output metric: with ``S`` (rows, rows) positive definite the error is ``tr(S E Eᵀ)``, ``E`` (rows, tokens)
the output error. Rows are coupled then (see ``metric``); ``S = I`` is the paper's problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        constant: ``‖t - wᵀX̂‖²`` (rows,) with the row's target ``t``.
        covariance: ``(T - W X̂)(T - W X̂)ᵀ`` (rows, rows), whose diagonal the constant is; only an
            output metric needs it.
    """

    linear: Tensor
    constant: Tensor
    covariance: Tensor | None = None

    @classmethod
    def from_sums(
        cls, weight: Tensor, sums: GramAccumulator, strength: float, covariance: bool = False
    ) -> Drift:
        """Drift of ``weight`` (rows, cols) from an accumulator with drift.

        Args:
            weight: ``W`` (rows, cols).
            sums: with drift.
            strength: α in [0, 1], how far the target moves to ``W X``.
            covariance: whether the covariance across rows is computed too, for an output metric.
        """
        _check_share("drift strength", strength)
        rows = weight.detach().to(sums.cross().device, torch.float64)
        linear = strength * (rows @ sums.cross().T)
        lost = strength**2 * (rows @ sums.lost())
        if covariance:
            product = lost @ rows.T
            return cls(linear, product.diagonal().clamp_min(0).clone(), product)
        return cls(linear, (lost * rows).sum(1).clamp_min(0))

    @classmethod
    def from_missing(
        cls, sums: GramAccumulator, strengths: Sequence[float], covariance: bool = False
    ) -> Drift:
        """Drift from an accumulator of what the outputs are missing, ``E = Σ_p s_p E_p``.

        Args:
            sums: of the parts ``E_p`` below each other (parts * rows channels).
            strengths: ``s_p`` in [0, 1] of each part.
            covariance: whether the covariance across rows is kept too, for an output metric.
        """
        for strength in strengths:
            _check_share("drift strength", strength)
        rows = sums.missing // len(strengths)
        of_parts = torch.tensor(strengths, dtype=torch.float64, device=sums.missing_cross().device)
        linear = torch.einsum("p,cpr->rc", of_parts, sums.missing_cross().view(-1, len(strengths), rows))
        products = sums.missing_products().view(len(strengths), rows, len(strengths), rows)
        product = torch.einsum("p,q,prqs->rs", of_parts, of_parts, products)
        constant = product.diagonal().clamp_min(0).clone()
        return cls(linear.contiguous(), constant, product if covariance else None)

    @classmethod
    def from_target(cls, weight: Tensor, inputs: Tensor, target: Tensor) -> Drift:
        """Drift of ``weight`` (rows, cols) from inputs ``X̂ᵀ`` (tokens, cols) and ``Tᵀ`` (tokens, rows)."""
        missing = target.double() - inputs.double() @ weight.double().T
        covariance = missing.T @ missing
        return cls(missing.T @ inputs.double(), covariance.diagonal().clone(), covariance)

    def rows(self, rows: slice | Tensor) -> Drift:
        """The drift of some rows."""
        covariance = None if self.covariance is None else self.covariance[rows][:, rows]
        return Drift(self.linear[rows], self.constant[rows], covariance)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InvalidProblemError(f"{name} is a share: expected 0 to 1, found {value:g}")


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Which weights of a linear layer to keep.

    Args:
        weight: ``W`` (rows, cols); half precision is widened to float32.
        gram: ``G`` (cols, cols), a ``Gram`` or a tensor that becomes one.
        pattern: which masks are allowed, a ``Pattern`` or its text such as ``0.5`` or ``2:4``.
        drift: optional linear and constant term of the error.
        metric: optional output metric ``S`` (rows, rows), positive definite; see ``output_metric``.
        name: shown in messages and reports.

    Raises:
        InvalidProblemError: for wrong shapes, NaN or Inf, or an indefinite Gram matrix.
        InvalidPatternError: if the rows do not divide into the pattern's blocks.
    """

    weight: Tensor
    gram: Gram
    pattern: Pattern
    drift: Drift | None = None
    metric: Tensor | None = None
    name: str = ""

    @classmethod
    def from_target(
        cls,
        weight: Tensor,
        inputs: Tensor,
        target: Tensor,
        pattern: Pattern,
        metric: Tensor | None = None,
        name: str = "",
    ) -> LayerProblem:
        """The layer whose outputs are to come close to ``target`` instead of ``W X̂``.

        Args:
            weight: ``W`` (rows, cols).
            inputs: ``X̂ᵀ`` (tokens, cols).
            target: ``Tᵀ`` (tokens, rows).
            pattern: which masks are allowed.
            metric: optional output metric (rows, rows).
            name: shown in messages and reports.

        Raises:
            InvalidProblemError: for shapes that do not fit, NaN or Inf.
        """
        if target.shape != (len(inputs), weight.shape[0]):
            raise InvalidProblemError(
                f"the target of a layer is (tokens, rows): expected {(len(inputs), weight.shape[0])}, "
                f"found {tuple(target.shape)}"
            )
        sums = GramAccumulator(weight.shape[1], weight.device)
        sums.update(inputs)
        drift = Drift.from_target(weight, inputs.to(weight.device), target.to(weight.device))
        return cls(weight, sums.gram(), pattern, drift, metric, name)

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
        pattern = self.pattern if isinstance(self.pattern, Pattern) else Pattern.parse(self.pattern, cols)
        pattern.check_cols(cols)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "gram", gram.to(weight.device))
        if self.drift is not None:
            object.__setattr__(self, "drift", self._checked_drift(self.drift, label))
        if self.metric is not None:
            object.__setattr__(self, "metric", self._checked_metric(self.metric, label))

    def _checked_metric(self, metric: Tensor, label: str) -> Tensor:
        if metric.shape != (self.rows, self.rows):
            raise InvalidProblemError(
                f"the output metric of {label} is (rows, rows): expected ({self.rows}, {self.rows}), "
                f"found {tuple(metric.shape)}"
            )
        metric = metric.detach().to(self.weight.device, torch.float64)
        if not bool(torch.isfinite(metric).all()):
            raise InvalidProblemError(f"the output metric of {label} is finite: found NaN or Inf")
        if not torch.allclose(metric, metric.T, rtol=1e-5, atol=1e-8 * float(metric.abs().max())):
            raise InvalidProblemError(f"the output metric of {label} is symmetric: expected S = Sᵀ")
        metric = (metric + metric.T) / 2
        if int(torch.linalg.cholesky_ex(metric).info) != 0:
            raise InvalidProblemError(
                f"the output metric of {label} is positive definite: found a matrix that is not; "
                "add damping (see output_metric)"
            )
        if self.drift is not None and self.drift.covariance is None:
            raise InvalidProblemError(
                f"drift of {label} under an output metric: expected its covariance (rows, rows), found none"
            )
        return metric

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
        covariance = drift.covariance
        if covariance is not None:
            covariance = covariance.detach().to(self.weight.device, torch.float64)
            if covariance.shape != (self.rows, self.rows) or not bool(torch.isfinite(covariance).all()):
                raise InvalidProblemError(
                    f"covariance of the drift of {label}: expected finite values "
                    f"({self.rows}, {self.rows}), found {tuple(covariance.shape)}"
                )
        return Drift(linear, constant, covariance)

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

    def row_objectives(self, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """Error of each row under ``mask`` (rows, cols), in float64 (rows,).

        With an output metric a row's share ``Σ_j S_ij ⟨E_i, E_j⟩`` of the layer's error, which may be
        negative; the sum never is.

        Args:
            mask: kept weights (rows, cols), bool.
            weight: values of the kept weights (rows, cols) where a solver changed them.

        Raises:
            InvalidProblemError: if ``mask`` has another shape or dtype.
        """
        self._check_mask(mask)
        if self.metric is not None:
            return (self.metric * self.output_error(mask, weight)).sum(1)
        errors = torch.empty(self.rows, dtype=torch.float64, device=self.device)
        for rows, lost in self._lost_weight(mask, weight):
            error = ((lost @ self.gram.matrix) * lost).sum(1)
            if self.drift is not None:
                error += 2 * (self.drift.linear[rows] * lost).sum(1) + self.drift.constant[rows]
            errors[rows] = error
        return errors.clamp_min_(0)  # a squared norm; rounding may say a little less

    def without_drift(self, errors: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """``‖(W - Ŵ) X̂‖²`` of each row (rows,) from its ``errors`` with drift, of the same mask."""
        if self.drift is None:
            return errors
        plain = errors - self.drift.constant
        for rows, lost in self._lost_weight(mask, weight):
            plain[rows] -= 2 * (self.drift.linear[rows] * lost).sum(1)
        return plain.clamp_min_(0)

    def output_error(self, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """``E Eᵀ`` (rows, rows) of the output error ``E = T - Ŵ X̂`` under ``mask``, float64."""
        self._check_mask(mask)
        lost = torch.cat([part for _, part in self._lost_weight(mask, weight)])
        product = lost @ self.gram.matrix @ lost.T
        if self.drift is not None:
            if self.drift.covariance is None:
                raise InvalidProblemError("errors across rows: expected a drift with covariance, found none")
            mixed = lost @ self.drift.linear.T
            product += mixed + mixed.T + self.drift.covariance
        return product

    def _lost_weight(self, mask: Tensor, weight: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """``W - Ŵ`` in float64, some rows at a time."""
        for start in range(0, self.rows, ROW_CHUNK):
            rows = slice(start, start + ROW_CHUNK)
            kept = mask[rows].to(self.device)
            dense = self.weight[rows].double()
            if weight is None:
                yield rows, dense.masked_fill(kept, 0)
            else:
                yield rows, dense - weight[rows].to(dense).masked_fill(~kept, 0)

    def objective(self, mask: Tensor, weight: Tensor | None = None) -> float:
        """Error of the whole layer under ``mask`` (rows, cols), with other kept weights if given."""
        return float(self.row_objectives(mask, weight).sum().clamp_min(0))

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
        """The problem of some rows, sharing the Gram matrix.

        With an output metric these are the rows alone, as if the others made no error.
        """
        return replace(
            self,
            weight=self.weight[rows],
            drift=self.drift and self.drift.rows(rows),
            metric=None if self.metric is None else self.metric[rows][:, rows],
        )

    def to(self, device: torch.device | str) -> LayerProblem:
        """The same problem on another device."""
        device = torch.device(device)
        if device == self.device:
            return self
        return replace(self, weight=self.weight.to(device), gram=self.gram.to(device))

    def _check_mask(self, mask: Tensor) -> None:
        if mask.shape != self.weight.shape or mask.dtype != torch.bool:
            raise InvalidProblemError(
                f"a mask is (rows, cols) and bool: expected {tuple(self.weight.shape)} torch.bool, "
                f"found {tuple(mask.shape)} {mask.dtype}"
            )
