"""The gradient of a loss, block by block for all windows, where a block is long in coming to memory.

Autograd goes through all blocks for some windows, and so asks for every block again with the next ones. Here
each block sees all windows in turn, once forward and once backward: of its output the gradient is known when
all blocks behind it are done, and its inputs are what the blocks before it returned, which are kept. What is
around the blocks is the model's own forward, as in ``activations``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..models.blocks import Block, device_of
from ..models.inputs import Samples
from ..models.offload import Residence
from .activations import Stream
from .logits import Outputs, SlicedModel
from .store import TensorStore

# The loss of what the model returned for some windows, with its gradient.
Loss = Callable[[Outputs, range], Tensor]


def backward_through_blocks(
    model: SlicedModel,
    blocks: Sequence[Block],
    windows: Samples,
    parts: Sequence[range],
    first: int,
    loss: Loss,
    residence: Residence,
    store: TensorStore,
) -> None:
    """Run a model forward and backward; hooks see the gradients.

    Args:
        model: whose blocks depend on earlier ones only through what those return (``can_skip``).
        blocks: all of them, from ``find_blocks``.
        windows: token windows, or other inputs.
        parts: neighbouring windows, as many at a time as memory lets through.
        first: the number of the block down to which gradients go.
        loss: of each part.
        residence: where the blocks' weights are.
        store: whose siblings keep activations and gradients between the blocks.
    """
    size = len(parts[0])
    some = windows[parts[0].start : parts[-1].stop]
    stream = Stream(model.model, blocks, some, size, store=store.sibling(), history=True)
    ends = {block.stack: number for number, block in enumerate(blocks)}
    gradients = _Gradients(store.sibling(), first, frozenset(ends.values()))
    for number, block in enumerate(blocks):
        with residence.resident(block):
            for batch in range(len(parts)):
                stream.advance(batch)
        stream.finish_block()
        before = [i for i in range(number) if blocks[i].stack == block.stack]
        if number < first and before:
            for batch in range(len(parts)):
                stream.forget(batch, before[-1])
    for batch, part in enumerate(parts):
        with torch.enable_grad(), stream.recalled(batch, gradients.start):
            found = loss(model.run(windows[part.start : part.stop]), part)
            found.backward()  # type: ignore[no-untyped-call]
        gradients.keep(batch)
    for number in reversed(range(first, len(blocks))):
        stream.go_back()
        with residence.resident(blocks[number]):
            for batch in range(len(parts)):
                given = gradients.take(batch, number, device_of(model.model))
                if any(each is not None for each in given):
                    _backward(stream.output(batch, gradients.start), given)
                    gradients.keep(batch)
                stream.forget(batch, number)


def _backward(output: Any, given: Sequence[Tensor | None]) -> None:
    """Go backward from the tensors of an output of which gradients are given."""
    pairs = [
        (tensor, gradient)
        for tensor, gradient in zip(_floats(output), given, strict=True)
        if gradient is not None and tensor.requires_grad
    ]
    if pairs:
        tensors, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, gradients)


class _Gradients:
    """Gradients of what blocks from ``first`` on return, from where they are read.

    What the last blocks of stacks, ``ends``, return is read with a gradient even before ``first``: layers of
    another stack may have outputs of nothing else.
    """

    def __init__(self, store: TensorStore, first: int, ends: frozenset[int]) -> None:
        self._store = store
        self._first = first
        self._ends = ends
        self._read: dict[int, list[Tensor]] = {}

    def start(self, number: int, output: Any) -> Any:
        """The output of a block as the model reads it, where its gradient is to be found."""
        if number >= self._first or number in self._ends:
            read = [tensor.requires_grad_() for tensor in _floats(output)]
            if number >= self._first:
                self._read[number] = read
        return output

    def keep(self, batch: int) -> None:
        """Add what was found since."""
        for number, tensors in self._read.items():
            found = [tensor.grad for tensor in tensors]
            device = tensors[0].device
            both = zip(self.take(batch, number, device) or [None] * len(found), found, strict=True)
            self._store.keep((batch, number), [_sum(*each) for each in both])
        self._read.clear()

    def take(self, batch: int, number: int, device: torch.device) -> list[Tensor | None]:
        """The gradients of a block's output, none if nothing read it."""
        if (batch, number) not in self._store:
            return []
        found: list[Tensor | None] = self._store.recall((batch, number), device)
        self._store.drop((batch, number))
        return found


def _floats(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
