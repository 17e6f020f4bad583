"""The search: equal to its specification, repeatable, certified, fast, and stopped in time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from llm_scale import BLOCKS, SHAPES, correlated_gram, random_weight
from torch import Tensor

import sparseswaps as ss
from sparseswaps.solvers.kernels import kernels_for, reference
from sparseswaps.solvers.kernels.interface import DescentOptions, ScaledProblem
from sparseswaps.solvers.search.local_search import at_scale, scaled_rows

from .bench import Bench

PAPER_SWAPS = 100
# Families whose rows have exact ties: rounding decides which of two equal swaps comes first.
TIED = ("duplicates", "rank-one")
FAMILIES = ("correlated", "weakly-correlated", "zero-channels", "collinear", "huge-range", *TIED)
# Width and pattern: blocks of 2 to 1024 columns, and a width that no power of two divides.
CASES = (
    (30, "0.5"), (64, "1:2"), (64, "2:4"), (64, "4:8"), (64, "0.75"), (64, "16:32"), (128, "32:64"),
    (256, "64:128"), (512, "128:256"), (1024, "256:512"), (1024, "0.5"),
)  # fmt: skip
# Seconds of all blocks together.
SEARCH_GOAL = 60.0


@functools.cache
def gram(cols: int, device: torch.device) -> ss.Gram:
    """Activations of ``llm_scale`` with what every search shares computed."""
    found = correlated_gram(cols, 2 * cols, device, seed=cols)
    _ = found.correlation, found.largest_correlation
    return found


def layer(bench: Bench, rows: int, cols: int, pattern: str = "0.5") -> ss.LayerProblem:
    """A layer of ``llm_scale``."""
    weight = random_weight(rows, cols, bench.device)
    return ss.LayerProblem(weight, gram(cols, bench.device), ss.Pattern.parse(pattern, cols))


def one_swap(problem: ss.LayerProblem, solver: ss.Solver | None = None, **limits: float) -> ss.Outcome:
    """What 1-swap claims, without the checks of ``solve``."""
    return (solver or ss.OneSwap()).run(problem, None, ss.Budget(**limits))


def mask_of(outcome: ss.Outcome) -> Tensor:
    """The mask of an outcome."""
    if outcome.mask is None:
        raise RuntimeError("a search: expected a mask, found none")
    return outcome.mask


def mean(outcome: ss.Outcome, name: str) -> float:
    """Mean over the rows of one of the counters."""
    return float(outcome.stats[name].double().mean())


def drifted(family: str, rows: int, cols: int, pattern: str, drift: bool) -> ss.LayerProblem:
    """A synthetic layer, with drift where the dense inputs were a little different."""
    problem = ss.synthetic_layer(family, rows, cols, pattern, seed=cols)
    if not drift:
        return problem
    inputs = ss.synthetic_activations(family, cols, 4 * cols, seed=cols)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(cols), dtype=inputs.dtype)
    dense = inputs + 0.1 * inputs.abs().mean(0) * noise
    return ss.LayerProblem.from_target(
        problem.weight, inputs, dense @ problem.weight.double().T, problem.pattern
    )


def in_float64(problem: ss.LayerProblem, mask: Tensor) -> ScaledProblem:
    """All rows as the kernels take them."""
    scaled = scaled_rows(problem, mask, slice(0, problem.rows))
    return at_scale(problem, scaled, problem.gram.correlation64)


def on_device(problem: ScaledProblem, device: torch.device) -> ScaledProblem:
    """The same rows on a device."""
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return replace(problem, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


def cases(bench: Bench) -> Iterator[tuple[str, ss.LayerProblem]]:
    """Families, widths and patterns up to the width that the bench allows, with and without drift."""
    widest = max(bench.size(1024), 64)
    for number, (cols, pattern) in enumerate(case for case in CASES if case[0] <= widest):
        for family in FAMILIES if cols <= 128 else FAMILIES[:2]:
            for drift in (False, True) if family in FAMILIES[:2] else (number % 2 == 0,):
                name = f"{family} {cols} {pattern}{' with drift' if drift else ''}"
                yield name, drifted(family, 8, cols, pattern, drift)


def equal_rows(bench: Bench, problem: ss.LayerProblem) -> Tensor:
    """Rows (rows,) in which masks, swaps, flags and the best swap are those of the specification."""
    kernels = kernels_for(bench.device)
    start = ss.solve(problem, ss.Wanda()).mask
    part = in_float64(problem, start)
    there, mask = on_device(part, bench.device), start.to(bench.device)
    optimum, lowest = reference.best_swaps(part, start), kernels.best_swaps(there, mask)
    equal = torch.isclose(optimum.change, lowest.change.cpu(), rtol=1e-9, atol=1e-13)
    for options in (DescentOptions(1e-6), DescentOptions(1e-6, search="best"), DescentOptions(1e-6, 2)):
        exact = reference.descend(part, start, options)
        found = kernels.descend(there, mask, options)
        equal &= (exact.mask == found.mask.cpu()).all(1)
        for column in ("swaps", "converged", "resolved"):
            equal &= getattr(exact, column) == getattr(found, column).cpu()
    return equal


def specification(bench: Bench) -> None:
    """Masks, swaps and flags in float64 are those of the specification on the CPU."""
    same, total, tied_same, tied = 0, 0, 0, 0
    left_out = []
    for name, problem in cases(bench):
        if bench.left() < 2:
            left_out.append(name)
            continue
        equal = equal_rows(bench, problem)
        if name.split()[0] in TIED:
            tied_same, tied = tied_same + int(equal.sum()), tied + len(equal)
            continue
        same, total = same + int(equal.sum()), total + len(equal)
        if not bool(equal.all()):
            bench.info("rows that differ", f"{name}: {int((~equal).sum())} of {len(equal)}")
    bench.check("float64 rows equal to the specification", same == total, f"{same} of {total}", "all")
    bench.info("the same of families with exact ties", f"{tied_same} of {tied}", "most")
    if left_out:
        bench.check("layers left out for lack of time", False, f"{len(left_out)}, from {left_out[0]} on", "0")


def repeatable(bench: Bench) -> None:
    """Three runs are equal bit for bit, rows do not see each other, no setting turns products into tf32."""
    problem = layer(bench, bench.size(2048, 32), bench.size(4096, 64))
    masks = [mask_of(one_swap(problem)) for _ in range(3)]
    differing = sum(int((mask != masks[0]).any(1).sum()) for mask in masks[1:])
    bench.check("three runs, rows that differ", differing == 0, differing, "0; a difference is a race")
    half = problem.rows // 2
    parts = [problem.slice_rows(rows) for rows in (slice(0, half), slice(half, None))]
    halves = torch.cat([mask_of(one_swap(part)) for part in parts])
    share = float((halves == masks[0]).all(1).double().mean())
    bench.check("rows in halves, share with the same mask", share >= 0.98, share, "0.98 or more")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        other = mask_of(one_swap(problem))
    finally:
        torch.set_float32_matmul_precision(before)
    differing = int((other != masks[0]).any(1).sum())
    bench.check("tf32 allowed by setting, rows that differ", differing == 0, differing, "0")


def certified(bench: Bench) -> None:
    """What the device calls optimal is so on the CPU in float64, and as good as what the CPU finds."""
    problem = layer(bench, bench.size(1024, 32), bench.size(4096, 64))
    outcome = one_swap(problem)
    share = mean(outcome, "certified")
    bench.check("rows that the search certifies", share == 1, share, "1")
    some = slice(0, 16)
    here, mask = problem.slice_rows(some).to("cpu"), mask_of(outcome)[some].cpu()
    wanda = ss.solve(here, ss.Wanda())
    certificate = ss.certify(here, mask, reference=wanda.row_objectives)
    bench.check("rows that float64 on the CPU certifies", certificate.holds, certificate.share, "1")
    bench.in_time("error against the CPU", 5)
    ours = ss.solve(here, ss.OneSwap())
    ratio = float(here.row_objectives(mask).sum() / ours.row_objectives.sum())
    bench.check("error against that of the CPU", abs(ratio - 1) < 5e-3, ratio, "1 ± 0.005")


def best_pairs(R: Tensor, y: Tensor, cost: Tensor, mask: Tensor) -> Tensor:
    """Brute force: the pair with the lowest Δ of each row, ``u · cols + p`` (rows,)."""
    delta = torch.where(mask, y, -y)
    q = delta * delta + 2 * delta * cost
    kept, pruned = torch.where(mask, q, torch.inf), torch.where(mask, torch.inf, q)
    change = kept[:, :, None] + pruned[:, None, :] + 2 * delta[:, :, None] * delta[:, None, :] * R
    return change.flatten(1).argmin(1)


def brute_force(problem: ss.LayerProblem, mask: Tensor, swaps: int, pairs: Callable[..., Tensor]) -> Tensor:
    """``swaps`` best swaps of each row, as the paper makes them."""
    R, mask = problem.gram.correlation, mask.clone()
    y = problem.scaled_weight.float()
    y = y / y.abs().amax(1, keepdim=True)
    cost = y.masked_fill(mask, 0) @ R
    row = torch.arange(problem.rows, device=mask.device)
    for _ in range(swaps):
        chosen = pairs(R, y, cost, mask)
        u, p = chosen // problem.cols, chosen % problem.cols
        cost = cost + y[row, u, None] * R[u] - y[row, p, None] * R[p]
        mask[row, u], mask[row, p] = False, True
    return mask


def brute_seconds(bench: Bench, problem: ss.LayerProblem, mask: Tensor) -> tuple[float, str]:
    """Seconds of the paper's 100 best swaps of all rows, from a few of both; compiled where that works."""
    rows, swaps = max(1, min(8, (1 << 28) // problem.cols**2)), 3
    few, start = problem.slice_rows(slice(0, rows)), mask[:rows]
    pairs: Callable[..., Tensor] = best_pairs
    how = "not compiled"
    if bench.on_card:
        try:
            pairs = torch.compile(best_pairs, dynamic=False)
            brute_force(few, start, 1, pairs)
            how = "torch.compile"
        except Exception as error:
            bench.info("torch.compile of brute force", f"{type(error).__name__}: {str(error)[:100]}")
            pairs = best_pairs
    brute_force(few, start, 1, pairs)
    _, seconds = bench.timed(lambda: brute_force(few, start, swaps, pairs))
    return seconds * problem.rows / rows * PAPER_SWAPS / swaps, how


def shapes(bench: Bench) -> None:
    """Seconds of each shape of Llama 3 8B and of its whole model, beside the paper's brute force."""
    totals: dict[str, float] = {}
    for name, full_rows, full_cols, copies in SHAPES:
        rows, cols = bench.size(full_rows, 16), bench.size(full_cols, 64)
        for pattern in ("0.5", "2:4"):
            bench.in_time(f"{name} at {pattern}", 2)
            problem = layer(bench, rows, cols, pattern)
            wanda = ss.solve(problem, ss.Wanda())
            searches = {"certificate": ss.OneSwap(), f"{PAPER_SWAPS} swaps": ss.OneSwap(PAPER_SWAPS)}
            for label, solver in searches.items() if pattern == "0.5" else list(searches.items())[:1]:
                one_swap(problem.slice_rows(slice(0, 2)), solver)  # compiled before the clock starts
                if bench.on_card:
                    torch.cuda.reset_peak_memory_stats(bench.device)
                work = functools.partial(one_swap, problem, solver, seconds=max(bench.left(), 1.0))
                outcome, seconds = bench.timed(work)
                key = f"{pattern}, {label}"
                totals[key] = totals.get(key, 0.0) + BLOCKS * copies * seconds
                quality = problem.objective(mask_of(outcome)) / wanda.objective
                peak = f", peak {torch.cuda.max_memory_allocated(bench.device) / 1e9:.1f} GB" * bench.on_card
                bench.info(
                    f"{name}, {rows} x {cols}, {key}", seconds,
                    f"{mean(outcome, 'swaps'):.0f} swaps a row, {mean(outcome, 'certified'):.3f} certified, "
                    f"error over Wanda's {quality:.4f}{peak}", "s",
                )  # fmt: skip
            if pattern == "0.5":
                seconds, how = brute_seconds(bench, problem, wanda.mask)
                totals["brute force"] = totals.get("brute force", 0.0) + BLOCKS * copies * seconds
                bench.info(f"{name}, brute force, {PAPER_SWAPS} swaps", seconds, f"{how}, extrapolated", "s")
    for key, seconds in totals.items():
        if key == "0.5, certificate":
            bench.goal("whole model, 0.5", seconds <= SEARCH_GOAL, seconds, f"at most {SEARCH_GOAL:g}", "s")
            bench.info("whole model, times faster than brute force", totals["brute force"] / seconds)
        else:
            bench.info(f"whole model, {key}", seconds, "", "s")


class Interrupter:
    """Progress that presses Ctrl-C at its first call."""

    def __init__(self) -> None:
        self.pressed = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Press."""
        self.pressed = time.perf_counter()
        raise KeyboardInterrupt


def limits(bench: Bench) -> None:
    """A time limit, progress and Ctrl-C reach a search that would take long."""
    problem = layer(bench, bench.size(4096, 64), bench.size(14336, 224))
    one_swap(problem.slice_rows(slice(0, 2)))
    calls: list[tuple[float, int]] = []
    begin = time.perf_counter()
    budget = ss.Budget(0.5, lambda done, _total: calls.append((time.perf_counter() - begin, done)))
    outcome, seconds = bench.timed(lambda: ss.OneSwap().run(problem, None, budget))
    bench.check("a limit of 0.5 s ends after", seconds <= 1.5, seconds, "at most 1.5", "s")
    feasible = problem.is_feasible(mask_of(outcome))
    bench.check("its mask has the pattern", feasible, str(feasible), "True")
    bench.check("calls of progress under it", len(calls) > 0, len(calls), "1 or more")
    bench.in_time("Ctrl-C", 5)
    interrupter = Interrupter()
    name = "Ctrl-C from progress ends the search after"
    try:
        ss.OneSwap().run(problem, None, ss.Budget(progress=interrupter))
    except KeyboardInterrupt:
        seconds = time.perf_counter() - interrupter.pressed
        bench.check(name, seconds <= 1, seconds, "at most 1", "s")
    else:
        bench.check(name, False, "it went on", "at most 1 s")


def per_row(bench: Bench, problem: ss.LayerProblem, work: Callable[[ss.LayerProblem], object]) -> float:
    """Seconds of ``work`` per row, of as many rows as a fifth of the stage's time allows."""
    rows = min(4, problem.rows)
    work(problem.slice_rows(slice(0, rows)))
    while True:
        some = problem.slice_rows(slice(0, rows))
        _, seconds = bench.timed(lambda some=some: work(some))
        more = min(8 * rows, problem.rows)
        if more == rows or seconds * more / rows > bench.left() / 5:
            return seconds / rows
        rows = more


def others(bench: Bench) -> None:
    """Certificates, tabu, greedy and the budget of a layer: as good as they should be, and how long."""
    width = bench.size(4096, 64)
    problem = layer(bench, bench.size(1024, 64), width)
    start = mask_of(one_swap(problem))

    def whole(name: str, seconds: float, expected: str) -> None:
        bench.info(f"{name}, {width} x {width}", seconds * width, expected, "s")

    few = problem.slice_rows(slice(0, 8))
    wanda = ss.solve(few, ss.Wanda()).row_objectives
    bench.check("certify", ss.certify(few, start[:8], reference=wanda).holds, "holds", "holds")
    seconds = per_row(bench, problem, lambda some: ss.certify(some, start[: some.rows]))
    whole("certify", seconds, "under 0.2; a whole model in a minute")
    bench.in_time("tabu", 2)
    walked = mask_of(ss.Tabu().run(few, start[:8], ss.Budget(max(bench.left() / 3, 1))))
    ratio = float(few.row_objectives(walked).sum() / few.row_objectives(start[:8]).sum())
    bench.check("tabu's error over its start", ratio <= 1 + 1e-6, ratio, "at most 1")
    seconds = per_row(bench, problem, lambda some: ss.Tabu().run(some, start[: some.rows], ss.Budget()))
    whole("tabu", seconds, "a few times 1-swap's")
    bench.in_time("greedy", 2)
    ratio = ss.solve(few, ss.Chain(ss.Greedy(), ss.OneSwap())).objective / few.objective(start[:8])
    bench.check("greedy and 1-swap, error over 1-swap's", ratio < 1.05, ratio, "about 0.97, below 1.05")
    seconds = per_row(bench, problem, lambda some: ss.Greedy().run(some, None, ss.Budget()))
    whole("greedy", seconds, "1")
    budgeted(bench)


def budgeted(bench: Bench) -> None:
    """1-swap with one budget for the whole layer."""
    bench.in_time("the budget of a layer", 2)
    problem = layer(bench, bench.size(256, 16), bench.size(4096, 64), "layer:0.5")
    wanda = ss.solve(problem, ss.Wanda())
    work = functools.partial(one_swap, problem, seconds=max(min(bench.left() / 2, 10), 1))
    outcome, seconds = bench.timed(work)
    mask = mask_of(outcome)
    ratio = problem.objective(mask) / wanda.objective
    passed = problem.is_feasible(mask) and ratio < 1
    bench.check("budget of a layer, error over Wanda's", passed, ratio, "below 1")
    exchanges = float(outcome.stats["exchanges"].sum()) / 2
    bench.info(
        f"budget of a layer, exchanges a second, {problem.rows} rows", exchanges / seconds,
        f"more than 2000; {exchanges:.0f} in {seconds:.1f} s, {outcome.status}",
    )  # fmt: skip
