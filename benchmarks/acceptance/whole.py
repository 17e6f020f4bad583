"""A block of Llama 3 8B from checkpoint to saved masks, and what that says of all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .bench import Bench

SCRIPT = Path(__file__).parents[1] / "end_to_end.py"
OBJECTIVES = ("plain", "default", "default,metric")
BLOCKS, WINDOWS, ALL_WINDOWS = 32, 16, 128
# Bytes of the checkpoint of one block with embeddings and head, and of all blocks, in bfloat16.
CHECKPOINT_RATIO = 16.06 / 2.54
# Seconds of the whole run and of its search, with the default objective.
GOAL, SEARCH_GOAL = 300.0, 60.0


def end_to_end(bench: Bench) -> None:
    """One block with each default objective; stages extrapolated to the whole model and text."""
    command = [sys.executable, str(SCRIPT), "--device", str(bench.device), "--shrink", str(bench.shrink)]
    command += ["--blocks", "1", "--windows", str(WINDOWS), "--length", str(bench.size(2048, 64))]
    command += ["--objectives", *OBJECTIVES]
    limit = max(bench.left(), 1.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        output, ending = done.stdout, done.stderr.strip()[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"it stopped after {limit:.0f} s"
    found = re.split(r"^# ", output, flags=re.MULTILINE)[1:]
    for number, objective in enumerate(OBJECTIVES):
        over = number < len(found)
        bench.check(f"end to end, {objective}", over, "ran" if over else ending or "no result", "ran")
        if over:
            report(bench, objective, found[number])


def report(bench: Bench, objective: str, text: str) -> None:
    """Stages of one run, and the whole model's seconds where they follow from one block's."""
    rows, of = re.search(r"(\d+) of (\d+) rows certified", text).groups()  # type: ignore[union-attr]
    bench.check(f"{objective}, rows certified", rows == of, f"{rows} of {of}", "all")
    seconds = {
        name.strip(): float(value) for name, value in re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \|", text, re.M)
    }
    for stage, measured in seconds.items():
        bench.info(f"{objective}, {stage}, one block, {WINDOWS} windows", measured, "", "s")
    if "metric" in objective:
        return  # gradients: the head's share, which does not grow with the blocks, is not known
    search = BLOCKS * seconds["search"]
    calibrate = BLOCKS * seconds["calibrate"] * ALL_WINDOWS / WINDOWS
    files = (seconds["load"] + seconds.get("save", 0.0)) * CHECKPOINT_RATIO
    whole = f"{objective}, {BLOCKS} blocks, {ALL_WINDOWS} windows, extrapolated"
    bench.goal(f"{whole}, search", search <= SEARCH_GOAL, search, f"at most {SEARCH_GOAL:g}", "s")
    total = search + calibrate + files
    expected = f"at most {GOAL:g}; calibrate {calibrate:.0f}, files {files:.0f}"
    bench.goal(f"{whole}, all", total <= GOAL, total, expected, "s")
