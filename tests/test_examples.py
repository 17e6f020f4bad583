"""Programs in ``examples/`` do what they say."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
import transformers

from sparseswaps.errors import InputError
from sparseswaps.models.loading import load_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_llama(folder: Path, smollm2: Path) -> Path:
    """SmolLM2's tokenizer with two random blocks of widths that nobody else has."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        rope_theta=20000.0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for file in smollm2.glob("*token*"):
        shutil.copy(file, folder / file.name)
    return folder


def test_a_smaller_llama_as_gguf_is_the_same_model(smollm2: Path, tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "small", smollm2)
    file = tmp_path / "small.gguf"
    example("convert_to_gguf").convert(folder, file, "float32")
    ours = load_model(folder)
    with pytest.warns(UserWarning, match="its configuration names no class"):
        theirs = load_model(file)
    assert theirs.model.config.intermediate_size == 72
    assert theirs.model.config.num_key_value_heads == 2
    tokens = torch.randint(49152, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = (each.model(input_ids=tokens).logits for each in (ours, theirs))
    # the file has the same float32 numbers; products may be summed in another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    text = "In 1965 the café's <|im_start|>user said:\n\n\tnaïve  words, 12345."
    assert ours.tokenizer is not None
    assert theirs.tokenizer is not None
    assert theirs.tokenizer(text)["input_ids"] == ours.tokenizer(text)["input_ids"]
    assert theirs.tokenizer.decode(theirs.tokenizer(text)["input_ids"]) == text
    assert theirs.tokenizer.eos_token_id == ours.tokenizer.eos_token_id


def test_what_has_no_place_in_gguf_is_refused(tmp_path: Path, smollm2: Path) -> None:
    convert = example("convert_to_gguf").convert
    gpt2 = tiny_models.save("gpt2", tmp_path / "gpt2", torch.float32)
    with pytest.raises(InputError, match="expected one of the family llama, found gpt2"):
        convert(gpt2, tmp_path / "a.gguf")
    bare = tiny_models.save("llama", tmp_path / "llama", torch.float32)
    (bare / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"expected tokenizer\.json, found none"):
        convert(bare, tmp_path / "b.gguf")
    assert not (tmp_path / "a.gguf").exists()
    assert not (tmp_path / "b.gguf").exists()
