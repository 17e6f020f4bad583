"""A model of Llama-3.1-8B's shape from checkpoint to saved masks: seconds and peak memory per stage.

    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end_cuda.md
    python benchmarks/end_to_end.py --device cpu --shrink 8 --blocks 4 --windows 32 --length 256

Weights and tokens are random: nothing is evaluated, but work and memory are those of the real model.
``--shrink`` divides all widths and the vocabulary. The checkpoint is written first (bfloat16), by another
process. Stages: *load* (all up to the first gradients or search, so with hashes, checks and one step's Gram
matrix), *output metric* (gradients, with such an objective), *search* (warm start, swaps to the certificate,
errors), *calibrate* (forward passes and Gram matrices), *save* (files, reloaded and verified). Memory is the
largest resident set of the process in the stage (so far, where the system does not let it start again), and
on CUDA the device's allocated peak.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
import transformers
from output import write

import sparseswaps as ss
from sparseswaps.machine import peak_memory_mb
from sparseswaps.records.run import LayerRecord

HIDDEN, FEED_FORWARD, HEADS, KEY_VALUE_HEADS, BLOCKS, VOCABULARY = 4096, 14336, 32, 8, 32, 128_256


class Clock:
    """Progress of a run that measures its stages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._searched = 0
        self._now = "load"
        self.seconds: dict[str, float] = {}
        self.host: dict[str, float] = {}
        self.on_device: dict[str, float] = {}
        self._begin()

    def stage(self, text: str, done: int, total: int) -> None:
        """Gradients say so."""
        self._enter(text if done < total else "calibrate")

    def layer_started(self, name: str) -> None:
        """A group of layers is searched from its first layer's start to its last one's end."""
        self._searched += 1
        self._enter("search")

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """See ``layer_started``."""
        self._searched -= 1
        if not self._searched:
            self._enter("calibrate" if done < total else "save")

    def stop(self) -> None:
        """The run is over."""
        self._end()

    def _enter(self, stage: str) -> None:
        if stage != self._now:
            self._end()
            self._now = stage
            self._begin()

    def _begin(self) -> None:
        with suppress(OSError):  # the largest resident set starts again from here
            Path("/proc/self/clear_refs").write_text("5")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = time.perf_counter()

    def _end(self) -> None:
        name = self._now
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device) / 1e9
            self.on_device[name] = max(self.on_device.get(name, 0.0), peak)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self._since
        self.host[name] = max(self.host.get(name, 0.0), peak_memory_mb() / 1e3)


def save_model(folder: Path, shrink: int, blocks: int, device: torch.device) -> None:
    """A checkpoint with random weights."""
    heads = max(HEADS // shrink, 2)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY // shrink,
        hidden_size=HIDDEN // shrink,
        intermediate_size=FEED_FORWARD // shrink,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(heads * KEY_VALUE_HEADS // HEADS, 1),
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with device:
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")


def measured(
    args: argparse.Namespace, device: torch.device, folder: Path, objective: str, size: float, number: int
) -> str:
    """Prune the model in ``folder`` and print what it took.

    Args:
        args: of the command line.
        device: where to prune.
        folder: of the model, the tokens and the results.
        objective: what layers are fitted to.
        size: of the checkpoint, in 10⁹ bytes.
        number: of the run.
    """
    clock = Clock(device)
    report = ss.prune(
        folder / "dense",
        args.pattern,
        calibration=folder / "tokens.npy",
        samples=args.windows,
        length=args.length,
        objective=objective,
        device=args.device,
        offload=args.offload,
        out=folder / f"pruned-{number}",
        progress=clock,
    )
    clock.stop()
    certified = sum(layer.certified_rows or 0 for layer in report.layers)
    rows = sum(layer.rows for layer in report.layers)
    where = report.device + (", offloaded" if args.offload else "")
    lines = [
        f"| {stage} | {seconds:.1f} | {clock.host[stage]:.2f} | "
        + (f"{clock.on_device[stage]:.2f} |" if clock.on_device else "– |")
        for stage, seconds in clock.seconds.items()
    ]
    text = (
        "# A model of Llama-3.1-8B's shape, end to end\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, Python {platform.python_version()}, torch "
        f"{torch.__version__}; widths divided by {args.shrink}, {args.blocks} blocks, checkpoint of "
        f"{size:.2f} GB, {args.windows} windows of {args.length} tokens, 1-swap from Wanda to its "
        f"certificate at {args.pattern}, objective {objective or 'the layer error'}. {certified} of "
        f"{rows} rows certified, error {report.error:.4f} (Wanda {report.error_start:.4f}). Weights and "
        "tokens are random.\n\n"
        "| stage | seconds | host, GB | device, GB |\n|---|---:|---:|---:|\n"
        + "\n".join(lines)
        + f"\n| all | {sum(clock.seconds.values()):.1f} | {max(clock.host.values()):.2f} | "
        + (f"{max(clock.on_device.values()):.2f} |\n" if clock.on_device else "– |\n")
    )
    print(text, flush=True)
    return text


def main() -> None:
    """Measure and print; with ``--out`` also write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--objectives", nargs="+", default=[""], help="one run each")
    parser.add_argument("--offload", action="store_true", help="leave the weights in the checkpoint's files")
    parser.add_argument("--folder", type=Path, help="where models are written")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        building = multiprocessing.get_context("spawn").Process(
            target=save_model, args=(folder / "dense", args.shrink, args.blocks, device)
        )
        building.start()
        building.join()
        size = sum(file.stat().st_size for file in (folder / "dense").glob("*.safetensors")) / 1e9
        count = args.windows * args.length * 2
        tokens = np.random.default_rng(0).zipf(1.3, count) % (VOCABULARY // args.shrink)
        np.save(folder / "tokens.npy", tokens)
        small = ss.synthetic_layer("correlated", rows=4, cols=256, pattern=args.pattern)
        ss.solve(small.to(device), ss.OneSwap())  # kernels are compiled before the clock starts
        texts = [
            measured(args, device, folder, objective, size, number)
            for number, objective in enumerate(args.objectives)
        ]
    write("\n".join(texts), args.out)


if __name__ == "__main__":
    main()
