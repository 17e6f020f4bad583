"""What the dense model answers, and how far another one is from it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import device_of, forward_inputs
from .activations import Stream
from .gradients import embeddings_of, logits_of


class DenseOutputs:
    """What the dense model answers on token windows, to compare a pruned one with.

    The loss of a model is ``KL(dense ‖ model)`` of the next token, summed over tokens, for those with logits,
    and ``½‖z - ẑ‖²`` of normalised last hidden states for the others, summed over tokens too.

    Logits are kept as the output head's inputs where the head alone makes them, and in full otherwise.

    Args:
        model: the dense model.
        windows: (windows, length) token ids.
        batch_size: windows per forward call.
    """

    def __init__(self, model: nn.Module, windows: Tensor, batch_size: int) -> None:
        self.batch_size = batch_size
        self._batches = torch.split(windows, batch_size)
        self._head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        self._kept: list[Tensor] = []
        self._from_head = self._head is not None and self._head_makes_logits(model)
        for batch in self._batches:
            with torch.no_grad():
                hidden, output = self._forward(model, batch)
                logits = logits_of(output)
                if logits is None:
                    kept = embeddings_of(output)
                else:
                    kept = hidden if self._from_head and hidden is not None else logits.log_softmax(-1)
                self._kept.append(kept.cpu())

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(batch.numel() for batch in self._batches)

    def loss(self, model: nn.Module, batch: int) -> Tensor:
        """The loss of ``model`` on one batch, summed over its tokens."""
        device = device_of(model)
        output = model(**forward_inputs(model, self._batches[batch].to(device)))
        logits, kept = logits_of(output), self._kept[batch].to(device)
        if logits is None:
            return 0.5 * ((embeddings_of(output) - kept) ** 2).sum()
        with torch.no_grad():
            dense = self._head(kept).float().log_softmax(-1) if self._from_head else kept.float()
        return (dense.exp() * (dense - logits.float().log_softmax(-1))).sum()

    def total(self, model: nn.Module, stream: Stream | None = None) -> float:
        """The loss of ``model`` on all windows; ``stream``, of the same batches, recalls finished blocks."""
        total = 0.0
        for batch in range(len(self)):
            with torch.no_grad(), nullcontext() if stream is None else stream.recalled(batch):
                total += float(self.loss(model, batch))
        return total

    def _forward(self, model: nn.Module, batch: Tensor) -> tuple[Tensor | None, Any]:
        seen: list[Tensor] = []
        hooks = []
        if self._head is not None:
            hooks.append(self._head.register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
        try:
            device = device_of(model)
            output = model(**forward_inputs(model, batch.to(device)))
        finally:
            for hook in hooks:
                hook.remove()
        return (seen[0] if len(seen) == 1 else None), output

    def _head_makes_logits(self, model: nn.Module) -> bool:
        with torch.no_grad():
            hidden, output = self._forward(model, self._batches[0][:1])
            logits = logits_of(output)
            return hidden is not None and logits is not None and torch.equal(self._head(hidden), logits)
