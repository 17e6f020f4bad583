"""How good a loaded model is, offloaded or not, measured by one process or several.

With N ranks each takes every N-th batch of windows; the results are put together in the batches' order, so
that they are those of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..calibration.activations import can_skip, stream_through
from ..calibration.logits import SlicedModel
from ..calibration.store import TensorStore
from ..models.blocks import find_blocks
from ..models.inputs import Samples, joined
from ..models.loading import LoadedModel
from ..ranks import Ranks
from .measures import (
    Recall,
    Report,
    batch_losses,
    evaluation_batch_size,
    perplexity_of,
    pooled_embeddings,
)

T = TypeVar("T")


def model_perplexity(
    loaded: LoadedModel,
    windows: Tensor,
    report: Report | None = None,
    store: TensorStore | None = None,
    ranks: Ranks | None = None,
) -> float:
    """``perplexity`` of a causal model, on every rank.

    Args:
        loaded: the model, the same on every rank.
        windows: (windows, length) token ids.
        report: called with (windows done, windows in all) of this rank.
        store: keeps the activations of an offloaded model between its blocks; main memory by default.
        ranks: the processes that share the work; this one alone by default.
    """
    model = SlicedModel(loaded.model, windows)
    length = windows.shape[1]
    size = model.batch_size(length, evaluation_batch_size(length))

    def losses(own: Tensor) -> list[float]:
        return batch_losses(model, own, report, _recall(loaded, own, size, store))

    return perplexity_of(_shared(losses, windows, size, ranks or Ranks()), len(windows))


def model_embeddings(
    loaded: LoadedModel,
    windows: Samples,
    report: Report | None = None,
    store: TensorStore | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """``pooled_embeddings`` (windows, hidden) of an encoder; arguments as for ``model_perplexity``."""
    size = evaluation_batch_size(windows.shape[1])

    def embeddings(own: Samples) -> Sequence[Tensor]:
        found = pooled_embeddings(loaded.model, own, report, _recall(loaded, own, size, store))
        return torch.split(found, size)

    return torch.cat(_shared(embeddings, windows, size, ranks or Ranks()))


def _shared(measure: Callable[[Any], Sequence[T]], windows: Samples, size: int, ranks: Ranks) -> list[T]:
    """What ``measure`` finds for each batch of ``size`` windows, each measured by one rank."""
    own = windows.split(size)[ranks.number :: ranks.count]
    parts = ranks.gather(lambda: list(measure(joined(own))) if own else [])
    absent = object()
    in_turn = (found for batch in zip_longest(*parts, fillvalue=absent) for found in batch)
    return [found for found in in_turn if found is not absent]  # type: ignore[misc]


def _recall(loaded: LoadedModel, windows: Samples, size: int, store: TensorStore | None) -> Recall | None:
    """Blocks that each came to memory once for all batches, or None where the model may just run."""
    if not loaded.residence.offloaded:
        return None
    blocks = find_blocks(loaded.model, routers=True)
    if not can_skip(loaded.model, blocks, windows):
        return None
    store = (store or TensorStore()).sibling()
    return stream_through(loaded.model, blocks, windows, size, loaded.residence, store).recalled
