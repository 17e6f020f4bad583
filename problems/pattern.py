"""Sparsity patterns: which masks are allowed.

A pattern keeps exactly ``keep`` of every ``block`` consecutive weights of a row. Per-row sparsity
is one block as wide as the row; N:M is ``keep = N``, ``block = M``. In a mask True means kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidPatternError


@dataclass(frozen=True)
class SparsityPattern:
    """Keep exactly ``keep`` of every ``block`` consecutive weights of a row.

    Raises:
        InvalidPatternError: unless 0 < keep < block.
    """

    scope: ClassVar[str] = "block"

    keep: int
    block: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.block:
            raise InvalidPatternError(
                f"a pattern keeps between 1 and block - 1 weights of a block: "
                f"expected 0 < keep < {self.block}, found keep = {self.keep}"
            )

    @classmethod
    def per_row(cls, cols: int, sparsity: float) -> SparsityPattern:
        """Prune ``int(cols * sparsity)`` weights of each row, the field's rule.

        Raises:
            InvalidPatternError: if ``sparsity`` is outside (0, 1) or prunes nothing of ``cols``.
        """
        if not (math.isfinite(sparsity) and 0 < sparsity < 1):
            raise InvalidPatternError(
                f"sparsity is the pruned share of a row: expected 0 < sparsity < 1, found {sparsity:g}"
            )
        pruned = int(cols * sparsity)
        if pruned == 0:
            raise InvalidPatternError(
                f"sparsity {sparsity:g} prunes int({cols} * {sparsity:g}) = 0 weights of a row of "
                f"{cols}: expected at least one"
            )
        return cls(keep=cols - pruned, block=cols)

    @classmethod
    def n_m(cls, n: int, m: int) -> SparsityPattern:
        """Keep N of every M consecutive weights (2:4 keeps two of four)."""
        return cls(keep=n, block=m)

    @classmethod
    def parse(cls, text: str, cols: int) -> SparsityPattern:
        """Read ``0.5``, ``50%`` or ``2:4`` for rows of ``cols`` weights.

        Raises:
            InvalidPatternError: if the text is none of these or does not fit ``cols``.
        """
        text = text.strip()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            pattern = cls.n_m(int(match[1]), int(match[2]))
            pattern.check_cols(cols)
            return pattern
        if match := re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)(\s*%)?", text):
            try:
                value = float(match[1])
            except ValueError:
                value = math.nan
            if not math.isnan(value):
                return cls.per_row(cols, value / 100 if match[2] else value)
        raise InvalidPatternError(
            f"a pattern is a share of pruned weights or N:M: expected 0.5, 50% or 2:4, found {text!r}"
        )

    def check_cols(self, cols: int) -> None:
        """Raise ``InvalidPatternError`` unless rows of ``cols`` weights divide into blocks."""
        if cols <= 0 or cols % self.block:
            raise InvalidPatternError(
                f"pattern {self} needs rows that divide into blocks of {self.block}: "
                f"expected a multiple of {self.block} columns, found {cols}"
            )

    @property
    def sparsity(self) -> float:
        """Pruned share of the weights, in (0, 1)."""
        return 1 - self.keep / self.block

    def is_per_row(self, cols: int) -> bool:
        """Whether one block spans a whole row of ``cols`` weights."""
        return self.block == cols

    def top_k(self, scores: Tensor) -> Tensor:
        """Mask (rows, cols) that keeps the ``keep`` largest scores of each block.

        Ties go to the lowest index, so the result is the same on every device.
        """
        rows, cols = scores.shape
        self.check_cols(cols)
        blocks = scores.reshape(rows, cols // self.block, self.block)
        lowest = blocks.topk(self.keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        above, equal = blocks > lowest, blocks == lowest
        room = self.keep - above.sum(-1, keepdim=True)
        return (above | (equal & (equal.cumsum(-1) <= room))).reshape(rows, cols)

    def allows(self, mask: Tensor) -> bool:
        """Whether every block of ``mask`` (rows, cols) keeps exactly ``keep`` weights."""
        rows, cols = mask.shape
        if mask.dtype != torch.bool or cols % self.block:
            return False
        kept = mask.reshape(rows, cols // self.block, self.block).sum(-1)
        return bool((kept == self.keep).all())

    def __str__(self) -> str:
        return f"{self.keep}:{self.block}"


@dataclass(frozen=True)
class LayerBudget:
    """Keep exactly ``keep · rows`` weights of a layer of ``block`` columns, however they fall on the rows.

    Equal sparsity per layer instead of per row: rows that need more weights take them from others, and
    a row may keep none or all.

    Args:
        keep: weights kept per row on average.
        block: columns of the layer.

    Raises:
        InvalidPatternError: unless 0 < keep < block.
    """

    scope: ClassVar[str] = "layer"

    keep: int
    block: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.block:
            raise InvalidPatternError(
                f"a layer budget keeps between 1 and cols - 1 weights per row on average: "
                f"expected 0 < keep < {self.block}, found keep = {self.keep}"
            )

    @classmethod
    def parse(cls, text: str, cols: int) -> LayerBudget:
        """Read ``layer:0.5`` or ``layer:50%`` for rows of ``cols`` weights.

        Raises:
            InvalidPatternError: if the text is neither or does not fit ``cols``.
        """
        kind, colon, share = text.strip().partition(":")
        if kind != "layer" or not colon or ":" in share:
            raise InvalidPatternError(
                f"a layer budget is layer: and a share of pruned weights: expected layer:0.5 or layer:50%, "
                f"found {text!r}"
            )
        row = SparsityPattern.parse(share, cols)
        return cls(row.keep, row.block)

    def check_cols(self, cols: int) -> None:
        """Raise ``InvalidPatternError`` unless rows have as many columns as the budget."""
        if cols != self.block:
            raise InvalidPatternError(
                f"pattern {self} is for one layer: expected {self.block} columns, found {cols}"
            )

    @property
    def sparsity(self) -> float:
        """Pruned share of the weights, in (0, 1)."""
        return 1 - self.keep / self.block

    def is_per_row(self, cols: int) -> bool:
        """False: the rows share one budget."""
        return False

    def top_k(self, scores: Tensor) -> Tensor:
        """Mask (rows, cols) that keeps the largest scores; ties go to the lowest row, then column."""
        rows, cols = scores.shape
        self.check_cols(cols)
        order = scores.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(rows * cols, dtype=torch.bool, device=scores.device)
        mask[order[: self.keep * rows]] = True
        return mask.view(rows, cols)

    def allows(self, mask: Tensor) -> bool:
        """Whether ``mask`` (rows, cols) keeps ``keep · rows`` weights."""
        rows, cols = mask.shape
        return mask.dtype == torch.bool and cols == self.block and int(mask.sum()) == self.keep * rows

    def __str__(self) -> str:
        return f"layer {self.keep}:{self.block}"


Pattern = SparsityPattern | LayerBudget


def pattern_of(keep: int, block: int, scope: str) -> Pattern:
    """The pattern whose fields and scope these are, as files store them."""
    return LayerBudget(keep, block) if scope == LayerBudget.scope else SparsityPattern(keep, block)


def parse_pattern(text: str, cols: int) -> Pattern:
    """Read ``0.5``, ``50%``, ``2:4`` or ``layer:0.5`` for rows of ``cols`` weights.

    Raises:
        InvalidPatternError: if the text is none of these or does not fit ``cols``.
    """
    if text.strip().startswith("layer:"):
        return LayerBudget.parse(text, cols)
    return SparsityPattern.parse(text, cols)
