"""How good a loaded model is, offloaded or not."""

from __future__ import annotations

from torch import Tensor

from .activations import can_skip, stream_through
from .evaluation import (
    Recall,
    Report,
    embedding_batch_size,
    perplexity,
    perplexity_batch_size,
    pooled_embeddings,
)
from .loading import LoadedModel
from .models import find_blocks
from .store import TensorStore


def model_perplexity(
    loaded: LoadedModel, windows: Tensor, report: Report | None = None, store: TensorStore | None = None
) -> float:
    """``perplexity`` of a causal model.

    Args:
        loaded: the model.
        windows: (windows, length) token ids.
        report: called with (windows done, windows in all).
        store: keeps the activations of an offloaded model between its blocks; main memory by default.
    """
    size = perplexity_batch_size(loaded.model, windows.shape[1])
    return perplexity(loaded.model, windows, report, _recall(loaded, windows, size, store))


def model_embeddings(
    loaded: LoadedModel, windows: Tensor, report: Report | None = None, store: TensorStore | None = None
) -> Tensor:
    """``pooled_embeddings`` (windows, hidden) of an encoder; arguments as in ``model_perplexity``."""
    size = embedding_batch_size(windows.shape[1])
    return pooled_embeddings(loaded.model, windows, report, _recall(loaded, windows, size, store))


def _recall(loaded: LoadedModel, windows: Tensor, size: int, store: TensorStore | None) -> Recall | None:
    """Blocks that each came to memory once for all batches, or None where the model may just run."""
    if not loaded.residence.offloaded:
        return None
    blocks = find_blocks(loaded.model, exclude=())
    if not can_skip(loaded.model, blocks, windows):
        return None
    store = (store or TensorStore()).sibling()
    return stream_through(loaded.model, blocks, windows, size, loaded.residence, store).recalled
