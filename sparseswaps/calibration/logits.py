"""Logits of a model, some tokens at a time.

Logits of whole windows, tokens × vocabulary, are the largest tensors that a model with many words makes. Here
the model's own forward runs up to its output head, and the head then sees a few tokens at a time. What a
family does with logits after its head (soft caps, scales) is its own forward's business too: it runs again
for every slice, with the head's logits of the slice in it, while all that it calls beside the head returns
what it returned once for a few tokens. Nothing but the head and what follows it is computed then.

A model without such a head, or whose logits in slices differ from its logits in one piece, makes them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import device_of, output_head, vocabulary_of
from ..models.inputs import Samples, forward_inputs
from .activations import first_argument, forward_replaced, until_head

# Entries (tokens x vocabulary) of the logits that are made at a time, at least: 32 MiB in float32, from where
# on the C library gives memory back as soon as it is free. Of smaller pieces it keeps many.
SLICE_ENTRIES = 1 << 23
# The same of one forward call where logits are made whole: 256 MiB in float32, or one window's.
WHOLE_ENTRIES = 1 << 26
# Tokens on which logits in slices are compared with those in one piece.
PROBE_TOKENS = 8
# Products of other numbers of rows are rounded differently: a sum of 65,536 channels about √65,536 times.
ROUNDINGS = 256

# A scalar from the logits (tokens, vocabulary), float32, of the tokens in a slice.
OfLogits = Callable[[Tensor, slice], Tensor]


def slice_tokens(vocabulary: int) -> int:
    """Tokens whose logits are made at a time."""
    return -(-SLICE_ENTRIES // vocabulary)


def whole_windows(vocabulary: int, length: int) -> int:
    """Windows of ``length`` tokens per forward call that makes their logits whole."""
    return max(1, WHOLE_ENTRIES // (length * vocabulary))


def logits_of(output: Any) -> Tensor | None:
    """Logits (batch, length, vocabulary) of a model's output, None if it has none.

    Logits (batch, classes) of whole samples are of one position each; a single class is no choice.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        return None
    return logits if logits.ndim == 3 else logits[:, None]


class SlicedModel:
    """A model that is asked for its logits some tokens at a time, where that gives the same as in one piece.

    Args:
        model: any; one without logits just runs.
        windows: (windows, length) token ids, a few of which show how the model makes its logits; or other
            inputs, whose logits are made whole.
    """

    def __init__(self, model: nn.Module, windows: Samples) -> None:
        self.model = model
        self._vocabulary = vocabulary_of(model)
        self._inputs: dict[str, Any] = {}
        self._returned: dict[nn.Module, list[Any]] = {}
        head = output_head(model)
        if isinstance(windows, Tensor):
            self._inputs = forward_inputs(model, windows[:1, :PROBE_TOKENS].to(device_of(model)))
        else:  # of other inputs a few positions cannot be cut out
            head = None
        self._head = head if head is not None and self._learn(head) else None

    @property
    def sliced(self) -> bool:
        """Whether logits are made some tokens at a time."""
        return self._head is not None

    def batch_size(self, length: int, most: int) -> int:
        """Windows of ``length`` tokens per call of ``run``: ``most``, or fewer if logits are made whole."""
        return most if self.sliced else min(most, whole_windows(self._vocabulary, length))

    def run(self, windows: Samples) -> Outputs:
        """Run the model on token windows (batch, length), only up to its head where logits come in slices."""
        inputs = forward_inputs(self.model, windows.to(device_of(self.model)))
        if self._head is None:
            output = self.model(**inputs)
            logits = logits_of(output)
            return Outputs(self, output, None if logits is None else logits.flatten(0, 1))
        with until_head(self.model) as received:
            self.model(**inputs)
        return Outputs(self, None, received[0].flatten(0, 1))

    def logits(self, values: Tensor) -> Tensor:
        """Logits (tokens, vocabulary), float32, from ``Outputs.values`` of some tokens."""
        return values.float() if self._head is None else self._from_head(self._head, values).float()

    def slices(self, tokens: int) -> Iterator[slice]:
        """Neighbouring tokens, out of so many, whose logits are made together."""
        size = slice_tokens(self._vocabulary)
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))

    def _learn(self, head: nn.Module) -> bool:
        """Remember what is called beside the head; whether logits in slices are those in one piece."""
        around = {module for module in self.model.modules() if any(part is head for part in module.modules())}
        inside: list[nn.Module] = []  # a call that no other one makes, and what it calls
        received: list[Tensor] = []

        def enter(module: nn.Module, _args: Any) -> None:
            inside.append(module)

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            inside.pop()
            if not inside:
                self._returned.setdefault(module, []).append(output)

        def receive(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received.append(first_argument(args, kwargs))

        with ExitStack() as hooks, torch.no_grad():
            hooks.callback(head.register_forward_pre_hook(receive, with_kwargs=True).remove)
            for module in self.model.modules():
                if module not in around:
                    hooks.callback(module.register_forward_pre_hook(enter).remove)
                    hooks.callback(module.register_forward_hook(leave).remove)
            logits = logits_of(self.model(**self._inputs))
        if logits is None or len(received) != 1 or received[0].shape[:-1] != logits.shape[:2]:
            return False
        parts = torch.tensor_split(received[0][0], 2)
        with torch.no_grad():
            found = torch.cat([self._from_head(head, part) for part in parts])
        tolerance = ROUNDINGS * torch.finfo(logits.dtype).eps * float(logits.abs().max())
        return found.shape == logits[0].shape and bool(((found - logits[0]).abs() <= tolerance).all())

    def _from_head(self, head: nn.Module, values: Tensor) -> Tensor:
        """What the model makes of its head's inputs (tokens, ...)."""
        made = head.forward
        with ExitStack() as stack:
            for module, returned in self._returned.items():
                stack.enter_context(forward_replaced(module, _repeating(returned)))
            stack.enter_context(forward_replaced(head, lambda *_, **__: made(values[None])))
            logits: Tensor = self.model(**self._inputs).logits
        return logits[0]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model returned for token windows (batch, length).

    Attributes:
        model: which one.
        output: of the model's forward; None where it ran up to its head.
        values: what the logits of each token are made from (batch · length, ...): what the head receives, or
            the logits themselves where they are made whole; None of a model without logits.
    """

    model: SlicedModel
    output: Any
    values: Tensor | None

    def each(self, of_logits: OfLogits) -> Iterator[Tensor]:
        """``of_logits`` of every slice of the tokens."""
        for part in self.model.slices(len(self._values)):
            yield of_logits(self.model.logits(self._values[part]), part)

    def total(self, of_logits: OfLogits) -> Tensor:
        """Sum of scalars ``of_logits`` over all slices, with its gradient where ``values`` carry one.

        The gradient is found slice by slice, so that the logits of one slice are held at a time.
        """
        values = self._values
        if not (torch.is_grad_enabled() and values.requires_grad):
            return torch.stack(list(self.each(of_logits))).sum()
        gradient = torch.empty_like(values)
        total = torch.zeros((), device=values.device)
        for part in self.model.slices(len(values)):
            leaf = values[part].detach().requires_grad_()
            found = of_logits(self.model.logits(leaf), part)
            (gradient[part],) = torch.autograd.grad(found, leaf)
            total += found.detach()
        with_gradient: Tensor = _WithGradient.apply(values, gradient, total)  # type: ignore[no-untyped-call]
        return with_gradient

    @property
    def _values(self) -> Tensor:
        if self.values is None:
            raise ValueError(f"{type(self.model.model).__name__}: expected logits, found none")
        return self.values


class _WithGradient(torch.autograd.Function):
    """A scalar with a known gradient in ``values``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradient: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(gradient.dtype), None, None


def _repeating(returned: list[Any]) -> Callable[..., Any]:
    """A forward that returns one after the other."""
    again = iter(returned)
    return lambda *_, **__: next(again)
