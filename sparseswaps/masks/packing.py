"""Masks as bits and weights as bytes: what files and records store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidFileError


@final
class PackedMasks(Mapping[str, Tensor]):
    """Masks (rows, cols), bool, by layer name, unpacked whenever they are asked for.

    Args:
        cols: number of columns of each layer.
        packed: the packed bits of a layer (rows, ⌈cols/8⌉).
    """

    def __init__(self, cols: Mapping[str, int], packed: Callable[[str], Tensor]) -> None:
        self._cols = cols
        self._packed = packed

    def __getitem__(self, name: str) -> Tensor:
        return unpack_mask(self._packed(name), self._cols[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._cols)

    def __len__(self) -> int:
        return len(self._cols)


def pack_mask(mask: Tensor) -> Tensor:
    """Bits of ``mask`` (rows, cols) as bytes (rows, ⌈cols/8⌉)."""
    # scores of transposed weights give masks in their order
    return torch.from_numpy(np.packbits(np.ascontiguousarray(mask.cpu().numpy()), axis=1))


def unpack_mask(packed: Tensor, cols: int) -> Tensor:
    """The mask (rows, cols), bool, from its packed bits."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=cols).astype(bool))


def unpack_bytes(packed: bytes, shape: Sequence[int]) -> Tensor:
    """The mask (rows, cols), bool, from its packed bits as a record stores them.

    Raises:
        InvalidFileError: if they are not that many.
    """
    rows, cols = shape
    _check_bytes("a mask", packed, rows * ((cols + 7) // 8))
    return unpack_mask(torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(rows, -1), cols)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` with zeros where ``mask`` prunes, both (rows, cols)."""
    return weight.masked_fill(~mask.to(weight.device), 0)


def weight_bytes(weight: Tensor) -> bytes:
    """A weight as a record stores it, row by row in its dtype."""
    return weight.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def weight_from(stored: bytes, like: Tensor) -> Tensor:
    """A weight that ``weight_bytes`` has stored, with the shape, dtype and device of ``like``.

    Raises:
        InvalidFileError: if it has another size.
    """
    _check_bytes("a weight", stored, like.numel() * like.element_size())
    return torch.frombuffer(bytearray(stored), dtype=like.dtype).view(like.shape).to(like.device)


def _check_bytes(what: str, stored: object, size: int) -> None:
    if not isinstance(stored, bytes) or len(stored) != size:
        found = f"{len(stored)} bytes" if isinstance(stored, bytes) else f"a {type(stored).__name__}"
        raise InvalidFileError(f"record of a run, {what}: expected {size} bytes, found {found}")
