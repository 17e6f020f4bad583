"""What documents show is run: their blocks of shell commands, Python and TOML, in their order."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import command_line
import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.cli.app import COMMANDS, load
from sparseswaps.cli.options import option_parameters, read_options
from sparseswaps.solvers.registry import parse_solver

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


def run_command(line: str, more: Mapping[str, str] | None = None) -> None:
    """Run one command line in this process.

    Args:
        line: as a reader would type it.
        more: by line, what is added because the real thing is too large or needs a network.
    """
    _, *words = shlex.split(line + (more or {}).get(line, ""), comments=True)
    assert command_line.run(*(NAMES.get(word, word) for word in words)) == 0, line


def run_document(
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    toml: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> int:
    """Run a document in the current folder, block by block; returns how many blocks and commands ran.

    Args:
        text: Markdown; a TOML block becomes ``mine.toml``.
        monkeypatch: makes programs importable as ``document``.
        toml: replacements in TOML blocks, for the size of the small model.
        more: see ``run_command``.
    """
    ran = 0
    for language, content in blocks(text, "sh", "python", "toml"):
        if language == "sh":
            for line in commands(content):
                run_command(line, more)
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


def try_inline_code(text: str) -> int:
    """Read every flag, option value, solver and objective that running text names; returns how many.

    Raises:
        AssertionError: for a flag that no command has.
        InputError: for a value that its option refuses.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    tried = 0
    for code in re.findall(r"`([^`\n]+)`", prose):
        if "--" in code and not code.startswith(("pip ", "python ", "make ")):
            words = shlex.split(code)
            for word, following in zip(words, [*words[1:], ""], strict=True):
                if word.startswith("--") and word != "--help":
                    flag, _, value = word.partition("=")
                    _try_flag(flag, value or ("" if following.startswith("--") else following))
                    tried += 1
        elif match := re.fullmatch(r"(\w+) = (.+)", code):
            if match[1] in SETTINGS:
                values = tomllib.loads(code)[match[1]]
                for value in values if isinstance(values, list) else [values]:
                    ss.PruneSettings(**{match[1]: value})
                tried += 1
        elif re.fullmatch(r"[a-z][a-z-]+(:[\w=.,]+|\+[a-z:=+.-]+)", code) and "." not in code.split(":")[0]:
            if not code.startswith("layer:"):
                parse_solver(code)
            else:
                ss.PatternRule.parse(code)
            tried += 1
    return tried


SETTINGS = {field.name for field in fields(ss.PruneSettings)}


def _try_flag(flag: str, value: str) -> None:
    """Some command has the flag; ``prune``'s options read the value, others' commands convert it."""
    owners = {}
    for name in COMMANDS:
        command = load(name)
        for parameter in command.params:
            if flag in parameter.opts:
                owners[name] = (command, parameter)
    assert owners, f"no command has {flag}"
    if not value or not re.fullmatch(r"[\w.:=,+%*-]+", value):
        return
    options = {each.name for each in option_parameters()}
    for name, (command, parameter) in owners.items():
        if parameter.is_flag or (name != "prune" and "prune" in owners):
            continue
        context = command.make_context(name, [], resilient_parsing=True)
        read = parameter.process_value(context, [value] if parameter.multiple else value)
        if parameter.name in options:
            read_options({parameter.name: read}, None)
