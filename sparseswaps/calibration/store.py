"""Tensors on the device up to a limit, beyond it in main memory, and beyond a limit there in files."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidFileError, found_of, is_full
from ..machine import available_memory, size

# Values that are fetched before they are asked for: one of each stack of blocks of a model.
MOST_AHEAD = 2
# Share of the free main memory that a store may fill with what one could do without.
SPARE = 0.1


@dataclass
class _Held:
    """Bytes of tensors on the device and in main memory, and whether it was said that not all are there."""

    on_device: int = 0
    in_memory: int = 0
    told: bool = False


class TensorStore:
    """Tensors, alone or in tuples, lists and dictionaries, by key.

    Args:
        limit: bytes in main memory; None for no limit.
        folder: where a folder of files is made, which disappears with the store; the system's by default.
        device: where values stay that come from there, up to ``room`` bytes; nowhere by default. In main
            memory they are page-locked, so that their way back does not wait for anything else.
        room: bytes on the device.
    """

    def __init__(
        self,
        limit: int | None = None,
        folder: Path | None = None,
        device: torch.device | None = None,
        room: int = 0,
    ) -> None:
        self.limit = limit
        self._parent = folder
        self._device = device
        self._room = room
        self._folder: Path | None = None
        self._files = 0
        self._held = _Held()
        self._kept: dict[Hashable, _Kept] = {}
        self._ahead = _Ahead()

    def sibling(self) -> TensorStore:
        """Another store, for other tensors, under the same limits."""
        other = TensorStore(self.limit, self._parent, self._device, self._room)
        other._held = self._held
        return other

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def keys(self) -> list[Any]:
        """What something is kept under."""
        return list(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        for key in self.keys():
            self.drop(key)

    def has_room(self, nbytes: int) -> bool:
        """Whether there is room near the processor for so many bytes that one could do without.

        On a device that is there; else in main memory, under the limit or a small share of what is free.
        """
        if self._device is not None:
            return self._held.on_device + nbytes <= self._room
        if self.limit is not None:
            return self._held.in_memory + nbytes <= self.limit
        free = available_memory()
        own = sum(kept.in_memory for kept in self._kept.values())
        return free is None or own + nbytes <= SPARE * (free + own)

    def keep(self, key: Hashable, value: Any) -> None:
        """Remember ``value`` under ``key``, instead of what was there."""
        leaves, structure = pytree.tree_flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self.drop(key)
        there = bool(tensors) and all(tensor.device == self._device for tensor in tensors)
        if there and self._held.on_device + nbytes <= self._room:
            kept = _Kept([_alone(leaf) for leaf in leaves], structure, on_device=nbytes)
        else:
            in_files = self.limit is not None and self._held.in_memory + nbytes > self.limit
            if there:
                self._tell(in_files)
            kept = _Kept(
                [self._write(leaf) if in_files else _in_memory(leaf, there) for leaf in leaves],
                structure,
                in_memory=0 if in_files else nbytes,
            )
            if there and not in_files and self._device is not None and self._device.type == "cuda":
                kept = replace(kept, copied=torch.cuda.current_stream(self._device).record_event())
        self._held.on_device += kept.on_device
        self._held.in_memory += kept.in_memory
        self._kept[key] = kept

    def recall(self, key: Hashable, device: torch.device) -> Any:
        """A copy on ``device``, which the caller may write into."""
        copies = self._ahead.take(key, device)
        return self._kept[key].copy(device) if copies is None else copies

    def blank(self, key: Hashable, device: torch.device) -> Any:
        """Zeros on ``device`` in the shape of what is under ``key``, which is not read."""
        kept = self._kept[key]
        leaves = [
            torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
            if isinstance(leaf, (Tensor, _OnDisk))
            else leaf
            for leaf in kept.leaves
        ]
        return pytree.tree_unflatten(leaves, kept.structure)

    def expect(self, key: Hashable, device: torch.device) -> None:
        """``key`` will be recalled to ``device`` next, if it is here: what takes a while begins now."""
        kept = self._kept.get(key)
        if kept is not None and kept.is_far(device):
            self._ahead.begin(key, kept, device)

    def tensors(self, key: Hashable) -> list[Tensor]:
        """Copies of the tensors under ``key``, none if nothing is there."""
        if key not in self._kept:
            return []
        value = self.recall(key, torch.device("cpu"))
        return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

    def drop(self, key: Hashable) -> None:
        """Forget what is under ``key``, if anything."""
        self._ahead.drop(key)
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self._held.on_device -= kept.on_device
        self._held.in_memory -= kept.in_memory
        for leaf in kept.leaves:
            if isinstance(leaf, _OnDisk):
                leaf.path.unlink(missing_ok=True)

    def _tell(self, in_files: bool) -> None:
        """One line, once, where activations are if not on the device."""
        if not self._held.told:
            self._held.told = True
            place = "files" if in_files else "main memory"
            beyond = "" if in_files or self.limit is None else f" and beyond {size(self.limit)} in files"
            warnings.warn(
                f"activations: beyond {size(self._room)} of the memory of {self._device} they are kept in "
                f"{place}{beyond}, and take longer from there",
                stacklevel=3,
            )

    def _write(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sparseswaps-", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files += 1
        path = self._folder / str(self._files)
        try:
            torch.save(leaf.cpu().contiguous().clone(), path)
        except (OSError, RuntimeError) as error:  # torch says of a full disk that its position is unexpected
            full = is_full(error) or shutil.disk_usage(self._folder).free < leaf.nbytes
            found = "it full" if full else found_of(error)
            raise InvalidFileError(f"activations in {self._folder}: expected room, found {found}") from error
        return _OnDisk(path, leaf.shape, leaf.dtype)


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        found: Tensor = torch.load(self.path, weights_only=True)
        return found


@dataclass(frozen=True, eq=False)
class _Kept:
    """A value's leaves, wherever they are.

    Attributes:
        leaves, structure: of the value.
        on_device, in_memory: bytes there.
        copied: when leaves have come to page-locked memory; None where they are in none.
    """

    leaves: list[Any]
    structure: Any
    on_device: int = 0
    in_memory: int = 0
    copied: torch.cuda.Event | None = None

    def copy(self, device: torch.device) -> Any:
        """The value on ``device``, in memory of its own."""
        if self.copied is not None and device.type == "cpu":
            self.copied.synchronize()
        copies = [_copied(leaf, device, self.copied is not None) for leaf in self.leaves]
        return pytree.tree_unflatten(copies, self.structure)

    def is_far(self, device: torch.device) -> bool:
        """Whether a copy on ``device`` comes from a file or from another device."""
        return any(
            isinstance(leaf, _OnDisk) or (isinstance(leaf, Tensor) and leaf.device != device)
            for leaf in self.leaves
        )


def _copied(leaf: Any, device: torch.device, locked: bool) -> Any:
    if isinstance(leaf, _OnDisk):
        return leaf.read().to(device)
    return leaf.to(device, copy=True, non_blocking=locked) if isinstance(leaf, Tensor) else leaf


def _alone(leaf: Any) -> Any:
    """``leaf``, without what else may be in its memory."""
    if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > leaf.nbytes:
        return leaf.clone()
    return leaf


def _in_memory(leaf: Any, locked: bool) -> Any:
    """``leaf`` in main memory; from a device in pages that its copies need not wait for, if ``locked``."""
    if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
        return leaf
    if not locked or leaf.device.type != "cuda":
        return leaf.cpu()
    with torch.cuda.device(leaf.device):  # locked for the device that the leaf is on
        host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True)
    return host.copy_(leaf, non_blocking=True)


# A copy, and when it is made where a device does that by itself.
_Fetched = tuple[Any, torch.cuda.Event | None]


class _Ahead:
    """A few values that are being fetched before they are asked for."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._expected: dict[tuple[Hashable, torch.device], Future[_Fetched]] = {}

    def begin(self, key: Hashable, kept: _Kept, device: torch.device) -> None:
        """Fetch ``kept`` to ``device`` while others go on."""
        if (key, device) in self._expected:
            return
        while len(self._expected) >= MOST_AHEAD:  # nobody has asked for the oldest
            self._forget(next(iter(self._expected)))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="activations")
        stream = None
        if device.type == "cuda":
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))  # it may still be on its way to memory
        self._expected[key, device] = self._thread.submit(_fetched, kept, device, stream)

    def take(self, key: Hashable, device: torch.device) -> Any | None:
        """What was fetched for ``key``, once; None if nothing was."""
        future = self._expected.pop((key, device), None)
        if future is None:
            return None
        value, done = future.result()
        if done is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(stream)
        return value

    def drop(self, key: Hashable) -> None:
        """Nothing is fetched for ``key`` any more."""
        for place in [place for place in self._expected if place[0] == key]:
            self._forget(place)

    def _forget(self, place: tuple[Hashable, torch.device]) -> None:
        wait([self._expected.pop(place)])  # it may be reading a file that goes away


def _fetched(kept: _Kept, device: torch.device, stream: torch.cuda.Stream | None) -> _Fetched:
    """A copy on ``device``, and when a ``stream`` has made it."""
    if stream is None:
        return kept.copy(device), None
    with torch.cuda.stream(stream):
        value = kept.copy(device)
        return value, stream.record_event()
