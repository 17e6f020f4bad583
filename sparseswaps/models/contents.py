"""Hashes of what is in files: a model or a text is another one if its contents are, whatever it is called.

A large file is read once: its hash is kept in the user's cache folder and holds as long as the file has the
same size, times and inode. Where the cache cannot be read or written, the file is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import InvalidFileError
from .sources import Source, Trust, locate, weight_files

# Files of so many bytes are remembered; smaller ones are read at once.
REMEMBERED = 1 << 20
# How many files are remembered at most.
MOST_FILES = 5000
# A file that changed less than so many seconds ago may change again without its times telling.
SETTLED = 2.0
# What says how weights and texts are read: configuration, tokenizer, chat templates, remote code.
_KINDS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# Of those, files that only generation, training or a hub look at.
_WITHOUT_EFFECT = frozenset(
    {
        "generation_config.json", "training.json", "trainer_state.json", "all_results.json",
        "train_results.json", "eval_results.json", "model.safetensors.index.json",
        "pytorch_model.bin.index.json", "requirements.txt", "LICENSE.txt", "license.txt",
    }
)  # fmt: skip


def model_hash(source: str | os.PathLike[str] | Source) -> str:
    """SHA-256 of everything in a checkpoint that determines a model's results.

    Every tensor file that transformers reads, configuration, tokenizer and remote code, by their names inside
    the directory; a ``.gguf`` file alone. Of a hub name whose files are not on this machine it is that of the
    name.

    Raises:
        InvalidFileError: if a file cannot be read.
        InvalidModelError: if nothing is there.
    """
    place = source if isinstance(source, Source) else locate(os.fspath(source), Trust(True, True))
    folder = place.folder
    if folder is None:
        return hashlib.sha256(place.place.encode()).hexdigest()
    if place.file is not None:
        return file_hash(folder / place.file)
    return hash_of_files(folder, _files_that_count(folder))


def _files_that_count(folder: Path) -> list[Path]:
    weights = weight_files(folder) or sorted(folder.glob("*.bin"))
    code = [
        path
        for path in folder.rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    others = [
        path
        for pattern in ("*", "additional_chat_templates/*")
        for path in folder.glob(pattern)
        if path.suffix in _KINDS and path.name not in _WITHOUT_EFFECT
    ]
    return [path for path in (*weights, *code, *others) if path.is_file()]


def hash_of_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the names inside ``folder`` and the contents of files, whatever their order.

    Raises:
        InvalidFileError: if one cannot be read.
    """
    found = {path.relative_to(folder).as_posix(): path for path in files}
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\0{file_hash(found[name])}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents, remembered for a large file.

    Raises:
        InvalidFileError: if it cannot be read.
    """
    try:
        before = _stamp(path)
        if before[0] < REMEMBERED:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        name = str(path.resolve())
        known = _read_cache().get(name)
        if isinstance(known, list) and known[:-1] == before and isinstance(known[-1], str):
            return known[-1]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        settled = time.time_ns() - max(before[1:3]) > SETTLED * 1e9
        if settled and _stamp(path) == before:
            _remember(name, [*before, found])
    except OSError as error:
        raise InvalidFileError(f"file {path}: expected to be able to read it, found {error}") from error
    return found


def _stamp(path: Path) -> list[int]:
    """Size, times of the last change of contents and of the entry, inode and device of a file."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def cache_file() -> Path:
    """Where hashes are remembered: in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # the specification ignores relative folders
    base = Path(home) if Path(home).is_absolute() else Path("~").expanduser() / ".cache"
    return base / "sparseswaps" / "contents.json"


def _read_cache() -> Mapping[str, object]:
    with suppress(OSError, ValueError):  # none yet, unreadable, or damaged: files are read again
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _remember(name: str, entry: list[object]) -> None:
    """Add a file to the cache, which is replaced as a whole; where that fails nothing is remembered."""
    path = cache_file()
    known = {key: value for key, value in _read_cache().items() if key != name}
    kept = dict(list(known.items())[-(MOST_FILES - 1) :])
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, own = tempfile.mkstemp(dir=path.parent, prefix="contents-")
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                json.dump({**kept, name: entry}, file)
            Path(own).replace(path)
        except OSError:
            Path(own).unlink(missing_ok=True)
            raise
