"""Runs from model to verified model: interruption, resumption, bad input, full disks."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import sparseswaps as ss
from sparseswaps.masks.file import MASK_FILE, apply_masks, load_masks, verify_model
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.models.loading import load_model
from sparseswaps.pruning import run
from sparseswaps.pruning.run import prune
from sparseswaps.pruning.settings import Mode
from sparseswaps.records.run import LayerRecord
from sparseswaps.records.run_database import RunDatabase


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("dense"), torch.float16)


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "calibration.txt").write_text(tiny_models.text(3000))
    (tmp_path / "evaluation.txt").write_text(tiny_models.text(1000, seed=1))
    return {
        "calibration": tmp_path / "calibration.txt",
        "evaluation": tmp_path / "evaluation.txt",
        "samples": 16,
        "length": 32,
    }


class Interrupting:
    """Presses Ctrl-C after some layers."""

    def __init__(self, layers: int) -> None:
        self.left = layers

    def stage(self, text: str, done: int, total: int) -> None: ...

    def layer_started(self, name: str) -> None: ...

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_versions_that_cannot_be_told_end_a_run_before_its_work(
    dense: Path, arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> dict[str, str]:
        raise PackageNotFoundError("torch")

    monkeypatch.setattr(run, "versions", unknown)
    progress = Interrupting(1)
    with pytest.raises(PackageNotFoundError):
        prune(dense, "2:4", progress=progress, **arguments)
    assert progress.left == 1


@pytest.mark.parametrize(
    ("mode", "objective"),
    [
        (Mode.SEQUENTIAL, "plain"),
        (Mode.SEQUENTIAL, "drift=0.5,residual=0.5,metric"),
        (Mode.ONE_SHOT, "metric,shrinkage=0.1"),
    ],
)
@pytest.mark.parametrize(("after", "flow"), [(1, "group"), (4, "block"), (9, "block"), (14, "group")])
def test_interrupted_runs_resume_to_the_same_masks(
    dense: Path, arguments: dict, tmp_path: Path, mode: Mode, objective: str, after: int, flow: str
) -> None:
    arguments["flow"] = flow
    whole = prune(dense, **arguments, mode=mode, objective=objective, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune(
            dense,
            **arguments,
            mode=mode,
            objective=objective,
            out=tmp_path / "cut",
            progress=Interrupting(after),
        )
    assert not (tmp_path / "cut" / MASK_FILE).exists()
    resumed = prune(dense, **arguments, mode=mode, objective=objective, out=tmp_path / "cut", resume=True)
    a, b = load_masks(tmp_path / "whole"), load_masks(tmp_path / "cut")
    assert a.masks.keys() == b.masks.keys()
    assert all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)
    assert resumed.perplexity_pruned == whole.perplexity_pruned
    assert [x.objective for x in resumed.layers] == [x.objective for x in whole.layers]


@pytest.mark.parametrize(
    ("solver", "mode", "objective"),
    [
        (ss.OneSwap(), Mode.SEQUENTIAL, "drift=0.75,residual=0.5"),
        (ss.OneSwap(), Mode.ONE_SHOT, "plain"),
        (ss.Wanda(), Mode.SEQUENTIAL, "plain"),
        (ss.SparseGPT(), Mode.SEQUENTIAL, "plain"),
        (ss.DSnoT(), Mode.SEQUENTIAL, "plain"),
        (ss.Chain(ss.OneSwap(), ss.Reconstruction()), Mode.SEQUENTIAL, "plain"),
    ],
)
def test_the_default_objective(
    dense: Path, arguments: dict, tmp_path: Path, solver: ss.Solver, mode: Mode, objective: str
) -> None:
    """Both drifts for searches in sequential mode, and what a run that asks for the same gives."""
    found = prune(dense, **arguments, solver=solver, mode=mode, out=tmp_path / "default")
    assert str(found.settings.objective) == objective
    asked = prune(dense, **arguments, solver=solver, mode=mode, objective=objective)
    assert [layer.objective for layer in found.layers] == [layer.objective for layer in asked.layers]
    assert found.perplexity_pruned == asked.perplexity_pruned
    with RunDatabase(tmp_path / "default" / RECORD_FILE) as record:
        assert record.facts()["settings"]["objective"] == objective


def test_the_dense_perplexity_is_measured_once(
    dense: Path, arguments: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until weights, text or their file change."""
    measured: list[str] = []
    quality = run._quality

    def counted(inputs, which, context):  # type: ignore[no-untyped-def]
        measured.append(which)
        return quality(inputs, which, context)

    monkeypatch.setattr(run, "_quality", counted)
    monkeypatch.setenv("SPARSESWAPS_CACHE", str(tmp_path / "cache"))
    first = prune(dense, "0.5", **arguments)
    assert measured == ["dense", "pruned"]
    again = prune(dense, "2:4", **arguments, out=tmp_path / "pruned")
    assert measured == ["dense", "pruned", "pruned"]
    assert again.perplexity_dense == first.perplexity_dense
    with RunDatabase(tmp_path / "pruned" / RECORD_FILE) as record:
        assert record.facts()["dense_measured_before"] is True
    loaded = load_model(dense)
    with torch.no_grad():
        next(iter(loaded.model.parameters())).mul_(1.5)
    changed = prune(loaded, "0.5", **arguments)
    assert measured[3:] == ["dense", "pruned"]
    assert changed.perplexity_dense != first.perplexity_dense
    prune(dense, "0.5", **{**arguments, "evaluation": arguments["calibration"]})
    assert measured[5:] == ["dense", "pruned"]
    for file in (tmp_path / "cache" / "perplexity").iterdir():
        file.write_text("{")
    assert prune(dense, "0.5", **arguments).perplexity_dense == first.perplexity_dense
    assert measured[7:] == ["dense", "pruned"]


def test_resume_refuses_other_settings(dense: Path, arguments: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(dense, **arguments, out=out, progress=Interrupting(3))
    with pytest.raises(ss.InputError, match=r"found another pattern \(2:4 instead of 0.5\)"):
        prune(dense, "2:4", **arguments, out=out, resume=True)
    with pytest.raises(ss.InvalidFileError, match="unfinished run; add --resume"):
        prune(dense, **arguments, out=out)
    prune(dense, **arguments, out=out, resume=True)
    with pytest.raises(ss.InvalidFileError, match="found a finished pruned model"):
        prune(dense, **arguments, out=out, resume=True)


def test_the_record_holds_the_run(dense: Path, arguments: dict, tmp_path: Path) -> None:
    report = prune(dense, **arguments, out=tmp_path / "out")
    with RunDatabase(tmp_path / "out" / RECORD_FILE) as record:
        assert record.layers() == list(report.layers)
        facts = record.facts()
    assert facts["settings"]["calibration"] == report.calibration_hash
    assert facts["report"]["perplexity_pruned"] == report.perplexity_pruned
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["name"] == report.layers[0].name
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", MASK_FILE, RECORD_FILE, "tokenizer.json"} <= files
    assert not any(name.startswith((".partial", RECORD_FILE + "-")) for name in files)


class SlowGate(ss.Solver):
    """Wanda, half a second later where the layer is a gate."""

    name = "slow-gate"
    group = ss.Group.SCORE

    def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, budget: ss.Budget) -> ss.Outcome:
        time.sleep(0.5 * problem.name.endswith("gate_proj"))
        return ss.Wanda().run(problem, init, budget)


def test_layers_that_share_their_inputs_have_seconds_of_their_own(dense: Path, arguments: dict) -> None:
    layers = {layer.name: layer for layer in prune(dense, **arguments, solver=SlowGate()).layers}
    gate, up = layers["model.layers.0.mlp.gate_proj"], layers["model.layers.0.mlp.up_proj"]
    assert 0 < up.seconds < gate.seconds
    assert gate.seconds >= 0.5


def test_layer_errors_are_those_of_the_raw_activations(dense: Path, arguments: dict) -> None:
    """Recorded errors, recomputed from the dense model's own inputs."""
    report = prune(dense, **arguments, mode=Mode.ONE_SHOT)
    from sparseswaps.calibration.windows import calibration_windows

    loaded = load_model(dense)
    windows = calibration_windows(arguments["calibration"], loaded.tokenizer, 16, 32)
    pruned = load_model(dense)
    again = prune(pruned, **arguments, mode=Mode.ONE_SHOT)
    assert [x.error for x in again.layers] == [x.error for x in report.layers]
    modules, changed = dict(loaded.model.named_modules()), dict(pruned.model.named_modules())
    inputs: dict[str, torch.Tensor] = {}
    for layer in report.layers:
        modules[layer.name].register_forward_pre_hook(
            lambda _m, args, name=layer.name: inputs.__setitem__(name, args[0])
        )
    with torch.no_grad():
        loaded.model(windows.tokens)
    for layer in report.layers:
        x = inputs[layer.name].double().flatten(0, 1)
        weight = modules[layer.name].weight.detach().double()
        lost = x @ (weight - changed[layer.name].weight.detach().double()).T
        whole = x @ weight.T
        # float32 Gram of 512 tokens
        assert layer.error == pytest.approx(float((lost**2).sum() / (whole**2).sum()), rel=1e-5)


def break_weight(folder: Path, value: float) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_bad_input_leaves_nothing_behind(dense: Path, arguments: dict, tmp_path: Path) -> None:
    broken = shutil.copytree(dense, tmp_path / "broken")
    break_weight(broken, float("nan"))
    exploding = shutil.copytree(dense, tmp_path / "exploding")
    state = load_file(exploding / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"]
    state["model.layers.0.input_layernorm.weight"][:] = float("inf")
    save_file(state, exploding / "model.safetensors", {"format": "pt"})
    torn = shutil.copytree(dense, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:1000])
    no_config = shutil.copytree(dense, tmp_path / "no-config")
    (no_config / "config.json").unlink()
    short = tmp_path / "short.txt"
    short.write_text("w4 w5")
    cases: list[tuple[object, dict, str]] = [
        (tmp_path / "absent", {}, "expected an existing directory or a hub name"),
        (no_config, {}, "expected a directory with config.json"),
        (torn, {}, "expected a transformers checkpoint"),
        (broken, {}, r"weight of layer model.layers.1.mlp.up_proj: expected finite values, found 1"),
        (exploding, {}, r"inputs of layer model.layers.0.self_attn.q_proj: .*no NaN or Inf"),
        (dense, {"calibration": short}, "at least one window of 32 tokens, found 2"),
        (dense, {"evaluation": short}, "at least one window of 32 tokens, found 2"),
        (dense, {"pattern": "1.5"}, r"^pattern: .*0 < sparsity < 1, found 1.5"),
        (dense, {"pattern": "2:5"}, "expected a multiple of 5 columns, found 16"),
        (dense, {"length": 4096}, "expected at most 64 tokens"),
        (dense, {"objective": "drift=1.5"}, "expected 0 to 1, found 1.5"),
        (dense, {"objective": "speed=1"}, "expected plain, default, or parts among metric"),
        (dense, {"objective": "drift=0.5", "mode": Mode.ONE_SHOT}, "expected sequential mode"),
        (dense, {"include": ["*none*"]}, "no layer to prune"),
        (dense, {"device": "cuda:99"}, "expected a CUDA device"),
    ]
    for model, changes, message in cases:
        out = tmp_path / "out"
        with pytest.raises(ss.InputError, match=message):
            prune(model, **{"out": out, **arguments, **changes})
        assert not out.exists(), message


def test_other_files_in_the_output_are_left_alone(dense: Path, arguments: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ss.InvalidFileError, match="found other files"):
        prune(dense, **arguments, out=out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_masks_of_another_model_are_refused(dense: Path, arguments: dict, tmp_path: Path) -> None:
    prune(dense, **arguments, out=tmp_path / "out")
    file = load_masks(tmp_path / "out")
    other = load_model(
        tiny_models.save("llama", tmp_path / "other", torch.float16, seed=9), dtype="checkpoint"
    )
    with pytest.raises(ss.InvalidFileError, match=r"layer model.layers.0.self_attn.q_proj: .*found others"):
        apply_masks(other.model, file)
    family = load_model(tiny_models.save("gpt2", tmp_path / "gpt2"), dtype="checkpoint")
    with pytest.raises(ss.InvalidFileError, match="found none of that name"):
        apply_masks(family.model, file)
    # but re-imposing them on changed weights is possible when it is asked for
    facts = apply_masks(other.model, file, same_weights=False)
    assert all(facts[name].dense_hash != file.layers[name].dense_hash for name in facts)
    same = load_model(dense, dtype="checkpoint")
    apply_masks(same.model, file)
    assert verify_model(same.model, file).ok
    (tmp_path / "garbage").write_bytes(b"x" * 100)
    with pytest.raises(ss.InvalidFileError, match="expected safetensors"):
        load_masks(tmp_path / "garbage")


def test_verification_finds_every_kind_of_damage(dense: Path, arguments: dict, tmp_path: Path) -> None:
    prune(dense, **arguments, out=tmp_path / "out")
    file = load_masks(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj"
    mask = file.masks[name]

    def damaged(change) -> tuple[str, ...]:  # type: ignore[no-untyped-def]
        model = load_model(tmp_path / "out", dtype="checkpoint").model
        with torch.no_grad():
            change(model.get_submodule(name).weight)
        return verify_model(model, file).problems

    pruned, kept = torch.nonzero(~mask)[0].tolist(), torch.nonzero(mask)[0].tolist()
    assert damaged(lambda w: None) == ()
    assert "found 1 other values" in damaged(lambda w: w.__setitem__(tuple(pruned), 1e-7))[0]
    assert "found others" in damaged(lambda w: w.__setitem__(tuple(kept), w[tuple(kept)] * 1.001))[0]
    flipped = dict(file.masks)
    flipped[name] = mask.clone()
    flipped[name][tuple(pruned)] = True
    wrong = type(file)(flipped, file.layers, file.model)
    assert (
        "expected the pattern"
        in verify_model(load_model(tmp_path / "out", dtype="checkpoint").model, wrong).problems[0]
    )


def test_a_record_that_is_no_record(dense: Path, arguments: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / RECORD_FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(ss.InvalidFileError, match="expected that of a run, found file is not a database"):
        prune(dense, **arguments, out=out, resume=True)
    (out / RECORD_FILE).unlink()
    with sqlite3.connect(out / RECORD_FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ss.InvalidFileError, match="expected schema version 5, found 99; a run that another"):
        prune(dense, **arguments, out=out, resume=True)


def test_a_layer_budget_goes_all_the_way(dense: Path, arguments: dict, tmp_path: Path) -> None:
    """Equal sparsity per layer: pruned, saved, verified; never worse than equal sparsity per row allows."""
    report = prune(dense, "layer:0.5", **arguments, mode=Mode.ONE_SHOT, out=tmp_path / "out")
    assert report.sparsity == 0.5
    file = load_masks(tmp_path / "out")
    assert verify_model(load_model(tmp_path / "out", dtype="checkpoint").model, file).ok
    kept = torch.cat([mask.sum(1).float() / mask.shape[1] for mask in file.masks.values()])
    assert float(kept.std()) > 0
