"""Train a small mixture of experts on the source code of Python's standard library, to prune experts of.

    python examples/train_demo_moe.py --out demo-moe --minutes 20

Four blocks of sixteen experts, two for each token (Mixtral), tied embeddings, the corpus and the tokenizer
recipe of the bundled demo model. Everything is seeded; the wall-clock limit decides how many steps are taken,
so ``--steps`` gives a run that can be repeated exactly. The learning rate follows one cosine over the run.
"""

from __future__ import annotations

import torch
from train_demo_model import train
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 256
# Of the loss that spreads tokens over experts.
BALANCE = 0.01


def build(tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    """The untrained model, 2.4 million parameters of which a token uses 0.7."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=16,
        num_experts_per_tok=2,
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def loss_of(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Of next tokens, and of tokens that are not spread over experts."""
    return model(batch, labels=batch, output_router_logits=True).loss


if __name__ == "__main__":
    train(__doc__, 20.0, VOCABULARY, CONTEXT, build, loss_of)
