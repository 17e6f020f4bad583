"""Synthetic layers with a seed: what LLM layers look like, and what breaks solvers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .gram import Gram, GramAccumulator
from .layer import LayerProblem
from .pattern import Pattern

FAMILIES = (
    "correlated",
    "weakly-correlated",
    "duplicates",
    "zero-channels",
    "collinear",
    "huge-range",
    "rank-one",
)


def synthetic_activations(family: str, cols: int, tokens: int, seed: int = 0) -> Tensor:
    """Activations ``Xᵀ`` (tokens, cols), float64.

    Families: ``correlated`` (power-law spectrum, token scales, 2 % outlier channels),
    ``weakly-correlated`` (independent channels with a small common part), ``duplicates`` (every
    channel three times), ``zero-channels`` (a quarter is always zero), ``collinear`` (rank cols/4),
    ``huge-range`` (channel scales from 1e-6 to 1e6) and ``rank-one``.

    Raises:
        InputError: for an unknown family.
    """
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((tokens, cols))
    if family == "weakly-correlated":
        activations = noise + 0.1 * generator.standard_normal((tokens, 1))
    elif family == "duplicates":
        activations = noise[:, np.arange(cols) // 3]
    elif family == "zero-channels":
        activations = noise * (generator.random(cols) >= 0.25)
    elif family == "collinear":
        rank = max(1, cols // 4)
        activations = noise[:, :rank] @ generator.standard_normal((rank, cols))
    elif family == "huge-range":
        activations = noise * 10.0 ** generator.uniform(-6, 6, cols)
    elif family == "rank-one":
        activations = noise[:, :1] * generator.standard_normal(cols)
    elif family == "correlated":
        basis, _ = np.linalg.qr(generator.standard_normal((cols, cols)))
        spectrum = np.arange(1, cols + 1) ** -0.5
        spectrum /= np.sqrt((spectrum**2).mean())
        token_scale = np.exp(0.3 * generator.standard_normal((tokens, 1)))
        activations = (noise * spectrum * token_scale) @ basis.T
        activations += 0.3 * generator.standard_normal((tokens, cols))
        activations += 0.3 * generator.standard_normal(cols)
        channel_scale = np.exp(0.4 * generator.standard_normal(cols))
        outliers = generator.choice(cols, max(1, cols // 50), replace=False)
        channel_scale[outliers] *= generator.uniform(5, 20, len(outliers))
        activations *= channel_scale
    else:
        raise InputError(f"unknown synthetic family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    return torch.from_numpy(activations)


def synthetic_layer(
    family: str,
    rows: int,
    cols: int,
    pattern: Pattern | str = "0.5",
    seed: int = 0,
    tokens: int | None = None,
) -> LayerProblem:
    """A layer of one of ``FAMILIES`` with heavy-tailed weights, float32.

    Args:
        family: see ``synthetic_activations``.
        rows: output channels.
        cols: input channels.
        pattern: a pattern or its text.
        seed: same seed, same layer.
        tokens: calibration tokens, by default four per column.
    """
    activations = synthetic_activations(family, cols, tokens or 4 * cols, seed)
    gram = gram_of(activations)
    generator = np.random.default_rng([seed, 1])
    weight = 0.02 * generator.standard_t(5, (rows, cols))
    if family == "correlated":  # trained weights are smaller where the activations are larger
        weight *= (gram.scale.numpy() / gram.scale.median().item() + 1e-12) ** -0.3
    if isinstance(pattern, str):
        pattern = Pattern.parse(pattern, cols)
    return LayerProblem(
        torch.from_numpy(weight).float(), gram, pattern, name=f"{family}-{rows}x{cols}-{seed}"
    )


def gram_of(activations: Tensor) -> Gram:
    """Gram matrix of activations ``Xᵀ`` (tokens, cols)."""
    accumulator = GramAccumulator(activations.shape[1])
    accumulator.update(activations)
    return accumulator.gram()
