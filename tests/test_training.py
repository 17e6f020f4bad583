"""Sparsity survives fine-tuning: the Trainer callback, and masks after merging adapters."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import sparseswaps as ss
from sparseswaps.errors import InvalidFileError, InvalidModelError
from sparseswaps.masks.file import load_masks, save_masks, verify_model
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.training import KeepPruned, reimpose


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with its mask file; gpt2 stores weights transposed, mixtral fuses its experts."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    tiny_models.save(request.param, folder / "dense", torch.float32)
    np.save(folder / "tokens.npy", tiny_models.tokens(2_000).numpy())
    ss.prune(
        folder / "dense", "0.5", calibration=str(folder / "tokens.npy"), samples=4, length=32,
        solver=ss.Wanda(), out=folder / "pruned",
    )  # fmt: skip
    return folder / "pruned"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        layer.name: layer.weight.clone()
        for block in find_blocks(model, routers=True)
        for layer in block.layers
    }


def train(model: Any, folder: Path, callbacks: list[Any], optimizer: str = "adamw_torch") -> None:
    """A few steps with everything that moves weights: momentum, weight decay, accumulation."""
    import transformers

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (8, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, weight_decay=0.1, optim=optimizer, report_to=[], save_strategy="no", use_cpu=True,
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()


def test_pruned_weights_stay_zero_and_kept_ones_learn(pruned: Path, tmp_path: Path) -> None:
    masks = load_masks(pruned).masks
    model = load_model(pruned).model
    before = weights(model)
    train(model, tmp_path, [KeepPruned(pruned)])
    after = weights(model)
    for name, mask in masks.items():
        assert bool((after[name][~mask] == 0).all()), name
    assert any(not torch.equal(after[name][mask], before[name][mask]) for name, mask in masks.items())
    # without it they come back: the test can tell the difference
    lost = load_model(pruned).model
    train(lost, tmp_path, [])
    changed = weights(lost)
    assert any(bool((changed[name][~mask] != 0).any()) for name, mask in masks.items())


def test_every_step_starts_from_the_mask(pruned: Path, tmp_path: Path) -> None:
    """Training with the callback is projected gradient descent, done here by hand with plain SGD."""
    masks = load_masks(pruned).masks
    ours, theirs = load_model(pruned).model, load_model(pruned).model
    train(ours, tmp_path / "a", [KeepPruned(masks)], "sgd")

    import transformers

    class ByHand(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            for block in find_blocks(theirs, routers=True):
                for layer in block.layers:
                    layer.write(layer.weight * masks[layer.name])

    train(theirs, tmp_path / "b", [ByHand()], "sgd")
    expected = weights(theirs)
    for name, weight in weights(ours).items():
        assert torch.equal(weight, expected[name]), name


def test_wrapped_models_and_dense_starts() -> None:
    model = tiny_models.build("llama")
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights(model).items()}

    class Wrapper(nn.Module):
        """Names as peft, torch.compile and data parallel make them."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = nn.Module()
            self.module.base_model = nn.Module()
            self.module.base_model.model = inner

    callback = KeepPruned(masks)
    callback.on_train_begin(None, None, None, model=Wrapper(model))
    for name, weight in weights(model).items():
        assert bool((weight[~masks[name]] == 0).all())
    callback.on_train_end(None, None, None)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    name, weight = next(iter(weights(model).items()))
    with pytest.raises(InvalidModelError, match="expected a layer nowhere in the model"):
        KeepPruned({"nowhere": weight > 0}).on_train_begin(None, None, None, model=model)
    with pytest.raises(InvalidModelError, match="expected a whole weight"):
        KeepPruned({name: weight[:2] > 0}).on_train_begin(None, None, None, model=model)
    with pytest.raises(InvalidModelError, match="found none"):
        KeepPruned({name: weight > 0}).on_train_begin(None, None, None)
    with pytest.raises(InvalidFileError, match="expected an existing file"):
        KeepPruned(tmp_path / "nowhere")


def low_rank(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """An update ``(α/r) B A`` of rank 2 as adapters learn it (rows, cols), dense."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn((weight.shape[0], 2), generator=generator)
    a = torch.randn((2, weight.shape[1]), generator=generator)
    return 0.05 * (b @ a)


def test_masks_are_put_on_again_after_merging_by_hand(pruned: Path, tmp_path: Path) -> None:
    file = load_masks(pruned)
    model = load_model(pruned).model
    expected = {}
    for block in find_blocks(model, routers=True):
        for number, layer in enumerate(block.layers):
            merged = layer.weight + low_rank(layer.weight, number)
            assert bool((merged[~file.masks[layer.name]] != 0).any())
            expected[layer.name] = merged * file.masks[layer.name]
            layer.write(merged)
    # a model whose weights are not those of the masks is only pruned when asked for
    with pytest.raises(InvalidFileError, match="expected the weights that the masks were made for"):
        ss.masks.apply_masks(model, file)
    model.save_pretrained(tmp_path / "merged")
    facts = reimpose(model, pruned)
    for name, weight in weights(model).items():
        assert torch.equal(weight, expected[name]), name
    # the new facts make a mask file that the merged model passes
    save_masks(tmp_path / "masks.safetensors", file.masks, facts, "merged")
    assert verify_model(model, load_masks(tmp_path / "masks.safetensors")).ok
    assert not verify_model(model, file).ok


def test_the_command_prunes_a_merged_model_again(pruned: Path, tmp_path: Path) -> None:
    model = load_model(pruned, dtype="checkpoint")
    for block in find_blocks(model.model, routers=True):
        for number, layer in enumerate(block.layers):
            layer.write(layer.weight + low_rank(layer.weight, number))
    model.model.save_pretrained(tmp_path / "merged")
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert command_line.run("apply", merged, "--masks", pruned, "--out", out, "--other-weights") == 0
    assert command_line.run("verify", out) == 0


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
# what peft calls in transformers and torch is to be renamed
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_real_adapters(tmp_path: Path) -> None:
    import peft

    tiny_models.save("llama", tmp_path / "dense", torch.float32)
    (tmp_path / "text.txt").write_text(tiny_models.text(2_000))
    ss.prune(
        tmp_path / "dense", "2:4", calibration=str(tmp_path / "text.txt"), samples=4, length=32,
        solver=ss.Wanda(), out=tmp_path / "pruned",
    )  # fmt: skip
    file = load_masks(tmp_path / "pruned")
    base = load_model(tmp_path / "pruned").model
    frozen = weights(base)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    train(adapted, tmp_path / "run", [KeepPruned(tmp_path / "pruned")])
    merged = adapted.merge_and_unload()
    grown = [name for name, w in weights(merged).items() if bool((w[~file.masks[name]] != 0).any())]
    assert grown
    assert all(name.endswith(("q_proj", "down_proj")) for name in grown)
    dense = weights(merged)
    facts = reimpose(merged, tmp_path / "pruned")
    for name, weight in weights(merged).items():
        assert torch.equal(weight, dense[name] * file.masks[name])
        assert ss.SparsityPattern.n_m(2, 4).allows(file.masks[name])
        if name not in grown:
            assert torch.equal(weight, frozen[name])
    assert set(facts) == set(file.masks)
