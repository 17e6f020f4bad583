"""An output folder belongs to one process at a time, and to one run."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InvalidFileError, file_errors
from ..records.run_database import facts_in
from .file import MASK_FILE
from .units_file import UNITS_FILE

RECORD_FILE = "record.sqlite"
LOCK_FILE = ".sparseswaps.lock"


@contextmanager
def claimed(folder: Path, resume: bool = False) -> Iterator[None]:
    """``folder`` is this process's own to write into, and gone afterwards if nothing was written.

    Args:
        folder: it may be missing.
        resume: whether it may hold an interrupted run.

    Raises:
        InvalidFileError: if another process writes there, if it holds anything else, or cannot be made.
    """
    with file_errors(f"output {folder}"):
        if not (folder / LOCK_FILE).exists():
            _check(folder, resume)
        made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InvalidFileError(
            f"output {folder}: expected no other process that writes there, found {_holder(folder)}"
        ) from error
    except OSError:
        _remove(made)
        with file_errors(f"output {folder}"):
            raise
    try:
        own = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with file_errors(f"output {folder}"):
            (folder / LOCK_FILE).write_text(json.dumps(own), encoding="utf-8")
        _check(folder, resume)
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        _remove(made)


def _remove(made: list[Path]) -> None:
    """Take away folders that were made and hold nothing."""
    for each in made:
        if each.is_dir() and not any(each.iterdir()):
            each.rmdir()


def _holder(folder: Path) -> str:
    try:
        own = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        return f"process {own['process']} on {own['host']}, which began at {own['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "one that does"


def _check(folder: Path, resume: bool) -> None:
    """Refuse, and leave as it is, a folder that holds anything but, with ``resume``, an interrupted run."""
    if folder.exists() and not folder.is_dir():
        raise InvalidFileError(f"output {folder}: expected a directory, found a file")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    held = [name for name in held if name != LOCK_FILE]
    if not held:
        return
    facts = facts_in(folder / RECORD_FILE) if RECORD_FILE in held else None
    if (facts is None and {MASK_FILE, UNITS_FILE} & set(held)) or (facts is not None and "report" in facts):
        raise InvalidFileError(f"output {folder}: expected an empty directory, found a finished pruned model")
    if facts is None:
        expected = "an empty directory or an interrupted run" if resume else "an empty directory"
        raise InvalidFileError(f"output {folder}: expected {expected}, found other files ({held[0]})")
    if not resume:
        raise InvalidFileError(
            f"output {folder}: expected an empty directory, found an unfinished run; add --resume to go on"
        )
