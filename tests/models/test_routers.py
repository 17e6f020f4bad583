"""Routers stay dense, whatever they are called: an independent look at what chooses experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import sparseswaps as ss
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.models.blocks import find_blocks, passed_over
from sparseswaps.pruning.pipeline import prune_layers
from sparseswaps.records.run_database import RunDatabase

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEW: dict[str, Any] = {"num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip

MIXTURES: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **FEW, num_local_experts=4)),
    "qwen2-moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**SIZES, **FEW, num_experts=4, shared_expert_intermediate_size=48)
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **FEW, num_experts=4)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**SIZES, **FEW, num_experts=4)),
    "phimoe": lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(**SIZES, **FEW, num_local_experts=4)),
    "hunyuan": lambda: tf.HunYuanMoEV1ForCausalLM(
        tf.HunYuanMoEV1Config(**SIZES, num_experts=4, moe_topk=2, num_shared_expert=1)
    ),
    "deepseek-v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**SIZES, **DEEPSEEK}, **FEW)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, **FEW, num_local_experts=4)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **SIZES, num_experts_per_tok=1, num_local_experts=4, intermediate_size_mlp=48, attn_scale=0.1
        )
    ),
    "granitemoe": lambda: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**SIZES, **FEW, num_local_experts=4)
    ),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(**{**SIZES, "num_attention_heads": None}, kv_channels=8, num_local_experts=4, **FEW)
    ),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **SIZES, **FEW, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1,
            expert_layer_offset=0, mamba_d_state=4, mamba_dt_rank=4,
        )
    ),
    "ernie": lambda: tf.Ernie4_5_MoeForCausalLM(
        tf.Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_layer_start_index=0)
    ),
}  # fmt: skip


PRODUCTS = ("linear", "matmul", "bmm", "mm", "scaled_dot_product_attention", "index_add_", "__matmul__")


class _Choices(TorchFunctionMode):
    """Which linear layers' outputs come to a choice of the largest without another product in between."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        self.names = {id(module.weight): name for name, module in linear}
        self.sources: dict[int, set[str]] = {}
        self.held: list[Tensor] = []
        self.choosing: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        origin = set().union(*(self.sources.get(id(leaf), set()) for leaf in given))
        if name in ("topk", "argmax", "max", "sort"):
            self.choosing |= origin
        result = func(*args, **(kwargs or {}))
        if name in PRODUCTS:
            origin = {self.names[id(leaf)] for leaf in given if id(leaf) in self.names}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.held.append(leaf)  # so that its id stays its own
                self.sources[id(leaf)] = origin
        return result


@pytest.mark.parametrize("family", MIXTURES)
def test_what_chooses_experts_is_not_pruned(family: str) -> None:
    torch.manual_seed(0)
    model = MIXTURES[family]().eval()
    windows = tiny_models.tokens(4 * 32).view(4, 32)
    with torch.no_grad(), _Choices(model) as seen:
        model(input_ids=windows, use_cache=False)
    layers = {layer.name for block in find_blocks(model) for layer in block.layers}
    assert not seen.choosing & layers
    gates = {name for name in layers if name.endswith("shared_expert_gate")}
    assert not gates
    if family in ("phimoe", "hunyuan", "llama4", "jetmoe"):  # the others' are no linear modules
        assert seen.choosing
    every = {layer.name for block in find_blocks(model, routers=True) for layer in block.layers}
    assert seen.choosing <= every
    assert any("expert" in name or "moe" in name or "mlp" in name for name in layers)


def test_a_narrow_mlp_beside_experts_is_no_router() -> None:
    """A shared expert as wide as there are experts is pruned; a router of any name is not."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chooser = nn.Linear(8, 4)
            self.shared = nn.ModuleDict({"up": nn.Linear(8, 4), "down": nn.Linear(4, 8)})
            self.lot = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    model = nn.Module()
    model.layers = nn.ModuleList([Mixture()])
    names = {layer.name for block in find_blocks(model) for layer in block.layers}
    inner = ("shared.up", "shared.down", "lot.0", "lot.1", "lot.2", "lot.3")
    assert names == {f"layers.0.{name}" for name in inner}


def test_exclude_adds_to_the_routers() -> None:
    model = MIXTURES["phimoe"]()
    for exclude in ((), ("*self_attn*",)):
        names = {layer.name for block in find_blocks(model, exclude=exclude) for layer in block.layers}
        assert not any("router" in name for name in names)
        assert any("self_attn" in name for name in names) == (not exclude)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4", "granitemoe", "jetmoe"])
def test_zeros_of_experts_lie_along_the_axis_that_is_summed_over(family: str, pattern: str) -> None:
    torch.manual_seed(0)
    model = MIXTURES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    windows = tiny_models.tokens(8 * 32).view(8, 32)
    settings = ss.PruneSettings(
        pattern, solver="wanda", unreached="magnitude", min_expert_tokens=0, objective="plain"
    )
    prune_layers(model, find_blocks(model), settings, windows)
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim != 3 or "layers" not in name:
            continue
        axis = CONTRACTED[family][name.rpartition("layers.")[2].partition(".")[2]]
        zeros = (parameter == 0).movedim(axis, -1)
        cols = zeros.shape[-1]
        if pattern == "2:4":
            assert bool((zeros.unflatten(-1, (cols // 4, 4)).sum(-1) == 2).all()), name
        assert bool((zeros.sum(-1) == cols // 2).all()), name
        checked += 1
    assert checked == 2 * len(CONTRACTED[family])


# Read off the families' own forward passes: the axis of (experts, ., .) over which each product sums.
CONTRACTED = {
    "mixtral": {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2},  # linear
    "gpt-oss": {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1},  # matmul
    "llama4": {"feed_forward.experts.gate_up_proj": 1, "feed_forward.experts.down_proj": 1},  # bmm
    "granitemoe": {"block_sparse_moe.experts.gate_up_proj": 2, "block_sparse_moe.experts.down_proj": 2},
    "jetmoe": {
        "mlp.input_linear.weight": 2,
        "mlp.output_linear.weight": 2,
        "self_attention.experts.input_linear.weight": 2,
        "self_attention.experts.output_linear.weight": 2,
    },
}


def test_what_stays_dense_is_known_with_the_reason(tmp_path: Any) -> None:
    model = MIXTURES["phimoe"]()
    model.model.layers[0].odd = nn.Parameter(torch.zeros(3, 4))
    model.save_pretrained(tmp_path / "dense")
    blocks = find_blocks(model, exclude=("*k_proj",))
    found = passed_over(blocks, exclude=("*k_proj",))
    pruned = {layer.name for block in blocks for layer in block.layers}
    assert found.keys().isdisjoint(pruned)
    assert found["model.layers.0.odd"] == "not a linear layer"
    routers = {name for name, reason in found.items() if reason == "router"}
    assert {name.rsplit(".", 1)[1] for name in routers} == {"router"}
    assert {name for name, reason in found.items() if reason == "excluded"} == {
        f"model.layers.{block}.self_attn.k_proj" for block in range(2)
    }
    narrow = passed_over(find_blocks(model, include=("*q_proj",)), include=("*q_proj",))
    assert narrow["model.layers.0.self_attn.k_proj"] == "not included"


def test_a_run_counts_and_records_what_stays_dense(tmp_path: Any) -> None:
    MIXTURES["phimoe"]().save_pretrained(tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(2000).numpy())
    report = ss.prune(
        tmp_path / "dense", calibration=tmp_path / "tokens.npy", samples=60, length=16, solver="wanda",
        exclude=("*k_proj",), unreached="magnitude", out=tmp_path / "out",
    )  # fmt: skip
    assert report.left_dense == {"excluded": 2, "router": 2}
    with RunDatabase(tmp_path / "out" / RECORD_FILE) as record:
        found = record.facts()["left_dense"]
    assert sorted(found.values()) == ["excluded", "excluded", "router", "router"]
