"""Products with weights that are no module of their own, seen where torch makes them.

The fused experts of a mixture are one parameter (experts, ., .): each is one matrix of it, and which of its
axes is summed over is a matter of the operation, ``x Wᵀ`` (torch's ``linear``) or ``x W``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..models.blocks import Block, PrunableLayer

_TRANSPOSING = (nn.functional.linear,)
_PLAIN = (
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.__matmul__,
)


def _product(func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> tuple[Tensor, Tensor, int] | None:
    """Inputs, weight and the weight's axis that is summed over, if this is a product."""
    if func not in _TRANSPOSING and func not in _PLAIN:
        return None
    given = [*args, *(kwargs or {}).values()][:2]
    if len(given) < 2 or not all(isinstance(each, Tensor) for each in given):
        return None
    return given[0], given[1], -1 if func in _TRANSPOSING else -2


def _stored_axis(stored: Tensor, weight: Tensor, axis: int) -> int | None:
    """The axis of ``stored`` (., .) that ``axis`` of ``weight``, the same matrix perhaps transposed, is."""
    if stored.data_ptr() != weight.data_ptr() or weight.numel() != stored.numel():
        return None
    if weight.shape[-2:] == stored.shape and weight.stride()[-2:] == stored.stride():
        return axis + 2
    if weight.mT.shape[-2:] == stored.shape and weight.mT.stride()[-2:] == stored.stride():
        return -1 - axis
    return None


class ExpertObserver(TorchFunctionMode):
    """Tells of the products with experts' weights, one expert at a time or all in one product.

    Args:
        layers: fused experts; their ``transposed`` says which axis is summed over.
        observer: called with the layer and its inputs (tokens, cols). Where all experts are multiplied with
            all tokens, those that a router silenced are zero, and left out.
    """

    def __init__(
        self, layers: Sequence[PrunableLayer], observer: Callable[[PrunableLayer, Tensor], None]
    ) -> None:
        super().__init__()
        self._layers = {layer.stored.data_ptr(): layer for layer in layers}
        self._all: dict[int, list[PrunableLayer]] = {}
        for layer in layers:
            self._all.setdefault(getattr(layer.module, layer.parameter).data_ptr(), []).append(layer)
        self._observer = observer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = _product(func, args, kwargs)
        if product is not None:
            inputs, weight, _ = product
            if weight.ndim == 2:
                layer = self._layers.get(weight.data_ptr())
                if layer is not None:
                    self._observer(layer, inputs)
            elif weight.ndim == 3:
                for layer in self._all.get(weight.data_ptr(), ()):
                    own = inputs[layer.expert or 0]
                    self._observer(layer, own[(own != 0).any(-1)])
        return func(*args, **(kwargs or {}))


class _AxisObserver(TorchFunctionMode):
    """Which axis of fused parameters is summed over, by the name of the parameter."""

    def __init__(self, layers: Sequence[PrunableLayer]) -> None:
        super().__init__()
        self._parameters = {layer.parameter_name: layer for layer in layers}
        self.found: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = _product(func, args, kwargs)
        if product is not None and product[1].ndim in (2, 3):
            _, weight, axis = product
            storage = _storage(weight)
            for name, layer in self._parameters.items():
                parameter: Tensor = getattr(layer.module, layer.parameter).detach()
                if name in self.found or parameter.is_meta:
                    continue
                if _storage(parameter) == storage:
                    self._note(name, parameter, weight, axis)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, parameter: Tensor, weight: Tensor, axis: int) -> None:
        whole = weight.ndim == 3
        candidates = [parameter] if whole else list(parameter)
        for stored in candidates:
            matrix, other = (stored[0], weight[0]) if whole else (stored, weight)
            found = _stored_axis(matrix, other, axis)
            if found is not None:
                self.found[name] = found
                return


def with_contracted_axes(blocks: Sequence[Block], forward: Callable[[], object]) -> list[Block]:
    """``blocks`` whose fused experts have the axis over which the model sums, as one forward shows it.

    Args:
        blocks: from ``find_blocks``.
        forward: runs the model on some tokens, expert by expert.
    """
    fused = [layer for block in blocks for layer in block.layers if layer.expert is not None]
    if not fused:
        return list(blocks)
    with _AxisObserver(fused) as seen:
        forward()

    def corrected(layer: PrunableLayer) -> PrunableLayer:
        axis = seen.found.get(layer.parameter_name) if layer.expert is not None else None
        return layer if axis is None else replace(layer, transposed=axis == 0)

    return [replace(block, layers=tuple(corrected(layer) for layer in block.layers)) for block in blocks]


def _storage(tensor: Tensor) -> int | None:
    """Where a tensor's values are, None for one without any of its own, as ``vmap`` hands out."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return None


class WeightUse(TorchFunctionMode):
    """Which of some layers' weights take part in any operation, whether their module is called or not.

    Attributes:
        used: names of those layers.
    """

    def __init__(self, layers: Sequence[PrunableLayer]) -> None:
        super().__init__()
        self._storages = {_storage(layer.stored): layer.name for layer in layers}
        self.used: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # a shape or a dtype is no use of the values
            for leaf in pytree.tree_leaves((args, kwargs or {})):
                if isinstance(leaf, Tensor) and not leaf.is_meta:
                    name = self._storages.get(_storage(leaf))
                    if name is not None:
                        self.used.add(name)
        return func(*args, **(kwargs or {}))
