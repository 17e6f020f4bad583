"""Folders of several files that appear whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import file_errors


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to ``out`` when the block has ended without an error.

    Raises:
        InvalidFileError: if ``out`` cannot be written; nothing of it is there then.
    """
    with file_errors(f"output {out}"):
        existed = out.exists()
        out.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as name:
                partial = Path(name)
                yield partial
                for path in sorted(partial.rglob("*")):
                    target = out / path.relative_to(partial)
                    if path.is_dir():
                        target.mkdir(exist_ok=True)
                    else:
                        path.replace(target)
        except BaseException:
            if not existed and not any(out.iterdir()):
                out.rmdir()
            raise
