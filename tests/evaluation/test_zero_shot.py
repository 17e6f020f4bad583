"""The zero-shot command on a small local task, offline, against likelihoods computed by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import command_line
import pytest
import tiny_models
import torch
import transformers

from sparseswaps.errors import InputError, InvalidModelError, SolverNotInstalledError
from sparseswaps.evaluation.whole_files import write_atomically
from sparseswaps.evaluation.zero_shot import SEVEN_TASKS, zero_shot
from sparseswaps.models.loading import load_model
from sparseswaps.study.problems import DEMO_MODEL

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)

# (question, choices, answer): the model has read Python's standard library
QUESTIONS = [
    ("import", [" os\n", " zebra crossing\n"], 0),
    ("def __init__(self", [", name):\n", "]]]]:\n", " banana"], 0),
    ("    return", [" None\n", " purple elephants and so on\n"], 0),
    ("for i in", [" range(10):\n", " range"], 0),
    ("raise", [" x", " ValueError(\n", " whatever it is that comes to mind"], 1),
    ("if x is", [" None:\n", " y"], 0),
    ("class Foo", ["(object):\n", "!"], 1),
]

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task file and its data; the harness keeps its copy of the data beside them."""
    folder: Path = tmp_path_factory.mktemp("tasks")
    data = folder / "python.jsonl"
    data.write_text(
        "".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in QUESTIONS)
    )
    (folder / "python_words.yaml").write_text(TASK.format(name="python_words", data=data))
    missing = TASK.format(name="no_data", data=folder / "nowhere.jsonl")
    (folder / "no_data.yaml").write_text(missing)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")


def by_hand(front: list[int] | None = None) -> tuple[list[bool], list[bool]]:
    """Right answers of each question, behind ``front``, by likelihood and by likelihood per character."""
    front = front or []
    loaded = load_model(DEMO_MODEL)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    likeliest, normalised = [], []
    for question, choices, answer in QUESTIONS:
        values = []
        start = len(front + tokenizer.encode(question, add_special_tokens=False))
        for choice in choices:
            tokens = torch.tensor([front + tokenizer.encode(question + choice, add_special_tokens=False)])
            with torch.no_grad():
                logs = loaded.model(input_ids=tokens).logits[0].double().log_softmax(-1)
            values.append(float(sum(logs[i - 1, tokens[0, i]] for i in range(start, tokens.shape[1]))))
        likeliest.append(max(range(len(values)), key=values.__getitem__) == answer)
        per_character = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        normalised.append(max(range(len(values)), key=per_character.__getitem__) == answer)
    return likeliest, normalised


@needs_harness
# the harness and its libraries: sockets of a hub that is not asked, a module that names its successor
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_scores_are_those_of_the_likelihoods(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "zero-shot.json"
    words = ["--tasks", "python_words", "--task-path", tasks, "--out", out, "--device", "cpu"]
    assert command_line.run("zero-shot", DEMO_MODEL, *words) == 0
    values = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["zero-shot.json"]  # nothing half-written is left
    (score,) = values["scores"]
    for name, right in zip(("acc", "acc_norm"), by_hand(), strict=True):
        share = sum(right) / len(right)
        assert score[name] == pytest.approx(share)
        assert score[f"{name}_error"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert score["questions"] == len(QUESTIONS)
    # the questions tell the two measures apart
    assert 0 < score["acc"] != score["acc_norm"]
    assert values["mean_acc"] == score["acc"]
    assert values["versions"]["lm_eval"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"python_words {len(QUESTIONS)} {score['acc']:.4f} ± {score['acc_error']:.4f}" in said


def with_tokenizer(folder: Path, begins: bool, bos: str | None = "<s>") -> Path:
    """The demo model with a tokenizer that begins with its token by itself, or has no such token."""
    shutil.copytree(DEMO_MODEL, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = bos
    tokenizer.add_bos_token = begins
    tokenizer.save_pretrained(folder)
    return folder


@needs_harness
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_questions_begin_as_asked_for_or_as_the_tokenizer_does(tasks: Path, tmp_path: Path) -> None:
    begins = with_tokenizer(tmp_path / "begins", True)
    expected = {"yes": [sum(right) for right in by_hand([0])], "no": [sum(right) for right in by_hand()]}
    assert expected["yes"] != expected["no"]
    for model, asked, done in [
        (DEMO_MODEL, "auto", "no"), (DEMO_MODEL, "yes", "yes"), (DEMO_MODEL, "no", "no"),
        (begins, "auto", "yes"), (begins, "yes", "yes"), (begins, "no", "no"),
    ]:  # fmt: skip
        report = zero_shot(model, ["python_words"], task_path=tasks, add_bos=asked, device="cpu")
        (score,) = report.scores
        found = [score.acc * score.questions, score.acc_norm * score.questions]
        assert found == pytest.approx(expected[done]), (model, asked)
        assert report.add_bos == report.to_json()["add_bos"] == done
    without = with_tokenizer(tmp_path / "without", False, None)
    with pytest.raises(InputError, match=r"beginning-of-text token: expected a tokenizer that has one"):
        zero_shot(without, ["python_words"], task_path=tasks, add_bos="yes", device="cpu")
    with pytest.raises(InputError, match="add_bos: expected one of auto, yes, no, found 'maybe'"):
        zero_shot(DEMO_MODEL, ["python_words"], task_path=tasks, add_bos="maybe")


@needs_harness
def test_what_cannot_be_asked_is_refused(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'python_word': expected a task of .* such as python_words"):
        zero_shot(DEMO_MODEL, ["python_word"], task_path=tasks)
    with pytest.raises(InputError, match="expected a folder"):
        zero_shot(DEMO_MODEL, ["python_words"], task_path=tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least one"):
        zero_shot(DEMO_MODEL, [])
    with pytest.raises(InputError, match=r"limit .* expected at least 1, found 0"):
        zero_shot(DEMO_MODEL, limit=0)
    tiny_models.save("bert", tmp_path / "bert", torch.float32)
    with pytest.raises(InvalidModelError, match="causal language model, found Bert"):
        zero_shot(tmp_path / "bert", ["python_words"], task_path=tasks)
    with pytest.raises(InputError, match="no_data: expected their data on the hub or in local files"):
        zero_shot(DEMO_MODEL, ["no_data"], task_path=tasks)


@needs_harness
def test_the_seven_tasks_exist_in_the_harness() -> None:
    """Their names are those of task files of the installed version; their data need the hub."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    files = [*folder.glob("super_glue/*/default.yaml"), *folder.glob("glue/rte/*.yaml")]
    files += [
        path
        for name in ("hellaswag", "winogrande", "arc", "openbookqa")
        for path in (folder / name).glob("*.yaml")
    ]
    named = {
        line.split(":", 1)[1].strip()
        for path in files
        for line in path.read_text().splitlines()
        if line.startswith("task:")
    }
    assert set(SEVEN_TASKS) <= named


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SolverNotInstalledError, match=r"pip install 'sparseswaps\[eval\]'"):
        zero_shot(DEMO_MODEL)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "file.json"
    write_atomically(target, "first")
    assert target.read_text() == "first"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_atomically(target, "second")
    assert target.read_text() == "first"
    assert len(list(target.parent.iterdir())) == 1
