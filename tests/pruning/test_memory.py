"""What a run needs, refused in time; activations in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.calibration.store import TensorStore
from sparseswaps.machine import available_memory
from sparseswaps.masks.file import load_masks
from sparseswaps.models.blocks import find_blocks
from sparseswaps.pruning import memory
from sparseswaps.pruning.memory import Estimate, estimate, require_memory
from sparseswaps.pruning.run import prune


def deeper(blocks: int) -> torch.nn.Module:
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4
    )
    return tf.LlamaForCausalLM(config).eval()


def needs(blocks: int, windows: int = 16, **options: object) -> Estimate:
    model = deeper(blocks)
    plain = {"held_out": 0, "drift": False, "residual": False, "metric": False, "one_shot": False}
    tokens = torch.zeros((windows, 64), dtype=torch.int64)
    return estimate(model, find_blocks(model), tokens, **{**plain, **options})


def test_estimates_grow_with_what_they_depend_on() -> None:
    few, many = needs(2), needs(6)
    layers = 4 * 32 * 32 + 3 * 32 * 64
    # beside the model only the dense copy of the weights grows with the number of blocks
    assert many.host_bytes - few.host_bytes == 4 * layers * 4
    assert many.model_bytes > few.model_bytes
    activations = 16 * 64 * 32 * 4
    assert needs(2, windows=32).host_bytes - few.host_bytes >= activations
    assert needs(2, windows=32, activation_limit=0).host_bytes < needs(2, windows=32).host_bytes
    assert needs(2, metric=True).host_bytes > few.host_bytes
    assert needs(2, metric=True, activation_limit=0).host_bytes < needs(2, metric=True).host_bytes
    assert needs(2, drift=True).host_bytes > few.host_bytes
    # of the down projection's inputs, 64 wide, X̂ sᵀ, (X - X̂) sᵀ and s sᵀ in float64: twice, as every sum
    both = needs(2, drift=True, residual=True)
    assert both.host_bytes - needs(2, drift=True).host_bytes == 2 * 8 * (2 * 64 + 32) * 32
    assert needs(2, one_shot=True).host_bytes > few.host_bytes
    assert few.device_bytes == 0
    assert few.seconds > 0
    assert "GB of main memory" in str(few)


def test_what_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = available_memory()
    assert there is not None
    assert there > 0
    too_much = Estimate(0, there * 1000, 0, 1.0)
    with pytest.raises(
        ss.InputError, match=r"main memory: expected .* GB for activations.*, found .* GB free"
    ):
        require_memory(too_much, torch.device("cpu"))
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(2000).numpy())
    dense = tiny_models.save("llama", tmp_path / "dense")
    said: list[Estimate] = []
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ss.InputError, match="main memory"):
        prune(
            dense,
            calibration=tmp_path / "tokens.npy",
            samples=8,
            length=32,
            out=tmp_path / "out",
            announce=said.append,
        )
    assert len(said) == 1
    assert not (tmp_path / "out").exists()


def test_a_store_gives_back_what_it_got() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = {
        (batch, stack): (torch.randn(2, 3, 4, generator=generator), None, [torch.arange(batch + 1)])
        for batch in range(4)
        for stack in range(2)
    }
    cpu = torch.device("cpu")
    for limit in (None, 0, 250):
        store = TensorStore(limit)
        for _ in range(2):  # a later block's outputs replace an earlier one's
            for key, output in outputs.items():
                store.keep(key, output)
        for key, (tensor, nothing, (numbers,)) in outputs.items():
            found = store.recall(key, cpu)
            assert torch.equal(found[0], tensor)
            assert found[1] is nothing
            assert torch.equal(found[2][0], numbers)
            found[0].zero_()
            assert torch.equal(store.recall(key, cpu)[0], tensor)


def test_masks_with_activations_in_files_are_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(2000).numpy())
    dense = tiny_models.save("llama", tmp_path / "dense")
    for name, limit in (("memory", None), ("files", 0.0)):
        prune(
            dense,
            calibration=tmp_path / "tokens.npy",
            samples=8,
            length=32,
            objective="drift=0.5",
            activation_limit=limit,
            out=tmp_path / name,
        )
    one, other = load_masks(tmp_path / "memory"), load_masks(tmp_path / "files")
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
    with pytest.raises(ss.InputError, match="activation_limit: GB: expected at least 0"):
        prune(dense, calibration=tmp_path / "tokens.npy", samples=8, length=32, activation_limit=-1)
