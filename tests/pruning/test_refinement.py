"""Refinement: the loss never rises, the quadratic model is the loss's own, a killed run resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf

import sparseswaps as ss
from sparseswaps.calibration.activations import Stream
from sparseswaps.calibration.dense_outputs import DenseOutputs
from sparseswaps.calibration.gradients import gradient_moments
from sparseswaps.masks.file import apply_masks, load_masks, verify_model
from sparseswaps.masks.saving import RECORD_FILE
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.pruning.pipeline import prune_layers
from sparseswaps.pruning.refinement import refine_masks
from sparseswaps.pruning.run import prune
from sparseswaps.records.run_database import RunDatabase


def pruned(family: str, pattern: str, record: RunDatabase | None = None):
    """A model with 1-swap masks, and what its refinement needs."""
    model = tiny_models.build(family)
    blocks = find_blocks(model)
    windows = tiny_models.tokens(8 * 32).view(8, 32)
    outputs = DenseOutputs(model, windows, 4)
    dense = {layer.name: layer.weight.clone() for block in blocks for layer in block.layers}
    context = ss.RunContext(record or RunDatabase(None))
    masks = prune_layers(
        model, blocks, ss.PruneSettings(pattern, objective="plain"), windows, context=context
    )
    patterns = {name: ss.parse_pattern(pattern, weight.shape[1]) for name, weight in dense.items()}
    return model, blocks, patterns, windows, outputs, dense, masks


def divergence(model, dense_model, windows: torch.Tensor) -> float:
    """Mean loss over tokens, by torch's own functions."""
    with torch.no_grad():
        if hasattr(model(input_ids=windows[:1]), "logits"):
            a, b = (m(input_ids=windows).logits.log_softmax(-1) for m in (dense_model, model))
            return float(torch.nn.functional.kl_div(b, a, reduction="sum", log_target=True)) / windows.numel()
        a, b = (m(input_ids=windows).last_hidden_state for m in (dense_model, model))
        # ½‖z - ẑ‖² of unit vectors is one minus their cosine
        return float((1 - torch.cosine_similarity(a, b, dim=2)).sum()) / windows.numel()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert", "phi", "mixtral"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_the_loss_falls_and_the_pattern_holds(family: str, pattern: str) -> None:
    model, blocks, patterns, windows, outputs, dense, masks = pruned(family, pattern)
    reference = tiny_models.build(family)
    before = divergence(model, reference, windows)
    refined, found = refine_masks(model, blocks, patterns, windows, outputs, dense, masks, passes=2)
    after = divergence(model, reference, windows)
    assert found.loss_start == pytest.approx(before, rel=1e-3, abs=1e-6)
    assert found.loss == pytest.approx(after, rel=1e-3, abs=1e-6)
    assert after < before
    assert found.swaps > 0
    accepted = [step for step in found.steps if step.accepted]
    assert all(step.loss_after < step.loss_before for step in accepted)
    for block in blocks:
        for layer in block.layers:
            mask = refined[layer.name]
            parsed = ss.parse_pattern(pattern, mask.shape[1])
            assert parsed.allows(mask), layer.name
            assert torch.equal(layer.weight, dense[layer.name] * mask), layer.name


@pytest.mark.parametrize("updated", [False, True], ids=["masks", "weights"])
def test_a_step_minimises_the_loss_to_first_order(updated: bool) -> None:
    """Near the present weights the layer problem falls as fast as the loss does."""
    from sparseswaps.progress import Silent
    from sparseswaps.pruning.refinement import _Refiner

    model, blocks, patterns, windows, outputs, dense, masks = pruned("llama", "0.5")
    moments = gradient_moments(model, blocks, windows, 4)
    job = _Refiner(
        model,
        blocks,
        patterns,
        windows,
        outputs,
        dense,
        masks,
        ss.RowSweeps(),
        None,
        RunDatabase(None),
        Silent(),
    )
    layer = blocks[1].layers[4]
    if updated:
        layer.write(layer.weight * 1.2)
    gradients, sums = job._gradients([layer], Stream(model, blocks, windows, outputs.batch_size))
    mask = masks[layer.name]
    strength = 2.0
    problem = job._problem(
        layer, layer.weight.clone(), sums[layer.name], gradients[layer.name], moments[layer.name], strength
    )
    generator = torch.Generator().manual_seed(0)
    step = 1e-3 * torch.randn(layer.weight.shape, generator=generator) * mask
    kept = layer.weight.clone()
    losses = []
    for sign in (1, -1):
        layer.write(kept + sign * step)
        losses.append(outputs.total(model))
    layer.write(kept)
    slope = (losses[0] - losses[1]) / 2
    size = float(moments[layer.name].diagonal().mean()) * 1.1
    unit = strength * size / (2 * sums[layer.name].tokens)
    model_slope = (problem.objective(mask, kept + step) - problem.objective(mask, kept - step)) / 2 * unit
    # differences of a float32 loss: three digits are what a step of 1e-3 leaves
    assert model_slope == pytest.approx(slope, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "stages"),
    [({"refine": 2}, 5), ({"refine": 1, "update": ss.Reconstruction()}, 11)],
    ids=["masks", "weights"],
)
def test_finished_steps_are_not_repeated(options: dict, stages: int, tmp_path: Path) -> None:
    class Stop:
        """Presses Ctrl-C after some stages."""

        left = stages

        def stage(self, text: str, done: int, total: int) -> None:
            self.left -= text == "refinement"
            if self.left == 0:
                raise KeyboardInterrupt

        def layer_started(self, name: str) -> None: ...

        def layer_finished(self, record: object, done: int, total: int) -> None: ...

    source = tiny_models.save("llama", tmp_path / "dense", torch.float16)
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    arguments = {"calibration": tmp_path / "text.txt", "samples": 8, "length": 32, **options}
    whole = prune(source, **arguments, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune(source, **arguments, out=tmp_path / "cut", progress=Stop())
    resumed = prune(source, **arguments, out=tmp_path / "cut", resume=True)
    expected, found = load_masks(tmp_path / "whole"), load_masks(tmp_path / "cut")
    assert all(torch.equal(expected.masks[name], found.masks[name]) for name in expected.masks)
    assert resumed.loss == pytest.approx(whole.loss, rel=1e-6)
    assert resumed.loss < resumed.loss_start
    cut, uncut = (load_model(tmp_path / name, "cpu", "checkpoint").model for name in ("cut", "whole"))
    assert verify_model(cut, found).ok
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), uncut.parameters(), strict=True))


def test_what_cannot_be_refined(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.text(1000))
    with pytest.raises(ss.InputError, match="expected a pattern of rows or blocks"):
        prune(source, "layer:0.5", calibration=tmp_path / "text.txt", samples=4, length=32, refine=1)
    with pytest.raises(ss.InputError, match="refine: expected at least 0, found -1"):
        prune(source, calibration=tmp_path / "text.txt", samples=4, length=32, refine=-1)


def test_kept_weights_updated_after_refinement(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense", torch.float16)
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    arguments = {"calibration": tmp_path / "text.txt", "samples": 8, "length": 32, "refine": 1}
    alone = prune(source, **arguments, out=tmp_path / "masks")
    both = prune(source, **arguments, update=ss.Reconstruction(), out=tmp_path / "both")
    assert alone.loss is not None
    assert both.loss is not None
    assert both.loss < alone.loss  # the same masks, and weights that fit them
    assert both.refinement_swaps == alone.refinement_swaps
    expected, found = load_masks(tmp_path / "masks"), load_masks(tmp_path / "both")
    assert all(torch.equal(expected.masks[name], found.masks[name]) for name in expected.masks)
    assert all(facts.updated for facts in found.layers.values())
    saved = load_model(tmp_path / "both", "cpu", "checkpoint").model
    assert verify_model(saved, found).ok
    dense = load_model(source, "cpu", "checkpoint").model
    with pytest.raises(ss.InvalidFileError, match="whose kept weights were updated"):
        apply_masks(dense, found)
    layer = find_blocks(saved)[0].layers[0]
    layer.write(layer.weight * 1.5)
    assert not verify_model(saved, found).ok
    with pytest.raises(ss.InputError, match="expected a solver that changes kept weights"):
        prune(source, **arguments, update=ss.OneSwap())


def test_updated_weights_survive_an_interruption(tmp_path: Path) -> None:
    class Stop:
        """Presses Ctrl-C after some layers."""

        left = 20

        def stage(self, text: str, done: int, total: int) -> None: ...

        def layer_started(self, name: str) -> None: ...

        def layer_finished(self, record: object, done: int, total: int) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    source = tiny_models.save("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    arguments = {"calibration": tmp_path / "text.txt", "samples": 8, "length": 32}
    for name, options in (
        ("after", {"update": ss.Reconstruction()}),
        ("within", {"solver": ss.Chain(ss.OneSwap(), ss.Reconstruction())}),
    ):
        stop = Stop()
        stop.left = 20 if name == "after" else 5
        prune(source, **arguments, **options, out=tmp_path / name / "whole")
        with pytest.raises(KeyboardInterrupt):
            prune(source, **arguments, **options, out=tmp_path / name / "cut", progress=stop)
        prune(source, **arguments, **options, out=tmp_path / name / "cut", resume=True)
        models = [load_model(tmp_path / name / kind, "cpu", "checkpoint").model for kind in ("whole", "cut")]
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"update": "admm"}, {"pattern": "2:4", "solver": "wanda"}])
def test_recorded_errors_are_those_of_the_refined_model(options: dict[str, str], tmp_path: Path) -> None:
    dense_folder = tiny_models.save("llama", tmp_path / "dense")
    tokens, held_out = tiny_models.tokens(256).view(8, 32), tiny_models.tokens(128, seed=1).view(4, 32)
    for name, windows in (("calibration", tokens), ("evaluation", held_out)):
        np.save(tmp_path / f"{name}.npy", windows.numpy())
    texts = {name: tmp_path / f"{name}.npy" for name in ("calibration", "evaluation")}
    common = {**texts, "samples": 8, "length": 32, **options}
    report = prune(dense_folder, out=tmp_path / "out", refine=2, **common)
    unrefined = {layer.name: layer for layer in prune(dense_folder, **common).layers}
    assert report.refinement_swaps > 0
    added = sum(layer.swaps - unrefined[layer.name].swaps for layer in report.layers)
    if "update" not in options:
        assert added == report.refinement_swaps
    models = [
        tf.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense_folder, tmp_path / "out")
    ]
    dense, pruned = (dict(model.named_modules()) for model in models)
    for layer in report.layers:
        for windows, recorded in ((tokens, layer.error), (held_out, layer.held_out_error)):
            seen: list[torch.Tensor] = []
            hook = pruned[layer.name].register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].double().flatten(0, 1))
            )
            with torch.no_grad():
                models[1](windows)
            hook.remove()
            weight, kept = (each[layer.name].weight.detach().double() for each in (dense, pruned))
            expected = ((seen[0] @ (weight - kept).T) ** 2).sum() / ((seen[0] @ weight.T) ** 2).sum()
            # activations in single precision, computed in other batches
            assert recorded == pytest.approx(float(expected), rel=1e-4)
        assert layer.objective == layer.error
    with RunDatabase(tmp_path / "out" / RECORD_FILE) as record:
        assert {each.name: each for each in record.layers()} == {each.name: each for each in report.layers}
