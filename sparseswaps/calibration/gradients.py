"""What errors of a layer's outputs cost downstream, from gradients of the model's loss.

For each layer the second moment ``Σ g gᵀ`` (rows, rows) of the loss gradient ``g`` at its output, over all
tokens of the windows. The loss is sampled, so that the moments are those of the model's own
distribution and not of the data's labels (K-FAC: Martens and Grosse, ICML 2015, section 5):

- models with logits (causal, sequence to sequence, encoders with a head): cross-entropy of labels drawn
  from the logits;
- encoders without a head: ``Σ ⟨v, z⟩`` over tokens with ``z`` the normalised last hidden state and ``v``
  standard normal, whose gradient's second moment is the Gauss-Newton matrix of ``Σ ½‖z - z'‖²``. The same of
  each window's mean hidden state, which the cosine of embeddings measures, would be one sample per window
  instead of one per token.

Weights carry no gradients, and of each block only its inputs are kept until the backward pass
recomputes it (activation checkpointing), so the memory beside the moments is one block's.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError, InvalidModelError, InvalidProblemError
from ..models.blocks import Block, PrunableLayer, device_of
from ..models.inputs import Samples
from ..models.offload import Residence
from ..models.outputs import output_states
from ..problems.products import Factor, Products, mirrored
from .activations import forward_replaced
from .backward import backward_through_blocks
from .logits import Outputs, SlicedModel
from .sampling import Draws, drawn_labels
from .store import TensorStore

Report = Callable[[int, int], None]

# Moments of output gradients that are gathered at a time, where no limit is set.
MOMENT_BYTES = 8 * 10**9
# Activations that are kept between blocks that come to memory one by one.
HISTORY_BYTES = 8 * 10**9


def gradient_moments(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Samples,
    batch_size: int,
    seed: int = 0,
    report: Report | None = None,
    wanted: Sequence[Block] | None = None,
    residence: Residence | None = None,
    store: TensorStore | None = None,
) -> dict[str, Tensor]:
    """``Σ g gᵀ`` (rows, rows), float32 on the CPU, of every layer that is a module of its own.

    Layers that no gradient reaches, and experts inside fused parameters, are left out: they have no metric.

    Args:
        model: the dense model; it is not changed.
        blocks: all of them, from ``find_blocks``.
        windows: (windows, length) token ids.
        batch_size: windows per forward call; fewer where memory is full.
        seed: of the sampled labels or directions, which no batch size changes.
        report: called with (windows done, windows in all).
        wanted: only layers of these blocks; all by default.
        residence: where the blocks' weights are that come to memory once forward and once backward; by
            default windows go through the whole model, as they must where ``can_skip`` says no.
        store: keeps activations between these blocks; main memory by default.

    Raises:
        InvalidModelError: if the model's loss has no gradient or it holds NaN or Inf.
    """
    sliced = SlicedModel(model, windows)
    wanted = blocks if wanted is None else wanted
    moments = _MomentSums()
    with ExitStack() as stack:
        stack.enter_context(no_weight_gradients(model))
        stack.enter_context(_activation_gradients(blocks, wanted))
        for layer in (layer for block in wanted for layer in block.layers if layer.expert is None):
            hook = layer.module.register_forward_hook(_moment_hook(layer, moments))
            stack.callback(hook.remove)
        size = sliced.batch_size(windows.shape[1], batch_size)
        gathering: _Gathering = _Gathering(sliced, windows, Draws(seed), moments, size)
        if residence is not None:
            first = min(number for number, block in enumerate(blocks) if block in wanted)
            gathering = _BlockByBlock(
                sliced, windows, Draws(seed), moments, size, blocks, first, residence, store or TensorStore()
            )
        else:
            for block in blocks:
                stack.enter_context(forward_replaced(block.module, checkpointed(block.module.forward)))
        for done in gathering.batches():
            if report:
                report(done, len(windows))
    return moments.found()


@dataclass(eq=False)
class _Gathering:
    """Gradients of the loss, some windows at a time: ``size``, and fewer from where memory is full on."""

    model: SlicedModel
    windows: Samples
    draws: Draws
    moments: _MomentSums
    size: int

    def batches(self) -> Iterator[int]:
        """Go through all windows; yields how many are done."""
        for batch in self._parts(range(len(self.windows))):
            self._gather(batch, Counter())
            yield batch.stop

    def _parts(self, windows: range) -> Iterator[range]:
        """Neighbours, as many at a time as memory has let through so far."""
        done = windows.start
        while done < windows.stop:
            part = range(done, min(done + self.size, windows.stop))
            yield part
            done = part.stop

    def _gather(self, batch: range, known: Counter[str]) -> None:
        """Add the gradients of some windows, but for the ``known`` ones of each layer."""
        self.moments.begin(known)
        if self._fits(batch):
            return
        added = self.moments.added
        self._halve(len(batch))
        for part in self._parts(batch):
            self._gather(part, added)

    def _halve(self, size: int) -> None:
        """Go on with half of ``size`` windows at a time, which were too many, and say so."""
        torch.cuda.empty_cache()
        self.size = size // 2
        warnings.warn(
            f"output metric: memory of {device_of(self.model.model)} is full with {size} windows at a time; "
            f"it goes on with {self.size}",
            stacklevel=2,
        )

    def _fits(self, batch: range) -> bool:
        """Whether memory let a pass forward and backward over some windows through; over one it must."""
        try:
            with torch.enable_grad():
                loss = self._loss(self.model.run(self.windows[batch.start : batch.stop]), batch)
                loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            return False
        return True

    def _loss(self, outputs: Outputs, batch: range) -> Tensor:
        loss = _sampled_loss(outputs, self.draws, batch)
        if not loss.requires_grad:
            raise InvalidModelError(
                f"{type(self.model.model).__name__}: expected a loss with gradients for the output metric, "
                "found none; run without the output metric"
            )
        return loss


@dataclass(eq=False)
class _BlockByBlock(_Gathering):
    """The same, block by block for as many windows as ``HISTORY_BYTES`` hold the activations of.

    Where memory is full it begins again, with the same labels.
    """

    blocks: Sequence[Block]
    first: int
    residence: Residence
    store: TensorStore

    def batches(self) -> Iterator[int]:
        done = 0
        while done < len(self.windows):
            most = self.size * max(1, HISTORY_BYTES // (self.size * self._bytes()))
            windows = range(done, min(done + most, len(self.windows)))
            if self._all_fit(list(self._parts(windows))):
                done = windows.stop
                yield done
            else:
                self.moments.clear()
                self._halve(self.size)
                done = 0

    def _all_fit(self, parts: list[range]) -> bool:
        try:
            backward_through_blocks(
                self.model,
                self.blocks,
                self.windows,
                parts,
                self.first,
                self._loss,
                self.residence,
                self.store,
            )
        except torch.OutOfMemoryError:
            if self.size == 1:
                raise
            return False
        return True

    def _bytes(self) -> int:
        """About the bytes that the blocks return for a window."""
        layers = [layer for block in self.blocks for layer in block.layers]
        hidden = min(layer.weight.shape[1] for layer in layers)
        return len(self.blocks) * self.windows.shape[1] * hidden * layers[0].weight.element_size()


class _MomentSums:
    """``Σ g gᵀ`` of layers, float32, of each the upper triangle.

    Attributes:
        added: gradients of each layer since ``begin``.
    """

    def __init__(self) -> None:
        self.added: Counter[str] = Counter()
        self._known: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}

    def begin(self, known: Counter[str]) -> None:
        """A pass begins in which so many gradients of each layer, its first, are in the sums already."""
        self.added, self._known = Counter(), known

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums.clear()

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient (..., rows) at a layer's output."""
        if self.added[name] >= self._known[name]:
            rows = gradient.detach().flatten(0, -2)
            try:
                factor = Factor.of(rows)
            except InvalidProblemError as error:
                raise InvalidModelError(
                    f"gradients at the output of layer {name}: expected finite ones, found NaN or Inf"
                ) from error
            if name not in self._sums:
                size = (rows.shape[1], rows.shape[1])
                self._sums[name] = torch.zeros(size, dtype=torch.float32, device=rows.device)
            self._add(name, factor)
        self.added[name] += 1

    def found(self) -> dict[str, Tensor]:
        """The moments by name on the CPU, without those that are zero; none is left here."""
        moments = {}
        for name in list(self._sums):
            moment = mirrored(self._sums.pop(name)).cpu()
            if not bool(torch.isfinite(moment).all()):
                raise InvalidModelError(
                    f"gradients at the output of layer {name}: expected moments that float32 holds, found Inf"
                )
            if float(moment.trace()) > 0:
                moments[name] = moment
        return moments

    def _add(self, name: str, factor: Factor) -> None:
        total, tokens = self._sums[name], len(factor.values)
        products = Products(total.device, factor.half)
        try:
            for piece in products.pieces(tokens):
                products.add(total, factor, factor, piece)
        except torch.OutOfMemoryError as error:  # half of it may be in the sum: this cannot be done again
            raise InputError(
                f"memory of {total.device}: expected room for products of gradients of layer {name} "
                f"{tuple(total.shape)}, found none"
            ) from error


def moment_groups(blocks: Sequence[Block], limit: int) -> list[list[Block]]:
    """Neighbouring blocks whose moments together take at most ``limit`` bytes, or one block alone."""
    groups: list[list[Block]] = []
    size = 0
    for block in blocks:
        own = moment_bytes(block)
        if not groups or size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(block)
        size += own
    return groups


def moment_bytes(block: Block) -> int:
    """Bytes of the moments of the output gradients of a block's layers."""
    return sum(4 * layer.weight.shape[0] ** 2 for layer in block.layers if layer.expert is None)


class Moments:
    """``gradient_moments`` of all layers, gathered for some blocks at a time and taken out one by one.

    Held at a time are those of one block, or of more up to ``MOMENT_BYTES`` or the store's limit; each group
    of blocks costs a forward and backward pass of its own, down to its first block. However they are
    grouped, the moments are the same.

    Args:
        model, blocks, windows, batch_size, report: as for ``gradient_moments``.
        store: keeps the moments until they are taken out, and activations in between.
        residence: where the blocks' weights are, of a model whose blocks may be gone through one by one
            (``can_skip``); by default windows go through the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        windows: Samples,
        batch_size: int,
        store: TensorStore,
        report: Report | None = None,
        residence: Residence | None = None,
    ) -> None:
        self._store = store.sibling()
        if residence is not None and not residence.offloaded:
            residence = None
        groups = moment_groups(blocks, MOMENT_BYTES if store.limit is None else store.limit)
        for number, group in enumerate(groups):

            def tell(done: int, total: int, number: int = number) -> None:
                if report:
                    report(number * total + done, len(groups) * total)

            found = gradient_moments(
                model, blocks, windows, batch_size, 0, tell, group, residence, store.sibling()
            )
            for name in list(found):
                self._store.keep(name, found.pop(name))

    def take(self, name: str) -> Tensor | None:
        """The moment (rows, rows) of a layer, float32 on the CPU, once; None if it has none."""
        if name not in self._store:
            return None
        moment: Tensor = self._store.recall(name, torch.device("cpu"))
        self._store.drop(name)
        return moment


def embeddings_of(output: Any) -> Tensor:
    """Normalised last hidden states, or what else the model makes (see ``models.outputs``), float32.

    Returns:
        (batch, length, hidden).

    Raises:
        InvalidModelError: if the output has no such tensor.
    """
    return nn.functional.normalize(output_states(output)[1].float(), dim=-1)


def _sampled_loss(outputs: Outputs, draws: Draws, windows: range) -> Tensor:
    """The loss of labels, or directions, that are drawn from the outputs for ``windows``."""
    if outputs.values is not None:
        numbers = draws.uniform(windows, len(outputs.values) // len(windows)).to(outputs.values.device)

        def of_logits(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                labels = drawn_labels(logits, numbers[part])
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        return outputs.total(of_logits)
    embeddings = embeddings_of(outputs.output)
    directions = draws.normal(windows, tuple(embeddings.shape[1:])).to(embeddings.device)
    return (directions * embeddings).sum()


def _moment_hook(layer: PrunableLayer, moments: _MomentSums) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # the recomputation of a checkpointed block comes here too; its tensors are never walked backward
        if output.requires_grad:
            output.register_hook(lambda gradient: moments.add(layer.name, gradient))  # type: ignore[no-untyped-call]

    return hook


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with only its inputs kept until the backward pass."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def no_weight_gradients(model: nn.Module) -> Iterator[None]:
    """No weight of the model carries gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _activation_gradients(blocks: Sequence[Block], wanted: Sequence[Block]) -> Iterator[None]:
    """Activations carry gradients from what enters the first wanted block of each stack on.

    In a stack without any, from its last block on: layers of another stack may read what it returns.
    """
    start = {block.stack: block.module for block in blocks}
    for block in reversed(wanted):
        start[block.stack] = block.module
    handles = [
        module.register_forward_pre_hook(_start_gradients, with_kwargs=True) for module in start.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start_gradients(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's first argument, its hidden states, carries gradients."""
    if args:
        return (_with_gradients(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: _with_gradients(kwargs[name])}


def _with_gradients(hidden: Tensor) -> Tensor:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)
