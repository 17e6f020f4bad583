"""Peak memory of pruning an offloaded model, against the number of blocks, and under a hard limit.

Every run is ``sparseswaps prune --offload`` in a process of its own, from the checkpoint to the saved and
verified model. Its anonymous memory (what cannot be dropped and read again from a file) is sampled every
few milliseconds. The last run is in a control group whose memory is limited, file cache included: there the
kernel kills what needs more. That takes root, on Linux.

    python benchmarks/memory.py --out benchmarks/results/memory.md
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from output import publish

MEGA = 1e6
VERSION_ONE, VERSION_TWO = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def save_model(folder: Path, hidden: int, blocks: int) -> float:
    """A Llama with random weights in ``folder``; returns its size in 10⁶ bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / MEGA


@contextmanager
def limited_group(limit_mb: float) -> Iterator[Path]:
    """A control group whose processes together hold at most so much memory."""
    old = (VERSION_ONE / "memory.limit_in_bytes").exists()
    group = (VERSION_ONE if old else VERSION_TWO) / f"sparseswaps-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if old else "memory.max")
        limit.write_text(str(int(limit_mb * MEGA)))
    except OSError as error:
        sys.exit(f"control group {group}: expected to be able to make and limit it, found {error}")
    try:
        yield group
    finally:
        group.rmdir()


def anonymous_mb(process: int) -> float:
    """Anonymous memory of a process in 10⁶ bytes, 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(x.split()[1]) * 1024 / MEGA for x in status.splitlines() if x.startswith("RssAnon:"))


def prune(model: Path, tokens: Path, out: Path, args: argparse.Namespace, group: Path | None) -> float:
    """Largest anonymous memory of one run in 10⁶ bytes."""
    command = [sys.executable, "-m", "sparseswaps", "prune", str(model), "--calibration", str(tokens)]
    command += ["--samples", str(args.windows), "--length", str(args.length), "--solver", args.solver]
    command += ["--out", str(out), "--offload", "--activation-limit", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env=environment, preexec_fn=enter
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, anonymous_mb(process.pid))
            time.sleep(0.005)
        if process.returncode:
            said.seek(0)
            sys.exit(
                f"run on {model.name}: expected to end well, found exit code {process.returncode}\n"
                + said.read().decode()[-2000:]
            )
    return peak


def main() -> None:
    """Measure and print; with ``--out`` also write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--solver", default="wanda")
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 40, 185])
    parser.add_argument("--limit", type=float, default=750, help="MB of the control group; 0 for no such run")
    parser.add_argument("--folder", type=Path, help="where models are written, on a disk and not in memory")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        tokens = folder / "tokens.npy"
        count = args.windows * args.length * 4
        np.save(tokens, np.random.default_rng(0).integers(0, 512, count))
        sizes, peaks = [], []
        for blocks in args.blocks:
            model = folder / f"model-{blocks}"
            sizes.append(save_model(model, args.hidden, blocks))
            peaks.append(prune(model, tokens, folder / f"out-{blocks}", args, None))
            rows.append(f"| {blocks} | {sizes[-1]:.0f} | none | {peaks[-1]:.0f} |")
            print(rows[-1], flush=True)
        if args.limit:
            model = folder / f"model-{args.blocks[-1]}"
            with limited_group(args.limit) as group:
                peak = prune(model, tokens, folder / "limited", args, group)
            rows.append(f"| {args.blocks[-1]} | {sizes[-1]:.0f} | {args.limit:.0f} | {peak:.0f} |")
    times = args.blocks[-1] / args.blocks[0], peaks[-1] / peaks[0]
    summary = f"{times[0]:.1f} times the blocks: {times[1]:.2f} times the memory."
    if args.limit:
        summary += f" The last model is {sizes[-1] / args.limit:.2f} times as large as its limit."
    text = (
        "# Peak memory of pruning an offloaded model\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {torch.__version__}; Llama of width "
        f"{args.hidden} in float32, {args.windows} windows of {args.length} tokens, {args.solver} at 50 %, "
        "one thread, activations in files; from the checkpoint to the saved, verified model. Libraries "
        "included: the memory is that of the whole process, without what it maps from files.\n\n"
        "| blocks | model, MB | hard limit, MB | peak anonymous memory, MB |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{summary}\n"
    )
    publish(text, args.out)


if __name__ == "__main__":
    main()
