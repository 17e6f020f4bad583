"""Nobody computes what is there already: passes of the dense network, and blocks behind the last layer."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration import store as store_module
from sparseswaps.calibration.settled import Settled
from sparseswaps.calibration.store import TensorStore
from sparseswaps.models.blocks import Block, PrunableLayer, find_blocks


def windows(count: int = 8, length: int = 12) -> Tensor:
    return tiny_models.tokens(count * length).view(count, length)


def prune(model: nn.Module, blocks: list[Block]) -> tuple[dict[str, Tensor], Counter[str]]:
    """Masks with drift and residual drift, and how often each layer was called."""
    calls: Counter[str] = Counter()
    for layer in (layer for block in find_blocks(model) for layer in block.layers):
        layer.module.forward = counting(layer.module.forward, layer.name, calls)
    masks = ss.prune_layers(
        model, blocks, ss.PruneSettings(objective="drift=0.75,residual=0.5"), windows(), held_out=windows(4)
    )
    return dict(masks), calls


def counting(forward: Callable[..., Tensor], name: str, calls: Counter[str]) -> Callable[..., Tensor]:
    """``forward`` that counts."""

    def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
        calls[name] += 1
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_what_is_there_is_not_computed_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = prune(model := tiny_models.build(family), find_blocks(model))
    # no room: every group of layers takes passes of its own, of the dense network and of all before it
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


def test_room_is_what_the_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorStore(limit=100)
    assert store.has_room(100)
    store.keep("some", torch.zeros(15))
    assert store.has_room(40)
    assert not store.has_room(41)
    # without a limit a tenth of what is free, or was before it was filled
    monkeypatch.setattr(store_module, "available_memory", lambda: 10_000)
    free = TensorStore()
    assert free.has_room(1000)
    assert not free.has_room(1001)
    free.keep("some", torch.zeros(200))
    monkeypatch.setattr(store_module, "available_memory", lambda: 9_200)
    assert free.has_room(200)
    assert not free.has_room(201)


class Toy(nn.Module):
    """Layers whose outputs are written into, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.twice = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.ran: Counter[str] = Counter()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.forward = counting(module.forward, name, self.ran)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.add_(x)
        hidden = self.inner(hidden).mul_(2)
        hidden = self.twice(hidden) + self.twice(-hidden)
        return self.last(hidden)


@torch.no_grad()
def test_settled_modules_return_what_they_returned() -> None:
    torch.manual_seed(0)
    toy, inputs = Toy(), torch.randn(3, 6)
    layers = {
        name: PrunableLayer(name, 0, module, "weight", False)
        for name, module in toy.named_modules()
        if isinstance(module, nn.Linear)
    }
    settled = Settled(TensorStore())
    settled.begin(Block("", 0, toy, tuple(layers.values())), list(layers.values()))

    def run(batch: int) -> str:
        """Which layers ran; what came out is what comes out of all of them."""
        expected = toy(inputs + batch)
        toy.ran.clear()
        with settled.passing(batch, torch.device("cpu")):
            found = toy(inputs + batch)
        assert torch.equal(found, expected)
        return " ".join(f"{name}*{count}" for name, count in toy.ran.items())

    everything = "first*1 inner.0*1 twice*2 last*1"
    assert run(0) == everything
    layers["first"].module.weight.mul_(0.5)
    settled.settle([layers["first"]])
    assert run(0) == everything  # kept now
    assert run(0) == "inner.0*1 twice*2 last*1"
    assert run(1) == everything  # another batch
    settled.settle([layers["inner.0"]])
    assert run(0) == "inner.0*1 twice*2 last*1"
    assert run(0) == "twice*2 last*1"
    # what runs behind a layer that is still to be pruned is not kept, nor what is called twice
    settled.settle([layers["last"]])
    for _ in range(3):
        assert run(0) == "twice*2 last*1"
    settled.settle([layers["twice"]])
    for _ in range(3):
        assert run(0) == "twice*2 last*1"
    settled.clear()
    assert run(0) == everything


def test_a_module_that_is_called_twice_later_is_let_go() -> None:
    toy, inputs = Toy(), torch.randn(3, 6)
    twice = PrunableLayer("twice", 0, toy.twice, "weight", False)
    last = PrunableLayer("last", 0, toy.last, "weight", False)
    settled = Settled(TensorStore())
    settled.begin(Block("", 0, toy, (twice, last)), [twice, last])
    settled.settle([twice])
    with torch.no_grad():
        expected = toy(inputs)
        for _ in range(3):
            with settled.passing(0, torch.device("cpu")):
                assert torch.equal(toy(inputs), expected)


def test_blocks_behind_the_last_layer_do_not_run() -> None:
    model = tiny_models.build("llama")
    first, second = find_blocks(model)
    names = {layer.name for layer in second.layers}
    masks, calls = prune(model, [first, replace(second, layers=())])
    assert masks.keys() == {layer.name for layer in first.layers}
    # two windows show before the run whether blocks can be skipped: as they are, and one by one
    assert all(calls[name] <= 4 for name in names)
