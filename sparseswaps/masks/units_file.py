"""``units.safetensors``: which units of a model a smaller one kept, and how that is checked.

A tensor of bits says, for an axis of a tensor of the dense model, which entries stay; its name is that of the
tensor, a colon and the axis. The metadata holds for each consumer what its units are and how many stay, and
for each tensor of the smaller model, before any masks, its SHA-256 and whether its values are others than the
dense model's. So a saved model is checked without the dense one by hashes, and made again from the dense one,
bit for bit where nothing was updated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidFileError, file_errors
from ..models.blocks import PrunableLayer, find_blocks, weight_hash
from ..models.experts import ExpertGroup
from ..models.loading import LoadedModel
from ..models.offload import OffloadedBlocks
from ..models.shrinking import Units, entries_that_stay
from ..problems.files import as_metadata, from_metadata, json_object
from ..records.run import ConsumerRecord
from .file import LayerMask, MaskFile
from .packing import masked, pack_mask, unpack_mask

UNITS_FORMAT = "sparseswaps-units-1"
UNITS_FILE = "units.safetensors"


@dataclass(frozen=True)
class ConsumerUnits:
    """Units in front of one layer.

    Attributes:
        kind: what a unit is; block: index of the block.
        units, kept: how many the dense model has, and how many stay.
        updated: whether the consumer's kept columns have other weights.
        error_start, error: relative error of the consumer with its old weights and with those it has.
    """

    kind: str
    block: int
    units: int
    kept: int
    updated: bool
    error_start: float
    error: float


@dataclass(frozen=True)
class SmallerTensor:
    """A tensor of the smaller model, before any masks.

    Attributes:
        hash: SHA-256 in the checkpoint's dtype; of a layer's weight (rows, cols) row by row.
        updated: whether its values are others than the dense model's.
    """

    hash: str
    updated: bool = False


@dataclass(frozen=True, eq=False)
class UnitsFile:
    """What a smaller model kept.

    Attributes:
        stay: which entries along an axis of a tensor stay, bool, by its name and the axis.
        tensors: all tensors of the smaller model that are saved, by name.
        consumers: by layer name.
        model: where the dense model came from.
    """

    stay: Mapping[tuple[str, int], Tensor]
    tensors: Mapping[str, SmallerTensor]
    consumers: Mapping[str, ConsumerUnits]
    model: str


@dataclass(frozen=True)
class UnitsVerification:
    """What ``verify_units`` found.

    Attributes:
        consumers: how many layers lost inputs; units, kept: of all of them together.
        parameters: of the smaller model; parameters_before: of the dense one, None without it.
        problems: one sentence for each thing that is wrong; empty if all is well.
    """

    consumers: int
    units: int
    kept: int
    parameters: int
    parameters_before: int | None
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the model is what the file says."""
        return not self.problems


def units_file(
    small: LoadedModel,
    groups: Sequence[Units],
    kept: Sequence[Tensor],
    records: Sequence[ConsumerRecord],
    biases: Collection[str] = (),
) -> UnitsFile:
    """What is to be said of a smaller model before it gets any masks.

    Args:
        small: from ``shrunk_model``.
        groups: of the dense model.
        kept: (units,), bool, of each.
        records: of each group's consumer.
        biases: names of those that absorbed means, or that the dense model does not have.
    """
    updated = set(biases) | {
        name
        for group, record in zip(groups, records, strict=True)
        if record.updated
        for name in (group.scaled if isinstance(group, ExpertGroup) else (group.consumer.parameter_name,))
    }
    named = [field.name for field in fields(ConsumerUnits)]
    return UnitsFile(
        entries_that_stay(groups, kept),
        {name: SmallerTensor(found, name in updated) for name, found in _hashes(small)},
        {record.name: ConsumerUnits(**{name: getattr(record, name) for name in named}) for record in records},
        small.source,
    )


def _hashes(loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    layers = _plain_layers(loaded)
    for name, tensor in saved_tensors(loaded):
        yield name, _hash(tensor, layers.get(name))


def _plain_layers(loaded: LoadedModel) -> dict[str, PrunableLayer]:
    """Layers that are one parameter each, by its name."""
    return {
        layer.parameter_name: layer
        for block in find_blocks(loaded.model, routers=True)
        for layer in block.layers
        if layer.expert is None
    }


def _hash(tensor: Tensor, layer: PrunableLayer | None) -> str:
    return weight_hash(tensor.reshape(-1) if layer is None else layer.within(tensor))


def saved_tensors(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a model that are saved, each tied one once.

    On the CPU, in the checkpoint's dtypes.
    """
    saved, residence = loaded.model.state_dict().keys(), loaded.residence
    for name, tensor in [*loaded.model.named_parameters(), *loaded.model.named_buffers()]:
        dtype = loaded.dtypes.get(name, tensor.dtype)
        if name in saved and tensor.is_meta and isinstance(residence, OffloadedBlocks):
            yield name, residence.parameter(name, dtype)
        elif name in saved:
            yield name, tensor.detach().to("cpu", dtype)


def save_units(path: Path, file: UnitsFile) -> None:
    """Write the file."""
    metadata = {
        "format": UNITS_FORMAT,
        "model": file.model,
        "sizes": json.dumps({f"{name}:{axis}": len(stays) for (name, axis), stays in file.stay.items()}),
        "tensors": json.dumps({name: asdict(facts) for name, facts in file.tensors.items()}),
        "consumers": json.dumps({name: asdict(facts) for name, facts in file.consumers.items()}),
    }
    bits = {f"{name}:{axis}": pack_mask(stays[None])[0] for (name, axis), stays in file.stay.items()}
    save_file(bits, path, as_metadata(metadata))


def load_units(path: str | os.PathLike[str]) -> UnitsFile:
    """Read a units file, or the one in a directory.

    Raises:
        InvalidFileError: if it is missing, damaged or no units file.
    """
    source = Path(path)
    if source.is_dir():
        source = source / UNITS_FILE
    where = f"units file {source}"
    if not source.is_file():
        raise InvalidFileError(f"{where}: expected an existing file, found none")
    with file_errors(where, "safetensors"), safe_open(source, framework="pt") as file:
        metadata = from_metadata(file.metadata())
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    if metadata.get("format") != UNITS_FORMAT:
        raise InvalidFileError(
            f"{where}: expected format {UNITS_FORMAT}, found {metadata.get('format', 'none')}"
        )
    sizes = json_object(metadata.get("sizes", "")) or {}
    stay = {}
    for key, bits in packed.items():
        name, _, axis = key.rpartition(":")
        size = sizes.get(key)
        fits = type(size) is int and bits.dtype == torch.uint8 and bits.shape == ((size + 7) // 8,)
        if not fits or not axis.isdigit():
            raise InvalidFileError(
                f"{where}, tensor {key}: expected the bits of {size} entries, found {tuple(bits.shape)} of "
                f"{bits.dtype}"
            )
        stay[name, int(axis)] = unpack_mask(bits[None], int(str(size)))[0]
    if not stay or set(sizes) != set(packed):
        raise InvalidFileError(
            f"{where}: expected which entries stay of {len(sizes)} axes, found {len(stay)}"
        )
    tensors = {
        name: SmallerTensor(**facts) for name, facts in _facts(where, metadata, "tensors", SmallerTensor)
    }
    consumers = {
        name: ConsumerUnits(**facts) for name, facts in _facts(where, metadata, "consumers", ConsumerUnits)
    }
    return UnitsFile(stay, tensors, consumers, metadata.get("model", ""))


def _facts(
    where: str, metadata: Mapping[str, str], key: str, kind: type
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Facts of each entry of a JSON object in the metadata, each of the type of its field."""
    found = json_object(metadata.get(key, ""))
    hints = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
    if not found:
        raise InvalidFileError(f"{where}: expected facts of {key}, found {metadata.get(key, '')[:60]!r}")
    for name, facts in found.items():
        if not isinstance(facts, dict) or {x: type(facts[x]) for x in facts} != hints:
            raise InvalidFileError(
                f"{where}, {key} {name}: expected {', '.join(hints)}, each of its type, found "
                f"{str(facts)[:60]!r}"
            )
        yield name, facts


def verify_units(
    loaded: LoadedModel,
    file: UnitsFile,
    masks: MaskFile | None = None,
    original: LoadedModel | None = None,
) -> UnitsVerification:
    """Check that a smaller model in its checkpoint's dtypes is exactly what a units file says.

    Every tensor must have its hash; one that a mask prunes must be masked from the tensor that has it. With
    the dense model every tensor is made again from its entries that stay and compared bit for bit, but for
    updated weights.

    Args:
        loaded: the smaller model.
        file: what it kept.
        masks: that it got afterwards; ``verify_model`` checks its weights by them.
        original: the dense model.
    """
    problems = list(_wrong_counts(file))
    layers = _plain_layers(loaded)
    facts = {} if masks is None else _masked_tensors(loaded, masks)
    dense = None if original is None else dict(saved_tensors(original))
    found = dict(saved_tensors(loaded))
    for name in [*file.tensors, *(name for name in found if name not in file.tensors)]:
        if name not in found or name not in file.tensors:
            here, there = ("none", "one") if name not in found else ("one", "none")
            problems.append(f"tensor {name}: expected {there} in the smaller model, found {here}")
            continue
        tensor, said = found[name], file.tensors[name]
        for axis, size in enumerate(tensor.shape):
            stays = file.stay.get((name, axis))
            if stays is not None and int(stays.sum()) != size:
                problems.append(
                    f"tensor {name}: expected {int(stays.sum())} entries along axis {axis}, found {size}"
                )
        own = facts.get(name, ())
        if not own and _hash(tensor, layers.get(name)) != said.hash:
            problems.append(f"tensor {name}: expected the values that were saved, found others")
        if name in layers and own and own[0][1].dense_hash != said.hash:
            problems.append(f"tensor {name}: expected masks of the smaller model's weight, found another's")
        if dense is not None and not said.updated:
            again = _left(dense.get(name), name, file)
            if again is None or not _as_masked(again, tensor, own, masks):
                problems.append(f"tensor {name}: expected what stays of the original, found others")
    return UnitsVerification(
        len(file.consumers),
        sum(each.units for each in file.consumers.values()),
        sum(each.kept for each in file.consumers.values()),
        sum(parameter.numel() for parameter in loaded.model.parameters()),
        None if original is None else sum(each.numel() for each in original.model.parameters()),
        tuple(problems),
    )


def _wrong_counts(file: UnitsFile) -> Iterator[str]:
    """Consumers of which another number of inputs stays than their units have."""
    for name, units in file.consumers.items():
        kept = [
            (int(stays.sum()), len(stays))
            for (tensor, _), stays in file.stay.items()
            if tensor.startswith(f"{name}.")
        ]
        if not any(stays * units.units == size * units.kept for stays, size in kept):
            yield f"layer {name}: expected {units.kept} of {units.units} {units.kind} that stay, found others"


Masked = Sequence[tuple[PrunableLayer, LayerMask]]


def _masked_tensors(loaded: LoadedModel, masks: MaskFile) -> dict[str, list[tuple[PrunableLayer, LayerMask]]]:
    """Layers that have masks, by the name of their parameter."""
    found: dict[str, list[tuple[PrunableLayer, LayerMask]]] = {}
    for block in find_blocks(loaded.model, routers=True):
        for layer in block.layers:
            if layer.name in masks.layers:
                found.setdefault(layer.parameter_name, []).append((layer, masks.layers[layer.name]))
    return found


def _left(dense: Tensor | None, name: str, file: UnitsFile) -> Tensor | None:
    """What is left of a tensor of the dense model, None where it does not have the axes."""
    for (tensor, axis), stays in file.stay.items():
        if tensor == name and dense is not None:
            if axis >= dense.ndim or dense.shape[axis] != len(stays):
                return None
            dense = dense.index_select(axis, stays.nonzero().flatten())
    return dense


def _as_masked(again: Tensor, tensor: Tensor, own: Masked, masks: MaskFile | None) -> bool:
    """Whether a tensor is what is left of the dense one, with the masks of its layers on it."""
    if again.shape != tensor.shape or again.dtype != tensor.dtype:
        return False
    if masks is None or not own:
        return torch.equal(again, tensor)
    again = again.clone()
    for layer, facts in own:
        view, mask = layer.within(again), masks.masks[layer.name]
        view.copy_(layer.within(tensor) if facts.updated else masked(view, mask))
    return torch.equal(again, tensor)
