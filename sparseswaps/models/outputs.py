"""What comes out of a model, as states that can be compared with those of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidModelError

# Outputs that say most of what a model makes of its inputs, in the order in which they are looked for.
OF_ENCODER = ("encoder_last_hidden_state", "last_hidden_state")
OF_LAST = ("last_hidden_state",)


def output_states(output: Any, first: Sequence[str] = OF_LAST) -> tuple[str, Tensor]:
    """The states (samples, positions, channels) of a model's output that tell models apart, and their name.

    Hidden states under the names in ``first``; without them all embeddings of samples (``image_embeds``,
    ``text_embeds``), each of length one and side by side, so that the cosine of two is the mean of their
    cosines; without these the logits, and as the last resort the first tensor. Maps of (samples, channels,
    height, width) are positions in a row.

    Raises:
        InvalidModelError: if the output has no tensor with channels.
    """
    found = _tensors_of(output)
    for name in first:
        if name in found:
            return name, _in_a_row(found[name])
    embeds = {name: each for name, each in found.items() if name.endswith("_embeds") and each.ndim == 2}
    if embeds and len({len(each) for each in embeds.values()}) == 1:
        together = [nn.functional.normalize(each.float(), dim=-1) for each in embeds.values()]
        return " and ".join(embeds), torch.cat(together, -1)[:, None]
    for name in ["logits", *found]:
        if name in found:
            return name, _in_a_row(found[name])
    raise InvalidModelError(
        f"expected a model that returns hidden states, embeddings or logits, found {type(output).__name__}"
    )


def _tensors_of(output: Any) -> dict[str, Tensor]:
    """Floating-point tensors (samples, channels, ...) of an output by name."""
    values = output if isinstance(output, Mapping) else {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    }


def _in_a_row(states: Tensor) -> Tensor:
    if states.ndim == 2:
        return states[:, None]
    return states if states.ndim == 3 else states.flatten(2).transpose(1, 2)


def same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same computation differ by rounding alone; NaN is like NaN.

    Threads and batches change the order of sums, which some dozen layers make larger: the square root of the
    dtype's precision, of the largest entry, is left to it (3e-4 in float32). What a block does not hand on
    through its output changes far more.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    size = float(one.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if one.numel() else 0.0
    slack = size * torch.finfo(one.dtype).eps ** 0.5
    return torch.allclose(one, other, rtol=0.0, atol=slack, equal_nan=True)
