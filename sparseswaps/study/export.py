"""What can be done with a record: merge, export, report."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, InvalidFileError
from ..records.folders import whole_folder
from ..records.study import StudyRows
from ..records.study_database import StudyDatabase
from ..records.study_files import columns, read_study_files, tables, write_study_files


def merge(target: str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]]) -> int:
    """Take the finished units of ``sources`` into ``target``; returns how many were new.

    Args:
        target: SQLite file, made if needed.
        sources: SQLite files, or folders of Parquet files that ``export`` wrote, of which what failed is
            not taken.

    Raises:
        InvalidFileError: if a source is missing or no study record.
        SolverNotInstalledError: if one is a folder and pyarrow is missing.
    """
    folders = {source: read_rows(source) for source in sources if not Path(source).is_file()}
    with StudyDatabase(target) as record:
        return sum(
            record.take(folders[source]) if source in folders else record.merge(source) for source in sources
        )


def export(
    database: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    format: Literal["csv", "parquet"] = "csv",
) -> list[Path]:
    """Write every table of a record as a file of its own; returns the files.

    A folder of Parquet files is a record too: ``read_rows`` and ``build_report`` take it.

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
    with whole_folder(out) as partial:
        if format == "parquet":
            written = write_study_files(partial, rows)
        else:
            written = [partial / f"{name}.csv" for name in tables(rows)]
            for path, (name, values) in zip(written, tables(rows).items(), strict=True):
                _write_csv(path, list(columns(name)), values)
    return [out / path.name for path in written]


def read_rows(database: str | os.PathLike[str]) -> StudyRows:
    """All results of a record: an SQLite file, or a folder of Parquet files that ``export`` wrote.

    Raises:
        InvalidFileError: if it is missing or damaged.
        SolverNotInstalledError: if it is a folder and pyarrow is missing.
    """
    if Path(database).is_dir():
        return read_study_files(database)
    if not Path(database).is_file():
        raise InvalidFileError(f"study record {database}: expected an existing file or folder, found none")
    with StudyDatabase(database) as record:
        return record.read()


def build_report(database: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Write the report of a record (see ``reports.study_report``); returns ``index.html``.

    Args:
        database: the record, as ``read_rows`` takes it.
        out_dir: folder, created if needed.

    Raises:
        InvalidFileError: if the record is missing or damaged.
        InputError: if it holds no finished unit.
        SolverNotInstalledError: if it is a folder and pyarrow is missing.
    """
    # plotting takes a second to import, which the processes of a study need not wait for
    from ..reports.study_report import write_study_report

    rows = read_rows(database)
    if not rows.units and not rows.models:
        raise InputError(f"study record {database}: expected finished units, found none")
    out = Path(out_dir)
    with whole_folder(out) as partial:
        page = write_study_report(partial, rows)
    return out / page.name


def _write_csv(path: Path, header: list[str], values: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(values)
