"""Labels of the output metric: drawn from softmax, the same whatever is computed at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import label_oracle
import numpy as np
import pytest
import tiny_models
import torch
from precision_watch import Watched
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseswaps.calibration import gradients
from sparseswaps.calibration import logits as sliced_logits
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.calibration.sampling import Draws, drawn_labels
from sparseswaps.calibration.store import TensorStore
from sparseswaps.errors import InputError
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.offload import Residence
from sparseswaps.problems import products

LARGEST = 1 - 2.0**-53  # below 1 in float64


def logits_of(classes: int, tokens: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn((tokens, classes), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("classes", [2, 5, 16, 17, 100])
def test_labels_are_drawn_from_softmax(classes: int) -> None:
    """200,000 draws; a wrong share of 1 % of a class of 10 % would be seen."""
    logits = logits_of(classes, 1)
    count = 200_000
    labels = drawn_labels(logits.expand(count, classes), Draws(1).uniform(range(200), 1000))
    shares = logits[0].double().softmax(-1).numpy()
    seen = np.bincount(labels.numpy(), minlength=classes)
    often = shares * count >= 10  # rare classes in one
    found, expected = seen[often], shares[often] * count
    if not often.all():
        found, expected = (
            np.append(found, seen[~often].sum()),
            np.append(expected, shares[~often].sum() * count),
        )
    assert chisquare(found, expected).pvalue > 1e-3


@pytest.mark.parametrize("classes", [2, 3, 7, 50, 1000])
def test_labels_are_where_the_distribution_function_exceeds_the_number(classes: int) -> None:
    logits = logits_of(classes, 40 * 5)
    found = drawn_labels(logits, Draws(3).uniform(range(5), 40))
    assert torch.equal(found, label_oracle.labels(logits.view(5, 40, classes), seed=3))


def test_classes_without_any_share_are_never_drawn() -> None:
    """Whatever the number is, next to 0 and to 1 too."""
    numbers = torch.tensor([0.0, 2.0**-1074, 2.0**-60, 0.25, 0.5, 1 - 2.0**-30, LARGEST], dtype=torch.float64)
    for classes in (2, 9, 30, 101):
        for possible in ([0], [classes - 1], [classes // 2], [0, classes - 1], [classes // 3, classes - 1]):
            logits = torch.full((len(numbers), classes), -torch.inf)
            logits[:, possible] = 50 - torch.arange(len(possible)).float()
            labels = drawn_labels(logits, numbers)
            assert set(labels.tolist()) <= set(possible)
            assert labels[0] == possible[0]
            assert labels[-1] == possible[-1]
    far = torch.tensor([[0.0, -200.0, 0.0, -200.0]]).expand(7, 4)  # shares below float32's smallest number
    assert set(drawn_labels(far, numbers).tolist()) == {0, 2}


def test_numbers_belong_to_windows() -> None:
    one, other = Draws(1), Draws(2)
    whole = one.uniform(range(6), 5)
    assert torch.equal(torch.cat([one.uniform(range(2), 5), one.uniform(range(2, 6), 5)]), whole)
    assert torch.equal(one.normal(range(3, 5), (4, 2)), one.normal(range(6), (4, 2))[3:5])
    assert len(set(whole.tolist()) | set(other.uniform(range(6), 5).tolist())) == 60


class Largest(TorchDispatchMode):
    """Bytes of tensors that operations make: each one's, and the most that any made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        self.made += [
            x.untyped_storage().nbytes()
            for x in tree_leaves(found)
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known
        ]
        return found


def test_a_large_vocabulary_takes_one_tensor_of_its_size() -> None:
    classes = 128_256
    tokens = sliced_logits.slice_tokens(classes)
    logits = logits_of(classes, tokens)
    with Largest() as memory:
        drawn_labels(logits, Draws(0).uniform(range(1), tokens))
    large = [size for size in memory.made if size > 0.05 * logits.nbytes]
    assert large == [logits.nbytes]


def moments(batch_size: int, windows: Tensor, wanted: slice = slice(None)) -> dict[str, Tensor]:
    model = tiny_models.build("llama")
    blocks = find_blocks(model)
    return gradient_moments(model, blocks, windows, batch_size, seed=1, wanted=blocks[wanted])


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        assert torch.equal(found[name], found[name].T)
        torch.testing.assert_close(found[name], moment, rtol=0, atol=1e-5 * float(moment.abs().max()))


@pytest.fixture
def windows() -> Tensor:
    return tiny_models.tokens(7 * 12).view(7, 12)


def test_no_batch_or_slice_changes_the_labels(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = moments(7, windows)
    close(moments(3, windows), whole)
    monkeypatch.setattr(sliced_logits, "SLICE_ENTRIES", 5 * tiny_models.VOCABULARY)
    close(moments(2, windows), whole)
    last = moments(2, windows, slice(-1, None))
    close(last, {name: whole[name] for name in last})


def test_moments_are_in_full_precision(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own products, not those of the model on the way there."""
    original, watched = gradients._MomentSums.add, Watched()

    def add(self: Any, name: str, gradient: Tensor) -> None:
        torch.set_float32_matmul_precision("high")
        with watched:
            original(self, name, gradient)
        torch.set_float32_matmul_precision("highest")

    expected = moments(7, windows)
    monkeypatch.setattr(gradients._MomentSums, "add", add)
    found = moments(7, windows)
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    assert len(watched.seen) >= len(expected)
    assert set(watched.seen) == {("ieee", "ieee")}
    assert all(torch.equal(found[name], moment) for name, moment in expected.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert", "t5"])
def test_moments_block_by_block_are_those_of_whole_passes(
    family: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in groups of blocks, in other batches, with activations in files, in rounds of few windows."""
    model = tiny_models.build(family)
    blocks = find_blocks(model)
    for wanted in (blocks, blocks[:1], blocks[-1:], blocks[1:3]):
        whole = gradient_moments(model, blocks, windows, 3, seed=2, wanted=wanted)
        assert whole or family == "mixtral"
        for size in (3, 7):
            found = gradient_moments(
                model,
                blocks,
                windows,
                size,
                seed=2,
                wanted=wanted,
                residence=Residence(),
                store=TensorStore(0),
            )
            close(found, whole)
        with monkeypatch.context() as patched:
            patched.setattr(gradients, "HISTORY_BYTES", 1)
            said: list[tuple[int, int]] = []
            report = functools.partial(lambda said, *each: said.append(each), said)
            close(gradient_moments(model, blocks, windows, 2, 2, report, wanted, Residence()), whole)
            assert said == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Memory lets backward passes through over some windows at most, after some gradients were added."""

    def after(windows: int, gradients_first: int) -> None:
        original = gradients._MomentSums.add
        state = {"windows": 0, "left": 0}
        run = sliced_logits.SlicedModel.run

        def counted(self: Any, batch: Any) -> Any:
            state.update(windows=len(batch), left=gradients_first)
            return run(self, batch)

        def add(self: Any, name: str, gradient: Tensor) -> None:
            if state["windows"] > windows:
                state["left"] -= 1
                if state["left"] < 0:
                    raise torch.OutOfMemoryError("out of memory")
            original(self, name, gradient)

        monkeypatch.setattr(sliced_logits.SlicedModel, "run", counted)
        monkeypatch.setattr(gradients._MomentSums, "add", add)

    return after


@pytest.mark.parametrize("gradients_first", [0, 1, 5])
def test_a_full_memory_takes_fewer_windows_with_the_same_labels(
    windows: Tensor, full: Callable[[int, int], None], gradients_first: int
) -> None:
    """Gradients that were added before memory was full count once."""
    expected = moments(7, windows)
    full(2, gradients_first)
    with pytest.warns(UserWarning, match="full with 5 windows at a time; it goes on with 2") as said:
        found = moments(5, windows)
    close(found, expected)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="with 3 windows at a time; it goes on with 1"):
        close(moments(3, windows), expected)


@pytest.mark.filterwarnings("ignore:output metric")
@pytest.mark.parametrize("gradients_first", [1, 5])
def test_a_memory_that_is_full_again_and_again(
    windows: Tensor, full: Callable[[int, int], None], gradients_first: int
) -> None:
    expected = moments(7, windows)
    full(1, gradients_first)
    close(moments(7, windows), expected)


def test_a_full_memory_begins_again_block_by_block(windows: Tensor) -> None:
    """Gradients of the blocks behind the one whose pass failed count once."""
    expected = moments(7, windows)
    model = tiny_models.build("llama")
    blocks = find_blocks(model)

    def fails(_module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
        if torch.is_grad_enabled() and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    handle = blocks[0].module.register_forward_hook(fails)
    with pytest.warns(UserWarning, match="full with 5 windows at a time; it goes on with 2"):
        found = gradient_moments(model, blocks, windows, 5, seed=1, residence=Residence())
    handle.remove()
    close(found, expected)


def test_a_memory_that_is_full_with_one_window_ends_the_run(
    windows: Tensor, full: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(products._Plain, "product", _full)
        with pytest.raises(InputError, match="memory of cpu: expected room for products of gradients"):
            moments(1, windows)
    full(0, 0)
    with pytest.raises(torch.OutOfMemoryError):
        moments(1, windows)


def _full(*_args: object) -> Tensor:
    raise torch.OutOfMemoryError("out of memory")


def test_gradients_that_are_refused(windows: Tensor) -> None:
    model = tiny_models.build("llama")
    blocks = find_blocks(model)
    with torch.no_grad():
        blocks[-1].layers[-1].weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"gradients at the output of layer .* found NaN or Inf"):
        gradient_moments(model, blocks, windows, 7)
