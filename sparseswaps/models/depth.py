"""A model without some of its blocks, as an ordinary model of its family.

A configuration says how many blocks there are, and in lists what each of them is. Which key holds the number
is found by trying, as in ``shrinking``; lists as long as there are blocks lose the entries of those that go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, InvalidModelError
from .blocks import Block
from .loading import LoadedModel
from .shrinking import all_tensors, compared, constants_of, filled
from .sublayers import Sublayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks_without(sublayers: Sequence[Sublayer], gone: Sequence[Sublayer]) -> list[int]:
    """The blocks all of whose sublayers go.

    Args:
        sublayers: of the model, from ``find_sublayers``.
        gone: those that go.

    Raises:
        InputError: if a block keeps some of its sublayers, which no configuration can say.
    """
    names = {each.name for each in gone}
    blocks = sorted({each.block for each in gone})
    for each in sublayers:
        if each.block in blocks and each.name not in names:
            others = [other.name for other in gone if other.block == each.block]
            raise InputError(
                f"sublayers that leave a model: expected all of a block, since no configuration says that "
                f"a part of one is missing, found {', '.join(others)} without {each.name}; zero_sublayer "
                "makes one add nothing and stay"
            )
    return blocks


def check_shallower(loaded: LoadedModel, blocks: Sequence[Block], gone: Sequence[int]) -> int:
    """Refuse, before any work, what ``shallower_model`` could not make.

    Returns:
        Parameters of the model without the blocks, each tied one once.

    Raises:
        InputError: if these blocks cannot go.
        InvalidModelError: if no configuration of the family holds the model without them.
    """
    return sum(parameter.numel() for parameter in _skeleton(loaded.model, blocks, gone).parameters())


def shallower_model(loaded: LoadedModel, blocks: Sequence[Block], gone: Sequence[int]) -> LoadedModel:
    """The model without the blocks ``gone``; with their sublayers silenced the larger one computes the same.

    Tensors are shared with the larger model.

    Args:
        loaded: the model, whose weights may be offloaded; those of the smaller one are in memory.
        blocks: all its blocks, from ``find_blocks``.
        gone: numbers of those that go.

    Raises:
        InputError: if these blocks cannot go.
        InvalidModelError: if no configuration of the family holds the model without them.
    """
    return filled(_skeleton(loaded.model, blocks, gone), loaded, {}, _Renaming(blocks, gone))


class _Renaming:
    """Names of tensors without the blocks that go, None for what goes with them."""

    def __init__(self, blocks: Sequence[Block], gone: Sequence[int]) -> None:
        left = [block.name for number, block in enumerate(blocks) if number not in set(gone)]
        # those that stay take the places of the first ones
        self._names = {name: blocks[number].name for number, name in enumerate(left)}
        self._gone = [blocks[number].name for number in gone]

    def __call__(self, name: str) -> str | None:
        for old, new in self._names.items():
            if name.startswith(f"{old}."):
                return f"{new}{name[len(old) :]}"
        return None if any(name.startswith(f"{block}.") for block in self._gone) else name


def _skeleton(model: PreTrainedModel, blocks: Sequence[Block], gone: Sequence[int]) -> PreTrainedModel:
    """The model without the blocks, with all its tensors on the meta device."""
    total = len(blocks)
    if len({block.stack for block in blocks}) > 1:
        raise InvalidModelError(
            f"{type(model).__name__}: expected one stack of blocks to take some out of, found several"
        )
    if not 0 < len(set(gone)) < total or not set(gone) <= set(range(total)):
        raise InputError(
            f"blocks that go: expected some of 0 to {total - 1} and not all, found {sorted(set(gone))}"
        )
    renamed = _Renaming(blocks, gone)
    shapes = {
        other: tuple(tensor.shape)
        for name, tensor in all_tensors(model).items()
        if (other := renamed(name)) is not None
    }
    constants = {
        other: value for name, value in constants_of(model).items() if (other := renamed(name)) is not None
    }
    stay = torch.ones(total, dtype=torch.bool)
    stay[list(gone)] = False
    flaw = "no key of it has the number of blocks"
    for key, values in _configurations(model.config.to_dict(), stay):
        trial = compared(model, values, shapes, constants)
        if trial.model is not None and trial.flaw is None:
            return trial.model
        if "layer" in key or flaw.startswith("no key"):
            flaw = f"with {key} = {int(stay.sum())} {trial.flaw}"
    raise InvalidModelError(
        f"{type(model).__name__} without {len(set(gone))} of its {total} blocks: expected a configuration "
        f"that holds it, found none: {flaw}"
    )


def _configurations(values: Mapping[str, Any], stay: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configurations in which one number of blocks is smaller, the likely keys first, and lists shorter."""
    places = sorted(_places(values, len(stay)), key=lambda place: "layer" not in place[-1])
    for place in places:
        made = _shorter(deepcopy(dict(values)), stay)
        inner = made
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = int(stay.sum())
        yield place[-1], made


def _places(values: Mapping[str, Any], total: int) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [(key, *place) for place in _places(value, total)]
        elif type(value) is int and value == total and isinstance(key, str):
            found.append((key,))
    return found


def _shorter(values: Any, stay: Tensor) -> Any:
    """With every list that has an entry for each block without those of blocks that go."""
    if isinstance(values, dict):
        # lists of special tokens may happen to be as long
        return {key: value if "token" in str(key) else _shorter(value, stay) for key, value in values.items()}
    if isinstance(values, list | tuple) and len(values) == len(stay):
        return [value for value, left in zip(values, stay.tolist(), strict=True) if left]
    return values
