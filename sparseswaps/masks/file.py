"""Mask files, and how masks are put on a model and checked on it.

A mask file is safetensors with one tensor of packed bits (rows, ⌈cols/8⌉) per layer, True = kept.
Its metadata holds, per layer, shape and pattern, the SHA-256 of the dense weight (to refuse another
model's masks) and of the kept weights (dense weight with zeros where pruned), so that a saved model
can be verified bit for bit without the dense one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError, InvalidFileError, VerificationError, file_errors
from ..models.blocks import PrunableLayer, find_blocks, weight_hash
from ..models.loading import LoadedModel
from ..models.offload import Residence
from ..problems.files import as_metadata, from_metadata, json_object
from ..problems.pattern import Pattern, pattern_of
from .packing import PackedMasks, masked, pack_mask

FORMAT = "sparseswaps-masks-1"
MASK_FILE = "masks.safetensors"


@dataclass(frozen=True)
class LayerMask:
    """What the mask file says of one layer, beside the bits.

    Attributes:
        rows, cols: shape of the weight.
        keep, block, scope: the pattern (see ``problems.pattern``).
        dense_hash: SHA-256 of the dense weight in the checkpoint's dtype.
        kept_hash: SHA-256 of the weight with zeros where pruned, as it was saved.
        updated: whether the solver changed kept weights too: masks alone do not make the saved weight then.
        transposed: whether the model stores it (cols, rows); None where its module tells.
    """

    rows: int
    cols: int
    keep: int
    block: int
    scope: str
    dense_hash: str
    kept_hash: str
    updated: bool = False
    transposed: bool | None = None


@dataclass(frozen=True, eq=False)
class MaskFile:
    """Masks of a model.

    Attributes:
        masks: (rows, cols), bool, by layer name.
        layers: facts by layer name.
        model: where the dense model came from.
    """

    masks: Mapping[str, Tensor]
    layers: Mapping[str, LayerMask]
    model: str


@dataclass(frozen=True)
class Verification:
    """What ``verify_model`` found.

    Attributes:
        layers: how many layers were checked.
        weights: how many weights they have.
        pruned: how many of them are pruned.
        problems: one sentence for each thing that is wrong; empty if all is well.
    """

    layers: int
    weights: int
    pruned: int
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the model is what the mask file says."""
        return not self.problems


def layer_mask(
    mask: Tensor,
    pattern: Pattern,
    dense_weight: Tensor,
    updated: Tensor | None = None,
    transposed: bool | None = None,
) -> LayerMask:
    """Facts of one layer, its weights in the checkpoint's dtype.

    Args:
        mask: (rows, cols), bool.
        pattern: which masks are allowed.
        dense_weight: (rows, cols).
        updated: the weight that is saved (rows, cols) where a solver changed kept weights.
        transposed: see ``LayerMask``.
    """
    kept = dense_weight.masked_fill(~mask.to(dense_weight.device), 0) if updated is None else updated
    rows, cols = dense_weight.shape
    return LayerMask(
        rows,
        cols,
        pattern.keep,
        pattern.block,
        pattern.couples.value,
        weight_hash(dense_weight),
        weight_hash(kept),
        updated is not None,
        transposed,
    )


def save_masks(path: Path, masks: Mapping[str, Tensor], layers: Mapping[str, LayerMask], model: str) -> None:
    """Write a mask file."""
    metadata = {
        "format": FORMAT,
        "model": model,
        "layers": json.dumps({name: asdict(facts) for name, facts in layers.items()}),
    }
    # one layer's bits after the other go to a mapped file, so that those of a large model need no memory
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".bits-") as folder:
        bits: dict[str, Tensor] = {}
        for number, (name, mask) in enumerate(masks.items()):
            packed = pack_mask(mask)
            file = str(Path(folder) / str(number))
            mapped = torch.from_file(file, shared=True, size=packed.numel(), dtype=torch.uint8)
            bits[name] = mapped.view(packed.shape).copy_(packed)
        save_file(bits, path, as_metadata(metadata))


def load_masks(path: str | os.PathLike[str]) -> MaskFile:
    """Read a mask file, or the one in a directory.

    Raises:
        InvalidFileError: if it is missing, damaged or not a mask file.
    """
    source = Path(path)
    if source.is_dir():
        source = source / MASK_FILE
    if not source.is_file():
        raise InvalidFileError(f"mask file {source}: expected an existing file, found none")
    with file_errors(f"mask file {source}", "safetensors"), safe_open(source, framework="pt") as file:
        metadata = from_metadata(file.metadata())
        # these are mapped, and come to memory when they are used
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    if metadata.get("format") != FORMAT:
        raise InvalidFileError(
            f"mask file {source}: expected format {FORMAT}, found {metadata.get('format', 'none')}"
        )
    layers = _layer_facts(source, metadata.get("layers", ""))
    for name, facts in layers.items():
        expected = (facts.rows, (facts.cols + 7) // 8)
        bits = packed.get(name)
        if bits is None or tuple(bits.shape) != expected or bits.dtype != torch.uint8:
            found = "none" if bits is None else f"{tuple(bits.shape)} of {bits.dtype}"
            raise InvalidFileError(
                f"mask file {source}, layer {name}: expected packed bits {expected}, found {found}"
            )
    masks = PackedMasks({name: facts.cols for name, facts in layers.items()}, packed.__getitem__)
    return MaskFile(masks, layers, metadata.get("model", ""))


def _layer_facts(source: Path, text: str) -> dict[str, LayerMask]:
    """Facts of every layer from the metadata of a mask file."""
    found = json_object(text)
    if not found:
        raise InvalidFileError(f"mask file {source}: expected facts of layers, found {text[:60]!r}")
    kinds = {
        each.name: get_args(hint) or (hint,)
        for each, hint in ((each, get_type_hints(LayerMask)[each.name]) for each in fields(LayerMask))
    }
    layers = {}
    for name, facts in found.items():
        where = f"mask file {source}, layer {name}"
        if not isinstance(facts, dict):
            raise InvalidFileError(f"{where}: expected its facts, found {str(facts)[:60]!r}")
        for key, value in facts.items():
            if key not in kinds or type(value) not in kinds[key]:
                raise InvalidFileError(
                    f"{where}: expected facts among {', '.join(kinds)}, each of its type, "
                    f"found {key} = {str(value)[:60]!r}"
                )
        lacking = [
            each.name for each in fields(LayerMask) if each.default is MISSING and each.name not in facts
        ]
        if lacking:
            raise InvalidFileError(f"{where}: expected {lacking[0]}, found none")
        layer = LayerMask(**facts)
        try:
            pattern_of(layer.keep, layer.block, layer.scope).check_cols(layer.cols)
        except InputError as error:
            raise InvalidFileError(f"{where}: {error}") from error
        if min(layer.rows, layer.cols) < 1:
            raise InvalidFileError(f"{where}: expected a shape, found {(layer.rows, layer.cols)}")
        layers[name] = layer
    return layers


def apply_masks(
    model: nn.Module | LoadedModel, file: MaskFile, same_weights: bool = True
) -> dict[str, LayerMask]:
    """Set pruned weights to zero, in place.

    Args:
        model: a model with the dtypes of its checkpoint; a loaded one may be offloaded.
        file: the masks.
        same_weights: refuse a model whose weights are not those that the masks were made for; turn
            it off to prune fine-tuned weights again, for instance after merging adapters.

    Returns:
        Facts of each layer as it is now, for a new mask file.

    Raises:
        InvalidFileError: if a layer is missing or differs.
    """
    layers, residence = _layers_by_name(model, file)
    for name, facts in file.layers.items():
        layer = layers.get(name)
        if layer is None:
            raise InvalidFileError(
                f"masks of {file.model}: expected a layer {name} in the model, found none of that name"
            )
        if tuple(layer.weight.shape) != (facts.rows, facts.cols):
            raise InvalidFileError(
                f"masks of {file.model}, layer {name}: expected a weight {(facts.rows, facts.cols)}, "
                f"found {tuple(layer.weight.shape)}"
            )
        found = weight_hash(residence.weight(layer)) if same_weights else None
        if found is not None and found not in (facts.dense_hash, facts.kept_hash):
            raise InvalidFileError(
                f"masks of {file.model}, layer {name}: expected the weights that the masks were made for, "
                f"found others ({found[:12]} instead of {facts.dense_hash[:12]})"
            )
        if found is not None and facts.updated and found == facts.dense_hash:
            raise InvalidFileError(
                f"masks of {file.model}, layer {name}: expected the saved model, whose kept weights "
                "were updated too, found the dense one; accept other weights to prune it with the masks alone"
            )
    now: dict[str, LayerMask] = {}
    for name, facts in file.layers.items():
        layer = layers[name]
        pattern = pattern_of(facts.keep, facts.block, facts.scope)
        now[name] = (
            facts
            if same_weights
            else layer_mask(file.masks[name], pattern, residence.weight(layer), transposed=facts.transposed)
        )
        residence.change(layer, partial(_masked_by, file.masks, name))
    return now


def _masked_by(masks: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    return masked(weight, masks[name])


def verify_model(
    model: nn.Module | LoadedModel, file: MaskFile, original: nn.Module | LoadedModel | None = None
) -> Verification:
    """Check that a model in its checkpoint's dtypes is exactly what a mask file says.

    Every layer must have the pattern, zeros wherever the mask prunes, and kept weights that equal
    the dense model's bit for bit (by hash; with ``original`` also directly).
    """
    layers, residence = _layers_by_name(model, file)
    originals, dense = ({}, Residence()) if original is None else _layers_by_name(original, file)
    problems: list[str] = []
    weights = pruned = 0
    for name, facts in file.layers.items():
        mask = file.masks[name]
        weights += mask.numel()
        pruned += int((~mask).sum())
        if not pattern_of(facts.keep, facts.block, facts.scope).allows(mask):
            problems.append(f"layer {name}: expected the pattern {facts.keep}:{facts.block}, found another")
        layer = layers.get(name)
        if layer is None or tuple(layer.weight.shape) != (facts.rows, facts.cols):
            found = "none" if layer is None else str(tuple(layer.weight.shape))
            problems.append(f"layer {name}: expected a weight {(facts.rows, facts.cols)}, found {found}")
            continue
        weight = residence.weight(layer).cpu()
        revived = int((weight[~mask] != 0).sum())
        if revived:
            problems.append(
                f"layer {name}: expected zeros where the mask prunes, found {revived} other values"
            )
        elif weight_hash(weight) != facts.kept_hash:
            problems.append(f"layer {name}: expected kept weights equal to the dense model's, found others")
        if original is not None and not facts.updated:
            twin = originals.get(name)
            if twin is None or not torch.equal(dense.weight(twin).cpu()[mask], weight[mask]):
                problems.append(f"layer {name}: expected the kept weights of the original, found others")
    return Verification(len(file.layers), weights, pruned, tuple(problems))


def require_verified(problems: Sequence[str], where: str) -> None:
    """Raise ``VerificationError`` with the first problem, if there is one."""
    if problems:
        more = len(problems) - 1
        raise VerificationError(f"{where}: {problems[0]}" + (f" (and {more} more problems)" if more else ""))


def _layers_by_name(
    model: nn.Module | LoadedModel, file: MaskFile
) -> tuple[dict[str, PrunableLayer], Residence]:
    """Layers of the model by name, stored as the mask file says."""
    network, residence = (
        (model.model, model.residence) if isinstance(model, LoadedModel) else (model, Residence())
    )
    blocks = find_blocks(network, routers=True)
    layers = {layer.name: layer for block in blocks for layer in block.layers}
    for name, facts in file.layers.items():
        if name in layers and facts.transposed is not None:
            layers[name] = replace(layers[name], transposed=facts.transposed)
    return layers, residence
