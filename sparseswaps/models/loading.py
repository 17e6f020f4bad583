"""Checkpoints of Hugging Face transformers, loaded whole, offloaded or as a skeleton."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidModelError
from .offload import OffloadedBlocks, Residence, load_offloaded, require_accelerate, skeleton_of

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
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    dtypes: dict[str, torch.dtype]
    residence: Residence = field(default_factory=Residence)

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
    except RuntimeError as error:
        raise InvalidModelError(f"device: expected auto, cpu or cuda, found {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidModelError(f"device {device}: expected a CUDA device, found none on this machine")
    return resolved


# Files of a vocabulary, whatever the class of the tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")


def _has_vocabulary(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer was read from files: transformers makes empty ones up where there are none."""
    named = tuple(tokenizer.vocab_files_names.values())
    return not named or any((folder / name).is_file() for name in (*named, *VOCABULARIES))


def load_model(
    source: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    offload: bool = False,
    weights: bool = True,
) -> LoadedModel:
    """Load a checkpoint by the architecture that its configuration names.

    Args:
        source: directory or hub name.
        device: where to put it.
        dtype: ``auto`` computes in float32 on a CPU and in the checkpoint's dtype elsewhere;
            ``checkpoint`` always in the checkpoint's; or a torch dtype's name.
        offload: leave the weights of the blocks in the checkpoint's files (see ``offload``).
        weights: without, the model is on the meta device: shapes and no values, in a moment.

    Raises:
        InputError: if offloading lacks a library.
        InvalidModelError: if it is missing, damaged or not a transformers model.
    """
    import transformers

    name = os.fspath(source)
    path = Path(name)
    device = torch.device(device)
    if offload:
        require_accelerate()
    if path.exists() and not (path / "config.json").is_file():
        raise InvalidModelError(f"model {name}: expected a directory with config.json, found none in it")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InvalidModelError(f"model {name}: expected an existing directory or a hub name, found neither")
    model: Any
    files: Mapping[str, Tensor] = {}
    folder = ""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architectures = getattr(config, "architectures", None) or []
        loader = getattr(transformers, architectures[0], None) if architectures else None
        loader = loader or transformers.AutoModel
        if not weights:
            model = skeleton_of(loader, config)
        elif offload:
            model, files, folder = load_offloaded(loader, config, name, device)
        else:
            model = loader.from_pretrained(name, dtype="auto")
    except InvalidModelError:
        raise
    except Exception as error:  # anything that a damaged checkpoint makes transformers raise
        raise InvalidModelError(
            f"model {name}: expected a transformers checkpoint, found {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        ) from error
    tokenizer: Any
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if path.is_dir() and not _has_vocabulary(tokenizer, path):
            tokenizer = None
    except Exception:  # a model without a tokenizer still prunes on token files
        tokenizer = None
    dtypes = {key: t.dtype for key, t in [*model.named_parameters(), *model.named_buffers()]}
    if dtype == "auto":
        model = model.float() if device.type == "cpu" else model
    elif dtype != "checkpoint":
        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype):
            raise InvalidModelError(f"dtype: expected auto, float32, bfloat16 or float16, found {dtype!r}")
        model = model.to(wanted)
    if files:
        return LoadedModel(
            model.eval(), tokenizer, name, dtypes, OffloadedBlocks(model, files, device, folder)
        )
    return LoadedModel((model.to(device) if weights else model).eval(), tokenizer, name, dtypes)
