"""Checkpoints of Hugging Face transformers, loaded whole, offloaded or as a skeleton."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, InvalidModelError
from .checkpoints import Reading, choose_reading, require_whole, tell_of_unread
from .offload import OffloadedBlocks, Residence, load_offloaded
from .sources import Source, Trust, locate, read_config, weight_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with what is needed to save it as it came.

    Attributes:
        model: in evaluation mode.
        tokenizer: None if the directory holds none.
        source: path or name that it was loaded from.
        dtypes: dtype of each parameter and buffer in the checkpoint.
        residence: where the weights of its blocks are.
        origin: where its files are, None for a model that came from none.
        unread: tensors of the checkpoint that the model does not have.
        trust: what of the checkpoint was allowed to run code.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    dtypes: dict[str, torch.dtype]
    residence: Residence = field(default_factory=Residence)
    origin: Source | None = None
    unread: tuple[str, ...] = ()
    trust: Trust = field(default_factory=Trust)

    def restore_dtypes(self) -> None:
        """Cast parameters and buffers back to the dtypes of the checkpoint."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name in self.dtypes:
                tensor.data = tensor.data.to(self.dtypes[name])


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        InvalidModelError: for an unknown or absent device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise InvalidModelError(f"device: expected auto, cpu or cuda, found {device!r}") from error
    if resolved.type not in ("cpu", "cuda") or (resolved.type == "cpu" and resolved.index not in (None, 0)):
        raise InvalidModelError(f"device: expected auto, cpu or cuda, found {device!r}")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InvalidModelError(f"device {device}: expected a CUDA device, found none on this machine")
        if (resolved.index or 0) >= count:
            raise InvalidModelError(
                f"device {device}: expected one of {count} CUDA devices, found none of it"
            )
    return resolved


# Floats that models are computed in, by name.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def check_dtype(dtype: str) -> None:
    """Refuse what ``load_model`` cannot compute in.

    Raises:
        InvalidModelError: for anything but what its argument ``dtype`` may be.
    """
    if dtype not in ("auto", "checkpoint", *DTYPES):
        raise InvalidModelError(f"dtype: expected auto, {', '.join(DTYPES)}, found {dtype!r}")


def load_model(
    source: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    offload: bool = False,
    weights: bool = True,
    trust: Trust | None = None,
) -> LoadedModel:
    """Load a checkpoint with the class that reads all of its tensors (see ``checkpoints``).

    Args:
        source: directory, ``.gguf`` file, hub name, or ``package:NAME[/PATH]`` in an installed package.
        device: where to put it.
        dtype: ``auto`` computes in float32 on a CPU and in the checkpoint's dtype elsewhere;
            ``checkpoint`` always in the checkpoint's; or a torch dtype's name.
        offload: leave the weights of the blocks in the checkpoint's files (see ``offload``).
        weights: without, the model is on the meta device: shapes and no values, in a moment.
        trust: what of the checkpoint may run code; nothing by default.

    Raises:
        InputError: if offloading lacks a library.
        InvalidModelError: if it is missing, damaged or not a transformers model, or lacks tensors.
    """
    check_dtype(dtype)
    name, trust, device = os.fspath(source), trust or Trust(), torch.device(device)
    with _one_sentence(name):
        place = locate(name, trust)
        if place.file is not None:
            _require_gguf(name, offload)
        config = read_config(place, trust)
        reading = choose_reading(place, config, trust)
        files: Mapping[str, Tensor] = {}
        folder = ""
        model: Any
        if not weights:
            model = reading.skeleton
        elif offload:
            model, files, folder = load_offloaded(
                reading.architecture,
                reading.skeleton,
                config,
                place.place,
                device,
                weight_options(place, trust),
            )
        else:
            model = _in_memory(place, reading, config, trust)
    if weights:
        tell_of_unread(place, reading)
    dtypes = {key: t.dtype for key, t in [*model.named_parameters(), *model.named_buffers()]}
    model = _cast(model, dtype, device)
    residence = OffloadedBlocks(model, files, device, folder) if files else Residence()
    if weights and not files:
        model = model.to(device)
    return LoadedModel(
        model.eval(), _tokenizer(place, trust), name, dtypes, residence, place, reading.unread, trust
    )


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Whatever a damaged checkpoint makes transformers raise becomes one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = str(error).strip()
        raise InvalidModelError(
            f"model {name}: expected a transformers checkpoint, found {type(error).__name__}: "
            f"{message.splitlines()[0] if message else 'no message'}"
        ) from error


def _require_gguf(name: str, offload: bool) -> None:
    if offload:
        raise InputError(f"offloading {name}: expected a directory of safetensors, found a .gguf file")
    if find_spec("gguf") is None:
        raise InputError(
            f"model {name}: expected the library gguf, found none; run pip install 'sparseswaps[gguf]'"
        )


def _in_memory(place: Source, reading: Reading, config: Any, trust: Trust) -> Any:
    """The model with its weights, on the CPU."""
    options = weight_options(place, trust)
    if place.file is None:
        return reading.architecture.from_pretrained(place.place, config=config, dtype="auto", **options)
    # the class's own reading of the file's configuration, whose quantisation ends here
    model, report = reading.architecture.from_pretrained(place.place, output_loading_info=True, **options)
    require_whole(place, Reading(reading.architecture, model, tuple(sorted(report["missing_keys"])), (), ()))
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    return model


def _cast(model: Any, dtype: str, device: torch.device) -> Any:
    if dtype == "auto":
        return model.float() if device.type == "cpu" else model
    if dtype == "checkpoint":
        return model
    return model.to(DTYPES[dtype])


def _tokenizer(place: Source, trust: Trust) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; a model without one still prunes on token files."""
    import transformers

    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            place.place, **place.options(trust)
        )
    except Exception as error:  # whatever a damaged file makes it raise
        folder = place.folder
        if folder is not None and any((folder / name).exists() for name in _VOCABULARIES):
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"model {place.name}: its tokenizer cannot be read ({message}); only token files can be used",
                stacklevel=3,
            )
        return None
    return None if _is_made_up(found, place) else found


# Files of a vocabulary, whatever the class of the tokenizer.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
# Words that a tokenizer from files has at least.
_LEAST_WORDS = 16


def _is_made_up(tokenizer: PreTrainedTokenizerBase, place: Source) -> bool:
    """Whether transformers made a tokenizer without any words, as it does for some families without files.

    It would read every text as unknown tokens.
    """
    files = set((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    if (
        place.folder is None
        or not files
        or any((place.folder / file).is_file() for file in (*files, *_VOCABULARIES))
    ):
        return False
    return len(set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())) < _LEAST_WORDS
