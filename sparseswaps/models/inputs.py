"""What goes into a model: windows of tokens, or any tensors that its forward takes, a sample in each row.

Models of images and sound take no tokens. Their inputs come as tensors with samples along the first
dimension, by the names of the forward's arguments, and are cut, moved and chosen from like windows of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import device_of, model_kind


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """Arguments of a model's forward, a sample in each row.

    Attributes:
        tensors: (samples, ...) each, by name of the argument; the name "" stands for the model's main input.
        positions: the most positions (patches, frames, tokens) that a sample has in a layer of the model; 1
            where that is not known yet.
    """

    tensors: Mapping[str, Tensor]
    positions: int = 1

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor) -> ModelInputs:
        return replace(self, tensors={name: tensor[rows] for name, tensor in self.tensors.items()})

    def split(self, size: int) -> tuple[ModelInputs, ...]:
        """Neighbouring samples, ``size`` at a time."""
        return tuple(self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device) -> ModelInputs:
        """The same on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, positions), what (windows, length) is of tokens."""
        return len(self), self.positions

    def numel(self) -> int:
        """Positions in all samples."""
        return len(self) * self.positions


# Token windows (windows, length), or other inputs of a model.
Samples = Tensor | ModelInputs


def joined(parts: Sequence[Samples]) -> Samples:
    """All samples of ``parts``, which are of one kind, in one."""
    tokens = [part for part in parts if isinstance(part, Tensor)]
    if tokens:
        return torch.cat(tokens)
    others = [part for part in parts if isinstance(part, ModelInputs)]
    names = others[0].tensors
    return replace(others[0], tensors={name: torch.cat([x.tensors[name] for x in others]) for name in names})


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def main_input(model: nn.Module) -> str:
    """Name of the argument of the model's forward that it cannot do without."""
    name = getattr(model, "main_input_name", "input_ids")
    return name if isinstance(name, str) else str(name[0])


def forward_inputs(model: nn.Module, samples: Samples) -> dict[str, Any]:
    """Keyword arguments of ``model.forward`` for token windows (batch, length) or other inputs.

    Floating-point inputs get the dtype of the model's weights.
    """
    inputs: dict[str, Any] = {}
    if isinstance(samples, ModelInputs):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for name, tensor in samples.tensors.items():
            inputs[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    else:
        inputs["input_ids"] = samples
        if model_kind(model) == "seq2seq":
            inputs["decoder_input_ids"] = samples
    known = inspect.signature(model.forward).parameters
    named = isinstance(samples, ModelInputs)  # what makes sense of images or sound may have nothing to cache
    anything = not named and any(argument.kind is argument.VAR_KEYWORD for argument in known.values())
    if hasattr(getattr(model, "config", None), "use_cache") and (anything or "use_cache" in known):
        inputs["use_cache"] = False
    return inputs


def try_forward(model: nn.Module, samples: Samples) -> int:
    """Run the model on the first sample, on shapes alone if it has no weights.

    Returns:
        The most positions that the sample has in a linear layer.
    """
    most = [1]

    def count(layer: nn.Linear, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            most.append(args[0].numel() // layer.in_features)

    shapes_alone = all(parameter.is_meta for parameter in model.parameters())
    device = torch.device("meta") if shapes_alone else device_of(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(**forward_inputs(model, samples[:1].to(device)))
    finally:
        for handle in handles:
            handle.remove()
    return max(most)
