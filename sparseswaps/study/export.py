"""What can be done with a record: merge, export, report."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, InvalidFileError, SolverNotInstalledError
from ..records.run import LayerRecord
from ..records.study import LayerBoundRecord, ModelRecord, RowRecord, StudyRows, TraceRecord, UnitRecord
from ..records.study_database import StudyDatabase


def merge(target: str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]]) -> int:
    """Take the finished units of ``sources`` into ``target``; returns how many were new.

    Raises:
        InvalidFileError: if a file is missing or no study record.
    """
    for source in sources:
        if not Path(source).is_file():
            raise InvalidFileError(f"study record {source}: expected an existing file, found none")
    with StudyDatabase(target) as record:
        return sum(record.merge(source) for source in sources)


def export(
    database: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    format: Literal["csv", "parquet"] = "csv",
) -> list[Path]:
    """Write every table of a record as a file of its own; returns the files.

    Args:
        database: the record.
        out_dir: folder, created if needed.
        format: ``csv``, or ``parquet``, which needs pyarrow.

    Raises:
        InvalidFileError: if the record is missing or damaged.
        SolverNotInstalledError: if pyarrow is missing.
    """
    if format not in ("csv", "parquet"):
        raise InputError(f"export format: expected csv or parquet, found {format!r}")
    rows = read_rows(database)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    layers = [{"unit": layer.unit, **asdict(layer.record)} for layer in rows.layers]
    tables: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
        "units": (_names(UnitRecord), [asdict(row) for row in rows.units]),
        "rows": (_names(RowRecord), [asdict(row) for row in rows.rows]),
        "traces": (_names(TraceRecord), [asdict(row) for row in rows.traces]),
        "models": (_names(ModelRecord), [asdict(row) for row in rows.models]),
        "layers": (["unit", *_names(LayerRecord)], layers),
        "bounds": (_names(LayerBoundRecord), [asdict(row) for row in rows.bounds]),
    }
    written = []
    for name, (columns, values) in tables.items():
        path = out / f"{name}.{format}"
        _write_csv(path, columns, values) if format == "csv" else _write_parquet(path, columns, values)
        written.append(path)
    return written


def read_rows(database: str | os.PathLike[str]) -> StudyRows:
    """All results of a record.

    Raises:
        InvalidFileError: if it is missing or damaged.
    """
    if not Path(database).is_file():
        raise InvalidFileError(f"study record {database}: expected an existing file, found none")
    with StudyDatabase(database) as record:
        return record.read()


def build_report(database: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Write the report of a record (see ``reports.study_report``); returns ``index.html``.

    Raises:
        InvalidFileError: if the record is missing or damaged.
        InputError: if it holds no finished unit.
    """
    # plotting takes a second to import, which the processes of a study need not wait for
    from ..reports.study_report import write_study_report

    rows = read_rows(database)
    if not rows.units and not rows.models:
        raise InputError(f"study record {database}: expected finished units, found none")
    return write_study_report(out_dir, rows)


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _write_csv(path: Path, columns: list[str], values: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(values)


def _write_parquet(path: Path, columns: list[str], values: list[dict[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SolverNotInstalledError(
            "Parquet files need pyarrow: expected it to be installed, found none; run pip install pyarrow"
        ) from error
    arrays = {name: [row[name] for row in values] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
