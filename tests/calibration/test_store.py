"""Where activations are: on the device while they fit, then in main memory, then in files."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import sparseswaps as ss
from sparseswaps.calibration import store as stores
from sparseswaps.calibration.activations import Stream, stream_through
from sparseswaps.calibration.store import TensorStore
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.offload import Residence
from sparseswaps.pruning.objective import SEARCH_DEFAULT

CPU = torch.device("cpu")  # here in place of the device, which has a memory of its own
SIZE = 4 * 100


def value(number: int) -> tuple[Tensor, None, list[Tensor]]:
    return torch.full((50,), float(number)), None, [torch.full((50,), -float(number))]


def same(one: Any, number: int) -> bool:
    return torch.equal(one[0], value(number)[0]) and torch.equal(one[2][0], value(number)[2][0])


def places(store: TensorStore, count: int) -> list[str]:
    """Where each key is, by the bytes that it takes."""
    kept = [store._kept[key] for key in range(count)]
    return ["device" if x.on_device else "memory" if x.in_memory else "file" for x in kept]


def test_the_device_first_then_main_memory_then_files() -> None:
    store = TensorStore(2 * SIZE, device=CPU, room=3 * SIZE)
    other = store.sibling()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(5):
            store.keep(number, value(number))
        for number in range(2):
            other.keep(number, value(number))
    assert places(store, 5) == ["device"] * 3 + ["memory"] * 2
    assert places(other, 2) == ["file"] * 2  # the limits are those of all siblings together
    assert [str(each.message) for each in said] == [
        "activations: beyond under 1 MB of the memory of cpu they are kept in main memory and beyond under "
        "1 MB in files, and take longer from there"
    ]
    for number in range(5):
        found = store.recall(number, CPU)
        assert same(found, number)
        found[0].zero_()  # a caller may write into what it gets
        assert same(store.recall(number, CPU), number)
    store.drop(0)  # makes room
    store.keep(3, value(7))
    assert places(other, 2) == ["file"] * 2
    assert store._kept[3].on_device == SIZE
    assert same(store.recall(3, CPU), 7)
    assert [x.device.type for x in store.tensors(3)] == ["cpu", "cpu"]


def test_what_does_not_come_from_the_device_is_not_kept_there() -> None:
    store = TensorStore(device=torch.device("cuda", 1), room=10 * SIZE)
    store.keep(0, value(0))
    assert places(store, 1) == ["memory"]


def test_a_view_is_kept_without_the_rest_of_its_memory() -> None:
    store = TensorStore(device=CPU, room=SIZE)
    store.keep(0, torch.arange(10_000.0)[:10])
    (leaf,) = store._kept[0].leaves
    assert leaf.untyped_storage().nbytes() == 40
    assert torch.equal(store.recall(0, CPU), torch.arange(10.0))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Files that were read, with the thread that did."""
    found: list[tuple[str, str]] = []
    original = stores._OnDisk.read

    def read(self: stores._OnDisk) -> Tensor:
        found.append((self.path.name, threading.current_thread().name))
        return original(self)

    monkeypatch.setattr(stores._OnDisk, "read", read)
    return found


def test_what_is_expected_is_read_ahead_and_once(reads: list[tuple[str, str]], tmp_path: Path) -> None:
    store = TensorStore(0, tmp_path)
    for number in range(3):
        store.keep(number, value(number))
    store.expect(1, CPU)
    store.expect(1, CPU)
    found = store.recall(1, CPU)
    assert same(found, 1)
    assert [name for name, _ in reads] == ["3", "4"]
    assert {thread for _, thread in reads} == {"activations_0"}
    found[0].zero_()
    assert same(store.recall(1, CPU), 1)  # read again: what was fetched is handed out once
    assert len(reads) == 4
    store.expect(2, CPU)
    store.keep(2, value(5))  # what was fetched is not what is there now
    assert same(store.recall(2, CPU), 5)
    store.expect(9, CPU)  # nothing there
    store.expect(2, CPU)
    store.drop(2)
    assert 2 not in store
    assert len(list(tmp_path.glob("*/*"))) == 4


def test_what_goes_wrong_while_reading_ahead_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    store = TensorStore(0, tmp_path)
    store.keep(0, value(0))
    for file in tmp_path.glob("*/*"):
        file.unlink()
    store.expect(0, CPU)
    with pytest.raises(FileNotFoundError):
        store.recall(0, CPU)


def test_zeros_in_the_shape_of_what_is_there(reads: list[tuple[str, str]]) -> None:
    for store in (TensorStore(0), TensorStore()):
        store.keep(0, (torch.ones((2, 3), dtype=torch.bfloat16), "text"))
        blank, text = store.blank(0, CPU)
        assert blank.dtype == torch.bfloat16
        assert torch.equal(blank.float(), torch.zeros(2, 3))
        assert text == "text"
    assert not reads


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_stream_reads_each_batch_once_and_ahead(family: str, reads: list[tuple[str, str]]) -> None:
    """In place of the finished blocks before the last of a stack nothing is read."""
    model = tiny_models.build(family)
    blocks = find_blocks(model)
    windows = tiny_models.tokens(96).view(4, 24)
    stream = Stream(model, blocks, windows, 1, store=TensorStore(0))
    for block in blocks:
        begin, files = len(reads), files_of(stream, 0)
        later = [name for batch in range(1, 4) for name in files_of(stream, batch)]
        for batch in range(4):
            stream.advance(batch)
        stream.finish_block()
        own = reads[begin:]
        assert sorted(name for name, _ in own) == sorted(files + later)
        assert sorted(name for name, thread in own if thread.startswith("activations")) == sorted(later)
        assert block is blocks[0] or later
    expected = stream_through(model, blocks, windows, 1, Residence())
    for batch in range(4):
        for found, other in zip(outputs(stream, batch), outputs(expected, batch), strict=True):
            assert torch.equal(found, other)


def files_of(stream: Stream, batch: int) -> list[str]:
    """Where what finished blocks returned for a batch is."""
    kept = [each for key, each in stream._store._kept.items() if key[0] == batch]
    return [leaf.path.name for each in kept for leaf in each.leaves if isinstance(leaf, stores._OnDisk)]


def outputs(stream: Stream, batch: int) -> list[Tensor]:
    stacks = sorted({block.stack for block in stream._blocks})
    return [tensor for stack in stacks for tensor in stream._store.tensors((batch, stack))]


@pytest.mark.filterwarnings("ignore:activations")
def test_masks_are_the_same_wherever_activations_are() -> None:
    """Nothing fits on the device, some does, all does."""
    windows = tiny_models.tokens(512).view(16, 32)
    found = []
    for room in (None, 0, 10_000, 10**9):
        model = tiny_models.build("llama")
        store = TensorStore() if room is None else TensorStore(15_000, device=CPU, room=room)
        settings = ss.PruneSettings("0.5", objective=SEARCH_DEFAULT)
        masks = ss.prune_layers(
            model, find_blocks(model), settings, windows, context=ss.RunContext(store=store)
        )
        found.append({name: masks[name] for name in masks})
    for other in found[1:]:
        assert all(torch.equal(mask, other[name]) for name, mask in found[0].items())
