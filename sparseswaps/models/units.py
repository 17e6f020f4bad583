"""Units of a block: channels of an MLP, attention heads, groups of heads that share keys and values.

A unit is columns of one layer, the consumer, and the rows of other layers that make these inputs and nothing
else. Without it the block is narrower and computes the same as with the columns zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .blocks import PrunableLayer

UnitKind = Literal["channels", "heads", "kv-groups"]
KINDS: tuple[UnitKind, ...] = ("channels", "heads", "kv-groups")
# Units of a mixture (``models.experts``).
EXPERTS = "experts"


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """All units of one kind in front of one layer.

    Attributes:
        kind: what a unit is: a channel, a query head (with keys and values of its own where it has some), or
            all query heads that share keys and values together with these.
        block: index of the block.
        consumer: the layer whose inputs the units are.
        columns: (units, width) of the consumer, each column once.
        producers: layers and their rows (units, rows per unit); the entries of a bias go with its rows.
        sharing: query heads that share keys and values; 1 for channels.
    """

    kind: UnitKind
    block: int
    consumer: PrunableLayer
    columns: Tensor
    producers: tuple[tuple[PrunableLayer, Tensor], ...]
    sharing: int = 1

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.columns)

    @property
    def place(self) -> str:
        """What the units are in front of; a model cannot lose several kinds of units of one place."""
        return self.consumer.name

    @property
    def exchangeable(self) -> int:
        """So many neighbouring units can take each other's places, and equally many of them are kept.

        Query heads among those that share keys and values, all units otherwise.
        """
        return self.sharing if self.kind == "heads" and self.sharing > 1 else self.units

    def flaw_of(self, kept: int) -> str | None:
        """Why so many units cannot stay, None if they can."""
        sets = self.units // self.exchangeable
        if 0 < kept <= self.units and kept % sets == 0:
            return None
        return f"expected to keep from {sets} to {self.units}, a multiple of {sets}, found {kept}"

    @property
    def head_dim(self) -> int:
        """Columns of a query head."""
        return self.columns.shape[1] // (self.sharing if self.kind == "kv-groups" else 1)

    @property
    def layers(self) -> list[PrunableLayer]:
        """The consumer and the producers."""
        return [self.consumer, *(layer for layer, _ in self.producers)]


def bias_of(layer: PrunableLayer) -> Tensor | None:
    """The layer's bias (rows,), a view: writing to it changes the model; None without one."""
    bias = getattr(layer.module, "bias", None) if layer.expert is None else None
    return bias.detach() if isinstance(bias, Tensor) else None
