"""Tensors in main memory up to a limit, and beyond it in files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidFileError, found_of, is_full


@dataclass
class _Held:
    """Bytes of tensors in main memory."""

    size: int = 0


class TensorStore:
    """Tensors, alone or in tuples, lists and dictionaries, by key.

    Args:
        limit: bytes in main memory; None for no limit.
        folder: where a folder of files is made, which disappears with the store; the system's by default.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit = limit
        self._parent = folder
        self._folder: Path | None = None
        self._files = 0
        self._held = _Held()
        self._kept: dict[Hashable, tuple[list[Any], Any, int]] = {}

    def sibling(self) -> TensorStore:
        """Another store, for other tensors, under the same limit."""
        other = TensorStore(self.limit, self._parent)
        other._held = self._held
        return other

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def keep(self, key: Hashable, value: Any) -> None:
        """Remember ``value`` under ``key``, instead of what was there."""
        leaves, structure = pytree.tree_flatten(value)
        leaves = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        self.drop(key)
        if self.limit is not None and self._held.size + size > self.limit:
            leaves = [self._write(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            size = 0
        self._held.size += size
        self._kept[key] = leaves, structure, size

    def recall(self, key: Hashable, device: torch.device) -> Any:
        """A copy on ``device``, which the caller may write into."""
        leaves, structure, _ = self._kept[key]
        read = [leaf.read() if isinstance(leaf, _OnDisk) else leaf for leaf in leaves]
        copies = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in read]
        return pytree.tree_unflatten(copies, structure)

    def tensors(self, key: Hashable) -> list[Tensor]:
        """Copies of the tensors under ``key``, none if nothing is there."""
        if key not in self._kept:
            return []
        value = self.recall(key, torch.device("cpu"))
        return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

    def drop(self, key: Hashable) -> None:
        """Forget what is under ``key``, if anything."""
        leaves, _, size = self._kept.pop(key, ([], None, 0))
        self._held.size -= size
        for leaf in leaves:
            if isinstance(leaf, _OnDisk):
                leaf.path.unlink(missing_ok=True)

    def _write(self, tensor: Tensor) -> _OnDisk:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sparseswaps-", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files += 1
        path = self._folder / str(self._files)
        try:
            torch.save(tensor.contiguous().clone(), path)
        except (OSError, RuntimeError) as error:  # torch says of a full disk that its position is unexpected
            full = is_full(error) or shutil.disk_usage(self._folder).free < tensor.nbytes
            found = "it full" if full else found_of(error)
            raise InvalidFileError(f"activations in {self._folder}: expected room, found {found}") from error
        return _OnDisk(path)


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file."""

    path: Path

    def read(self) -> Tensor:
        found: Tensor = torch.load(self.path, weights_only=True)
        return found
