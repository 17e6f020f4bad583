"""A study knows models and texts by what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from sparseswaps.errors import InputError
from sparseswaps.records.study import UnitResult
from sparseswaps.study import StudyDatabase, parse_study, plan_units, run_study, runner
from sparseswaps.study.execute import execute

STUDY = {
    "name": "k",
    "problem": [
        {
            "model": "model", "calibration": "text.txt", "held_out": "other.txt", "samples": 2, "length": 32,
            "include": ["*.0.*q_proj"], "cols": [16], "rows": 2,
        }
    ],
    "model": [
        {"model": "model", "calibration": "text.txt", "evaluation": "other.txt", "samples": 2, "length": 32}
    ],
    "solver": [{"solver": "wanda"}],
}  # fmt: skip


def scaled(folder: Path, name: str) -> None:
    """Change one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.5 + 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_this_process(unit: str, study: str, spec: Any, cache: str, *_: object) -> UnitResult:
    return execute(unit, study, spec, Path(cache))


@pytest.mark.parametrize("changed", ["model", "text.txt", "other.txt"])
def test_a_study_of_changed_contents_has_new_units_and_extracts_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_unit", in_this_process)
    tiny_models.save("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_models.text(400))
    (tmp_path / "other.txt").write_text(tiny_models.text(2200, seed=1))
    study = parse_study(STUDY, tmp_path)
    before = {unit.unit for unit in plan_units(study)}
    assert before == {unit.unit for unit in plan_units(study)}
    run_study(study, tmp_path / "k.sqlite", jobs=1, backend="sequential")
    if changed == "model":
        scaled(tmp_path / "model", "model.embed_tokens.weight")
    else:
        (tmp_path / changed).write_text(tiny_models.text(2200, seed=2))
    assert not before & {unit.unit for unit in plan_units(study)}
    with pytest.warns(UserWarning, match="2 finished units are those of the study before"):
        run_study(study, tmp_path / "k.sqlite", jobs=1, backend="sequential")
    run_study(study, tmp_path / "fresh.sqlite", jobs=1, backend="sequential")
    found = {}
    for name in ("k", "fresh"):
        with StudyDatabase(tmp_path / f"{name}.sqlite") as record:
            rows = record.read()
        found[name] = {
            (unit.unit, unit.objective, unit.held_out) for unit in rows.units if unit.unit not in before
        } | {(run.unit, run.perplexity, run.error) for run in rows.models if run.unit not in before}
    assert found["k"] == found["fresh"]
    assert len(found["k"]) == 2
    assert all(isinstance(value, float) for row in found["k"] for value in row[1:])


def test_a_unit_planned_before_a_change_is_refused_after_it(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "other.txt").write_text("text")
    study = parse_study({**STUDY, "problem": []}, tmp_path)
    (unit,) = plan_units(study)
    scaled(tmp_path / "model", "model.norm.weight")
    with pytest.raises(InputError, match="model model: expected its contents of when the study was planned"):
        execute(unit.unit, "k", unit.spec, tmp_path)
