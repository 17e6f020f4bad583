"""Experts of a mixture that too few calibration tokens reach.

A router sends each token to a few experts, so that an expert may see fewer tokens than its layers have
inputs: its Gram matrix ``G_e`` is singular then, and a mask that is optimal for it fits those tokens alone.
An expert below a threshold (the layer's width by default) gets instead

- in the layers that read the tokens as they come: ``Σ_e G_e`` over all experts of its mixture, which is the
  Gram matrix of all tokens that reach the mixture, each counted as often as it is routed (calibrating every
  expert on all tokens is what the field's quantisers do with mixtures);
- in the layers behind them, whose inputs are the expert's own: ``(1 - λ) G_e + λ diag(G_e)`` with ``λ`` the
  share of the threshold that is missing. One token more makes a small difference.

An expert that no token reaches is left dense, unless it is asked for that it be pruned (``unreached``): its
first layers then by the Gram matrix of its mixture, those behind them by magnitude.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

from ..models.blocks import Block, PrunableLayer
from ..problems import Gram, GramAccumulator
from .steps import Step

_EXPERT = re.compile(r"(^|\.)experts\.(expert_)?\d+\.")


def is_expert(layer: PrunableLayer) -> bool:
    """Whether a router decides which tokens reach the layer: in a fused parameter or in ``experts.N``."""
    return layer.expert is not None or _EXPERT.search(layer.name) is not None


def least_tokens(layer: PrunableLayer, threshold: int | None) -> int:
    """Tokens below which the layer counts as starved: 0 for layers of no expert, its width by default."""
    if not is_expert(layer):
        return 0
    return layer.weight.shape[1] if threshold is None else threshold


def entries(steps: Sequence[Step]) -> set[str]:
    """Names of the layers of fused experts that read the tokens as they come: those reached first."""
    first: dict[int, str] = {}
    layers = [layer for step in steps for layer in step.layers if layer.expert is not None]
    for layer in layers:
        first.setdefault(id(layer.module), layer.parameter)
    return {layer.name for layer in layers if first[id(layer.module)] == layer.parameter}


def all_tokens(layer: PrunableLayer, sums: Mapping[str, GramAccumulator]) -> GramAccumulator:
    """Sums of all experts of the mixture of ``layer``, in their order."""
    family = layer.name.rsplit(".", 1)[0]
    total = sums[layer.name].empty_like()
    for name, each in sums.items():
        if name.rsplit(".", 1)[0] == family:
            total.merge(each)
    return total


def fallback_gram(
    layer: PrunableLayer, own: GramAccumulator, mixture: GramAccumulator | None, least: int
) -> tuple[Gram | None, str]:
    """The Gram matrix of a starved expert, None where there is nothing to go by, and the rule in words.

    Args:
        layer: of the expert.
        own: sums of the tokens that reach it.
        mixture: of all tokens that reach its mixture, for layers that read them as they come.
        least: tokens below which it counts as starved.
    """
    reason = f"{own.tokens} tokens reached the expert, fewer than {least}"
    if mixture is not None and mixture.tokens:
        return mixture.gram(), f"{reason}: Gram matrix of all tokens of its mixture"
    if own.tokens:
        share = 1 - own.tokens / least
        return own.gram().shrunk(share), f"{reason}: Gram matrix shrunk to its diagonal by {share:.2f}"
    return None, ""


def warn_of_starved(
    block: Block,
    step: Step,
    sums: Mapping[str, GramAccumulator],
    threshold: int | None,
    with_unreached: bool,
) -> None:
    """One warning for all starved experts of a step, with those that no token reaches or without."""
    experts = [group[0] for group in step.inputs if is_expert(group[0])]
    starved = [layer for layer in experts if sums[layer.name].tokens < least_tokens(layer, threshold)]
    starved = [layer for layer in starved if with_unreached or sums[layer.name].tokens]
    if not starved:
        return
    fewest = min(starved, key=lambda layer: sums[layer.name].tokens)
    warnings.warn(
        f"experts of {block.name}: {len(starved)} of {len(experts)} expert layers saw fewer calibration "
        f"tokens than {least_tokens(fewest, threshold)}, the fewest "
        f"{sums[fewest.name].tokens} ({fewest.name}); a fallback prunes them, more calibration windows would "
        "not need it",
        stacklevel=2,
    )
