"""How the layers of a block depend on each other, as a pass shows it: the steps in which they are pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models.blocks import PrunableLayer
from .activations import Stream, first_argument
from .products import WeightUse


@dataclass(frozen=True, eq=False)
class Step:
    """Layers of a block that are observed in one pass.

    Attributes:
        inputs: groups of layers; the members of a group share their input and so one Gram matrix.
        reached: whether any token that was looked at came to them.
        once: whether none of them is called more than once in a pass.
    """

    inputs: tuple[tuple[PrunableLayer, ...], ...]
    reached: bool = True
    once: bool = True

    @property
    def layers(self) -> list[PrunableLayer]:
        """All layers of the step."""
        return [layer for group in self.inputs for layer in group]


def steps_of(stream: Stream) -> list[Step]:
    """The current block's layers in the order in which the first batch reaches them.

    Layers that receive the very same tensor form one group. The experts of a fused parameter form
    one step, each with its own input. Layers that the first batch does not reach come last.
    """
    layers = stream.current.layers
    seen: dict[tuple[Any, ...], list[PrunableLayer]] = {}
    held: list[Tensor] = []  # as long as the tensors live, their addresses are theirs alone
    calls: Counter[PrunableLayer] = Counter()

    def observer(layer: PrunableLayer, inputs: Tensor) -> None:
        held.append(inputs)
        calls[layer] += 1
        key: tuple[Any, ...]
        if layer.expert is not None:
            key = (id(layer.module), layer.parameter)
        else:
            key = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride())
        group = seen.setdefault(key, [])
        if layer not in group:
            group.append(layer)

    stream.observe(0, layers, observer, once=False)
    steps = []
    placed: set[PrunableLayer] = set()
    for members in seen.values():
        members = [layer for layer in members if layer not in placed]
        if not members:
            continue
        if members[0].expert is not None:
            first = members[0]
            experts = [x for x in layers if x.module is first.module and x.parameter == first.parameter]
            steps.append(Step(tuple((layer,) for layer in experts)))
            placed.update(experts)
        else:
            steps.append(Step((tuple(members),), once=all(calls[layer] == 1 for layer in members)))
            placed.update(members)
    unreached = [layer for layer in layers if layer not in placed]
    if (
        not placed and unreached
    ):  # the whole block, a tower for something else than tokens: one pass shows that
        return [Step(tuple((layer,) for layer in unreached), reached=False)]
    steps += [Step(((layer,),), reached=False) for layer in unreached]
    return steps


def used_without_call(stream: Stream, layers: Sequence[PrunableLayer]) -> set[str]:
    """Names of those of the current block's ``layers`` whose weights the first batch uses."""
    with WeightUse(layers) as seen:
        stream.observe(0, (), lambda _layer, _inputs: None)
    return set(seen.used)


def residual_writers(stream: Stream) -> list[PrunableLayer]:
    """The current block's layers whose output, as wide as the block's input, is added to something as it is.

    These write into the residual stream (attention output, second layer of an MLP); what their output is
    added to is the stream. Layers whose output is normed first, goes through a router, or that are called
    more than once, are none.
    """
    layers = [layer for layer in stream.current.layers if layer.expert is None]
    found: list[PrunableLayer] = []
    widths: list[int] = []
    calls: Counter[PrunableLayer] = Counter()

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        widths.append(first_argument(args, kwargs).shape[-1])

    def note(layer: PrunableLayer, _stream: Tensor) -> None:
        found.append(layer)

    handle = stream.current.module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        stream.observe(
            0,
            layers,
            lambda layer, _: calls.update([layer]),
            writers=layers,
            stream_observer=note,
            once=False,
        )
    finally:
        handle.remove()
    # an activation function may add a layer's output to a power of itself; it is wider than the stream
    return [
        layer
        for layer in layers
        if layer in found and calls[layer] == 1 and layer.weight.shape[0] == widths[0]
    ]
