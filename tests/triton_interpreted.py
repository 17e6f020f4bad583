"""Run by test_kernels_cuda with TRITON_INTERPRET=1: the Triton kernel against the torch specification."""

import sys

import torch
from swap_oracle import smallest_change

import sparseswaps as ss
from sparseswaps.solvers.kernels import cuda, reference
from sparseswaps.solvers.kernels.interface import Descent, DescentOptions, ScaledProblem
from sparseswaps.solvers.search import local_search

SMALL = {"TILE": 32, "LINES": 4, "LEVEL_TILE": 16}  # so that small layers have several tiles and odd ones
AS_LAUNCHED = {name: getattr(cuda, name) for name in SMALL}
SEARCHES = (
    DescentOptions(1e-6),
    DescentOptions(1e-6, search="best"),
    DescentOptions(1e-6, max_swaps=2),
    DescentOptions(1e-6, max_swaps=0, search="best"),
)
WALK = DescentOptions(1e-6, patience=12, tenure=3)


def tiles(sizes: dict[str, int]) -> None:
    """Programs of these sizes from now on."""
    for name, size in sizes.items():
        setattr(cuda, name, size)


def layer(family: str, rows: int, cols: int, pattern: str, drift: bool) -> ss.LayerProblem:
    """A synthetic layer, with a drift or without."""
    problem = ss.synthetic_layer(family, rows, cols, pattern, seed=cols)
    if not drift:
        return problem
    generator = torch.Generator().manual_seed(1)
    lost = 0.1 * torch.randn((cols, cols), generator=generator, dtype=torch.float64)
    gram, weight = problem.gram.matrix, problem.weight.double()
    constant = ((weight @ lost @ gram @ lost.T) * weight).sum(1).clamp_min(0)
    return ss.LayerProblem(
        problem.weight, problem.gram, problem.pattern, ss.Drift(weight @ lost @ gram, constant)
    )


def scaled_part(problem: ss.LayerProblem, mask: torch.Tensor, dtype: torch.dtype) -> ScaledProblem:
    scaled = local_search.scaled_rows(problem, mask, slice(0, problem.rows))
    return local_search.at_scale(problem, scaled, problem.gram.correlation64.to(dtype))


def assert_optimal(problem: ss.LayerProblem, found: Descent, start_error: torch.Tensor, label: str) -> None:
    """Every swap of every row, by the oracle, against 1e-6 of the starting error."""
    linear = None if problem.drift is None else problem.drift.linear
    lowest = torch.from_numpy(
        smallest_change(problem.weight, problem.gram.matrix, found.mask, problem.pattern.block, linear)
    )
    size = (problem.scaled_weight.masked_fill(found.mask, 0) ** 2).sum(1)
    if problem.scaled_drift is not None:
        size = size + (problem.scaled_drift**2).amax(1)
    # what float64 itself loses of the pruned weights' own size when their sum nearly cancels
    limit = 1e-6 * start_error + 1e-13 * size
    assert bool((found.converged | ~found.resolved).all()), label
    assert bool((lowest >= -limit)[found.converged & found.resolved].all()), label


def check(
    family: str,
    rows: int,
    cols: int,
    pattern: str,
    dtype: torch.dtype = torch.float64,
    drift: bool = False,
    near: bool = False,
) -> None:
    """Descents, walks and best swaps: equal to the specification in float64, optimal in both.

    With ``near`` a lazy descent alone, from a few swaps away from an optimum, so that wide rows take seconds.
    """
    problem = layer(family, rows, cols, pattern, drift)
    start = ss.solve(problem, ss.Wanda())
    if near:
        mask = ss.solve(problem, ss.OneSwap()).mask.clone()
        block = problem.pattern.block
        for first in range(0, cols, block):
            kept, pruned = (side.nonzero()[0, 0] for side in (mask[0, first:], ~mask[0, first:]))
            mask[0, first + kept], mask[0, first + pruned] = False, True
        start = ss.solve(problem, ss.OneSwap(max_swaps=0), mask)
    part = scaled_part(problem, start.mask, dtype)
    # ties of equal channels are broken by rounding: optimal all the same
    exact = dtype == torch.float64 and family not in ("duplicates", "rank-one")
    for options in SEARCHES[:1] if near else (*SEARCHES, WALK):
        theirs, ours = (module.descend(part, start.mask, options) for module in (reference, cuda))
        label = f"{family} {rows}x{cols} {pattern} {dtype} drift={drift} {options}"
        torch.testing.assert_close(ours.error, theirs.error, rtol=1e-5, atol=1e-12, msg=label)
        if exact:
            for name, our, their in zip(theirs._fields[:4], ours[:4], theirs[:4], strict=True):
                assert torch.equal(our, their), f"{label}: {name}"
        if options.max_swaps is None:
            assert_optimal(problem, ours, start.row_objectives, label)
    theirs, ours = (module.best_swaps(part, start.mask) for module in (reference, cuda))
    # sums of a few terms of size 1, the row's scale
    torch.testing.assert_close(ours.change, theirs.change, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    if exact:
        assert torch.equal(ours.pruned, theirs.pruned), (family, cols, pattern)
        assert torch.equal(ours.restored, theirs.restored), (family, cols, pattern)


def check_launches() -> None:
    """Launches of few rows and few swaps go on where the last one ended; memory that runs out, too."""
    problem = layer("correlated", 5, 24, "0.5", drift=True)
    mask = ss.solve(problem, ss.Wanda()).mask
    arguments = (scaled_part(problem, mask, torch.float64), mask, DescentOptions(1e-6))
    whole = cuda.descend(*arguments)
    tiles({"LAUNCH_ROWS": 2, "LAUNCH_SWAPS": 1})
    told: list[int] = []
    for our, their in zip(cuda.descend(*arguments, report=told.append), whole, strict=True):
        # the float64 product of the starting error depends on the size of the batch in the last digit
        torch.testing.assert_close(our, their)
    assert told == [2, 2, 1]
    stopped = cuda.descend(*arguments, deadline=0.0)
    assert torch.equal(stopped.mask, mask)
    assert not stopped.converged.any()
    tiles({"LAUNCH_ROWS": 4096, "LAUNCH_SWAPS": 1024})
    descend_batch, sizes = cuda.descend_batch, []

    def small_memory(batch: ScaledProblem, *rest: object) -> None:
        sizes.append(len(batch.weight))
        if len(batch.weight) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        descend_batch(batch, *rest)

    cuda.descend_batch = small_memory
    try:
        halved = cuda.descend(*arguments)
    finally:
        cuda.descend_batch = descend_batch
    assert sizes == [5, 3, 2, 2, 1]
    for our, their in zip(whole, halved, strict=True):
        torch.testing.assert_close(our, their)


def check_rows_without_pairs() -> None:
    """Rows that a layer's budget keeps or prunes as a whole have no swap."""
    problem = layer("correlated", 3, 40, "0.5", drift=False)
    mask = ss.solve(problem, ss.Wanda()).mask.clone()
    mask[0], mask[1] = True, False
    part = scaled_part(problem, mask, torch.float64)
    found = cuda.best_swaps(part, mask)
    assert found.change[:2].isinf().all()
    assert found.change[2].isfinite()
    assert torch.equal(cuda.descend(part, mask, DescentOptions(1e-6)).mask[:2], mask[:2])


def main() -> None:
    """Every family, pattern, width and dtype that the programs must cover."""
    torch.set_num_threads(1)
    tiles(SMALL)
    for family in ("correlated", "duplicates", "zero-channels", "rank-one"):
        check(family, 1, 23, "0.5")
    for pattern in ("0.05", "0.95"):
        check("correlated", 1, 37, pattern, drift=True)
    check("correlated", 2, 24, "2:4")
    check("correlated", 1, 30, "1:2", drift=True)
    check("weakly-correlated", 1, 24, "1:8", drift=True)
    check("correlated", 1, 66, "11:33")  # one more than a narrow block, and than a tile
    check("correlated", 1, 80, "20:40")
    check("correlated", 2, 35, "0.5", torch.float32)
    check("correlated", 1, 24, "2:4", torch.float32, drift=True)
    check_launches()
    check_rows_without_pairs()
    tiles(AS_LAUNCHED)
    check("correlated", 1, 520, "0.5", near=True)
    check("correlated", 1, 320, "32:64", drift=True, near=True)
    check("correlated", 1, 2048, "512:1024", torch.float32, near=True)
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
