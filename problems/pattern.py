"""Sparsity patterns: which masks are allowed.

A pattern keeps ``keep`` of ``block`` weights: of every block of a row, or of all rows of a layer together.
What shares one budget is its *coupling*; a new kind of pattern is a subclass of ``Pattern`` with a coupling
of its own, and solvers say in ``Covers`` which couplings they cover. In a mask True means kept.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidPatternError


class Coupling(StrEnum):
    """Which weights share one budget; the value is what files store as the pattern's scope."""

    BLOCK = "block"
    """A block of a row, or the whole row: rows are solved one by one."""
    LAYER = "layer"
    """All weights of a layer: a row may keep more for others to keep less."""


@dataclass(frozen=True)
class Pattern(ABC):
    """Which masks are allowed.

    Args:
        keep: weights kept of ``block``.
        block: weights that are counted together.

    Class attributes:
        couples: what shares one budget.
    """

    couples: ClassVar[Coupling]

    keep: int
    block: int

    @staticmethod
    def parse(text: str, cols: int) -> Pattern:
        """Read ``0.5``, ``50%``, ``2:4`` or ``layer:0.5`` for rows of ``cols`` weights.

        Raises:
            InvalidPatternError: if the text is none of these or does not fit ``cols``.
        """
        return PatternRule.parse(text).at(cols)

    @property
    def sparsity(self) -> float:
        """Pruned share of the weights, in (0, 1)."""
        return 1 - self.keep / self.block

    @abstractmethod
    def check_cols(self, cols: int) -> None:
        """Raise ``InvalidPatternError`` unless the pattern fits rows of ``cols`` weights."""

    @abstractmethod
    def is_per_row(self, cols: int) -> bool:
        """Whether each row of ``cols`` weights has one budget of its own."""

    @abstractmethod
    def top_k(self, scores: Tensor) -> Tensor:
        """The allowed mask (rows, cols) of the largest summed score, the same on every device."""

    @abstractmethod
    def allows(self, mask: Tensor) -> bool:
        """Whether ``mask`` (rows, cols) has the pattern."""


@dataclass(frozen=True)
class SparsityPattern(Pattern):
    """Keep exactly ``keep`` of every ``block`` consecutive weights of a row.

    Per-row sparsity is one block as wide as the row; N:M is ``keep = N``, ``block = M``.

    Raises:
        InvalidPatternError: unless 0 < keep < block.
    """

    couples: ClassVar[Coupling] = Coupling.BLOCK

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
        _check_share(sparsity)
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

    @staticmethod
    def parse(text: str, cols: int) -> SparsityPattern:
        """Read ``0.5``, ``50%`` or ``2:4`` for rows of ``cols`` weights.

        Raises:
            InvalidPatternError: if the text is none of these or does not fit ``cols``.
        """
        pattern = Pattern.parse(text, cols)
        if not isinstance(pattern, SparsityPattern):
            raise InvalidPatternError(
                f"a pattern is a share of pruned weights or N:M: expected 0.5, 50% or 2:4, found {text!r}"
            )
        return pattern

    def check_cols(self, cols: int) -> None:
        """Raise ``InvalidPatternError`` unless rows of ``cols`` weights divide into blocks."""
        if cols <= 0 or cols % self.block:
            raise InvalidPatternError(
                f"pattern {self} needs rows that divide into blocks of {self.block}: "
                f"expected a multiple of {self.block} columns, found {cols}"
            )

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
class LayerBudget(Pattern):
    """Keep exactly ``keep · rows`` weights of a layer of ``block`` columns, however they fall on the rows.

    Equal sparsity per layer instead of per row: rows that need more weights take them from others, and
    a row may keep none or all.

    Args:
        keep: weights kept per row on average.
        block: columns of the layer.

    Raises:
        InvalidPatternError: unless 0 < keep < block.
    """

    couples: ClassVar[Coupling] = Coupling.LAYER

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.block:
            raise InvalidPatternError(
                f"a layer budget keeps between 1 and cols - 1 weights per row on average: "
                f"expected 0 < keep < {self.block}, found keep = {self.keep}"
            )

    @staticmethod
    def parse(text: str, cols: int) -> LayerBudget:
        """Read ``layer:0.5`` or ``layer:50%`` for rows of ``cols`` weights.

        Raises:
            InvalidPatternError: if the text is neither or does not fit ``cols``.
        """
        pattern = Pattern.parse(text, cols)
        if not isinstance(pattern, LayerBudget):
            raise InvalidPatternError(
                f"a layer budget is layer: and a share of pruned weights: expected layer:0.5 or layer:50%, "
                f"found {text!r}"
            )
        return pattern

    def check_cols(self, cols: int) -> None:
        """Raise ``InvalidPatternError`` unless rows have as many columns as the budget."""
        if cols != self.block:
            raise InvalidPatternError(
                f"pattern {self} is for one layer: expected {self.block} columns, found {cols}"
            )

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


@dataclass(frozen=True)
class PatternRule:
    """A pattern as people write it, before the width of a layer is known; ``str`` gives the text back.

    Args:
        text: what was written.
        couples: what shares one budget.
        share: pruned share of a row or a layer; None for N:M.
        n_m: N and M; None for a share.
    """

    text: str
    couples: Coupling
    share: float | None
    n_m: tuple[int, int] | None

    @classmethod
    def parse(cls, text: str) -> PatternRule:
        """Read ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``.

        Raises:
            InvalidPatternError: if the text is none of these.
        """
        stripped = text.strip()
        if match := re.fullmatch(r"(\d+):(\d+)", stripped):
            SparsityPattern.n_m(int(match[1]), int(match[2]))
            return cls(stripped, Coupling.BLOCK, None, (int(match[1]), int(match[2])))
        match = re.fullmatch(r"(layer:)?([+-]?[\d.]+(?:[eE][+-]?\d+)?)(\s*%)?", stripped)
        try:
            value = math.nan if match is None else float(match[2])
        except ValueError:
            value = math.nan
        if match is None or math.isnan(value):
            raise InvalidPatternError(
                "a pattern is a share of pruned weights or N:M: expected 0.5, 50%, 2:4 or layer:0.5, "
                f"found {text!r}"
            )
        share = value / 100 if match[3] else value
        _check_share(share)
        return cls(stripped, Coupling.LAYER if match[1] else Coupling.BLOCK, share, None)

    @classmethod
    def of_share(cls, share: float) -> PatternRule:
        """The pruned share of every row."""
        return cls.parse(repr(share))

    def at(self, cols: int) -> Pattern:
        """The pattern of rows of ``cols`` weights.

        Raises:
            InvalidPatternError: if it does not fit them.
        """
        if self.n_m is not None:
            pattern = SparsityPattern.n_m(*self.n_m)
            pattern.check_cols(cols)
            return pattern
        row = SparsityPattern.per_row(cols, self.share or 0.0)
        return LayerBudget(row.keep, row.block) if self.couples is Coupling.LAYER else row

    def __str__(self) -> str:
        return self.text


def _check_share(share: float) -> None:
    if not (math.isfinite(share) and 0 < share < 1):
        raise InvalidPatternError(
            f"sparsity is the pruned share of a row: expected 0 < sparsity < 1, found {share:g}"
        )


def pattern_of(keep: int, block: int, scope: str) -> Pattern:
    """The pattern whose fields and coupling these are, as files store them.

    Raises:
        InvalidPatternError: if there is no such coupling or the fields do not fit it.
    """
    kinds = {kind.couples.value: kind for kind in (SparsityPattern, LayerBudget)}
    for name, value in (("keep", keep), ("block", block)):
        if type(value) is not int:
            raise InvalidPatternError(f"{name} of a pattern: expected a whole number, found {value!r}")
    if not isinstance(scope, str) or scope not in kinds:
        raise InvalidPatternError(f"scope of a pattern: expected {' or '.join(kinds)}, found {scope!r}")
    return kinds[scope](keep, block)


def parse_pattern(text: str, cols: int) -> Pattern:
    """Read ``0.5``, ``50%``, ``2:4`` or ``layer:0.5`` for rows of ``cols`` weights (``Pattern.parse``).

    Raises:
        InvalidPatternError: if the text is none of these or does not fit ``cols``.
    """
    return Pattern.parse(text, cols)
