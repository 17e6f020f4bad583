"""Small randomly initialised models of many families, and a word-level tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64


def _configs() -> dict[str, tf.PretrainedConfig]:
    decoder = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "gpt2": tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "opt": tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        ),
        "llama": tf.LlamaConfig(**decoder),
        "llama-tied": tf.LlamaConfig(**decoder, tie_word_embeddings=True),
        "qwen2": tf.Qwen2Config(**decoder),
        "qwen3": tf.Qwen3Config(**decoder, head_dim=8),
        "gemma": tf.GemmaConfig(**decoder, head_dim=8),
        "phi": tf.PhiConfig(**{**decoder, "num_key_value_heads": 4}),
        "mixtral": tf.MixtralConfig(**decoder, num_local_experts=4, num_experts_per_tok=2),
        "bert": tf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        "t5": tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    }


FAMILIES = tuple(_configs())


def build(family: str, seed: int = 0) -> tf.PreTrainedModel:
    """A model of ``family`` with random weights large enough to matter."""
    config = _configs()[family]
    torch.manual_seed(seed)
    kind = {"bert": tf.AutoModel, "t5": tf.AutoModelForSeq2SeqLM}.get(family, tf.AutoModelForCausalLM)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model.eval()


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A checkpoint of ``family`` in ``folder``; Llama's with a tokenizer of one word per token."""
    model = build(family, seed).to(dtype)
    model.save_pretrained(folder)
    if family != "llama":
        return folder
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Random tokens (count,), neighbours related so that activations are correlated."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 5, (count,), generator=generator)
    return 4 + steps.cumsum(0) % (VOCABULARY - 4)


def text(words: int, seed: int = 0) -> str:
    """The words of ``tokens``."""
    return " ".join(f"w{i}" for i in tokens(words, seed).tolist())
