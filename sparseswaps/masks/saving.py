"""What a run keeps on the disk: its record while it works, the pruned model with its mask file at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InvalidFileError, file_errors
from ..models.blocks import PrunableLayer
from ..models.loading import LoadedModel, load_model
from ..models.offload import OffloadedBlocks
from ..problems.pattern import Pattern
from ..records.run_database import RunDatabase
from .file import MASK_FILE, LayerMask, layer_mask, load_masks, require_verified, save_masks, verify_model
from .packing import masked

RECORD_FILE = "record.sqlite"
# What repeats the run: ``sparseswaps prune MODEL --settings FILE``.
SETTINGS_FILE = "settings.toml"


def dense_weights(loaded: LoadedModel, layers: Sequence[PrunableLayer]) -> Mapping[str, Tensor]:
    """Weights (rows, cols) of the dense model by layer, on the CPU, in the checkpoint's dtypes.

    Copies where the model is in memory; where it is offloaded they are read when asked for.
    """
    if isinstance(loaded.residence, OffloadedBlocks):
        return _InFiles(loaded.residence, {layer.name: layer for layer in layers}, loaded.dtypes)
    return {
        layer.name: layer.weight.to("cpu", loaded.dtypes[layer.parameter_name], copy=True) for layer in layers
    }


class _InFiles(Mapping[str, Tensor]):
    """Dense weights by layer, read from the checkpoint."""

    def __init__(
        self,
        blocks: OffloadedBlocks,
        layers: Mapping[str, PrunableLayer],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._blocks = blocks
        self._layers = layers
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers[name]
        return self._blocks.dense(layer, self._dtypes[layer.parameter_name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def hash_of_all(weights: Mapping[str, Tensor]) -> str:
    """One SHA-256 over all weights and their names."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that a run cannot write into.

    Raises:
        InvalidFileError: if it is a file, holds other files or another run.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidFileError(f"output {folder}: expected a directory, found a file")
    if (folder / MASK_FILE).exists():
        raise InvalidFileError(f"output {folder}: expected an empty directory, found a finished pruned model")
    if (folder / RECORD_FILE).exists() and not resume:
        raise InvalidFileError(
            f"output {folder}: expected an empty directory, found an unfinished run; add --resume to go on"
        )
    if folder.is_dir() and not resume and any(folder.iterdir()):
        raise InvalidFileError(f"output {folder}: expected an empty directory, found other files")


@contextmanager
def run_record(folder: Path | None, settings: Mapping[str, Any], resume: bool) -> Iterator[RunDatabase]:
    """The run's record; where no layer was finished, a failed run leaves nothing behind."""
    existed = folder is not None and folder.exists()
    with (
        file_errors(f"output {folder}"),
        RunDatabase(None if folder is None else folder / RECORD_FILE) as record,
    ):
        try:
            known = record.facts().get("settings")
            if resume and known is not None:
                if not isinstance(known, dict):
                    raise InvalidFileError(
                        f"record {folder}/{RECORD_FILE}: expected settings, found {_short(known)}"
                    )
                different = [key for key in settings if known.get(key) != settings[key]]
                if different:
                    key = different[0]
                    raise InputError(
                        f"resume {folder}: expected the settings of the interrupted run, found another {key} "
                        f"({_short(settings[key])} instead of {_short(known.get(key))})"
                    )
            else:
                record.set({"settings": dict(settings)})
            yield record
        except BaseException:
            if folder is not None and not record.layers():
                record.close()
                (folder / RECORD_FILE).unlink(missing_ok=True)
                if not existed and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def save_run(
    folder: Path,
    loaded: LoadedModel,
    layers: Sequence[PrunableLayer],
    masks: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    dense: Mapping[str, Tensor],
    record: RunDatabase,
) -> None:
    """Write model, tokenizer and mask file into ``folder``; all of it appears or nothing."""
    facts: dict[str, LayerMask] = {}
    for layer in layers:
        weight, mask = dense[layer.name], masks[layer.name]
        updated = None
        if record.updated_weight(layer.name) is not None:
            updated = masked(loaded.residence.weight(layer).to("cpu", weight.dtype), mask)
        if not loaded.residence.offloaded:
            # exact zeros and the checkpoint's own kept weights, whatever dtype was computed in
            layer.write(masked(weight, mask) if updated is None else updated)
        facts[layer.name] = layer_mask(
            mask, patterns[layer.name], weight, updated, None if layer.expert is None else layer.transposed
        )
    save_model(folder, loaded, masks, facts)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(
    folder: Path, loaded: LoadedModel, masks: Mapping[str, Tensor], facts: Mapping[str, LayerMask]
) -> None:
    """Save a pruned model as a Hugging Face directory with its mask file, and verify it.

    Everything is written to a folder beside the final files, reloaded, verified and only then moved.

    Raises:
        InvalidFileError: if it cannot be written.
        VerificationError: if the reloaded model is not what the masks say.
    """
    with file_errors(f"output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):  # of a run that was killed while it saved
            shutil.rmtree(left)
    with file_errors(f"output {folder}"), tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        partial = Path(name)
        loaded.restore_dtypes()
        _save_pretrained(loaded, partial)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(partial)
        save_masks(partial / MASK_FILE, masks, facts, loaded.source)
        reloaded = load_model(partial, "cpu", dtype="checkpoint", offload=loaded.residence.offloaded)
        require_verified(verify_model(reloaded, load_masks(partial)), f"saved model {folder}")
        # the mask file says that the directory is complete, so it goes last
        for path in sorted(partial.iterdir(), key=lambda path: path.name == MASK_FILE):
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
            shutil.move(path, folder / path.name)


def _save_pretrained(loaded: LoadedModel, folder: Path) -> None:
    if not isinstance(loaded.residence, OffloadedBlocks):
        loaded.model.save_pretrained(folder)
        return
    with loaded.residence.readable(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        loaded.model.save_pretrained(folder, max_shard_size=loaded.residence.block_bytes)
