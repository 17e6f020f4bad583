"""A tiny random model of every family of the installed transformers whose configuration lets itself shrink.

The numbers that make a model large are made small by their names, in configurations inside of configurations
too; ``OWN`` has what single families need beside that.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, WIDTH, POSITIONS, IMAGE = 64, 32, 48, 32
# Tokens from here on are words; those before mean something to one family or another.
FIRST_WORD = 32
# Parameters of a model that is small enough.
MOST = 4_000_000
KEEP = None

# What a number becomes, by the first pattern that its name matches; lists become it entry by entry.
SMALL: tuple[tuple[str, int | None], ...] = (
    (
        r"type_vocab_size|vocab_offset|num_labels|num_channels|in_channels|in_chans|.*_index|.*_id|.*_ids",
        KEEP,
    ),
    (r".*vocab.*", VOCABULARY),
    (
        r"n_positions|n_ctx|.*max_position_embeddings|.*max_(source|target|encoder|decoder)_positions?",
        POSITIONS,
    ),
    (r".*max_(encoder|decoder)_position_embeddings|seq_length|max_seq_len|context_length", POSITIONS),
    (r"sliding_window(_size)?|local_attention|attention_chunk_size|attention_window", 16),
    (r"index_topk", 8),
    (r".*(num|n)_.*experts_per_tok(en)?|moe_k|moe_topk", 2),
    (r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r".*experts|n_experts", 4),
    (
        r".*_(period|freq|offset|interval|step|stride|strides|kernel|kernel_size|factor)|conv_(kernel|stride)",
        KEEP,
    ),
    (r".*key_value_heads|num_kv_heads|multi_query_group_num|num_key_value_groups", 2),
    (r".*heads?", 4),
    (r"qk_head_dim", 16),
    (
        r".*head_dim|dim_head|d_kv|qk_.*_dim|v_head_dim|.*lora_rank|kv_channels|.*linear_(key|value)_head_dim",
        8,
    ),
    (r".*(intermediate|ffn|feedforward|feed_forward|d_ff|dff|mlp|n_inner|d_inner|dim_ff).*", 48),
    (r"depths", 1),
    (r".*layers?|depth|.*_depth|n_layer|num_.*blocks", 2),
    (r"image_size|img_size|pretrain_image_size|max_image_size|resolution|input_size", IMAGE),
    (r"patch_sizes?", 4),
    (r"window_size", 4),
    (r"num_mel_bins|feature_size|n_mels|input_feat_per_channel", 16),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_queries|num_query_tokens|.*num_latents", 8),
    (r".*d_state|state_size|ssm_state_size", 8),
    (r".*chunk_size|chunk_length|block_size", 16),
    (r"conv_dim|channels|.*channels|num_filters|codebook_dim|codebook_size|.*per_group", 16),
    (
        r".*(hidden|embed|embedding|emb|model|proj|projection|encoder|decoder|latent|fusion|output)_?(size|dim|dims|sizes)",
        WIDTH,
    ),
    (
        r"hidden_sizes|n_embd|d_model|dim|dims|width|embed_dims|hidden_dim|embedding_dim|.*_hidden_size.*",
        WIDTH,
    ),
)

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}

# Families need this beside what their names say.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "mobilevitv2": {"width_multiplier": 0.25},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 12], "max_position_embeddings": 48},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "xlnet": {"d_model": WIDTH, "n_head": 4, "d_inner": 48, "d_head": 8},
    **{
        name: {"head_dim": 8}
        for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")
    },
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
        for name in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
            "glm4v_text",
            "glm46v_text",
            "glm_image_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
        )
    },
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    },
    **{name: {"rotary_dim": 4} for name in ("gptj", "codegen")},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "hybrid", "hybrid"],
        "num_mem_blocks": 1,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lilt": {"hidden_size": 48},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm3_text": {"layer_types": ["conv", "full_attention"]},
    "vjepa2": {"crop_size": IMAGE, "frames_per_clip": 4, "patch_size": 8},
    "esmc": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    **{name: {"vocab_size": VOCABULARY} for name in ("wav2vec2-bert", "wav2vec2-conformer")},
}

_LISTS = (
    "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CTC",
    "AUDIO_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
)  # fmt: skip


def families() -> dict[str, str]:
    """Every model type that has a model, with the class that stands for it: that with its usual head."""
    found: dict[str, str] = {}
    lists = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in _LISTS]
    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    for model_type in {name for each in [modeling_auto.MODEL_MAPPING_NAMES, *lists] for name in each}:
        heads = [each[model_type] for each in lists if model_type in each]
        base = modeling_auto.MODEL_MAPPING_NAMES.get(model_type)
        composite = "text_config" in (getattr(CONFIG_MAPPING[model_type], "sub_configs", None) or {})
        classifies = bool(heads) and all(model_type not in each for each in lists[:-2])
        if base is not None and (model_type in encoders or not heads or (composite and classifies)):
            name = base
        else:  # of a model of several kinds of inputs the one that takes them all
            name = heads[1] if composite and len(heads) > 1 else heads[0]
        found[model_type] = name if isinstance(name, str) else name[0]
    return dict(sorted(found.items()))


def small_config(model_type: str) -> tf.PretrainedConfig:
    """A configuration of the family with small numbers."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_small(kind, kind()), **OWN.get(model_type, {})})


def _small(kind: type, default: tf.PretrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    special = 4
    subs = set(getattr(default, "sub_configs", {}) or {})
    for field in dataclasses.fields(kind):
        name, value = field.name, _value(default, field)
        if name in subs and isinstance(value, tf.PretrainedConfig):
            inner = {**_small(type(value), value), "model_type": value.model_type}
            found[name] = {**inner, **OWN.get(value.model_type, {})}
        elif re.fullmatch(_SPECIAL, name):
            if type(value) is int and value > 3:
                found[name], special = special, special + 1
            elif isinstance(value, list):
                found[name] = [2]
        elif not (isinstance(value, list) and field.default is None):  # such a list is made from the others
            number = _small_number(name, value)
            if number is not None:
                found[name] = number
    if {
        "kv_lora_rank",
        "num_key_value_heads",
    } <= found.keys():  # keys and values of all heads from one vector
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
    layers = getattr(default, "num_hidden_layers", None)
    for field in dataclasses.fields(kind):  # of lists with an entry per layer the first ones
        value = found.get(field.name, None if field.default is None else _value(default, field))
        if isinstance(value, list | tuple) and len(value) == layers and len(value) > 2:
            found[field.name] = value[: found.get("num_hidden_layers", layers)]
    return _with_attention(kind, found)


def _with_attention(kind: type, small: dict[str, Any]) -> dict[str, Any]:
    """With as many layers that one of them is attention, in families where few are."""
    for layers in (2, 4, 6, 8) if small.get("num_hidden_layers") == 2 else ():
        longer = {**small, "num_hidden_layers": layers}
        try:
            types = getattr(kind(**longer), "layer_types", None) or ["attention"]
        except Exception:  # a family with a list of its own
            return small
        if any("linear" not in each and each != "mamba" for each in types):
            return longer
    return small


def _value(config: tf.PretrainedConfig, field: dataclasses.Field[Any]) -> Any:
    try:
        return getattr(config, field.name, None)
    except Exception:  # one that differs from layer to layer
        return None if field.default is dataclasses.MISSING else field.default


_SPECIAL = r".*_token(_id|_index|_idx)?|image_token|audio_token"


def _small_number(name: str, value: Any) -> Any:
    """A smaller value of the same kind, None for one that stays."""
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    for pattern, number in SMALL:
        if re.fullmatch(pattern, name):
            if number is None:
                return None
            if isinstance(value, list | tuple) and value and all(type(each) is int for each in value):
                return type(value)(number if "heads" in name else min(each, number) for each in value)
            return min(value, number) if type(value) is int else None
    return None


def build(model_type: str, class_name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A model of the family, with random weights large enough to matter.

    Raises:
        ValueError: if it is not small.
    """
    config = small_config(model_type)
    kind = getattr(tf, class_name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = kind._from_config(small_config(model_type))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # as it comes, some families' outputs say nothing of their inputs
                scale = 1.5 / max(1, parameter[0].numel()) ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()
