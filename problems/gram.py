"""The Gram matrix of a layer's inputs, and how it is gathered from activations.

``G = X Xᵀ`` (cols, cols) holds all that the calibration data has to say about a layer (SparseSwaps,
arXiv 2512.10922, section 3). When the layer sees the inputs ``X̂`` of an already pruned network
while its target stays the dense one, the drift needs more sums: for all layers that share the input
``X̂ (X - X̂)ᵀ`` and ``(X - X̂)(X - X̂)ᵀ``, of the same shape; or for one layer with few outputs ``X̂ Eᵀ`` and
``E Eᵀ`` of what its outputs are missing, ``E = T - W X̂``, which are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InvalidProblemError
from .products import Factor, Products, difference, is_half, mirrored

# A float32 Gram of many tokens is off by about 1e-6 of its diagonal; ten times that is still rounding.
SYMMETRY_TOLERANCE = 1e-5
# Smallest eigenvalue of corr(G) that rounding alone explains, for the same reason times sqrt(cols).
DEFINITENESS_TOLERANCE = 1e-4
# Above this width the Cholesky check costs more than it finds: only 2 x 2 minors are checked.
CHOLESKY_LIMIT = 4096


@dataclass(frozen=True, eq=False)
class Gram:
    """A validated Gram matrix with the normalised form that every fast solver shares.

    Args:
        matrix: ``G``, symmetric positive semidefinite, (cols, cols); kept in float64.
        tokens: how many tokens were summed, or 0 if unknown.
        mean: mean of each input channel over those tokens (cols,), or None if unknown; kept in float64.

    Raises:
        InvalidProblemError: if ``matrix`` is not square, finite, symmetric or is indefinite, or if ``mean``
            does not go with it.
    """

    matrix: Tensor
    tokens: int = 0
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise InvalidProblemError(
                f"the Gram matrix is (cols, cols): expected a square matrix, found {tuple(matrix.shape)}"
            )
        if not matrix.is_floating_point():
            raise InvalidProblemError(f"the Gram matrix is real: expected floats, found {matrix.dtype}")
        matrix = matrix.detach().to(torch.float64)
        if not bool(torch.isfinite(matrix).all()):
            bad = int((~torch.isfinite(matrix)).sum())
            raise InvalidProblemError(
                f"the Gram matrix is finite: expected no NaN or Inf, found {bad} such entries"
            )
        object.__setattr__(self, "matrix", _checked_semidefinite(matrix))
        if self.mean is not None:
            object.__setattr__(self, "mean", _checked_mean(self.mean, self.matrix, self.tokens))

    @property
    def cols(self) -> int:
        """Number of input channels."""
        return self.matrix.shape[0]

    @cached_property
    def scale(self) -> Tensor:
        """``√diag(G)``, the norm of each input channel (cols,), float64."""
        return self.matrix.diagonal().clamp_min(0).sqrt()

    @property
    def dead(self) -> Tensor:
        """Channels whose input is always zero (cols,), bool."""
        return self.scale == 0

    @cached_property
    def correlation(self) -> Tensor:
        """``R = D^-½ G D^-½`` (cols, cols), float32; rows and columns of dead channels are zero."""
        return self.correlation64.to(torch.float32)

    @property
    def correlation64(self) -> Tensor:
        """``R`` in float64, computed anew at each call (for the rows that float32 cannot resolve)."""
        inverse = torch.where(self.dead, 0.0, 1 / torch.where(self.dead, 1.0, self.scale))
        correlation = (self.matrix * inverse[:, None]).mul_(inverse[None, :])
        correlation.diagonal().copy_(torch.where(self.dead, 0.0, 1.0))
        return correlation

    @cached_property
    def largest_correlation(self) -> Tensor:
        """``ρ_j = max_{i≠j} |R_ij|`` (cols,), float32."""
        largest = torch.empty(self.cols, dtype=torch.float32, device=self.matrix.device)
        for start in range(0, self.cols, 1024):
            rows = self.correlation[start : start + 1024].abs()
            index = torch.arange(len(rows), device=rows.device)
            rows[index, start + index] = 0
            largest[start : start + len(rows)] = rows.amax(1)
        return largest

    def shrunk(self, share: float) -> Gram:
        """``(1 - λ) G + λ diag(G)``: correlations scaled down, norms of channels kept."""
        if not 0 <= share <= 1:
            raise InvalidProblemError(f"shrinkage is a share: expected 0 to 1, found {share:g}")
        if share == 0:
            return self
        matrix = (1 - share) * self.matrix
        matrix.diagonal().copy_(self.matrix.diagonal())
        # a convex combination of semidefinite matrices: nothing left to check
        return _trusted_gram(matrix, self.tokens, self.mean)

    def to(self, device: torch.device | str) -> Gram:
        """The same matrix on another device, without checking it again."""
        device = torch.device(device)
        if device == self.matrix.device:
            return self
        return _trusted_gram(
            self.matrix.to(device), self.tokens, None if self.mean is None else self.mean.to(device)
        )


def _trusted_gram(matrix: Tensor, tokens: int, mean: Tensor | None) -> Gram:
    """A Gram from a float64 matrix and means that are known to be valid."""
    gram = object.__new__(Gram)
    object.__setattr__(gram, "matrix", matrix)
    object.__setattr__(gram, "tokens", tokens)
    object.__setattr__(gram, "mean", mean)
    return gram


def _checked_mean(mean: Tensor, matrix: Tensor, tokens: int) -> Tensor:
    """``mean`` in float64 beside ``matrix``, or ``InvalidProblemError``."""
    if mean.shape != matrix.shape[:1] or not bool(torch.isfinite(mean).all()):
        raise InvalidProblemError(
            f"means of input channels are finite and (cols,): expected ({len(matrix)},), found "
            f"{tuple(mean.shape)} with {int((~torch.isfinite(mean)).sum())} NaN or Inf"
        )
    mean = mean.detach().to(matrix)
    if tokens < 1 or bool((tokens * mean**2 > matrix.diagonal() * (1 + SYMMETRY_TOLERANCE)).any()):
        raise InvalidProblemError(
            f"means of input channels go with the Gram matrix of as many tokens: expected n μ_j² ≤ G_jj, "
            f"found a larger mean for n = {tokens}"
        )
    return mean


def _checked_semidefinite(matrix: Tensor) -> Tensor:
    """``matrix`` made exactly symmetric, or ``InvalidProblemError``."""
    diagonal = matrix.diagonal()
    if bool((diagonal < 0).any()):
        raise InvalidProblemError(
            f"the Gram matrix is positive semidefinite: expected a diagonal of at least 0, "
            f"found {float(diagonal.min()):g}"
        )
    scale = diagonal.sqrt()
    size = scale[:, None] * scale[None, :]
    asymmetry = (matrix - matrix.T).abs() - SYMMETRY_TOLERANCE * size
    if bool((asymmetry > 0).any()):
        raise InvalidProblemError(
            "the Gram matrix is symmetric: expected G = Gᵀ up to rounding, found a difference of "
            f"{float((matrix - matrix.T).abs().max()):g}"
        )
    matrix = (matrix + matrix.T) / 2
    if bool((matrix.abs() > size * (1 + DEFINITENESS_TOLERANCE)).any()):
        raise InvalidProblemError(
            "the Gram matrix is positive semidefinite: expected |G_ij| ≤ √(G_ii G_jj), "
            "found a larger off-diagonal entry"
        )
    if len(matrix) <= CHOLESKY_LIMIT:
        inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)
        shifted = (matrix * inverse[:, None] * inverse[None, :]).to(torch.float64)
        shifted.diagonal().copy_(torch.ones_like(scale) + DEFINITENESS_TOLERANCE)
        _, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:
            raise InvalidProblemError(
                "the Gram matrix is positive semidefinite: expected eigenvalues of corr(G) of at "
                f"least -{DEFINITENESS_TOLERANCE:g}, found a smaller one"
            )
    return matrix


class GramAccumulator:
    """Sums ``X Xᵀ`` over batches of activations, and the sums that drift needs.

    Sums over a few tokens are in float32, those of all in float64 (see ``products``): activations of any
    dtype and range can neither overflow nor lose their small channels. Of symmetric sums only the upper
    triangle is gathered.

    Args:
        cols: input channels of the layer.
        device: where the sums are kept.
        drift: also sum ``X̂ (X - X̂)ᵀ`` and ``(X - X̂)(X - X̂)ᵀ``, for any layer with this input.
        missing: channels of ``E``, of which ``X̂ Eᵀ`` and ``E Eᵀ`` are summed; 0 for none, and with drift.
    """

    def __init__(
        self, cols: int, device: torch.device | str = "cpu", drift: bool = False, missing: int = 0
    ) -> None:
        if drift and missing:
            raise InvalidProblemError(
                "an accumulator sums what inputs or what outputs have lost: expected one of drift and "
                "missing, found both"
            )
        self.tokens = 0
        self._sums = torch.zeros((3 if drift else 1, cols, cols), dtype=torch.float64, device=device)
        self._totals = torch.zeros(cols, dtype=torch.float64, device=device)  # Σ x̂ over tokens
        # X̂ Eᵀ above E Eᵀ
        self._missing = torch.zeros(
            (cols + missing if missing else 0, missing), dtype=torch.float64, device=device
        )

    @property
    def has_drift(self) -> bool:
        """Whether sums for drift are gathered, of either kind."""
        return len(self._sums) == 3 or self.missing > 0

    @property
    def missing(self) -> int:
        """Channels of ``E``."""
        return self._missing.shape[1]

    def update(
        self, inputs: Tensor, dense_inputs: Tensor | None = None, missing: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            inputs: what the layer receives, ``X̂ᵀ`` (..., cols), any floating dtype.
            dense_inputs: what it receives in the dense model, ``Xᵀ``, same shape; with drift only.
            missing: what its outputs are missing, ``Eᵀ`` (..., missing); with missing only.

        Raises:
            InvalidProblemError: for a wrong width, NaN or Inf, or missing tensors.
        """
        if (len(self._sums) == 3) != (dense_inputs is not None):
            raise InvalidProblemError(
                "an accumulator with drift takes dense inputs beside the inputs, one without drift takes none"
            )
        if (self.missing > 0) != (missing is not None):
            raise InvalidProblemError(
                "an accumulator of missing outputs takes them beside the inputs, one without takes none"
            )
        cols = self._sums.shape[-1]
        rows = self._flatten(inputs, cols)
        if not len(rows):
            return
        dense = absent = None
        if dense_inputs is not None:
            dense = self._flatten(dense_inputs, cols)
            self._same_tokens(rows, dense)
        if missing is not None:
            absent = self._flatten(missing, self.missing)
            self._same_tokens(rows, absent)
        self._add(rows, dense, absent)

    def _add(self, rows: Tensor, dense: Tensor | None, missing: Tensor | None) -> None:
        """Add tokens, in halves where memory is full."""
        products = Products(rows.device, is_half(rows))
        try:
            parts = self._parts(products, rows, dense, missing)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            parts = []
        if not parts:
            torch.cuda.empty_cache()
            for half in (slice(None, len(rows) // 2), slice(len(rows) // 2, None)):
                halves = (None if each is None else each[half] for each in (dense, missing))
                self._add(rows[half], *halves)
            return
        for piece in products.pieces(len(rows)):
            for total, left, right in parts:
                products.add(total, left, right, piece)
            self._totals += parts[0][1].sum(piece)
        self.tokens += len(rows)

    def _parts(
        self, products: Products, rows: Tensor, dense: Tensor | None, missing: Tensor | None
    ) -> list[tuple[Tensor, Factor, Factor]]:
        """Which products are added to which sums, that of the inputs with themselves first."""
        cols = self._sums.shape[-1]
        present = Factor.of(rows)
        factors, parts = [present], [(self._sums[0], present, present)]
        if dense is not None:
            lost = Factor.of(difference(dense, rows), present.half)
            factors.append(lost)
            parts += [(self._sums[1], present, lost), (self._sums[2], lost, lost)]
        if missing is not None:
            absent = Factor.of(missing, present.half)
            factors.append(absent)
            parts += [(self._missing[:cols], present, absent), (self._missing[cols:], absent, absent)]
        products.prepare(*factors)
        return parts

    def merge(self, other: GramAccumulator) -> None:
        """Add the sums of another accumulator, for instance of another process."""
        if other._sums.shape != self._sums.shape or other._missing.shape != self._missing.shape:
            raise InvalidProblemError(
                f"accumulators of one layer merge: expected sums of shape {tuple(self._sums.shape)}, "
                f"found {tuple(other._sums.shape)}"
            )
        self._sums += other._sums.to(self._sums.device)
        self._totals += other._totals.to(self._totals.device)
        self._missing += other._missing.to(self._missing.device)
        self.tokens += other.tokens

    def empty_like(self) -> GramAccumulator:
        """An accumulator of the same shape without any token."""
        return GramAccumulator(self._sums.shape[-1], self._sums.device, len(self._sums) == 3, self.missing)

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and token count as tensors, to be sent to another process."""
        return {
            "sums": self._sums,
            "totals": self._totals,
            "missing": self._missing,
            "tokens": torch.tensor(self.tokens),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> GramAccumulator:
        """The accumulator whose ``state_dict()`` this is."""
        sums = state["sums"]
        accumulator = cls(sums.shape[-1], sums.device, len(sums) == 3, state["missing"].shape[-1])
        accumulator._sums = sums.clone()
        accumulator._totals = state["totals"].clone()
        accumulator._missing = state["missing"].clone()
        accumulator.tokens = int(state["tokens"])
        return accumulator

    def gram(self) -> Gram:
        """The Gram matrix ``X̂ X̂ᵀ`` of everything added so far, with the means of the channels."""
        self._require_tokens()
        # positive semidefinite by construction: nothing left to check
        return _trusted_gram(mirrored(self._sums[0]), self.tokens, self._totals / self.tokens)

    def cross(self) -> Tensor:
        """``X̂ (X - X̂)ᵀ`` (cols, cols), float64."""
        return self._sums[1]

    def lost(self) -> Tensor:
        """``(X - X̂)(X - X̂)ᵀ`` (cols, cols), float64."""
        return mirrored(self._sums[2])

    def missing_cross(self) -> Tensor:
        """``X̂ Eᵀ`` (cols, missing), float64."""
        return self._missing[: self._sums.shape[-1]]

    def missing_products(self) -> Tensor:
        """``E Eᵀ`` (missing, missing), float64."""
        return mirrored(self._missing[self._sums.shape[-1] :])

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise InvalidProblemError(
                "a Gram matrix needs activations: expected at least one token, found none"
            )

    def _flatten(self, inputs: Tensor, cols: int) -> Tensor:
        if inputs.shape[-1] != cols:
            raise InvalidProblemError(
                f"activations are (..., cols): expected {cols} channels, found {inputs.shape[-1]}"
            )
        return inputs.detach().reshape(-1, cols).to(self._sums.device)

    def _same_tokens(self, rows: Tensor, others: Tensor) -> None:
        if len(others) != len(rows):
            raise InvalidProblemError(
                f"dense and pruned inputs cover the same tokens: expected {len(rows)}, found {len(others)}"
            )
