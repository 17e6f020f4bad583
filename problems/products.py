"""Sums of products of activations, ``Σ l rᵀ`` over tokens, and the precision that float32 products keep.

A sum over many tokens is made from sums over few of them, whose rounding is all that it has: the few are
summed in float32, and their sums in float64. Channels far from 1 are divided by powers of two before, so that
nothing overflows and small channels are kept. Of symmetric sums only the upper triangle is made, a panel of
columns at a time.

Two numbers of bfloat16 have a product that float32 holds exactly (8 + 8 of 24 bits), and so have two of
float16 (11 + 11). On a device that multiplies such numbers in tensor cores, activations in half precision are
multiplied as they are, and what is made from them (a difference, a channel in another scale) as a sum of up
to three numbers of bfloat16 that is the float32 number itself (8 + 8 + 8 bits). Tensor cores sum in float32,
16 tokens at a time, and cut off where a processor rounds, so that fewer tokens are summed before float64:
over ``TENSOR_TOKENS`` they cut off less than rounding changes over ``TOKENS``. A difference is not expanded
into products of what it is the difference of: it is small beside these, and would be lost in their rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidProblemError

# float32 sums are over at most this many tokens: rounding stays that of one of them
TOKENS = 1024
# The same in tensor cores, and tokens whose sums are made in one call.
TENSOR_TOKENS, TENSOR_BATCH = 256, 4096
# Columns that are multiplied at a time; in a symmetric product with those to their right only. On a device
# more: one panel is to keep all of its processors busy, with several sums at a time a smaller one does.
PANEL, DEVICE_PANEL, TENSOR_PANEL = 384, 1024, 512
# Below this many columns a full memory is not what makes a product fail.
LEAST_PANEL = 32
# Channels whose largest value lies between these need no scaling: squares stay far from float32's ends
SMALL, LARGE = 2.0**-40, 2.0**50
# What is left of a channel after some parts and is left out, relative to it: a unit in float32's last place
LEFT_OUT = 2.0**-23
# First compute capability with tensor cores for bfloat16.
TENSOR_CORES = (8, 0)
# Set to anything but 0 this makes NVIDIA's libraries multiply in tf32, which no program can undo.
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
# Settings of torch under which products of float32 are what they say.
_FULL = ("none", "ieee")
_REDUCED_SUMS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of matrices in float32 are in float32 while this is open, whatever torch is told elsewhere.

    Neither in tf32 nor in bfloat16, as ``torch.set_float32_matmul_precision``, ``fp32_precision`` of a
    backend or ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` have it; sums of half precision are in float32.
    """
    backends: Any = torch.backends
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    before = (cuda.fp32_precision, cpu.fp32_precision)
    reduced = [name for name in _REDUCED_SUMS if getattr(cuda, name)]
    legacy = None if all(each in _FULL for each in before) else _legacy_precision()
    for name in reduced:
        setattr(cuda, name, False)
    if legacy is not None:  # torch refuses products while its two settings contradict each other
        torch.set_float32_matmul_precision("highest")
    elif any(each not in _FULL for each in before):
        cuda.fp32_precision = cpu.fp32_precision = "ieee"
    try:
        yield
    finally:
        for name in reduced:
            setattr(cuda, name, True)
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, value in zip((cuda, cpu), before, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = "none"  # what holds for all backends
            if backend.fp32_precision != value:
                backend.fp32_precision = value


def _legacy_precision() -> str | None:
    """``torch.get_float32_matmul_precision()``, None where only a backend was told."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def tf32_is_forced(device: torch.device) -> bool:
    """Whether the environment has products of float32 on ``device`` in tf32, which nothing can undo."""
    return device.type == "cuda" and os.environ.get(TF32_OVERRIDE, "0") not in ("", "0")


def has_tensor_cores(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 with sums in float32."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= TENSOR_CORES


def device_buffers(cols: int) -> int:
    """Bytes on a device, beside sums and activations, while those of so many channels are added."""
    # of a symmetric sum of three parts: both factors, six parts side by side, and float64 beside float32
    stacked = 2 * 6 * 2 * TENSOR_BATCH
    tensor = TENSOR_PANEL * (4 * TENSOR_BATCH // TENSOR_TOKENS + 16)
    return cols * max(stacked + tensor, 12 * DEVICE_PANEL)


def is_half(rows: Tensor) -> bool:
    """Whether ``rows`` is in a half precision that tensor cores multiply."""
    return rows.dtype in (torch.bfloat16, torch.float16)


def difference(left: Tensor, right: Tensor) -> Tensor:
    """``left - right`` in float32, or in float64 for float64 values and where float32 overflows."""
    kind = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    found = left.to(kind) - right.to(kind)
    if bool(torch.isfinite(found.abs().amax())):
        return found
    return left.double() - right.double()


@dataclass(frozen=True, eq=False)
class Factor:
    """Activations (tokens, cols), each channel divided by a power of two if any needs it.

    Attributes:
        values: the quotients; in the dtype they came in where nothing was divided.
        scale: (cols,), float64, or None where every channel is as it was.
        half: whether it is in half precision, or was made from what is.
    """

    values: Tensor
    scale: Tensor | None
    half: bool

    @classmethod
    def of(cls, rows: Tensor, half: bool | None = None) -> Factor:
        """``rows`` (tokens, cols) of any floating dtype, at least one token.

        Raises:
            InvalidProblemError: for NaN or Inf.
        """
        half = is_half(rows) if half is None else half
        largest = rows.abs().amax(0).double()
        if bool(((largest == 0) | ((largest >= SMALL) & (largest <= LARGE))).all()):
            return cls(rows if is_half(rows) else rows.float(), None, half)
        if not bool(torch.isfinite(largest).all()):
            raise InvalidProblemError(
                f"activations are finite: expected no NaN or Inf, found {int((~torch.isfinite(rows)).sum())}"
            )
        # powers of two, so that the division is exact; zero channels keep scale 1
        scale = torch.exp2(torch.ceil(torch.log2(largest.clamp_min(torch.finfo(torch.float64).tiny))))
        scale = torch.where(largest > 0, scale, 1.0)
        return cls((rows.double() / scale).float(), scale, half)

    @cached_property
    def rows(self) -> Tensor:
        """The quotients in float32."""
        return self.values.float()

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """Matrices of bfloat16 whose sum the quotients are, the largest first."""
        if self.values.dtype == torch.bfloat16:
            return (self.values,)
        parts = [self.values.bfloat16()]
        left = self.values.float() - parts[0].float()
        allowed = LEFT_OUT * torch.linalg.vector_norm(self.values, dim=0, dtype=torch.float32)
        while len(parts) < 3 and bool((torch.linalg.vector_norm(left, dim=0) > allowed).any()):
            parts.append(left.bfloat16())
            left -= parts[-1].float()
        return tuple(parts)

    def sum(self, tokens: slice) -> Tensor:
        """Sum of the values over some tokens (cols,), float64."""
        found = self.values[tokens].float().sum(0).double()
        return found if self.scale is None else found * self.scale


class Products:
    """How products are made on a device.

    Args:
        device: where.
        half: whether what is multiplied is in half precision, or was made from what is.
    """

    def __init__(self, device: torch.device, half: bool) -> None:
        self._in_parts = half and has_tensor_cores(device)
        self._kind = torch.float64 if tf32_is_forced(device) else torch.float32
        self._panel = PANEL
        if device.type == "cuda":
            self._panel = TENSOR_PANEL if self._in_parts else DEVICE_PANEL

    def pieces(self, tokens: int) -> Iterator[slice]:
        """Neighbours out of so many tokens that are added at a time."""
        size = TENSOR_BATCH if self._in_parts else TOKENS
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))

    def prepare(self, *factors: Factor) -> None:
        """Make what of some factors is used again and again."""
        for factor in factors:
            _ = factor.parts if self._in_parts else factor.rows

    def add(self, total: Tensor, left: Factor, right: Factor, tokens: slice) -> None:
        """``total += leftᵀ right`` over some tokens of a piece; of a product with itself the upper triangle.

        Where memory is full it goes on with fewer tokens and smaller panels.
        """
        chosen = self._chosen(left, right, tokens)
        if chosen is None:
            middle = (tokens.start + tokens.stop) // 2
            self.add(total, left, right, slice(tokens.start, middle))
            self.add(total, left, right, slice(middle, tokens.stop))
            return
        start = 0
        while start < len(total):
            columns = slice(start, start + self._panel)
            others = slice(start if left is right else 0, None)
            product = self._scaled(chosen, left.scale, right.scale, columns, others)
            if product is None:
                self._panel //= 2
                continue
            total[columns, others].add_(product)
            start = columns.stop

    def _chosen(self, left: Factor, right: Factor, tokens: slice) -> _Plain | _InParts | None:
        """Some tokens of both as they are multiplied, None where memory is full."""
        try:
            if self._in_parts:
                return _InParts.of(left, right, tokens)
            return _Plain(left.rows[tokens].to(self._kind), right.rows[tokens].to(self._kind))
        except torch.OutOfMemoryError:
            if tokens.stop - tokens.start == 1:
                raise
        torch.cuda.empty_cache()
        return None

    def _scaled(
        self,
        chosen: _Plain | _InParts,
        left: Tensor | None,
        right: Tensor | None,
        columns: slice,
        others: slice,
    ) -> Tensor | None:
        """The product of some columns in their scales, None where memory is full."""
        try:
            with full_precision():
                product = chosen.product(columns, others)
            if left is not None:
                product = product.double() * left[columns, None]
            return product if right is None else product.double() * right[others]
        except torch.OutOfMemoryError:
            if self._panel <= LEAST_PANEL:
                raise
        torch.cuda.empty_cache()
        return None


@dataclass(frozen=True, eq=False)
class _Plain:
    """Two matrices (tokens, .) whose product is one sum over tokens."""

    left: Tensor
    right: Tensor

    def product(self, columns: slice, others: slice) -> Tensor:
        """``leftᵀ right`` of some columns of each."""
        return self.left[:, columns].T @ self.right[:, others]


@dataclass(frozen=True, eq=False)
class _InParts:
    """Two matrices in half precision (sums, tokens, .), multiplied sum by sum in tensor cores."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, left: Factor, right: Factor, tokens: slice) -> _InParts:
        """Some tokens of two factors; of each sum the small parts come first, to be cut off less."""
        if left is right and left.values.dtype == torch.float16:
            alone = _in_sums(left.values[tokens])
            return cls(alone, alone)
        pairs = [
            (first, second)
            for order in (2, 1, 0)  # third and fourth order are below float32's last place
            for first in range(len(left.parts))
            for second in range(len(right.parts))
            if first + second == order
        ]
        return cls(
            _side_by_side([_in_sums(left.parts[first][tokens]) for first, _ in pairs]),
            _side_by_side([_in_sums(right.parts[second][tokens]) for _, second in pairs]),
        )

    def product(self, columns: slice, others: slice) -> Tensor:
        """``leftᵀ right`` of some columns of each, float64."""
        return float32_sums(self.left[:, :, columns].mT, self.right[:, :, others]).sum(0, dtype=torch.float64)


def _in_sums(rows: Tensor) -> Tensor:
    """``rows`` (tokens, cols) as (sums, ``TENSOR_TOKENS``, cols), zeros behind the last."""
    missing = -len(rows) % TENSOR_TOKENS
    if missing:
        rows = torch.cat([rows, rows.new_zeros((missing, rows.shape[1]))])
    return rows.view(-1, TENSOR_TOKENS, rows.shape[1])


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def float32_sums(left: Tensor, right: Tensor) -> Tensor:
    """Products of matrices in half precision, (., rows, tokens) and (., tokens, cols), summed in float32."""
    return torch.bmm(left, right, out_dtype=torch.float32)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with the upper triangle of ``upper`` (size, size)."""
    upper = upper.triu()
    return upper.add_(upper.triu(1).T)
