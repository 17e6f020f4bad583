"""The published studies: their rows are here, and their reports are those that the rows give."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import matplotlib
import pytest

from sparseswaps.reports import Figure
from sparseswaps.study import build_report, load_study
from sparseswaps.study.export import read_rows

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

REPORTS = Path(__file__).parents[2] / "reports"
PUBLISHED = REPORTS / "published"
STUDIES = sorted(path.stem for path in (REPORTS / "studies").glob("*.toml"))
# whose figures are drawn here: its numbers come from sums and quotients alone, the same on every processor
DRAWN = "at-scale"
# PNG and pages are made by who wants them
KEPT = (".csv", ".tex", ".svg", ".md")


def kept(report: Path) -> set[Path]:
    """What is made from the rows and kept."""
    files = (*report.glob("*.md"), *report.glob("tables/*"), *report.glob("figures/*"))
    return {path.relative_to(report) for path in files if path.suffix in KEPT}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of all rows, without pictures but one study's."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "to_png", lambda _: b"")
        build_report(PUBLISHED / DRAWN / "rows", folder / DRAWN)
        patch.setattr(Figure, "to_svg", lambda _: "<svg></svg>")
        for study in STUDIES:
            if study != DRAWN:
                build_report(PUBLISHED / study / "rows", folder / study)
    return folder


@pytest.mark.parametrize("study", STUDIES)
def test_rows_are_of_every_unit_of_the_study(study: str) -> None:
    rows = read_rows(PUBLISHED / study / "rows")
    (facts,) = rows.studies
    planned = load_study(REPORTS / "studies" / f"{study}.toml")
    assert (facts["name"], facts["title"]) == (planned.name, planned.title)
    assert facts["description"] == planned.description
    units = [*rows.units, *rows.models]
    assert len(units) == len({unit.unit for unit in units}) == facts["units"]
    assert {unit.study for unit in units} == {study}
    assert {unit.label for unit in units} == {choice.label for choice in planned.solvers}
    assert not any(unit.failure for unit in units)
    known = {unit.unit for unit in units}
    assert {row.unit for row in rows.rows} == {unit.unit for unit in rows.units}
    assert {row.unit for row in (*rows.traces, *rows.layers, *rows.bounds)} <= known


def same(found: str, expected: str) -> bool:
    try:
        # sums in another order on another processor
        return float(found) == pytest.approx(float(expected), rel=1e-9, abs=1e-12, nan_ok=True)
    except ValueError:
        return found == expected


@pytest.mark.parametrize("study", STUDIES)
def test_tables_and_figures_are_those_of_the_rows(study: str, reports: Path) -> None:
    assert kept(reports / study) == kept(PUBLISHED / study)
    for name in sorted(kept(reports / study)):
        if name.suffix != ".csv":
            continue
        with (reports / study / name).open(encoding="utf-8") as file:
            found = list(csv.reader(file))
        with (PUBLISHED / study / name).open(encoding="utf-8") as file:
            expected = list(csv.reader(file))
        assert [len(row) for row in found] == [len(row) for row in expected], name
        for row, wanted in zip(found, expected, strict=True):
            assert all(map(same, row, wanted)), (name, row, wanted)


def test_a_report_is_byte_for_byte_the_published_one(reports: Path) -> None:
    # another version of matplotlib draws the same data with other bytes
    drawn_alike = matplotlib.__version__ == (PUBLISHED / "matplotlib.txt").read_text().strip()
    names = [name for name in sorted(kept(PUBLISHED / DRAWN)) if drawn_alike or name.suffix != ".svg"]
    assert len(names) > 20
    for name in names:
        assert (reports / DRAWN / name).read_bytes() == (PUBLISHED / DRAWN / name).read_bytes(), name


@pytest.mark.parametrize("study", STUDIES)
def test_the_twin_links_what_is_kept(study: str) -> None:
    text = (PUBLISHED / study / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"\]\(((?:tables|figures)/[^)]+)\)", text))
    assert targets == {name.as_posix() for name in kept(PUBLISHED / study)} - {"README.md"}
