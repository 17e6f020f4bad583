"""Which class a checkpoint is loaded with, and what is refused before anything is pruned."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from sparseswaps.errors import InvalidModelError
from sparseswaps.models.loading import load_model
from sparseswaps.models.sources import Trust


def edited(folder: Path, **changes: Any) -> Path:
    """A configuration with other entries; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "bert", "t5"])
@pytest.mark.parametrize(
    "named", [["LLaMAForCausalLM"], ["MyOwnModelForCausalLM"], [], None, ["AutoTokenizer"]]
)
def test_tensors_decide_where_no_class_of_the_name_exists(
    tmp_path: Path, family: str, named: list[str] | None
) -> None:
    folder = edited(tiny_models.save(family, tmp_path), architectures=named)
    expected = type(tiny_models.build(family))
    with pytest.warns(UserWarning, match="by its tensors it is loaded as"):
        loaded = load_model(folder)
    assert type(loaded.model) is expected
    original = expected.from_pretrained(folder)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("family", "inner"), [("llama", "LlamaModel"), ("gpt2", "GPT2Model"), ("t5", "T5EncoderModel")]
)
def test_a_headless_class_does_not_drop_the_head(tmp_path: Path, family: str, inner: str) -> None:
    folder = edited(tiny_models.save(family, tmp_path), architectures=[inner])
    tensors = load_file(folder / "model.safetensors")
    if family == "gpt2":  # tied: the head's weight is the embedding's, nothing would be dropped but its place
        with_tensors(
            folder, lambda found: found.update({"lm_head.weight": found["transformer.wte.weight"] + 1})
        )
        edited(folder, tie_word_embeddings=False)
    with pytest.warns(UserWarning, match=f"names {inner}, its tensors are those of"):
        loaded = load_model(folder)
    assert type(loaded.model) is type(tiny_models.build(family))
    assert set(tensors) <= set(loaded.model.state_dict())


def test_a_base_model_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tf.LlamaModel(tiny_models.build("llama").config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path).model) is tf.LlamaModel
    edited(tmp_path, architectures=None)
    with pytest.warns(UserWarning, match="loaded as LlamaModel"):
        assert type(load_model(tmp_path).model) is tf.LlamaModel


@pytest.mark.parametrize(
    "options", [{}, {"offload": True}, {"weights": False}], ids=["plain", "offload", "shapes"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.0.mlp.down_proj.weight"),
            "none named model.layers.0.mlp.down_proj.weight",
        ),
        (lambda t: t.pop("lm_head.weight"), "none named lm_head.weight"),
        (lambda t: t.pop("model.norm.weight"), "none named model.norm.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(23, 16)}),
            r"model.layers.1.mlp.up_proj.weight \(23, 16\) instead of \(24, 16\)",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(63, 16)}),
            r"model.embed_tokens.weight \(63, 16\) instead of \(64, 16\)",
        ),
    ],
    ids=["layer", "head", "norm", "layer shape", "embedding shape"],
)
def test_missing_and_mismatched_tensors_are_refused_by_name(
    tmp_path: Path, change: Any, message: str, options: dict[str, bool]
) -> None:
    folder = with_tensors(tiny_models.save("llama", tmp_path), change)
    with pytest.raises(InvalidModelError, match=message):
        load_model(folder, **options)


def test_a_configuration_with_more_layers_than_the_file_is_refused(tmp_path: Path) -> None:
    folder = edited(tiny_models.save("llama", tmp_path), num_hidden_layers=3)
    with pytest.raises(InvalidModelError, match=r"none named model\.layers\.2\.\S+, .* and 6 more"):
        load_model(folder)


@pytest.mark.parametrize("offload", [False, True])
def test_unread_tensors_are_named(tmp_path: Path, offload: bool) -> None:
    extra = {
        "model.layers.2.mtp.weight": torch.ones(3),
        "model.layers.2.norm": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),  # computed, and nothing to keep
    }
    folder = with_tensors(tiny_models.save("llama", tmp_path), lambda t: t.update(extra))
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not read 2 tensors") as seen:
        loaded = load_model(folder, offload=offload)
    kept = set(extra) - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert set(loaded.unread) == kept
    assert all(name in str(seen[0].message) for name in kept)


def test_tensors_that_a_class_may_ignore_are_unread_too(tmp_path: Path) -> None:
    """DeepSeek's prediction layer of later tokens is in no report of transformers."""
    config = tf.DeepseekV3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    tf.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with_tensors(tmp_path, lambda t: t.update({"model.layers.61.eh_proj.weight": torch.ones(4, 4)}))
    with pytest.warns(UserWarning, match="does not read 1 tensors"):
        assert load_model(tmp_path).unread == ("model.layers.61.eh_proj.weight",)


def test_buffers_that_old_checkpoints_hold_are_no_unread_tensors(tmp_path: Path) -> None:
    """GPT-2's causal masks, and the position numbers of BERT."""
    gpt2 = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    bert = {"embeddings.position_ids": torch.arange(4)[None]}
    for family, buffers in (("gpt2", gpt2), ("bert", bert)):
        folder = with_tensors(
            tiny_models.save(family, tmp_path / family), lambda t, new=buffers: t.update(new)
        )
        assert load_model(folder).unread == ()


def test_whole_checkpoints_load_without_a_word(tmp_path: Path) -> None:
    for family in tiny_models.FAMILIES:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_model(tiny_models.save(family, tmp_path / family)).unread == ()


def test_pickled_weights_are_refused_until_trusted(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidModelError, match=r"found the pickled file pytorch_model\.bin.*--allow-pickle"):
        load_model(folder)
    loaded = load_model(folder, trust=Trust(pickle=True))
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_remote_code_is_refused_until_trusted_and_nobody_is_asked(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    (folder / "own.py").write_text(
        "import transformers\n"
        "class OwnConfig(transformers.LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(transformers.LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    edited(
        folder,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    with pytest.raises(
        InvalidModelError, match="needs Python files of the checkpoint; add --trust-remote-code"
    ):
        load_model(folder)
    loaded = load_model(folder, trust=Trust(remote_code=True))
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    assert loaded.unread == ()


def test_remote_code_of_a_known_type_loads_as_transformers_own_class(tmp_path: Path) -> None:
    folder = edited(
        tiny_models.save("llama", tmp_path),
        architectures=["FancyLlamaForCausalLM"],
        auto_map={"AutoModelForCausalLM": "missing.FancyLlamaForCausalLM"},
    )
    with pytest.warns(UserWarning, match="by its tensors it is loaded as LlamaForCausalLM"):
        assert type(load_model(folder).model) is tf.LlamaForCausalLM


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_refused(tmp_path: Path, file: str) -> None:
    folder = tiny_models.save("llama", tmp_path / "beside")
    (folder / file).write_text("{}")
    with pytest.raises(InvalidModelError, match=f"without an adapter, found {file} beside the model"):
        load_model(folder)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / file).write_text("{}")
    with pytest.raises(InvalidModelError, match=f"found {file} and no model"):
        load_model(alone)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = edited(
        tiny_models.save("llama", tmp_path), quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(InvalidModelError, match="quantised by gptq"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, r"found '\.\./model\.safetensors'"),
        ({"weight_map": {"lm_head.weight": "absent.safetensors"}}, "the shard absent.safetensors"),
        ({"weight_map": {"lm_head.weight": 3}}, "expected model.safetensors.index.json with a weight_map"),
        ({}, "expected model.safetensors.index.json with a weight_map"),
        ([], "expected model.safetensors.index.json with a weight_map"),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_an_index_names_files_of_its_directory(
    tmp_path: Path, index: Any, message: str, offload: bool
) -> None:
    folder = tiny_models.save("llama", tmp_path / "model")
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    (folder / "other.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidModelError, match=message):
        load_model(folder, offload=offload)


def test_a_tokenizer_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="its tokenizer cannot be read"):
        assert load_model(folder).tokenizer is None
