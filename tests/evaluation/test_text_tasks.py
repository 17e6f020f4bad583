"""Zero-shot tasks that are made from a text: what they ask, and their scores against single likelihoods."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections import Counter
from pathlib import Path

import command_line
import pytest
import torch

from sparseswaps.calibration.texts import read_documents
from sparseswaps.errors import InputError, InvalidModelError, InvalidTextError
from sparseswaps.evaluation.text_tasks import TEXT_TASKS, TextTasks, make_questions, passages
from sparseswaps.evaluation.zero_shot import zero_shot
from sparseswaps.models.loading import load_model
from sparseswaps.study.problems import DEMO_MODEL

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
    ),
    # the harness and its libraries: sockets of a hub that is not asked, a module that names its successor
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
CODE = "stdlib-held-out"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return passages(read_documents(CODE))


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_passages_are_the_text_without_overlap() -> None:
    words = [f"w{number}" for number in range(200)]
    written = "\n ".join(words)
    found = passages([written, "too short", " ".join(words[:88])])
    assert [text.split() for text in found] == [words[:88], words[88:176], words[:88]]
    assert found[0] in written


def test_right_answers_are_the_text_and_wrong_ones_are_not(texts: list[str]) -> None:
    whole = [one_line(text) for text in texts]
    for task in TEXT_TASKS:
        questions = make_questions(task, texts, TextTasks(CODE, 40))
        begins = [
            [place for place, text in enumerate(whole) if text.startswith(one_line(question["question"]))]
            for question in questions
        ]
        assert all(begins)
        assert len({found[0] for found in begins}) == 40, "a passage is asked about once"
        for question, (place, *_) in zip(questions, begins, strict=True):
            before = one_line(question["question"])
            assert len(before.split()) >= 48
            if task == "cloze":
                behind = whole[place].removeprefix(before + question["target"]).lstrip()
                assert whole[place].startswith(before + question["target"])
                assert question["target"][1:].isalpha()
                assert behind[0] in ".!?"
                continue
            follows = [whole[place].startswith(before + choice) for choice in question["choices"]]
            assert follows == [choice == question["answer"] for choice in range(4)]
        if task != "cloze":  # the place of an answer says nothing
            assert min(Counter(question["answer"] for question in questions).values()) >= 3


def test_wrong_continuations_are_others_and_wrong_words_as_frequent(texts: list[str]) -> None:
    stretches = {" " + " ".join(text.split()[64:80]) for text in texts}
    for question in make_questions("continuation", texts, TextTasks(CODE, 40)):
        assert set(question["choices"]) <= stretches
    counts = Counter(word for text in texts for word in text.split() if word.isalpha() and len(word) > 3)
    counts = Counter({word: count for word, count in counts.items() if word == word.lower()})
    for question in make_questions("word", texts, TextTasks(CODE, 40)):
        words = [choice.split()[0] for choice in question["choices"]]
        right = counts[words[question["answer"]]]
        for word in words:
            low, high = sorted((right, counts[word]))
            assert sum(low < count < high for count in counts.values()) < 20
        assert len(set(words)) == 4
        assert len({choice.split(" ", 2)[2] for choice in question["choices"]}) == 1


def test_a_seed_fixes_the_questions_and_fewer_are_the_first_of_more(texts: list[str]) -> None:
    for task in TEXT_TASKS:
        many = make_questions(task, texts, TextTasks(CODE, 30))
        assert make_questions(task, texts, TextTasks(CODE, 10)) == many[:10]
        other = make_questions(task, texts, TextTasks(CODE, 30, seed=1))
        assert sum(question in many for question in other) < 10


def likelihood(loaded, front: str, back: str) -> tuple[float, bool]:
    """Of ``back`` behind ``front``, and whether each of its tokens is the likeliest."""
    start = len(loaded.tokenizer.encode(front, add_special_tokens=False))
    tokens = torch.tensor([loaded.tokenizer.encode(front + back, add_special_tokens=False)])
    with torch.no_grad():
        logs = loaded.model(input_ids=tokens).logits[0].double().log_softmax(-1)
    places = range(start, tokens.shape[1])
    right = all(int(logs[place - 1].argmax()) == int(tokens[0, place]) for place in places)
    return float(sum(logs[place - 1, tokens[0, place]] for place in places)), right


def by_hand(loaded, task: str, questions: list[dict]) -> dict[str, list[int]]:
    """Which questions are answered right."""
    if task == "cloze":
        return {"acc": [int(likelihood(loaded, each["question"], each["target"])[1]) for each in questions]}
    found: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for each in questions:
        values = [likelihood(loaded, each["question"], choice)[0] for choice in each["choices"]]
        for name, weights in (("acc", [1] * 4), ("acc_norm", [len(choice) for choice in each["choices"]])):
            scaled = [value / weight for value, weight in zip(values, weights, strict=True)]
            found[name].append(int(scaled.index(max(scaled)) == each["answer"]))
    return found


def mean_and_error(values: list[int]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without a half of its smallest weights."""
    folder: Path = tmp_path_factory.mktemp("worse") / "model"
    loaded = load_model(DEMO_MODEL)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight[weight.abs() < weight.abs().float().quantile(0.6).to(weight)] = 0
    loaded.model.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_scores_and_differences_are_those_of_single_choices(
    texts: list[str], worse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    words = ["--text", CODE, "--items", 16, "--against", worse, "--device", "cpu", "--out", out]
    assert command_line.run("zero-shot", DEMO_MODEL, *words) == 0
    values = json.loads(out.read_text())
    other = values["against"]
    assert [score["task"] for score in values["scores"]] == list(TEXT_TASKS)
    models = [load_model(DEMO_MODEL), load_model(worse)]
    errors = []
    for place, task in enumerate(TEXT_TASKS):
        questions = make_questions(task, texts, TextTasks(CODE, 16))
        good, bad = (by_hand(loaded, task, questions) for loaded in models)
        for name, right in good.items():
            pairs = [one - two for one, two in zip(right, bad[name], strict=True)]
            for found, expected in (
                (values["scores"], right), (other["scores"], bad[name]), (other["differences"], pairs)
            ):  # fmt: skip
                mean, error = mean_and_error(expected)
                assert found[place][name] == pytest.approx(mean)
                assert found[place][f"{name}_error"] == pytest.approx(error)
            if name == "acc":
                errors.append(mean_and_error(pairs)[1])
        assert ("acc_norm" in good) == (values["scores"][place]["acc_norm"] is not None)
    # otherwise pairs would say nothing that scores do not
    assert any(each["acc"] for each in other["differences"])
    assert other["mean_acc"] == pytest.approx(
        sum(one["acc"] - two["acc"] for one, two in zip(values["scores"], other["scores"], strict=True)) / 3
    )
    assert other["mean_acc_error"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 3)
    assert values["text"] == {"text": CODE, "items": 16, "seed": 0}
    assert len(values["text_hash"]) == 64
    said = " ".join(capsys.readouterr().out.split())
    assert f"mean {other['mean_acc']:+.4f} ± {other['mean_acc_error']:.4f}" in said
    last, less = other["scores"][2], other["differences"][2]
    assert f"word {last['acc']:.4f} {less['acc']:+.4f} ± {less['acc_error']:.4f}" in said
    assert f"{last['acc_norm']:.4f} {less['acc_norm']:+.4f} ± {less['acc_norm_error']:.4f}" in said


def test_real_models_answer_better_than_chance(smollm2: Path, shared_data: Path) -> None:
    stories = shared_data / "texts" / "tinystories_eval.txt"
    for model, items, least in ((smollm2, 8, 6), (shared_data / "models" / "stories260K", 32, 15)):
        report = zero_shot(model, text=TextTasks(stories, items), device="cpu", dtype="float32")
        right = {score.task: round(score.acc * items) for score in report.scores}
        # of guesses among four at least so many are right with probability below 1 %
        assert right["word"] >= least, model
        assert right["continuation"] >= least, model
        assert right["cloze"] > 0, model


def test_what_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words here and there. " * 60)
    for task in TEXT_TASKS:
        with pytest.raises(
            InvalidTextError, match=rf"expected enough for 300 questions of {task}, found \d+"
        ):
            zero_shot(DEMO_MODEL, [task], text=TextTasks(short))
    with pytest.raises(InvalidTextError, match="expected a text, a file of records"):
        zero_shot(DEMO_MODEL, text=TextTasks(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="task cloze: expected a text that it is made from, found none"):
        zero_shot(DEMO_MODEL, ["cloze"])
    with pytest.raises(
        InputError, match="expected at least one of cloze, continuation, word, found only rte"
    ):
        zero_shot(DEMO_MODEL, ["rte"], text=TextTasks(CODE))
    with pytest.raises(InputError, match="'clozes': expected a task of the harness"):
        zero_shot(DEMO_MODEL, ["word", "clozes"], text=TextTasks(CODE))
    for name, value in (("items", 0), ("seed", -1)):
        with pytest.raises(InputError, match=f"{name} of zero-shot tasks: expected at least"):
            TextTasks(CODE, **{name: value})
    with pytest.raises(InvalidModelError, match="nowhere"):  # before the first model answers anything
        zero_shot(DEMO_MODEL, text=TextTasks(CODE), against=tmp_path / "nowhere")
    out = tmp_path / "scores.json"
    assert command_line.run("zero-shot", DEMO_MODEL, "--text", short, "--out", out) != 0
    assert "expected enough for 300 questions of cloze" in capsys.readouterr().err
    assert not out.exists()
    assert command_line.run("zero-shot", DEMO_MODEL, "--items", 9) != 0
    assert "--items: expected --text" in capsys.readouterr().err
