"""The experts of a mixture as units: their weights, and what the router has of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class ExpertGroup:
    """The experts of one mixture.

    Attributes:
        block: index of the block.
        name: of the mixture, the module whose output is the sum over experts and whatever is beside them.
        module: the mixture.
        experts: the module inside that holds the experts' weights.
        tensors: names in the model of the parameters and buffers that have an entry for each expert, and the
            axis along which these lie: the experts' weights, and the router's rows.
        units: how many experts there are.
        exchangeable: so many neighbours can take each other's places, fewer than all where the router chooses
            among groups of experts first; equally many of each such group stay.
        channels: of what it returns.
        per_token: to how many experts a token goes at most.
        scaled: those of ``tensors`` with which an expert's contribution is multiplied, () if not known.
        groups_per_token: to how many such groups.
    """

    kind: ClassVar[str] = "experts"

    block: int
    name: str
    module: nn.Module
    experts: nn.Module
    tensors: tuple[tuple[str, int], ...]
    units: int
    exchangeable: int
    channels: int
    per_token: int
    scaled: tuple[str, ...] = ()
    groups_per_token: int = 1

    @property
    def place(self) -> str:
        """What the units are in front of; a model cannot lose several kinds of units of one place."""
        return self.name

    def flaw_of(self, kept: int) -> str | None:
        """Why so many experts cannot stay, None if they can."""
        sets = self.units // self.exchangeable
        if not 0 < kept <= self.units or kept % sets:
            return f"expected to keep from {sets} to {self.units}, a multiple of {sets}, found {kept}"
        least = -(-self.per_token // min(self.groups_per_token, sets)) * sets
        if kept < least:
            among = f" from {self.groups_per_token} of {sets} groups" if sets > 1 else ""
            return (
                f"expected to keep at least {least}, for a token goes to {self.per_token} experts{among}, "
                f"found {kept}"
            )
        return None


def mixture_output(output: Any) -> Tensor:
    """What a mixture returns for each token (tokens, channels), the first tensor of its output."""
    states = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return states.reshape(-1, states.shape[-1])


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, a view: writing to it changes the model."""
    place, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(place), attribute)
    return found.detach()
