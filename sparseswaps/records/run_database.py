"""The record of one run: one SQLite database (standard library only).

A run writes one row of settings and one row per finished layer, mask included, each in its own
transaction, so a killed run loses nothing that was finished and can resume.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidFileError
from .database import Database, names
from .run import ConsumerRecord, LayerRecord, RefinementStep

SCHEMA_VERSION = 5
_STEP_COLUMNS = [field.name for field in fields(RefinementStep)]
_LAYER_COLUMNS = [field.name for field in fields(LayerRecord)]
_CONSUMER_COLUMNS = [field.name for field in fields(ConsumerRecord)]


class RunDatabase(Database):
    """The record of one pruning run.

    Args:
        path: database file; its folder is created. ``None`` keeps the record in memory.

    Raises:
        InvalidFileError: if the file is not a record of this version.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._closed = False
        super().__init__(path, "record")

    def _create(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != 0:
            _check_version(self.path, version)
        layer, step = names(_LAYER_COLUMNS), names(_STEP_COLUMNS)
        consumer = names(_CONSUMER_COLUMNS)
        for table in (
            "run (key TEXT PRIMARY KEY, value TEXT)",
            f"layer ({layer}, mask BLOB, weight BLOB, PRIMARY KEY (name))",
            f"consumer ({consumer}, mask BLOB, weight BLOB, bias BLOB, PRIMARY KEY (name))",
            f"refinement ({step}, PRIMARY KEY (position, number))",
            "pass (number, name, mask BLOB, weight BLOB, PRIMARY KEY (number, name))",
        ):
            connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        self._check_columns(connection, "layer", [*_LAYER_COLUMNS, "mask", "weight"])
        self._check_columns(connection, "consumer", [*_CONSUMER_COLUMNS, "mask", "weight", "bias"])
        self._check_columns(connection, "refinement", _STEP_COLUMNS)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def set(self, values: Mapping[str, Any]) -> None:
        """Store facts about the run, each as JSON, replacing earlier values."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO run VALUES (?, ?)",
                [(key, json.dumps(value, sort_keys=True)) for key, value in values.items()],
            )

    def facts(self) -> dict[str, Any]:
        """Everything stored with ``set``."""
        rows = self._connection.execute("SELECT key, value FROM run ORDER BY key")
        return {key: self._json(f"fact {key}", value) for key, value in rows}

    def add_layer(self, record: LayerRecord, packed_mask: bytes, weight: bytes | None = None) -> None:
        """Store a finished layer in one transaction.

        Args:
            record: its facts.
            packed_mask: its mask, packed bits row by row.
            weight: its weight in the model's dtype where a solver changed kept weights.
        """
        values = [*asdict(record).values(), packed_mask, weight]
        with self._transaction() as connection:
            places = ", ".join("?" * len(values))
            connection.execute(f"INSERT OR REPLACE INTO layer VALUES ({places})", values)

    def layers(self) -> list[LayerRecord]:
        """Finished layers in the order in which they were finished."""
        rows = self._connection.execute(f"SELECT {names(_LAYER_COLUMNS)} FROM layer ORDER BY rowid")
        return [self._row(LayerRecord, row) for row in rows]

    def layer(self, name: str) -> LayerRecord | None:
        """The record of a finished layer, or None."""
        columns = names(_LAYER_COLUMNS)
        row = self._connection.execute(f"SELECT {columns} FROM layer WHERE name = ?", (name,)).fetchone()
        return None if row is None else self._row(LayerRecord, row)

    def add_consumer(
        self, record: ConsumerRecord, packed_mask: bytes, weight: bytes, bias: bytes | None = None
    ) -> None:
        """Store the units of a finished consumer in one transaction.

        Args:
            record: its facts.
            packed_mask: kept units, packed bits.
            weight: its weight (rows, cols) in the dtype in which it is saved, zero in the columns that go.
            bias: its bias (rows,) where that absorbed means, in the same dtype.
        """
        values = [*asdict(record).values(), packed_mask, weight, bias]
        with self._transaction() as connection:
            places = ", ".join("?" * len(values))
            connection.execute(f"INSERT OR REPLACE INTO consumer VALUES ({places})", values)

    def consumers(self) -> list[ConsumerRecord]:
        """Finished consumers in the order in which they were finished."""
        rows = self._connection.execute(f"SELECT {names(_CONSUMER_COLUMNS)} FROM consumer ORDER BY rowid")
        return [self._row(ConsumerRecord, row) for row in rows]

    def kept_units(self, name: str) -> tuple[bytes, bytes, bytes | None] | None:
        """Packed kept units, weight and changed bias of a finished consumer, or None."""
        row = self._connection.execute(
            "SELECT mask, weight, bias FROM consumer WHERE name = ?", (name,)
        ).fetchone()
        return None if row is None else (row[0], row[1], row[2])

    def finished_weights(self) -> int:
        """How many weights the finished layers have."""
        row = self._connection.execute('SELECT COALESCE(SUM("rows" * cols), 0) FROM layer').fetchone()
        return int(row[0])

    def packed_mask(self, name: str) -> bytes | None:
        """Mask of a finished layer, or None."""
        row = self._connection.execute("SELECT mask FROM layer WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def updated_weight(self, name: str) -> bytes | None:
        """Weight of a finished layer whose kept weights were changed, or None."""
        row = self._connection.execute("SELECT weight FROM layer WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def add_refinement(
        self,
        step: RefinementStep,
        packed_masks: Mapping[str, bytes],
        weights: Mapping[str, bytes],
        swaps: Mapping[str, int],
    ) -> None:
        """Store a try of the refinement, and masks and kept weights that it changed, in one transaction.

        The swaps of each layer are added to those of its search; no row of a changed mask is certified.
        """
        values = list(asdict(step).values())
        with self._transaction() as connection:
            places = ", ".join("?" * len(values))
            connection.execute(f"INSERT OR REPLACE INTO refinement VALUES ({places})", values)
            connection.executemany(
                "UPDATE layer SET mask = ? WHERE name = ?",
                [(packed, name) for name, packed in packed_masks.items()],
            )
            connection.executemany(
                "UPDATE layer SET swaps = swaps + ?, certified_rows = NULL WHERE name = ?",
                [(count, name) for name, count in swaps.items() if count],
            )
            connection.executemany(
                "UPDATE layer SET weight = ? WHERE name = ?",
                [(weight, name) for name, weight in weights.items()],
            )

    def set_errors(self, records: Iterable[LayerRecord]) -> None:
        """Replace norm, errors and objectives of layers by those of ``records``, in one transaction."""
        columns = (
            "output_norm", "error_start", "error", "objective_start", "objective", "held_out_error_start",
            "held_out_error",
        )  # fmt: skip
        with self._transaction() as connection:
            connection.executemany(
                f"UPDATE layer SET {', '.join(f'{name} = ?' for name in columns)} WHERE name = ?",
                [(*(getattr(each, name) for name in columns), each.name) for each in records],
            )

    def start_pass(self, number: int) -> dict[str, tuple[bytes, bytes | None]]:
        """Mask and changed weight of each layer at the start of a pass of the refinement.

        Those of now where it has not begun.
        """
        with self._transaction() as connection:
            connection.execute("DELETE FROM pass WHERE number != ?", (number,))
            connection.execute(
                "INSERT OR IGNORE INTO pass SELECT ?, name, mask, weight FROM layer", (number,)
            )
            rows = connection.execute("SELECT name, mask, weight FROM pass")
            return {name: (mask, weight) for name, mask, weight in rows}

    def refinement(self) -> list[RefinementStep]:
        """Tries of the refinement in their order."""
        rows = self._connection.execute(
            f"SELECT {names(_STEP_COLUMNS)} FROM refinement ORDER BY position, number"
        )
        return [self._row(RefinementStep, row) for row in rows]

    def close(self) -> None:
        """Write everything to the one database file and let go of it; may be called again."""
        if self._closed:
            return
        self._closed = True
        with closing(self._connection) as connection:
            # while another process has the file open, its write-ahead log stays beside it
            if self.path is not None:
                with suppress(InvalidFileError):
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    connection.execute("PRAGMA journal_mode = DELETE")

    def __enter__(self) -> RunDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def facts_in(path: Path) -> dict[str, Any]:
    """Everything stored with ``set`` in a record, which is read and not changed.

    Raises:
        InvalidFileError: if the file is no record of this version.
    """
    logged = path.with_name(f"{path.name}-wal").exists()
    if not logged and path.stat().st_size == 0:  # of a run that ended as it began
        return {}
    options = "mode=ro" if logged else "mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if not tables and logged:
                return {}
            if version != 0:
                _check_version(path, version)
            if version == 0 or not {"run", "layer"} <= tables:
                raise InvalidFileError(f"record {path}: expected that of a run, found another database")
            return {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM run")}
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        raise InvalidFileError(f"record {path}: expected that of a run, found {error}") from error


def _check_version(path: Path | None, found: int) -> None:
    if found != SCHEMA_VERSION:
        raise InvalidFileError(
            f"record {path}: expected schema version {SCHEMA_VERSION}, found {found}; a run that "
            "another version began is finished by that version, or begun again in an empty directory"
        )
