"""Windows for calibration and evaluation, from a local text, a token file, a dataset or a file of inputs.

The field's calibration protocol (SparseGPT, Wanda): 128 windows of 2048 tokens, seeded. A local
text is tokenised once and cut into non-overlapping windows, of which a seeded choice is taken. For
a dataset, documents are drawn at random until one is longer than a window, and a random window of
it is taken.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidTextError
from ..models.blocks import max_length
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from .corpus import standard_library_text
from .features import fitted, is_features, read_features, require_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that the field uses, and where they are: path, configuration, data files, split, column.
DATASETS: dict[str, tuple[str, str | None, dict[str, str] | None, str, str]] = {
    "c4": ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", "text"),
    "wikitext2-test": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "text"),
}
# Tokens per window where nothing else is asked for.
DEFAULT_LENGTH = 2048
STANDARD_LIBRARY = {"stdlib": "train", "stdlib-held-out": "held-out"}
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

    def __len__(self) -> int:
        return self.tokens.shape[0]


def calibration_windows(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    length: int | None,
    seed: int = 0,
    special_tokens: bool = False,
) -> Windows:
    """A seeded choice of ``samples`` windows of ``length`` tokens, or of samples of other inputs.

    Args:
        source: a text file, a token file (``.npy``, one- or two-dimensional integers), ``stdlib``
            (source code of Python's standard library) or a dataset: ``c4``, ``wikitext2`` or any
            ``path[:split[:column]]`` that ``datasets`` loads; or a file of inputs (see ``features``).
        tokenizer: needed for text.
        samples: windows to choose; fewer are taken, with a warning, if there are not as many.
        length: tokens per window; of a text only.
        seed: of the choice.
        special_tokens: start and end every window with the tokenizer's special tokens, as encoders
            expect.

    Raises:
        InvalidTextError: if the source is missing, too short or not usable.
    """
    generator = np.random.default_rng(seed)
    if is_features(source):
        features = read_features(source)
        chosen = _choice(len(features), source, samples, generator, "samples")
        return Windows(features[chosen], os.fspath(source), len(features))
    if samples < 1 or length is None or length < 2:
        raise InvalidTextError(
            f"calibration windows: expected samples ≥ 1 and length ≥ 2, found {samples} and {length}"
        )
    frame = _frame(tokenizer, special_tokens)
    inner = length - len(frame[0]) - len(frame[1])
    dataset = _dataset(source)
    if dataset is not None:
        windows = _windows_of_documents(dataset, _require(tokenizer, source), samples, inner, generator)
        return Windows(_framed(windows, frame), os.fspath(source), samples)
    every = _cut(_tokens_of(source, tokenizer), inner, source)
    chosen = _choice(len(every), source, samples, generator, f"windows of {length} tokens")
    return Windows(_framed(every[chosen], frame), os.fspath(source), len(every))


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
) -> Windows:
    """All ⌊N / length⌋ non-overlapping windows of a text, the tail dropped; the first ``limit``.

    Rows of a dataset are joined with a blank line and tokenised once (the WikiText-2 protocol). Of a file of
    inputs all samples.

    Raises:
        InvalidTextError: if the source is missing or shorter than one window.
    """
    if is_features(source):
        found = read_features(source)
        return Windows(found[:limit], os.fspath(source), len(found))
    if length is None:
        raise InvalidTextError(f"text {source}: expected the length of its windows, found none")
    frame = _frame(tokenizer, special_tokens)
    inner = length - len(frame[0]) - len(frame[1])
    dataset = _dataset(source)
    if dataset is not None:
        text = "\n\n".join(str(document) for document in dataset)
        tokens = _tokenize(text, _require(tokenizer, source))
    else:
        tokens = _tokens_of(source, tokenizer)
    every = _cut(tokens, inner, source)
    return Windows(_framed(every[:limit], frame), os.fspath(source), len(every))


def _frame(tokenizer: PreTrainedTokenizerBase | None, special_tokens: bool) -> tuple[list[int], list[int]]:
    """Special tokens before and after a window."""
    if not special_tokens or tokenizer is None:
        return [], []
    both = tokenizer("", add_special_tokens=True)["input_ids"]
    middle = (len(both) + 1) // 2
    return list(both[:middle]), list(both[middle:])


def _framed(windows: Tensor, frame: tuple[list[int], list[int]]) -> Tensor:
    before = torch.tensor(frame[0], dtype=torch.int64).expand(len(windows), -1)
    after = torch.tensor(frame[1], dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([before, windows, after], 1)


def _require(
    tokenizer: PreTrainedTokenizerBase | None, source: str | os.PathLike[str]
) -> PreTrainedTokenizerBase:
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


def _tokens_of(source: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    name = os.fspath(source)
    if name in STANDARD_LIBRARY:
        part: Any = STANDARD_LIBRARY[name]
        return _tokenize(standard_library_text(part), _require(tokenizer, source))
    path = Path(name)
    if not path.is_file():
        raise InvalidTextError(
            f"text {name}: expected a text file, a token file (.npy) or a dataset name, found no such file"
        )
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InvalidTextError(f"token file {name}: expected a NumPy array, found {error}") from error
        if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
            raise InvalidTextError(
                f"token file {name}: expected one or two dimensions of integers, "
                f"found {tokens.ndim} of {tokens.dtype}"
            )
        return torch.from_numpy(tokens.astype(np.int64))
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InvalidTextError(f"text {name}: expected readable UTF-8, found {error}") from error
    return _tokenize(text, _require(tokenizer, source))


def _cut(tokens: Tensor, length: int, source: str | os.PathLike[str]) -> Tensor:
    """(windows, length) from a stream of tokens, or from windows that are at least as long."""
    if tokens.ndim == 2:
        if tokens.shape[1] < length or len(tokens) == 0:
            raise InvalidTextError(
                f"token file {os.fspath(source)}: expected windows of at least {length} tokens, "
                f"found shape {tuple(tokens.shape)}"
            )
        return tokens[:, :length]
    count = len(tokens) // length
    if count == 0:
        raise InvalidTextError(
            f"text {os.fspath(source)}: expected at least one window of {length} tokens, "
            f"found {len(tokens)} tokens"
        )
    return tokens[: count * length].view(count, length)


def _dataset(source: str | os.PathLike[str]) -> Any | None:
    """The text column of a dataset, or None if ``source`` is a file or the standard library."""
    name = os.fspath(source)
    if name in STANDARD_LIBRARY or Path(name).is_file() or Path(name).suffix in (".txt", ".npy"):
        return None
    try:
        import datasets
    except ImportError as error:
        raise InvalidTextError(
            f"text {name}: found no such file, and for a dataset expected the library datasets: "
            "run pip install 'sparseswaps[datasets]'"
        ) from error
    path, configuration, files, split, column = DATASETS.get(name, (name, None, None, "train", "text"))
    if name not in DATASETS and ":" in name:
        path, split, column = ([*name.split(":"), "text"])[:3]
    try:
        if Path(path).is_dir():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, configuration, data_files=files, split=split)
        return loaded[column]
    except Exception as error:  # whatever loading or the network raises
        message = str(error).strip().splitlines()
        raise InvalidTextError(
            f"text {name}: expected a text file, a token file (.npy) or a dataset, "
            f"found {type(error).__name__}: {message[0] if message else 'no message'}"
        ) from error


def _windows_of_documents(
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    generator: np.random.Generator,
) -> Tensor:
    """Random windows of random documents that are longer than a window."""
    windows: list[Tensor] = []
    draw: Callable[[int], int] = lambda size: int(generator.integers(size))  # noqa: E731
    for _ in range(MAX_DRAWS):
        tokens = _tokenize(str(documents[draw(len(documents))]), tokenizer)
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
