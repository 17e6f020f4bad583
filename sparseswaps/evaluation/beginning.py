"""Whether token windows begin with the beginning-of-text token.

The field calibrates and measures on windows cut from the middle of a text, without that token. Most models do
not mind; some, Gemma's among them, are another model without it. ``auto`` keeps the field's protocol unless
the dense model tells otherwise on two windows: ``loss without - loss with >= 0.5`` (nats).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from torch import Tensor

from ..calibration.windows import Windows, bos_token, with_bos
from ..errors import InputError
from ..models.blocks import token_embeddings
from ..models.loading import LoadedModel
from ..ranks import Ranks
from .measures import is_causal
from .quality import model_perplexity

Cut = TypeVar("Cut")

# From this difference of the losses (nats) on the token is added.
LARGE = 0.5
# Windows on which the losses are compared.
COMPARED = 2


class AddBos(StrEnum):
    """Whether windows begin with the beginning-of-text token."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"

    @classmethod
    def read(cls, value: str) -> AddBos:
        """The choice that a text names.

        Raises:
            InputError: if it names none.
        """
        if value not in list(cls):
            raise InputError(f"add_bos: expected one of {', '.join(cls)}, found {value!r}")
        return cls(value)


@dataclass(frozen=True)
class Beginning:
    """What was decided for the windows of a run; its text is one line that says so.

    Attributes:
        added: whether they begin with the token.
        reason: why.
    """

    added: bool
    reason: str

    @property
    def add_bos(self) -> AddBos:
        """The option that repeats it."""
        return AddBos.YES if self.added else AddBos.NO

    def __str__(self) -> str:
        return (
            f"beginning-of-text token: {'in front of every window' if self.added else 'none'} ({self.reason})"
        )


def decide_beginning(
    loaded: LoadedModel, add_bos: AddBos, windows: Windows, ranks: Ranks | None = None
) -> Beginning:
    """Whether the windows of a run begin with the beginning-of-text token.

    Args:
        loaded: the model, with its weights.
        add_bos: what was asked for.
        windows: of the text, without the token; the first two decide.
        ranks: the processes of the run, of which the first decides.
    """
    if add_bos is not AddBos.AUTO:
        return Beginning(add_bos is AddBos.YES, "as asked for")
    if not isinstance(windows.tokens, Tensor):
        return Beginning(False, "no text goes in")
    if not is_causal(loaded.model):
        return Beginning(False, "windows have the special tokens of the tokenizer")
    bos = bos_token(loaded.tokenizer)
    if bos is None or bos >= (token_embeddings(loaded.model) or 0):
        return Beginning(False, "the tokenizer has none" if bos is None else "the model does not know it")
    few = windows.tokens[:COMPARED]

    def losses() -> list[float]:
        return [math.log(model_perplexity(loaded, each)) for each in (few, with_bos(few, bos))]

    without, with_it = (ranks or Ranks()).from_first(losses)
    return Beginning(
        without - with_it >= LARGE,
        f"auto: loss of {len(few)} windows {without:.4f} without, {with_it:.4f} with it; added where it "
        f"lowers the loss by {LARGE:g} or more",
    )


def begun_windows(
    loaded: LoadedModel, add_bos: AddBos, cut: Callable[[bool], Windows]
) -> tuple[Windows, Beginning]:
    """The windows of one text, and what was decided for them.

    Args:
        loaded: the model, with its weights.
        add_bos: what was asked for.
        cut: makes the windows for the model, with the token or without.

    Raises:
        InvalidTextError: if the windows cannot be made.
    """
    windows = cut(add_bos is AddBos.YES)
    beginning = decide_beginning(loaded, add_bos, windows)
    return as_decided(beginning, add_bos, windows, cut), beginning


def as_decided(beginning: Beginning, add_bos: AddBos, windows: Cut, cut: Callable[[bool], Cut]) -> Cut:
    """Windows as decided: those that were cut as asked for, or cut again with the token."""
    if beginning.added == (add_bos is AddBos.YES):
        return windows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say of the text was said when it was cut first
        return cut(beginning.added)
