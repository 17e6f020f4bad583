"""Small problems of every kind, with the raw activations that they were made from, for oracles."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..problems import Drift, GramAccumulator, LayerProblem, Pattern, SparsityPattern, synthetic_activations

PATTERNS = ("0.5", "0.25", "2:4", "1:4", "3:4")
FAMILIES = (
    "correlated",
    "weakly-correlated",
    "duplicates",
    "zero-channels",
    "collinear",
    "huge-range",
    "rank-one",
)
# Family, pattern and drift of every problem that a solver is tried on.
CASES = tuple(itertools.product(FAMILIES, PATTERNS, (False, True)))


def problem(family: str, pattern: str, drift: bool = False, seed: int = 0) -> LayerProblem:
    """Three rows of twelve weights, small enough to enumerate."""
    return with_raw(family, pattern, drift, seed)[0]


def with_raw(
    family: str, pattern: str, drift: bool = False, seed: int = 0, rows: int = 3, cols: int = 12
) -> tuple[LayerProblem, Tensor, Tensor]:
    """A problem with the raw activations that it was made from, each (cols, tokens), float64.

    Args:
        family: of the activations, see ``synthetic_activations``.
        pattern: text of the pattern.
        drift: whether the target are outputs of other inputs than those that the layer receives.
        seed: of everything random.
        rows: of the weight.
        cols: of the weight.

    Returns:
        The problem, the layer's inputs ``X̂`` and the dense inputs ``X`` that set its target.
    """
    inputs = synthetic_activations(family, cols, 40, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    # dead channels stay dead: the pruned network's zeros are what the Gram matrix sees
    dense = inputs + 0.3 * noise * inputs.std(0) if drift else inputs
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64).float()
    sums = GramAccumulator(cols, drift=drift)
    sums.update(inputs, dense if drift else None)
    made = LayerProblem(
        weight,
        sums.gram(),
        Pattern.parse(pattern, cols),
        Drift.from_sums(weight, sums, 1.0) if drift else None,
        name=f"{family}-{pattern}-{drift}-{seed}",
    )
    return made, inputs.T, dense.T


def raw_error(
    problem: LayerProblem, mask: Tensor, inputs: Tensor, dense: Tensor, kept: Tensor | None = None
) -> Tensor:
    """``‖wᵀX - (m∘ŵ)ᵀX̂‖²`` of each row (rows,), from activations alone.

    Args:
        problem: whose weights w are meant.
        mask: kept weights (rows, cols), bool.
        inputs: ``X̂`` (cols, tokens).
        dense: ``X`` (cols, tokens).
        kept: ŵ (rows, cols) where kept weights were updated; w by default.
    """
    weight = problem.weight.double()
    new = weight if kept is None else kept.double()
    return ((weight @ dense - (new * mask) @ inputs) ** 2).sum(1)


def tolerance(problem: LayerProblem, dense: Tensor, kept: Tensor | None = None) -> Tensor:
    """What rounding may change of each row's error (rows,).

    The Gram matrix is summed from float32 products: 1e-6 of the row's output, which is what cancels.
    """
    sizes = problem.weight.double().abs()
    if kept is not None:
        sizes = torch.maximum(sizes, kept.double().abs())
    return 1e-6 * ((sizes @ dense.abs()) ** 2).sum(1) + 1e-30


def all_masks(pattern: SparsityPattern, cols: int) -> Tensor:
    """Every mask of a row (masks, cols), by brute force."""
    blocks = []
    for choice in itertools.combinations(range(pattern.block), pattern.keep):
        block = torch.zeros(pattern.block, dtype=torch.bool)
        block[list(choice)] = True
        blocks.append(block)
    return torch.stack([torch.cat(each) for each in itertools.product(blocks, repeat=cols // pattern.block)])
