"""Which channels and heads a model has, found by what it computes.

Nothing here knows a model family. What belongs together is guessed from the shapes of layers and the order in
which a pass reaches them, and a guess counts if the model says so. Its units change places, with the columns
of the consumer and the rows and biases of the producers, and what the consumer and the block return stays;
the columns alone change places, and it changes; the producers' rows of units whose columns are zero become
others, and it stays: nothing else reads them, no norm over several units is between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models.blocks import Block, PrunableLayer, device_of
from ..models.inputs import Samples, forward_inputs
from ..models.offload import Residence
from ..models.outputs import same_but_for_rounding
from ..models.units import KINDS, UnitGroup, UnitKind, bias_of
from .activations import PROBE_TOKENS, Stream, can_skip, until_head
from .steps import steps_of
from .store import TensorStore

# Heads are looked for among the layers of so many steps before the consumer: queries may come alone.
_STEPS_OF_ATTENTION = 2


@dataclass(frozen=True, eq=False)
class FoundUnits:
    """The units of a model.

    Attributes:
        groups: in forward order.
        missing: for a block's index and a kind of which it has no units, why.
    """

    groups: tuple[UnitGroup, ...]
    missing: Mapping[tuple[int, UnitKind], str]


def find_units(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Samples,
    kinds: Sequence[UnitKind] = KINDS,
    residence: Residence | None = None,
) -> FoundUnits:
    """The units of every block, verified on one window; the weights are as before at the end.

    In a dtype of low precision smaller differences between units pass for rounding.

    Args:
        model: the network, in evaluation mode.
        blocks: all its blocks, from ``find_blocks``.
        windows: (windows, length) token ids, or other inputs; two are enough.
        kinds: which units to look for; without shared keys and values ``heads`` and ``kv-groups`` are the
            same.
        residence: where the blocks' weights are.
    """
    residence = residence or Residence()
    window = windows[:1]
    if isinstance(window, Tensor):
        window = window[:, :PROBE_TOKENS]
    probe = _Probe(model, blocks, window, can_skip(model, blocks, windows))
    numbers = _numbers_of(model)
    groups: list[UnitGroup] = []
    missing: dict[tuple[int, UnitKind], str] = {}
    for index, block in enumerate(blocks):
        with residence.resident(block):
            found, flaws = _units_of(probe, block, index, kinds, numbers)
            probe.go_on()
        groups += found
        missing |= {(index, kind): flaws[kind] for kind in kinds if kind in flaws}
    return FoundUnits(tuple(groups), missing)


class _Probe:
    """One window through the current block, or through the whole model if blocks depend on more than that."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], window: Samples, skip: bool) -> None:
        self._model = model
        self._window = window
        self._store = TensorStore()
        # with history, so that a block finds what it received again
        self.stream = Stream(model, blocks, window, 1, skip, self._store, history=True)
        self._number = 0

    def outputs(self, consumer: PrunableLayer) -> list[Tensor]:
        """What the consumer returns, and what comes of it: the block's output, or the model's."""
        found: list[Tensor] = []
        keep = consumer.module.register_forward_hook(lambda _m, _i, output: found.append(output.clone()))
        try:
            return found + self._last()
        finally:
            keep.remove()

    def _last(self) -> list[Tensor]:
        if self.stream.skips:
            self.stream.advance(0)
            return [tensor.clone() for tensor in self._store.tensors((0, self._number))]
        inputs = forward_inputs(self._model, self._window.to(device_of(self._model)))
        with torch.no_grad(), until_head(self._model) as received:
            output: Any = self._model(**inputs)
        if received:
            return [tensor.clone() for tensor in received]
        return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def go_on(self) -> None:
        """To the next block, with the weights as they are."""
        self.stream.advance(0)
        self.stream.finish_block()
        self._number += 1


@dataclass(frozen=True, eq=False)
class _Reached:
    """A layer, and when a pass reaches it: layers with the same number have the same input."""

    layer: PrunableLayer
    step: int

    @property
    def rows(self) -> int:
        return self.layer.weight.shape[0]


def _units_of(
    probe: _Probe, block: Block, index: int, kinds: Sequence[UnitKind], numbers: set[int]
) -> tuple[list[UnitGroup], dict[UnitKind, str]]:
    """The units of a block, and for each kind of which there are none, why."""
    reached = [
        _Reached(layer, number)
        for number, step in enumerate(steps_of(probe.stream))
        for layer in step.layers
        if step.reached and layer.expert is None
    ]
    found: list[UnitGroup] = []
    flaws: dict[UnitKind, _Flaw] = {}
    for consumer in reached:
        sources = _sources(block, consumer, reached)
        dense = probe.outputs(consumer.layer) if sources else []
        around = numbers | _numbers_around(block, consumer.layer)
        for guesses in (_channels(index, consumer, sources), _heads(index, consumer, sources, around)):
            verified = _verified(probe, dense, guesses, kinds, flaws)
            found += [group for group in verified if group.kind in kinds]
            if any(group.kind == "heads" and group.sharing == group.units for group in verified):
                text = f"columns of {consumer.layer.name}: all heads share one group of keys and values"
                flaws["kv-groups"] = _Flaw(4, text)
            if verified:  # of a consumer whose inputs are channels, several of them pass for heads
                break
    kinds_found = {group.kind for group in found}
    nothing = _Flaw(0, "no layer whose columns are rows of layers before it")
    apart = "; fused experts are not looked into" if any(x.expert is not None for x in block.layers) else ""
    return found, {kind: flaws.get(kind, nothing).text + apart for kind in KINDS if kind not in kinds_found}


def _verified(
    probe: _Probe,
    dense: list[Tensor],
    guesses: Iterator[tuple[UnitGroup, ...]],
    kinds: Sequence[UnitKind],
    flaws: dict[UnitKind, _Flaw],
) -> list[UnitGroup]:
    """The groups of the first guess of which one or more are what they seem; else ``flaws`` has why not."""
    for guess in guesses:
        verified = []
        for group in guess:
            if len(guess) > 1 and group.kind not in kinds:
                continue
            flaw = _flaw_of(probe, dense, group)
            if flaw is None:
                verified.append(group)
            elif group.kind not in flaws or flaw.passed > flaws[group.kind].passed:
                flaws[group.kind] = flaw
        if verified:
            return verified
    return []


def _sources(block: Block, consumer: _Reached, reached: Sequence[_Reached]) -> list[list[_Reached]]:
    """Layers before the consumer in the smallest module around it that has some, step by step, last first."""
    before = [each for each in reached if each.step < consumer.step]
    place = consumer.layer.name
    while place != block.name and place:
        place = place.rpartition(".")[0]
        inside = [each for each in before if not place or each.layer.name.startswith(f"{place}.")]
        if inside:
            steps = sorted({each.step for each in inside}, reverse=True)
            return [[each for each in inside if each.step == step] for step in steps]
    return []


def _channels(
    index: int, consumer: _Reached, sources: Sequence[Sequence[_Reached]]
) -> Iterator[tuple[UnitGroup, ...]]:
    """Guesses at layers whose outputs, be they gated, are the consumer's inputs one by one."""
    cols = consumer.layer.weight.shape[1]
    columns = torch.arange(cols)[:, None]
    for step in sources:
        made: list[tuple[tuple[PrunableLayer, Tensor], ...]] = []
        same = [each.layer for each in step if each.rows == cols]
        if 0 < len(same) <= 2:
            made.append(tuple((layer, columns) for layer in same))
        for each in step:
            if each.rows == 2 * cols:
                halves = torch.arange(2 * cols)
                made.append(((each.layer, halves.view(2, cols).T.contiguous()),))
                made.append(((each.layer, halves.view(cols, 2)),))
        for producers in made:
            yield (UnitGroup("channels", index, consumer.layer, columns, producers),)


def _heads(
    index: int, consumer: _Reached, sources: Sequence[Sequence[_Reached]], numbers: set[int]
) -> Iterator[tuple[UnitGroup, ...]]:
    """Guesses at heads whose outputs, side by side, are the consumer's inputs: the smallest heads first.

    Several heads in one pass for a head, a part of one does not.
    """
    cols = consumer.layer.weight.shape[1]
    fitting = {number for number in numbers if number > 0 and cols % number == 0}
    counts = {heads for number in fitting for heads in (number, cols // number) if 1 < heads < cols}
    for heads in sorted(counts, reverse=True):
        for number in range(1, min(_STEPS_OF_ATTENTION, len(sources)) + 1):
            producers = [each for step in sources[:number] for each in step]
            for sharing, parts in _attentions(producers, heads, cols // heads):
                yield _groups(index, consumer.layer, heads, sharing, parts)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Rows of a layer: queries (heads, rows per head), keys and values (groups, rows per group)."""

    layer: PrunableLayer
    queries: Tensor | None = None
    shared: Tensor | None = None


def _attentions(
    producers: Sequence[_Reached], heads: int, head_dim: int
) -> Iterator[tuple[int, list[_Parts]]]:
    """How layers may make queries, keys and values: heads that share some, and the rows of each layer."""
    rows = [each.rows for each in producers]
    if all(each % heads == 0 for each in rows):  # [q k v] of each head, in one layer or in several
        yield 1, [_Parts(each.layer, None, torch.arange(each.rows).view(heads, -1)) for each in producers]
    if len(producers) > 1:
        least = min(rows)
        groups = least // head_dim
        others = all(each == least or each % heads == 0 for each in rows)
        if least % head_dim == 0 and 0 < groups < heads and heads % groups == 0 and others:
            yield (
                heads // groups,
                [
                    _Parts(each.layer, None, torch.arange(least).view(groups, -1))
                    if each.rows == least
                    else _Parts(each.layer, torch.arange(each.rows).view(heads, -1))
                    for each in producers
                ],
            )
        return
    groups, rest = divmod(rows[0] - heads * head_dim, 2 * head_dim)
    if rest or groups < 1 or heads % groups:
        return
    layer, sharing = producers[0].layer, heads // groups
    order = torch.arange(rows[0])
    q, k, v = order.tensor_split([heads * head_dim, (heads + groups) * head_dim])  # all of each in a row
    yield sharing, [_Parts(layer, q.view(heads, -1), torch.cat([k.view(groups, -1), v.view(groups, -1)], 1))]
    if sharing > 1:  # [q ... q k v] of each group
        each_group = order.view(groups, -1)
        queries = each_group[:, : sharing * head_dim].reshape(heads, -1)
        yield sharing, [_Parts(layer, queries, each_group[:, sharing * head_dim :])]


def _groups(
    index: int, consumer: PrunableLayer, heads: int, sharing: int, parts: Sequence[_Parts]
) -> tuple[UnitGroup, ...]:
    """Groups of heads with keys and values, and query heads alone where several share these."""
    columns = torch.arange(consumer.weight.shape[1])
    groups = heads // sharing
    whole = []
    for part in parts:
        rows = [] if part.queries is None else [part.queries.reshape(groups, -1)]
        whole.append((part.layer, torch.cat(rows + ([] if part.shared is None else [part.shared]), 1)))
    together = UnitGroup("kv-groups", index, consumer, columns.view(groups, -1), tuple(whole), sharing)
    queries = tuple((part.layer, part.queries) for part in parts if part.queries is not None)
    if sharing == 1:
        queries = tuple(whole)
    alone = UnitGroup("heads", index, consumer, columns.view(heads, -1), queries, sharing)
    return (together, alone) if groups > 1 else (alone,)


def _numbers_of(model: nn.Module) -> set[int]:
    """All whole numbers in the model's configuration."""
    config: Any = getattr(model, "config", None)
    leaves = pytree.tree_leaves(config.to_dict()) if hasattr(config, "to_dict") else []
    return {leaf for leaf in leaves if type(leaf) is int}


def _numbers_around(block: Block, layer: PrunableLayer) -> set[int]:
    """All whole numbers that modules around the layer hold, from the block on."""
    found: set[int] = set()
    for name, module in block.module.named_modules(prefix=block.name):
        if not name or layer.name.startswith(f"{name}."):
            found |= {value for value in vars(module).values() if type(value) is int}
    return found


@dataclass(frozen=True)
class _Flaw:
    """Why a guess is wrong, and how many checks it passed."""

    passed: int
    text: str


def _flaw_of(probe: _Probe, dense: Sequence[Tensor], group: UnitGroup) -> _Flaw | None:
    """Why a group's units are not what they seem, None if they are; the weights are as before."""

    def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
        return len(one) == len(other) and all(map(same_but_for_rounding, one, other))

    names = ", ".join(layer.name for layer, _ in group.producers)
    what = f"columns of {group.consumer.name} with rows of {names}"
    order = _exchange(group)
    with _afterwards_as_before(group.layers):
        _exchange_columns(group, order)
        _exchange_rows(group, order)
        if not same(probe.outputs(group.consumer), dense):
            return _Flaw(1, f"{what}: what the model computes changes when they change places")
    with _afterwards_as_before(group.layers):
        _exchange_columns(group, order)
        if same(probe.outputs(group.consumer), dense):
            return _Flaw(2, f"{what}: nothing shows whether they belong together, on the window looked at")
    with _afterwards_as_before(group.layers):
        absent = torch.arange(group.units) % 2 == 0
        group.consumer.weight[:, group.columns[absent].flatten()] = 0
        expected = probe.outputs(group.consumer)
        for layer, rows in group.producers:
            for values in _with_rows(layer):
                values[rows[absent].flatten()] *= -0.5
        if not same(probe.outputs(group.consumer), expected):
            return _Flaw(3, f"{what}: something beside their own columns reads them, such as a norm of all")
    return None


def _exchange(group: UnitGroup) -> Tensor:
    """A random order of the units in which none stays where it is."""
    generator = torch.Generator().manual_seed(0)
    size = group.exchangeable
    order = torch.empty(group.units, dtype=torch.long)
    for start in range(0, group.units, size):
        cycle = start + torch.randperm(size, generator=generator)
        order[cycle] = cycle.roll(1)
    return order


def _exchange_columns(group: UnitGroup, order: Tensor) -> None:
    weight = group.consumer.weight
    weight[:, group.columns.flatten()] = weight[:, group.columns[order].flatten()]


def _exchange_rows(group: UnitGroup, order: Tensor) -> None:
    for layer, rows in group.producers:
        for values in _with_rows(layer):
            values[rows.flatten()] = values[rows[order].flatten()]


def _with_rows(layer: PrunableLayer) -> list[Tensor]:
    """The layer's weight (rows, cols) and bias (rows,), views."""
    bias = bias_of(layer)
    return [layer.weight] if bias is None else [layer.weight, bias]


@contextmanager
def _afterwards_as_before(layers: Sequence[PrunableLayer]) -> Iterator[None]:
    """Weights and biases of ``layers`` are again what they were."""
    views = [values for layer in layers for values in _with_rows(layer)]
    copies = [values.clone() for values in views]
    try:
        yield
    finally:
        for values, copy in zip(views, copies, strict=True):
            values.copy_(copy)
