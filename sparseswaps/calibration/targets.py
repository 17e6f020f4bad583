"""What a layer's outputs are to be, beside those of the pruned network, and the sums that say so.

With drift α and residual drift β the target is ``T = W X̂ + α W (X - X̂) + β s`` (see ``problems.layer``).
Layers that share an input share the sums of what that has lost. A layer that is alone with its input and has
few outputs gets smaller ones, of what its outputs are missing, ``E = T - W X̂``; so do all layers that write
into the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.blocks import PrunableLayer
from ..problems import Drift, GramAccumulator
from ..problems.products import difference, full_precision
from .experts import is_expert


@dataclass(frozen=True)
class Target:
    """How far targets move to the dense network's outputs.

    Attributes:
        drift: α, or None where several are tried on the same sums.
        residual: β.
    """

    drift: float | None
    residual: float

    def sums(self, group: Sequence[PrunableLayer], writes: bool) -> GramAccumulator:
        """Empty sums for layers with one input; ``writes`` says that it is a writer, alone with its input."""
        layer = group[0]
        (rows, cols), device = layer.weight.shape, layer.weight.device
        # a router may send a token to other experts than in the dense model: no drift there
        if is_expert(layer):
            return GramAccumulator(cols, device)
        if writes and self.residual:
            return GramAccumulator(cols, device, missing=rows * (2 if self.drift is None else 1))
        if self.drift == 0:
            return GramAccumulator(cols, device)
        if are_of_outputs(rows, cols, len(group)):
            return GramAccumulator(cols, device, missing=rows)
        return GramAccumulator(cols, device, drift=True)

    def missing(
        self, weight: Tensor, dense_inputs: Tensor, inputs: Tensor, stream_loss: Tensor | None
    ) -> Tensor:
        """``Eᵀ`` (..., rows) of a batch, of the drift above that of the stream (..., 2 rows) if α is open.

        Args:
            weight: ``W`` (rows, cols) of the dense model.
            dense_inputs: ``Xᵀ`` (..., cols).
            inputs: ``X̂ᵀ`` (..., cols).
            stream_loss: ``s`` (..., rows) of a layer that repairs it.
        """
        if self.drift == 0 and stream_loss is not None:
            return self.residual * stream_loss
        lost = difference(dense_inputs, inputs)
        with full_precision():
            moved = lost @ weight.to(lost.dtype).T
        if self.drift is None:
            return moved if stream_loss is None else torch.cat([moved, stream_loss.to(moved.dtype)], dim=-1)
        moved *= self.drift
        return moved if stream_loss is None else moved + self.residual * stream_loss

    def drift_of(self, weight: Tensor, sums: GramAccumulator, strength: float, covariance: bool) -> Drift:
        """Drift of ``weight`` (rows, cols) from ``sums`` with drift, at α if that is open."""
        if not sums.missing:
            return Drift.from_sums(weight, sums, strength, covariance)
        if self.drift is not None:
            return Drift.from_missing(sums, (1.0,), covariance)
        strengths = (strength, self.residual)[: sums.missing // len(weight)]
        return Drift.from_missing(sums, strengths, covariance)


def are_of_outputs(rows: int, cols: int, layers: int = 1) -> bool:
    """Whether sums of what outputs are missing take fewer products than those of what inputs have lost.

    ``W (X - X̂)`` and ``X̂ Eᵀ`` against ``X̂ (X - X̂)ᵀ`` and a triangle of ``(X - X̂)(X - X̂)ᵀ``.
    """
    return layers == 1 and 4 * rows < 3 * cols
