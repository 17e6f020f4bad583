"""What the databases of runs and studies share: opened and checked, written in transactions."""

from __future__ import annotations

import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InvalidFileError

# Seconds that a process waits for another one's transaction.
BUSY_TIMEOUT = 60.0


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
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(
            path or ":memory:", timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            with self._transaction() as connection:
                self._create(connection)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InvalidFileError(f"{what} {path}: expected an SQLite database, found {error}") from error
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
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


def names(columns: Iterable[str]) -> str:
    """Column names as SQL lists them."""
    return ", ".join(f'"{name}"' for name in columns)
