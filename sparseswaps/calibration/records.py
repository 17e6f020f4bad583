"""Files of records: JSON lines, JSON and Parquet, one document in a column of each record.

A column holds texts, or conversations: lists of messages ``{"role": ..., "content": ...}`` (or ``from`` and
``value``, as ShareGPT writes them), which the tokenizer's chat template renders.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import InvalidTextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds of files that hold records; JSON may be compressed.
RECORD_KINDS = (".jsonl", ".ndjson", ".json", ".parquet")
# Columns that are read where none is named: the first that is there.
COLUMNS = ("text", "messages", "conversations")
# Roles of ShareGPT, as chat templates know them.
ROLES = {"human": "user", "gpt": "assistant"}
# Names that a message shows at most.
SHOWN = 8


def kind_of(path: Path) -> str:
    """The suffix of a file in lower case, without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A file of UTF-8, compressed or not, without its byte-order mark.

    Raises:
        InvalidTextError: if it cannot be read, while it is opened or later inside the block.
    """
    compressed = path.name.lower().endswith(".gz")
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig") if compressed else path.open(encoding="utf-8-sig")
        ) as file:
            yield file
    except UnicodeDecodeError as error:
        utf_16 = error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "the byte-order mark of UTF-16" if utf_16 else error
        raise InvalidTextError(f"text {path}: expected readable UTF-8, found {found}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidTextError(f"text {path}: expected a readable file, found {error}") from error


def documents_of_records(
    path: Path, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """The documents of a file of records.

    Args:
        path: a file of ``RECORD_KINDS``.
        column: where the documents are; the first of ``COLUMNS`` that is there by default.
        tokenizer: renders conversations.

    Raises:
        InvalidTextError: if the file is damaged, or a record has no document in that column.
    """
    name = f"text {path}"
    if kind_of(path) == ".parquet":
        column, values = _parquet_column(path, column)
        return [document(value, f"{name}, {place}, column {column}", tokenizer) for place, value in values]
    documents = []
    for place, record in _json_list(path) if kind_of(path) == ".json" else _json_lines(path):
        where = f"{name}, {place}"
        if not isinstance(record, dict):
            raise InvalidTextError(f"{where}: expected a record (a JSON object), found {_type(record)}")
        if column is None or column not in record:
            column = column_of(list(record), column, where)
        documents.append(document(record[column], f"{where}, column {column}", tokenizer))
    return documents


def column_of(names: Sequence[str], column: str | None, where: str) -> str:
    """The column that holds the documents: the one asked for, or the first of ``COLUMNS`` that is there.

    Raises:
        InvalidTextError: if it is not among ``names``.
    """
    for each in COLUMNS if column is None else (column,):
        if each in names:
            return each
    wanted = f"{', '.join(COLUMNS)} or one that is named behind a colon" if column is None else column
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    raise InvalidTextError(f"{where}: expected a column {wanted}, found {shown or 'none'}")


def document(value: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of one record's column.

    Args:
        value: a text, or a conversation.
        where: what messages call it.
        tokenizer: renders conversations.

    Raises:
        InvalidTextError: if it is neither, or the tokenizer cannot render it.
    """
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        value = _rendered(value, where, tokenizer)
    if not isinstance(value, str):
        raise InvalidTextError(
            f"{where}: expected a text or a list of messages, found {_type(value)}"
            + (" without messages" if isinstance(value, list) else "")
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(f"{where}: expected a text in Unicode, found {error}") from error
    return value


def _rendered(
    conversation: Sequence[dict[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """A conversation in the words of the tokenizer's chat template."""
    messages = []
    for message in conversation:
        if "role" not in message and "from" in message:
            role, content = message["from"], message.get("value")
            message = {"role": ROLES.get(role, role), "content": content}
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InvalidTextError(
                f"{where}: expected messages with a text as role and as content, found "
                f"role {_type(message.get('role'))} and content {_type(message.get('content'))}"
            )
        messages.append(message)
    if getattr(tokenizer, "chat_template", None) is None or tokenizer is None:
        raise InvalidTextError(
            f"{where}: expected a tokenizer with a chat template for these messages, found none in it"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template raises
        lines = str(error).strip().splitlines()
        raise InvalidTextError(
            f"{where}: expected messages that the tokenizer's chat template accepts, found "
            f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        ) from error


def _json_lines(path: Path) -> Iterable[tuple[str, Any]]:
    """Each record with its place."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, f"text {path}, line {number}", "a record in JSON")


def _json_list(path: Path) -> Iterable[tuple[str, Any]]:
    """The records of a list, or of lines, or a single one."""
    with open_text(path) as file:
        text = file.read()
    try:
        whole = json.loads(text)
    except ValueError:  # not one value: lines
        return _json_lines(path)
    except RecursionError:
        whole = _parsed(text, f"text {path}", "records in JSON")
    records = whole if isinstance(whole, list) else [whole]
    return ((f"record {number}", record) for number, record in enumerate(records, 1))


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}"
        raise InvalidTextError(f"{where}: expected {expected}, found {found}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidTextError(f"{where}: expected {expected}, found {error}") from error


def _parquet_column(path: Path, column: str | None) -> tuple[str, Iterable[tuple[str, Any]]]:
    """The name of the column with the documents, and its values with their places."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidTextError(
            f"text {path}: expected the library pyarrow for Parquet files, found none: "
            "run pip install 'sparseswaps[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = column_of(file.schema_arrow.names, column, f"text {path}")
            values = [
                value for batch in file.iter_batches(columns=[found]) for value in batch.column(0).to_pylist()
            ]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        lines = str(error).strip().splitlines()
        raise InvalidTextError(
            f"text {path}: expected a readable Parquet file, found {lines[0] if lines else error!r}"
        ) from error
    return found, ((f"row {number}", value) for number, value in enumerate(values, 1))


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__
