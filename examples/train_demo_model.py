"""Train the bundled demo model: a small LLaMA on the source code of Python's standard library.

    python examples/train_demo_model.py --out sparseswaps/data/demo-model --minutes 60

Everything is seeded; the wall-clock limit decides how many steps are taken, so ``--steps`` gives
a run that can be repeated exactly. The learning rate follows one cosine over the run. Matrix
products run in bfloat16; weights and optimiser state stay float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sparseswaps.calibration.corpus import standard_library_text

VOCABULARY = 4096
CONTEXT = 512


def train_tokenizer(text: str, entries: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[i : i + 100_000] for i in range(0, len(text), 100_000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def perplexity(model: PreTrainedModel, tokens: torch.Tensor, windows: int, context: int) -> float:
    """Perplexity of the first ``windows`` windows of ``context`` tokens."""
    batch = tokens[: windows * context].view(windows, context)
    losses = []
    with torch.no_grad():
        for window in batch.split(8):
            losses.append(model(window, labels=window).loss.item() * len(window))
    return math.exp(sum(losses) / windows)


def build(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Of next tokens, in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(batch, labels=batch).loss


def train(
    description: str,
    minutes: float,
    entries: int,
    context: int,
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel],
    loss_of: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor],
) -> None:
    """Train, evaluate and save, as the command line says.

    Args:
        description: of the program.
        minutes: how long, where nothing is said.
        entries: of the tokenizer.
        context: tokens of a window.
        build: the untrained model for a tokenizer.
        loss_of: of a model on a batch of windows.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--steps", type=int, default=None, help="fixed number of steps instead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    train_text = standard_library_text("train")
    held_out_text = standard_library_text("held-out")
    tokenizer = train_tokenizer(train_text, entries)
    tokens = torch.tensor(tokenizer(train_text)["input_ids"])
    held_out = torch.tensor(tokenizer(held_out_text)["input_ids"])
    model = build(tokenizer)
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens", flush=True)

    generator = torch.Generator().manual_seed(arguments.seed)
    start = time.monotonic()
    limit = arguments.minutes * 60
    step = 0
    while True:
        elapsed = time.monotonic() - start
        progress = step / arguments.steps if arguments.steps else elapsed / limit
        if progress >= 1:
            break
        warmup = min(1.0, (step + 1) / 100)
        rate = arguments.learning_rate * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - context, (arguments.batch,), generator=generator)
        loss = loss_of(model, torch.stack([tokens[s : s + context] for s in starts.tolist()]))
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
    windows = min(64, len(held_out) // context)
    card = {
        "data": "source code of Python's standard library, tests left out, some modules held out",
        "steps": step,
        "batch": arguments.batch,
        "context": context,
        "seed": arguments.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_perplexity": round(perplexity(model.float(), held_out, windows, context), 3),
    }
    (arguments.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    train(__doc__, 30.0, VOCABULARY, CONTEXT, build, loss_of)
