"""What a saved directory holds: everything that the dense one held, and what the report says of it."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparseswaps as ss
from sparseswaps.errors import VerificationError
from sparseswaps.masks import saving
from sparseswaps.models import companions
from sparseswaps.models.loading import load_model
from sparseswaps.models.sources import Source, Trust
from sparseswaps.pruning.settings import PruneSettings

EXTRA = {
    "model.layers.2.eh_proj.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "model.layers.2.norm.weight": torch.full((3,), torch.nan),
}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(400).numpy())
    np.save(tmp_path / "more.npy", tiny_models.tokens(300, seed=5).numpy())
    return {"calibration": tmp_path / "tokens.npy", "samples": 4, "length": 16, "solver": "wanda"}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_that_no_class_reads_are_saved_unchanged(
    sharded: bool, offload: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    tiny_models.build("llama").save_pretrained(dense, max_shard_size="6KB" if sharded else "1GB")
    index = dense / "model.safetensors.index.json"
    assert index.exists() == sharded
    if sharded:
        save_file(EXTRA, dense / "model-extra.safetensors", {"format": "pt"})
        found = json.loads(index.read_text())
        found["weight_map"] |= dict.fromkeys(EXTRA, "model-extra.safetensors")
        index.write_text(json.dumps(found))
    else:
        tensors = load_file(dense / "model.safetensors") | EXTRA
        save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="does not read 2 tensors .* not pruned, kept when saved"):
        ss.prune(dense, **options, offload=offload, out=tmp_path / "out")
    before, after = all_tensors(dense), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(equal(after[name], tensor) for name, tensor in EXTRA.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_model(tmp_path / "out")
    assert set(again.unread) == set(EXTRA)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(tensor).all() for tensor in plain.state_dict().values())


def test_unread_tensors_of_pickled_files_come_along(options: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    torch.save(load_file(dense / "model.safetensors") | EXTRA, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="not pruned, kept when saved"):
        ss.prune(dense, **options, allow_pickle=True, out=tmp_path / "out")
    assert all(equal(all_tensors(tmp_path / "out")[name], tensor) for name, tensor in EXTRA.items())


def test_a_saved_model_without_them_is_no_saved_model(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    save_file(load_file(dense / "model.safetensors") | EXTRA, dense / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(saving, "carry_unread", lambda *_: None)
    with (
        pytest.warns(UserWarning, match="does not read"),
        pytest.raises(VerificationError, match=r"expected the tensor model\.layers\.2\.\S+ .*found none"),
    ):
        ss.prune(dense, **options, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_everything_beside_the_weights_comes_along(options: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    texts = {
        "chat_template.jinja": "{{ messages }}",
        "preprocessor_config.json": "{}",
        "generation_config.json": '{"temperature": 0.123, "do_sample": true}',
        "LICENSE": "mine",
        "1_Pooling/config.json": '{"pooling_mode": "cls"}',
        "modules.json": json.dumps([{"idx": 0, "path": ""}, {"path": "1_Pooling"}, {"path": "../secret"}]),
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    for name, text in texts.items():
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(text)
    save_file({"linear.weight": torch.ones(2, 2)}, dense / "1_Pooling" / "model.safetensors")
    for name in ("onnx/model.onnx", "pytorch_model.bin", ".git/config"):
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text("dense")
    with pytest.warns(UserWarning, match=r"left behind, .*: onnx/, pytorch_model\.bin$"):
        ss.prune(dense, **options, out=tmp_path / "out")
    for name in (*texts, "1_Pooling/model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes(), name
    assert not (tmp_path / "out" / "onnx").exists()
    assert not (tmp_path / "out" / ".git").exists()
    # once more, from the pruned directory
    ss.prune(tmp_path / "out", **options, out=tmp_path / "twice")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in (tmp_path / "twice").iterdir()} == kept


def test_a_name_on_the_hub_brings_what_is_beside_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "preprocessor_config.json").write_text("{}")
    asked: list[str] = []

    def download(name: str, ignore_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in ignore_patterns
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "out").mkdir()
    found = companions.copy_companions(Source("some/model", "some/model"), tmp_path / "out")
    assert asked == ["some/model"]
    assert found.copied == ("preprocessor_config.json",)


def test_the_card_is_one_that_the_hub_reads(options: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Dense\n")
    report = ss.prune(dense, **options, evaluation=tmp_path / "more.npy", out=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.data.library_name == "transformers"
    assert "sparseswaps" in card.data.tags
    text = card.text
    assert report.perplexity_dense is not None
    assert report.perplexity_pruned is not None
    for expected in (
        f"{report.perplexity_dense:.4f} | {report.perplexity_pruned:.4f}",
        f"{report.sparsity:.2%}",
        report.calibration_hash,
        str(report.evaluation_hash),
        "sparseswaps prune dense --settings settings.toml",
        "sparseswaps verify",
    ):
        assert expected in text
    assert str(tmp_path) not in text


def test_the_settings_beside_a_model_repeat_it(options: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    ss.prune(dense, **options, out=tmp_path / "out")
    settings = PruneSettings.parse((tmp_path / "out" / "settings.toml").read_text())
    ss.prune(dense, settings, out=tmp_path / "again")
    for name in ("masks.safetensors", "model.safetensors", "settings.toml", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def plain_perplexity(folder: Path, windows: Tensor) -> float:
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), windows[:, 1:])
    return math.exp(float(loss))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{"update": "reconstruction"}, {"solver": "sparsegpt"}, {"refine": 1}])
def test_the_report_tells_of_the_rounded_weights(
    changes: dict[str, Any], dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    """Perplexity and layer errors are those of the weights that are saved."""
    dense = tiny_models.save("llama", tmp_path / "dense", dtype)
    seen: dict[str, Any] = {}

    def keep(problem: ss.LayerProblem, _solution: ss.Solution) -> None:
        seen[problem.name] = problem

    if "refine" in changes:
        changes = changes | {"solver": "one-swap", "update": "reconstruction"}
    chosen = options | {"objective": "", "mode": "one-shot"} | changes
    report = ss.prune(dense, **chosen, evaluation=tmp_path / "more.npy", on_layer=keep, out=tmp_path / "out")
    windows = torch.from_numpy(np.load(tmp_path / "more.npy")).long()
    windows = windows[: len(windows) // 16 * 16].view(-1, 16)
    assert report.perplexity_pruned == pytest.approx(plain_perplexity(tmp_path / "out", windows), rel=1e-6)
    if "refine" in changes:
        return
    saved = all_tensors(tmp_path / "out")
    for layer in report.layers:
        problem = seen[layer.name]
        weight = saved[f"{layer.name}.weight"].double()
        lost = problem.weight.double() - weight
        error = float(torch.einsum("rc,cd,rd->", lost, problem.gram.matrix.double(), lost))
        # the sums of a float32 layer in float64: the objective itself is small against the output's norm
        assert layer.error * layer.output_norm == pytest.approx(error, rel=1e-6, abs=1e-9 * layer.output_norm)


def test_a_model_with_code_of_its_own_is_verified_with_it(tmp_path: Path, options: dict[str, Any]) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    (dense / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass MineForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
    }
    (dense / "config.json").write_text(json.dumps(config))
    ss.prune(dense, **options, trust_remote_code=True, out=tmp_path / "out")
    assert (tmp_path / "out" / "modeling_mine.py").exists()
    again = load_model(tmp_path / "out", trust=Trust(remote_code=True))
    assert type(again.model).__name__ == "MineForCausalLM"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert (file.get_tensor("model.layers.0.mlp.up_proj.weight") == 0).double().mean() == 0.5
    shutil.rmtree(tmp_path / "out")
