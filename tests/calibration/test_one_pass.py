"""Nobody computes what is there already: passes of the dense network, and blocks behind the last layer."""

from collections import Counter
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration.store import TensorStore
from sparseswaps.models.blocks import Block, find_blocks


def windows(count: int = 8, length: int = 12) -> Tensor:
    return tiny_models.tokens(count * length).view(count, length)


def prune(model: nn.Module, blocks: list[Block]) -> tuple[dict[str, Tensor], Counter[str]]:
    """Masks with drift and residual drift, and how often each layer was called."""
    calls: Counter[str] = Counter()
    layers = [layer for block in find_blocks(model) for layer in block.layers]
    hooks = [
        layer.module.register_forward_hook(lambda *_, name=layer.name: calls.update([name]))
        for layer in layers
    ]
    masks = ss.prune_layers(
        model, blocks, ss.PruneSettings(objective="drift=0.75,residual=0.5"), windows(), held_out=windows(4)
    )
    for hook in hooks:
        hook.remove()
    return dict(masks), calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "mixtral", "t5"])
def test_one_pass_of_the_dense_network_serves_a_block(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = prune(model := tiny_models.build(family), find_blocks(model))
    # no room: every group of layers takes a pass of its own
    monkeypatch.setattr(TensorStore, "has_room", lambda _store, _nbytes: False)
    expected, more = prune(model := tiny_models.build(family), find_blocks(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert calls.total() < more.total()
    assert all(calls[name] <= more[name] for name in calls)


def test_some_batches_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    room = iter([True, False] * 1000)
    monkeypatch.setattr(TensorStore, "has_room", lambda _store, _nbytes: next(room))
    found, _ = prune(model := tiny_models.build("llama"), find_blocks(model))
    monkeypatch.setattr(TensorStore, "has_room", lambda _store, _nbytes: False)
    expected, _ = prune(model := tiny_models.build("llama"), find_blocks(model))
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_room_is_what_the_limit_leaves() -> None:
    store = TensorStore(limit=100)
    assert store.has_room(100)
    store.keep("some", torch.zeros(15))
    assert store.has_room(40)
    assert not store.has_room(41)
    assert TensorStore().has_room(1000)
    assert not TensorStore().has_room(1 << 60)


def test_blocks_behind_the_last_layer_do_not_run() -> None:
    model = tiny_models.build("llama")
    first, second = find_blocks(model)
    names = {layer.name for layer in second.layers}
    masks, calls = prune(model, [first, replace(second, layers=())])
    assert masks.keys() == {layer.name for layer in first.layers}
    # two windows show before the run whether blocks can be skipped: as they are, and one by one
    assert all(calls[name] <= 4 for name in names)
