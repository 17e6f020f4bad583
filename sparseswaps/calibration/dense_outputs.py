"""What the dense model answers, and how far another one is from it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..models.inputs import Samples
from ..problems.products import full_precision
from .activations import Stream
from .gradients import embeddings_of
from .logits import SlicedModel


class DenseOutputs:
    """What the dense model answers on token windows, to compare a pruned one with.

    The loss of a model is ``KL(dense ‖ model)`` of the next token, summed over tokens, for those with logits,
    and ``½‖z - ẑ‖²`` of normalised last hidden states for the others, summed over tokens too.

    Logits are kept as the output head's inputs, from which they are made some tokens at a time, and in full
    only where the model makes them whole (see ``logits``). Choices rest on the loss of all windows, which is
    in full precision whatever torch is told.

    Args:
        model: the dense model, which is pruned afterwards; its head stays as it is.
        windows: (windows, length) token ids.
        batch_size: windows per forward call, or fewer where logits are made whole.
    """

    @full_precision()
    def __init__(self, model: nn.Module, windows: Samples, batch_size: int) -> None:
        self._model = SlicedModel(model, windows)
        self.batch_size = self._model.batch_size(windows.shape[1], batch_size)
        self._batches = windows.split(self.batch_size)
        self._kept: list[Tensor] = []
        for batch in self._batches:
            with torch.no_grad():
                outputs = self._model.run(batch)
                kept = embeddings_of(outputs.output) if outputs.values is None else outputs.values
                self._kept.append(kept.cpu())

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(batch.numel() for batch in self._batches)

    def loss(self, model: nn.Module, batch: int) -> Tensor:
        """The loss of ``model`` on one batch, summed over its tokens."""
        sliced = self._model if model is self._model.model else SlicedModel(model, self._batches[0])
        outputs, kept = sliced.run(self._batches[batch]), self._kept[batch]
        if outputs.values is None:
            embeddings = embeddings_of(outputs.output)
            return 0.5 * ((embeddings - kept.to(embeddings.device)) ** 2).sum()
        device = outputs.values.device

        def divergence(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                dense = self._model.logits(kept[part].to(device)).log_softmax(-1)
            return (dense.exp() * (dense - logits.log_softmax(-1))).sum()

        return outputs.total(divergence)

    @full_precision()
    def total(self, model: nn.Module, stream: Stream | None = None) -> float:
        """The loss of ``model`` on all windows; ``stream``, of the same batches, recalls finished blocks."""
        total = 0.0
        for batch in range(len(self)):
            with torch.no_grad(), nullcontext() if stream is None else stream.recalled(batch):
                total += float(self.loss(model, batch))
        return total
