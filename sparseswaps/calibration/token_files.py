"""Token files: token ids in NumPy's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidTextError


def read_token_file(path: Path) -> Tensor:
    """A stream of tokens (tokens,) or windows (windows, tokens), int64.

    Args:
        path: a ``.npy`` file with integers in one or two dimensions; nothing pickled is read.

    Raises:
        InvalidTextError: if it holds anything else.
    """
    name = f"token file {path}"
    try:
        with path.open("rb") as file:
            tokens: Any = np.load(file, allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes NumPy raise
        lines = str(error).strip().splitlines()
        raise InvalidTextError(
            f"{name}: expected a NumPy array, found {lines[0] if lines else type(error).__name__}"
        ) from error
    if not isinstance(tokens, np.ndarray):
        tokens.close()
        raise InvalidTextError(f"{name}: expected one NumPy array, found an archive of arrays (.npz)")
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        raise InvalidTextError(
            f"{name}: expected one or two dimensions of integers, found {tokens.ndim} of {tokens.dtype}"
        )
    if tokens.size == 0:
        raise InvalidTextError(f"{name}: expected tokens, found none (shape {tokens.shape})")
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most > np.iinfo(np.int64).max:
        raise InvalidTextError(
            f"{name}: expected token ids of at least 0 that fit 64 bits, found {least} to {most}"
        )
    return torch.from_numpy(tokens.astype(np.int64))
