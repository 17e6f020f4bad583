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

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InvalidModelError
from ..models.blocks import Block, PrunableLayer
from ..models.inputs import Samples
from ..models.outputs import output_states
from .activations import forward_replaced
from .logits import Outputs, SlicedModel
from .store import TensorStore

Report = Callable[[int, int], None]

# Moments of output gradients that are gathered at a time, where no limit is set.
MOMENT_BYTES = 8 * 10**9


def gradient_moments(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Samples,
    batch_size: int,
    seed: int = 0,
    report: Report | None = None,
    wanted: Sequence[Block] | None = None,
) -> dict[str, Tensor]:
    """``Σ g gᵀ`` (rows, rows), float32 on the CPU, of every layer that is a module of its own.

    Layers that no gradient reaches, and experts inside fused parameters, are left out: they have no metric.

    Args:
        model: the dense model; it is not changed.
        blocks: all of them, from ``find_blocks``.
        windows: (windows, length) token ids.
        batch_size: windows per forward call.
        seed: of the sampled labels or directions.
        report: called with (batches done, batches in all).
        wanted: only layers of these blocks; all by default.

    Raises:
        InvalidModelError: if the model's loss has no gradient or it holds NaN or Inf.
    """
    moments: dict[str, Tensor] = {}
    sliced = SlicedModel(model, windows)
    wanted = blocks if wanted is None else wanted
    layers = [layer for block in wanted for layer in block.layers if layer.expert is None]
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(no_weight_gradients(model))
        stack.enter_context(_activation_gradients(blocks, wanted))
        for block in blocks:
            stack.enter_context(forward_replaced(block.module, checkpointed(block.module.forward)))
        for layer in layers:
            hook = layer.module.register_forward_hook(_moment_hook(layer, moments))
            stack.callback(hook.remove)
        batches = windows.split(sliced.batch_size(windows.shape[1], batch_size))
        for done, batch in enumerate(batches, start=1):
            with torch.enable_grad():
                loss = _sampled_loss(sliced.run(batch), generator)
                if not loss.requires_grad:
                    raise InvalidModelError(
                        f"{type(model).__name__}: expected a loss with gradients for the output metric, "
                        "found none; run without the output metric"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            if report:
                report(done, len(batches))
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment).all()):
            raise InvalidModelError(f"gradients at the output of layer {name}: found NaN or Inf")
    return {name: moment.cpu() for name, moment in moments.items() if float(moment.trace()) > 0}


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
        store: keeps the moments until they are taken out.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        windows: Samples,
        batch_size: int,
        store: TensorStore,
        report: Report | None = None,
    ) -> None:
        self._store = store.sibling()
        groups = moment_groups(blocks, MOMENT_BYTES if store.limit is None else store.limit)
        for number, group in enumerate(groups):

            def tell(done: int, total: int, number: int = number) -> None:
                if report:
                    report(number * total + done, len(groups) * total)

            found = gradient_moments(model, blocks, windows, batch_size, report=tell, wanted=group)
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


def _sampled_loss(outputs: Outputs, generator: torch.Generator) -> Tensor:
    def of_logits(logits: Tensor, _part: slice) -> Tensor:
        with torch.no_grad():
            # Gumbel's trick with noise from the CPU: the same labels on every device
            noise = torch.rand(logits.shape, generator=generator).clamp_min_(1e-20).to(logits.device)
            labels = noise.log_().neg_().log_().neg_().add_(logits).argmax(-1)
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    if outputs.values is not None:
        return outputs.total(of_logits)
    embeddings = embeddings_of(outputs.output)
    direction = torch.randn(embeddings.shape, generator=generator).to(embeddings.device)
    return (direction * embeddings).sum()


def _moment_hook(layer: PrunableLayer, moments: dict[str, Tensor]) -> Callable[..., None]:
    def add(gradient: Tensor) -> None:
        rows = gradient.detach().flatten(0, -2).float()
        product = rows.T @ rows
        moments[layer.name] = moments[layer.name] + product if layer.name in moments else product

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # the recomputation of a checkpointed block comes here too; its tensors are never walked backward
        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

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
