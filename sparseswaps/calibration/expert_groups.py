"""Which mixtures of experts a model has, what their experts contribute, and what the router has of each.

Nothing here knows a model family. A mixture is the module around fused experts. How these are called tells
where each expert's contribution is to be read: with a token's experts and gates side by side (slots), or with
all experts' inputs below each other (rows). Which entries of the router are an expert's is guessed from the
shapes of the tensors beside the experts. Both count if the model says so: without the contributions the
mixture returns what is left of its output; experts and the router's entries change places together, and it
returns the same; the experts alone change places, and it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InvalidModelError
from ..models.blocks import Block
from ..models.experts import ExpertGroup, mixture_output, tensor_of
from ..models.inputs import Samples
from ..models.offload import Residence
from ..models.outputs import same_but_for_rounding
from ..models.routers import mixtures_in
from .activations import PROBE_TOKENS, Stream, can_skip, forward_replaced
from .store import TensorStore


@dataclass(frozen=True, eq=False)
class FoundExperts:
    """The mixtures of a model.

    Attributes:
        groups: in forward order.
        missing: names of mixtures whose experts are no units, and why.
    """

    groups: tuple[ExpertGroup, ...]
    missing: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self) -> Call:
        """The same with tensors of its own: what is called may write into them."""
        return Call(_copied(self.args), _copied(self.kwargs))

    def of(self, forward: Callable[..., Any]) -> Any:
        """What ``forward`` returns for it."""
        with torch.no_grad():
            own = self.copied()
            return forward(*own.args, **own.kwargs)


@dataclass(frozen=True, eq=False)
class Contributions:
    """What experts add to the output of their mixture.

    Attributes:
        values: of each token's experts (tokens, slots, channels).
        experts: which ones (tokens, slots), -1 for none.
    """

    values: Tensor
    experts: Tensor


def find_experts(
    model: nn.Module, blocks: Sequence[Block], windows: Samples, residence: Residence | None = None
) -> FoundExperts:
    """The mixtures of every block, verified on one window; the weights are as before at the end.

    Args:
        model: the network, in evaluation mode.
        blocks: all its blocks, from ``find_blocks``.
        windows: (windows, length) token ids, or other inputs; two are enough.
        residence: where the blocks' weights are.
    """
    residence = residence or Residence()
    window = windows[:1]
    if isinstance(window, Tensor):
        window = window[:, :PROBE_TOKENS]
    stream = Stream(model, blocks, window, 1, can_skip(model, blocks, windows), TensorStore(), history=True)
    numbers = _numbers_of(model)
    groups: list[ExpertGroup] = []
    missing: dict[str, str] = {}
    for index, block in enumerate(blocks):
        with residence.resident(block):
            found = [each for each in mixtures_in(block.module, block.name) if each.fused]
            calls = _calls(stream, [model.get_submodule(each.name) for each in found])
            for each in found:
                group = _Mixture(model, index, each.name, each.experts, each.count)
                flaw: ExpertGroup | str = "no token comes to it"
                if group.module in calls:
                    flaw = group.verified(calls[group.module], numbers)
                if isinstance(flaw, str):
                    missing[each.name] = flaw
                else:
                    groups.append(flaw)
            for each in mixtures_in(block.module, block.name):
                if not each.fused:
                    missing[each.experts] = "its experts are modules of their own, not one fused parameter"
            stream.advance(0)
            stream.finish_block()
    return FoundExperts(tuple(groups), missing)


@contextmanager
def contributing(experts: nn.Module, count: int, take: Callable[[Contributions], None]) -> Iterator[None]:
    """While this is open, ``take`` is told what ``count`` fused experts contribute whenever they run.

    Raises:
        InvalidModelError: if they are called in another way than with slots or rows.
    """
    original = experts.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        slots = _slots(leaves)
        if slots is not None:
            output, found = _by_slots(original, leaves, structure, slots, count)
        else:
            output = original(*args, **kwargs)
            found = _by_rows(leaves, output, count)
        take(found)
        return output

    with forward_replaced(experts, forward):
        yield


def _calls(stream: Stream, modules: Sequence[nn.Module]) -> dict[nn.Module, Call]:
    """The first call of each of ``modules`` in a pass through the current block."""
    found: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(module, Call(args, kwargs).copied())

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        if modules:
            stream.observe(0, (), lambda _layer, _inputs: None)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _slots(leaves: Sequence[Any]) -> tuple[int, int] | None:
    """Where among the arguments the experts of each token and their gates are."""
    for number, index in enumerate(leaves):
        if isinstance(index, Tensor) and index.ndim == 2 and index.dtype in (torch.long, torch.int):
            for other, gates in enumerate(leaves):
                if isinstance(gates, Tensor) and gates.is_floating_point() and gates.shape == index.shape:
                    return number, other
    return None


def _by_slots(
    forward: Callable[..., Any],
    leaves: Sequence[Any],
    structure: pytree.TreeSpec,
    slots: tuple[int, int],
    count: int,
) -> tuple[Tensor, Contributions]:
    """One slot of every token at a time: as many products as all at once."""
    index = leaves[slots[0]].long()
    values = []
    for slot in range(index.shape[1]):
        one = list(leaves)
        for place in slots:
            one[place] = leaves[place][:, slot : slot + 1].contiguous()
        args, kwargs = pytree.tree_unflatten(one, structure)
        output: Tensor = forward(*args, **kwargs)
        values.append(output)
    total = torch.stack([each.float() for each in values]).sum(0).to(values[0].dtype)
    flat = torch.stack([each.reshape(len(index), -1) for each in values], 1)
    return total, Contributions(flat, index.masked_fill(index >= count, -1))


def _by_rows(leaves: Sequence[Any], output: Any, count: int) -> Contributions:
    """Inputs of all experts below each other; a router has set to zero what an expert is not to see."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    fits = len(tensors) == 1 and isinstance(output, Tensor) and output.shape[:-1] == tensors[0].shape[:-1]
    if not fits or tensors[0].shape[:-1].numel() % count:
        raise InvalidModelError(
            "fused experts: expected to be called with experts and gates (tokens, slots), or with the rows "
            f"of all {count} experts below each other, found {[tuple(each.shape) for each in tensors]}"
        )
    seen = (tensors[0].reshape(count, -1, tensors[0].shape[-1]) != 0).any(-1).T
    values = output.reshape(count, -1, output.shape[-1]).transpose(0, 1)
    experts = torch.arange(count, device=output.device).expand(len(values), -1)
    return Contributions(values, experts.masked_fill(~seen, -1))


class _Mixture:
    """A mixture that is looked into."""

    def __init__(self, model: nn.Module, block: int, name: str, experts: str, count: int) -> None:
        self._model = model
        self._block = block
        self._name = name
        self._count = count
        self.module = model.get_submodule(name)
        self._experts = model.get_submodule(experts)
        self._of_experts = [
            (f"{experts}.{each}", 0)
            for each, tensor in _tensors(self._experts)
            if tensor.ndim and tensor.shape[0] == count
        ]
        self._prefix = f"{experts}."

    def verified(self, call: Call, numbers: set[int]) -> ExpertGroup | str:
        """The group, or why it is none."""
        seen: list[Contributions] = []
        try:
            with contributing(self._experts, self._count, seen.append):
                dense = mixture_output(call.of(self.module))
        except InvalidModelError as error:
            return str(error)
        own = self._experts.forward
        with forward_replaced(self._experts, lambda *a, **k: torch.zeros_like(own(*a, **k))):
            rest = mixture_output(call.of(self.module))
        if len(seen) != 1 or len(seen[0].values) != len(dense):
            return "its experts run more than once in a pass, or not for every token"
        total = seen[0].values.float().sum(1)
        if total.shape != dense.shape or not same_but_for_rounding(dense.float(), rest.float() + total):
            return "what it returns is no sum over its experts and something else"
        reason = "nothing beside its experts has an entry for each of them"
        for size in self._sizes(numbers):
            for router in self._routers():
                flaw = self._flaw(call, dense, router, size)
                if flaw is None:
                    return self._group(seen[0], router, size, self._scaled(call, seen[0].values))
                reason = flaw
        return reason

    def _scaled(self, call: Call, values: Tensor) -> tuple[str, ...]:
        """The experts' tensors with which their contributions are multiplied: the last matrix, and a bias."""
        names = [name for name, _ in self._of_experts]
        of_matrices = [name for name in reversed(names) if tensor_of(self._model, name).ndim == 3]
        others = [name for name in names if name not in of_matrices]
        guesses = [*((name,) for name in of_matrices), *((x, y) for x in of_matrices for y in others)]
        for guess in guesses:
            seen: list[Contributions] = []
            views = [tensor_of(self._model, name) for name in guess]
            copies = [view.clone() for view in views]
            try:
                for view in views:
                    view *= -0.5
                with contributing(self._experts, self._count, seen.append):
                    call.of(self.module)
            finally:
                for view, copy in zip(views, copies, strict=True):
                    view.copy_(copy)
            if same_but_for_rounding(seen[0].values, -0.5 * values):
                return guess
        return ()

    def _group(
        self, seen: Contributions, router: Sequence[tuple[str, int]], size: int, scaled: tuple[str, ...]
    ) -> ExpertGroup:
        some = seen.experts >= 0
        sets = self._count // size
        groups = torch.zeros(len(some), sets + 1, dtype=torch.bool, device=some.device)
        groups.scatter_(1, torch.where(some, seen.experts // size, sets), True)
        return ExpertGroup(
            self._block,
            self._name,
            self.module,
            self._experts,
            (*self._of_experts, *router),
            self._count,
            size,
            seen.values.shape[-1],
            int(some.sum(1).max()),
            scaled,
            int(groups[:, :sets].sum(1).max()),
        )

    def _sizes(self, numbers: set[int]) -> list[int]:
        """How many neighbours may change places: all, or those of a group that the configuration knows."""
        groups = sorted(number for number in numbers if 1 < number < self._count)
        return [self._count, *(self._count // each for each in groups if self._count % each == 0)]

    def _routers(self) -> Iterator[list[tuple[str, int]]]:
        """Guesses at the router's tensors: those of one module beside the experts, and then all."""
        beside = [
            name
            for name, module in self.module.named_modules(prefix=self._name)
            if name != self._name and module is not self._experts and not name.startswith(self._prefix)
        ]
        tried: list[list[tuple[str, int]]] = []
        for name in [*beside, self._name]:
            found = [
                (f"{name}.{each}", tensor.shape.index(self._count))
                for each, tensor in _tensors(self._model.get_submodule(name))
                if self._count in tensor.shape and not f"{name}.{each}".startswith(self._prefix)
            ]
            if found and found not in tried:
                tried.append(found)
                yield found

    def _flaw(self, call: Call, dense: Tensor, router: Sequence[tuple[str, int]], size: int) -> str | None:
        """Why these are not the router's entries."""
        generator = torch.Generator().manual_seed(0)
        order = torch.empty(self._count, dtype=torch.long)
        for start in range(0, self._count, size):
            cycle = start + torch.randperm(size, generator=generator)
            order[cycle] = cycle.roll(1)
        names = ", ".join(name for name, _ in router)
        with self._exchanged([*self._of_experts, *router], order):
            if not same_but_for_rounding(mixture_output(call.of(self.module)), dense):
                return f"what it returns changes when experts change places with entries of {names}"
        with self._exchanged(self._of_experts, order):
            if same_but_for_rounding(mixture_output(call.of(self.module)), dense):
                return f"nothing shows whether {names} is its router, on the window looked at"
        return None

    @contextmanager
    def _exchanged(self, tensors: Sequence[tuple[str, int]], order: Tensor) -> Iterator[None]:
        """The entries of ``tensors`` along their axes are in another order for a while."""
        views = [(tensor_of(self._model, name), axis) for name, axis in tensors]
        copies = [view.clone() for view, _ in views]
        try:
            for (view, axis), copy in zip(views, copies, strict=True):
                view.copy_(copy.index_select(axis, order.to(copy.device)))
            yield
        finally:
            for (view, _), copy in zip(views, copies, strict=True):
                view.copy_(copy)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _copied(values: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def _numbers_of(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "config", None)
    leaves = pytree.tree_leaves(config.to_dict()) if hasattr(config, "to_dict") else []
    return {leaf for leaf in leaves if type(leaf) is int}
