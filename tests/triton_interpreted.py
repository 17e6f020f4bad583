"""Run by test_kernels_cuda with TRITON_INTERPRET=1: the Triton kernel against the torch specification."""

import sys

import torch
from swap_oracle import smallest_change

import sparseswaps as ss
from sparseswaps.solvers.kernels import cuda, reference
from sparseswaps.solvers.kernels.interface import DescentOptions, ScaledProblem
from sparseswaps.solvers.search import local_search

# small tiles, so that small layers have several and odd ones
cuda.BLOCK, cuda.LINES, cuda.LINE_BLOCK, cuda.COST_COLS = 32, 4, 16, 32


def check(family: str, rows: int, cols: int, pattern: str, dtype: torch.dtype, drift: bool) -> None:
    problem = ss.synthetic_layer(family, rows, cols, pattern, seed=cols)
    if drift:
        generator = torch.Generator().manual_seed(1)
        lost = 0.1 * torch.randn((cols, cols), generator=generator, dtype=torch.float64)
        gram, weight = problem.gram.matrix, problem.weight.double()
        constant = ((weight @ lost @ gram @ lost.T) * weight).sum(1).clamp_min(0)
        problem = ss.LayerProblem(
            problem.weight, problem.gram, problem.pattern, ss.Drift(weight @ lost @ gram, constant)
        )
    start = ss.solve(problem, ss.Wanda())
    scaled = local_search.scaled_rows(problem, start.mask, slice(0, rows))
    part = local_search.at_scale(problem, scaled, problem.gram.correlation64.to(dtype))
    for search, max_swaps in (("lazy", None), ("best", None), ("lazy", 2), ("best", 0)):
        options = DescentOptions(1e-6, max_swaps, search)
        results = [module.descend(part, start.mask, options) for module in (reference, cuda)]
        label = f"{family} {rows}x{cols} {pattern} {dtype} drift={drift} {search} {max_swaps}"
        exact, found = results
        torch.testing.assert_close(found.error, exact.error, rtol=1e-5, atol=1e-12, msg=label)
        if dtype == torch.float64:
            for name, ours, theirs in zip(exact._fields[:4], found[:4], exact[:4], strict=True):
                assert torch.equal(ours, theirs), f"{label}: {name}"
        rows_done = found.converged & found.resolved
        if max_swaps is None:
            assert bool((found.converged | ~found.resolved).all()), label
            linear = None if problem.drift is None else problem.drift.linear
            lowest = torch.from_numpy(
                smallest_change(
                    problem.weight, problem.gram.matrix, found.mask, problem.pattern.block, linear
                )
            )
            size = (problem.scaled_weight.masked_fill(found.mask, 0) ** 2).sum(1)
            if problem.scaled_drift is not None:
                size = size + (problem.scaled_drift**2).amax(1)
            limit = 1e-6 * start.row_objectives + 1e-13 * size
            assert bool((lowest >= -limit)[rows_done].all()), label


def check_out_of_memory() -> None:
    """Batches that do not fit are halved until they do, with the same result."""
    problem = ss.synthetic_layer("correlated", 5, 20, "0.5", seed=1)
    mask = ss.solve(problem, ss.Wanda()).mask
    scaled = local_search.scaled_rows(problem, mask, slice(0, 5))
    part = local_search.at_scale(problem, scaled, problem.gram.correlation64)
    arguments = (part, mask, DescentOptions(1e-6))
    whole = cuda.descend(*arguments)
    descend_batch = cuda._descend_batch
    sizes = []

    def small_memory(batch: ScaledProblem, *rest: object) -> object:
        sizes.append(len(batch.weight))
        if len(batch.weight) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return descend_batch(batch, *rest)

    cuda._descend_batch = small_memory
    try:
        halved = cuda.descend(*arguments)
    finally:
        cuda._descend_batch = descend_batch
    assert sizes == [5, 3, 2, 2, 1]
    for ours, theirs in zip(whole, halved, strict=True):
        # the float64 product of the starting error depends on the size of the batch in the last digit
        torch.testing.assert_close(ours, theirs)


def main() -> None:
    """Every family, pattern, width and dtype that the kernel must cover."""
    for family in ("correlated", "duplicates", "zero-channels", "rank-one"):
        check(family, 1, 23, "0.5", torch.float64, drift=False)
    for pattern in ("0.05", "0.95"):
        check("correlated", 1, 37, pattern, torch.float64, drift=True)
    check("correlated", 2, 24, "2:4", torch.float64, drift=False)
    check("weakly-correlated", 1, 24, "1:8", torch.float64, drift=True)
    check("correlated", 1, 80, "20:40", torch.float64, drift=False)
    check("correlated", 2, 35, "0.5", torch.float32, drift=False)
    check("correlated", 1, 24, "2:4", torch.float32, drift=True)
    check_out_of_memory()
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
