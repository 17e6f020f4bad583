"""The guides are run as they stand, and the site builds without a warning and without a network."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import documents
import pytest
import typer

import sparseswaps as ss

DOCS = documents.ROOT / "docs"
# the task files of a reader of the engineer's guide
TASK = """\
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    documents.make_home(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def guide(name: str) -> str:
    return (DOCS / "guides" / f"{name}.md").read_text(encoding="utf-8")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_researcher(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    ran = documents.run_document(
        guide("researcher"),
        monkeypatch,
        # the small model has 16 channels and positions for 64 tokens; the cheapest bound says as much here
        {
            "cols = [64]": "cols = [16]",
            "length = 256": "length = 32",
            "*layers.0.*": "*layers.0.mlp.up*",
            "shared-split": "corr-eigenvalue",
        },
        {"sparseswaps study mine.toml --out report": " --jobs 1"},
    )
    assert ran == 1 + 6 + 1
    said = capsys.readouterr().out
    assert "0 failed" in said
    assert "corr-eigenvalue" in said
    page = (home / "report" / "index.html").read_text()
    assert "Certified gaps of whole models" in page
    assert "The interaction term" in page
    assert (home / "tables" / "bounds.csv").exists()


# a trainer that pins memory for an accelerator that is not there; libraries of the harness
@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_engineer(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets are not installed")
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    (home / "my_tasks").mkdir()
    questions = [
        {"question": f"w{n}", "choices": [f" w{n + 1}", " w9"], "answer": n % 2} for n in range(10, 16)
    ]
    data = home / "my_tasks" / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (home / "my_tasks" / "my_task.yaml").write_text(TASK.replace("DATA", str(data)))
    ran = documents.run_document(
        guide("engineer"),
        monkeypatch,
        more={
            # its 24 channels are no multiple of 64
            "sparseswaps prune MODEL --units channels=0.25 --calibration text.txt --evaluation other.txt "
            "--out smaller": " --multiple-of 2",
            "sparseswaps prune MODEL --units channels=0.25 --pattern 0.5 --calibration text.txt "
            "--out smaller-and-sparse": " --multiple-of 2",
            "sparseswaps bench smaller --against MODEL --card": " --prompt 16 --new 2 --rounds 2",
            "sparseswaps zero-shot pruned --out zero-shot.json": " --tasks my_task --task-path my_tasks",
            # its words are no words of a language
            "sparseswaps zero-shot pruned --text other.txt --against MODEL": " --tasks continuation"
            " --items 8",
        },
    )
    assert ran == 3 + 1 + 2 + 2 + 3 + 2 + 3 + 1 + 1 + 2 + 1 + 3
    score = json.loads((home / "zero-shot.json").read_text())["scores"][0]
    assert (score["task"], score["questions"]) == ("my_task", len(questions))
    assert "tuned-and-pruned" in capsys.readouterr().out


def test_optimisation(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert documents.run_document(guide("optimisation"), monkeypatch) == 5 + 3
    assert (home / "row0.lp").exists()
    assert "additive-swap" in capsys.readouterr().out


def test_the_arithmetic_of_the_page_on_scale_is_that_of_its_script() -> None:
    scaling = module(documents.ROOT / "benchmarks" / "scaling.py")
    assert scaling.tables() in (DOCS / "scaling.md").read_text(encoding="utf-8")
    shape = scaling.MODELS[0]
    # Llama 3.1 8B: 8.03e9 weights, of which embeddings and output head have 128,256 x 4096 each
    norms = (2 * shape.blocks + 1) * shape.hidden
    assert shape.weights + 2 * 128_256 * shape.hidden + norms == 8_030_261_248
    assert len(scaling.engine_rows()) >= 3
    assert len(scaling.exact_figure().rows) >= 10
    assert len(scaling.bound_figure().rows) >= 10
    assert len(scaling.memory_table().splitlines()) >= 2 + 4
    assert len(scaling.end_to_end_table().splitlines()) >= 2 + 4


def test_links_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=documents.ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **no_network, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 12
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"([^\"]+)\"", text)
        assert not [address for address in loaded if "//" in address], page
        assert "arithmatex" not in text, page  # each formula is MathML
    listed = (tmp_path / "site" / "published" / "index.html").read_text(encoding="utf-8")
    for rows in (documents.ROOT / "reports" / "published").glob("*/rows"):
        report = tmp_path / "site" / "published" / rows.parent.name
        assert f'href="{rows.parent.name}/"' in listed
        twin = (rows.parent / "README.md").read_text(encoding="utf-8")
        finding = twin.partition("\n## ")[2].split("\n\n")[1]
        assert finding.replace("**", "") in html.unescape(re.sub(r"<[^>]*>", "", listed))
        assert "<figure" in (report / "index.html").read_text(encoding="utf-8")
        assert len(list(report.glob("figures/*.png"))) == len(list(report.glob("figures/*.svg"))) > 0
    assert listed.count("<svg") >= len(list((documents.ROOT / "reports" / "published").glob("*/rows")))
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Wanda" in front[front.index("<figure") : front.index("</figure>")]
    assert front.count("<math") >= 4
    reference = (tmp_path / "site" / "reference" / "solvers" / "index.html").read_text(encoding="utf-8")
    for name in ("OneSwap", "AdditiveSwap", "BranchAndBound", "max_swaps"):
        assert name in reference


TEXTS = [documents.ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_flags_and_values_that_documents_name_are_accepted(page: Path) -> None:
    """Not only in blocks of commands: every flag, its value, and text of a solver in running text too."""
    tried = documents.try_inline_code(page.read_text(encoding="utf-8"))
    assert tried or page.stem in ("index", "optimisation", "published", "scaling"), page


def test_inline_code_that_is_wrong_is_found() -> None:
    for text in ("`--drift automatic`", "`--no-such-flag`", "`one-swap:swaps=3`", '`objective = "drfit=1"`'):
        with pytest.raises((AssertionError, ss.InputError, typer.BadParameter)):
            documents.try_inline_code(f"Use {text} for this.")
