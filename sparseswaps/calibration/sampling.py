"""Random numbers of each window, and labels from them.

The numbers of a window depend on the seed and the window alone, so that no batch, slice of tokens, group of
blocks or process changes them, and what did not fit into memory is done again with the same ones. A label
takes one number per token: it is the class at which the distribution function of the model's logits exceeds
that number.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Random numbers of windows, in any order and as often as wanted.

    Args:
        seed: with another one they are others.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def uniform(self, windows: range, count: int) -> Tensor:
        """``count`` numbers in [0, 1) of each window, (windows · count,), float64."""
        drawn = [self._generator(window).random(count) for window in windows]
        return torch.from_numpy(np.concatenate(drawn))

    def normal(self, windows: range, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers of each window (windows, *shape), float32."""
        drawn = [self._generator(window).standard_normal(shape, dtype=np.float32) for window in windows]
        return torch.from_numpy(np.stack(drawn))

    def _generator(self, window: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, window))


def drawn_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """A class for each token, drawn from ``softmax(logits)``.

    The first one whose cumulative share exceeds the token's number. Shares are summed in groups of about
    √classes and only the chosen group is looked into, so that beside ``logits`` one tensor of their size is
    made. A class of no share is never drawn, whatever rounding says.

    Args:
        logits: (tokens, classes), float32.
        uniform: a number in [0, 1) for each token (tokens,), float64.

    Returns:
        (tokens,), int64.
    """
    classes = logits.shape[1]
    size = math.isqrt(classes - 1) + 1
    whole = classes // size * size
    shares = (logits - logits.amax(-1, keepdim=True)).exp_()
    groups = shares[:, :whole].view(len(shares), whole // size, size).sum(-1).double()
    if whole < classes:
        groups = torch.cat([groups, shares[:, whole:].sum(-1, keepdim=True).double()], dim=1)
    group, rest = _exceeding(groups, uniform.to(logits.device) * groups.sum(-1))
    columns = group[:, None] * size + torch.arange(size, device=logits.device)
    inside = shares.gather(1, columns.clamp_max(classes - 1)).double().masked_fill_(columns >= classes, 0)
    return group * size + _exceeding(inside, rest)[0]


def _exceeding(shares: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place where the sum of ``shares`` (tokens, places) exceeds ``target`` (tokens,).

    Returns:
        Of each token that place, always one with a share, and what the target is above all before it.
    """
    cumulative = shares.cumsum(-1)
    count = shares.shape[1]
    places = torch.arange(count, device=shares.device)
    found = (cumulative <= target[:, None]).sum(-1, keepdim=True)
    later = places.where((shares > 0) & (places >= found), count).amin(-1)
    last = places.where(shares > 0, 0).amax(-1)
    chosen = later.where(later < count, last)
    before = (cumulative - shares).gather(1, chosen[:, None])[:, 0]
    return chosen, target - before
