"""Sums of products of activations: what torch is told, tensor cores as they cut off, a full memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from precision_watch import Watched, precisions
from torch import Tensor

import sparseswaps as ss
from sparseswaps.problems import gram, products
from sparseswaps.problems.products import Factor, Products, full_precision
from sparseswaps.solvers.base import Budget, Covers, Group, Outcome, Solver, Status


@pytest.fixture
def restored() -> Iterator[None]:
    """Settings of torch are what they were."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    assert precisions() == ("none", "none")


def legacy(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def allow() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def one_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def all_backends() -> None:
    torch.backends.fp32_precision = "tf32"


def other_processor() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


SETTINGS = {
    "high": legacy("high"),
    "medium": legacy("medium"),
    "allow_tf32": allow,
    "one backend": one_backend,
    "all backends": all_backends,
    "both ways": other_processor,
}


def sums_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[ss.GramAccumulator]:
    generator = torch.Generator().manual_seed(seed)
    inputs, dense = (torch.randn((1200, 400), generator=generator).to(dtype) for _ in range(2))
    sums, outputs = ss.GramAccumulator(400, drift=True), ss.GramAccumulator(400, missing=16)
    sums.update(inputs, dense)
    outputs.update(inputs, missing=torch.randn((1200, 16), generator=generator))
    return [sums, outputs]


def all_sums(found: list[ss.GramAccumulator]) -> list[Tensor]:
    sums, outputs = found
    gram = sums.gram()
    return [gram.matrix, gram.mean, sums.cross(), sums.lost(), outputs.missing_cross()]


def same(one: list[ss.GramAccumulator], other: list[ss.GramAccumulator]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(all_sums(one), all_sums(other), strict=True))


@dataclass(frozen=True)
class Multiplying(Solver):
    """Keeps what a product of float32 says."""

    name: ClassVar[str] = "multiplying"
    group: ClassVar[Group] = Group.SCORE
    covers: ClassVar[Covers] = Covers()

    def run(self, problem: ss.LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        scores = problem.weight.abs() @ problem.gram.correlation.abs()
        return Outcome(problem.pattern.top_k(scores), Status.FINISHED)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", SETTINGS)
def test_sums_and_solvers_multiply_in_float32_whatever_torch_is_told(name: str) -> None:
    """On processors with instructions for bfloat16 `medium` changes products by 1e-3 where it is let."""
    expected, problem = sums_of(), ss.synthetic_layer("correlated", 8, 64)
    mask = ss.solve(problem, Multiplying()).mask
    SETTINGS[name]()
    told = precisions()
    assert told != ("none", "none")
    with Watched() as unguarded:
        torch.ones((2, 2)) @ torch.ones((2, 2))
    assert unguarded.seen == [told]
    with Watched() as watched:
        found = sums_of()
        assert torch.equal(ss.solve(problem, Multiplying()).mask, mask)
    assert len(watched.seen) > 12  # 6 sums, 2 panels, 2 chunks, and that of the solver
    assert set(watched.seen) <= {("ieee", "ieee"), ("none", "none")}
    assert same(found, expected)
    assert precisions() == told


def test_the_environment_cannot_turn_it_on(tmp_path: Path) -> None:
    """``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` is read when torch starts."""
    script = """
import torch
from test_products import Watched, precisions, sums_of
assert precisions()[0] == "tf32", precisions()
with Watched() as watched:
    sums_of()
assert {cuda for cuda, _ in watched.seen} == {"ieee"}, watched.seen
assert precisions()[0] == "tf32"
assert torch.get_float32_matmul_precision() == "high"
"""
    here = Path(__file__).parent
    places = [str(here), str(here.parent), str(Path(ss.__file__).parents[1])]
    environment = os.environ | {
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "PYTHONPATH": os.pathsep.join(places),
    }
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_where_nothing_undoes_tf32_sums_are_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 1)
    for value, forced in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv(products.TF32_OVERRIDE, raising=False)
        if value is not None:
            monkeypatch.setenv(products.TF32_OVERRIDE, value)
        assert products.tf32_is_forced(card) == forced
        assert not products.tf32_is_forced(torch.device("cpu"))
        rows = torch.rand((100, 8), generator=torch.Generator().manual_seed(0))
        total, factor = torch.zeros((8, 8), dtype=torch.float64), Factor.of(rows)
        for piece in Products(card, half=False).pieces(100):
            Products(card, half=False).add(total, factor, factor, piece)
        exact = (rows.double().T @ rows.double()).triu()
        assert torch.equal(total.triu(), exact) == forced


@pytest.mark.usefixtures("restored")
def test_sums_of_half_precision_are_in_float32() -> None:
    card = torch.backends.cuda.matmul
    assert card.allow_bf16_reduced_precision_reduction
    with full_precision():
        assert not card.allow_bf16_reduced_precision_reduction
        assert not card.allow_fp16_reduced_precision_reduction
        assert not card.allow_fp16_accumulation
    assert card.allow_bf16_reduced_precision_reduction
    assert card.allow_fp16_reduced_precision_reduction


def cut(values: Tensor) -> Tensor:
    """float64 in float32, towards zero."""
    near = values.float()
    return torch.where(near.double().abs() > values.abs(), torch.nextafter(near, torch.zeros(())), near)


def tensor_cores(left: Tensor, right: Tensor) -> Tensor:
    """Sums as tensor cores make them at worst: exact over 16 tokens, then cut off to float32."""
    assert left.dtype == right.dtype
    assert left.dtype in (torch.bfloat16, torch.float16)
    found = torch.zeros((left.shape[0], left.shape[1], right.shape[2]))
    for start in range(0, left.shape[2], 16):
        part = slice(start, start + 16)
        found = cut(found.double() + left[:, :, part].double() @ right[:, part].double())
    return found


def one_by_one(left: Tensor, right: Tensor) -> Tensor:
    """float32 sums of ``products.TOKENS`` tokens one after the other, as a card makes them without."""
    total = torch.zeros((left.shape[1], right.shape[1]), dtype=torch.float64)
    for rows, others in zip(left.split(products.TOKENS), right.split(products.TOKENS), strict=True):
        found = torch.zeros(total.shape)
        for row, other in zip(rows.float(), others.float(), strict=True):
            found.addr_(row, other)
        total += found
    return total


@pytest.fixture
def on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in half precision go the way of a card, and its tensor cores are those above."""
    monkeypatch.setattr(products, "has_tensor_cores", lambda _device: True)
    monkeypatch.setattr(products, "float32_sums", tensor_cores)
    monkeypatch.setattr(products, "PANEL", 20)


def spread(size: float, count: int) -> Tensor:
    return 10.0 ** torch.linspace(-size, size, count, dtype=torch.float64)


TOKENS, COLS = 2048 + 300, 48
SCALES: dict[str, tuple[Tensor, Tensor]] = {  # of channels and of tokens
    "plain": (torch.ones(COLS), torch.ones(TOKENS, 1)),
    "outlier channels": (torch.ones(COLS).index_fill(0, torch.tensor([3, 17, 40]), 7e3), torch.ones(1)),
    "range of channels": (spread(25, COLS), torch.ones(1)),
    "range of tokens": (torch.ones(1), spread(6, TOKENS)[torch.randperm(TOKENS)][:, None]),
    "subnormal": (1e-38 * spread(1, COLS), torch.ones(1)),
    "subnormal in float16": (1e-5 * spread(1, COLS), torch.ones(1)),
    "largest": (torch.full((COLS,), 8e37), torch.ones(1)),
}


def drawn(name: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and dense inputs, which are near to each other in half of the channels."""
    generator = torch.Generator().manual_seed(seed)
    cols, tokens = SCALES[name]
    draws = torch.randn((2, TOKENS, COLS), generator=generator, dtype=torch.float64)
    near = torch.where(torch.arange(COLS) % 2 == 0, 0.01, 1.0)
    largest = torch.finfo(dtype).max
    inputs = (draws[0] * cols * tokens).clamp(-largest, largest).to(dtype)
    return inputs, (inputs.double() + draws[1] * cols * tokens * near).clamp(-largest, largest).to(dtype)


def errors(found: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Of each entry relative to ``√(G_ii G_jj)``, by products in float64."""
    size = left.norm(dim=0)[:, None] * right.norm(dim=0)[None]
    return torch.where(size > 0, (found - left.T @ right).abs() / size, 0)


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCALES)
def test_tensor_cores_are_as_exact_as_float32(name: str, dtype: torch.dtype) -> None:
    inputs, dense = drawn(name, 1, dtype)
    sums = ss.GramAccumulator(COLS, drift=True)
    sums.update(inputs, dense)
    present = inputs.double()
    lost = dense.double() - present
    # float32 alone neither overflows nor underflows with channels of length 1
    alone = [each / each.norm(dim=0).clamp_min(1e-300) for each in (present, lost)]
    now, before = [], []
    for found, first, second in [(sums.gram().matrix, 0, 0), (sums.cross(), 0, 1), (sums.lost(), 1, 1)]:
        left, right = ((present, lost)[each] for each in (first, second))
        now.append(float(errors(found, left, right).max()))
        left, right = alone[first], alone[second]
        before.append(float(errors(one_by_one(left, right), left, right).max()))
    assert max(now) <= max(before)
    assert max(now) <= 6e-7  # at most 16 cuts of 2^-23, on average half of that of half of the sum


@pytest.mark.usefixtures("on_tensor_cores")
def test_what_outputs_are_missing_in_tensor_cores() -> None:
    """A float32 matrix beside activations in half precision is split into three parts."""
    inputs, _ = drawn("plain", 2, torch.bfloat16)
    missing = torch.randn((TOKENS, 8), generator=torch.Generator().manual_seed(3))
    sums = ss.GramAccumulator(COLS, missing=8)
    sums.update(inputs, missing=missing)
    for found, left in [(sums.missing_cross(), inputs), (sums.missing_products(), missing)]:
        assert float(errors(found, left.double(), missing.double()).max()) <= 5e-7


@pytest.mark.parametrize("name", SCALES)
def test_parts_are_the_numbers_themselves(name: str) -> None:
    inputs, dense = drawn(name, 4, torch.bfloat16)
    lost = Factor.of(products.difference(dense, inputs), half=True)
    assert 2 <= len(lost.parts) <= 3
    assert len(Factor.of(inputs).parts) == 1 or Factor.of(inputs).scale is not None
    left = lost.rows.double() - sum(part.double() for part in lost.parts)
    assert bool((left.norm(dim=0) <= products.LEFT_OUT * lost.rows.double().norm(dim=0)).all())
    full = Factor.of(torch.randn((500, 4), generator=torch.Generator().manual_seed(0)), half=True)
    assert torch.equal(sum(part.double() for part in full.parts), full.rows.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_memory_takes_smaller_pieces(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Products of more columns or of more tokens than fit are made in parts, and every token counts once."""
    expected = sums_of(dtype=dtype)
    if dtype is torch.bfloat16:
        monkeypatch.setattr(products, "has_tensor_cores", lambda _device: True)
        monkeypatch.setattr(products, "float32_sums", lambda a, b: torch.bmm(a.float(), b.float()))
    failed: list[str] = []

    def limited(original: Callable[..., Any], size: Callable[..., int], most: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if size(*args) > most:
                failed.append(original.__qualname__)
                raise torch.OutOfMemoryError("out of memory")
            return original(*args, **kwargs)

        return call

    columns = limited(products._Plain.product, lambda _s, columns, _o: columns.stop - columns.start, 100)
    monkeypatch.setattr(products._Plain, "product", columns)
    columns = limited(products._InParts.product, lambda _s, columns, _o: columns.stop - columns.start, 100)
    monkeypatch.setattr(products._InParts, "product", columns)
    tokens = limited(products._InParts.of, lambda _left, _right, tokens: tokens.stop - tokens.start, 200)
    monkeypatch.setattr(products._InParts, "of", tokens)
    rows = limited(gram.difference, lambda left, _right: len(left), 700)
    monkeypatch.setattr(gram, "difference", rows)
    found = sums_of(dtype=dtype)
    assert {"difference", f"{'_InParts' if dtype is torch.bfloat16 else '_Plain'}.product"} <= set(failed)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    for one, other in zip(all_sums(found), all_sums(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))
    monkeypatch.setattr(products, "LEAST_PANEL", 200)
    with pytest.raises(torch.OutOfMemoryError):
        sums_of(dtype=dtype)
