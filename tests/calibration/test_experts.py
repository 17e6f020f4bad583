"""Experts that few calibration tokens reach: counted, warned of, pruned by the stated fallback."""

from __future__ import annotations

import warnings

import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.models.blocks import find_blocks
from sparseswaps.pruning.pipeline import prune_layers
from sparseswaps.pruning.settings import Mode
from sparseswaps.records.run import LayerRecord
from sparseswaps.records.run_database import RunDatabase

EXPERTS = "model.layers.0.mlp.experts"


def starving(expert: int) -> torch.nn.Module:
    """A mixture of four whose first router hardly ever sends a token to one of them."""
    model = tiny_models.build("mixtral")
    with torch.no_grad():
        # one channel is positive for all tokens and speaks against that expert; few others speak for it
        model.get_input_embeddings().weight[:, 0] = 1
        model.get_submodule("model.layers.0.mlp.gate").weight[expert, 0] = -1
    return model


def windows() -> torch.Tensor:
    return tiny_models.tokens(8 * 32).view(8, 32)


def run(model: torch.nn.Module, **options: object) -> tuple[dict[str, torch.Tensor], dict[str, LayerRecord]]:
    record = RunDatabase(None)
    settings = ss.PruneSettings(**{"objective": "plain", **options})
    masks = prune_layers(model, find_blocks(model), settings, windows(), context=ss.RunContext(record))
    return masks, {layer.name: layer for layer in record.layers()}


def moe_inputs(model: torch.nn.Module) -> torch.Tensor:
    """What reaches the first mixture (tokens, cols)."""
    seen = []
    module = model.get_submodule("model.layers.0.mlp")
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows())
    handle.remove()
    return seen[0].flatten(0, 1)


def test_a_starved_expert() -> None:
    model = starving(3)
    weight = model.get_submodule(EXPERTS).gate_up_proj.detach()[3].clone()
    inputs = moe_inputs(model)
    with pytest.warns(UserWarning, match=r"experts of model.layers.\d: \d of \d expert layers") as seen:
        masks, records = run(model, mode=Mode.ONE_SHOT, unreached="magnitude")
    reached = {e: records[f"{EXPERTS}.gate_up_proj.{e}"].tokens for e in range(4)}
    assert sum(reached.values()) == 2 * windows().numel()
    starved = records[f"{EXPERTS}.gate_up_proj.3"]
    assert starved.tokens < 16
    assert f"the fewest {starved.tokens} " in str(seen[0].message)
    assert starved.fallback == (
        f"{starved.tokens} tokens reached the expert, fewer than 16: Gram matrix of all tokens of its mixture"
    )
    # from the raw inputs: each token counts as often as it is routed, here always twice
    problem = ss.LayerProblem(
        weight, 2 * inputs.double().T @ inputs.double(), ss.SparsityPattern.parse("0.5", 16)
    )
    mask = masks[starved.name]
    expected = problem.objective(mask) / float(problem.output_norms().sum())
    assert starved.objective == pytest.approx(expected, rel=1e-5)  # float32 products of 256 tokens
    assert bool(ss.certify(problem, mask).certified.all())
    down = records[f"{EXPERTS}.down_proj.3"]
    assert down.tokens == starved.tokens
    assert "shrunk" in down.fallback or "no token" in down.fallback


def test_the_threshold_is_an_option() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, records = run(starving(3), min_expert_tokens=0, unreached="magnitude")
    starved = records[f"{EXPERTS}.gate_up_proj.3"]
    assert starved.fallback == "" or "no token" in starved.fallback
    with pytest.warns(UserWarning, match="fewer calibration tokens than 1000"):
        _, records = run(tiny_models.build("mixtral"), min_expert_tokens=1000)
    assert all(("expert" in layer.name) == bool(layer.fallback) for layer in records.values())


def test_well_fed_experts_use_their_own_tokens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, records = run(tiny_models.build("mixtral"))
    assert not any(layer.fallback for layer in records.values())


def test_an_expert_that_no_token_reaches_is_left_dense() -> None:
    model = starving(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"\d of 24 layers are left dense \(no calibration token reaches "):
        _, records = run(model, min_expert_tokens=0)
    dense = {name: record for name, record in records.items() if record.left_dense}
    assert f"{EXPERTS}.gate_up_proj.3" in dense
    assert f"{EXPERTS}.down_proj.3" in dense
    reached = [name for name in records if name not in dense]
    for name, record in records.items():
        assert (record.tokens == 0) == (name in dense), name
    after = model.state_dict()
    for name in dense:
        parameter, _, expert = name.rpartition(".")
        assert torch.equal(after[parameter][int(expert)], before[parameter][int(expert)])
    for name in reached:
        parameter, _, expert = name.rpartition(".")
        value = after[parameter][int(expert)] if expert.isdigit() else after[f"{name}.weight"]
        assert int((value == 0).sum()) == value.numel() // 2, name
