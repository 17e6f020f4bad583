"""Inputs of models that take no tokens, from files: features of images or sound, a sample in each row.

A ``.safetensors`` file holds arguments of the model's forward by name, all with as many rows; a float
``.npy`` file is the model's main input (``pixel_values``, ``input_features``, ``input_values``) alone. They
are what the model's processor makes of images or sound. Before anything is computed the model's forward is
tried on the first sample, on shapes alone where the weights are not loaded.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InvalidModelError, InvalidTextError
from ..models.blocks import device_of, token_embeddings
from ..models.inputs import ModelInputs, Samples, forward_inputs, main_input, takes, try_forward
from ..models.loading import LoadedModel

# Characters of a library's message that are repeated.
LONGEST_MESSAGE = 200
# Tokens on which a model of several kinds of inputs is tried.
TRIAL_TOKENS = 8


def is_features(source: object) -> bool:
    """Whether a source of windows is a file of inputs, and not of text or tokens."""
    if isinstance(getattr(source, "tokens", None), ModelInputs):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    if path.suffix == ".npy" and path.is_file():
        try:
            with path.open("rb") as file:
                first = np.lib.format.read_magic(file) == (1, 0)
                header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, _, dtype = header(file)
        except (ValueError, OSError, EOFError):  # its reader says so
            return False
        return len(shape) > 1 and dtype.kind == "f"
    return path.suffix == ".safetensors"


def read_features(source: str | os.PathLike[str]) -> ModelInputs:
    """The inputs in a file.

    Raises:
        InvalidTextError: if it is missing, damaged, not of equal rows or holds NaN or Inf.
    """
    path = Path(source)
    if not path.is_file():
        raise InvalidTextError(f"inputs {path}: expected a file of tensors, found no such file")
    if path.suffix == ".npy":
        return _checked({"": torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))}, path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _checked(load_file(path), path)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InvalidTextError):
            raise
        raise InvalidTextError(f"inputs {path}: expected a safetensors file, found {error}") from error


def _checked(tensors: dict[str, Tensor], path: Path) -> ModelInputs:
    """Tensors of as many rows, at least one, and of finite values."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(rows) != 1 or 0 in rows:
        raise InvalidTextError(
            f"inputs {path}: expected tensors of as many rows, a sample in each, found "
            + (", ".join(f"{name} {shape}".strip() for name, shape in shapes.items()) or "no tensor")
        )
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            what = f"{path}: {name}" if name else f"{path}"
            raise InvalidTextError(f"inputs {what}: expected finite values, found {bad} NaN or Inf")
    return ModelInputs(tensors)


def require_tokens(loaded: LoadedModel, source: object) -> None:
    """Refuse a text where the model takes no tokens, or not tokens alone.

    Raises:
        InvalidTextError: saying which file is expected.
    """
    model = loaded.model
    main = main_input(model)
    reason = ""
    if not takes(model, "input_ids"):
        reason = f"which takes {main} and no tokens"
    elif _more_than_text(model):
        found = _trial(model, torch.ones(1, TRIAL_TOKENS, dtype=torch.int64))
        if isinstance(found, str):
            parts = {main_input(part) for part in model.modules() if hasattr(part, "main_input_name")}
            others = sorted(name for name in parts - {"input_ids"} if takes(model, name))
            reason = f"which takes {' and '.join(others) or f'more ({found})'} beside tokens"
    if reason:
        alone = "" if main == "input_ids" else f", or a float .npy file of {main}"
        raise InvalidTextError(
            f"text {source}: expected inputs for {loaded.source}, {reason}: a .safetensors file with the "
            f"arguments of {type(model).__name__}.forward, a sample in each row{alone}"
        )


def _more_than_text(model: nn.Module) -> bool:
    kinds = getattr(model, "input_modalities", "text")
    return {"text"} != ({kinds} if isinstance(kinds, str) else set(kinds))


def fitted(samples: Samples, source: str, loaded: LoadedModel) -> Samples:
    """The samples as the model takes them: checked, named, with the positions that they have in it.

    Raises:
        InvalidTextError: for tokens outside of the vocabulary, and inputs that the model does not take.
    """
    model = loaded.model
    if isinstance(samples, Tensor):
        _check_vocabulary(samples, f"tokens of {source}", loaded)
        return samples
    main = main_input(model)
    tensors = {name or main: tensor for name, tensor in samples.tensors.items()}
    for name, tensor in tensors.items():
        if not takes(model, name):
            raise InvalidTextError(
                f"inputs {source}: expected arguments of {type(model).__name__}.forward, found {name!r}"
            )
        if name == "input_ids" or name.endswith("_input_ids"):
            _check_vocabulary(tensor, f"{name} of {source}", loaded)
        elif name in (main, "pixel_values", "input_features", "input_values") and not (
            tensor.is_floating_point()
        ):
            raise InvalidTextError(
                f"inputs {source}: expected floating-point values of {name}, as the model's processor makes "
                f"them, found {tensor.dtype}"
            )
    for name in tensors:
        if name.endswith("attention_mask") and not bool(tensors[name].bool().all()):
            warnings.warn(
                f"inputs {source}: {name} leaves positions out; what layers make of them counts all the same",
                stacklevel=2,
            )
    found = replace(samples, tensors=tensors)
    positions = _trial(model, found)
    if isinstance(positions, str):
        shapes = ", ".join(f"{name} {tuple(tensor.shape[1:])}" for name, tensor in tensors.items())
        raise InvalidTextError(
            f"inputs {source}: expected what {type(model).__name__} takes, found {shapes} ({positions})"
        )
    return replace(found, positions=positions or _about(model, found))


def _trial(model: nn.Module, samples: Samples) -> int | str | None:
    """The positions of a sample in the model, what its forward says against it, or None if that is not known.

    Not known is what only shows with weights: some forwards look at values, some products want other shapes.
    """
    try:
        return try_forward(model, samples)
    except (AttributeError, TypeError, ValueError) as error:  # as models say what they miss
        return told(error)
    except Exception:  # anything else, which is seen again once the weights are there
        return None


def told(error: Exception) -> str:
    """What an error of a library says, in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {textwrap.shorten(words, LONGEST_MESSAGE) or 'no message'}"


def _about(model: nn.Module, samples: ModelInputs) -> int:
    """About how many positions a sample has, from its size and the width of the model."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    most = max(tensor[0].numel() for tensor in samples.tensors.values())
    return max(1, most // (width if isinstance(width, int) else most))


def check_forward(loaded: LoadedModel, samples: Samples, source: str) -> None:
    """Refuse samples on which the model fails, once its weights are there, or answers at random.

    Raises:
        InvalidModelError: with what it says.
    """
    try:
        try_forward(loaded.model, samples)
        alike = isinstance(samples, Tensor) or _repeats(loaded.model, samples[:1])
    except Exception as error:  # whatever a model raises for inputs that it cannot take
        raise InvalidModelError(
            f"model {loaded.source}: expected a forward pass on the first sample of {source}, "
            f"found {told(error)}"
        ) from error
    if not alike:
        raise InvalidModelError(
            f"model {loaded.source}: expected the same output twice for the first sample of {source}, found "
            "others; give what the model draws at random (such as noise) among its inputs"
        )


def _repeats(model: nn.Module, samples: Samples) -> bool:
    """Whether the model makes the same of the same, but for rounding."""
    inputs = forward_inputs(model, samples.to(device_of(model)))
    with torch.no_grad():
        once, again = (pytree.tree_leaves(model(**inputs)) for _ in range(2))
    return len(once) == len(again) and all(
        one.shape == other.shape
        and torch.allclose(one, other, rtol=0, atol=0.01 * float(one.abs().max()), equal_nan=True)
        for one, other in zip(once, again, strict=True)
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel()
    )


def _check_vocabulary(tokens: Tensor, what: str, loaded: LoadedModel) -> None:
    size = token_embeddings(loaded.model)
    if tokens.is_floating_point() or (
        size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < size
    ):
        raise InvalidTextError(
            f"{what}: expected ids from 0 to {(size or 1) - 1}, the vocabulary of {loaded.source}, "
            f"found {tokens.min():g} to {tokens.max():g}"
        )
