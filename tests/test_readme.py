"""What the README shows is run here, on a small model and a small text."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import documents
import pytest

import sparseswaps as ss
from sparseswaps.study import build_report, parse_study, plan_study, run_study

README = (documents.ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [content for _, content in documents.blocks(README, language)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and the texts that the README speaks of."""
    documents.make_home(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    dense, pruned, wanda, swaps, status = capsys.readouterr().out.split()
    assert float(dense) > 0
    assert float(pruned) > 0
    assert float(swaps) < float(wanda)
    assert status == "local_optimum"


def test_study(home: Path) -> None:
    (text,) = blocks("toml")
    # the small model has 16 channels and positions for 64 tokens
    values = tomllib.loads(text.replace("cols = [64]", "cols = [16]").replace("length = 256", "length = 32"))
    study = parse_study(values, home)
    assert len(plan_study(study).units) > 0
    outcome = run_study(study, home / "mine.sqlite", jobs=1, backend="sequential")
    assert outcome.failed == 0
    assert build_report(home / "mine.sqlite", home / "report").exists()
    # with pip install and the command itself still under ten lines
    assert len(text.strip().splitlines()) + 2 < 10


def test_commands(home: Path) -> None:
    ran = 0
    for line in (line for block in blocks("sh") for line in documents.commands(block)):
        if line.split()[1] == "study":  # needs files that are not here, or is run above
            continue
        documents.run_command(line)
        ran += 1
    assert ran >= 11


def test_files_that_it_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (documents.ROOT / target).exists(), target


def test_study_files_of_the_project_are_valid(shared_data: Path) -> None:
    for file in sorted((documents.ROOT / "reports" / "studies").glob("*.toml")):
        assert len(plan_study(file).units) > 0, file


def test_public_names() -> None:
    for name in ss.__all__:
        assert getattr(ss, name) is not None
