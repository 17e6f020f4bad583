"""The rows of studies as a folder of Parquet files, one for each table.

``write_study_files`` and ``read_study_files`` are each other's inverse: every value comes back as it was,
None and all bits of a float included. A file holds one row group, compressed, with a checksum of every
page; its columns are the fields of the table's record, of the same types. What is known of the studies
themselves is one JSON text each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, get_args, get_type_hints

from ..errors import InvalidFileError, SolverNotInstalledError
from .run import LayerRecord
from .study import (
    LayerBoundRecord,
    ModelLayer,
    ModelRecord,
    RowRecord,
    SizeRecord,
    StudyRows,
    TraceRecord,
    UnitRecord,
    check_rows,
)

# Each table with the record that its columns are the fields of.
RECORDS: Mapping[str, type] = {
    "units": UnitRecord,
    "rows": RowRecord,
    "traces": TraceRecord,
    "models": ModelRecord,
    "layers": LayerRecord,
    "bounds": LayerBoundRecord,
    "sizes": SizeRecord,
}
# Tables that folders written before there was such a thing do not have.
LATER = ("sizes",)
STUDIES = "studies"
# Level of zstd: slow and small, as files are written once.
COMPRESSION = 19


def columns(table: str) -> dict[str, tuple[type, bool]]:
    """Type of each column of a table, and whether it may be None."""
    if table == STUDIES:
        return {"facts": (str, False)}
    kind = RECORDS[table]
    hints = get_type_hints(kind)
    found: dict[str, tuple[type, bool]] = {}
    if table == "layers":
        found["unit"] = (str, False)
    for field in fields(kind):
        options = get_args(hints[field.name]) or (hints[field.name],)
        (plain,) = (option for option in options if option is not NoneType)
        found[field.name] = (plain, NoneType in options)
    return found


def tables(rows: StudyRows) -> dict[str, list[tuple[Any, ...]]]:
    """The values of every table, in the order of its columns."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for table in RECORDS:
        names = list(columns(table))
        if table == "layers":
            names.remove("unit")
            found[table] = [
                (layer.unit, *(getattr(layer.record, name) for name in names)) for layer in rows.layers
            ]
        else:
            found[table] = [tuple(getattr(row, name) for name in names) for row in getattr(rows, table)]
    found[STUDIES] = [(json.dumps(study, sort_keys=True, ensure_ascii=False),) for study in rows.studies]
    return found


def write_study_files(folder: str | os.PathLike[str], rows: StudyRows) -> list[Path]:
    """Write every table as ``TABLE.parquet`` into ``folder``, which is made if needed; returns the files.

    Raises:
        SolverNotInstalledError: if pyarrow is missing.
    """
    arrow = _arrow()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, values in tables(rows).items():
        schema = _schema(arrow, name)
        cells = list(zip(*values, strict=True)) or [() for _ in schema]
        arrays = [arrow.array(column, field.type) for column, field in zip(cells, schema, strict=True)]
        path = out / f"{name}.parquet"
        arrow.parquet.write_table(
            arrow.Table.from_arrays(arrays, schema=schema),
            path,
            row_group_size=max(1, len(values)),
            compression="zstd",
            compression_level=COMPRESSION,
            write_statistics=False,
            store_schema=False,
            write_page_checksum=True,
        )
        written.append(path)
    return written


def read_study_files(folder: str | os.PathLike[str]) -> StudyRows:
    """The rows that ``write_study_files`` wrote.

    Raises:
        InvalidFileError: if a file is missing, damaged, or of something else.
        SolverNotInstalledError: if pyarrow is missing.
    """
    arrow = _arrow()
    values = {table: _read(arrow, Path(folder) / f"{table}.parquet", table) for table in (*RECORDS, STUDIES)}
    read = {
        table: tuple(kind(*row) for row in values[table])
        for table, kind in RECORDS.items()
        if table != "layers"
    }
    layers = tuple(ModelLayer(unit, LayerRecord(*row)) for unit, *row in values["layers"])
    studies = tuple(_facts(Path(folder), text) for (text,) in values[STUDIES])
    found = StudyRows(studies=studies, layers=layers, **read)
    return check_rows(found, f"rows of a study {folder}")


def _read(arrow: ModuleType, path: Path, table: str) -> Sequence[tuple[Any, ...]]:
    """Rows of one file, checked against the columns of its table."""
    if not path.is_file():
        if table in LATER:
            return []
        raise InvalidFileError(f"rows of a study {path}: expected an existing file, found none")
    try:
        with arrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            read, count = file.read(), file.metadata.num_rows
        values = [column.to_pylist() for column in read.columns]
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InvalidFileError(f"rows of a study {path}: expected a Parquet file, found {reason}") from error
    if read.num_rows != count:
        raise InvalidFileError(f"rows of a study {path}: expected {count} rows, found {read.num_rows}")
    expected = _schema(arrow, table)
    if read.schema.names != expected.names:
        raise InvalidFileError(
            f"rows of a study {path}: expected the columns {', '.join(expected.names)}, "
            f"found {', '.join(read.schema.names) or 'none'}"
        )
    for wanted, found, column in zip(expected, read.schema, values, strict=True):
        if found.type != wanted.type:
            raise InvalidFileError(
                f"rows of a study {path}: expected {wanted.type} in column {wanted.name}, found {found.type}"
            )
        if not wanted.nullable and None in column:
            raise InvalidFileError(
                f"rows of a study {path}: expected a value in every row of column {wanted.name}, found none"
            )
    return list(zip(*values, strict=True))


def _facts(folder: Path, text: str) -> Mapping[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(
            f"rows of a study {folder / STUDIES}.parquet: expected JSON, found {error}"
        ) from error
    if not isinstance(facts, dict) or "name" not in facts:
        raise InvalidFileError(
            f"rows of a study {folder / STUDIES}.parquet: expected facts with a name, found {text[:80]}"
        )
    return facts


def _schema(arrow: ModuleType, table: str) -> Any:
    """Arrow's types of a table's columns."""
    plain = {str: arrow.string(), int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}
    return arrow.schema(
        [
            arrow.field(name, plain[kind], nullable=optional)
            for name, (kind, optional) in columns(table).items()
        ]
    )


def _arrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SolverNotInstalledError(
            "Parquet files need pyarrow: expected it to be installed, found none; run pip install pyarrow"
        ) from error
    found: ModuleType = pyarrow
    return found
