"""Speed of models: what is measured, how ratios are made, what is refused. No test judges a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import command_line
import pytest
import tiny_families
import tiny_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparseswaps.errors import InputError
from sparseswaps.evaluation.speed import Workload, bench, ratio_of

SMALL = Workload(prompt=12, new=3, batch=2, rounds=2, threads=1)


def smaller(folder: Path) -> Path:
    """The tiny LLaMA with half of its channels."""
    config = tiny_models.build("llama").config
    config.intermediate_size //= 2
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.half().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_is_measured(family: str, tmp_path: Path) -> None:
    folder = tiny_models.save(family, tmp_path / family, torch.float16)
    report = bench(folder, workload=SMALL, device="cpu")
    (speed,) = report.speeds
    assert len(speed.prefill) == SMALL.rounds
    assert len(speed.decode) == (0 if family in ("bert", "t5") else SMALL.rounds)
    assert all(math.isfinite(rate) and rate > 0 for rate in (*speed.prefill, *speed.decode))
    held = {id(p): p.numel() for p in tiny_models.build(family).parameters()}
    assert speed.parameters == sum(held.values())
    assert speed.weights_mb == pytest.approx(4 * speed.parameters / 1e6)  # float32 on a processor
    assert speed.files_mb is not None
    assert report.prefill_ratio is None
    assert report.decode_ratio is None


def test_two_models_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense", torch.float16)
    small = smaller(tmp_path / "small")
    asked = [small, "--against", dense, "--prompt", 12, "--new", 3, "--rounds", 3, "--device", "cpu"]
    threads = torch.get_num_threads()
    assert command_line.run("bench", *asked, "--json", "--threads", 2) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out)
    one, other = found["speeds"]
    assert found["threads"] == 2
    assert one["parameters"] < other["parameters"]
    assert one["files_mb"] < other["files_mb"]
    for what in ("prefill", "decode"):
        ratio = found[f"{what}_ratio"]
        logs = [math.log(a / b) for a, b in zip(one[what], other[what], strict=True)]
        assert ratio["value"] == pytest.approx(math.exp(sum(logs) / 3))
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert command_line.run("bench", *asked) == 0
    shown = capsys.readouterr().out
    assert "ratio" in shown
    assert f"{one['parameters']:,}" in shown


@given(
    rounds=st.lists(
        st.tuples(st.floats(1.0, 1e6), st.floats(1.0, 1e6)), min_size=2, max_size=9, unique_by=lambda x: x[0]
    )
)
def test_ratios_are_those_of_a_paired_test(rounds: list[tuple[float, float]]) -> None:
    ours, others = zip(*rounds, strict=True)
    found = ratio_of(ours, others)
    logs = [math.log(a) - math.log(b) for a, b in rounds]
    spread = float(stats.sem(logs))
    if spread < 1e-9:  # all rounds agree: no interval to speak of
        assert found.low == pytest.approx(found.high)
        return
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=sum(logs) / len(logs), scale=spread)
    assert math.log(found.low) == pytest.approx(float(low), abs=1e-6)
    assert math.log(found.high) == pytest.approx(float(high), abs=1e-6)


def test_what_is_refused(tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense", torch.float16)
    with pytest.raises(InputError, match="expected at most 64 tokens, as its positions allow, found 70"):
        bench(dense, workload=Workload(prompt=60, new=10), device="cpu")
    with pytest.raises(InputError, match="rounds of a measurement: expected at least 2, found 1"):
        Workload(rounds=1)
    images = tmp_path / "vit"
    tiny_families.build("vit", "ViTModel").save_pretrained(images)
    with pytest.raises(InputError, match="expected one that takes tokens"):
        bench(images, workload=SMALL, device="cpu")


def test_a_real_model(smollm2: Path) -> None:
    report = bench(smollm2, workload=Workload(prompt=32, new=2, rounds=2), device="cpu", dtype="bfloat16")
    (speed,) = report.speeds
    assert speed.parameters == 134_515_008  # its model card: 135 M, the head tied
    assert speed.weights_mb == pytest.approx(269.03, abs=0.01)
    assert len(speed.decode) == 2
