"""Patterns, Gram matrices, layer problems and instance files."""

from __future__ import annotations

from pathlib import Path

import conformance
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparseswaps as ss
from sparseswaps.problems.files import load_instance_with_provenance


@given(
    cols=st.integers(2, 40),
    sparsity=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
    levels=st.integers(1, 5),
)
def test_per_row_patterns_hold_exactly_with_ties(cols: int, sparsity: float, seed: int, levels: int) -> None:
    if int(cols * sparsity) == 0:
        with pytest.raises(ss.InvalidPatternError, match="prunes"):
            ss.SparsityPattern.per_row(cols, sparsity)
        return
    pattern = ss.SparsityPattern.per_row(cols, sparsity)
    scores = torch.randint(levels, (6, cols), generator=torch.Generator().manual_seed(seed)).double()
    mask = pattern.top_k(scores)
    assert pattern.allows(mask)
    assert bool((mask.sum(1) == cols - int(cols * sparsity)).all())
    for row in range(6):  # the kept ones score at least as much, and ties go to the lowest index
        for j in range(cols):
            for k in range(cols):
                if mask[row, j] and not mask[row, k]:
                    assert scores[row, j] > scores[row, k] or (scores[row, j] == scores[row, k] and j < k)


@given(n=st.integers(1, 7), extra=st.integers(1, 8), blocks=st.integers(1, 5), seed=st.integers(0, 100))
def test_n_m_patterns_hold_in_every_block(n: int, extra: int, blocks: int, seed: int) -> None:
    pattern = ss.SparsityPattern.n_m(n, n + extra)
    scores = torch.randint(
        3, (4, blocks * (n + extra)), generator=torch.Generator().manual_seed(seed)
    ).float()
    mask = pattern.top_k(scores)
    assert bool((mask.view(4, blocks, -1).sum(-1) == n).all())
    assert pattern.allows(mask)
    broken = mask.clone()
    broken[0, 0] = ~broken[0, 0]
    assert not pattern.allows(broken)


def test_patterns_from_text() -> None:
    parse = ss.SparsityPattern.parse
    assert parse("0.5", 7) == ss.SparsityPattern(keep=4, block=7)
    assert parse("50%", 7) == ss.SparsityPattern(keep=4, block=7)
    assert parse(" 2:4 ", 8) == ss.SparsityPattern(keep=2, block=4)
    for text, message in [
        ("0", "expected 0 < sparsity < 1, found 0"),
        ("1.0", "expected 0 < sparsity < 1, found 1"),
        ("150%", "found 1.5"),
        ("-0.5", "found -0.5"),
        ("half", "expected 0.5, 50%, 2:4 or layer:0.5, found 'half'"),
        ("4:4", "expected 0 < keep < 4, found keep = 4"),
        ("0:4", "found keep = 0"),
        ("1.2.3", "found '1.2.3'"),
    ]:
        with pytest.raises(ss.InvalidPatternError, match=message.replace("(", r"\(")):
            parse(text, 8)
    with pytest.raises(ss.InvalidPatternError, match="expected a multiple of 4 columns, found 10"):
        parse("2:4", 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gram_of_any_dtype_is_exact_and_never_overflows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    largest = {torch.float16: 6e4}.get(dtype, 1e30)
    smallest = {torch.float16: 1e-4}.get(dtype, 1e-30)
    scale = torch.tensor([largest, 1.0, smallest, 0.0, largest], dtype=torch.float64)
    inputs = (torch.rand((3000, 5), generator=generator, dtype=torch.float64) - 0.5) * scale
    inputs = inputs.to(dtype)
    accumulator = ss.GramAccumulator(5)
    for batch in inputs.split(700):
        accumulator.update(batch)
    exact = inputs.double().T @ inputs.double()
    size = exact.diagonal().sqrt()
    # float32 sums of at most 512 terms: √512 roundings of 2^-24 of ‖X_i‖ ‖X_j‖, twice for safety
    allowed = 2 * 512**0.5 * 2**-24 * size[:, None] * size[None]
    assert bool(((accumulator.gram().matrix - exact).abs() <= allowed).all())
    assert accumulator.tokens == 3000


def test_means_of_channels_go_with_the_gram() -> None:
    inputs = torch.randn((1300, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = inputs * torch.tensor([1e20, 1.0, 1e-20, 0.0]) + torch.tensor([3e20, -2.0, 0.0, 0.0])
    accumulator = ss.GramAccumulator(4)
    for batch in inputs.split(500):
        accumulator.update(batch)
    gram = accumulator.gram()
    # inputs are rounded to float32 chunk by chunk
    allowed = 2**-23 * inputs.abs().mean(0)
    assert bool(((gram.mean - inputs.mean(0)).abs() <= allowed).all())
    assert gram.shrunk(0.5).mean is gram.mean
    assert ss.Gram(gram.matrix).mean is None
    for tokens, mean, message in [
        (1300, gram.mean[:3], r"expected \(4,\), found \(3,\)"),
        (1300, gram.mean * torch.nan, "with 4 NaN or Inf"),
        (1300, gram.mean * 2, "found a larger mean for n = 1300"),
        (0, gram.mean, "found a larger mean for n = 0"),
    ]:
        with pytest.raises(ss.InvalidProblemError, match=message):
            ss.Gram(gram.matrix, tokens, mean)


@given(cut=st.integers(1, 199), seed=st.integers(0, 50))
def test_accumulators_merge(cut: int, seed: int) -> None:
    inputs = torch.randn((200, 4), generator=torch.Generator().manual_seed(seed))
    dense = inputs + 0.1
    whole, left, right = (ss.GramAccumulator(4, drift=True) for _ in range(3))
    whole.update(inputs, dense)
    left.update(inputs[:cut], dense[:cut])
    right.update(inputs[cut:], dense[cut:])
    left.merge(ss.GramAccumulator.from_state_dict(right.state_dict()))
    assert left.tokens == 200
    for a, b in [
        (left.gram().matrix, whole.gram().matrix),
        (left.gram().mean, whole.gram().mean),
        (left.cross(), whole.cross()),
        (left.lost(), whole.lost()),
    ]:
        # sums of float32 products in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spread", [0, 25])
def test_sums_of_wide_layers_are_those_of_float64(spread: int) -> None:
    """More columns than a panel, more tokens than a chunk; channels from 1e-25 to 1e25, or all near 1."""
    generator = torch.Generator().manual_seed(spread)

    def drawn(cols: int) -> torch.Tensor:
        scale = 10.0 ** torch.linspace(-spread, spread, cols, dtype=torch.float64)
        return torch.randn((1500, cols), generator=generator, dtype=torch.float64) * scale

    inputs, dense, stream = drawn(900), drawn(900), drawn(500)
    sums, outputs = ss.GramAccumulator(900, drift=True), ss.GramAccumulator(900, missing=500)
    sums.update(inputs[:0], dense[:0])  # an expert may receive no token
    for part in (slice(0, 1400), slice(1400, None)):
        sums.update(inputs[part], dense[part])
        outputs.update(inputs[part], missing=stream[part])
    lost = dense - inputs
    assert sums.tokens == 1500
    for found, left, right in [
        (sums.gram().matrix, inputs, inputs),
        (sums.cross(), inputs, lost),
        (sums.lost(), lost, lost),
        (outputs.gram().matrix, inputs, inputs),
        (outputs.missing_cross(), inputs, stream),
        (outputs.missing_products(), stream, stream),
    ]:
        # float32 sums of at most 1,024 terms: 1e-6 of the sum of their sizes
        allowed = 1e-6 * (left.abs().T @ right.abs())
        assert bool(((found - left.T @ right).abs() <= allowed).all())


def test_drift_beyond_the_range_of_half_precision() -> None:
    largest = torch.finfo(torch.bfloat16).max
    sums = ss.GramAccumulator(1, drift=True)
    sums.update(
        torch.tensor([[largest]], dtype=torch.bfloat16), torch.tensor([[-largest]], dtype=torch.bfloat16)
    )
    assert float(sums.lost()) == 4 * largest**2
    assert float(sums.cross()) == -2 * largest**2


def test_activations_that_are_refused() -> None:
    accumulator = ss.GramAccumulator(3)
    with pytest.raises(ss.InvalidProblemError, match="expected 3 channels, found 4"):
        accumulator.update(torch.ones(2, 4))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ss.InvalidProblemError, match="no NaN or Inf, found 1"):
            accumulator.update(torch.tensor([[1.0, bad, 0.0]]))
        drifting = ss.GramAccumulator(3, drift=True)
        with pytest.raises(ss.InvalidProblemError, match="no NaN or Inf, found 1"):
            drifting.update(torch.ones(1, 3), torch.tensor([[1.0, bad, 0.0]]))
    with pytest.raises(ss.InvalidProblemError, match="at least one token"):
        accumulator.gram()


def test_problems_that_are_refused() -> None:
    pattern = ss.SparsityPattern.per_row(4, 0.5)
    weight, gram = torch.ones(2, 4), torch.eye(4)
    nan = torch.tensor([[1.0, torch.nan, 0, 0], [0, 0, 0, 0]])
    asymmetric = torch.eye(4)
    asymmetric[0, 1] = 0.5
    indefinite = torch.full((4, 4), -0.9) + 1.9 * torch.eye(4)
    for arguments, message in [
        ((nan, gram), "layer 'x' are finite: expected no NaN or Inf, found 1"),
        ((weight[0], gram), "expected a matrix"),
        ((weight, torch.eye(3)), r"expected \(4, 4\), found \(3, 3\)"),
        ((weight, nan), "expected a square matrix"),
        ((weight, gram * torch.inf), "expected no NaN or Inf"),
        ((weight, asymmetric), "symmetric"),
        ((weight, indefinite), "positive semidefinite"),
        ((weight, -gram), "expected a diagonal of at least 0, found -1"),
    ]:
        with pytest.raises(ss.InvalidProblemError, match=message):
            ss.LayerProblem(*arguments, pattern, name="x")
    with pytest.raises(ss.InvalidPatternError, match="multiple of 3 columns, found 4"):
        ss.LayerProblem(weight, gram, ss.SparsityPattern.n_m(1, 3))
    dead = torch.diag(torch.tensor([1.0, 1, 1, 0]))
    with pytest.raises(ss.InvalidProblemError, match="always zero"):
        ss.LayerProblem(weight, dead, pattern, ss.Drift(torch.ones(2, 4), torch.ones(2)))


@given(
    family=st.sampled_from(conformance.FAMILIES),
    pattern=st.sampled_from(conformance.PATTERNS),
    drift=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_objective_is_the_error_of_the_layer(family: str, pattern: str, drift: bool, seed: int) -> None:
    problem, inputs, dense = conformance.with_raw(family, pattern, drift, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = problem.pattern.top_k(torch.rand(problem.weight.shape, generator=generator))
    weight = problem.weight.double()
    raw = ((weight @ dense - (weight * mask) @ inputs) ** 2).sum(1)
    # float32 products in the Gram matrix: 1e-6 of the largest term of the sum
    slack = 1e-6 * ((weight.abs() @ dense.abs()) ** 2).sum(1)
    assert bool(((problem.row_objectives(mask) - raw).abs() <= slack).all())
    assert problem.objective(mask) == pytest.approx(float(problem.row_objectives(mask).sum()))


def test_drift_strength_moves_the_target() -> None:
    inputs = ss.synthetic_activations("correlated", 6, 50, 0)
    dense = inputs + 0.2 * ss.synthetic_activations("correlated", 6, 50, 1)
    weight = torch.randn((3, 6), generator=torch.Generator().manual_seed(0)).double()
    sums = ss.GramAccumulator(6, drift=True)
    sums.update(inputs, dense)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0]] * 3, dtype=torch.bool)
    for strength in (0.0, 0.3, 1.0):
        problem = ss.LayerProblem(
            weight,
            sums.gram(),
            ss.SparsityPattern.per_row(6, 0.5),
            ss.Drift.from_sums(weight, sums, strength),
        )
        target = weight @ (inputs + strength * (dense - inputs)).T
        raw = ((target - (weight * mask) @ inputs.T) ** 2).sum(1)
        errors = problem.row_objectives(mask)
        torch.testing.assert_close(errors, raw, rtol=1e-5, atol=1e-6)
        plain = ((weight * ~mask @ inputs.T) ** 2).sum(1)
        # float32 products in the Gram matrix
        torch.testing.assert_close(problem.without_drift(errors, mask), plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(ss.InvalidProblemError, match="expected 0 to 1, found 2"):
        ss.Drift.from_sums(weight, sums, 2.0)


def test_normalised_form() -> None:
    for family in conformance.FAMILIES:
        gram = conformance.problem(family, "0.5").gram
        correlation = gram.correlation.double()
        expected = torch.where(gram.dead, 0.0, 1.0)
        assert torch.equal(correlation.diagonal(), expected)
        rebuilt = gram.scale[:, None] * correlation * gram.scale[None]
        # float32 storage of a correlation
        torch.testing.assert_close(
            rebuilt, gram.matrix, rtol=1e-5, atol=1e-6 * float(gram.matrix.abs().max())
        )
        other = correlation - torch.diag(correlation.diagonal())
        torch.testing.assert_close(gram.largest_correlation.double(), other.abs().amax(1))


@pytest.mark.parametrize("drift", [False, True])
def test_instance_files_round_trip(drift: bool, tmp_path: Path) -> None:
    problem = conformance.problem("correlated", "2:4", drift)
    path = tmp_path / "folder" / "instance.safetensors"
    ss.save_instance(problem, path, {"model": "m", "seed": 3})
    loaded, provenance = load_instance_with_provenance(path)
    assert provenance == {"model": "m", "seed": 3}
    assert (loaded.name, loaded.pattern, loaded.gram.tokens) == (problem.name, problem.pattern, 40)
    assert torch.equal(loaded.gram.mean, problem.gram.mean)
    mask = ss.solve(problem, ss.Wanda()).mask
    assert torch.equal(loaded.row_objectives(mask), problem.row_objectives(mask))
    assert [p.name for p in path.parent.iterdir()] == ["instance.safetensors"]


def test_instance_files_that_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ss.InvalidFileError, match="expected an existing file, found none"):
        ss.load_instance(tmp_path / "absent.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ss.InvalidFileError, match="expected safetensors"):
        ss.load_instance(tmp_path / "garbage.safetensors")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ss.InvalidFileError, match="expected format sparseswaps-instance-1, found none"):
        ss.load_instance(tmp_path / "other.safetensors")


def test_synthetic_layers_are_seeded() -> None:
    for family in conformance.FAMILIES:
        a, b, c = (ss.synthetic_layer(family, 3, 16, seed=s) for s in (1, 1, 2))
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.gram.matrix, b.gram.matrix)
        assert not torch.equal(a.weight, c.weight)
    with pytest.raises(ss.InputError, match="unknown synthetic family"):
        ss.synthetic_layer("flat", 3, 16)


def test_a_pattern_may_be_a_text() -> None:
    weight, gram = torch.ones((2, 8)), torch.eye(8).double()
    for text in ("0.5", "50%", "2:4", "layer:0.5"):
        assert ss.LayerProblem(weight, gram, text).pattern == ss.parse_pattern(text, 8)
    with pytest.raises(ss.InvalidPatternError, match="expected a multiple of 3 columns, found 8"):
        ss.LayerProblem(weight, gram, "2:3")
