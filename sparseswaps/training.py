"""Fine-tuning a pruned model without losing its sparsity.

An optimizer knows nothing of masks: after ``W ← W − η g`` (and weight decay, momentum, …) pruned weights are
no longer zero. ``KeepPruned`` projects them back after every step of the transformers ``Trainer``,

    W ← M ∘ W        (projected gradient descent on the weights that the mask keeps)

Adapters are another matter. LoRA leaves ``W`` frozen and adds a dense ``(α/r) B A``; merging gives
``W + (α/r) B A``, whose pruned weights are not zero any more. After merging put the masks on again, with
``reimpose`` on the model in memory or with ``sparseswaps apply MERGED --masks PRUNED --other-weights`` on
disk: ``M ∘ (W + (α/r) B A)``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .errors import InvalidModelError
from .masks.file import LayerMask, MaskFile, apply_masks, load_masks
from .models.blocks import PrunableLayer, find_blocks

# What wrappers put before and behind the names of layers: peft, torch.compile, DistributedDataParallel.
PREFIXES = ("base_model.model.", "_orig_mod.", "module.")
SUFFIX = ".base_layer"


class KeepPruned(TrainerCallback):
    """Set pruned weights to zero at the start of training and after every optimizer step.

        Trainer(model, arguments, train_dataset=data, callbacks=[KeepPruned("pruned")]).train()

    Works with wrapped models too (peft, ``torch.compile``, data parallel). Where the framework gives each
    process a part of a weight only (FSDP, ZeRO-3) it refuses at the start. The masks take one byte per
    prunable weight on the model's device. Kept weights are never touched, and gradients neither: those of
    pruned weights still count where the trainer clips by norm.

    Args:
        masks: a mask file, its directory (a pruned model), or masks (rows, cols) by layer name.

    Raises:
        InvalidFileError: if there is no such mask file.
    """

    def __init__(self, masks: str | os.PathLike[str] | MaskFile | Mapping[str, Tensor]) -> None:
        self._masks = _masks_of(masks)
        self._held: list[_Held] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the layers and set their pruned weights to zero.

        Raises:
            InvalidModelError: if a layer is missing or has another shape.
        """
        if model is None:
            raise InvalidModelError("training callback KeepPruned: expected the trainer's model, found none")
        self._held = _hold(model, self._masks)
        self._project()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set pruned weights to zero."""
        self._project()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model."""
        self._held = []

    def _project(self) -> None:
        with torch.no_grad():
            for each in self._held:
                # a wrapper may have moved the weight since the last step
                stored = each.layer.stored
                if each.pruned.device != stored.device:
                    each.pruned = each.pruned.to(stored.device)
                stored.masked_fill_(each.pruned, 0)


def reimpose(model: nn.Module, masks: str | os.PathLike[str] | MaskFile) -> dict[str, LayerMask]:
    """Set pruned weights to zero in a model whose weights have changed, for instance by merging adapters.

    Args:
        model: the merged model, in place.
        masks: mask file, its directory (a pruned model), or a file that was read.

    Returns:
        Facts of each layer as it is now, for a new mask file (see ``masks.save_masks``).

    Raises:
        InvalidFileError: if the file is missing, or a layer is missing or differs.
    """
    file = masks if isinstance(masks, MaskFile) else load_masks(masks)
    return apply_masks(model, file, same_weights=False)


@dataclass(eq=False)
class _Held:
    """A layer and where it is pruned, in the orientation of its storage."""

    layer: PrunableLayer
    pruned: Tensor


def _masks_of(masks: str | os.PathLike[str] | MaskFile | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(masks, MaskFile):
        return masks.masks
    return masks if isinstance(masks, Mapping) else load_masks(masks).masks


def _plain_name(name: str) -> str:
    """A layer's name without what wrappers add."""
    while any(name.startswith(prefix) for prefix in PREFIXES):
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    return name.removesuffix(SUFFIX)


def _hold(model: nn.Module, masks: Mapping[str, Tensor]) -> list[_Held]:
    layers = {
        _plain_name(layer.name): layer for block in find_blocks(model, routers=True) for layer in block.layers
    }
    held = []
    for name, mask in masks.items():
        layer = layers.get(name)
        if layer is None:
            raise InvalidModelError(
                f"training callback KeepPruned: expected a layer {name} in the model, found none of that name"
            )
        if layer.weight.shape != mask.shape:
            raise InvalidModelError(
                f"training callback KeepPruned, layer {name}: expected a whole weight {tuple(mask.shape)}, "
                f"found {tuple(layer.weight.shape)}"
            )
        pruned = ~mask.to(layer.weight.device)
        held.append(_Held(layer, (pruned.T if layer.transposed else pruned).contiguous()))
    return held
