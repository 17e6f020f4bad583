"""When activations are refreshed: after every group of layers with one input, or only after a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import sparseswaps as ss
from sparseswaps.models.blocks import find_blocks
from sparseswaps.pruning.pipeline import RunContext, prune_layers

TOKENS, WINDOWS = 24, 6


def model_of(kind: str, shared_data: Path) -> nn.Module:
    """A real model, or an odd one with random weights."""
    if kind == "stories260K":
        return AutoModelForCausalLM.from_pretrained(
            shared_data / "models" / kind, dtype=torch.float32, local_files_only=True
        ).eval()
    return tiny_models.build(kind)


def inputs_of(model: nn.Module, names: set[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What layers receive (tokens, channels), float64, by hooks of our own."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().double().flatten(0, -2))
        )
        for name, module in model.named_modules()
        if name in names
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kind", ["stories260K", "gpt2"])
@pytest.mark.parametrize("objective", ["plain", "drift=1"])
def test_layers_of_a_block_see_it_dense_and_the_blocks_before_it_pruned(
    kind: str, objective: str, shared_data: Path
) -> None:
    model, dense, replayed = (model_of(kind, shared_data) for _ in range(3))
    windows = tiny_models.tokens(WINDOWS * TOKENS).view(WINDOWS, TOKENS)
    problems: dict[str, ss.LayerProblem] = {}
    blocks = find_blocks(model)
    settings = ss.PruneSettings("0.5", solver=ss.Wanda(), objective=objective, flow="block")
    context = RunContext(on_layer=lambda problem, _: problems.update({problem.name: problem}))
    masks = prune_layers(model, blocks, settings, windows, context=context)
    for block in find_blocks(replayed)[:3]:
        names = {layer.name for layer in block.layers}
        seen, meant = inputs_of(replayed, names, windows), inputs_of(dense, names, windows)
        for layer in block.layers:
            problem, x = problems[layer.name], seen[layer.name]
            size = float((x**2).sum(0).max())
            # sums of float32 products, of inputs that two programs compute
            torch.testing.assert_close(problem.gram.matrix, x.T @ x, rtol=1e-4, atol=1e-5 * size)
            if objective == "plain":
                assert problem.drift is None
                continue
            assert problem.drift is not None
            weight = layer.weight.double()
            linear = weight @ (meant[layer.name] - x).T @ x
            torch.testing.assert_close(
                problem.drift.linear, linear, rtol=1e-3, atol=1e-5 * size * float(weight.norm(dim=1).max())
            )
        for layer in block.layers:
            layer.write(layer.weight * masks[layer.name])


def test_the_flow_changes_what_layers_inside_a_block_see_and_nothing_of_the_first_group() -> None:
    grams: dict[str, dict[str, torch.Tensor]] = {}
    windows = tiny_models.tokens(WINDOWS * TOKENS).view(WINDOWS, TOKENS)
    for flow in ("group", "block"):
        model = tiny_models.build("llama")
        seen: dict[str, ss.LayerProblem] = {}
        context = RunContext(on_layer=lambda problem, _, seen=seen: seen.update({problem.name: problem}))
        settings = ss.PruneSettings("0.5", solver=ss.Wanda(), objective="plain", flow=flow)
        prune_layers(model, find_blocks(model), settings, windows, context=context)
        grams[flow] = {name: problem.gram.matrix for name, problem in seen.items()}
    first = [name for name in grams["group"] if ".layers.0." in name]
    same = {name for name in first if torch.equal(grams["group"][name], grams["block"][name])}
    assert {name.rsplit(".", 1)[1] for name in same} == {"q_proj", "k_proj", "v_proj"}
    assert len(first) == 7


def test_one_shot_knows_no_flow() -> None:
    windows = tiny_models.tokens(WINDOWS * TOKENS).view(WINDOWS, TOKENS)
    found = []
    for flow in ("group", "block"):
        model = tiny_models.build("llama")
        settings = ss.PruneSettings("0.5", mode="one-shot", objective="plain", flow=flow)
        found.append(prune_layers(model, find_blocks(model), settings, windows))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
