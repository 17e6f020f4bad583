"""How good a model is: perplexity of causal models, similarity of embeddings of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.logits import SlicedModel
from ..models.blocks import device_of, model_kind
from ..models.inputs import ModelInputs, Samples, forward_inputs, takes
from ..models.outputs import OF_ENCODER, output_states

# Tokens per forward call: enough to keep a processor busy, few enough for its memory.
TOKENS_PER_BATCH = 4096

Report = Callable[[int, int], None]
# Open while the model runs on a batch: the blocks of an offloaded model return what they returned before.
Recall = Callable[[int], AbstractContextManager[None]]


def evaluation_batch_size(length: int) -> int:
    """Windows of ``length`` tokens per forward call, at most."""
    return max(1, TOKENS_PER_BATCH // length)


def perplexity(
    model: nn.Module, windows: Tensor, report: Report | None = None, recall: Recall | None = None
) -> float:
    """Perplexity by the field's protocol (SparseGPT's evaluation).

    Mean over windows of the mean cross-entropy over the length - 1 shifted tokens, then exp. Logits are made
    some tokens at a time (see ``calibration.logits``), so that memory does not grow with the vocabulary.

    Args:
        model: a causal model.
        windows: (windows, length) token ids, non-overlapping.
        report: called with (windows done, windows in all).
        recall: opened with the number of each batch.
    """
    return perplexity_of(batch_losses(SlicedModel(model, windows), windows, report, recall), len(windows))


def perplexity_of(losses: Sequence[float], windows: int) -> float:
    """Perplexity from ``batch_losses`` of so many windows."""
    mean = sum(losses) / windows
    return math.exp(mean) if mean < 700 else math.inf


def batch_losses(
    model: SlicedModel, windows: Tensor, report: Report | None = None, recall: Recall | None = None
) -> list[float]:
    """For each batch the sum over its windows of the mean cross-entropy; arguments as for ``perplexity``."""
    device = device_of(model.model)
    found = []
    length = windows.shape[1]
    size = model.batch_size(length, evaluation_batch_size(length))
    for number, batch in enumerate(torch.split(windows, size)):
        # the last token of a window has nothing to predict: what it is given is dropped afterwards
        following = batch.roll(-1, dims=1).flatten().to(device)

        def losses(logits: Tensor, part: slice, following: Tensor = following) -> Tensor:
            return nn.functional.cross_entropy(logits, following[part], reduction="none")

        with torch.no_grad(), recall(number) if recall else nullcontext():
            of_tokens = torch.cat(list(model.run(batch).each(losses))).view(batch.shape)
        found.append(float(of_tokens[:, :-1].double().mean(1).sum()))
        if report:
            report(min((number + 1) * size, len(windows)), len(windows))
    return found


def pooled_embeddings(
    model: nn.Module, windows: Samples, report: Report | None = None, recall: Recall | None = None
) -> Tensor:
    """Mean-pooled last hidden states (windows, hidden), float32, on the CPU.

    Args:
        model: an encoder, or an encoder-decoder, whose encoder is used; of a model without hidden states
            embeddings or logits (see ``models.outputs``).
        windows: (windows, length) token ids without padding, or other inputs.
        report: called with (windows done, windows in all).
        recall: opened with the number of each batch.
    """
    pooled = []
    size = evaluation_batch_size(windows.shape[1])
    for number, batch in enumerate(windows.split(size)):
        with torch.no_grad(), recall(number) if recall else nullcontext():
            pooled.append(_states(model, batch)[1].float().mean(1).cpu())
        if report:
            report(min((number + 1) * size, len(windows)), len(windows))
    return torch.cat(pooled)


def compared_output(model: nn.Module, windows: Samples) -> str:
    """Name of the model's output that ``pooled_embeddings`` takes the mean of."""
    with torch.no_grad():
        return _states(model, windows[:1])[0]


def _states(model: nn.Module, batch: Samples) -> tuple[str, Tensor]:
    base: Any = getattr(model, "base_model", model)
    given = batch.tensors if isinstance(batch, ModelInputs) else ("input_ids",)
    if not all(
        takes(base, name) for name in given
    ):  # the head of a model may take more than what is below it
        base = model
    output = base(**forward_inputs(model, batch.to(device_of(model))))
    if isinstance(output, tuple):  # what is below it may give its outputs no names
        output = model(**forward_inputs(model, batch.to(device_of(model))))
    return output_states(output, OF_ENCODER)


def mean_cosine(embeddings: Tensor, reference: Tensor) -> float:
    """Mean cosine similarity of corresponding rows, each (windows, hidden)."""
    return float(nn.functional.cosine_similarity(embeddings.double(), reference.double(), dim=1).mean())


def is_causal(model: nn.Module) -> bool:
    """Whether perplexity is the measure of texts; otherwise it is the cosine of pooled embeddings."""
    return model_kind(model) == "causal"
