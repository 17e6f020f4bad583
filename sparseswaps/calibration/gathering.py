"""Gram matrices of a model's layers, gathered from its activations on token windows.

Windows are cut into batches and batches into at most ``PARTS`` groups of neighbours, both independent of the
number of processes. The sums of a group are made by the rank that owns it and added group after group,
so that they are the same, bit for bit, on one process or many. Beside a sum every rank holds one group's
and, for as long as it is sent, another one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import InvalidModelError, InvalidProblemError
from ..machine import give_back_memory
from ..models.blocks import Block, PrunableLayer
from ..models.inputs import Samples
from ..problems import GramAccumulator
from ..ranks import Ranks
from .activations import Observer, Stream
from .experts import is_expert
from .settled import Settled
from .steps import Step, residual_writers, steps_of
from .store import TensorStore
from .targets import Target

# Tokens per forward call: enough to keep a processor busy, few enough for its memory.
TOKENS_PER_BATCH = 8192
# Batches that there are at least, where there are as many windows: work for several processes.
LEAST_BATCHES = 4
# Groups of batches whose sums are added in order: as many processes can share the windows.
PARTS = 32


def batch_size_for(length: int) -> int:
    """Windows of ``length`` tokens per forward call."""
    return max(1, TOKENS_PER_BATCH // length)


def gradient_batch_size_for(length: int) -> int:
    """Windows of ``length`` tokens per forward and backward call: half, for what the backward pass keeps."""
    return max(1, batch_size_for(length) // 2)


def flow_batch_size(windows: int, length: int) -> int:
    """Windows per forward call of a ``Flow`` of so many windows of ``length`` tokens."""
    return max(1, min(batch_size_for(length), windows // LEAST_BATCHES))


@dataclass(frozen=True, eq=False)
class Flow:
    """Activations of the pruned network, and beside them of the dense one where drift needs them.

    Attributes:
        pruned: on all batches; a rank holds those that it owns.
        dense: the same of the dense model, or None.
        probe: of the pruned network on one window, which shows how a block's layers depend on each other.
        seen: what the dense network's layers of the current block receive, of batches that went through it.
        settled: what the pruned network's final layers of the current block return.
        target: what layers are fitted to where the dense network travels beside.
        parts: groups of batches.
        ranks: the processes; group ``i`` belongs to rank ``i`` modulo their number.
    """

    pruned: Stream
    dense: Stream | None
    probe: Stream
    seen: Seen
    settled: Settled
    target: Target | None
    parts: tuple[range, ...]
    ranks: Ranks

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: Sequence[Block],
        windows: Samples,
        skip: bool,
        target: Target | None,
        ranks: Ranks,
        store: TensorStore,
    ) -> Flow:
        """The flow of ``windows`` (windows, length) through ``model`` as it is now.

        Args:
            model: the network.
            blocks: from ``find_blocks``.
            windows: token windows.
            skip: whether finished blocks can be skipped (``can_skip``).
            target: what layers are fitted to, for which the dense network's activations travel beside the
                pruned one's; None for the pruned network's alone.
            ranks: the processes.
            store: whose siblings keep the activations.
        """
        size = flow_batch_size(len(windows), windows.shape[1])
        pruned = Stream(model, blocks, windows, size, skip, store.sibling())
        count = min(PARTS, len(pruned))
        ends = [i * len(pruned) // count for i in range(count + 1)]
        return cls(
            pruned,
            Stream(model, blocks, windows, size, skip, store.sibling()) if target else None,
            Stream(model, blocks, windows[:1], 1, skip, store.sibling()),
            Seen(store.sibling()),
            Settled(store.sibling()),
            target,
            tuple(range(first, last) for first, last in pairwise(ends)),
            ranks,
        )

    def own_batches(self) -> list[int]:
        """Batches of this rank."""
        own = self.parts[self.ranks.number :: self.ranks.count]
        return [batch for part in own for batch in part]

    def steps(self) -> list[Step]:
        """``steps_of`` the current block, the same on every rank."""
        layers = {layer.name: layer for layer in self.pruned.current.layers}

        def found() -> list[tuple[list[list[str]], bool, bool]]:
            steps = steps_of(self.probe)
            if not all(step.reached for step in steps):  # few tokens do not come to every expert
                steps = steps_of(self.pruned)
            return [
                ([[layer.name for layer in group] for group in step.inputs], step.reached, step.once)
                for step in steps
            ]

        return [
            Step(tuple(tuple(layers[name] for name in group) for group in names), reached, once)
            for names, reached, once in self.ranks.from_first(found)
        ]

    def writers(self) -> list[PrunableLayer]:
        """``residual_writers`` of the current block, the same on every rank."""
        layers = {layer.name: layer for layer in self.pruned.current.layers}
        names = self.ranks.from_first(lambda: [layer.name for layer in residual_writers(self.probe)])
        return [layers[name] for name in names]

    def begin_block(self, block: Block, steps: Sequence[Step]) -> None:
        """Layers of the current block are pruned step by step, which ``settle`` tells of."""
        if steps and self.pruned.skips and all(step.reached and step.once for step in steps):
            self.settled.begin(block, [layer for step in steps for layer in step.layers])

    def observe(
        self,
        batch: int,
        step: Step,
        observer: Observer,
        advance: bool,
        writers: Sequence[PrunableLayer],
        stream_observer: Observer,
    ) -> None:
        """What the pruned network's layers of a step receive, see ``Stream.observe``."""
        leaders = [group[0] for group in step.inputs]
        around = self._settled(batch)
        self.pruned.observe(batch, leaders, observer, advance, writers, stream_observer, step.once, around)

    def _settled(self, batch: int) -> AbstractContextManager[None]:
        return self.settled.passing(batch, self.pruned.device)

    def finish_block(self, block: Block, dense: Mapping[str, Tensor], advanced: bool) -> None:
        """Go on to the next block; ``advanced`` says that the pruned network's outputs are there already."""
        if not advanced:
            for batch in self.own_batches():
                self.pruned.advance(batch, self._settled(batch))
        self.pruned.finish_block()
        self.settled.clear()
        if self.ranks.first:
            self.probe.advance(0)
        self.probe.finish_block()
        if self.dense is not None:
            with other_weights(block, dense):
                for batch in self.own_batches():
                    if batch not in self.seen.batches:
                        self.dense.advance(batch)
            self.dense.finish_block()
            self.seen.clear()
        give_back_memory()  # of all that a block's passes made and freed, little is in one piece


class Seen:
    """What layers of the dense network receive in the current block, batch by batch.

    Its weights do not change on the way through a block, so that one pass shows the inputs of all its layers
    and what the block returns, where there is room to keep them; otherwise each step takes a pass of its own.

    Args:
        store: keeps them.

    Attributes:
        batches: those that have gone through the block.
    """

    def __init__(self, store: TensorStore) -> None:
        self.batches: set[int] = set()
        self._store = store

    def look(
        self,
        stream: Stream,
        batch: int,
        steps: Sequence[Step],
        writers: Sequence[PrunableLayer],
        inputs: Tensor,
    ) -> bool:
        """Whether the batch has gone through the block, now or before.

        Args:
            stream: of the dense network, with its weights in place.
            batch: which one.
            steps: all that are still to come, of layers that drift.
            writers: whose streams are wanted as well.
            inputs: what one of the layers receives: as many tokens are kept of all.
        """
        if batch in self.batches:
            return True
        leaders = [group[0] for step in steps for group in step.inputs if not is_expert(group[0])]
        width = sum(layer.weight.shape[1] for layer in leaders) + sum(x.weight.shape[0] for x in writers)
        if not self._store.has_room(inputs.shape[:-1].numel() * width * inputs.element_size()):
            return False
        found: dict[tuple[int, str, str], list[Tensor]] = {}

        def keep(kind: str) -> Callable[[PrunableLayer, Tensor], None]:
            def kept(layer: PrunableLayer, values: Tensor) -> None:
                # what comes after may write into the original
                found.setdefault((batch, layer.name, kind), []).append(values.clone())

            return kept

        stream.observe(batch, leaders, keep("inputs"), True, writers, keep("stream"))
        for key, values in found.items():
            self._store.keep(key, values)
        self.batches.add(batch)
        return True

    def take(self, batch: int, layer: PrunableLayer, kind: str) -> list[Tensor]:
        """The ``inputs`` of a layer, or the ``stream`` that it writes into, of each call; once."""
        key = (batch, layer.name, kind)
        if key not in self._store:
            return []
        found: list[Tensor] = self._store.recall(key, layer.weight.device)
        self._store.drop(key)
        return found

    def clear(self) -> None:
        """Forget everything: another block is next."""
        self._store.clear()
        self.batches.clear()


def gather(
    flow: Flow,
    block: Block,
    step: Step,
    dense: Mapping[str, Tensor],
    advance: bool,
    writers: Sequence[PrunableLayer],
    steps: Sequence[Step] = (),
) -> dict[str, GramAccumulator]:
    """Sums over all batches for the first layer of each group of ``step``, by its name, on every rank.

    Args:
        flow: activations at the current block.
        block: the current block.
        step: some of its layers.
        dense: weights of the block in the dense model, by layer name.
        advance: also keep what the block returns.
        writers: layers that write into the residual stream; those alone in their group get residual sums.
        steps: this one and those to come in the block, if any, which one pass of the dense network may serve.

    Raises:
        InvalidModelError: for NaN or Inf in activations, naming the layer; on every rank.
    """
    ranks = flow.ranks
    totals: dict[str, GramAccumulator] = {}
    for first in range(0, len(flow.parts), ranks.count):
        last = min(first + ranks.count, len(flow.parts))
        mine = first + ranks.number
        sums = _empty_sums(flow, step, writers)

        def observe(mine: int = mine, sums: dict[str, GramAccumulator] = sums) -> dict[str, int]:
            for batch in flow.parts[mine] if mine < len(flow.parts) else ():
                _observe_batch(flow, block, step, dense, advance, writers, steps, batch, sums)
            return {name: each.tokens for name, each in sums.items()}

        tokens = ranks.gather(observe)
        for owner in range(last - first):
            for name, count in tokens[owner].items():
                if count or name not in totals:
                    _add_part(totals, name, sums[name], count, owner, ranks)
        sums.clear()  # before those of the next group are made
    return totals


def _add_part(
    totals: dict[str, GramAccumulator],
    name: str,
    own: GramAccumulator,
    tokens: int,
    owner: int,
    ranks: Ranks,
) -> None:
    """Add the sums of rank ``owner``, whose ``tokens`` are known, to those of ``name``."""
    part = own if owner == ranks.number else own.empty_like()
    for tensor in part.state_dict().values():
        if tensor.ndim:
            ranks.broadcast(tensor, owner)
    part.tokens = tokens
    if name in totals:
        totals[name].merge(part)
    else:
        totals[name] = part


def _empty_sums(flow: Flow, step: Step, writers: Sequence[PrunableLayer]) -> dict[str, GramAccumulator]:
    alone = _alone(step, writers)
    target = flow.target or Target(0.0, 0.0)
    return {group[0].name: target.sums(group, group[0] in alone) for group in step.inputs}


def _alone(step: Step, writers: Sequence[PrunableLayer]) -> list[PrunableLayer]:
    """Those of ``writers`` that share their input with no other layer of the step."""
    return [group[0] for group in step.inputs if len(group) == 1 and group[0] in writers]


def _observe_batch(
    flow: Flow,
    block: Block,
    step: Step,
    dense: Mapping[str, Tensor],
    advance: bool,
    writers: Sequence[PrunableLayer],
    steps: Sequence[Step],
    batch: int,
    sums: dict[str, GramAccumulator],
) -> None:
    """Add one batch to ``sums``."""
    leaders = [group[0] for group in step.inputs]
    alone = _alone(step, writers)
    waiting: dict[str, list[Tensor]] = {}  # of each call of a layer
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    streams: dict[str, Tensor] = {}

    def observe(layer: PrunableLayer, inputs: Tensor) -> None:
        if sums[layer.name].has_drift:
            waiting.setdefault(layer.name, []).append(inputs)
        else:
            add_inputs(sums[layer.name], layer, inputs)

    def pair(layer: PrunableLayer, inputs: Tensor) -> None:
        if not waiting.get(layer.name):
            return
        found = waiting[layer.name].pop(0)
        if layer in alone:
            pairs[layer.name] = found, inputs
        else:
            add(layer, found, inputs)

    def add(layer: PrunableLayer, found: Tensor, inputs: Tensor, loss: Tensor | None = None) -> None:
        if flow.target is not None and sums[layer.name].missing:
            missing = flow.target.missing(dense[layer.name], inputs, found, loss)
            add_inputs(sums[layer.name], layer, found, missing=missing)
        else:
            add_inputs(sums[layer.name], layer, found, inputs)

    def keep_stream(layer: PrunableLayer, stream: Tensor) -> None:
        streams[layer.name] = stream.clone()  # the addition may happen in place

    def pair_stream(layer: PrunableLayer, stream: Tensor) -> None:
        found, inputs = pairs.pop(layer.name)
        add(layer, found, inputs, stream_loss(stream, streams.pop(layer.name)))

    flow.observe(batch, step, observe, advance, alone, keep_stream)
    if flow.dense is None:
        return
    with ExitStack() as stack:
        there = next((found[0] for found in waiting.values() if found), None)
        seen = batch in flow.seen.batches
        if not seen:
            stack.enter_context(other_weights(block, dense))
            every = [layer for each in steps for layer in _alone(each, writers)]
            seen = (
                there is not None and bool(steps) and flow.seen.look(flow.dense, batch, steps, every, there)
            )
        if not seen:
            flow.dense.observe(batch, leaders, pair, False, alone, pair_stream, step.once)
            return
    for kind, layers, use in (("inputs", leaders, pair), ("stream", alone, pair_stream)):
        for layer in layers:
            for values in flow.seen.take(batch, layer, kind):
                use(layer, values)


def stream_loss(dense: Tensor, pruned: Tensor) -> Tensor:
    """What the pruned residual stream has lost, up to its scale (tokens..., channels), float32 or wider.

    ``s = r - c r̂`` with each token's ``c = ⟨r, r̂⟩ / ⟨r̂, r̂⟩``: normalisation layers forget the scale of what
    they read, so that repairing it as well (``c = 1``) spends weights on nothing.
    """
    kind = torch.promote_types(dense.dtype, torch.float32)
    size = pruned.double().square().sum(-1, keepdim=True)
    scale = (dense.double() * pruned.double()).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0)
    return dense.to(kind) - scale.to(kind) * pruned.to(kind)


def add_inputs(
    sums: GramAccumulator,
    layer: PrunableLayer,
    inputs: Tensor,
    dense_inputs: Tensor | None = None,
    missing: Tensor | None = None,
) -> None:
    """Add a batch to the sums of ``layer``, whose name an error then says."""
    try:
        sums.update(inputs, dense_inputs, missing)
    except InvalidProblemError as error:
        raise InvalidModelError(f"inputs of layer {layer.name}: {error}") from error


@contextmanager
def other_weights(block: Block, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The block's layers have other weights for a while."""
    before = {layer.name: layer.weight.clone() for layer in block.layers}
    for layer in block.layers:
        layer.write(weights[layer.name])
    try:
        yield
    finally:
        for layer in block.layers:
            layer.write(before[layer.name])
