"""How many units of each kind are pruned, as it is written: ``channels=0.25,kv-groups=1``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..models.shrinking import Units
from ..models.units import EXPERTS, KINDS, UnitKind
from ..problems import SparsityPattern

# Widths of channels are multiples of this, as products of matrices like them.
MULTIPLE = 64


@dataclass(frozen=True)
class UnitShares:
    """What is pruned of each kind.

    Attributes:
        pruned: below 1 a share, else a number of units: of a layer's channels or groups of heads, of the
            query heads that share keys and values, of the experts that a router chooses among.
    """

    pruned: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> UnitShares:
        """Read ``channels=0.25,heads=1``.

        Raises:
            InputError: for another kind, no number, or one that is no share and no count.
        """
        known = (*KINDS, EXPERTS)
        wanted = ", ".join(f"{kind}=NUMBER" for kind in known)
        pruned: dict[str, float] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, _, value = part.partition("=")
            if name not in known:
                raise InputError(f"units: expected {wanted}, found {part!r}")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not (0 < number < 1 or (1 <= number < math.inf and number == int(number))):
                raise InputError(
                    f"units {name}: expected a share between 0 and 1 or a number of units, found {value!r}"
                )
            if name in pruned:
                raise InputError(f"units: expected each kind once, found {name} twice")
            pruned[name] = number
        if not pruned:
            raise InputError(f"units: expected {wanted}, found nothing")
        if {"heads", "kv-groups"} <= set(pruned):
            raise InputError(
                "units: expected heads or kv-groups, found both; prune one and then the result's others"
            )
        return cls(pruned)

    def __str__(self) -> str:
        return ",".join(f"{kind}={number:g}" for kind, number in self.pruned.items())

    @property
    def in_front_of_layers(self) -> list[UnitKind]:
        """The kinds that are inputs of a layer."""
        return [kind for kind in KINDS if kind in self.pruned]

    def pattern(self, group: Units, multiple: int = MULTIPLE) -> SparsityPattern:
        """How many of how many neighbouring units of ``group`` stay.

        Args:
            group: of a kind that is pruned.
            multiple: of which the number of channels that stay is one, the nearest.

        Raises:
            InputError: if none or all would stay.
        """
        block, number = group.exchangeable, self.pruned[group.kind]
        kept = block - (round(number * block) if number < 1 else int(number))
        if group.kind == "channels":
            kept = round(kept / multiple) * multiple
        if not 0 < kept < block:
            among = f"in multiples of {multiple} " if group.kind == "channels" and multiple > 1 else ""
            raise InputError(
                f"units {group.kind}={number:g} of {group.place}: expected some of {block} that stay "
                f"{among}and some that go, found {kept} that would stay"
            )
        return SparsityPattern(kept, block)
