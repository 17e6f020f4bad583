"""Train a small mixture of experts on the source code of Python's standard library, to prune experts of.

    python examples/train_demo_moe.py --out demo-moe --minutes 20

Four blocks of sixteen experts, two for each token (Mixtral), tied embeddings, the corpus and the tokenizer
recipe of the bundled demo model. Everything is seeded; the wall-clock limit decides how many steps are taken,
so ``--steps`` gives a run that can be repeated exactly. The learning rate follows one cosine over the run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from train_demo_model import train_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from sparseswaps.calibration.corpus import standard_library_text

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


def perplexity(model: MixtralForCausalLM, tokens: torch.Tensor, windows: int) -> float:
    """Perplexity of the first ``windows`` windows of ``CONTEXT`` tokens."""
    batch = tokens[: windows * CONTEXT].view(windows, CONTEXT)
    losses = []
    with torch.no_grad():
        for window in batch.split(8):
            losses.append(model(window, labels=window).loss.item() * len(window))
    return math.exp(sum(losses) / windows)


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=None, help="fixed number of steps instead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    train_text = standard_library_text("train")
    held_out_text = standard_library_text("held-out")
    tokenizer = train_tokenizer(train_text, VOCABULARY)
    train = torch.tensor(tokenizer(train_text)["input_ids"])
    held_out = torch.tensor(tokenizer(held_out_text)["input_ids"])
    model = build(tokenizer)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} tokens", flush=True)

    generator = torch.Generator().manual_seed(arguments.seed)
    start = time.monotonic()
    step = 0
    while True:
        elapsed = time.monotonic() - start
        progress = step / arguments.steps if arguments.steps else elapsed / (arguments.minutes * 60)
        if progress >= 1:
            break
        warmup = min(1.0, (step + 1) / 100)
        rate = arguments.learning_rate * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - CONTEXT, (arguments.batch,), generator=generator)
        batch = torch.stack([train[s : s + CONTEXT] for s in starts.tolist()])
        loss = model(batch, labels=batch, output_router_logits=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {elapsed:.0f} s  loss {loss.item():.3f}  rate {rate:.2e}", flush=True)

    model.eval()
    model.half()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    card = {
        "data": "source code of Python's standard library, tests left out, some modules held out",
        "steps": step,
        "batch": arguments.batch,
        "context": CONTEXT,
        "seed": arguments.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_perplexity": round(perplexity(model.float(), held_out, 64), 3),
    }
    (arguments.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
