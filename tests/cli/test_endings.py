"""How commands end that were given nothing wrong: full disks, broken pipes, interrupts, damaged records."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_any_input import STUDY, run

import sparseswaps as ss
from sparseswaps.calibration.store import TensorStore
from sparseswaps.cli import app
from sparseswaps.errors import InvalidFileError, file_errors
from sparseswaps.masks.packing import unpack_bytes
from sparseswaps.problems import load_instance, save_instance
from sparseswaps.problems.files import as_metadata, from_metadata
from sparseswaps.records.run import LayerRecord
from sparseswaps.records.run_database import RunDatabase
from sparseswaps.study import StudyDatabase, build_report, export, run_study

FULL = "expected room on the disk, found it full"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a small study."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY)
    run_study(folder / "study.toml", folder / "record.sqlite", jobs=1, backend="sequential")
    return folder / "record.sqlite"


@pytest.fixture
def tiny_files() -> object:
    """No file of this process may become longer than 4 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        sqlite3.OperationalError("database or disk is full"),
        OSError("I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_full_disk_says_so(error: Exception) -> None:
    with pytest.raises(InvalidFileError, match=f"^output x: {FULL}$"), file_errors("output x"):
        raise error
    with (
        pytest.raises(
            InvalidFileError, match=r"^output x: expected to be able to write there, found Read-only"
        ),
        file_errors("output x"),
    ):
        raise OSError(errno.EROFS, "Read-only file system", "x")


@pytest.mark.usefixtures("tiny_files")
def test_what_is_written_to_a_full_disk_is_not_there(tmp_path: Path, record: Path) -> None:
    problem = ss.synthetic_layer("correlated", 4, 64, "0.5")
    with pytest.raises(InvalidFileError, match=FULL):
        save_instance(problem, tmp_path / "instance")
    store = TensorStore(0, tmp_path)
    with pytest.raises(InvalidFileError, match="expected room"):
        store.keep("key", problem.gram.matrix)
    del store
    assert not list(tmp_path.iterdir())


def test_a_record_on_a_full_disk_keeps_what_it_has(tmp_path: Path) -> None:
    with RunDatabase(tmp_path / "run.sqlite") as database:
        database.set({"first": 1})
        database._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(InvalidFileError, match=f"^record .*: {FULL}$"):
            database.set({"second": "x" * 100_000})
        assert database.facts() == {"first": 1}


def test_a_report_on_a_full_disk_leaves_nothing(
    tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr("sparseswaps.reports.page._html", full)
    monkeypatch.setattr(sys.modules["sparseswaps.study.export"], "_write_csv", full)
    writers: list[Callable[[], object]] = [
        lambda: build_report(record, tmp_path / "report"),
        lambda: export(record, tmp_path / "tables"),
    ]
    for write in writers:
        with pytest.raises(InvalidFileError, match=FULL):
            write()
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_that_a_disk_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr(app, "app", full)
    assert run([], capsys) == (1, "error: disk of /somewhere: expected room on it, found it full\n")


def test_an_unexpected_error_leaves_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody thought [of] this\nsecond line")

    monkeypatch.setattr(app, "app", broken)
    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path))
    code, said = run(["solve", "x"], capsys)
    (log,) = tmp_path.iterdir()
    assert code == 1
    assert said == (
        "error: something unexpected happened, ZeroDivisionError: nobody thought [of] this second line; "
        f"the traceback is in {log}\n"
    )
    assert log.read_text().startswith("sparseswaps solve x\nTraceback (most recent call last)")
    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path / "none"))
    code, said = run([], capsys)
    assert (code, len(said.splitlines())) == (1, 1)
    assert "its log cannot be written: No such file or directory" in said


def test_an_interrupt_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupted)
    assert run([], capsys) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "command", [["solvers"], ["solve", "INSTANCE", "--json", "--quiet"]], ids=["table", "json"]
)
def test_a_reader_that_stops_ends_the_command_quietly(command: list[str], tmp_path: Path) -> None:
    save_instance(ss.synthetic_layer("correlated", 300, 8, "0.5"), tmp_path / "instance")
    arguments = [str(tmp_path / "instance") if part == "INSTANCE" else part for part in command]
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "sparseswaps", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (found.returncode, found.stderr.strip()) == (1, "")


def _overwrite(path: Path, target: Path, start: int, filler: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[start:] = filler * (len(content) - start)
    target.write_bytes(content)
    return target


def test_damaged_pages_of_a_study_are_named(record: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match=r"^study record .*: expected an SQLite database, found "):
        export(_overwrite(record, tmp_path / "pages", 4096, b"\xff"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE unit SET rows = 'many'", "expected a int in column rows"),
        ("UPDATE unit SET label = x'ff'", "expected a str in column label"),
        (
            "UPDATE unit SET label = CAST(x'ff' AS TEXT)",
            "expected an SQLite database, found Could not decode",
        ),
        ("UPDATE unit SET machine = '{'", "expected JSON of a dict in column machine"),
        ("UPDATE unit SET options = '[]'", "expected JSON of a dict in column options"),
        ("UPDATE study SET facts = 'x'", "expected JSON in the facts of a study"),
        ("UPDATE study SET facts = '[]'", "expected an object of JSON in the facts of a study"),
        ("UPDATE study SET facts = '{}'", "expected facts with a name"),
        ("ALTER TABLE unit DROP COLUMN label", "expected a column label, found none"),
        ("DROP TABLE bound", None),
    ],
)
def test_damaged_values_of_a_study_are_named(
    record: Path, tmp_path: Path, change: str, words: str | None
) -> None:
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(record.read_bytes())
    with sqlite3.connect(copy) as connection:
        connection.execute(change)
    connection.close()
    if words is None:  # an empty table is made again
        export(copy, tmp_path / "out")
        return
    with pytest.raises(InvalidFileError, match=f"study record {copy}.*: {words}"):
        build_report(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_owners_that_no_process_has_are_gone(record: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(record.read_bytes())
    for owner in ("x", "a:b", ":::", None, 7):
        with sqlite3.connect(copy) as connection:
            connection.execute("UPDATE plan SET state = 'claimed', owner = ?, claimed = 0, lim = 1", (owner,))
        connection.close()
        with StudyDatabase(copy) as database:
            assert database.release_lost() == 1


def test_instances_without_metadata_are_named(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_instance(ss.synthetic_layer("correlated", 2, 8, "0.5"), tmp_path / "whole")
    with safe_open(tmp_path / "whole", "pt") as file:
        metadata = from_metadata(file.metadata())
        tensors = {name: file.get_tensor(name) for name in ("weight", "gram")}
    for key in ("pattern", "name", "tokens", "provenance"):
        part = {name: text for name, text in metadata.items() if name != key}
        save_file(tensors, tmp_path / "part", as_metadata(part))
        with pytest.raises(InvalidFileError, match=f"instance file .*part: metadata {key}: expected"):
            load_instance(tmp_path / "part")
    save_file(
        {**tensors, "drift_linear": tensors["weight"].clone()}, tmp_path / "part", as_metadata(metadata)
    )
    with pytest.raises(InvalidFileError, match="drift: expected drift_linear and drift_constant"):
        load_instance(tmp_path / "part")


LAYER = LayerRecord(
    "a", 0, "q", 2, 9, "1:2", 0.5, 1, 0, 1.0, 0.5, 0.4, 0.5, 0.4, None, None, 1, None, "finished", 0.1
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE layer SET rows = 'x'", "expected a int in column rows"),
        ("UPDATE layer SET status = x'00'", "expected a str in column status"),
        ("UPDATE run SET value = '{'", "expected JSON in fact settings"),
        ("UPDATE layer SET mask = x'00'", "a mask: expected 4 bytes, found 1 bytes"),
        ("UPDATE layer SET mask = 'text'", "a mask: expected 4 bytes, found a str"),
        (None, "expected an SQLite database, found"),
    ],
)
def test_damaged_records_of_runs_are_named(tmp_path: Path, change: str | None, words: str) -> None:
    path = tmp_path / "record.sqlite"
    with RunDatabase(path) as record:
        record.set({"settings": {}})
        record.add_layer(LAYER, b"\x00" * 4)
        assert record.layers() == [LAYER]
    if change is None:
        _overwrite(path, path, 4096, b"\xff")
    else:
        with sqlite3.connect(path) as connection:
            connection.execute(change)
        connection.close()

    def read() -> None:
        with RunDatabase(path) as record:
            record.facts()
            record.layers()
            unpack_bytes(record.packed_mask("a") or b"", (2, 9))

    with pytest.raises(InvalidFileError, match=f"^record .*{words}"):
        read()
