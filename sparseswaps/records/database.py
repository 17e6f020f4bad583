"""What the databases of runs and studies share: opened and checked, written in transactions."""

from __future__ import annotations

import functools
import json
import math
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from ..errors import InvalidFileError, found_of, is_full

# Seconds that a process waits for another one's transaction.
BUSY_TIMEOUT = 60.0


Row = TypeVar("Row")


class Connection(sqlite3.Connection):
    """A connection whose every error is one sentence about the file.

    Attributes:
        where: what the file is called in messages.
    """

    where = "database"

    def cursor(self, factory: Any = None) -> Any:
        """A cursor that does the same."""
        return super().cursor(factory or _Cursor)

    def execute(self, *arguments: Any) -> Any:
        """A statement on a cursor of its own."""
        return self.cursor().execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        """A statement for many values on a cursor of its own."""
        return self.cursor().executemany(*arguments)


class _Cursor(sqlite3.Cursor):
    def execute(self, *arguments: Any) -> Any:
        with _said(self.connection):
            return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        with _said(self.connection):
            return super().executemany(*arguments)

    def __next__(self) -> Any:
        with _said(self.connection):
            return super().__next__()

    def fetchone(self) -> Any:
        with _said(self.connection):
            return super().fetchone()

    def fetchall(self) -> Any:
        with _said(self.connection):
            return super().fetchall()


# Codes of SQLite for a file that is there and whole but cannot be used now.
_UNUSABLE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


@contextmanager
def _said(connection: sqlite3.Connection) -> Iterator[None]:
    where = connection.where if isinstance(connection, Connection) else "database"
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of names in a damaged schema
        raise _error(where, error) from error


def _error(where: str, error: Exception) -> InvalidFileError:
    """The sentence about the file ``where``."""
    if is_full(error):
        return InvalidFileError(f"{where}: expected room on the disk, found it full")
    usable = isinstance(error, sqlite3.Error) and (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _UNUSABLE
    expected = "to be able to write there" if usable or isinstance(error, OSError) else "an SQLite database"
    return InvalidFileError(f"{where}: expected {expected}, found {found_of(error)}")


class Database(ABC):
    """One SQLite file with a write-ahead log.

    Args:
        path: the file; its folder is created. None keeps it in memory.
        what: it is called in messages.
        synchronous: when the system is asked to write to the disk (SQLite's pragma).

    Raises:
        InvalidFileError: if the file is none of this version.
    """

    def __init__(self, path: Path | None, what: str, synchronous: str = "FULL") -> None:
        self._lock = threading.Lock()
        self._where = what if path is None else f"{what} {path}"
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path or ":memory:",
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,
                factory=Connection,
            )
        except (OSError, ValueError, sqlite3.Error) as error:
            raise _error(self._where, error) from error
        self._connection.where = self._where
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            with self._transaction() as connection:
                self._create(connection)
        except InvalidFileError:
            self._connection.close()
            raise

    @abstractmethod
    def _create(self, connection: sqlite3.Connection) -> None:
        """Make the tables that are not there; raise ``InvalidFileError`` for those of another version."""

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it already
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _check_columns(self, connection: sqlite3.Connection, table: str, columns: Iterable[str]) -> None:
        """Refuse a table without some column, whose quoted name SQLite would read as a text."""
        found = {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
        for column in columns:
            if column not in found:
                raise InvalidFileError(
                    f"{self._where}, table {table}: expected a column {column}, found none of that name"
                )

    def _row(self, kind: type[Row], values: Sequence[Any]) -> Row:
        """One record from the values of its columns, each of the type of its field."""
        checked = []
        record: Any = kind
        for (name, accepted, plain), value in zip(column_types(record), values, strict=True):
            if value is None and plain is float and NoneType not in accepted:
                value = math.nan  # which SQLite stores as nothing
            elif type(value) not in accepted:
                raise InvalidFileError(
                    f"{self._where}: expected a {plain.__name__} in column {name}, found {_shown(value)}"
                )
            checked.append(bool(value) if plain is bool else value)
        return kind(*checked)

    def _json(self, what: str, text: Any) -> Any:
        """The value of a JSON text in the file."""
        try:
            return json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidFileError(f"{self._where}: expected JSON in {what}, found {_shown(text)}") from error

    def _facts(self, what: str, text: Any) -> dict[str, Any]:
        """The same where it is an object."""
        found = self._json(what, text)
        if not isinstance(found, dict):
            raise InvalidFileError(
                f"{self._where}: expected an object of JSON in {what}, found {_shown(text)}"
            )
        return found


@functools.cache
def column_types(kind: type) -> tuple[tuple[str, tuple[type, ...], type], ...]:
    """Name, accepted types and plain type of each field of a record."""
    hints = get_type_hints(kind)
    found = []
    for field in fields(kind):
        options = get_args(hints[field.name]) or (hints[field.name],)
        (plain,) = (option for option in options if option is not NoneType)
        accepted = (*options, int) if plain in (float, bool) else tuple(options)
        found.append((field.name, accepted, plain))
    return tuple(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def names(columns: Iterable[str]) -> str:
    """Column names as SQL lists them."""
    return ", ".join(f'"{name}"' for name in columns)
