"""Windows from texts, token files and datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers

import sparseswaps as ss
from sparseswaps.calibration.windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("llama"))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_evaluation_takes_every_window_and_drops_the_tail(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "t.txt").write_text(tiny_models.text(107))
    windows = evaluation_windows(tmp_path / "t.txt", tokenizer, 10)
    assert windows.tokens.shape == (10, 10)
    assert torch.equal(windows.tokens.flatten(), tiny_models.tokens(107)[:100])
    assert evaluation_windows(tmp_path / "t.txt", tokenizer, 10, limit=3).tokens.shape == (3, 10)


def test_calibration_is_a_seeded_choice_of_the_same_windows(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "t.txt").write_text(tiny_models.text(1000))
    every = {tuple(w) for w in evaluation_windows(tmp_path / "t.txt", tokenizer, 10).tokens.tolist()}
    first, again, other = (
        calibration_windows(tmp_path / "t.txt", tokenizer, 20, 10, seed=s) for s in (0, 0, 1)
    )
    assert first.hash == again.hash != other.hash
    assert len({tuple(w) for w in first.tokens.tolist()}) == 20
    assert {tuple(w) for w in first.tokens.tolist()} <= every


def test_fewer_windows_than_asked_for_are_a_warning(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "t.txt").write_text(tiny_models.text(55))
    with pytest.warns(UserWarning, match="expected 20 windows of 10 tokens, found 5"):
        assert len(calibration_windows(tmp_path / "t.txt", tokenizer, 20, 10)) == 5


def test_token_files(tmp_path: Path) -> None:
    np.save(tmp_path / "stream.npy", np.arange(4, 60))
    np.save(tmp_path / "windows.npy", np.arange(4, 64).reshape(5, 12))
    assert evaluation_windows(tmp_path / "stream.npy", None, 10).tokens.shape == (5, 10)
    assert evaluation_windows(tmp_path / "windows.npy", None, 10).tokens.tolist()[1] == list(range(16, 26))
    np.save(tmp_path / "floats.npy", np.ones(100))
    np.save(tmp_path / "short.npy", np.ones((3, 4), dtype=int))
    (tmp_path / "broken.npy").write_bytes(b"broken")
    for name, message in [
        ("floats", "of integers, found 1 of float64"),
        ("short", "at least 10 tokens"),
        ("broken", "expected a NumPy array"),
    ]:
        with pytest.raises(ss.InvalidTextError, match=message):
            evaluation_windows(tmp_path / f"{name}.npy", None, 10)


def test_texts_that_are_refused(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "short.txt").write_text("w4 w5 w6")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name, length, message in [
        ("short.txt", 10, "expected at least one window of 10 tokens, found 3 tokens"),
        ("binary.txt", 10, "expected readable UTF-8"),
        ("absent.txt", 10, "found no such file"),
    ]:
        with pytest.raises(ss.InvalidTextError, match=message):
            calibration_windows(tmp_path / name, tokenizer, 4, length)
    with pytest.raises(ss.InvalidTextError, match="expected a tokenizer"):
        calibration_windows(tmp_path / "short.txt", None, 4, 2)
    with pytest.raises(ss.InvalidTextError, match="samples ≥ 1"):
        calibration_windows(tmp_path / "short.txt", tokenizer, 0, 2)


def test_encoder_windows_have_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    plain = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="[UNK]")
    )
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    (tmp_path / "t.txt").write_text("a b " * 9)
    windows = evaluation_windows(tmp_path / "t.txt", tokenizer, 6, special_tokens=True)
    assert windows.tokens.tolist() == [[1, 3, 4, 3, 4, 2]] * 4


def test_datasets_follow_the_fields_protocol(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Random windows of documents longer than a window; evaluation joins all rows."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    documents = ["w4 w5", tiny_models.text(40, seed=1), "", tiny_models.text(60, seed=2)]
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "set")
    windows = calibration_windows(tmp_path / "set", tokenizer, 7, 30, seed=3)
    assert windows.tokens.shape == (7, 30)
    texts = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in documents]
    for window in windows.tokens.tolist():
        assert any(window == t[i : i + 30] for t in texts for i in range(len(t) - 29))
    assert evaluation_windows(tmp_path / "set", tokenizer, 50).available == 2
    with pytest.raises(ss.InvalidTextError, match="dataset"):
        calibration_windows("no-such-dataset-anywhere", tokenizer, 1, 10)


def test_the_standard_library_has_two_disjoint_parts() -> None:
    from sparseswaps.calibration.corpus import standard_library_files

    train, held_out = standard_library_files("train"), standard_library_files("held-out")
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert not any("test" in path.parts for path in train + held_out)
