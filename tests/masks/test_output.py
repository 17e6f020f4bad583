"""One process writes into an output folder, and a run goes on only where it began."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.masks.file import MASK_FILE, load_masks
from sparseswaps.masks.output import LOCK_FILE, RECORD_FILE, claimed
from sparseswaps.records.run_database import RunDatabase


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "dense")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(400).numpy())
    return {"calibration": tmp_path / "tokens.npy", "samples": 4, "length": 16, "solver": "wanda"}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_second_writer_is_told_of_the_first(dense: Path, options: dict[str, Any], tmp_path: Path) -> None:
    ss.prune(dense, **options, out=tmp_path / "alone")
    out, go = tmp_path / "out", tmp_path / "go"

    def first() -> None:
        def wait(*_: object) -> None:
            while not go.exists():
                time.sleep(0.01)

        ss.prune(dense, **options, out=out, on_layer=wait)

    child = processes.start(first, tmp_path / "result")
    while not (out / RECORD_FILE).exists():
        time.sleep(0.01)
    for other in ({"seed": 7}, {"seed": 7, "resume": True}):
        with pytest.raises(ss.InvalidFileError, match=f"found process {child} on .*, which began at 20"):
            ss.prune(dense, **options, **other, out=out)
    with (
        pytest.raises(ss.InvalidFileError, match=f"expected no other process .* found process {child} on"),
        claimed(out),
    ):
        pass
    go.touch()
    assert processes.wait(child) == 0
    found, expected = load_masks(out), load_masks(tmp_path / "alone")
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert not (out / LOCK_FILE).exists()


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def die() -> None:
        with claimed(folder):
            os._exit(9)

    assert processes.wait(processes.start(die, tmp_path / "result")) == 9
    assert (folder / LOCK_FILE).exists()
    with claimed(folder):
        pass
    assert not (folder / LOCK_FILE).exists()


def test_a_claimed_folder_that_stays_empty_is_gone(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b"):
        assert json.loads((tmp_path / "a" / "b" / LOCK_FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").mkdir()
    with claimed(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").is_dir()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "what", ["dense model", "note", "other database", "finished", "old record", "damaged"]
)
def test_foreign_folders_are_refused_untouched(
    what: str, resume: bool, dense: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if what == "dense model":
        out = dense
    elif what == "finished":
        ss.prune(dense, **options, out=out)
    else:
        out.mkdir()
    if what == "note":
        (out / "note.txt").write_text("mine")
    elif what == "damaged":
        (out / RECORD_FILE).write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    elif what in ("other database", "old record"):
        connection = sqlite3.connect(out / RECORD_FILE)
        connection.execute("CREATE TABLE mine (a)")
        connection.execute(f"PRAGMA user_version = {0 if what == 'other database' else 1}")
        connection.close()
    before = contents(out)
    with pytest.raises(ss.InvalidFileError) as caught:
        ss.prune(dense, **options, out=out, resume=resume)
    assert "\n" not in str(caught.value)
    assert contents(out) == before


def test_another_command_does_not_resume(dense: Path, options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(dense, options, out)
    with pytest.raises(ss.InputError, match="found another seed"):
        ss.prune(dense, **options, seed=3, out=out, resume=True)
    with pytest.raises(ss.InvalidFileError, match="found an unfinished run; add --resume"):
        ss.prune(dense, **options, out=out)
    report = ss.prune(dense, **options, out=out, resume=True)
    assert report.out == str(out)


def begun(dense: Path, options: dict[str, Any], out: Path) -> None:
    """A run that was interrupted after its first layer."""

    def stop(*_: object) -> None:
        if (out / RECORD_FILE).exists():
            with RunDatabase(out / RECORD_FILE) as record:
                if record.layers():
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ss.prune(dense, **options, out=out, on_layer=stop)


def test_interrupted_between_the_masks_and_the_report_it_is_finished(
    dense: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = RunDatabase.set

    def interrupted(record: RunDatabase, values: dict[str, Any]) -> None:
        if "report" in values:
            raise KeyboardInterrupt
        real(record, values)

    monkeypatch.setattr(RunDatabase, "set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ss.prune(dense, **options, out=out)
    monkeypatch.undo()
    assert (out / MASK_FILE).exists()
    saved = contents(out)
    report = ss.prune(dense, **options, out=out, resume=True)
    with RunDatabase(out / RECORD_FILE) as record:
        assert record.facts()["report"]["error"] == report.error
    after = contents(out)
    for name in set(saved) - {RECORD_FILE}:
        assert after[name] == saved[name], name
    with pytest.raises(ss.InvalidFileError, match="found a finished pruned model"):
        ss.prune(dense, **options, out=out, resume=True)


def test_equal_runs_give_equal_bytes(dense: Path, options: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        ss.prune(dense, **options, out=tmp_path / name)
    found = [contents(tmp_path / name) for name in ("one", "two", "three")]
    for each in found:
        del each[RECORD_FILE]  # has times
    assert found[0] == found[1] == found[2]
    facts = []
    for name in ("one", "two"):
        with RunDatabase(tmp_path / name / RECORD_FILE) as record:
            layers = [{**vars(layer), "seconds": 0} for layer in record.layers()]
            facts.append((record.facts()["settings"], layers))
    assert facts[0] == facts[1]


def test_masks_of_earlier_versions_are_read(dense: Path, options: dict[str, Any], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    ss.prune(dense, **options, out=tmp_path / "out")
    with safe_open(tmp_path / "out" / MASK_FILE, "pt") as file:
        header = json.loads(file.metadata()["sparseswaps"])
    save_file(load_file(tmp_path / "out" / MASK_FILE), tmp_path / "old.safetensors", header)
    old, new = load_masks(tmp_path / "old.safetensors"), load_masks(tmp_path / "out")
    assert old.layers == new.layers
    assert all(torch.equal(old.masks[name], mask) for name, mask in new.masks.items())
