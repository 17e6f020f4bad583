"""The data path: Gram sums, labels of the output metric, activations that wait for the next block."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

import sparseswaps as ss
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.calibration.store import TensorStore
from sparseswaps.models.blocks import find_blocks

from .bench import Bench

VOCABULARY = 128_256


def activations(bench: Bench, tokens: int, cols: int, kind: str) -> Tensor:
    """Activations (tokens, cols) in bfloat16: ``normal``, or such that float32 sums lose most."""
    generator = torch.Generator(bench.device).manual_seed(cols)
    found = torch.randn((tokens, cols), generator=generator, device=bench.device)
    if kind == "large means":
        found += 30
    elif kind == "few huge tokens":
        found[:: max(tokens // 4, 1)] *= 1e4
    elif kind == "channels of all sizes":
        found *= torch.logspace(-4, 4, cols, device=bench.device)
    return found.bfloat16()


def relative_error(inputs: Tensor) -> float:
    """Largest error of a Gram sum against float64, over the norms of the two channels."""
    sums = ss.GramAccumulator(inputs.shape[1], inputs.device)
    sums.update(inputs)
    exact = inputs.double().T @ inputs.double()
    scale = exact.diagonal().sqrt()
    return float(((sums.gram().matrix - exact).abs() / scale[:, None] / scale).amax())


def gram_sums(bench: Bench) -> None:
    """TFLOP/s of Gram sums without and with drift, and their error against float64."""
    tokens = bench.size(8192, 128)
    for kind in ("normal", "large means", "few huge tokens", "channels of all sizes"):
        bench.in_time(f"error of {kind}")
        error = relative_error(activations(bench, tokens, bench.size(4096, 64), kind))
        bench.check(f"error of a Gram sum, {kind}", error < 1e-6, error, "below 1e-6 of the norms")
    for cols in (bench.size(4096, 64), bench.size(14336, 224)):
        inputs = activations(bench, tokens, cols, "normal")
        dense = (inputs.float() * 1.01).bfloat16()
        for drift in (False, True):
            bench.in_time(f"{cols} columns")
            sums = ss.GramAccumulator(cols, bench.device, drift=drift)
            batch = (inputs, dense) if drift else (inputs,)
            sums.update(*batch)
            _, seconds = bench.timed(lambda sums=sums, batch=batch: sums.update(*batch), 3)
            # a symmetric sum needs one half of its product; with drift there are two of them and a whole one
            operations = tokens * cols**2 * (4 if drift else 1)
            name = f"Gram sums, {cols} columns{', with drift' if drift else ''}"
            bench.info(
                name, operations / seconds / 1e12, f"{1e3 * seconds:.1f} ms of {tokens} tokens", "TFLOP/s"
            )
            del sums


def labels(bench: Bench) -> None:
    """Seconds of the output metric's labels: a model that is all vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=bench.size(VOCABULARY), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    windows = torch.randint(config.vocab_size, (2, bench.size(2048, 32)))
    dtype = torch.bfloat16 if bench.on_card else torch.float32
    model = transformers.LlamaForCausalLM(config).eval().to(bench.device, dtype)
    blocks = find_blocks(model)
    few = windows[:, :16]
    gradient_moments(model, blocks, few, 2)
    bench.in_time("labels", 1)
    moments, seconds = bench.timed(lambda: gradient_moments(model, blocks, windows, 2))
    seconds *= 4096 / windows.numel()
    bench.check("layers with moments", len(moments) == 7, len(moments), "7")
    name = f"labels of 4096 tokens, vocabulary {config.vocab_size}"
    bench.goal(name, seconds < 0.5, seconds, "below 0.5", "s")


def traffic(bench: Bench) -> None:
    """Milliseconds in which the activations of a batch are put away and brought back."""
    store = TensorStore()
    hidden = torch.randn(4, bench.size(2048, 32), bench.size(4096, 64), device=bench.device).bfloat16()
    store.keep(0, hidden)
    _, keep = bench.timed(lambda: store.keep(0, hidden), 3)
    back, recall = bench.timed(lambda: store.recall(0, bench.device), 5)
    bench.check("activations come back", torch.equal(back, hidden), "equal", "equal")
    bench.info("activations of a batch, keep", 1e3 * keep, "0.1 on the device, 5 in pinned memory", "ms")
    bench.info("activations of a batch, recall", 1e3 * recall, "0.1 on the device, 5 in pinned memory", "ms")
