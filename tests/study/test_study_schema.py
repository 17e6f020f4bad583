"""Study files: what is accepted, what is refused, and how the errors name the key."""

import copy
import hashlib
import tomllib

import pytest

from sparseswaps.errors import InputError
from sparseswaps.study import load_study, parse_study, plan_study, plan_units
from sparseswaps.study.plan import estimate_cost, unit_id

SMALL = tomllib.loads("""
name = "small"
patterns = ["50%", "2:4"]
seeds = [0, 1]
seconds = [5.0]
[[problem]]
family = "correlated"
rows = 2
cols = [8, 16]
[[solver]]
solver = "wanda"
label = "Wanda"
[[solver]]
solver = "one-swap"
label = "1-swap"
start = ["wanda", "random"]
options = { max_swaps = [1, "none"] }
""")


def changed(path, value):
    values = copy.deepcopy(SMALL)
    place = values
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return values


def test_every_combination_is_planned_once():
    study = parse_study(SMALL)
    units = plan_units(study)
    # 2 widths x 2 patterns x 2 seeds x (Wanda and 2 starts x 2 limits)
    assert len(units) == 2 * 2 * 2 * 5
    assert len({unit.unit for unit in units}) == len(units)
    assert [choice.label for choice in study.solvers] == [
        "Wanda",
        "1-swap, max swaps 1, from wanda",
        "1-swap, max swaps none, from wanda",
        "1-swap, max swaps 1, from random",
        "1-swap, max swaps none, from random",
    ]


def test_ids_depend_on_what_determines_the_result_and_on_nothing_else(tmp_path):
    first = [unit.unit for unit in plan_units(parse_study(SMALL))]
    limits = {"memory_mb": 100, "seconds": 7}
    elsewhere = parse_study({**SMALL, "limits": limits, "title": "other"}, tmp_path)
    assert [unit.unit for unit in plan_units(elsewhere)] == first
    other = [unit.unit for unit in plan_units(parse_study(changed(["seeds"], [2, 3])))]
    assert not set(first) & set(other)
    # the same on every machine: the order of keys and the encoding are fixed
    text = b'["s", {"a": [null, "\\u00e9"], "b": 1}]'
    assert unit_id("s", {"b": 1, "a": [None, "é"]}) == hashlib.sha256(text).hexdigest()[:16]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["name"], None, "key name: expected a value, found none"),
        (["name"], "Not So", "key name: expected lower-case"),
        (["pattern"], ["50%"], "key pattern: expected patterns perhaps, found an unknown key"),
        (["patterns"], ["150%"], "key patterns: expected sparsity patterns"),
        (["seeds"], ["a"], "key seeds: expected whole numbers, found ['a']"),
        (["seeds"], [True], "key seeds: expected whole numbers"),
        (["seconds"], [-1.0], "key seconds: expected numbers of at least 0"),
        (["limits"], {"memory": 1}, "key limits.memory: expected memory_mb perhaps"),
        (["limits"], 3, "key limits: expected a table, found 3"),
        (["problem"], [], "key problem: expected at least one"),
        (["problem"], {"family": "correlated"}, "key problem: expected tables [[problem]]"),
        (["solver"], [], "key solver: expected at least one"),
        (["problem", 0, "family"], "nice", "key problem[0].family: expected one of correlated"),
        (["problem", 0, "cols"], None, "key problem[0].cols: expected a value"),
        (["problem", 0, "cols"], [1], "key problem[0].cols: expected whole numbers of at least 2"),
        (["problem", 0, "rows"], [1, 2], "key problem[0].rows: expected one whole number"),
        (["problem", 0, "model"], "demo", "expected exactly one of family, files and model"),
        (["problem", 0, "solvers"], ["RIA"], "key problem[0].solvers: expected labels of [[solver]]"),
        (["solver", 0, "solver"], "wonda", "key solver[0].solver: expected a solver, found unknown solver"),
        (["solver", 1, "start"], "nowhere", "key solver[1].start: expected a solver"),
        (["solver", 1, "options"], {"swaps": 3}, "key solver[1].solver: expected a solver, found options"),
        (["solver", 1, "label"], "Wanda", None),
        (["solver", 0, "label"], 5, "key solver[0].label: expected text, found 5"),
        (["solver", 1, "solver"], ["wanda", "one-swap"], "key solver[1].options: expected none where"),
        (["model"], [{"model": "demo"}], "key model[0].calibration: expected a value"),
    ],
)
def test_a_wrong_key_is_named(path, value, message):
    values = changed(path, value) if path[0] in SMALL else {**SMALL, path[0]: value}
    if message is None:
        parse_study(values)  # the same method name with other options is fine
        return
    with pytest.raises(InputError) as error:
        parse_study(values)
    assert message in str(error.value)


def test_labels_must_differ():
    values = copy.deepcopy(SMALL)
    values["solver"].append({"solver": "ria", "label": "Wanda"})
    with pytest.raises(InputError, match="expected different labels, found 'Wanda' twice"):
        parse_study(values)


MODEL = {
    "model": "demo",
    "calibration": "stdlib",
    "evaluation": "stdlib-held-out",
    "mode": ["one-shot", "sequential"],
    "objective": ["plain", "drift=0.5"],
}


def test_models_combine_modes_and_drift_where_they_go_together():
    study = parse_study({**SMALL, "model": [{**MODEL, "solvers": ["Wanda"]}]})
    runs = {
        (unit.spec["settings"]["mode"], unit.spec["settings"]["objective"])
        for unit in plan_units(study)
        if unit.spec["kind"] == "model"
    }
    assert runs == {("one-shot", "plain"), ("sequential", "plain"), ("sequential", "drift=0.5")}
    for key, value, message in [
        ("mode", "both", "key model[0].mode: expected one of one-shot, sequential"),
        ("objective", "drift=1.5", "key model[0].objective: drift strength is a share: expected 0 to 1"),
    ]:
        with pytest.raises(InputError) as error:
            parse_study({**SMALL, "model": [{**MODEL, key: value}]})
        assert message in str(error.value)


def test_bounds_of_whole_models_are_asked_for_by_tier():
    plain = {unit.unit for unit in plan_units(parse_study({**SMALL, "model": [MODEL]}))}
    asked = {**MODEL, "bound": "shared-split", "bound_seconds": 20}
    units = plan_units(parse_study({**SMALL, "model": [asked]}))
    models = [unit for unit in units if unit.spec["kind"] == "model"]
    assert {(unit.spec["bound"], unit.spec["bound_seconds"]) for unit in models} == {("shared-split", 20.0)}
    # a run with bounds is another unit; runs without are the units that they always were
    assert not {unit.unit for unit in models} & plain
    for key, value, message in [
        ("bound", "best", "key model[0].bound: unknown bound: expected auto or one of corr-eigenvalue"),
        ("bound_seconds", 20, "key model[0].bound_seconds: expected bound, the tier"),
    ]:
        with pytest.raises(InputError) as error:
            parse_study({**SMALL, "model": [{**MODEL, key: value}]})
        assert message in str(error.value)


def test_layers_of_a_model_are_looked_up_without_computing():
    values = {
        **SMALL,
        "problem": [{"model": "demo", "calibration": "stdlib", "include": ["*.0.*"], "rows": 2}],
    }
    layers = {unit.spec["problem"]["layer"] for unit in plan_units(parse_study(values))}
    assert layers
    assert all(".0." in layer for layer in layers)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a readable file"):
        load_study(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(InputError, match="expected TOML"):
        load_study(broken)
    with pytest.raises(InputError, match="expected at least one, found none"):
        plan_units(parse_study({**SMALL, "problem": [{"files": ["*.safetensors"]}]}, tmp_path))


def test_the_estimate_uses_budgets_until_something_was_measured(tmp_path):
    plan = plan_study(parse_study(SMALL), tmp_path / "none.sqlite", jobs=2)
    assert (plan.done, plan.cost.units, plan.cost.measured) == (0, 40, 0)
    assert plan.cost.seconds == 40 * 5 / 2
    assert plan.summary[0] == ("correlated", "Wanda", 8)
    assert not (tmp_path / "none.sqlite").exists()
    measured = estimate_cost(plan.units, {"Wanda": 0.5})
    assert measured.measured == 8
    assert measured.seconds == 8 * 0.5 + 32 * 5
