"""Small random mixtures of experts, and what each expert adds to the output of its mixture, by hand.

The oracle shares no code with the package: the gates are what the router returns, and each expert is its two
products in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiny_models
import torch
import transformers as tf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EXPERTS = 8
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip

FAMILIES = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "llama4")


def _built(family: str, **other: Any) -> Any:
    few = {**SIZES, "num_experts_per_tok": 2, **other}
    if family == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**few, num_local_experts=EXPERTS))
    if family == "qwen3-moe":
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**few, num_experts=EXPERTS))
    if family == "olmoe":
        return tf.OlmoeForCausalLM(tf.OlmoeConfig(**few, num_experts=EXPERTS))
    if family == "deepseek-v2":
        return tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**{**SIZES, **DEEPSEEK, **other}))
    if family == "deepseek-v3":
        return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**SIZES, **DEEPSEEK, **other}))
    if family == "llama4":
        few["num_experts_per_tok"] = 1
        return tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(**few, num_local_experts=EXPERTS, intermediate_size_mlp=48, attn_scale=0.1)
        )
    return tf.JetMoeForCausalLM(
        tf.JetMoeConfig(**{**few, "num_attention_heads": None}, kv_channels=8, num_local_experts=EXPERTS)
    )


def build(family: str, seed: int = 0, **other: Any) -> Any:
    """A mixture of ``EXPERTS`` experts in each of two blocks, with weights and biases that matter."""
    torch.manual_seed(seed)
    model = _built(family, **other).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def windows(count: int = 8, length: int = 32) -> Tensor:
    return tiny_models.tokens(count * length).view(count, length)


def mixtures_of(model: Any) -> list[nn.Module]:
    return [getattr(layer, "feed_forward", None) or layer.mlp for layer in model.model.layers]


def router_of(mixture: Any) -> nn.Module:
    router: nn.Module = mixture.gate if hasattr(mixture, "gate") else mixture.router
    return router


def seen(model: Any, mixture: Any) -> tuple[Tensor, Any, Tensor]:
    """What a mixture receives (tokens, channels), what its router says, and what it returns."""
    found: list[Any] = []
    handles = [
        mixture.register_forward_pre_hook(lambda _m, args: found.append(args[0].flatten(0, -2).clone())),
        router_of(mixture).register_forward_hook(lambda _m, _a, output: found.append(output)),
        mixture.register_forward_hook(lambda _m, _a, output: found.append(output)),
    ]
    with torch.no_grad():
        model(input_ids=windows())
    for handle in handles:
        handle.remove()
    inputs, routed, output = found
    output = output[0] if isinstance(output, tuple) else output
    return inputs.double(), routed, output.flatten(0, -2).double()


def contributions(mixture: Any, inputs: Tensor, routed: Any) -> tuple[Tensor, Tensor]:
    """What each expert adds (experts, tokens, channels), and to which tokens (experts, tokens)."""
    up, down = mixture.experts.gate_up_proj.detach().double(), mixture.experts.down_proj.detach().double()
    if len(routed) == 2:  # Llama-4: the gate is at the expert's input, its products are x W
        chosen = routed[0].double().T
        up, down, at_input = up.mT, down.mT, chosen
    else:
        chosen = torch.zeros(EXPERTS, len(inputs), dtype=torch.float64)
        chosen.T.scatter_(1, routed[2], routed[1].double())
        at_input = torch.ones_like(chosen)
    gate, value = torch.einsum("tc,eic->eti", inputs, up).mul(at_input[..., None]).chunk(2, -1)
    outputs = torch.einsum("eti,eci->etc", nn.functional.silu(gate) * value, down)
    return outputs * (chosen if len(routed) == 3 else 1.0 * (chosen > 0))[..., None], chosen > 0


class _Silent(TorchFunctionMode):
    def __init__(self, silenced: dict[int, Tensor]) -> None:
        super().__init__()
        self.silenced = silenced

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].data_ptr() in self.silenced:
            result = result.masked_fill(self.silenced[args[1].data_ptr()], -torch.inf)
        return result


@contextmanager
def excluded(model: Any, kept: Sequence[Tensor]) -> Iterator[None]:
    """Routers give experts that are not kept no chance; everything else is as it was."""
    routers: list[Any] = [router_of(mixture) for mixture in mixtures_of(model)]
    biases = [getattr(router, "e_score_correction_bias", None) for router in routers]
    before = [None if bias is None else bias.clone() for bias in biases]
    for bias, mask in zip(biases, kept, strict=True):
        if bias is not None:
            bias.masked_fill_(~mask, -torch.inf)
    try:
        with _Silent({r.weight.data_ptr(): ~mask for r, mask in zip(routers, kept, strict=True)}):
            yield
    finally:
        for bias, copy in zip(biases, before, strict=True):
            if bias is not None:
                bias.copy_(copy)
