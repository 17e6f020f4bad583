"""What documents show is run: their blocks of shell commands, Python and TOML, in their order."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch

import sparseswaps.cli

ROOT = Path(__file__).resolve().parents[1]
# what the small model and texts of the tests are called in documents
NAMES = {"MODEL": "path/to/model", "c4": "text.txt", "wikitext2-test": "other.txt"}


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks in ``languages``, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, content) for language, content in found if language in languages]


def commands(content: str) -> list[str]:
    """The lines of a shell block that call sparseswaps, each in one piece."""
    lines = re.sub(r"\\\n\s*", "", content).splitlines()
    return [line for line in lines if line.startswith("sparseswaps")]


def make_home(folder: Path) -> None:
    """Put the model and the texts that documents speak of into ``folder``."""
    tiny_models.save("llama", folder / "path" / "to" / "model", torch.float16)
    # windows of 64 tokens: at least the 128 that are asked for
    (folder / "text.txt").write_text(tiny_models.text(10_000))
    (folder / "other.txt").write_text(tiny_models.text(3_000, seed=1))


def run_command(line: str, monkeypatch: pytest.MonkeyPatch, more: Mapping[str, str] | None = None) -> None:
    """Run one command line in this process.

    Args:
        line: as a reader would type it.
        monkeypatch: puts it into ``sys.argv``.
        more: by line, what is added because the real thing is too large or needs a network.
    """
    words = shlex.split(line + (more or {}).get(line, ""), comments=True)
    monkeypatch.setattr(sys, "argv", [NAMES.get(word, word) for word in words])
    code = 0
    try:
        sparseswaps.cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 0, line


def run_document(
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    toml: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> int:
    """Run a document in the current folder, block by block; returns how many blocks and commands ran.

    Args:
        text: Markdown; a TOML block becomes ``mine.toml``.
        monkeypatch: see ``run_command``.
        toml: replacements in TOML blocks, for the size of the small model.
        more: see ``run_command``.
    """
    ran = 0
    for language, content in blocks(text, "sh", "python", "toml"):
        if language == "sh":
            for line in commands(content):
                run_command(line, monkeypatch, more)
                ran += 1
        elif language == "python":
            # dataclasses look their module up
            module = ModuleType("document")
            monkeypatch.setitem(sys.modules, "document", module)
            exec(compile(content, "document", "exec"), module.__dict__)
            ran += 1
        else:
            for written, small in (toml or {}).items():
                assert written in content, written
                content = content.replace(written, small)
            Path("mine.toml").write_text(content)
            ran += 1
    return ran
