"""Rows brought to a common scale, and what each floating-point type can decide about them.

Swaps do not care about the scale of a row: ``y``, ``h/√diag(G)`` and the square root of the drift's
constant may be divided by any number, errors and Δ by its square. Dividing by a power of two near
``√(Σ_pruned y² + max h² + const)`` is exact and brings every row's error to about 1, so weights and Gram
matrices of any scale neither overflow nor vanish in float32.

Rounding changes Δ(u, p) of a pair that matters by about

    noise = 4 ε max_pruned|y| (‖y_pruned‖ + max|h|)

with ε half the distance from 1 to the next number: ``q`` carries ``2 y c``, and the rounding of
``c = R y_pruned + h`` is a few ε times the norm of its terms. (A kept weight far larger than every
pruned one cannot take part in an improving swap unless the pruned part nearly cancels.) A type
*resolves* a row when the noise is below the threshold of acceptance; duplicated channels, a Gram of
rank one or a drift that nearly cancels need float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 4.0
# Blocks up to this width are searched pair by pair: a bound costs more than it saves.
NARROW_BLOCK = 32
# A row whose fresh costs contradict the updated ones this often is beyond its floating-point type.
REFRESHES = 64
# Lines of so many of the lowest q of both sides are tried before all pairs are.
RANKS = 4
# Bounds of whole lines are interpolated between so many levels of s and 0, see ``reference``.
LEVELS = 32
# Share of its terms by which such a bound is lowered: more than rounding in float32 can lift it.
BOUND_ROUNDING = 1e-6
# Lines with the lowest bounds that are tried before all the others: so many for every so many columns.
PROBES, PROBED_COLS = 16, 1024
# The most tabu walks of a row; each starts from a better local optimum than the one before.
WALKS = 32
# Kept weights this much larger than the row's scale leave the range of float32 states.
LARGEST_FLOAT32 = 1e12


def probes(cols: int) -> int:
    """Lines with the lowest bounds that are tried before all the others, of a row of ``cols``."""
    return PROBES * max(1, cols // PROBED_COLS)


class ScaledRows(NamedTuple):
    """Rows at a common scale.

    Attributes:
        weight: ``y`` over the row's scale (rows, cols), float64.
        drift: ``h/√diag(G)`` over the scale (rows, cols), float64, or None.
        constant: the drift's constant over the squared scale (rows,), float64.
        scale: the power of two (rows,), float64.
    """

    weight: Tensor
    drift: Tensor | None
    constant: Tensor
    scale: Tensor


def scale_rows(weight: Tensor, drift: Tensor | None, constant: Tensor | None, mask: Tensor) -> ScaledRows:
    """Divide each row by a power of two, see the module.

    Args:
        weight: ``y`` (rows, cols), float64.
        drift: ``h/√diag(G)`` (rows, cols), float64, or None.
        constant: ``const`` (rows,), float64, or None.
        mask: kept weights (rows, cols), bool.
    """
    size = weight.abs().masked_fill(mask, 0).amax(1)
    if drift is not None:
        size = torch.maximum(size, drift.abs().amax(1))
    if constant is None:
        constant = torch.zeros_like(size)
    size = torch.maximum(size, constant.sqrt())
    # nothing pruned weighs anything: any scale will do
    size = torch.where(size > 0, size, weight.abs().amax(1))
    # the norm of many equal weights is larger than each of them
    size = size * weight.shape[1] ** 0.5
    exponent = torch.frexp(torch.where(size > 0, size, 1.0)).exponent
    scale = torch.ldexp(torch.ones_like(size), exponent)
    return ScaledRows(
        weight / scale[:, None],
        None if drift is None else drift / scale[:, None],
        constant / scale / scale,
        scale,
    )


def rounding_noise(weight: Tensor, drift: Tensor | None, mask: Tensor) -> Tensor:
    """What rounding in the dtype of ``weight`` does to Δ (rows,), float64; ``inf`` where the range ends.

    Args:
        weight: ``y`` (rows, cols), scaled.
        drift: ``h/√diag(G)`` (rows, cols), scaled, or None.
        mask: kept weights (rows, cols), bool.
    """
    pruned = weight.double().masked_fill(mask, 0)
    size = pruned.norm(dim=1)
    if drift is not None:
        size = size + drift.double().abs().amax(1)
    noise: Tensor = NOISE * torch.finfo(weight.dtype).eps / 2 * pruned.abs().amax(1) * size
    if weight.dtype == torch.float32:
        return torch.where(weight.abs().amax(1) > LARGEST_FLOAT32, torch.inf, noise)
    return noise
