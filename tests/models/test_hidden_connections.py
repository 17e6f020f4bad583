"""Blocks that hand on more than they return: keys and values of earlier layers, states, what nobody calls."""

from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_models
import torch
import transformers as tf
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration import gradients
from sparseswaps.calibration.activations import Stream, can_skip
from sparseswaps.calibration.gathering import Flow, gather
from sparseswaps.calibration.steps import steps_of
from sparseswaps.calibration.store import TensorStore
from sparseswaps.calibration.targets import Target
from sparseswaps.calibration.windows import Windows
from sparseswaps.models.blocks import find_blocks
from sparseswaps.ranks import Ranks

SHARING = ("gemma3n_text", "gemma4_text")


def build(family: str) -> tf.PreTrainedModel:
    return tiny_families.build(family, tiny_families.families()[family])


def windows(count: int = 8, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        tiny_families.FIRST_WORD, tiny_families.VOCABULARY, (count, length), generator=generator
    )


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("offload", [False, True])
def test_shared_keys_and_values(family: str, offload: bool, tmp_path: Path) -> None:
    """Drift, the default, is left out with a word; masks and perplexity are those without offloading."""
    build(family).save_pretrained(tmp_path / "dense")
    text = Windows(windows(), "random", 8)
    with pytest.warns(UserWarning, match="drift and residual drift, the default, need blocks"):
        report = ss.prune(
            tmp_path / "dense",
            "0.5",
            calibration=text,
            evaluation=text,
            offload=offload,
            out=tmp_path / "out",
        )
    kind = getattr(tf, tiny_families.families()[family])
    for folder, found in (("dense", report.perplexity_dense), ("out", report.perplexity_pruned)):
        model = kind.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            logits = model(input_ids=text.tokens).logits[:, :-1].double()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text.tokens[:, 1:].flatten())
        assert found == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("family", SHARING)
def test_inputs_of_layers_behind_shared_keys_and_values(family: str) -> None:
    """Observed block by block they are those of one undisturbed pass, as no block is skipped."""
    model = build(family)
    blocks = find_blocks(model)
    tokens = windows(2)
    assert not can_skip(model, blocks, tokens)
    expected: dict[str, list[Tensor]] = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _m, args, name=layer.name: expected.setdefault(name, []).append(args[0].clone())
        )
        for block in blocks
        for layer in block.layers
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    stream = Stream(model, blocks, tokens, 2, skip=False)
    for block in blocks:
        seen: dict[str, list[Tensor]] = {}
        stream.observe(
            0, block.layers, lambda layer, x, seen=seen: seen.setdefault(layer.name, []).append(x.clone())
        )
        for layer in block.layers:
            for one, other in zip(seen.get(layer.name, []), expected.get(layer.name, []), strict=True):
                assert torch.equal(one, other), layer.name
        stream.finish_block()


@pytest.mark.parametrize("family", SHARING)
def test_gradients_through_shared_keys_and_values(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are computed again in the backward pass have the gradients of blocks that are kept."""
    model = build(family)
    blocks = find_blocks(model)
    found = gradients.gradient_moments(model, blocks, windows(), 4)
    monkeypatch.setattr(gradients, "checkpointed", lambda forward: forward)
    expected = gradients.gradient_moments(model, blocks, windows(), 4)
    assert found.keys() == expected.keys()
    assert any("k_proj" in name for name in found)
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-6 * float(moment.abs().max()))


class _Remembering(nn.Module):
    """Adds what another module saw last, which it finds in a state that nobody returns."""

    def __init__(self, inner: nn.Module, source: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        source.register_forward_hook(self._keep)
        self._last: Tensor | None = None

    def _keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._last = output

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.inner(hidden)
        return found if self._last is None else found + self._last


def test_a_state_of_a_module_is_no_return_value() -> None:
    """The state left by the same window would look right: only another window's shows the connection."""
    model = tiny_models.build("llama")
    blocks = find_blocks(model)
    assert can_skip(model, blocks, tiny_models.tokens(64).view(2, 32))
    first, second = model.model.layers
    second.mlp = _Remembering(second.mlp, first.mlp)
    assert not can_skip(model, find_blocks(model), tiny_models.tokens(64).view(2, 32))


def test_members_of_a_list_of_lists_are_stacks() -> None:
    model = build("funnel")
    blocks = find_blocks(model)
    assert all(not isinstance(block.module, nn.ModuleList) for block in blocks)
    assert len({block.stack for block in blocks}) > 1


def test_blocks_that_nobody_calls_are_not_skipped() -> None:
    """The model calls the parts of its blocks, one after the other."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 8)
            self.blocks = nn.ModuleList([nn.ModuleDict({"one": nn.Linear(8, 8)}) for _ in range(2)])

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden: Tensor = self.embed(input_ids)
            for block in self.blocks:
                hidden = hidden + block["one"](hidden)
            return hidden

    torch.manual_seed(0)
    model = Parts()
    assert not can_skip(model, find_blocks(model), windows())


def test_layers_that_are_called_twice_are_seen_twice() -> None:
    """Pegasus-X projects local and global tokens with the same layers: both calls count, with drift too."""
    model = build("pegasus_x")
    blocks = find_blocks(model)
    tokens = windows(4)
    calls: dict[str, list[Tensor]] = {}
    block = blocks[0]
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _m, args, name=layer.name: calls.setdefault(name, []).append(
                args[0].double().flatten(0, -2)
            )
        )
        for layer in block.layers
    ]
    with torch.no_grad():
        model(input_ids=tokens, decoder_input_ids=tokens)
    for handle in handles:
        handle.remove()
    assert any(len(each) > 1 for each in calls.values())
    dense = {layer.name: layer.weight.clone() for layer in block.layers}
    for target in (None, Target(0.75, 0.5)):
        flow = Flow.of(model, blocks, tokens, True, target, Ranks(), TensorStore())
        for step in flow.steps():
            for name, sums in gather(flow, block, step, dense, False, ()).items():
                inputs = torch.cat(calls[name])
                assert sums.tokens == len(inputs), (name, target)
                torch.testing.assert_close(sums.gram().matrix, inputs.T @ inputs, rtol=1e-5, atol=1e-5)
    assert any(not step.once for step in steps_of(Stream(model, blocks, tokens, 4)))


def test_experts_that_are_modules_have_no_drift() -> None:
    """A router may send other tokens to them than in the dense model."""
    model = build("switch_transformers")
    blocks = find_blocks(model)
    tokens = windows(4)
    flow = Flow.of(model, blocks, tokens, True, Target(0.75, 0.5), Ranks(), TensorStore())
    dense = {layer.name: layer.weight.clone() for layer in blocks[0].layers}
    found = {}
    for step in flow.steps():
        found |= gather(flow, blocks[0], step, dense, False, ())
    experts = {name for name in found if ".experts." in name}
    assert experts
    assert experts == {name for name, sums in found.items() if not sums.has_drift}
