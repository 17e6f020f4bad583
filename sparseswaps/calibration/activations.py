"""What each layer of a model receives, block by block, with the model's own forward.

A ``Stream`` is one network's activations on fixed token windows. To look into block ``i`` it calls
the model's own forward, in which finished blocks return what they returned before and everything
after block ``i`` is cut off. Embeddings, rotary tables, attention masks and whatever else a family
computes around its blocks are the model's own business; no block is ever called by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import InvalidModelError
from ..models.blocks import Block, PrunableLayer, device_of, output_head
from ..models.inputs import Samples, forward_inputs
from ..models.offload import Residence
from ..models.outputs import same_but_for_rounding
from .products import ExpertObserver, with_contracted_axes
from .store import TensorStore

Observer = Callable[[PrunableLayer, Tensor], None]
# What is made of the output of a finished block, of that number, where the model reads it again.
Given = Callable[[int, Any], Any]

# Tokens of a window that show how blocks depend on each other.
PROBE_TOKENS = 128


class _Stop(Exception):  # noqa: N818  (control flow, not an error)
    """Everything that was wanted from this forward has been seen."""


class Stream:
    """Activations of one network on token windows, advanced block by block.

    Args:
        model: the network; its weights may change between calls.
        blocks: its blocks, in the order of ``find_blocks``.
        windows: (windows, length) token ids, or other inputs.
        batch_size: windows per forward call.
        skip: whether finished blocks return what they returned before; otherwise the whole model runs
            every time, for models whose blocks depend on each other in other ways (``can_skip``).
        store: keeps what blocks return; main memory by default.
        history: whether it keeps that of all blocks, and not of the last one of each stack alone.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        windows: Samples,
        batch_size: int,
        skip: bool = True,
        store: TensorStore | None = None,
        history: bool = False,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._batches = windows.split(batch_size)
        self._skip = skip
        self._done = 0
        self._store = store or TensorStore()
        self._history = history

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def skips(self) -> bool:
        """Whether finished blocks return what they returned before."""
        return self._skip

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self._model)

    @property
    def current(self) -> Block:
        """The block that is looked into."""
        return self._blocks[self._done]

    def observe(
        self,
        batch: int,
        layers: Sequence[PrunableLayer],
        observer: Observer,
        advance: bool = False,
        writers: Sequence[PrunableLayer] = (),
        stream_observer: Observer | None = None,
        once: bool = True,
        around: AbstractContextManager[None] | None = None,
    ) -> None:
        """Run one batch and tell ``observer`` what each of ``layers`` receives.

        Args:
            batch: which one.
            layers: layers of the current block.
            observer: called with the layer and its input (..., cols).
            advance: also keep what the block returns, for ``finish_block``.
            writers: layers of the current block whose output is added to something (``residual_writers``).
            stream_observer: called with each of them and what its output is added to (..., rows).
            once: whether each of ``layers`` is called once, so that nothing is missed behind the last.
            around: is open while the model runs.
        """
        stop = once and self._skip and not advance and not writers
        with ExitStack() as watching:
            watching.enter_context(_observed(layers, observer, stop))
            if writers and stream_observer is not None:
                end = self._skip and not advance
                watching.enter_context(_AdditionObserver(writers, stream_observer, end))
            watching.enter_context(self._cut_after(batch, advance))
            watching.enter_context(torch.no_grad())
            watching.enter_context(nullcontext() if around is None else around)
            self._forward(batch)

    def advance(self, batch: int, around: AbstractContextManager[None] | None = None) -> None:
        """Run one batch through the current block and keep what it returns for ``finish_block``.

        ``around`` is open while the model runs.
        """
        if self._skip:
            self.observe(batch, (), lambda _layer, _inputs: None, advance=True, around=around)

    def finish_block(self) -> None:
        """Go on to the next block, after every batch was advanced."""
        self._done += 1

    def go_back(self) -> None:
        """Look into the block before, again; with the history of all blocks."""
        self._done -= 1

    def forget(self, batch: int, number: int) -> None:
        """Nobody will ask for what the block of that number returned for a batch."""
        self._store.drop(self._key(batch, number))

    def output(self, batch: int, given: Given) -> Any:
        """What the current block returns for a batch, with gradients of what ``given`` makes of its inputs.

        Args:
            batch: which one.
            given: called with the number of the last finished block of each stack and what it returned;
                returns that, or something else in its place.
        """
        found: list[Any] = []
        with self._ending_with(batch, found.append, given), torch.enable_grad():
            self._forward(batch)
        return found[0]

    def _forward(self, batch: int) -> None:
        device = device_of(self._model)
        with until_head(self._model):
            self._model(**forward_inputs(self._model, self._batches[batch].to(device)))

    @contextmanager
    def recalled(self, batch: int, given: Given | None = None) -> Iterator[None]:
        """Finished blocks return what they returned before for this batch; the others run as ever.

        That is kept of the last one of each stack, in whose place those before it hand on zeros. Arguments as
        for ``output``.
        """
        device = device_of(self._model)
        finished = self._blocks[: self._done] if self._skip else ()
        last = {block.stack: number for number, block in enumerate(finished)}

        def blank(number: int) -> Callable[..., Any]:
            return lambda *_, **__: self._store.blank(self._key(batch, number), device)

        def recall(number: int) -> Callable[..., Any]:
            def recalled(*_: Any, **__: Any) -> Any:
                found = self._store.recall(self._key(batch, number), device)
                self._store.expect(self._key(batch + 1, number), device)
                return found if given is None else given(number, found)

            return recalled

        with ExitStack() as replaced:
            for number, block in enumerate(finished):
                there = last[block.stack]
                forward = recall(number) if number == there else blank(there)
                replaced.enter_context(forward_replaced(block.module, forward))
            yield

    def _key(self, batch: int, number: int) -> tuple[int, int]:
        """Where the output of a block is kept."""
        return batch, number if self._history else self._blocks[number].stack

    @contextmanager
    def _cut_after(self, batch: int, keep: bool) -> Iterator[None]:
        """Finished blocks return what is stored; the model stops after the current one."""
        if not self._skip:
            yield
            return
        key = self._key(batch, self._done)
        with self._ending_with(batch, (lambda output: self._store.keep(key, output)) if keep else None):
            yield

    @contextmanager
    def _ending_with(
        self, batch: int, take: Callable[[Any], None] | None, given: Given | None = None
    ) -> Iterator[None]:
        """The model stops after the current block, whose output ``take`` gets."""
        module = self.current.module
        original = module.forward

        def last(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if take is not None:
                take(output)
            raise _Stop

        with self.recalled(batch, given), forward_replaced(module, last):
            yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` calls ``forward``; afterwards whatever it called before (a wrapper included)."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module is called with, be it by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def until_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """The model's forward ends where its output head begins, so that nobody's logits are made.

    Yields:
        A list to which what the head receives is added; it stays empty for a model without a head.
    """
    received: list[Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        received.append(first_argument(args, kwargs))
        raise _Stop

    head = output_head(model)
    with nullcontext() if head is None else forward_replaced(head, stop):
        try:
            yield received
        except _Stop:
            return


def can_skip(model: nn.Module, blocks: Sequence[Block], windows: Samples) -> bool:
    """Whether blocks depend on earlier ones only through what those return.

    Two windows, short ones if they are of tokens, go through the model as it is and, in turns, block by
    block; the last block of each stack must return the same, up to the rounding of its dtype. Models that
    hand something else from block to block (keys and values shared between layers, a state of a module) do
    not: they find what the other window has left there, or nothing.
    """
    windows = windows[:2]
    if isinstance(windows, Tensor):
        windows = windows[:, :PROBE_TOKENS]
    batches = windows.split(1)
    ends: dict[tuple[int, int], Any] = {}
    last = {block.stack: block.module for block in blocks}
    called: set[nn.Module] = set()
    device = device_of(model)
    for number, window in enumerate(batches):
        with ExitStack() as hooks:
            for module in {part for block in blocks for part in (block.module, *_modules_of(block))}:
                hooks.callback(module.register_forward_hook(lambda part, *_: called.add(part)).remove)
            for stack, module in last.items():
                keep = _keeping(ends, (number, stack))
                hooks.callback(module.register_forward_hook(keep).remove)
            with torch.no_grad(), until_head(model):
                model(**forward_inputs(model, window.to(device)))
    if any(block.module not in called and called.intersection(_modules_of(block)) for block in blocks):
        return False  # the model calls what is inside of a block and not the block
    stream = Stream(model, blocks, windows, 1)
    try:
        for _ in blocks:
            for number in range(len(batches)):
                stream.advance(number)
            stream.finish_block()
    except Exception:  # whatever a block raises that misses what earlier blocks left for it
        return False
    for place, output in ends.items():
        expected = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        found = stream._store.tensors(place)
        if len(expected) != len(found) or not all(
            same_but_for_rounding(a.cpu(), b) for a, b in zip(expected, found, strict=True)
        ):
            return False
    return True


def _modules_of(block: Block) -> list[nn.Module]:
    return [layer.module for layer in block.layers]


def _keeping(kept: dict[tuple[int, int], Any], place: tuple[int, int]) -> Callable[..., None]:
    """A forward hook that remembers what the module returns."""
    return lambda _module, _inputs, output: kept.__setitem__(place, output)


def stream_through(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Samples,
    batch_size: int,
    residence: Residence,
    store: TensorStore | None = None,
) -> Stream:
    """A stream whose blocks are all finished: each was in memory once, for all batches.

    Args:
        model: the network as it is now.
        blocks: all its blocks, from ``find_blocks``.
        windows: (windows, length) token ids, or other inputs.
        batch_size: windows per forward call.
        residence: where the blocks' weights are.
        store: keeps what blocks return; main memory by default.
    """
    stream = Stream(model, blocks, windows, batch_size, store=store)
    for block in blocks:
        with residence.resident(block):
            for batch in range(len(stream)):
                stream.advance(batch)
        stream.finish_block()
    return stream


class _AdditionObserver(TorchFunctionMode):
    """Sees what the outputs of some layers are added to.

    With ``stop`` the forward ends when all of them have been seen.
    """

    _ADDITIONS = frozenset(
        {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
    )

    def __init__(self, layers: Sequence[PrunableLayer], observer: Observer, stop: bool) -> None:
        super().__init__()
        self._observer = observer
        self._stop = stop
        self._waiting = set(layers)
        self._outputs: list[tuple[PrunableLayer, Tensor]] = []  # held, so that addresses stay theirs
        self._handles = [layer.module.register_forward_hook(self._hook_of(layer)) for layer in layers]

    def _hook_of(self, layer: PrunableLayer) -> Callable[..., None]:
        return lambda _module, _inputs, output: self._outputs.append((layer, output))

    def __exit__(self, *args: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._ADDITIONS and len(args) == 2 and all(isinstance(each, Tensor) for each in args):
            for term, other in (args, args[::-1]):
                layer = self._layer_of(term)
                if layer in self._waiting and term.shape == other.shape:
                    self._waiting.discard(layer)
                    self._observer(layer, other)
            if self._stop and not self._waiting:
                raise _Stop
        return func(*args, **(kwargs or {}))

    def _layer_of(self, tensor: Tensor) -> PrunableLayer | None:
        """The layer whose output this is, be it reshaped."""
        for layer, output in self._outputs:
            same = output.data_ptr() == tensor.data_ptr() and output.numel() == tensor.numel()
            if same and output.shape[-1] == tensor.shape[-1]:
                return layer
        return None


@contextmanager
def _observed(layers: Sequence[PrunableLayer], observer: Observer, stop: bool) -> Iterator[None]:
    """Tell ``observer`` what each of ``layers`` receives.

    With ``stop`` the forward ends after the last of them, unless some are experts, which are
    reached as the router decides.
    """
    modules = [layer for layer in layers if layer.expert is None]
    experts = [layer for layer in layers if layer.expert is not None]
    waiting = {layer.name for layer in modules}

    def hook_of(layer: PrunableLayer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer(layer, first_argument(args, kwargs))
            waiting.discard(layer.name)
            if stop and not waiting and not experts:
                raise _Stop

        return hook

    handles = [layer.module.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in modules]
    try:
        if experts:
            with ExpertObserver(experts, observer):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_as_used(model: nn.Module, blocks: Sequence[Block], windows: Samples) -> list[Block]:
    """``blocks`` whose fused experts have the axis over which the model sums, as one window shows it."""

    def forward() -> None:
        with torch.no_grad(), until_head(model), experts_one_by_one(model):
            model(**forward_inputs(model, windows[:1].to(device_of(model))))

    return with_contracted_axes(blocks, forward)


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Let fused experts run one product per expert, so that each one's inputs can be seen."""
    setter = getattr(model, "set_experts_implementation", None)
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if setter is None or before in (None, "eager"):
        yield
        return
    try:
        setter("eager")
    except (ValueError, KeyError) as error:
        raise InvalidModelError(
            f"{type(model).__name__}: expected experts that run one by one, found {error}"
        ) from error
    try:
        yield
    finally:
        setter(before)
