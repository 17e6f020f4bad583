"""Studies of smaller models: units swept like any option, sizes and speeds in the record and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import sparseswaps as ss
from sparseswaps.records.study_files import read_study_files, write_study_files
from sparseswaps.reports.study_data import pattern_name, pattern_order
from sparseswaps.reports.study_report import write_study_report
from sparseswaps.study import StudyDatabase, parse_study, plan_units, run_study

MODEL = {
    "model": "model",
    "calibration": "text.txt",
    "evaluation": "other.txt",
    "samples": 8,
    "length": 16,
    "multiple_of": 2,
    "objective": "default",
    "units": ["channels=0.25", "channels=0.5"],
}
STUDY: dict[str, Any] = {
    "name": "units",
    "patterns": ["none"],
    "solver": [{"solver": "wanda-sp", "label": "Wanda-sp"}, {"solver": "structured-obs", "label": "OBS"}],
    "model": [MODEL],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_models.save("llama", folder / "model")
    (folder / "text.txt").write_text(tiny_models.text(1500))
    (folder / "other.txt").write_text(tiny_models.text(600, seed=1))
    return folder


def test_what_is_planned(home: Path) -> None:
    model = {**MODEL, "unit_update": ["least-squares", "none"], "mode": ["sequential", "one-shot"]}
    units = plan_units(parse_study({**STUDY, "model": [model], "seeds": [0, 1]}, home))
    assert len(units) == len({unit.unit for unit in units}) == 2 * 2 * 2 * 2 * 2
    settings = [ss.PruneSettings.from_plain(unit.spec["settings"]) for unit in units]
    assert all(each.pattern is None for each in settings)
    assert {each.plain()["unit_solver"] for each in settings} == {"wanda-sp", "structured-obs"}
    both = [{"solver": "wanda"}]
    masks = plan_units(parse_study({**STUDY, "patterns": ["50%"], "solver": both}, home))
    assert {unit.spec["settings"]["solver"] for unit in masks} == {"wanda"}
    # any solver of masks chooses units too
    exact = plan_units(parse_study({**STUDY, "solver": [{"solver": "branch-and-bound"}]}, home))
    assert {unit.spec["settings"]["unit_solver"] for unit in exact} == {"branch-and-bound"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patterns": ["50%"]},
            "Wanda-sp: expected the pattern none where it chooses units, found 50%",
        ),
        (
            {"solver": [{"solver": "structured-obs", "start": "wanda"}]},
            "expected no start where it chooses units, found wanda",
        ),
        ({"solver": [{"solver": "wanda-sp:a=1"}]}, "options of solver wanda-sp: expected option=value"),
        ({"model": [{**MODEL, "units": "channels"}]}, "units channels: expected a share between 0 and 1"),
        ({"model": [{**MODEL, "speed": {"rounds": 1}}]}, "rounds of a measurement: expected at least 2"),
        ({"model": [{**MODEL, "speed": {"tokens": 1}}]}, "tokens"),
        ({"model": [{**MODEL, "speed": 3}]}, "speed: expected a table, found 3"),
        (
            {"model": [], "problem": [{"family": "correlated", "cols": 8}]},
            "expected patterns of its problems, found none",
        ),
        (
            {"model": [], "patterns": ["50%"], "problem": [{"family": "correlated", "cols": 8}]},
            "expected solvers of masks for its problems, found Wanda-sp",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, home: Path) -> None:
    with pytest.raises(ss.InputError, match=message):
        plan_units(parse_study({**STUDY, **changes}, home))


def test_sizes_and_speeds_reach_the_report(home: Path, tmp_path: Path) -> None:
    study = {**STUDY, "model": [{**MODEL, "speed": {"prompt": 16, "new": 2, "rounds": 2}}]}
    outcome = run_study(parse_study(study, home), tmp_path / "s.sqlite", jobs=1, backend="sequential")
    with StudyDatabase(tmp_path / "s.sqlite") as database:
        rows = database.read()
    assert outcome.failed == 0
    assert len(rows.models) == len(rows.sizes) == 4
    for record in rows.models:
        (size,) = (size for size in rows.sizes if size.unit == record.unit)
        share = 0.25 if record.option("units") == "channels=0.25" else 0.5
        # 3 matrices of 24 channels of 16 in 2 blocks
        assert size.parameters_dense - size.parameters == 2 * 3 * 16 * 24 * share
        assert record.pattern == record.option("units")
        assert record.group == "units"
        assert size.prefill is not None
        assert size.prefill_low is not None
        assert size.prefill_low <= size.prefill
        assert json.loads(size.workload)["prompt"] == 16
        assert record.label in ("Wanda-sp", "OBS")
    # the record's files hold them too; those of earlier studies have none
    write_study_files(tmp_path / "rows", rows)
    assert read_study_files(tmp_path / "rows") == rows
    with StudyDatabase(tmp_path / "other.sqlite") as other:
        assert other.take(rows) == 4
        assert other.read().sizes == rows.sizes
    (tmp_path / "rows" / "sizes.parquet").unlink()
    assert read_study_files(tmp_path / "rows") == replace(rows, sizes=())
    page = write_study_report(tmp_path / "report", rows)
    text = page.with_name("README.md").read_text()
    assert "Smaller models: quality against size and speed" in text
    assert "Quality against measured speed, model" in text
    assert (tmp_path / "report" / "tables" / "smaller-models.csv").exists()
    # without measured speed the same against the size
    sizes = tuple(replace(size, prefill=None, decode=None) for size in rows.sizes)
    page = write_study_report(tmp_path / "sizes", replace(rows, sizes=sizes))
    assert "Quality against size, model" in page.with_name("README.md").read_text()


def test_units_as_patterns() -> None:
    patterns = ["channels=0.5", "2:4", "50%", "0.25", "channels=0.5 50%"]
    assert sorted(patterns, key=pattern_order) == ["0.25", "50%", "2:4", "channels=0.5", "channels=0.5 50%"]
    assert pattern_name("channels=0.5 50%") == "channels=0.5 50%"
