"""``prune --units experts=…``: mixtures with fewer experts, saved, verified, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import tiny_mixtures
import tiny_models
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import sparseswaps as ss
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.masks.units_file import load_units, verify_units
from sparseswaps.models.loading import load_model
from sparseswaps.records.run_database import RunDatabase

HALF = tiny_mixtures.EXPERTS // 2


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    for name in ("tokens", "more"):
        np.save(tmp_path / f"{name}.npy", rng.integers(3, 64, 600).astype(np.int64))
    shared = {"samples": 8, "length": 16, "evaluation_limit": 4, "multiple_of": 2}
    return {**shared, "calibration": tmp_path / "tokens.npy", "evaluation": tmp_path / "more.npy"}


def saved(family: str, folder: Path) -> Path:
    tiny_mixtures.build(family).to(torch.bfloat16).save_pretrained(folder)
    return folder


def experts_of(folder: Path) -> int:
    config = tf.AutoConfig.from_pretrained(folder)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(getattr(config, name) for name in names if getattr(config, name, None)))


class Ends:
    """Ends a run when its experts are chosen and it is about to go on."""

    def stage(self, text: str, done: int, total: int) -> None:
        if text == "pruned perplexity":
            raise KeyboardInterrupt

    def layer_started(self, name: str) -> None:
        pass

    def layer_finished(self, record: object, done: int, total: int) -> None:
        pass


@pytest.mark.parametrize("family", tiny_mixtures.FAMILIES)
def test_a_mixture_with_half_of_its_experts(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    dense, out = saved(family, tmp_path / "dense"), tmp_path / "out"
    report = ss.prune(dense, **options, units="experts=0.5", out=out)
    assert experts_of(out) == HALF
    assert [each.kind for each in report.consumers] == ["experts"] * len(report.consumers)
    assert report.consumers
    for each in report.consumers:
        assert each.kept == HALF
        assert each.gap is not None
        assert each.gap <= 1e-6  # proven, up to what branch and bound leaves open
        assert each.error <= each.error_start
    small = load_model(out, "cpu", "checkpoint")
    assert sum(p.numel() for p in small.model.parameters()) == report.parameters < report.parameters_dense
    found = verify_units(small, load_units(out), original=load_model(dense, "cpu", "checkpoint"))
    assert found.problems == ()
    assert (found.units, found.kept) == (2 * found.kept, HALF * len(report.consumers))


def test_the_command_says_what_it_does(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts, groups of heads and masks in one run."""
    dense, out = saved("mixtral", tmp_path / "dense"), tmp_path / "out"
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", value)
    ]  # fmt: skip
    asked = ["--units", "experts=0.5,kv-groups=1", "--pattern", "2:4", "--drift", "0.75"]
    assert command_line.run("prune", dense, *words, *asked, "--out", out, "--quiet") == 0
    said = capsys.readouterr()
    assert "units: 4 of 8 experts stay in 2 blocks" in said.err
    assert "units: 1 of 2 kv-groups stay in 2 blocks" in said.err
    assert "experts: chosen by branch-and-bound, drift 0.75, without residual drift" in said.err
    assert command_line.run("verify", out, "--original", dense) == 0
    assert "10 of 20 units of 4 layers stay" in capsys.readouterr().out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "4 of 8 experts stay in 2 blocks" in card
    config = tf.AutoConfig.from_pretrained(out)
    assert (config.num_local_experts, config.num_key_value_heads) == (HALF, 1)


def test_an_interrupted_run_goes_on_with_its_experts(options: dict[str, Any], tmp_path: Path) -> None:
    dense = saved("qwen3-moe", tmp_path / "dense")
    asked = {**options, "units": "experts=0.25"}
    whole = ss.prune(dense, **asked, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ss.prune(dense, **asked, out=tmp_path / "part", progress=Ends())
    with RunDatabase(tmp_path / "part" / RECORD_FILE) as record:
        assert len(record.consumers()) == 2
    again = ss.prune(dense, **asked, out=tmp_path / "part", resume=True)
    assert again.perplexity_pruned == pytest.approx(whole.perplexity_pruned, rel=1e-6)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_reap_and_no_update(options: dict[str, Any], tmp_path: Path) -> None:
    dense = saved("olmoe", tmp_path / "dense")
    asked = {**options, "units": "experts=0.5", "unit_update": "none"}
    best = ss.prune(dense, **asked)
    reap = ss.prune(dense, **asked, unit_solver="reap", out=tmp_path / "out")
    assert all(each.gap is None and not each.updated for each in reap.consumers)
    assert not any(each.updated for each in best.consumers)
    # nothing was changed but for what is missing
    file = load_units(tmp_path / "out")
    assert not any(tensor.updated for tensor in file.tensors.values())


def test_what_is_refused_before_work(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    plain = tiny_models.save("llama", tmp_path / "plain", torch.bfloat16)
    with pytest.raises(ss.InputError, match="units experts of LlamaForCausalLM: expected some in its blocks"):
        ss.prune(plain, **options, units="experts=0.5", out=out)
    dense = saved("mixtral", tmp_path / "dense")
    with pytest.raises(ss.InputError, match="expected to keep at least 2, for a token goes to 2 experts"):
        ss.prune(dense, **options, units="experts=7", out=out)
    with pytest.raises(ss.InputError, match="expected sequential mode, found one-shot"):
        ss.prune(dense, **options, units="experts=0.5", mode="one-shot", out=out)
    with pytest.raises(ss.InputError, match="expected a model in memory, found offloading"):
        ss.prune(dense, **options, units="experts=0.5", offload=True, out=out)
    assert not out.exists()
    ss.prune(dense, **options, units="experts=0.5", out=out)
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if "gate" in name)
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert command_line.run("verify", out, "--original", dense, "--json") == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("expected the values that were saved, found others" in each for each in problems)
