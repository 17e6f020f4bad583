"""The swap engine against brute force, in one run and on one instance.

    python benchmarks/engine.py --cols 1024 4096 --rows 256 --out benchmarks/results/engine.md

Compared on each layer, 1-swap from Wanda's mask at 50 % (``--pattern``):

- ours: ``OneSwap`` lazy and best, to the certificate and (best) with 100 swaps, greedy and tabu;
- (a) an eager torch brute force: all kept × pruned pairs as one float32 matrix per row and swap;
- (b) the same under ``torch.compile``;
- (c) with ``--c-engine PATH``, a compiled engine: a shared library with the function ``run2``.

(a) and (b) make ``--brute-swaps`` swaps on ``--brute-rows`` rows; their time for 100 swaps of all rows is
extrapolated from that, which favours neither: the cost of a swap does not depend on the row or on how
many came before. Ours and (c) run on all rows. Wall seconds are what counts; processor seconds are
printed beside them because they stay comparable on a busy machine. ``--instance`` takes instance files of
real layers instead of synthetic ones.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from output import publish
from torch import Tensor

import sparseswaps as ss

PAPER_SWAPS = 100


class Timing(NamedTuple):
    """Seconds of the wall clock and of the processor."""

    wall: float
    processor: float

    def times(self, factor: float) -> Timing:
        """Both ``factor`` times."""
        return Timing(self.wall * factor, self.processor * factor)


def timed(work: Callable[[], object]) -> tuple[object, Timing]:
    """Result and timing of ``work``."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, Timing(time.perf_counter() - wall, time.process_time() - processor)


def best_pair(R: Tensor, y: Tensor, cost: Tensor, mask: Tensor) -> Tensor:
    """Brute force: the pair with the lowest Δ of one row, ``u · cols + p``."""
    delta = torch.where(mask, y, -y)
    q = delta * delta + 2 * delta * cost
    of_kept = torch.where(mask, q, torch.inf)
    of_pruned = torch.where(mask, torch.inf, q)
    change = of_kept[:, None] + of_pruned[None, :] + 2 * delta[:, None] * delta[None, :] * R
    return change.flatten().argmin()


def brute_force(
    problem: ss.LayerProblem, mask: Tensor, rows: int, swaps: int, pair: Callable[..., Tensor]
) -> Tensor:
    """``swaps`` best swaps of the first ``rows`` rows."""
    R, mask = problem.gram.correlation, mask[:rows].clone()
    for row in range(rows):
        y = problem.scaled_weight[row].float()
        y = y / y.abs().amax()
        cost = (y * ~mask[row]) @ R
        for _ in range(swaps):
            chosen = int(pair(R, y, cost, mask[row]))
            pruned, restored = divmod(chosen, problem.cols)
            cost = cost + y[pruned] * R[pruned] - y[restored] * R[restored]
            mask[row, pruned], mask[row, restored] = False, True
    return mask


def compiled_engine(path: Path, problem: ss.LayerProblem, mask: Tensor, tolerance: float) -> Tensor:
    """Masks of the shared library's lazy descent, its matrix product included; columns in sixteens."""
    run = ctypes.CDLL(str(path)).run2

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    R = problem.gram.correlation.numpy()
    y = problem.scaled_weight
    y = np.ascontiguousarray((y / y.abs().amax(1, keepdim=True)).float().numpy())
    kept = np.ascontiguousarray(mask.numpy().astype(np.uint8))
    root = (problem.gram.largest_correlation.double().sqrt() * 1.00001).float().numpy()
    cost = np.ascontiguousarray((torch.from_numpy(y * (1 - kept)) @ torch.from_numpy(R)).numpy())
    out = np.zeros((problem.rows, 8))
    run(
        pointer(R),
        problem.cols,
        pointer(y),
        pointer(cost),
        pointer(kept),
        problem.rows,
        pointer(root),
        0,
        0,
        8,
        0,
        ctypes.c_double(tolerance),
        pointer(out),
    )
    return torch.from_numpy(kept).bool()


def measure(problem: ss.LayerProblem, args: argparse.Namespace) -> list[str]:
    """Table rows of one layer."""
    rows = problem.rows
    gram = problem.gram
    # the normalised Gram is shared by every method: computed before, timed by itself
    _, normalise = timed(lambda: (gram.correlation, gram.largest_correlation, problem.scaled_weight))
    wanda = ss.solve(problem, ss.Wanda())
    lines = [
        f"\n## {problem.name}: {rows} x {problem.cols}, {problem.pattern}\n",
        f"Normalised Gram: {normalise.wall:.2f} s (once per layer, not in the table).\n",
        "| method | wall s | processor s | of lazy | error / Wanda | swaps per row | certified |",
        "|---|---|---|---|---|---|---|",
    ]
    solvers: dict[str, ss.Solver] = {
        "1-swap lazy": ss.OneSwap(),
        "1-swap best": ss.OneSwap(search="best"),
        "1-swap best, 100 swaps": ss.OneSwap(PAPER_SWAPS, search="best"),
        "1-swap lazy, 100 swaps": ss.OneSwap(PAPER_SWAPS),
        "greedy": ss.Greedy(),
        "greedy, then 1-swap lazy": ss.Chain(ss.Greedy(), ss.OneSwap()),
        "tabu": ss.Tabu(),
        "greedy, then tabu": ss.Chain(ss.Greedy(), ss.Tabu()),
    }
    base: Timing | None = None

    def add(
        label: str, timing: Timing, error: float | None, swaps: object = "", certified: object = ""
    ) -> None:
        nonlocal base
        base = base or timing
        share = "" if error is None else f"{error / wanda.objective:.4f}"
        lines.append(
            f"| {label} | {timing.wall:.2f} | {timing.processor:.2f} | "
            f"{timing.processor / base.processor:.2f} | {share} | {swaps} | {certified} |"
        )
        print(lines[-1], flush=True)

    warm_up = problem.slice_rows(slice(0, 2))
    final: dict[str, Tensor] = {}
    for label, solver in solvers.items():
        if args.methods and label not in args.methods:
            continue
        ss.solve(warm_up, solver)  # compiled before the clock starts
        solution, timing = timed(lambda solver=solver: solver.run(problem, None, ss.Budget()))
        assert isinstance(solution, ss.Outcome)
        assert solution.mask is not None
        final[label] = solution.mask
        errors = problem.row_objectives(solution.mask)
        worse = int((errors > wanda.row_objectives * (1 + 1e-9)).sum())
        stats = solution.stats
        certified = f"{float(stats['certified'].double().mean()):.3f}" if "certified" in stats else ""
        swaps = f"{float(stats['swaps'].double().mean()):.1f}" if "swaps" in stats else ""
        add(
            label + (f" ({worse} rows worse than Wanda)" if worse else ""),
            timing,
            float(errors.sum()),
            swaps,
            certified,
        )
    if args.c_engine is not None and problem.cols % 16 == 0:
        mask, timing = timed(lambda: compiled_engine(args.c_engine, problem, wanda.mask, 1e-6))
        assert isinstance(mask, Tensor)
        add("compiled C engine, lazy", timing, problem.objective(mask))
    some = min(args.brute_rows, rows)
    factor = rows * PAPER_SWAPS / (some * args.brute_swaps)
    for label, pair in (("eager", best_pair), ("torch.compile", torch.compile(best_pair))):
        brute_force(problem, wanda.mask, 1, 1, pair)
        mask, timing = timed(lambda pair=pair: brute_force(problem, wanda.mask, some, args.brute_swaps, pair))
        assert isinstance(mask, Tensor)
        ours = ss.solve(
            problem.slice_rows(slice(0, some)), ss.OneSwap(args.brute_swaps, search="best"), wanda.mask[:some]
        )
        same = float((ours.mask == mask).all(1).double().mean())
        add(
            f"{label} brute force, 100 swaps, extrapolated",
            timing.times(factor),
            None,
            "100",
            f"same mask {same:.2f}",
        )
    reference = wanda.row_objectives
    certifiable = next(iter(final.values()))
    certificate, timing = timed(lambda: ss.certify(problem, certifiable, reference=reference))
    assert isinstance(certificate, ss.Certificate)
    lines.append(
        f"\nCertificate of the first method's masks in float64: {certificate.share:.4f} of the rows,"
    )
    lines.append(f"{timing.wall:.2f} s. Peak memory of the process so far: {peak_memory():.2f} GB.")
    return lines


def peak_memory() -> float:
    """Largest resident set of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure and print; with ``--out`` also write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cols", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--rows", type=int, default=256, help="rows of a synthetic layer")
    parser.add_argument("--family", default="correlated")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instance", type=Path, nargs="*", default=[], help="instance files of real layers")
    parser.add_argument("--methods", nargs="*", help="only these of our methods, by their label")
    parser.add_argument("--brute-rows", type=int, default=2)
    parser.add_argument("--brute-swaps", type=int, default=3)
    parser.add_argument("--c-engine", type=Path, help="shared library of a compiled engine")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    report = [
        "# Swap engine against brute force\n",
        f"{datetime.now(UTC):%Y-%m-%d}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        "`benchmarks/engine.py` says what is measured and how brute force is extrapolated. "
        '"of lazy" is the ratio of processor seconds to those of the lazy 1-swap.',
    ]
    for path in args.instance:
        report += measure(ss.load_instance(path), args)
    for cols in args.cols:
        layer = ss.synthetic_layer(args.family, args.rows, cols, args.pattern, args.seed, tokens=2 * cols)
        report += measure(layer, args)
    text = "\n".join(report) + "\n"
    publish(text, args.out)


if __name__ == "__main__":
    main()
