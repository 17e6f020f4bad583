"""1-swap at the size of Llama-3.1-8B: seconds and peak memory per layer shape and for the model.

    python benchmarks/llm_scale.py --layers 1 --out benchmarks/results/llm_scale_cuda.md
    python benchmarks/llm_scale.py --device cpu --shrink 16 --layers 1

Weights are random (heavy-tailed), activations correlated: a power-law spectrum in a random basis of
reflections, token scales and 2 % outlier channels. Every shape is measured once and counted as often as
the model has it; ``--layers`` says of how many of the 32 blocks the total speaks. ``--shrink`` divides all
widths. Seconds are those of the search alone, without the Gram matrix, whose normalisation is shown too;
peak memory is what the search needs beside weights and Gram matrix (CUDA only).
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from output import publish
from torch import Tensor

import sparseswaps as ss

# name, rows, cols, copies per block
SHAPES = (
    ("q, o", 4096, 4096, 2),
    ("k, v", 1024, 4096, 2),
    ("gate, up", 14336, 4096, 2),
    ("down", 4096, 14336, 1),
)
BLOCKS = 32
PATTERNS = ("0.5", "0.6", "2:4")
PAPER_SWAPS = 100
TOKENS_PER_BATCH = 2048


def correlated_gram(cols: int, tokens: int, device: torch.device, seed: int) -> ss.Gram:
    """Gram matrix of ``tokens`` synthetic activations of ``cols`` correlated channels."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spectrum = torch.arange(1, cols + 1, device=device) ** -0.5
    spectrum /= (spectrum**2).mean().sqrt()
    reflections = normal(8, cols)
    reflections /= reflections.norm(dim=1, keepdim=True)
    mean = 0.3 * normal(cols)
    scale = torch.exp(0.4 * normal(cols))
    outliers = torch.randperm(cols, generator=generator, device=device)[: max(1, cols // 50)]
    scale[outliers] *= 10
    sums = ss.GramAccumulator(cols, device)
    for _ in range(-(-tokens // TOKENS_PER_BATCH)):
        inputs = normal(TOKENS_PER_BATCH, cols) * spectrum * torch.exp(0.3 * normal(TOKENS_PER_BATCH, 1))
        for vector in reflections:
            inputs -= 2 * (inputs @ vector)[:, None] * vector
        # neighbours in the spectrum share channels
        inputs = inputs + 0.5 * inputs.roll(1, 1) + 0.3 * normal(TOKENS_PER_BATCH, cols) + mean
        sums.update(inputs * scale)
    return sums.gram()


def random_weight(rows: int, cols: int, device: torch.device) -> Tensor:
    """Weights (rows, cols) whose rows differ in scale, float32."""
    generator = torch.Generator(device).manual_seed(rows)
    weight = 0.02 * torch.randn((rows, cols), generator=generator, device=device)
    return weight / (torch.rand((rows, 1), generator=generator, device=device) + 0.5)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print; with ``--out`` also write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=BLOCKS, help="blocks that the total speaks of")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--tokens-per-col", type=int, default=2)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    report = [
        "# 1-swap at the size of Llama-3.1-8B\n",
        f"{datetime.now(UTC):%Y-%m-%d}, {name}{threads}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; widths divided by {args.shrink}.\n",
        "| layer | shape | pattern | search | seconds | swaps / row | certified | error / Wanda | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    totals: dict[tuple[str, str], float] = {}
    for label, full_rows, full_cols, copies in SHAPES:
        rows, cols = full_rows // args.shrink, full_cols // args.shrink
        gram = correlated_gram(cols, args.tokens_per_col * cols, device, seed=cols)
        start = time.perf_counter()
        _ = gram.correlation, gram.largest_correlation
        synchronize(device)
        normalise = time.perf_counter() - start
        weight = random_weight(rows, cols, device)
        for pattern in args.patterns:
            problem = ss.LayerProblem(weight, gram, ss.SparsityPattern.parse(pattern, cols), name=label)
            wanda = ss.solve(problem, ss.Wanda()).objective
            for search, solver in (
                ("T = 100", ss.OneSwap(PAPER_SWAPS)),
                ("certificate", ss.OneSwap()),
            ):
                ss.solve(problem.slice_rows(slice(0, 2)), solver)  # compiled before the clock starts
                held = 0
                if device.type == "cuda":
                    held = torch.cuda.memory_allocated(device)
                    torch.cuda.reset_peak_memory_stats(device)
                synchronize(device)
                start = time.perf_counter()
                outcome = solver.run(problem, None, ss.Budget())
                synchronize(device)
                seconds = time.perf_counter() - start
                peak = ""
                if device.type == "cuda":
                    peak = f"{(torch.cuda.max_memory_allocated(device) - held) / 1e9:.2f}"
                if outcome.mask is None:
                    raise RuntimeError(f"layer {label}: expected a mask, found none")
                totals[pattern, search] = totals.get((pattern, search), 0.0) + copies * seconds
                report.append(
                    f"| {label} | {rows} x {cols} | {pattern} | {search} | {seconds:.3f} | "
                    f"{float(outcome.stats['swaps'].double().mean()):.1f} | "
                    f"{float(outcome.stats['certified'].double().mean()):.3f} | "
                    f"{problem.objective(outcome.mask) / wanda:.4f} | {peak} |"
                )
                print(report[-1], flush=True)
        report.append(f"| {label} | {cols} x {cols} | normalised Gram | | {normalise:.3f} | | | | |")
    report += [f"\n| model, {args.layers} of {BLOCKS} blocks | search | seconds |", "|---|---|---|"]
    report += [
        f"| {pattern} | {search} | {args.layers * seconds:.1f} |"
        for (pattern, search), seconds in totals.items()
    ]
    text = "\n".join(report) + "\n"
    publish(text, args.out)


if __name__ == "__main__":
    main()
