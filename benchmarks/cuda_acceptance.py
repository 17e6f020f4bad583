"""Acceptance of the CUDA path: one command, offline, under nine minutes on an H100 or H200.

    PYTHONPATH=. python benchmarks/cuda_acceptance.py     # on the card, from a checkout
    PYTHONPATH=. python benchmarks/cuda_acceptance.py --device cpu --shrink 64

Every stage has a time limit and fails by itself. Results are lines of PASS, FAIL or INFO with what was
measured and what was expected, and a JSON file named by the card in ``--out`` (by default the folder in the
variable OUT, else ``benchmarks/results/cuda``). Needed are torch, triton, transformers, accelerate, numba,
scipy, safetensors, typer, rich and joblib; the package need not be installed. With ``--device cpu`` the same
script runs where there is no card.

Goals in seconds are those of full widths on a card; elsewhere they are measured only. The exit status is 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from acceptance.bench import Bench, Stage, Verdict
from acceptance.ceilings import ceilings
from acceptance.data import gram_sums, labels, traffic
from acceptance.search import certified, limits, others, repeatable, shapes, specification
from acceptance.whole import end_to_end

from sparseswaps.machine import versions

RESULTS = Path(__file__).parent / "results" / "cuda"
# together 525 s
STAGES = (
    Stage("ceilings", 20, ceilings),
    Stage("specification", 90, specification),
    Stage("repeatable", 35, repeatable),
    Stage("certified", 35, certified),
    Stage("shapes", 120, shapes),
    Stage("limits", 20, limits),
    Stage("others", 50, others),
    Stage("gram sums", 20, gram_sums),
    Stage("labels", 15, labels),
    Stage("traffic", 5, traffic),
    Stage("end to end", 115, end_to_end),
)


def card_name(device: torch.device) -> str:
    """Name of the card, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def folder_of(given: Path | None, device: torch.device) -> Path | None:
    """Where the JSON file goes; nowhere for a dry run of which nothing is said."""
    if given is not None:
        return given
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    return RESULTS if device.type == "cuda" else None


def table(bench: Bench) -> str:
    """All findings, aligned."""
    cells = [("", "stage", "finding", "measured", "expected")]
    cells += [(row.verdict, row.stage, row.name, row.measured, row.expected) for row in bench.rows]
    widths = [max(len(row[k]) for row in cells) for k in range(4)]
    lines = (zip(row[:4], widths, strict=True) for row in cells)
    shown = ["  ".join(cell.ljust(width) for cell, width in line) for line in lines]
    return "\n".join(f"{line}  {row[4]}".rstrip() for line, row in zip(shown, cells, strict=True))


def main() -> None:
    """Run the stages, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="only these")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    bench = Bench(device, args.shrink)
    facts = {
        "card": card_name(device),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {**versions(), "cuda": torch.version.cuda},
        "shrink": args.shrink,
    }
    begin = time.perf_counter()
    for stage in STAGES:
        if not args.stages or stage.name in args.stages:
            bench.run(stage)
    seconds = time.perf_counter() - begin
    print(f"\n{table(bench)}\n")
    counts = {verdict: sum(row.verdict is verdict for row in bench.rows) for verdict in Verdict}
    print(f"{facts['card']}: " + ", ".join(f"{n} {v}" for v, n in counts.items()) + f", {seconds:.0f} s")
    folder = folder_of(args.out, device)
    if folder is not None:
        found = {
            **facts,
            "seconds": {**bench.seconds, "all": seconds},
            "rows": [asdict(row) | {"measured": row.measured} for row in bench.rows],
        }
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", card_name(device).lower()).strip("-")
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(bench.failed))


if __name__ == "__main__":
    main()
