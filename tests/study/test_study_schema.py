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


SHORT = """
name = "small"
patterns = ["50%"]
[defaults]
samples = 16
length = 128
rows = 2
[models.two]
model = "demo"
calibration = ["stdlib", "text.txt"]
evaluation = "stdlib-held-out"
samples = 32
[[problem]]
model = ["demo", "two"]
calibration = "stdlib"
cols = [16]
include = ["*.0.mlp.up*"]
[[problem]]
family = ["correlated", "rank-one"]
cols = [8]
[[model]]
model = ["demo", "two"]
evaluation = ["stdlib-held-out", "text.txt"]
calibration = "text.txt"
solvers = ["Wanda"]
variants = [
  { objective = "drift=0.5" },
  { calibration = "stdlib", samples = [4, 8], bound = "auto", bound_seconds = 5 },
  { evaluation = "text.txt", solvers = [], length = 64 },
]
[[model]]
model = "two"
solvers = ["Wanda"]
[[solver]]
solver = "wanda"
label = "Wanda"
[[solver]]
solver = "ria"
"""
# the same, every key where it is meant
LONG = {
    "name": "small",
    "patterns": ["50%"],
    "problem": [
        {"model": "demo", "name": name, "calibration": "stdlib", "cols": [16], "include": ["*.0.mlp.up*"],
         "samples": samples, "length": 128, "rows": 2}
        for name, samples in (("demo", 16), ("two", 32))
    ] + [{"family": family, "cols": [8], "rows": 2} for family in ("correlated", "rank-one")],
    "model": [
        {"model": "demo", "name": name, "calibration": calibration, "evaluation": evaluation,
         "samples": samples, "length": length, **more}
        for name, plain in (("demo", 16), ("two", 32))
        for calibration, evaluation, samples, length, more in [
            ("text.txt", "stdlib-held-out", plain, 128, {"objective": "drift=0.5", "solvers": ["Wanda"]}),
            ("text.txt", "text.txt", plain, 128, {"objective": "drift=0.5", "solvers": ["Wanda"]}),
            *(("stdlib", text, count, 128, {"bound": "auto", "bound_seconds": 5, "solvers": ["Wanda"]})
              for text in ("stdlib-held-out", "text.txt") for count in (4, 8)),
            ("text.txt", "text.txt", plain, 64, {}),
        ]
    ] + [
        {"model": "demo", "name": "two", "calibration": calibration, "evaluation": "stdlib-held-out",
         "samples": 32, "length": 128, "solvers": ["Wanda"]}
        for calibration in ("stdlib", "text.txt")
    ],
    "solver": [{"solver": "wanda", "label": "Wanda"}, {"solver": "ria"}],
}  # fmt: skip


def test_a_short_file_means_the_same_units_as_the_long_one(tmp_path):
    (tmp_path / "text.txt").write_text("words " * 100)
    short, long = (
        {unit.unit: (unit.spec, unit.limit) for unit in plan_units(parse_study(values, tmp_path))}
        for values in (tomllib.loads(SHORT), LONG)
    )
    assert short == long
    models = [spec["settings"] for spec, _ in short.values() if spec["kind"] == "model"]
    assert {settings["samples"] for settings in models} == {4, 8, 16, 32}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows = 2", "row = 2", "key defaults.row: expected rows perhaps, found an unknown key"),
        ("rows = 2", "seed = 2", "key defaults.seed: expected seeds of the study"),
        ("length = 128", "length = []", "key defaults.length: expected one whole number"),
        ("samples = 32", "samples = []", "key models.two.samples: expected at least one value"),
        ("samples = 32", "sample = 32", "key models.two.sample: expected samples perhaps"),
        ("samples = 32", 'solvers = ["no"]', "key models.two.solvers: expected labels of [[solver]]"),
        ('model = ["demo", "two"]\ncal', "model = []\ncal", "key problem[0].model: expected at least one"),
        ('["correlated", "rank-one"]', '["correlated", "best"]', "key problem[1].family: expected one of"),
        ('objective = "drift=0.5"', 'objective = "best"', "key model[0].variants[0].objective:"),
        ('objective = "drift=0.5"', "objectives = 1", "key model[0].variants[0].objectives: expected"),
        ('solvers = ["Wanda"]\nv', "solver_s = []\nv", "key model[0].solver_s: expected solvers perhaps"),
        ("variants = [", 'name = "x"\nvariants = [', "key model[0].name: expected one model where it has a"),
        ("models.two]", "models.three]", "key model[1].calibration: expected a value, found none"),
        ("[models.two]", "[models.x]\nmodel = 'a'\n[models.two]", "key models.x.model: expected an entry"),
        ('model = "demo"\ncal', "cal", "key models.two.model: expected a value, found none"),
        ('model = "two"\nsolvers', 'model = "two"\nvariants = []\nsolvers', "key model[1].variants: expec"),
        ("[defaults]", "[[defaults]]", "key defaults: expected a table"),
    ],
)  # fmt: skip
def test_what_a_short_file_has_wrong_is_named_where_it_stands(old, new, message):
    assert SHORT.count(old) == 1
    with pytest.raises(InputError) as error:
        parse_study(tomllib.loads(SHORT.replace(old, new)))
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
