"""Labels of the output metric from whole distribution functions, with numpy alone."""

from __future__ import annotations

import numpy as np
import torch


def labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """A class for each position of (windows, positions, classes), (windows · positions,)."""
    found = []
    for window, each in enumerate(logits.detach().double().numpy()):
        shares = np.exp(each - each.max(-1, keepdims=True))
        numbers = np.random.default_rng((seed, window)).random(len(each))
        above = np.cumsum(shares, -1) > (numbers * shares.sum(-1))[:, None]
        found.append(above.argmax(-1))
    return torch.from_numpy(np.concatenate(found))


def directions(embeddings: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal numbers of the shape of (windows, positions, hidden)."""
    numbers = [
        np.random.default_rng((seed, window)).standard_normal(tuple(each.shape), dtype=np.float32)
        for window, each in enumerate(embeddings)
    ]
    return torch.from_numpy(np.stack(numbers))
