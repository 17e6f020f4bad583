"""Biases that a configuration can have and did not: the same outputs, saved and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from sparseswaps.errors import InvalidModelError
from sparseswaps.models.biases import with_biases
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.models.units import bias_of


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tiny_models.tokens(64).view(2, 32)).logits
    return logits


@pytest.mark.parametrize(
    ("family", "kinds", "flags"),
    [
        ("llama", ("down_proj",), {"mlp_bias"}),
        ("llama-tied", ("o_proj",), {"attention_bias"}),
        ("llama", ("down_proj", "o_proj"), {"mlp_bias", "attention_bias"}),
        ("qwen3", ("o_proj",), {"attention_bias"}),
        ("opt", ("fc2",), set()),  # has them
    ],
)
def test_biases(family: str, kinds: tuple[str, ...], flags: set[str], tmp_path: Path) -> None:
    loaded = load_model(tiny_models.save(family, tmp_path / "dense"), torch.device("cpu"), "float32")
    layers = [x for block in find_blocks(loaded.model) for x in block.layers if x.kind in kinds]
    before = output(loaded.model)
    larger = with_biases(loaded, layers)
    assert (larger is loaded) == (not flags)
    model: Any = larger.model
    assert torch.equal(output(model), before)  # zeros are added
    config, dense = model.config.to_dict(), loaded.model.config.to_dict()
    assert {key for key in config if config[key] != dense.get(key)} == flags
    named = {layer.name for layer in layers}
    consumers = [x for block in find_blocks(model) for x in block.layers if x.name in named]
    assert len(consumers) == len(layers)
    for layer in consumers:
        bias = bias_of(layer)
        assert bias is not None
        bias += torch.linspace(-0.3, 0.4, len(bias))  # norms that centre forget a constant
    changed = output(model)
    assert float((changed - before).abs().max()) > 0.01
    assert torch.equal(output(loaded.model), before) == bool(flags)
    model.save_pretrained(tmp_path / "larger")
    reloaded = load_model(tmp_path / "larger", torch.device("cpu"), "float32").model
    torch.testing.assert_close(output(reloaded), changed, rtol=0, atol=1e-5)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (family in ("llama-tied", "opt"))


def test_families_without_such_a_flag(tmp_path: Path) -> None:
    for family, kind, found in (
        ("qwen3", "down_proj", "none with attention_bias"),
        ("mixtral", "o_proj", "no flag of it that speaks of a bias"),
    ):
        folder = tiny_models.save(family, tmp_path / family)
        loaded = load_model(folder, torch.device("cpu"), "float32")
        layers = [x for block in find_blocks(loaded.model) for x in block.layers if x.kind == kind]
        if not layers:
            pytest.fail(f"{family} has no {kind}")
        with pytest.raises(InvalidModelError, match=rf"holds model\.layers\..*{kind}\.bias, found {found}"):
            with_biases(loaded, layers)
    loaded = load_model(tiny_models.save("llama", tmp_path / "llama"), offload=True)
    layers = [x for block in find_blocks(loaded.model) for x in block.layers if x.kind == "o_proj"]
    with pytest.raises(InvalidModelError, match="expected its weights in memory, found offloaded ones"):
        with_biases(loaded, layers)
