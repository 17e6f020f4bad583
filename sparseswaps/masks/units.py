"""Which units of a dense model a smaller one has: a file beside its weights, and what proves it.

``units.safetensors`` holds for each consumer the kept units (units,), bool. Its metadata says where the dense
model came from, what belongs to each unit, and the SHA-256 of every tensor of the smaller model, so that this
is verified without the dense one; with it, every tensor but the consumers' is compared with the dense rows
and columns that stay, bit for bit. Consumers' weights are those of least squares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InvalidFileError, VerificationError, file_errors
from ..models.blocks import weight_hash
from ..models.units import UnitGroup, bias_of, complement

FORMAT = "sparseswaps-units-1"
UNITS_FILE = "units.safetensors"


@dataclass(frozen=True, eq=False)
class UnitsFile:
    """What the file says.

    Attributes:
        model: where the dense model came from.
        kept: units that stay (units,), bool, by the consumer's name.
        kinds: kind of unit by the consumer's name.
        hashes: SHA-256 of each tensor of the smaller model, by its name.
        settings: how the units were chosen.
    """

    model: str
    kept: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    hashes: Mapping[str, str]
    settings: Mapping[str, object]


def save_units(path: Path, file: UnitsFile) -> None:
    """Write the file."""
    metadata = {
        "format": FORMAT,
        "model": file.model,
        "kinds": json.dumps(dict(file.kinds)),
        "hashes": json.dumps(dict(file.hashes)),
        "settings": json.dumps(dict(file.settings)),
    }
    save_file({name: kept.to(torch.uint8).cpu() for name, kept in file.kept.items()}, path, metadata)


def load_units(path: Path) -> UnitsFile:
    """Read the file of a directory, or a file.

    Raises:
        InvalidFileError: if it is missing or no such file.
    """
    path = path / UNITS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InvalidFileError(f"units {path}: expected a file of units, found none")
    with file_errors(f"units {path}"):
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                kept = {name: file.get_tensor(name).bool() for name in file.keys()}  # noqa: SIM118
            if facts.get("format") != FORMAT:
                raise InvalidFileError(
                    f"units {path}: expected the format {FORMAT}, found {facts.get('format')}"
                )
            kinds, hashes, settings = (json.loads(facts[name]) for name in ("kinds", "hashes", "settings"))
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidFileError(f"units {path}: expected facts of units, found {error!r}") from error
        except Exception as error:  # safetensors has an error of its own for damaged files
            if isinstance(error, InvalidFileError | OSError):
                raise
            raise InvalidFileError(f"units {path}: expected safetensors, found {error}") from error
    return UnitsFile(facts["model"], kept, kinds, hashes, settings)


def hashes_of(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter by name, each shared one once."""
    return {name: weight_hash(parameter.detach().cpu()) for name, parameter in model.named_parameters()}


def problems_of(
    smaller: nn.Module,
    file: UnitsFile,
    dense: nn.Module | None = None,
    groups: Sequence[UnitGroup] = (),
) -> list[str]:
    """One sentence for each thing in which a smaller model is not what its file says.

    Args:
        smaller: in the checkpoint's dtype.
        file: beside it.
        dense: the model that it was made from, in the checkpoint's dtype, or None.
        groups: its units, of the kinds in the file.
    """
    found = hashes_of(smaller)
    problems = [f"{name}: expected it, found none" for name in file.hashes if name not in found]
    problems += [f"{name}: expected no such tensor, found one" for name in found if name not in file.hashes]
    problems += [
        f"{name}: expected the tensor that was saved, found another"
        for name in found
        if name in file.hashes and found[name] != file.hashes[name]
    ]
    if dense is None:
        return problems
    names = {group.consumer.name for group in groups}
    if names != set(file.kept):
        return [*problems, f"units of the dense model: expected {sorted(file.kept)}, found {sorted(names)}"]
    expected = kept_tensors(dense, groups, [file.kept[group.consumer.name] for group in groups])
    updated = {group.consumer.parameter_name for group in groups}
    for name, parameter in smaller.named_parameters():
        wanted = expected.get(name)
        if wanted is None or wanted.shape != parameter.shape:
            shape = "none" if wanted is None else str(tuple(wanted.shape))
            problems.append(f"{name}: expected {shape} of the dense model, found {tuple(parameter.shape)}")
        elif name not in updated and weight_hash(wanted) != weight_hash(parameter.detach().cpu()):
            problems.append(f"{name}: expected the dense values that stay, found others")
    return problems


def require_units(smaller: nn.Module, file: UnitsFile, where: str) -> None:
    """Raise ``VerificationError`` unless the model is what the file says."""
    problems = problems_of(smaller, file)
    if problems:
        raise VerificationError(f"{where}: {problems[0]}")


def kept_tensors(model: nn.Module, groups: Sequence[UnitGroup], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every parameter by name, without the rows and columns of units that go."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for group, stays in zip(groups, kept, strict=True):
        layer = group.consumer
        columns = complement(group.columns, stays, layer.weight.shape[1])
        tensors[layer.parameter_name] = _cut(layer.transposed, tensors[layer.parameter_name], 1, columns)
        for producer, rows in group.producers:
            left = complement(rows, stays, producer.weight.shape[0])
            name = producer.parameter_name
            tensors[name] = _cut(producer.transposed, tensors[name], 0, left)
            if bias_of(producer) is not None:
                bias = f"{producer.name}.bias"
                tensors[bias] = tensors[bias][left]
    return tensors


def _cut(transposed: bool, stored: Tensor, axis: int, left: Tensor) -> Tensor:
    """Rows (axis 0) or columns of ``W`` that stay, as it is stored."""
    return stored.index_select(1 - axis if transposed else axis, left.to(stored.device)).contiguous()
