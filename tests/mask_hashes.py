"""SHA-256 of the masks that runs with different options find on the demo model.

``python tests/mask_hashes.py`` prints them as ``golden/mask_hashes.json`` keeps them, so that what only puts
things in order is seen to change no mask. They are made again where masks are meant to change.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import sparseswaps as ss

MODEL = Path(ss.__file__).parent / "data" / "demo-model"
GOLDEN = Path(__file__).parent / "golden" / "mask_hashes.json"
# Windows that are enough to tell one mask from another.
TOKENS, WINDOWS, LENGTH = 4096, 8, 64
SEED = 20261123
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain-2:4": {"objective": "plain", "pattern": "2:4"},
    "one-shot-ria-tabu": {
        "mode": ss.Mode.ONE_SHOT,
        "start": ss.RIA(),
        "solver": ss.Tabu(),
        "include": ("*.0.*",),
    },
    "all-three": {"objective": "drift=0.75,residual=0.5,metric"},
    "shrinkage": {"objective": "drift=0.75,residual=0.5,shrinkage=0.1", "pattern": "60%"},
    "auto-drift": {"objective": "drift=auto", "include": ("*.0.*", "*.1.*")},
    "held-out": {"objective": "held_out=0.25", "start": ss.Magnitude()},
    "knapsack": {"allocation": "knapsack", "include": ("*mlp*",)},
    "owl": {"allocation": "owl", "solver": ss.OneSwap(max_swaps=10)},
    "layer-budget": {"pattern": "layer:0.5", "objective": "plain"},
    "refined": {"refine": 1, "include": ("*.2.*",)},
    "updated": {"update": ss.Reconstruction(), "include": ("*.1.*",), "exclude": ("*down_proj",)},
    "dsnot": {"solver": ss.DSnoT(), "pattern": "70%"},
}
# What offloading does not cover (refinement changes layers of all blocks in turn).
IN_MEMORY_ONLY = ("refined",)


def token_file(folder: Path) -> Path:
    """Random tokens, the same on every machine."""
    path = folder / "tokens.npy"
    generator = np.random.Generator(np.random.PCG64(SEED))
    np.save(path, generator.integers(5, TOKENS // 2, 4 * WINDOWS * LENGTH))
    return path


def run(name: str, tokens: Path, out: Path, **machine: Any) -> dict[str, Any]:
    """Prune with the options called ``name`` into ``out``; the hash of the masks and the mean layer error."""
    options = {"calibration": tokens, "samples": WINDOWS, "length": LENGTH, **OPTIONS[name]}
    report = ss.prune(MODEL, **options, out=out, **machine)
    return {"hash": hash_of(load_file(out / "masks.safetensors")), "error": report.error}


def fingerprint() -> dict[str, str]:
    """What bits may depend on: other processors round products of matrices differently."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0].partition(":")[2].strip() if names else "",
    }


def hash_of(masks: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of packed masks by name, in the order of the names."""
    digest = hashlib.sha256()
    for layer in sorted(masks):
        digest.update(layer.encode() + b"\0" + masks[layer].tobytes())
    return digest.hexdigest()


def main() -> None:
    """Print the hashes of all options, one thread and one process; ``--all``: in every way of running."""
    torch.set_num_threads(1)
    ways: list[tuple[int, bool]] = [(1, False)]
    if "--all" in sys.argv:
        ways += [(1, True), (2, False), (2, True)]
    found: dict[str, Any] = {"machine": fingerprint(), "options": {}}
    with tempfile.TemporaryDirectory() as folder:
        tokens = token_file(Path(folder))
        for number, (count, offload) in enumerate(ways):
            for name in OPTIONS:
                if offload and name in IN_MEMORY_ONLY:
                    continue
                out = Path(folder) / f"{number}" / name.replace(":", "-")
                result = _run_in(count, name, tokens, out, offload)
                same = found["options"].setdefault(name, result)["hash"] == result["hash"]
                sys.stderr.write(
                    f"{name}, {count} processes, offload {offload}: {'same' if same else 'DIFFERS'}\n"
                )
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _run_in(count: int, name: str, tokens: Path, out: Path, offload: bool) -> dict[str, Any]:
    """``run`` in so many processes; what the first one found."""
    machine = {"device": "cpu", "offload": offload}
    if count == 1:
        return run(name, tokens, out, **machine)
    import processes

    results = out.parent / f"{out.name}-results"
    children = processes.start_ranks(
        count, lambda ranks: run(name, tokens, out, ranks=ranks, **machine), results, 600
    )
    codes = [processes.wait(child, 600) for child in children]
    if any(codes):
        raise SystemExit(f"{name}: {processes.results(results, range(count))}")
    return dict(processes.results(results, [0])[0])


if __name__ == "__main__":
    main()
