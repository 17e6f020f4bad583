"""The text that exists on every machine: the source code of Python's standard library.

The bundled demo model is trained, calibrated and evaluated on it. A module belongs to the
held-out part when the CRC-32 of its path is 0 modulo 16, so the split is the same on every
machine and for every Python version that has the module.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from typing import Literal

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def standard_library_files(part: Literal["train", "held-out"]) -> list[Path]:
    """Python files of the running interpreter's standard library, without its tests, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # config-3.x-<platform> and lib-dynload hold build products, not modules of the library
        if EXCLUDED_FOLDERS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        held_out = zlib.crc32(relative.as_posix().encode()) % 16 == 0
        if held_out == (part == "held-out"):
            files.append(path)
    return files


def standard_library_text(part: Literal["train", "held-out"], limit: int | None = None) -> str:
    """The files' text, each followed by a blank line; at most ``limit`` characters of it.

    Files that are not valid UTF-8 are left out.
    """
    pieces: list[str] = []
    length = 0
    for path in standard_library_files(part):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        pieces.append(text + "\n\n")
        length += len(text) + 2
        if limit is not None and length >= limit:
            break
    return "".join(pieces)[:limit]
