"""What a checkpoint's directory holds beside the weights that its model reads, and how that comes along.

Tokenizer, processor, chat template, generation config and code are copied as they are, and so are the folders
that ``modules.json`` of sentence-transformers names. Tensors that the model's class does not read, such as
heads that predict several tokens, are written beside the saved weights unchanged.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidModelError, VerificationError
from .sources import Source, checkpoint_tensors

if TYPE_CHECKING:
    from .loading import LoadedModel

# Weights in any format, which are those of the dense model.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data",
    "*.gguf", "*.index.json",
)  # fmt: skip
# Files that are written anew.
_OURS = ("config.json", "README.md", "settings.toml", "record.sqlite")
# Folders of tokenizers and of generation that transformers reads.
_FOLDERS = ("additional_chat_templates", "custom_generate")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Companions:
    """Names in the checkpoint's directory.

    Attributes:
        copied: files that came along.
        left: files and folders that did not: weights in other formats, and folders that nothing names.
    """

    copied: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def has_tokenizer(self) -> bool:
        """Whether files of a tokenizer are among them."""
        return any(
            Path(name).name.startswith(("tokenizer", "vocab", "spiece", "tekken")) for name in self.copied
        )


def copy_companions(origin: Source | None, target: Path) -> Companions:
    """Copy what stands beside a checkpoint's weights, and say in one line what is left behind.

    Args:
        origin: where the checkpoint is; None for a model that came from none.
        target: the folder that the model is saved in.
    """
    if origin is None or origin.file is not None:
        return Companions()
    folder = _directory(origin)
    if folder is None:
        return Companions()
    copied: list[str] = []
    left: list[str] = []
    named = _named_folders(folder)
    read = {".safetensors"} if any(folder.glob("*.safetensors")) else {".bin"}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _OURS:
            continue
        if path.is_dir():
            if path.name in named:
                copied += _copy_folder(path, target)
            else:
                left.append(f"{path.name}/")
        elif not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
        elif path.suffix not in read and not path.name.endswith(".index.json"):
            left.append(path.name)
    if left:
        warnings.warn(
            f"model {origin.name}: left behind, as nothing says that they suit the pruned model: "
            + ", ".join(left),
            stacklevel=4,
        )
    return Companions(tuple(copied), tuple(left))


def _directory(origin: Source) -> Path | None:
    """The checkpoint's directory; of a name on the hub its copy, with all that is beside the weights."""
    if Path(origin.place).is_dir():
        return Path(origin.place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(origin.place, ignore_patterns=[*_WEIGHTS, "*/*.safetensors"]))
    except Exception as error:  # whatever the hub says: what was loaded is there
        warnings.warn(
            f"model {origin.name}: expected the files beside its weights from the hub, found "
            f"{type(error).__name__}; those that were loaded before come along",
            stacklevel=5,
        )
        return origin.folder


def _named_folders(folder: Path) -> set[str]:
    """Folders that are part of the model."""
    found = set(_FOLDERS)
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [PurePosixPath(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return found
    return found | {path.parts[0] for path in paths if path.parts and path.parts[0] != ".."}


def _copy_folder(folder: Path, target: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder.parent)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
            yield name.as_posix()


def unread_tensors(loaded: LoadedModel) -> Mapping[str, Tensor]:
    """Tensors of the checkpoint that the model does not have, by name; they come to memory when used.

    Raises:
        InvalidModelError: if one cannot be found under its name.
    """
    if not loaded.unread or loaded.origin is None:
        return {}
    places = checkpoint_tensors(loaded.origin)
    pickled = {} if places else _pickled(loaded.origin)
    found: dict[str, Tensor] = {}
    for name in loaded.unread:
        if name in pickled:
            found[name] = pickled[name]
        elif name in places:
            with safe_open(places[name], framework="pt") as file:
                found[name] = file.get_tensor(name)
        else:
            raise InvalidModelError(
                f"model {loaded.source}: expected the tensor {name}, which its class does not read, in its "
                "files to keep it, found none of that name"
            )
    return found


def _pickled(origin: Source) -> dict[str, Tensor]:
    """Tensors of a checkpoint whose pickled files were allowed."""
    found: dict[str, Any] = {}
    for path in sorted(Path(origin.place).glob("pytorch_model*.bin")):
        found |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found


def carry_unread(loaded: LoadedModel, target: Path) -> None:
    """Write the tensors that the model does not have into a shard of its own in the folder it was saved in.

    Raises:
        InvalidModelError: if one cannot be found.
    """
    extra = {name: tensor.contiguous() for name, tensor in unread_tensors(loaded).items()}
    if not extra:
        return
    single = target / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            places = dict.fromkeys(file.keys(), single.name)
    else:
        places = json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = sorted(set(places.values()))
    shards = {
        name: f"model-{number:05d}-of-{len(files) + 1:05d}.safetensors"
        for number, name in enumerate(files, start=1)
    }
    last = f"model-{len(files) + 1:05d}-of-{len(files) + 1:05d}.safetensors"
    for name, shard in shards.items():
        (target / name).rename(target / shard)
    save_file(extra, target / last, {"format": "pt"})
    index = {name: shards[place] for name, place in places.items()} | dict.fromkeys(extra, last)
    size = sum((target / shard).stat().st_size for shard in (*shards.values(), last))
    (target / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )


def require_carried(loaded: LoadedModel, saved: LoadedModel, where: str) -> None:
    """Raise ``VerificationError`` unless a saved model holds the same unread tensors bit for bit."""
    before, after = unread_tensors(loaded), unread_tensors(saved)
    for name, tensor in before.items():
        other = after.get(name)
        if (
            other is None
            or other.dtype != tensor.dtype
            or not torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        ):
            raise VerificationError(
                f"{where}: expected the tensor {name} of the checkpoint unchanged, found "
                f"{'none' if other is None else 'another'}"
            )
