"""The 1-swap engine: certified optima on every kind of layer, the same for any split of the work."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swap_oracle import errors_by_definition, smallest_change
from torch.utils._python_dispatch import TorchDispatchMode

import sparseswaps as ss
from sparseswaps.problems.synthetic import FAMILIES
from sparseswaps.solvers import kernels
from sparseswaps.solvers.kernels import reference
from sparseswaps.solvers.kernels.interface import DescentOptions
from sparseswaps.solvers.search import local_search

SEARCHES = ("lazy", "best")
# what float64 itself loses of the pruned weights' own size when their sum nearly cancels
ROUNDING = 1e-13


def with_drift(problem: ss.LayerProblem, size: float, seed: int = 0) -> ss.LayerProblem:
    """The layer with a target ``X`` that differs from its inputs by a linear map of relative ``size``."""
    generator = torch.Generator().manual_seed(seed)
    gram = problem.gram.matrix
    lost = size * torch.randn(gram.shape, generator=generator, dtype=torch.float64) / problem.cols**0.5
    weight = problem.weight.double()
    linear = weight @ lost @ gram
    constant = ((weight @ lost @ gram @ lost.T) * weight).sum(1).clamp_min(0)
    return ss.LayerProblem(problem.weight, problem.gram, problem.pattern, ss.Drift(linear, constant))


def assert_optimal(problem: ss.LayerProblem, mask: torch.Tensor, start_error: torch.Tensor) -> None:
    """Every swap of every row, by the oracle, against 1e-6 of the starting error."""
    linear = None if problem.drift is None else problem.drift.linear
    lowest = smallest_change(problem.weight, problem.gram.matrix, mask, problem.pattern.block, linear)
    size = (problem.scaled_weight.masked_fill(mask, 0) ** 2).sum(1).numpy()
    if problem.scaled_drift is not None:
        size = size + (problem.scaled_drift**2).amax(1).numpy()
    limit = 1e-6 * start_error.numpy() + ROUNDING * size
    assert (lowest >= -limit).all(), (problem.name, (lowest + limit).min())


def starting_error(problem: ss.LayerProblem) -> torch.Tensor:
    return ss.solve(problem, ss.Wanda()).row_objectives


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_certified_in_both_precisions(family: str, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cols, pattern in ((24, "0.5"), (65, "0.3"), (64, "2:4"), (96, "24:48"), (257, "0.6")):
        problem = ss.synthetic_layer(family, 5, cols, pattern, seed=cols)
        start = starting_error(problem)
        for limit in (0, 1024):  # narrowest layer that is searched in float32
            monkeypatch.setattr(local_search, "FLOAT32_COLS", limit)
            solution = ss.solve(problem, ss.OneSwap(search=search))
            assert solution.status is ss.Status.LOCAL_OPTIMUM
            assert solution.stats["certified"].all()
            assert bool((solution.row_objectives <= start * (1 + 1e-12)).all())
            assert_optimal(problem, solution.mask, start)


@given(
    family=st.sampled_from(FAMILIES),
    cols=st.integers(2, 48),
    rows=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    sparsity=st.floats(0.05, 0.95),
    drift=st.sampled_from((0.0, 0.3, 3.0)),
    search=st.sampled_from(SEARCHES),
)
def test_certified_on_any_layer(
    family: str, cols: int, rows: int, seed: int, sparsity: float, drift: float, search: str
) -> None:
    keep = min(cols - 1, max(1, cols - int(cols * sparsity)))
    problem = ss.synthetic_layer(family, rows, cols, ss.SparsityPattern(keep, cols), seed=seed)
    if drift:
        problem = with_drift(problem, drift, seed)
    random = ss.Chain(ss.Random(seed), ss.OneSwap(search=search))
    start = ss.solve(problem, ss.Random(seed)).row_objectives
    assert_optimal(problem, ss.solve(problem, random).mask, start)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_wide_rows_match_the_reference(family: str, search: str) -> None:
    problem = ss.synthetic_layer(family, 3, 521, "0.5", seed=7, tokens=1100)
    start = ss.solve(problem, ss.Wanda())
    solution = ss.solve(problem, ss.OneSwap(search=search))
    assert_optimal(problem, solution.mask, start.row_objectives)
    scaled = local_search.scaled_rows(problem, start.mask, slice(0, 3))
    layer = local_search.at_scale(problem, scaled, problem.gram.correlation64)
    wide = reference.descend(layer, start.mask, DescentOptions(1e-6, search=search))
    # ties within the tolerance may be broken otherwise, which hardly moves the error
    assert problem.objective(wide.mask) == pytest.approx(solution.objective, abs=2e-3 * start.objective)
    if family in ("correlated", "weakly-correlated"):
        assert torch.equal(wide.mask, solution.mask)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("search", SEARCHES)
def test_kernels_equal_the_reference(search: str, pattern: str, drift: bool) -> None:
    cpu = pytest.importorskip("sparseswaps.solvers.kernels.cpu")
    for family in ("correlated", "weakly-correlated", "zero-channels", "huge-range"):
        problem = ss.synthetic_layer(family, 6, 88, pattern, seed=11)
        if drift:
            problem = with_drift(problem, 0.4)
        mask = ss.solve(problem, ss.Wanda()).mask
        scaled = local_search.scaled_rows(problem, mask, slice(0, 6))
        layer = local_search.at_scale(problem, scaled, problem.gram.correlation64)
        for max_swaps in (0, 3, None):
            options = DescentOptions(1e-6, max_swaps, search)
            results = [module.descend(layer, mask, options) for module in (reference, cpu)]
            for name, ours, theirs in zip(results[0]._fields, *results, strict=True):
                torch.testing.assert_close(ours, theirs, msg=f"{family} {name} after {max_swaps}")


def test_best_search_makes_the_best_swap_each_time() -> None:
    problem = ss.synthetic_layer("correlated", 4, 540, "0.5", seed=3)
    mask = ss.solve(problem, ss.Wanda()).mask.numpy().copy()
    weight, gram = problem.weight.double().numpy(), problem.gram.matrix.numpy()
    for step in range(6):
        found = ss.solve(problem, ss.OneSwap(max_swaps=step, search="best"))
        assert (found.mask.numpy() == mask).all()
        for row in range(4):
            w, m = weight[row], mask[row]
            c = gram @ np.where(m, 0, w)
            change = (2 * w * c + w * w * np.diag(gram))[:, None] - 2 * np.outer(w, w) * gram
            change = change + (w * w * np.diag(gram) - 2 * w * c)[None, :]
            change[~m] = np.inf
            change[:, m] = np.inf
            pruned, restored = np.unravel_index(change.argmin(), change.shape)
            mask[row, pruned], mask[row, restored] = False, True


@pytest.mark.parametrize("family", ["correlated", "duplicates", "rank-one"])
def test_same_mask_for_any_threads_and_batches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ss.synthetic_layer(family, 37, 530, "0.5", seed=5, tokens=1200)
    whole = ss.solve(problem, ss.OneSwap()).mask
    torch.set_num_threads(2)
    try:
        assert torch.equal(ss.solve(problem, ss.OneSwap()).mask, whole)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(local_search, "BATCH_WEIGHTS", 5 * 530)
    assert torch.equal(ss.solve(problem, ss.OneSwap()).mask, whole)
    for rows in (slice(0, 1), slice(11, 20)):
        assert torch.equal(ss.solve(problem.slice_rows(rows), ss.OneSwap()).mask, whole[rows])


@pytest.mark.parametrize("cols", [40, 530])
def test_same_mask_at_any_scale(cols: int) -> None:
    problem = ss.synthetic_layer("correlated", 5, cols, "0.5", seed=2)
    expected = ss.solve(problem, ss.OneSwap()).mask
    for of_weight in (2.0**-40, 1.0, 2.0**40):
        for of_gram in (2.0**-40, 2.0**40):
            scaled = ss.LayerProblem(
                problem.weight.double() * of_weight,
                ss.Gram(problem.gram.matrix * of_gram),
                problem.pattern,
            )
            assert torch.equal(ss.solve(scaled, ss.OneSwap()).mask, expected)


def test_rows_of_very_different_scale() -> None:
    problem = ss.synthetic_layer("correlated", 9, 530, "0.5", seed=4)
    expected = ss.solve(problem, ss.OneSwap()).mask
    factor = 2.0 ** torch.arange(-40, 41, 10, dtype=torch.float64)
    scaled = ss.LayerProblem(problem.weight.double() * factor[:, None], problem.gram, problem.pattern)
    assert torch.equal(ss.solve(scaled, ss.OneSwap()).mask, expected)


def test_half_precision_range_is_no_limit() -> None:
    # activations near the largest float16 number, whose products overflow it
    activations = 6e4 * torch.rand((256, 48), generator=torch.Generator().manual_seed(0)).half().double()
    sums = ss.GramAccumulator(48)
    sums.update(activations.half())
    weight = torch.randn((4, 48), generator=torch.Generator().manual_seed(1)).half()
    problem = ss.LayerProblem(weight, sums.gram(), ss.SparsityPattern.per_row(48, 0.5))
    start = starting_error(problem)
    solution = ss.solve(problem, ss.OneSwap())
    assert_optimal(problem, solution.mask, start)
    raw = errors_by_definition(weight, activations.half(), solution.mask)
    # the Gram is summed from float32 products
    np.testing.assert_allclose(solution.row_objectives.numpy(), raw, rtol=1e-3)


def test_kept_outliers_beyond_float32() -> None:
    problem = ss.synthetic_layer("correlated", 3, 520, "0.5", seed=6)
    weight = problem.weight.double().clone()
    weight[:, ::50] *= 1e25
    outliers = ss.LayerProblem(weight, problem.gram, problem.pattern)
    start = starting_error(outliers)
    solution = ss.solve(outliers, ss.OneSwap())
    assert solution.mask[:, ::50].all()
    assert_optimal(outliers, solution.mask, start)


def test_limits_are_reported_honestly() -> None:
    problem = ss.synthetic_layer("correlated", 6, 128, "0.5", seed=8)
    full = ss.solve(problem, ss.OneSwap())
    swaps = full.stats["swaps"]
    some = int(swaps.min()) + 1
    limited = ss.solve(problem, ss.OneSwap(max_swaps=some))
    assert limited.status is ss.Status.ITERATION_LIMIT
    assert bool((limited.stats["swaps"] <= some).all())
    for row, status in enumerate(limited.row_statuses):
        optimal = status is ss.Status.LOCAL_OPTIMUM
        assert optimal == bool(limited.stats["certified"][row]) == (int(swaps[row]) <= some)
    exact = ss.solve(problem, ss.OneSwap(max_swaps=int(swaps.max())))
    assert exact.status is ss.Status.LOCAL_OPTIMUM
    none = ss.solve(problem, ss.OneSwap(max_swaps=0))
    assert torch.equal(none.mask, ss.solve(problem, ss.Wanda()).mask)


def test_time_limit_keeps_the_warm_start() -> None:
    problem = ss.synthetic_layer("correlated", 6, 128, "0.5", seed=8)
    stopped = ss.solve(problem, ss.OneSwap(), budget=ss.Budget(seconds=0.0))
    assert stopped.status is ss.Status.TIME_LIMIT
    assert set(stopped.row_statuses) == {ss.Status.TIME_LIMIT}
    assert torch.equal(stopped.mask, ss.solve(problem, ss.Wanda()).mask)
    assert not stopped.stats["certified"].any()


def test_time_limit_stops_in_time() -> None:
    problem = ss.synthetic_layer("correlated", 400, 512, "0.5", seed=8, tokens=600)
    ss.solve(problem.slice_rows(slice(0, 1)), ss.OneSwap())  # compiled before the clock starts
    seen: list[tuple[int, int]] = []
    start = time.monotonic()
    stopped = ss.solve(
        problem, ss.OneSwap(), budget=ss.Budget(0.02, lambda done, total: seen.append((done, total)))
    )
    assert time.monotonic() - start < 1.0  # a tile of rows takes milliseconds; the rest is slack
    for row, status in enumerate(stopped.row_statuses):
        assert (status is ss.Status.LOCAL_OPTIMUM) == bool(stopped.stats["certified"][row])
    assert all(done <= total == 400 for done, total in seen)


@pytest.mark.parametrize(("device", "why"), [("cuda", "pip install triton"), ("mps", "no kernels for it")])
def test_a_device_without_kernels_is_told(device: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=why):
        assert kernels.kernels_for(torch.device(device)) is reference


class Products(TorchDispatchMode):
    """Dtypes of the matrix products that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "dot"):
            self.dtypes |= {each.dtype for each in args if isinstance(each, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [ss.OneSwap(), ss.Tabu(effort=0.1), ss.Greedy()])
def test_no_product_that_a_setting_makes_coarser(solver: ss.Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.set_float32_matmul_precision and environment variables turn float32 products into tf32 or bfloat16
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    problem = with_drift(ss.synthetic_layer("correlated", 3, 520, "0.5", seed=9), 0.3)
    with Products() as products:
        found = solver.run(problem, None, ss.Budget())
        assert found.mask is not None
        ss.certify(problem, found.mask)
    assert products.dtypes == {torch.float64}


def test_without_numba_the_reference_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ss.synthetic_layer("correlated", 3, 60, "0.5", seed=9)
    expected = ss.solve(problem, ss.OneSwap())
    find = kernels.importlib.util.find_spec
    monkeypatch.setattr(
        kernels.importlib.util, "find_spec", lambda name: None if name == "numba" else find(name)
    )
    assert kernels.kernels_for(torch.device("cpu")) is reference
    found = ss.solve(problem, ss.OneSwap())
    assert torch.equal(found.mask, expected.mask)
    assert ss.solve(problem, ss.OneSwap(), budget=ss.Budget(0.0)).status is ss.Status.TIME_LIMIT


@pytest.mark.parametrize("options", [{"max_swaps": -1}, {"tolerance": 1.0}, {"search": "worst"}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ss.OneSwap(**options)  # type: ignore[arg-type]
