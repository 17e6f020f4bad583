"""What the benchmarks do with their result."""

from __future__ import annotations

from pathlib import Path


def publish(text: str, out: Path | None) -> None:
    """Print ``text``, and write it to ``out`` if there is one."""
    print(text)
    write(text, out)


def write(text: str, out: Path | None) -> None:
    """Write ``text`` to ``out`` if there is one."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
