"""How much faster two processes prune than one: the time of both on the same model, one thread each.

The model is a Llama with random weights; calibration, Gram matrices and 1-swap search are timed, loading
is not. Masks must be equal bit for bit, or the program ends with an error. Beside wall-clock time stands the
processor time of the busiest process: the time that the run would take on a machine that does nothing else.

    python benchmarks/processes.py --out benchmarks/results/processes.md
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from output import publish

import sparseswaps as ss
from sparseswaps.models.blocks import find_blocks
from sparseswaps.pruning.pipeline import prune_layers
from sparseswaps.ranks import Ranks


def build(hidden: int, blocks: int) -> torch.nn.Module:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config).eval()


def work(rank: int, count: int, port: int, args: argparse.Namespace, results: object) -> None:
    """Prune as one of ``count`` processes; the first one reports seconds and masks."""
    torch.set_num_threads(1)
    if count > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    ranks = Ranks(rank, count)
    windows = torch.randint(0, 512, (args.windows, args.length), generator=torch.Generator().manual_seed(1))
    for blocks, timed in ((1, False), (args.blocks, True)):  # kernels are compiled before the clock starts
        model = build(args.hidden, blocks)
        ranks.gather(lambda: 0)
        begin, busy = time.perf_counter(), time.process_time()
        tokens = windows if timed else windows[:4]
        settings, context = ss.PruneSettings(objective="plain"), ss.RunContext(ranks=ranks)
        masks = prune_layers(model, find_blocks(model), settings, tokens, context=context)
        seconds = time.perf_counter() - begin
        busiest = max(ranks.gather(lambda busy=busy: time.process_time() - busy))
    if ranks.first:
        digest = [int(mask.to(torch.int64).flatten().cumsum(0).sum()) for mask in masks.values()]
        results.put((seconds, busiest, digest))  # type: ignore[attr-defined]
    if count > 1:
        dist.destroy_process_group()


def timed(count: int, args: argparse.Namespace) -> tuple[float, float, list[int]]:
    """Seconds, processor seconds of the busiest one, and a digest of the masks of ``count`` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=work, args=(i, count, port, args, results)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"{count} processes: expected exit code 0, found {[p.exitcode for p in processes]}")
    found: tuple[float, float, list[int]] = results.get()
    return found


def main() -> None:
    """Measure and print; with ``--out`` also write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = ["| | one process, s | two processes, s | ratio |", "|---|---|---|---|"]
    for _ in range(args.repeat):
        (one, busy_one, alone), (two, busy_two, together) = timed(1, args), timed(2, args)
        if alone != together:
            sys.exit("masks of one and of two processes: expected equal ones, found others")
        lines.append(f"| wall clock | {one:.1f} | {two:.1f} | {one / two:.2f} |")
        lines.append(
            f"| processor, busiest process | {busy_one:.1f} | {busy_two:.1f} | {busy_one / busy_two:.2f} |"
        )
    text = (
        "# Two processes against one\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, one thread per process, gloo, torch {torch.__version__}; Llama of width "
        f"{args.hidden}, {args.blocks} blocks, {args.windows} windows of {args.length} tokens, 1-swap from "
        "Wanda at 50 %. Masks are equal bit for bit.\n\n" + "\n".join(lines) + "\n"
    )
    publish(text, args.out)


if __name__ == "__main__":
    main()
