"""Windows for calibration and evaluation, from a text, a token file, a dataset or a file of inputs.

The field's calibration protocol (SparseGPT, Wanda): 128 windows of 2048 tokens, seeded. A local
text is tokenised once and cut into non-overlapping windows, of which a seeded choice is taken. For
a dataset, documents are drawn at random until one is longer than a window, and a random window of
it is taken.

The field's windows carry no beginning-of-text token. Where a model needs it, a window of ``length`` tokens is
the token and ``length - 1`` tokens of the text: it stays within the model's positions, and each token of the
text but the tail is predicted once, the beginning-of-text token never.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidTextError
from ..models.blocks import max_length
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from .features import fitted, is_features, read_features, require_tokens
from .texts import Documents, read_documents
from .token_files import read_token_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens per window where nothing else is asked for.
DEFAULT_LENGTH = 2048
# Draws from a dataset before giving up on finding documents longer than a window.
MAX_DRAWS = 200_000


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows with their origin, or other inputs of a model.

    Attributes:
        tokens: (windows, length), int64; or samples of inputs of any kind.
        source: file or dataset that they come from.
        available: how many windows the source held.
    """

    tokens: Samples
    source: str
    available: int

    @property
    def hash(self) -> str:
        """SHA-256 of the tokens, or of the names and values of other inputs."""
        found = hashlib.sha256()
        tensors = {"": self.tokens} if isinstance(self.tokens, Tensor) else self.tokens.tensors
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tuple(tensor.shape)}".encode() if name else b"")
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @property
    def length(self) -> int:
        """Tokens per window, or positions per sample."""
        return self.tokens.shape[1]

    def with_bos(self, tokenizer: PreTrainedTokenizerBase | None) -> Windows:
        """These windows, each beginning with the tokenizer's beginning-of-text token (see ``with_bos``).

        Raises:
            InvalidTextError: if the tokenizer has none.
        """
        if not isinstance(self.tokens, Tensor):
            raise _no_tokens(self.source)
        return replace(self, tokens=with_bos(self.tokens, _require_bos(tokenizer)))

    def __len__(self) -> int:
        return self.tokens.shape[0]


def calibration_windows(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    length: int | None,
    seed: int = 0,
    special_tokens: bool = False,
    bos: bool = False,
) -> Windows:
    """A seeded choice of ``samples`` windows of ``length`` tokens, or of samples of other inputs.

    Args:
        source: a token file (``.npy``, one- or two-dimensional integers), a text: a file, a file of
            records, a folder of them, ``stdlib`` or a dataset (see ``texts.read_documents``); or a file of
            inputs (see ``features``).
        tokenizer: needed for text.
        samples: windows to choose; fewer are taken, with a warning, if there are not as many.
        length: tokens per window, special ones included; of a text only.
        seed: of the choice.
        special_tokens: start and end every window with the tokenizer's special tokens, as encoders
            expect.
        bos: start every window with the tokenizer's beginning-of-text token.

    Raises:
        InvalidTextError: if the source is missing, too short or not usable, or ``bos`` is asked for where
            there is no such token.
    """
    generator = np.random.default_rng(seed)
    if is_features(source):
        if bos:
            raise _no_tokens(source)
        features = read_features(source)
        chosen = _choice(len(features), source, samples, generator, "samples")
        return Windows(features[chosen], os.fspath(source), len(features))
    if samples < 1 or length is None or length < 2:
        raise InvalidTextError(
            f"calibration windows: expected samples ≥ 1 and length ≥ 2, found {samples} and {length}"
        )
    frame = _frame(tokenizer, length, special_tokens, bos)
    name = os.fspath(source)
    read = _read(name, tokenizer)
    if isinstance(read, Documents) and read.drawn:
        windows = _windows_of_documents(read, _require(tokenizer, name), samples, frame.inner, generator)
        return Windows(frame.around(windows), name, samples)
    every = _cut(_stream_or_windows(read, tokenizer, name), frame, name)
    chosen = _choice(len(every), source, samples, generator, f"windows of {length} tokens")
    return Windows(every[chosen], name, len(every))


def _choice(
    count: int, source: str | os.PathLike[str], samples: int, generator: np.random.Generator, what: str
) -> Tensor:
    """Numbers of ``samples`` out of ``count``, in order; all, with a warning, if there are not as many."""
    if count < samples:
        warnings.warn(f"{source}: expected {samples} {what}, found {count}: all are used", stacklevel=3)
    return torch.from_numpy(np.sort(generator.permutation(count)[:samples]))


def evaluation_windows(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | None,
    limit: int | None = None,
    special_tokens: bool = False,
    bos: bool = False,
) -> Windows:
    """All non-overlapping windows of a text, the tail dropped; the first ``limit``.

    Documents are joined with a blank line and tokenised once (the WikiText-2 protocol); of a file of inputs
    all samples are taken. Arguments as for ``calibration_windows``.

    Raises:
        InvalidTextError: if the source is missing, shorter than one window or not usable.
    """
    if limit is not None and limit < 1:
        raise InvalidTextError(f"evaluation windows: expected a limit ≥ 1, found {limit}")
    if is_features(source):
        if bos:
            raise _no_tokens(source)
        found = read_features(source)
        return Windows(found[:limit], os.fspath(source), len(found))
    if length is None or length < 2:
        raise InvalidTextError(f"evaluation windows: expected length ≥ 2, found {length}")
    frame = _frame(tokenizer, length, special_tokens, bos)
    name = os.fspath(source)
    every = _cut(_stream_or_windows(_read(name, tokenizer), tokenizer, name), frame, name)
    return Windows(every[:limit], name, len(every))


def _no_tokens(source: object) -> InvalidTextError:
    return InvalidTextError(f"beginning-of-text token: expected windows of tokens, found inputs {source}")


def with_bos(windows: Tensor, bos: int) -> Tensor:
    """Token windows (windows, length) that begin with ``bos``.

    Those that do not begin with it get it in front and lose their last token.
    """
    front = torch.cat([windows.new_full((len(windows), 1), bos), windows[:, :-1]], 1)
    return torch.where(windows[:, :1] == bos, windows, front)


def bos_token(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Id of a tokenizer's beginning-of-text token, None if it has none."""
    found = getattr(tokenizer, "bos_token_id", None)
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class _Frame:
    """Special tokens around the text in a window of ``length`` tokens; ``bos`` if it alone is in front."""

    length: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    bos: int | None = None

    @property
    def inner(self) -> int:
        """Tokens of the text in a window."""
        return self.length - len(self.before) - len(self.after)

    def around(self, windows: Tensor) -> Tensor:
        """(windows, inner) of text in their frame (windows, length)."""
        before = torch.tensor(self.before, dtype=torch.int64).expand(len(windows), -1)
        after = torch.tensor(self.after, dtype=torch.int64).expand(len(windows), -1)
        return torch.cat([before, windows, after], 1)


def _frame(tokenizer: PreTrainedTokenizerBase | None, length: int, special_tokens: bool, bos: bool) -> _Frame:
    if bos and special_tokens:
        raise InvalidTextError(
            "beginning-of-text token: expected a causal model, found one whose windows have the special "
            "tokens of its tokenizer"
        )
    if bos:
        token = _require_bos(tokenizer)
        return _Frame(length, (token,), (), token)
    if not special_tokens or tokenizer is None:
        return _Frame(length)
    both = tokenizer("", add_special_tokens=True)["input_ids"]
    middle = (len(both) + 1) // 2
    frame = _Frame(length, tuple(both[:middle]), tuple(both[middle:]))
    if frame.inner < 1:
        raise InvalidTextError(
            f"window length: expected more than the {len(both)} special tokens of a window, found {length}"
        )
    return frame


def _require_bos(tokenizer: PreTrainedTokenizerBase | None) -> int:
    token = bos_token(tokenizer)
    if token is None:
        raise InvalidTextError(
            "beginning-of-text token: expected a tokenizer that has one (bos_token), found "
            + ("no tokenizer beside the model" if tokenizer is None else "one without")
        )
    return token


def _require(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InvalidTextError(
            f"text {source}: expected a tokenizer beside the model, found none; give a token file (.npy)"
        )
    return tokenizer


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole text is longer than the model's context: it is cut next
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.int64)


def _read(source: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor | Documents:
    """The tokens of a token file, the documents of anything else."""
    path = Path(source)
    if path.suffix.lower() == ".npy" and path.is_file():
        return read_token_file(path)
    return read_documents(source, tokenizer)


def _stream_or_windows(
    read: Tensor | Documents, tokenizer: PreTrainedTokenizerBase | None, source: str
) -> Tensor:
    """Tokens of a whole text (tokens,), or windows (windows, tokens) of a token file."""
    if isinstance(read, Tensor):
        return read
    return _tokenize(read.joined(), _require(tokenizer, source))


def _cut(tokens: Tensor, frame: _Frame, source: str) -> Tensor:
    """(windows, length) from a stream of tokens, or from windows that are at least as long."""
    if tokens.ndim == 2:
        # whoever made such windows may have put the token in front
        width = frame.inner if frame.bos is None else frame.length
        if tokens.shape[1] < width:
            raise InvalidTextError(
                f"token file {source}: expected windows of at least {width} tokens, "
                f"found shape {tuple(tokens.shape)}"
            )
        windows = tokens[:, :width]
        return frame.around(windows) if frame.bos is None else with_bos(windows, frame.bos)
    count = len(tokens) // frame.inner
    if count == 0:
        raise InvalidTextError(
            f"text {source}: expected at least one window of {frame.inner} tokens, found {len(tokens)} tokens"
        )
    return frame.around(tokens[: count * frame.inner].view(count, frame.inner))


def _windows_of_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    generator: np.random.Generator,
) -> Tensor:
    """Random windows of random documents that are longer than a window."""
    windows: list[Tensor] = []
    draw: Callable[[int], int] = lambda size: int(generator.integers(size))  # noqa: E731
    for _ in range(MAX_DRAWS if len(documents) else 0):
        tokens = _tokenize(documents[draw(len(documents))], tokenizer)
        if len(tokens) > length:
            start = draw(len(tokens) - length)
            windows.append(tokens[start : start + length])
            if len(windows) == samples:
                return torch.stack(windows)
    raise InvalidTextError(
        f"dataset: expected {samples} documents longer than {length} tokens, found {len(windows)}"
    )


def window_length(loaded: LoadedModel, length: int | None, *sources: object) -> int | None:
    """Tokens per window: what was asked for, or 2048 capped by the model; None without texts.

    Args:
        loaded: the model, or its shapes.
        length: what was asked for.
        sources: texts, token files or windows, and files of inputs, which have no windows; None for none.

    Raises:
        InvalidTextError: if the model has no positions for ``length`` tokens, or takes no tokens.
    """
    texts = [source for source in sources if source is not None and not is_features(source)]
    if sources and not texts:
        if length is not None:
            raise InvalidTextError(
                f"window length: expected none beside inputs that are no text, found {length} tokens"
            )
        return None
    for source in texts:
        require_tokens(loaded, source)
    longest = max_length(loaded.model)
    if length is None:
        return min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest is not None and length > longest:
        raise InvalidTextError(
            f"window length: expected at most {longest} tokens, the positions of {loaded.source}, "
            f"found {length}"
        )
    return length


def for_model(windows: Windows, loaded: LoadedModel) -> Windows:
    """The windows as a model takes them (see ``features.fitted``).

    Raises:
        InvalidTextError: for what it does not take.
    """
    return replace(windows, tokens=fitted(windows.tokens, windows.source, loaded))
