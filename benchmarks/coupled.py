"""How far sweeps over rows end from the optimum of a layer under an output metric.

A few rows and columns of real layers of the bundled model, with the output metric of the whole layer
restricted to these rows, are one small quadratic program in S ⊗ G that branch and bound proves. Prints, for
each size, the mean gap to the proven optimum of the mask that ignores the coupling, of the sweeps, and of
1-swap on the coupled row, and how often each is optimal.

    python benchmarks/coupled.py [--layers 12] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import sparseswaps as ss
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.calibration.windows import calibration_windows
from sparseswaps.demo import MODEL
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model

SIZES = ((2, 16), (4, 16), (4, 24), (8, 16))
SECONDS = 20.0
# A gap of less is an optimum: the branch and bound's own limit.
OPTIMAL = 1e-5


def problems(count: int, rows: int, cols: int) -> list[ss.LayerProblem]:
    """Aligned blocks of ``rows`` outputs and ``cols`` inputs of evenly spread layers."""
    loaded = load_model(MODEL)
    blocks = find_blocks(loaded.model)
    windows = calibration_windows("stdlib", loaded.tokenizer, 16, 256).tokens
    moments = gradient_moments(loaded.model, blocks, windows, 8)
    layers = list(ss.layer_problems(loaded.model, blocks, "0.5", windows))
    chosen = [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]
    found = []
    for number, layer in enumerate(chosen):
        # the most strongly coupled rows: neighbours of one attention head or one group of units
        first = (number * rows) % (layer.rows - rows)
        metric = ss.output_metric(moments[layer.name])[first : first + rows, first : first + rows]
        gram = ss.Gram(layer.gram.matrix[:cols, :cols].clone(), layer.gram.tokens)
        found.append(
            replace(
                layer,
                weight=layer.weight[first : first + rows, :cols].contiguous(),
                gram=gram,
                pattern=ss.SparsityPattern.per_row(cols, 0.5),
                metric=metric,
            )
        )
    return found


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "| rows × cols | layers | proven | rows alone | optimal | sweeps | optimal "
        "| 1-swap on the coupled row | optimal | branch and bound (s) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rows, cols in SIZES:
        gaps: dict[str, list[float]] = {"alone": [], "sweeps": [], "coupled": []}
        proven, seconds = 0, 0.0
        for problem in problems(options.layers, rows, cols):
            one = ss.coupled_row(problem)
            begin = time.process_time()
            optimum = ss.solve(one, ss.BranchAndBound(time_limit=SECONDS))
            seconds += time.process_time() - begin
            if optimum.gap > OPTIMAL:
                continue
            proven += 1
            masks = {
                "alone": ss.solve(replace(problem, metric=None), ss.OneSwap()).mask,
                "sweeps": ss.solve(problem, ss.RowSweeps(sweeps=10)).mask,
                "coupled": ss.solve(one, ss.OneSwap()).mask,
            }
            for name, mask in masks.items():
                objective = problem.objective(mask.reshape(rows, cols))
                gaps[name].append(max(0.0, 1 - optimum.objective / objective) if objective else 0.0)
        cells = [
            f"{sum(found) / len(found):.2%} | {sum(gap <= OPTIMAL for gap in found) / len(found):.0%}"
            if found
            else "– | –"
            for found in gaps.values()
        ]
        lines.append(
            f"| {rows} × {cols} | {options.layers} | {proven} | {' | '.join(cells)} "
            f"| {seconds / options.layers:.2f} |"
        )
        print(lines[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        head = (
            "# Sweeps over coupled rows against the proven optimum\n\n"
            "`python benchmarks/coupled.py`: real layers of the bundled model at 50 %, under their output "
            "metric. Gaps are the share of the error that the optimum would not have, means over layers; the "
            "seconds are processor time.\n\n"
        )
        (options.out / "coupled.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
