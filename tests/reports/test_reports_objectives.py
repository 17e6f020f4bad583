"""The section on objectives, from hand-made runs whose intervals can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from study_rows import model_runs, with_options

from sparseswaps.reports.sections.factors import FACTORS, factor_figure
from sparseswaps.reports.sections.objectives import interval, method_name, objective_sections

# perplexity of three calibration seeds by (objective, refinement, update)
QUALITY = {
    ("plain", 0, ""): (10.0, 12.0, 11.0),
    ("drift=0.75", 0, ""): (9.0, 10.8, 9.9),
    ("metric", 1, ""): (5.0, 12.6, 9.0),
    ("plain", 0, "reconstruction"): (8.0, 8.0, 8.0),
}


def runs():
    model = next(record for record in model_runs()[0] if record.perplexity is not None)
    found = []
    for (objective, refine, update), values in QUALITY.items():
        for seed, perplexity in enumerate(values):
            run = replace(
                model, unit=f"{objective}-{refine}-{update}-{seed}", label="1-swap", seed=seed,
                perplexity=perplexity, group="weight update" if update else "local search", error=0.1,
                seconds=5.0,
            )  # fmt: skip
            options = {"mode": "sequential", "objective": objective, "refine": refine, "update": update}
            changed = [name for name in ("refine", "update") if options[name]]
            found.append(with_options(run, changed, seed=seed, **options))
    return found


def rows_of(section):
    table = section.items[0]
    titles = [column.title for column in table.columns]
    return [dict(zip(titles, row, strict=True)) | {"low": row[8], "high": row[9]} for row in table.rows]


def test_interval_is_student_s():
    mean, low, high = interval([10.0, 12.0, 11.0])
    # t(0.975, 2) = 4.302653, standard error 1/√3
    assert (mean, high - mean) == (11.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert mean - low == pytest.approx(high - mean)
    assert interval([3.0]) == (3.0, 3.0, 3.0)


def test_masks_and_updates_stand_apart():
    masks, updates = objective_sections(runs())
    assert [row["method"] for row in rows_of(masks)] == [
        "1-swap",
        "1-swap, drift 0.75",
        "1-swap, metric, refinement 1",
    ]
    assert [row["method"] for row in rows_of(updates)] == ["1-swap, then reconstruction"]
    assert all(row["seeds"] == 3 for row in rows_of(masks))


def test_changes_are_paired_with_the_same_seeds():
    masks, updates = objective_sections(runs())
    plain, drift, refined = rows_of(masks)
    assert plain["against 1-swap"] is None
    # a tenth less at every seed: no spread at all
    for key in ("against 1-swap", "low", "high"):
        assert drift[key] == pytest.approx(-0.1)
    # log 0.5, log 1.05, log 9/11: the interval reaches beyond zero
    logs = [math.log(0.5), math.log(1.05), math.log(9 / 11)]
    mean = sum(logs) / 3
    error = math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert refined["against 1-swap"] == pytest.approx(math.expm1(mean))
    assert refined["high"] == pytest.approx(math.expm1(mean + 4.302653 * error), rel=1e-5)
    text = " ".join(masks.text)
    assert "1-swap, drift 0.75: better than plain 1-swap beyond the seeds' spread in all 1 cases." in text
    assert "1-swap, metric, refinement 1: better beyond the seeds' spread in 0 of 1 cases" in text
    assert "best is **1-swap, metric, refinement 1**" in text
    assert rows_of(updates)[0]["against 1-swap"] == pytest.approx(8 / (10 * 12 * 11) ** (1 / 3) - 1)


def test_one_seed_is_no_study_of_objectives():
    assert objective_sections([record for record in runs() if record.seed == 0]) == []
    assert method_name(with_options(runs()[0], mode="one-shot")) == "1-swap, one-shot"


def test_figures_hold_the_rows_of_the_table():
    for section in objective_sections(runs()):
        table, figure = section.items
        assert figure.rows == table.rows
        assert "<svg" in figure.to_svg()


def test_only_numbers_are_strengths_of_the_drift():
    drift = next(factor for factor in FACTORS if factor.name == "drift")
    record = runs()[0]
    for objective, expected in (
        ("plain", "0"),
        ("drift=0.5", "0.5"),
        ("drift=auto", None),
        ("drift=0.5,metric", None),
        ("metric", None),
    ):
        value = drift.value(with_options(record, objective=objective))
        assert value == expected
        assert value is None or drift.order(value) == float(value)


def in_two_sizes():
    """``runs`` with the windows they have and, twice as good, with 512."""
    return [
        with_options(
            replace(record, unit=f"{record.unit}-{samples}", perplexity=share * record.perplexity),
            samples=samples,
        )
        for record in runs()
        for samples, share in ((record.samples, 1.0), (512, 0.5))
    ]


def test_methods_are_compared_with_the_same_calibration():
    masks, _ = objective_sections(in_two_sizes())
    assert len(masks.items) == 1  # the table; windows are on an axis of another figure
    rows = {row["method"]: row for row in rows_of(masks)}
    few = runs()[0].samples
    assert all(row["seeds"] == 3 for row in rows.values())
    for samples, share in ((few, 1.0), (512, 0.5)):
        assert rows[f"1-swap, {samples} windows"]["quality"] == pytest.approx(11.0 * share)
        assert rows[f"1-swap, drift 0.75, {samples} windows"]["against 1-swap"] == pytest.approx(-0.1)


def test_a_factor_s_line_is_one_method_and_its_marks_are_means_over_seeds():
    factor = next(factor for factor in FACTORS if factor.name == "samples")
    figure = factor_figure(in_two_sizes(), factor)
    assert figure is not None
    lines = {}
    for name, windows, seeds, *_, perplexity, _ in figure.rows:
        assert seeds == 3
        lines.setdefault(name.split(", sequential", 1)[1], {})[windows] = perplexity
    named = ["", ", drift 0.75", ", metric, refinement 1", ", then reconstruction"]
    few = str(runs()[0].samples)
    expected = {
        name: pytest.approx({few: sum(values) / 3, "512": sum(values) / 6})
        for name, values in zip(named, QUALITY.values(), strict=True)
    }
    assert lines == expected
    assert factor_figure(runs(), factor) is None


def test_an_allocation_is_not_taken_for_another_strength_of_the_drift():
    factor = next(factor for factor in FACTORS if factor.name == "drift")
    spread = [
        with_options(
            replace(record, unit=record.unit + "-owl", perplexity=99.0), ["allocation"], allocation="owl"
        )
        for record in runs()
    ]
    plain = [record for record in spread if record.objective == "plain"]
    figure = factor_figure([*runs(), *plain], factor)
    assert figure is not None
    # plain and drift 0.75 of the masks alone; plain with owl's allocation has no partner
    assert [(row[1], row[5]) for row in figure.rows] == [
        ("0", pytest.approx(11.0)),
        ("0.75", pytest.approx(9.9)),
    ]
