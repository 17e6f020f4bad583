"""What a run keeps on the disk: its record while it works, the pruned model with its mask file at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, InvalidFileError, VerificationError, file_errors
from ..models.blocks import PrunableLayer, device_of
from ..models.companions import carry_unread, copy_companions, require_carried
from ..models.inputs import Samples, forward_inputs
from ..models.loading import LoadedModel, load_model
from ..models.offload import OffloadedBlocks
from ..models.outputs import output_states, same_but_for_rounding
from ..problems.pattern import Pattern
from ..records.run_database import RunDatabase
from .file import MASK_FILE, LayerMask, layer_mask, load_masks, require_verified, save_masks, verify_model
from .output import RECORD_FILE
from .packing import masked
from .units_file import UNITS_FILE, UnitsFile, load_units, save_units, verify_units

# What repeats the run: ``sparseswaps prune MODEL --settings FILE``.
SETTINGS_FILE = "settings.toml"


@dataclass(frozen=True, eq=False)
class Smaller:
    """A model that kept a part of the units of a larger one.

    Attributes:
        file: what it kept.
        sample: inputs on which it is compared when it was saved.
        dtype: that it computes in, by name.
    """

    file: UnitsFile
    sample: Samples
    dtype: str

    def returned(self, model: nn.Module) -> Tensor:
        """What a model makes of the sample."""
        with torch.no_grad():
            inputs = forward_inputs(model, self.sample.to(device_of(model)))
            return output_states(model(**inputs))[1]


def dense_weights(loaded: LoadedModel, layers: Sequence[PrunableLayer]) -> Mapping[str, Tensor]:
    """Weights (rows, cols) of the dense model by layer, on the CPU, in the checkpoint's dtypes.

    Copies where the model is in memory; where it is offloaded they are read when asked for.
    """
    if isinstance(loaded.residence, OffloadedBlocks):
        return _InFiles(loaded.residence, {layer.name: layer for layer in layers}, loaded.dtypes)
    return {
        layer.name: layer.weight.to("cpu", loaded.dtypes[layer.parameter_name], copy=True) for layer in layers
    }


def other_tensors(loaded: LoadedModel, layers: Sequence[PrunableLayer]) -> dict[str, Tensor]:
    """Embeddings, norms, biases, buffers: all saved tensors but those of ``layers``, by name.

    On the CPU, in the checkpoint's dtypes; where the model is offloaded, those of its blocks are read.
    """
    pruned = {layer.parameter_name for layer in layers}
    residence, saved = loaded.residence, loaded.model.state_dict().keys()
    found: dict[str, Tensor] = {}
    for name, tensor in [*loaded.model.named_parameters(), *loaded.model.named_buffers()]:
        if name not in saved or name in pruned:
            continue
        dtype = loaded.dtypes.get(name, tensor.dtype)
        if tensor.is_meta and isinstance(residence, OffloadedBlocks):
            found[name] = residence.parameter(name, dtype)
        else:
            found[name] = tensor.detach().to("cpu", dtype)
    return found


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
    """One SHA-256 over all tensors and their names."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def run_record(folder: Path | None, settings: Mapping[str, Any], resume: bool) -> Iterator[RunDatabase]:
    """The run's record; where no layer was finished, a failed run leaves nothing behind."""
    path = None if folder is None else folder / RECORD_FILE
    existed = path is not None and path.exists()
    with file_errors(f"output {folder}"), RunDatabase(path) as record:
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
            if path is not None and not existed and not record.layers() and not record.consumers():
                record.close()
                path.unlink(missing_ok=True)
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
    texts: Mapping[str, str],
    smaller: Smaller | None = None,
) -> None:
    """Write model, what stood beside it, ``texts`` by file name, and masks; all of it appears or nothing.

    Args:
        folder: of the model.
        loaded: the pruned model.
        layers: those that have masks.
        masks: (rows, cols), bool, by layer name.
        patterns: of each layer.
        dense: weights before the masks.
        record: of the run.
        texts: more files, by name.
        smaller: what the model kept of a larger one before it got masks.
    """
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
    save_model(folder, loaded, masks, facts, texts, smaller)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(
    folder: Path,
    loaded: LoadedModel,
    masks: Mapping[str, Tensor],
    facts: Mapping[str, LayerMask],
    texts: Mapping[str, str] | None = None,
    smaller: Smaller | None = None,
) -> None:
    """Save a pruned model as a Hugging Face directory with its mask file, its units file, and verify it.

    All that stood beside the checkpoint's weights comes along. Everything is written to a folder beside the
    final files, reloaded, verified and only then moved.

    Args:
        folder: of the model.
        loaded: the pruned model.
        masks: (rows, cols), bool, by layer name; none for a model that is only smaller.
        facts: of each layer.
        texts: more files, by name.
        smaller: what it kept of a larger model, None for a model of the dense one's shapes.

    Raises:
        InvalidFileError: if it cannot be written.
        VerificationError: if the reloaded model is not what masks and units say.
    """
    returned = None if smaller is None else smaller.returned(loaded.model)
    with file_errors(f"output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):  # of a run that was killed while it saved
            shutil.rmtree(left)
    with file_errors(f"output {folder}"), tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        partial = Path(name)
        loaded.restore_dtypes()
        _save_pretrained(loaded, partial)
        carry_unread(loaded, partial)
        if not copy_companions(loaded.origin, partial).has_tokenizer and loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(partial)
        for file, text in (texts or {}).items():
            (partial / file).write_text(text, encoding="utf-8")
        if smaller is not None:
            save_units(partial / UNITS_FILE, smaller.file)
        if facts:
            save_masks(partial / MASK_FILE, masks, facts, loaded.source)
        _require_as_meant(loaded, partial, folder)
        if smaller is not None and returned is not None:
            _require_same_outputs(loaded, partial, smaller, returned)
        # the mask file, or that of the units, says that the directory is complete, so it goes last
        last = (UNITS_FILE, MASK_FILE)
        for path in sorted(
            partial.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1
        ):
            _open_to_all(path)
            if (folder / path.name).is_dir():  # of a run that ended after it
                shutil.rmtree(folder / path.name)
            path.replace(folder / path.name)


def _require_as_meant(loaded: LoadedModel, saved: Path, folder: Path) -> None:
    """Load a saved model and compare it with what was to be saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say of the checkpoint was said when it was loaded
        trust = replace(loaded.trust, pickle=False)
        offload = loaded.residence.offloaded
        reloaded = load_model(saved, "cpu", dtype="checkpoint", offload=offload, trust=trust)
    where = f"saved model {folder}"
    masks = load_masks(saved) if (saved / MASK_FILE).exists() else None
    if masks is not None:
        require_verified(verify_model(reloaded, masks).problems, where)
    if (saved / UNITS_FILE).exists():
        require_verified(verify_units(reloaded, load_units(saved), masks).problems, where)
    require_carried(loaded, reloaded, where)


def _require_same_outputs(loaded: LoadedModel, saved: Path, smaller: Smaller, returned: Tensor) -> None:
    """Load a smaller model as a user would, and compare what it returns with what it returned before."""
    device = device_of(loaded.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trust = replace(loaded.trust, pickle=False)
        reloaded = load_model(saved, device, dtype=smaller.dtype, trust=trust)
    found = smaller.returned(reloaded.model)
    if not same_but_for_rounding(returned, found):
        raise VerificationError(
            f"saved model {loaded.source}: expected the outputs that it had before it was saved, found others"
        )


def _open_to_all(path: Path) -> None:
    """Files as a user's other ones: safetensors writes such that only their owner may read."""
    for each in path.rglob("*") if path.is_dir() else (path,):
        if each.is_file():
            each.chmod(0o666 & ~_umask())


def _save_pretrained(loaded: LoadedModel, folder: Path) -> None:
    if not isinstance(loaded.residence, OffloadedBlocks):
        loaded.model.save_pretrained(folder)
        return
    with loaded.residence.readable(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        loaded.model.save_pretrained(folder, max_shard_size=loaded.residence.block_bytes)
