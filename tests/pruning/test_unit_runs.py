"""``prune --units``: an ordinary smaller checkpoint, from the command line to ``verify``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import tiny_families
import tiny_models
import torch
import transformers as tf
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparseswaps as ss
from sparseswaps.masks.file import MASK_FILE
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.masks.units_file import UNITS_FILE, load_units, verify_units
from sparseswaps.models.loading import load_model
from sparseswaps.problems.files import as_metadata, from_metadata
from sparseswaps.pruning.settings import PruneSettings
from sparseswaps.records.run_database import RunDatabase

TINY = {"units": "channels=0.25", "multiple_of": 2, "samples": 8, "length": 16}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "dense", torch.bfloat16)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    for name, seed in (("tokens", 0), ("more", 5)):
        np.save(tmp_path / f"{name}.npy", tiny_models.tokens(400, seed).numpy())
    return {**TINY, "calibration": tmp_path / "tokens.npy", "evaluation": tmp_path / "more.npy"}


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What ``verify --json`` says."""
    capsys.readouterr()
    code = command_line.run("verify", folder, "--json", *words)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)
    return found


class Interrupting:
    """Ends a run after some blocks whose units were chosen, and some layers whose masks were."""

    def __init__(self, blocks: int, layers: int = 0) -> None:
        self.blocks, self.layers = blocks, layers

    def stage(self, text: str, done: int, total: int) -> None:
        if text == "units" and not self.layers and done == self.blocks:
            raise KeyboardInterrupt

    def layer_started(self, name: str) -> None:
        self.layers -= 1
        if self.layers == 0:
            raise KeyboardInterrupt

    def layer_finished(self, record: object, done: int, total: int) -> None:
        pass


def test_a_real_model_by_the_command_line(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On four times as many windows 16.1; Wanda-sp with least squares has 19.3 there, and 36.7 without."""
    model, texts, out = shared_data / "models" / "stories260K", shared_data / "texts", tmp_path / "out"
    words = ["--calibration", texts / "tinystories_calib.txt", "--samples", 24, "--length", 256]
    measured = ["--evaluation", texts / "tinystories_eval.txt", "--evaluation-limit", 16]
    asked = ["--units", "channels=0.5", "--multiple-of", 2, "--objective", "drift=0.5,residual=1"]
    code = command_line.run("prune", model, *asked, *words, *measured, "--out", out, "--json", "--quiet")
    assert code == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "units: 86 of 172 channels stay in 5 blocks" in said.err
    assert "177,472 parameters of 260,032 (31.7% fewer)" in said.err
    plain = tf.AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.intermediate_size == 86
    assert plain.num_parameters() == report["parameters"] == 177_472
    weights = (out / "model.safetensors").stat().st_size / 1e6
    assert weights == pytest.approx(report["megabytes"], rel=0.03)  # and a header
    assert report["perplexity_dense"] < 5 < report["perplexity_pruned"] < 19.3
    assert command_line.run("evaluate", out, *measured, "--length", 256, "--json", "--quiet") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["perplexity"] == pytest.approx(report["perplexity_pruned"], rel=1e-5)
    found = verify(out, capsys, "--original", model)
    assert found["units"] == {
        "consumers": 5, "units": 860, "kept": 430, "parameters": 177_472, "parameters_before": 260_032,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_interrupted_runs_resume_to_the_same_model(
    mode: str, blocks: int, dense: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**options, "units": "channels=0.25,kv-groups=1", "mode": mode}
    whole = ss.prune(dense, **options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ss.prune(dense, **options, out=tmp_path / "cut", progress=Interrupting(blocks))
    with RunDatabase(tmp_path / "cut" / RECORD_FILE) as record:
        before = record.consumers()
    assert len(before) == 2 * blocks
    assert not (tmp_path / "cut" / UNITS_FILE).exists()
    with pytest.raises(ss.InputError, match=r"found another units \(channels=0.5 instead of channels=0.25,"):
        ss.prune(dense, **{**options, "units": "channels=0.5"}, out=tmp_path / "cut", resume=True)
    resumed = ss.prune(dense, **options, out=tmp_path / "cut", resume=True)
    assert list(resumed.consumers[: 2 * blocks]) == before  # seconds and all: they were not made again
    assert resumed.perplexity_pruned == whole.perplexity_pruned
    for name in ("model.safetensors", UNITS_FILE):
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ss.InvalidFileError, match="found a finished pruned model"):
        ss.prune(dense, **options, out=tmp_path / "cut", resume=True)


def test_settings_repeat_a_run(dense: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """On the command line too, where units without a pattern mean no masks."""
    words = ["--calibration", options["calibration"], "--samples", 8, "--length", 16, "--quiet"]
    asked = ["--units", "channels=0.25", "--multiple-of", 2, "--unit-solver", "structured-obs"]
    assert command_line.run("prune", dense, *asked, *words, "--out", tmp_path / "one") == 0
    settings = PruneSettings.parse((tmp_path / "one" / "settings.toml").read_text())
    assert (settings.pattern, str(settings.units)) == (None, "channels=0.25")
    repeated = ["--settings", tmp_path / "one" / "settings.toml", "--quiet"]
    assert command_line.run("prune", dense, *repeated, "--out", tmp_path / "other") == 0
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "half.toml").write_text('pattern = "50%"\n')
    masks = ["--settings", tmp_path / "half.toml", "--solver", "wanda"]
    assert command_line.run("prune", dense, *masks, *asked, *words, "--out", tmp_path / "both") == 0
    assert (tmp_path / "both" / MASK_FILE).exists()


@pytest.mark.parametrize("layers", [1, 5])
def test_masks_of_the_smaller_model(
    layers: int, dense: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**options, "pattern": "0.5", "objective": "default,shrinkage=0.1"}
    with pytest.raises(KeyboardInterrupt):
        ss.prune(dense, **options, out=tmp_path / "both", progress=Interrupting(0, layers))
    report = ss.prune(dense, **options, out=tmp_path / "both", resume=True)
    assert len(report.layers) == 14
    assert {layer.pattern for layer in report.layers if layer.kind == "down_proj"} == {"9:18"}
    # 24 channels of 3 rows or columns of 16 became 18, in layers of 2304 + 1536 / 2 weights; half of the rest
    small, large = 2 * (3 * 18 * 16 + 768), 2 * (3 * 24 * 16 + 768)
    assert report.sparsity == pytest.approx(1 - small / 2 / large)
    found = verify(tmp_path / "both", capsys, "--original", dense)
    assert found["units"]["kept"] == 36
    assert found["pruned"] == small / 2
    units = ss.prune(dense, **{**options, "pattern": "none", "objective": "default"}, out=tmp_path / "units")
    assert units.parameters == report.parameters
    assert verify(tmp_path / "units", capsys, "--original", dense)["ok"]
    # the mask file is that of the smaller model, and goes onto it
    assert (
        command_line.run(
            "apply", tmp_path / "units", "--masks", tmp_path / "both", "--out", tmp_path / "applied"
        )
        == 0
    )
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("both", "applied"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    code = command_line.run("apply", dense, "--masks", tmp_path / "units", "--out", tmp_path / "no")
    assert code == 2
    assert "expected a mask file, found a smaller model without masks" in capsys.readouterr().err
    # one of the masked weights comes back: both files tell
    tensors = load_file(tmp_path / "both" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][tensors["model.layers.0.mlp.down_proj.weight"] == 0] = 1
    save_file(tensors, tmp_path / "both" / "model.safetensors", {"format": "pt"})
    assert "zeros where the mask prunes" in verify(tmp_path / "both", capsys)["problems"][0]


def test_what_was_changed_afterwards_is_told(
    dense: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ss.prune(dense, **options, out=out)
    assert not (out / MASK_FILE).exists()
    other = tiny_models.save("llama", tmp_path / "other", torch.bfloat16, seed=1)
    problems = verify(out, capsys, "--original", other)["problems"]
    assert "tensor model.layers.0.mlp.up_proj.weight: expected what stays of the original, found others" in (
        problems
    )
    for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
        shutil.copytree(out, tmp_path / name)
        tensors = load_file(out / "model.safetensors")
        tensors[f"model.layers.1.{name}.weight"][0, 0] += 1
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        assert verify(tmp_path / name, capsys)["problems"] == [
            f"tensor model.layers.1.{name}.weight: expected the values that were saved, found others"
        ]
    # another unit is said to stay than the one that stayed: the dense model tells
    with safe_open(out / UNITS_FILE, "pt") as file:
        header = from_metadata(file.metadata())
    bits = load_file(out / UNITS_FILE)
    for name in bits:
        if "layers.0.mlp" in name:
            bits[name] = bits[name].roll(1)
    save_file(bits, out / UNITS_FILE, as_metadata(header))
    problems = verify(out, capsys, "--original", dense)["problems"]
    assert [each.partition(":")[0] for each in problems] == [
        f"tensor model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")
    ]
    save_file(bits, out / UNITS_FILE, as_metadata({**header, "format": "another"}))
    with pytest.raises(ss.InvalidFileError, match="expected format sparseswaps-units-1, found another"):
        load_units(out)
    facts = json.loads(header["consumers"])
    facts["model.layers.0.mlp.down_proj"]["kept"] = "all"
    save_file(bits, out / UNITS_FILE, as_metadata({**header, "consumers": json.dumps(facts)}))
    with pytest.raises(ss.InvalidFileError, match=r"consumers model.layers.0.mlp.down_proj: expected kind, "):
        load_units(out)
    facts["model.layers.0.mlp.down_proj"]["kept"] = 17
    save_file(bits, out / UNITS_FILE, as_metadata({**header, "consumers": json.dumps(facts)}))
    assert verify(out, capsys)["problems"][0] == (
        "layer model.layers.0.mlp.down_proj: expected 17 of 24 channels that stay, found others"
    )


# Of each family: units that its configuration can hold, and what stays under which keys.
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("channels=16,kv-groups=1", {"intermediate_size": 32, "num_attention_heads": 2}),
    "qwen2": ("channels=16,kv-groups=1", {"intermediate_size": 32, "num_key_value_heads": 1}),
    "qwen3": ("channels=16,heads=1", {"intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}),
    "gemma2": ("channels=16,heads=1", {"intermediate_size": 32, "num_attention_heads": 2}),
    "gemma3_text": ("channels=16,kv-groups=1", {"intermediate_size": 32, "num_key_value_heads": 1}),
    "phi3": ("channels=16", {"intermediate_size": 32}),
    "gpt2": ("channels=32", {"n_inner": 96}),
    "opt": ("channels=16", {"ffn_dim": 32}),
    "gpt_neox": ("channels=16", {"intermediate_size": 32}),
    "bert": ("channels=16", {"intermediate_size": 32}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_families(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units, keys = FAMILIES[family]
    model: Any = tiny_families.build(family, tiny_families.families()[family])
    model.save_pretrained(tmp_path / "dense")
    first, last = tiny_families.FIRST_WORD, tiny_families.VOCABULARY
    tokens = torch.randint(first, last, (300,), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    report = ss.prune(
        tmp_path / "dense",
        units=units,
        multiple_of=1,
        calibration=tmp_path / "tokens.npy",
        evaluation=tmp_path / "tokens.npy",
        samples=8,
        length=16,
        out=tmp_path / "out",
    )
    small: Any = type(model).from_pretrained(tmp_path / "out")
    assert {key: getattr(small.config, key) for key in keys} == keys
    assert small.num_parameters() == report.parameters < report.parameters_dense == model.num_parameters()
    assert verify(tmp_path / "out", capsys, "--original", tmp_path / "dense")["ok"]
    assert all(each.updated and each.objective < each.objective_start for each in report.consumers)


def test_numbers_are_those_of_the_model_with_zero_columns(
    dense: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """An oracle: the dense model in plain transformers with the file's bits as zeros, without an update."""
    report = ss.prune(dense, **options, unit_update="none", unit_solver="wanda-sp", out=tmp_path / "out")
    assert not any(each.updated for each in report.consumers)
    file = load_units(tmp_path / "out")
    large = tf.AutoModelForCausalLM.from_pretrained(dense).float().eval()
    with torch.no_grad():
        for (name, axis), stays in file.stay.items():
            weight = large.get_parameter(name)
            assert len(stays) == weight.shape[axis]
            if name.endswith("down_proj.weight"):
                weight[:, ~stays] = 0
        small = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
        tokens = tiny_models.tokens(32)[None]
        expected, found = large(tokens).logits, small(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    again = load_model(tmp_path / "out", dtype="checkpoint")
    assert verify_units(again, file, original=load_model(dense, dtype="checkpoint")).ok


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"units": "rows=1"}, "units: expected channels=NUMBER, heads=NUMBER"),
        ({"units": None, "unit_ridge": 0.1}, "unit_ridge: expected units, whose option it is, found none"),
        ({"units": None, "multiple_of": 8}, "multiple_of: expected units"),
        ({"units": None, "pattern": "none"}, "pattern: expected masks or units to prune, found none"),
        (
            {"solver": "greedy"},
            "solver: expected a pattern beside the units, such as 0.5, as it is",
        ),
        ({"refine": 1}, "refine: expected a pattern"),
        ({"update": "reconstruction"}, "update: expected a pattern"),
        ({"allocation": "knapsack"}, "allocation: expected a pattern"),
        ({"objective": "metric"}, "objective: expected drift and residual drift alone"),
        ({"objective": "drift=auto"}, "expected a strength of the drift that is stated, found auto"),
        ({"objective": "drift=0.5", "mode": "one-shot"}, "expected sequential mode, found one-shot"),
        ({"offload": True}, "units make another model: expected a model in memory, found offloading"),
        ({"unit_update": "bias", "objective": "drift=0.5"}, "unit_update bias: expected no drift beside it"),
        ({"unit_ridge": 0.0}, "unit_ridge: expected a number above 0, found 0.0"),
        ({"unit_solver": "best"}, "unit_solver: unknown solver of units: expected one of drop-add-swap, "),
        ({"units": "channels=0.01"}, "expected some of 24 that stay in multiples of 2 and some that go"),
        ({"units": "heads=3"}, "expected some of 2 that stay and some that go, found -1"),
        ({"exclude": ["*.0.mlp.*"]}, r"layers\.0\.mlp.* is .*; units of .* stay: excluded"),
        (
            {"exclude": ["*mlp*"]},
            "units channels of LlamaForCausalLM: expected some in its blocks",
        ),
        ({"pattern": "4:8"}, r"layer model.layers.0.mlp.down_proj of the smaller model: pattern 4:8 needs"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    asked: dict[str, Any], message: str, dense: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    class Working:
        def stage(self, text: str, done: int, total: int) -> None:
            raise AssertionError(text)

        layer_started = layer_finished = stage

    with pytest.raises(ss.InputError, match=message):
        ss.prune(dense, **{**options, **asked}, out=tmp_path / "out", progress=Working())  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_family_that_cannot_be_saved(tmp_path: Path) -> None:
    """GPT-2's number of heads divides its hidden size, whatever a configuration says."""
    tiny_models.save("gpt2", tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(300).numpy())
    with pytest.raises(ss.InvalidModelError, match="a configuration that holds 2 instead of 4, found none"):
        ss.prune(
            tmp_path / "dense",
            units="heads=2",
            calibration=tmp_path / "tokens.npy",
            samples=8,
            length=16,
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_patterns_beside_units() -> None:
    """Half of the weights unless units are asked for; masks too where both are."""
    assert str(PruneSettings().pattern) == "0.5"
    alone = PruneSettings(units="channels=0.5")
    assert alone.pattern is None
    assert alone.plain()["pattern"] == "none"
    assert PruneSettings.parse(str(alone)) == alone
    assert str(PruneSettings("2:4", units="channels=0.5").pattern) == "2:4"
    with pytest.raises(ValueError, match="a run of units alone has no masks"):
        _ = alone.rule


def test_a_card_says_what_went_and_how_fast_the_rest_is(
    dense: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = ss.prune(dense, **options, out=out)
    card = out / "README.md"
    text = card.read_text()
    assert ModelCard.load(card).data.tags == ["sparseswaps", "pruned", "smaller"]
    assert "18 of 24 channels stay in 2 blocks: units `channels=0.25`, chosen by `drop-add-swap`" in text
    assert f"| parameters | {report.parameters_dense:,} | {report.parameters:,} |" in text
    assert "are zero" not in text
    assert "sparseswaps verify DIRECTORY   # every tensor, by units.safetensors" in text
    bench = ["bench", out, "--against", dense, "--prompt", 8, "--new", 2, "--rounds", 2, "--quiet"]
    assert command_line.run(*bench, "--card") == 0
    with_speed = card.read_text()
    assert re.search(
        r"\| prefill, tokens/s \| [\d.]+ \| [\d.]+ \| [\d.]+ \([\d.]+ to [\d.]+\) \|", with_speed
    )
    assert with_speed.count("## Measured speed") == 1
    before, after = with_speed.split("## Measured speed")
    assert before + "## Repeat" + after.split("## Repeat")[1] == text
    assert command_line.run(*bench, "--card") == 0  # again: in place of what it said
    assert card.read_text().split("## Measured speed")[0] == before
    assert card.read_text().split("## Repeat")[1] == text.split("## Repeat")[1]
    assert card.read_text().count("## Measured speed") == 1
    both = ss.prune(dense, **{**options, "pattern": "0.5", "solver": "wanda"}, out=tmp_path / "both")
    text = (tmp_path / "both" / "README.md").read_text()
    assert "Then 50.00% of the weights of 14 layers are zero: pattern `0.5`, solver `wanda`" in text
    assert f"| parameters | {both.parameters_dense:,} | {both.parameters:,} |" in text
    card.unlink()
    assert command_line.run(*bench, "--card") == 2


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_bias_absorbs_the_means(
    family: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FLAP; a Llama gets biases for it that its configuration knows, OPT has some."""
    dense = tiny_models.save(family, tmp_path / "dense", torch.bfloat16)
    flap = {**options, "unit_solver": "flap", "unit_update": "bias"}
    report = ss.prune(dense, **flap, out=tmp_path / "out")
    without = ss.prune(dense, **{**flap, "unit_update": "none"})
    # the first consumer has the same inputs and scores in both runs
    assert report.consumers[0].error < without.consumers[0].error
    with pytest.raises(KeyboardInterrupt):
        ss.prune(dense, **flap, out=tmp_path / "cut", progress=Interrupting(1))
    ss.prune(dense, **flap, out=tmp_path / "cut", resume=True)
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    small: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.num_parameters() == report.parameters
    assert report.parameters_dense == tf.AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    name = "model.layers.0.mlp.down_proj.bias" if family == "llama" else "model.decoder.layers.0.fc2.bias"
    assert bool(small.get_parameter(name).any())
    found = verify(tmp_path / "out", capsys, "--original", dense)
    assert found["ok"]
    words = ["evaluate", tmp_path / "out", "--evaluation", options["evaluation"], "--length", 16]
    assert command_line.run(*words, "--json", "--quiet") == 0
    again = json.loads(capsys.readouterr().out)["perplexity"]
    assert again == pytest.approx(report.perplexity_pruned, rel=1e-4)


def test_a_family_without_room_for_a_bias(options: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_models.save("qwen2", tmp_path / "dense")
    with pytest.raises(ss.InvalidModelError, match="with biases: expected a configuration that holds"):
        ss.prune(dense, **options, unit_update="bias", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
