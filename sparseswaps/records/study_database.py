"""The SQLite record of studies.

Each unit is claimed in one transaction and its result, with all its rows, is written in another, so
that a study killed at any moment goes on where it was, and several processes can share one database.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidFileError
from .database import Database, names
from .run import LayerRecord
from .study import (
    LayerBoundRecord,
    ModelLayer,
    ModelRecord,
    PlannedUnit,
    RowRecord,
    SizeRecord,
    StudyRows,
    TraceRecord,
    UnitRecord,
    UnitResult,
    check_rows,
)

SCHEMA_VERSION = 3
# Seconds after the hard limit of a unit at which a claim of another machine is given up.
CLAIM_SLACK = 120.0

Record = TypeVar(
    "Record", UnitRecord, RowRecord, TraceRecord, ModelRecord, LayerRecord, LayerBoundRecord, SizeRecord
)

_TABLES: dict[str, tuple[type, str]] = {
    "unit": (UnitRecord, "unit"),
    "row": (RowRecord, "unit, row"),
    "trace": (TraceRecord, "unit, seconds"),
    "model": (ModelRecord, "unit"),
    "bound": (LayerBoundRecord, "unit, layer"),
    "size": (SizeRecord, "unit"),
}


def _columns(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


class StudyDatabase(Database):
    """The record of one or more studies.

    Args:
        path: database file; its folder is created.

    Raises:
        InvalidFileError: if the file is not a study record of this version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        super().__init__(self.path, "study record", synchronous="NORMAL")

    def _create(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version not in (0, SCHEMA_VERSION) or (tables and "plan" not in tables):
            raise InvalidFileError(
                f"study record {self.path}: expected schema version {SCHEMA_VERSION} of a study, "
                f"found version {version} with tables {', '.join(sorted(tables)) or 'none'}"
                + ("; run the study into a new record" if 0 < version < SCHEMA_VERSION else "")
            )
        connection.execute("CREATE TABLE IF NOT EXISTS study (name TEXT PRIMARY KEY, facts TEXT NOT NULL)")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS plan (unit TEXT PRIMARY KEY, study TEXT NOT NULL, "
            "label TEXT NOT NULL, spec TEXT NOT NULL, lim REAL NOT NULL, "
            "state TEXT NOT NULL DEFAULT 'pending', owner TEXT, claimed REAL)"
        )
        connection.execute("CREATE INDEX IF NOT EXISTS plan_state ON plan (state)")
        for name, (kind, key) in _TABLES.items():
            connection.execute(
                f'CREATE TABLE IF NOT EXISTS "{name}" ({names(_columns(kind))}, PRIMARY KEY ({key}))'
            )
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS layer (unit, {names(_columns(LayerRecord))}, "
            "PRIMARY KEY (unit, name))"
        )
        for name, (kind, _) in _TABLES.items():
            self._check_columns(connection, name, _columns(kind))
        self._check_columns(connection, "layer", ["unit", *_columns(LayerRecord)])
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def add_plan(self, study: str, facts: Mapping[str, Any], units: Iterable[PlannedUnit]) -> None:
        """Add a study and its units that are not there yet; drop pending ones that it has no more."""
        units = list(units)
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM plan WHERE study = ? AND state = 'pending' "
                "AND unit NOT IN (SELECT value FROM json_each(?))",
                (study, json.dumps([unit.unit for unit in units])),
            )
            connection.execute(
                "INSERT OR REPLACE INTO study VALUES (?, ?)", (study, json.dumps(facts, sort_keys=True))
            )
            connection.executemany(
                "INSERT OR IGNORE INTO plan (unit, study, label, spec, lim) VALUES (?, ?, ?, ?, ?)",
                [
                    (unit.unit, unit.study, unit.label, json.dumps(unit.spec, sort_keys=True), unit.limit)
                    for unit in units
                ],
            )

    def claim(self, studies: Sequence[str], owner: str) -> PlannedUnit | None:
        """Take the next unit that nobody has, for ``owner`` (see ``process_id``); None if there is none."""
        marks = ", ".join("?" * len(studies))
        with self._transaction() as connection:
            row = connection.execute(
                f"SELECT unit, study, label, spec, lim FROM plan WHERE state = 'pending' "
                f"AND study IN ({marks}) ORDER BY rowid LIMIT 1",
                tuple(studies),
            ).fetchone()
            if row is None:
                return None
            connection.execute(
                "UPDATE plan SET state = 'claimed', owner = ?, claimed = ? WHERE unit = ?",
                (owner, time.time(), row[0]),
            )
        return PlannedUnit(row[0], row[1], row[2], self._facts(f"the unit {row[0]}", row[3]), row[4])

    def release_lost(self) -> int:
        """Give back units whose process is gone; returns how many."""
        with self._transaction() as connection:
            claims = connection.execute(
                "SELECT unit, owner, claimed, lim FROM plan WHERE state = 'claimed'"
            ).fetchall()
            now = time.time()
            lost = [
                (unit,)
                for unit, owner, claimed, limit in claims
                if not isinstance(owner, str)
                or is_gone(owner)
                or (not _is_here(owner) and now - claimed > limit + CLAIM_SLACK)
            ]
            connection.executemany("UPDATE plan SET state = 'pending', owner = NULL WHERE unit = ?", lost)
        return len(lost)

    def release(self, owner: str) -> None:
        """Give back everything that ``owner`` has claimed and not finished."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE plan SET state = 'pending', owner = NULL WHERE state = 'claimed' AND owner = ?",
                (owner,),
            )

    def retry_failed(self, studies: Sequence[str]) -> int:
        """Plan the failed units of ``studies`` again; returns how many."""
        marks = ", ".join("?" * len(studies))
        with self._transaction() as connection:
            for table in ("unit", "model"):
                connection.execute(
                    f"DELETE FROM {table} WHERE unit IN "
                    f"(SELECT unit FROM plan WHERE state = 'failed' AND study IN ({marks}))",
                    tuple(studies),
                )
            return connection.execute(
                f"UPDATE plan SET state = 'pending' WHERE state = 'failed' AND study IN ({marks})",
                tuple(studies),
            ).rowcount

    def finish(self, result: UnitResult) -> None:
        """Write a unit's result and mark it done or failed, in one transaction."""
        record = result.record
        with self._transaction() as connection:
            self._insert(connection, "unit" if result.layer else "model", [record])
            self._insert(connection, "row", result.rows)
            self._insert(connection, "trace", result.trace)
            self._insert(connection, "bound", result.bounds)
            self._insert(connection, "size", result.sizes)
            columns = _columns(LayerRecord)
            connection.executemany(
                f"INSERT OR REPLACE INTO layer VALUES (?, {', '.join('?' * len(columns))})",
                [(record.unit, *(getattr(layer, name) for name in columns)) for layer in result.layers],
            )
            connection.execute(
                "UPDATE plan SET state = ?, owner = NULL WHERE unit = ?",
                ("failed" if record.failure else "done", record.unit),
            )

    @staticmethod
    def _insert(connection: sqlite3.Connection, table: str, records: Sequence[Any]) -> None:
        columns = _columns(_TABLES[table][0])
        connection.executemany(
            f'INSERT OR REPLACE INTO "{table}" ({names(columns)}) VALUES ({", ".join("?" * len(columns))})',
            [tuple(getattr(record, name) for name in columns) for record in records],
        )

    def counts(self, studies: Sequence[str] | None = None) -> Counter[str]:
        """How many units are pending, claimed, done and failed."""
        query = "SELECT state, COUNT(*) FROM plan"
        values: tuple[str, ...] = ()
        if studies is not None:
            query += f" WHERE study IN ({', '.join('?' * len(studies))})"
            values = tuple(studies)
        return Counter(dict(self._connection.execute(query + " GROUP BY state", values).fetchall()))

    def finished(self) -> set[str]:
        """Ids of units that are done or failed."""
        return {
            row[0]
            for row in self._connection.execute("SELECT unit FROM plan WHERE state IN ('done', 'failed')")
        }

    def finished_beside(self, study: str, units: Iterable[str]) -> int:
        """How many finished units of a study are none of ``units``."""
        query = (
            "SELECT COUNT(*) FROM plan WHERE study = ? AND state IN ('done', 'failed') "
            "AND unit NOT IN (SELECT value FROM json_each(?))"
        )
        return int(self._connection.execute(query, (study, json.dumps(list(units)))).fetchone()[0])

    def unfinished_labels(self, studies: Sequence[str]) -> Counter[str]:
        """Pending and claimed units by the label of their solver."""
        marks = ", ".join("?" * len(studies))
        return Counter(
            dict(
                self._connection.execute(
                    f"SELECT label, COUNT(*) FROM plan WHERE state IN ('pending', 'claimed') "
                    f"AND study IN ({marks}) GROUP BY label",
                    tuple(studies),
                ).fetchall()
            )
        )

    def mean_seconds(self) -> dict[str, float]:
        """Mean seconds of finished units by the label of their solver."""
        query = (
            "SELECT label, AVG(seconds) FROM (SELECT label, seconds FROM unit UNION ALL "
            "SELECT label, seconds FROM model) GROUP BY label"
        )
        return dict(self._connection.execute(query).fetchall())

    def read(self) -> StudyRows:
        """Everything, ordered by unit id."""
        facts = self._connection.execute("SELECT facts FROM study ORDER BY name")
        layers = self._connection.execute(
            f"SELECT unit, {names(_columns(LayerRecord))} FROM layer ORDER BY unit, block, name"
        )
        found = StudyRows(
            tuple(self._facts("the facts of a study", row[0]) for row in facts),
            self._read("unit", UnitRecord),
            self._read("row", RowRecord),
            self._read("trace", TraceRecord),
            self._read("model", ModelRecord),
            tuple(ModelLayer(str(row[0]), self._row(LayerRecord, row[1:])) for row in layers),
            self._read("bound", LayerBoundRecord),
            self._read("size", SizeRecord),
        )
        return check_rows(found, self._where)

    def _read(self, table: str, kind: type[Record]) -> tuple[Record, ...]:
        query = f'SELECT {names(_columns(kind))} FROM "{table}" ORDER BY {_TABLES[table][1]}'
        return tuple(self._row(kind, row) for row in self._connection.execute(query))

    def merge(self, other: str | os.PathLike[str]) -> int:
        """Take over the units of which ``other`` knows more; returns how many of them are done.

        Raises:
            InvalidFileError: if ``other`` is no study record.
        """
        source = Path(other)
        if not source.is_file():
            raise InvalidFileError(f"study record {source}: expected an existing file, found none")
        StudyDatabase(source).close()  # checks what it is
        with self._lock:
            self._connection.execute("ATTACH ? AS other", (os.fspath(source),))
        try:
            with self._transaction() as connection:
                connection.execute("INSERT OR IGNORE INTO study SELECT * FROM other.study")
                rank = "CASE state WHEN 'done' THEN 2 WHEN 'failed' THEN 1 ELSE 0 END"
                connection.execute(
                    f"CREATE TEMP TABLE fresh AS SELECT unit FROM other.plan AS theirs WHERE {rank} > "
                    f"COALESCE((SELECT {rank} FROM main.plan AS ours WHERE ours.unit = theirs.unit), -1)"
                )
                for table in ("plan", *_TABLES, "layer"):
                    connection.execute(
                        f'INSERT OR REPLACE INTO main."{table}" SELECT * FROM other."{table}" '
                        "WHERE unit IN (SELECT unit FROM fresh)"
                    )
                count = connection.execute(
                    "SELECT COUNT(*) FROM fresh JOIN main.plan USING (unit) WHERE state = 'done'"
                ).fetchone()[0]
                connection.execute(
                    "UPDATE main.plan SET state = 'pending', owner = NULL WHERE state = 'claimed' "
                    "AND unit IN (SELECT unit FROM fresh)"
                )
                connection.execute("DROP TABLE fresh")
        finally:
            with self._lock:
                self._connection.execute("DETACH other")
        return int(count)

    def take(self, rows: StudyRows) -> int:
        """Take over the units of ``rows`` that are done and not done here; returns how many.

        Rows do not say how their units were planned, so those that failed are left for the study to plan.
        """
        done = {row[0] for row in self._connection.execute("SELECT unit FROM plan WHERE state = 'done'")}
        everything: list[UnitRecord | ModelRecord] = [*rows.units, *rows.models]
        fresh = {
            record.unit: record for record in everything if not record.failure and record.unit not in done
        }
        of: dict[str, dict[str, list[Any]]] = {unit: defaultdict(list) for unit in fresh}
        for table in ("rows", "traces", "layers", "bounds", "sizes"):
            for row in getattr(rows, table):
                if row.unit in of:
                    of[row.unit][table].append(row.record if isinstance(row, ModelLayer) else row)
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO study VALUES (?, ?)",
                [(str(facts["name"]), json.dumps(facts, sort_keys=True)) for facts in rows.studies],
            )
            connection.executemany(
                "INSERT OR IGNORE INTO plan (unit, study, label, spec, lim) VALUES (?, ?, ?, '{}', 0)",
                [(record.unit, record.study, record.label) for record in fresh.values()],
            )
        for unit, record in fresh.items():
            parts = {table: tuple(found) for table, found in of[unit].items()}
            self.finish(
                UnitResult(
                    layer=record if isinstance(record, UnitRecord) else None,
                    model=record if isinstance(record, ModelRecord) else None,
                    rows=parts.get("rows", ()),
                    trace=parts.get("traces", ()),
                    layers=parts.get("layers", ()),
                    bounds=parts.get("bounds", ()),
                    sizes=parts.get("sizes", ()),
                )
            )
        return len(fresh)

    def close(self) -> None:
        """Write everything to the one database file and let go of it."""
        # what cannot be written now stays in the write-ahead log beside the file
        with closing(self._connection) as connection, suppress(InvalidFileError):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def __enter__(self) -> StudyDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def process_id() -> str:
    """Name of this process: machine, number and start time, because numbers are used again."""
    return f"{socket.gethostname()}:{os.getpid()}:{_start_time(os.getpid())}"


def is_gone(owner: str) -> bool:
    """Whether ``owner`` is a process of this machine that does not run any more."""
    host, number, started = _parts(owner)
    return host == socket.gethostname() and (not number.isdigit() or _start_time(int(number)) != started)


def _is_here(owner: str) -> bool:
    return _parts(owner)[0] == socket.gethostname()


def _parts(owner: str) -> tuple[str, str, str]:
    """Machine, number and start time of a process; an owner that is no such name is a process of nowhere."""
    parts = owner.rsplit(":", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("", "", "")


def _start_time(number: int) -> str:
    """When a process started, in the system's own words; "" if it does not run."""
    status = Path(f"/proc/{number}/stat")
    if Path("/proc/self/stat").exists():
        try:
            after_name = status.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if after_name[0] in "ZX" else after_name[19]
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
