"""Every family goes through prune, save, reload and verify, with the whole of the pipeline."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.calibration.activations import Stream, can_skip, experts_one_by_one
from sparseswaps.calibration.steps import steps_of
from sparseswaps.calibration.windows import Windows
from sparseswaps.masks.file import load_masks, verify_model
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import LoadedModel, load_model
from sparseswaps.pruning.run import prune
from sparseswaps.pruning.settings import Mode

# how many prunable layers each has: blocks x (attention + feed-forward), experts one by one
LAYERS = {
    "gpt2": 2 * 4,
    "opt": 2 * 6,
    "llama": 2 * 7,
    "llama-tied": 2 * 7,
    "qwen2": 2 * 7,
    "qwen3": 2 * 7,
    "gemma": 2 * 7,
    "phi": 2 * 6,
    "mixtral": 2 * (4 + 4 * 2),
    "bert": 2 * 6,
    "t5": 2 * (4 + 2) + 2 * (8 + 2),
}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, tiny_models.tokens(2000).numpy())
    return path


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("mode", [Mode.ONE_SHOT, Mode.SEQUENTIAL])
def test_prune_save_reload_verify(family: str, mode: Mode, tmp_path: Path, token_file: Path) -> None:
    source = tiny_models.save(family, tmp_path / "dense", torch.float16)
    report = prune(
        source,
        "2:4" if mode is Mode.ONE_SHOT else "0.5",
        calibration=token_file,
        evaluation=token_file,
        samples=8,
        length=32,
        mode=mode,
        objective=ss.Objective.parse(
            "drift=0.5,residual=0.5,metric" if mode is Mode.SEQUENTIAL else "metric"
        ),
        out=tmp_path / "pruned",
    )
    assert len(report.layers) == LAYERS[family]
    assert report.sparsity == 0.5
    assert (report.cosine is None) == (family not in ("bert", "t5"))
    assert (report.perplexity_pruned is None) == (family in ("bert", "t5"))
    assert all(layer.objective <= layer.objective_start for layer in report.layers)
    reloaded = load_model(tmp_path / "pruned", dtype="checkpoint")
    original = load_model(source, dtype="checkpoint")
    assert reloaded.model.dtype == torch.float16
    file = load_masks(tmp_path / "pruned")
    found = verify_model(reloaded.model, file, original.model)
    assert found.ok, found.problems
    assert found.layers == LAYERS[family]
    # everything that is not pruned is the dense model's, bit for bit
    dense_state, state = original.model.state_dict(), reloaded.model.state_dict()
    assert dense_state.keys() == state.keys()
    changed = {name for name in state if not torch.equal(state[name], dense_state[name])}
    blocks = find_blocks(reloaded.model)
    stored = {id(getattr(layer.module, layer.parameter)) for block in blocks for layer in block.layers}
    assert changed == {name for name, p in reloaded.model.named_parameters() if id(p) in stored}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_stream_sees_what_the_whole_model_computes(family: str) -> None:
    """Inputs gathered block by block equal the inputs of one undisturbed forward."""
    model = tiny_models.build(family)
    windows = torch.randint(4, tiny_models.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
    blocks = find_blocks(model)
    expected: dict[str, torch.Tensor] = {}
    handles = []
    for block in blocks:
        for layer in block.layers:
            if layer.expert is None:

                def hook(_module, args, name=layer.name):  # type: ignore[no-untyped-def]
                    expected[name] = args[0]

                handles.append(layer.module.register_forward_pre_hook(hook))
    with torch.no_grad(), experts_one_by_one(model):
        inputs = {"input_ids": windows}
        if family == "t5":
            inputs["decoder_input_ids"] = windows
        model(**inputs)
        for handle in handles:
            handle.remove()
        assert can_skip(model, blocks, windows)
        stream = Stream(model, blocks, windows, batch_size=4)
        reached = set()
        for block in blocks:
            for step in steps_of(stream):
                seen: dict[str, torch.Tensor] = {}

                def observer(layer, x, seen=seen):  # type: ignore[no-untyped-def]
                    seen[layer.name] = x.clone()

                stream.observe(0, [group[0] for group in step.inputs], observer)
                for group in step.inputs:
                    for layer in group:
                        reached.add(layer.name)
                        if layer.expert is None:
                            torch.testing.assert_close(
                                seen[group[0].name], expected[layer.name], rtol=0, atol=0
                            )
            stream.advance(0)
            stream.finish_block()
            assert {layer.name for layer in block.layers} <= reached


def test_layers_with_one_input_share_a_group() -> None:
    model = tiny_models.build("llama")
    windows = torch.randint(4, tiny_models.VOCABULARY, (2, 16))
    stream = Stream(model, find_blocks(model), windows, batch_size=2)
    kinds = [[layer.kind for layer in group] for step in steps_of(stream) for group in step.inputs]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_tied_weights_are_pruned_once() -> None:
    model = tiny_models.build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = [layer.name for block in find_blocks(model) for layer in block.layers]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names


def test_include_and_exclude() -> None:
    model = tiny_models.build("llama")
    names = [x.name for b in find_blocks(model, ["*mlp*"], ["*layers.1*"]) for x in b.layers]
    assert names == [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    with pytest.raises(ss.InvalidModelError, match="no layer to prune"):
        find_blocks(model, ["*nothing*"])


def test_routers_and_embeddings_stay_dense() -> None:
    names = [x.name for b in find_blocks(tiny_models.build("mixtral")) for x in b.layers]
    assert not any(
        "gate.weight" in name or name.endswith((".gate", "lm_head", "embed_tokens")) for name in names
    )


def test_shared_blocks_fall_back_to_whole_forwards(tmp_path: Path) -> None:
    """ALBERT runs one block several times: blocks cannot be skipped, everything but drift still works."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.AlbertConfig(
        vocab_size=tiny_models.VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = tf.AlbertModel(config).eval()
    windows = torch.randint(4, tiny_models.VOCABULARY, (4, 24))
    blocks = find_blocks(model)
    assert not can_skip(model, blocks, windows)
    from sparseswaps.pruning.pipeline import prune_layers

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    given = LoadedModel(copy.deepcopy(model), None, "albert", dtypes)
    text = Windows(windows, "random", len(windows))
    with pytest.warns(UserWarning, match="AlbertModel: drift and residual drift, the default, need blocks"):
        assert str(prune(given, "0.5", calibration=text, length=24).settings.objective) == "plain"
    with pytest.raises(ss.InvalidModelError, match="run without drift"):
        prune(given, "0.5", calibration=text, length=24, objective="drift=0.75")

    masks = prune_layers(model, blocks, ss.PruneSettings(objective="plain"), windows)
    assert len(masks) == sum(len(block.layers) for block in blocks) == 6
    for block in blocks:
        for layer in block.layers:
            assert bool((layer.weight[~masks[layer.name]] == 0).all())
    with pytest.raises(ss.InvalidModelError, match="drift"):
        prune_layers(model, blocks, ss.PruneSettings(objective="drift=0.5"), windows)


@pytest.mark.parametrize(("noise", "same"), [(1e-6, True), (0.05, False)])
def test_rounding_does_not_decide_what_blocks_depend_on(noise: float, same: bool) -> None:
    """The last block returns something slightly different at each call, as other threads would make it."""
    model = tiny_models.build("llama")
    blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + noise * output.abs().amax() * torch.randn(output.shape, generator=generator)

    handle = blocks[-1].module.register_forward_hook(disturb)
    assert can_skip(model, blocks, tiny_models.tokens(64).view(2, 32)) is same
    handle.remove()
