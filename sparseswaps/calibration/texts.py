"""Texts as people have them: files, folders of files, datasets, the source code of Python's library.

A source is read as documents. A plain text file is one of them, a file of records (see ``records``) holds one
in each record, a folder the documents of its files in the order of their names. Where windows are cut from
the whole text, documents are joined with a blank line between them, as WikiText's are.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidTextError
from ..models.contents import file_hash, hash_of_files
from .corpus import standard_library_text
from .records import RECORD_KINDS, SHOWN, column_of, document, documents_of_records, kind_of, open_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that the field uses, and where they are: path, configuration, data files, split, column.
DATASETS: dict[str, tuple[str, str | None, dict[str, str] | None, str, str]] = {
    "c4": ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", "text"),
    "wikitext2-test": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "text"),
}
STANDARD_LIBRARY = {"stdlib": "train", "stdlib-held-out": "held-out"}
# What is read from a folder, and what a file that is not there is known by.
TEXT_KINDS = (".txt", *RECORD_KINDS)
FILE_KINDS = (".npy", *TEXT_KINDS)
# Files that `datasets` writes into the folder of a saved dataset.
SAVED_DATASET = ("state.json", "dataset_dict.json")
EXPECTED = "a text, a file of records, a token file (.npy), a folder of texts or a dataset"


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a source, in order.

    Attributes:
        values: texts, or conversations that are rendered when they are asked for.
        where: what messages call the source.
        tokenizer: renders conversations.
        drawn: whether calibration draws documents at random, as the field does from datasets, instead of
            cutting the whole text.
    """

    values: Any
    where: str
    tokenizer: PreTrainedTokenizerBase | None
    drawn: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> str:
        return document(self.values[index], f"{self.where}, row {index + 1}", self.tokenizer)

    def __iter__(self) -> Iterator[str]:
        for number, value in enumerate(self.values, 1):
            yield document(value, f"{self.where}, row {number}", self.tokenizer)

    def joined(self) -> str:
        """The whole text, with a blank line between documents."""
        return "\n\n".join(self)


def read_documents(
    source: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Documents:
    """The documents of a source.

    Args:
        source: a text file; a file of records (``.jsonl``, ``.json``, ``.parquet``), with the name of the
            column behind a colon unless it is ``text``, ``messages`` or ``conversations``; a folder of such
            files; ``stdlib`` or ``stdlib-held-out``; a dataset: ``c4``, ``wikitext2``, ``wikitext2-test`` or
            any ``path[:split[:column]]`` that ``datasets`` loads.
        tokenizer: renders conversations with its chat template.

    Raises:
        InvalidTextError: if there is no such source or it cannot be used.
    """
    name = os.fspath(source)
    if name in STANDARD_LIBRARY:
        part: Any = STANDARD_LIBRARY[name]
        return Documents([standard_library_text(part)], name, tokenizer)
    place = None if name in DATASETS and not Path(name).is_file() else local_place(name)
    if place is None:
        return _dataset(name, tokenizer)
    path, column = place
    if path.is_dir():
        return Documents(_of_folder(path, column, tokenizer), f"text {name}", tokenizer)
    return Documents(_of_file(path, column, tokenizer), f"text {name}", tokenizer)


def text_hash(source: str | os.PathLike[str]) -> str | None:
    """SHA-256 of the files that a source of windows names; None for a dataset that is not on this machine.

    Raises:
        InvalidFileError: if a file cannot be read.
        InvalidTextError: if it is the name of a file that is not there.
    """
    name = os.fspath(source)
    if name in STANDARD_LIBRARY:
        return _standard_library_hash(STANDARD_LIBRARY[name])
    saved = Path(name.partition(":")[0])
    if any((saved / each).is_file() for each in SAVED_DATASET):
        return hash_of_files(saved, [path for path in saved.rglob("*") if path.is_file()])
    place = None if name in DATASETS and not Path(name).is_file() else local_place(name)
    if place is None:
        return None
    path = place[0]
    return hash_of_files(path, _texts_inside(path)[0]) if path.is_dir() else file_hash(path)


@functools.cache
def _standard_library_hash(part: Any) -> str:
    return hashlib.sha256(standard_library_text(part).encode()).hexdigest()


def local_place(name: str) -> tuple[Path, str | None] | None:
    """The file or folder that a source names, and the column behind a colon; None for a dataset.

    Raises:
        InvalidTextError: if the name is that of a file or folder that is not there or cannot be reached.
    """
    head, colon, column = name.rpartition(":")
    try:
        saved = Path(name.partition(":")[0])
        if any((saved / each).is_file() for each in SAVED_DATASET):
            return None
        if name and Path(name).exists():
            found, column = Path(name), ""
        elif head and Path(head).exists():
            found = Path(head)
        else:
            kind = kind_of(Path(head if colon and kind_of(Path(head)) in FILE_KINDS else name))
            if not name or kind in FILE_KINDS or name.startswith((".", "/", "~")):
                raise InvalidTextError(f"text {name}: expected {EXPECTED}, found no such file")
            return None
        if not found.is_file() and not found.is_dir():
            raise InvalidTextError(f"text {name}: expected a file or a folder, found neither")
    except OSError as error:
        raise InvalidTextError(f"text {name}: expected a readable file, found {error}") from error
    return found, column or None


def _of_file(path: Path, column: str | None, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if kind_of(path) in RECORD_KINDS:
        documents = documents_of_records(path, column, tokenizer)
        if not documents:
            raise InvalidTextError(f"text {path}: expected records, found none")
        return documents
    if column is not None:
        raise InvalidTextError(
            f"text {path}: expected a file of records ({', '.join(RECORD_KINDS)}) for a column {column}, "
            f"found a file {path.suffix or 'without a suffix'}"
        )
    with open_text(path) as file:
        text = file.read()
    if "\0" in text:
        raise InvalidTextError(
            f"text {path}: expected a text, found binary data (NUL at character {text.index(chr(0))})"
        )
    return [text]


def _texts_inside(folder: Path) -> tuple[list[Path], list[str]]:
    """The texts in a folder, in order, and the names of what else is in it."""
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InvalidTextError(f"text {folder}: expected a readable folder, found {error}") from error
    texts = [path for path in inside if path.is_file() and kind_of(path) in TEXT_KINDS]
    return texts, [path.name for path in inside if path not in texts]


def _of_folder(folder: Path, column: str | None, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    texts, others = _texts_inside(folder)
    shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
    if not texts:
        raise InvalidTextError(
            f"text {folder}: expected a folder with texts ({', '.join(TEXT_KINDS)}) in it, found "
            f"{shown or 'nothing'}"
        )
    if column is not None and not any(kind_of(path) in RECORD_KINDS for path in texts):
        raise InvalidTextError(
            f"text {folder}: expected files of records ({', '.join(RECORD_KINDS)}) for a column {column}, "
            f"found {texts[0].name}"
        )
    if others:
        warnings.warn(f"text {folder}: what is no text is left out: {shown}", stacklevel=2)
    return [
        each
        for path in texts
        for each in _of_file(path, column if kind_of(path) in RECORD_KINDS else None, tokenizer)
    ]


def _dataset(name: str, tokenizer: PreTrainedTokenizerBase | None) -> Documents:
    """The documents of a dataset that the library ``datasets`` loads."""
    try:
        import datasets
    except ImportError as error:
        raise InvalidTextError(
            f"text {name}: found no such file, and for a dataset expected the library datasets: "
            "run pip install 'sparseswaps[datasets]'"
        ) from error
    path, split = name, "train"
    column: str | None = None
    configuration = files = None
    if name in DATASETS:
        path, configuration, files, split, column = DATASETS[name]
    elif ":" in name:
        path, split, *named = name.split(":")
        column = named[0] if named else None
    try:
        if Path(path).is_dir():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, configuration, data_files=files, split=split)
        chosen = column_of(loaded.column_names, column, f"dataset {name}")
        return Documents(loaded[chosen], f"dataset {name}, column {chosen}", tokenizer, drawn=True)
    except InvalidTextError:
        raise
    except Exception as error:  # whatever loading or the network raises
        message = str(error).strip().splitlines()
        raise InvalidTextError(
            f"text {name}: expected {EXPECTED}, "
            f"found {type(error).__name__}: {message[0] if message else 'no message'}"
        ) from error
