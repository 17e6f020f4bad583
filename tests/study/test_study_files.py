"""Rows of a study as Parquet files: every value comes back, and what is no such folder is refused."""

import json
import struct
from dataclasses import astuple, replace

import pytest
from study_rows import FAILED, study_rows

from sparseswaps.errors import InvalidFileError
from sparseswaps.records.study import StudyRows
from sparseswaps.records.study_files import RECORDS, columns, read_study_files, tables, write_study_files
from sparseswaps.study import build_report, export
from sparseswaps.study.export import read_rows

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet")
# a float of every kind: both zeros, the smallest, the largest, one that no short decimal is, none at all
FLOATS = [0.0, -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, float("inf"), float("-inf"), float("nan")]


@pytest.fixture
def folder(tmp_path):
    write_study_files(tmp_path / "rows", study_rows())
    return tmp_path / "rows"


def bits(value):
    return struct.pack("<d", value) if isinstance(value, float) else value


def test_every_value_comes_back_with_its_type(tmp_path):
    rows = study_rows()
    traces = tuple(replace(rows.traces[0], objective=value) for value in FLOATS)
    units = (
        replace(rows.units[0], options=json.dumps({"a": [1, None, "ä\n\"'"]}), held_out=None, rows=2**62),
        replace(FAILED, failure="\u2028 first\nsecond, third", seed=-1),
    )
    layers = (replace(rows.layers[0], record=replace(rows.layers[0].record, certified_rows=None)),)
    studies = ({"name": "one", "title": "“Eins”", "units": 3, "memory_mb": 0.5}, {"name": "two"})
    given = replace(rows, traces=traces, units=units, layers=layers, studies=studies)
    files = write_study_files(tmp_path, given)
    found = read_study_files(tmp_path)
    assert replace(found, traces=()) == replace(given, traces=())  # NaN is not equal to itself
    for one, other in zip(found.traces, given.traces, strict=True):
        assert list(map(bits, astuple(one))) == list(map(bits, astuple(other)))
    for name, values in tables(found).items():
        types = [kind for kind, _ in columns(name).values()]
        for row in values:
            assert all(value is None or type(value) is kind for value, kind in zip(row, types, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


def test_nothing_at_all_comes_back_too(tmp_path):
    nothing = StudyRows((), (), (), (), (), (), ())
    write_study_files(tmp_path, nothing)
    assert read_study_files(tmp_path) == nothing


def test_files_are_small_and_the_same_each_time(folder, tmp_path):
    write_study_files(tmp_path / "again", read_study_files(folder))
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        facts = parquet.read_metadata(path)
        assert facts.num_row_groups == 1
    export(folder, tmp_path / "csv")
    written = sum(path.stat().st_size for path in (tmp_path / "csv").iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) < written / 3


def test_a_folder_is_a_record_for_report_and_export(folder, tmp_path):
    assert read_rows(folder) == study_rows()
    page = build_report(folder, tmp_path / "report").read_text(encoding="utf-8")
    assert "Hand-made study" in page
    assert "Rows with known gaps." in page
    files = export(folder, tmp_path / "copy", "parquet")
    assert [path.stem for path in files] == [*RECORDS, "studies"]
    assert read_rows(tmp_path / "copy") == study_rows()


def refused(folder, *words):
    with pytest.raises(InvalidFileError) as caught:
        read_study_files(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("expected", "found", *words)), message


def test_a_missing_folder_or_file_is_refused(folder, tmp_path):
    with pytest.raises(InvalidFileError, match="expected an existing file or folder, found none"):
        read_rows(tmp_path / "absent")
    refused(tmp_path, "units.parquet")
    (folder / "bounds.parquet").unlink()
    refused(folder, "bounds.parquet", "expected an existing file")


@pytest.mark.parametrize("table", [*RECORDS, "studies"])
def test_damage_is_refused_wherever_it_is(folder, table):
    path = folder / f"{table}.parquet"
    whole = path.read_bytes()
    expected = read_study_files(folder)
    for length in (0, 3, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder, path.name)
    changed = 0
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        reason = ""
        try:
            # what a reader does not look at may be changed
            assert read_study_files(folder) == expected
        except InvalidFileError as error:
            changed += 1
            reason = str(error)
        assert "\n" not in reason
    assert changed > 40


def rewritten(path, change):
    parquet.write_table(change(parquet.ParquetFile(path).read()), path)


def test_a_table_of_something_else_is_refused(folder):
    path = folder / "rows.parquet"
    whole = path.read_bytes()
    rewritten(path, lambda table: table.drop_columns(["swaps"]))
    refused(folder, "rows.parquet", "expected the columns unit, row", "found unit, row, objective, bound")
    path.write_bytes(whole)
    rewritten(path, lambda table: table.set_column(2, "objective", table["objective"].cast("string")))
    refused(folder, "rows.parquet", "expected double in column objective, found string")
    path.write_bytes(whole)
    rewritten(path, lambda table: table.set_column(1, "row", pyarrow.nulls(table.num_rows, pyarrow.int64())))
    refused(folder, "rows.parquet", "expected a value in every row of column row")
    path.write_text("unit,row\n")
    refused(folder, "rows.parquet", "expected a Parquet file")


@pytest.mark.parametrize(("facts", "word"), [("{", "JSON"), ("[1]", "a name"), ('{"title": "x"}', "a name")])
def test_facts_of_a_study_are_checked(folder, facts, word):
    parquet.write_table(pyarrow.table({"facts": [facts]}), folder / "studies.parquet")
    refused(folder, "studies.parquet", word)
