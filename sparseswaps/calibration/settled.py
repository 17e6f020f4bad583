"""What a block computes from layers that nothing will change any more, kept from pass to pass.

Groups of layers are pruned one after the other, and each takes a pass through the block up to where it
begins. On the way lie the groups before it, with their final weights: a module whose layers are all final
returns the same in every later pass, and so need not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models.blocks import Block, PrunableLayer
from .activations import forward_replaced
from .store import TensorStore

Key = tuple[int, str]


class Settled:
    """Outputs of modules of the current block, batch by batch, where there is room for them.

    Kept is what a module returns in a pass in which no layer has run before that is still to be pruned. A
    module that is called more than once in a pass is left alone.

    Args:
        store: keeps them.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._layers: tuple[PrunableLayer, ...] = ()
        self._open: set[str] = set()
        self._barred: set[str] = set()
        self._block: nn.Module | None = None

    def begin(self, block: Block, layers: Sequence[PrunableLayer]) -> None:
        """``layers`` of ``block`` are pruned next, in passes through it."""
        self.clear()
        self._block = block.module
        self._layers = tuple(layers)
        self._open = {layer.name for layer in layers}

    def settle(self, layers: Sequence[PrunableLayer]) -> None:
        """The weights of ``layers`` are final."""
        self._open -= {layer.name for layer in layers}

    def clear(self) -> None:
        """Forget everything: another block is next."""
        self._store.clear()
        self._barred.clear()
        self._block = None

    @contextmanager
    def passing(self, batch: int, device: torch.device) -> Iterator[None]:
        """Settled modules return what they returned before for this batch, while the model runs."""
        if self._block is None:
            yield
            return
        begun: list[bool] = []  # whether a layer has run that is still to be pruned

        def note(_module: nn.Module, _args: Any) -> None:
            begun.append(True)

        with ExitStack() as replaced:
            for module in {layer.module for layer in self._layers if layer.name in self._open}:
                replaced.callback(module.register_forward_pre_hook(note).remove)
            for name, module in self._outermost("", self._block, batch):
                forward = self._forward((batch, name), module.forward, device, begun)
                replaced.enter_context(forward_replaced(module, forward))
            yield

    def _outermost(self, path: str, parent: nn.Module, batch: int) -> Iterator[tuple[str, nn.Module]]:
        """Settled modules inside ``parent``; those inside a module whose output is kept are not needed."""
        for name, module in parent.named_children():
            full = f"{path}.{name}" if path else name
            inside = set(module.modules())
            own = {layer.name for layer in self._layers if layer.module in inside}
            if not own:
                continue
            if not own & self._open and full not in self._barred:
                yield full, module
                if (batch, full) in self._store:
                    self._drop_inside(batch, full)
                    continue
            yield from self._outermost(full, module, batch)

    def _forward(
        self, key: Key, original: Callable[..., Any], device: torch.device, begun: Sequence[bool]
    ) -> Callable[..., Any]:
        """What a settled module calls: once per pass there is something to remember."""
        calls: list[None] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) > 1:
                self._bar(key[1])
                return original(*args, **kwargs)
            if key in self._store:
                return self._store.recall(key, device)
            output = original(*args, **kwargs)
            # without a layer to prune there is no later pass
            if self._open and not begun:
                self._keep(key, output)
            return output

        return forward

    def _keep(self, key: Key, output: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if key[1] not in self._barred and self._store.has_room(sum(tensor.nbytes for tensor in tensors)):
            # what comes after may write into the original
            copy = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
            self._store.keep(key, copy)

    def _drop_inside(self, batch: int, name: str) -> None:
        self._drop(lambda key: key[0] == batch and key[1].startswith(f"{name}."))

    def _bar(self, name: str) -> None:
        self._barred.add(name)
        self._drop(lambda key: key[1] == name)

    def _drop(self, unwanted: Callable[[Key], bool]) -> None:
        for key in filter(unwanted, self._store.keys()):
            self._store.drop(key)
