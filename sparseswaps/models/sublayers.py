"""Sublayers of a block: what it adds to what it receives, such as attention and MLP, by trying.

A child of a block that holds layers is one if the block, with the outputs of all such children zero, returns
what it received, and with the others' alone does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InvalidModelError
from .blocks import Block, device_of
from .inputs import Samples, forward_inputs
from .outputs import same_but_for_rounding


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One module of a block whose output the block adds to what it hands on.

    Attributes:
        block: index of the block.
        name: dotted name in the model.
        module: itself.
    """

    block: int
    name: str
    module: nn.Module


def find_sublayers(model: nn.Module, blocks: Sequence[Block], windows: Samples) -> list[Sublayer]:
    """The sublayers of every block, in forward order, as one window shows them.

    Args:
        model: the network, in evaluation mode.
        blocks: all its blocks, from ``find_blocks``.
        windows: (windows, length) token ids, or other inputs; one is looked at.

    Raises:
        InvalidModelError: for a block that returns something else than it received when they are gone.
    """
    found: list[Sublayer] = []
    for index, block in enumerate(blocks):
        inside = {part for layer in block.layers for part in [layer.module]}
        children = [
            Sublayer(index, f"{block.name}.{name}", child)
            for name, child in block.module.named_children()
            if inside & set(child.modules())
        ]
        needed = list(children)
        if not children or not _passes_on(model, block, windows, needed):
            raise InvalidModelError(
                f"block {block.name}: expected that it returns what it received when "
                f"{' and '.join(child.name for child in children) or 'its layers'} add nothing, found "
                "something else: no sublayer of it can be left out"
            )
        for child in children:
            others = [each for each in needed if each is not child]
            if others and _passes_on(model, block, windows, others):
                needed = others
        found += needed
    return found


def zero_sublayer(model: nn.Module, block: Block, sublayer: Sublayer, windows: Samples) -> str:
    """Set to zero what makes a sublayer add nothing: the weight and bias of its last layer.

    The model is as large and as fast as before; only whole blocks can leave it (``models.depth``).

    Args:
        model: the network, in place.
        block: the sublayer's.
        sublayer: from ``find_sublayers``.
        windows: (windows, length) token ids, or other inputs; one is looked at.

    Returns:
        The name of the parameter that is zero now.

    Raises:
        InvalidModelError: if no single layer does it.
    """
    inside = set(sublayer.module.modules())
    layers = {layer.parameter_name: layer for layer in block.layers if layer.module in inside}
    for name, layer in reversed(layers.items()):
        own = [getattr(layer.module, layer.parameter), getattr(layer.module, "bias", None)]
        views = [each.detach() for each in own if isinstance(each, Tensor)]
        copies = [view.clone() for view in views]
        for view in views:
            view.zero_()
        if all(not bool(output.any()) for output in _outputs(model, sublayer, windows)):
            return name
        for view, copy in zip(views, copies, strict=True):
            view.copy_(copy)
    raise InvalidModelError(
        f"sublayer {sublayer.name}: expected a layer that makes it add nothing when it is zero, found none"
    )


def _outputs(model: nn.Module, sublayer: Sublayer, windows: Samples) -> list[Tensor]:
    """What a sublayer returns in a pass."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)).clone())

    handle = sublayer.module.register_forward_hook(note)
    try:
        with torch.no_grad():
            model(**forward_inputs(model, windows[:1].to(device_of(model))))
    finally:
        handle.remove()
    return found


@contextmanager
def silenced(sublayers: Sequence[Sublayer]) -> Iterator[None]:
    """While this is open, ``sublayers`` return zeros."""

    def zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten(output)
        first = next(number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[first] = torch.zeros_like(leaves[first])
        return pytree.tree_unflatten(leaves, structure)

    with ExitStack() as hooks:
        for sublayer in sublayers:
            hooks.callback(sublayer.module.register_forward_hook(zeros).remove)
        yield


def _passes_on(model: nn.Module, block: Block, windows: Samples, without: Sequence[Sublayer]) -> bool:
    """Whether the block returns what it received without some of its children."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        returned = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        seen.append((given[0].clone(), returned[0].clone()))

    handle = block.module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), silenced(without):
            model(**forward_inputs(model, windows[:1].to(device_of(model))))
    finally:
        handle.remove()
    return bool(seen) and all(same_but_for_rounding(given, returned) for given, returned in seen)
