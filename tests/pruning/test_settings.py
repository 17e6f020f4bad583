"""Settings: one field per option, one text form, and every field reaches record, study row and report key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

import sparseswaps as ss
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.pruning.objective import AUTO, UNSTATED
from sparseswaps.pruning.run import SETTINGS_FILE, prune
from sparseswaps.records.run_database import RunDatabase
from sparseswaps.study import StudyDatabase, parse_study, plan_units, run_study

PACKAGE = Path(ss.__file__).parent

# Another value for each option, as a text or plain value, and what the option then is.
OTHERS = {
    "pattern": "2:4",
    "solver": "one-swap:max_swaps=10",
    "start": "ria:alpha=1.0",
    "calibration": "other.txt",
    "evaluation": "other.txt",
    "samples": 9,
    "length": 24,
    "seed": 3,
    "evaluation_limit": 2,
    "add_bos": "yes",
    "mode": "one-shot",
    "flow": "block",
    "objective": "shrinkage=0.25",
    "allocation": "owl",
    "refine": 1,
    "update": "reconstruction:damping=0.1",
    "units": "channels=0.25,kv-groups=1",
    "unit_solver": "drop-add-swap:max_swaps=3",
    "unit_update": "none",
    "unit_ridge": 0.01,
    "multiple_of": 32,
    "include": ["*mlp*"],
    "exclude": ["*q_proj"],
    "prune_routers": True,
    "unreached": "magnitude",
    "min_expert_tokens": 5,
}

shares = st.floats(0, 1).map(lambda x: round(x, 4))
objectives = st.one_of(
    st.just(ss.Objective()),
    st.builds(
        ss.Objective,
        drift=st.one_of(shares, st.sampled_from([AUTO, UNSTATED])),
        residual=st.one_of(shares, st.just(UNSTATED)),
        metric=st.just(True),
        damping=shares,
        sweeps=st.integers(1, 9),
        shrinkage=st.floats(0, 0.9),
    ),
    st.builds(ss.Objective, drift=shares, held_out=st.floats(0, 0.5)),
)
solvers = st.one_of(
    st.builds(ss.OneSwap, st.one_of(st.none(), st.integers(0, 10**6)), st.floats(0, 0.5)),
    st.builds(ss.Tabu, st.floats(0.01, 4)),
    st.just(ss.Chain(ss.Greedy(share=0.5), ss.OneSwap(search="best"))),
)
settings = st.builds(
    ss.PruneSettings,
    pattern=st.sampled_from(["0.5", "37.5%", "2:4", "layer:0.25", "1e-1"]),
    solver=solvers,
    start=st.builds(ss.RIA, st.floats(0, 2)),
    calibration=st.one_of(st.none(), st.text("abc/. \"'\\é", min_size=1)),
    evaluation=st.one_of(st.none(), st.just("x.txt")),
    samples=st.integers(1, 10**6),
    length=st.one_of(st.none(), st.integers(1, 4096)),
    seed=st.integers(0, 2**31),
    evaluation_limit=st.one_of(st.none(), st.integers(1, 99)),
    add_bos=st.sampled_from(list(ss.AddBos)),
    mode=st.sampled_from(list(ss.Mode)),
    flow=st.sampled_from(["group", "block"]),
    objective=objectives,
    allocation=st.sampled_from(list(ss.Allocation)),
    update=st.one_of(st.none(), st.builds(ss.Reconstruction, st.floats(0, 1))),
    include=st.lists(st.text("a*[]\"' "), max_size=3),
    exclude=st.lists(st.text("a*[]\"' "), max_size=3),
    min_expert_tokens=st.one_of(st.none(), st.integers(0, 99)),
)


@given(settings)
def test_texts_are_read_back(given_settings: ss.PruneSettings) -> None:
    assert ss.PruneSettings.parse(str(given_settings)) == given_settings
    assert ss.PruneSettings.from_plain(given_settings.plain()) == given_settings
    # what goes through JSON, as records keep it, comes back too
    assert ss.PruneSettings.from_plain(json.loads(json.dumps(given_settings.plain()))) == given_settings


@given(objectives)
def test_texts_of_objectives_are_read_back(objective: ss.Objective) -> None:
    assert ss.Objective.parse(str(objective)) == objective


def test_every_option_has_another_value() -> None:
    assert list(OTHERS) == [field.name for field in fields(ss.PruneSettings)]
    standard = ss.PruneSettings()
    for name, value in OTHERS.items():
        other = replace(standard, **{name: value})
        assert getattr(other, name) != getattr(standard, name)
        assert other.changed() == [name]
        assert other.plain()[name] == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "half"}, "pattern: a pattern is a share"),
        ({"solver": "best"}, "solver: unknown solver: expected one of"),
        ({"samples": 0}, "samples: expected at least 1, found 0"),
        ({"samples": 2.5}, "samples: expected a whole number, found 2.5"),
        ({"seed": -1}, "seed: expected at least 0, found -1"),
        ({"length": "long"}, "length: "),
        ({"add_bos": "perhaps"}, "add_bos: expected one of auto, yes, no, found 'perhaps'"),
        ({"mode": "both"}, "mode: expected one of one-shot, sequential, found 'both'"),
        ({"objective": "drift=2"}, "objective: drift strength is a share"),
        ({"allocation": "best"}, "allocation: expected one of uniform, knapsack, owl"),
        ({"update": "wanda"}, "update: expected a solver that changes kept weights"),
        ({"refine": 1, "solver": "sparsegpt"}, "refinement chooses among the dense weights"),
        ({"include": 3}, "include: "),
        ({"calibration": 7}, "calibration: expected a file, a dataset or windows, found 7"),
    ],
)
def test_wrong_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(ss.InputError) as error:
        ss.PruneSettings(**options)
    assert str(error.value).startswith(message)


def test_unknown_options_and_no_toml_are_refused() -> None:
    with pytest.raises(ss.InputError, match=r"settings: expected options among pattern, .*found 'sparsity'"):
        ss.PruneSettings.parse("sparsity = 0.5")
    with pytest.raises(ss.InputError, match="settings: expected TOML"):
        ss.PruneSettings.parse("pattern == 0.5")
    with pytest.raises(ss.InputError, match=r"options: expected names among pattern, .*found 'sparsity'"):
        ss.prune("nowhere", sparsity=0.5)
    with pytest.raises(ss.InputError, match=r"pattern: expected it once, found '0\.5' and '2:4'"):
        ss.prune("nowhere", "0.5", pattern="2:4")
    for name, value in (("activation_limit", -1), ("activation_limit", float("inf")), ("offload", "no")):
        with pytest.raises(ss.InputError, match=name):
            ss.Machine(**{name: value})


def test_an_objective_that_nobody_states_is_the_solver_s() -> None:
    default = ss.PruneSettings().objective
    assert default.is_default
    assert str(default) == "default"
    assert default.resolved(search=True) == ss.Objective(drift=0.75, residual=0.5)
    assert default.resolved(search=False) == ss.Objective()
    added = ss.Objective.parse("default,metric")
    assert added.resolved(search=True) == ss.Objective(drift=0.75, residual=0.5, metric=True)
    # what is stated stays
    stated = ss.Objective.parse("default,drift=0.25")
    assert stated.resolved(search=True) == ss.Objective(drift=0.25, residual=0.5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_models.save("llama", folder / "model")
    (folder / "text.txt").write_text(tiny_models.text(1500))
    (folder / "other.txt").write_text(tiny_models.text(1500, seed=1))
    return folder


STUDY = {
    "name": "fields",
    "patterns": ["50%"],
    "solver": [{"solver": "wanda"}],
    "model": [
        {"model": "model", "calibration": "text.txt", "evaluation": "other.txt", "samples": [4], "length": 16}
    ],
}


def test_every_field_reaches_record_study_row_and_report_key(home: Path, tmp_path: Path) -> None:
    names = {field.name for field in fields(ss.PruneSettings)}
    named = {field.name for field in fields(ss.PruneSettings) if field.metadata.get("content")}
    options = {"calibration": home / "text.txt", "samples": 4, "length": 16, "solver": "wanda"}
    report = prune(home / "model", out=tmp_path / "out", **options)
    with RunDatabase(tmp_path / "out" / RECORD_FILE) as record:
        facts = record.facts()
    assert names - named <= set(facts["settings"])
    assert {"calibration", "evaluation"} <= set(facts["settings"])  # hashes of the texts
    assert names <= set(facts["report"])
    assert names <= set(report.to_json())
    assert ss.PruneSettings.parse((tmp_path / "out" / SETTINGS_FILE).read_text()) == replace(
        report.settings, calibration=str(home / "text.txt")
    )
    run_study(parse_study(STUDY, home), tmp_path / "s.sqlite", jobs=1, backend="sequential")
    with StudyDatabase(tmp_path / "s.sqlite") as database:
        (row,) = database.read().models
    assert set(json.loads(row.settings)) == names
    assert {name for name, _ in row.apart()} == names - {"seed"}
    # and a change of any one of them makes another point of a report
    for name, value in OTHERS.items():
        other = replace(row, settings=json.dumps({**json.loads(row.settings), name: value}))
        assert (other.apart() != row.apart()) == (name != "seed")


@pytest.mark.parametrize(
    "name", [name for name in OTHERS if name not in ("solver", "start", "pattern", "seed")]
)
def test_every_option_is_swept_by_studies(name: str, home: Path) -> None:
    model = {**STUDY["model"][0], "mode": "one-shot"}
    other = OTHERS[name]
    first = model.get(name, ss.PruneSettings().plain()[name])
    if name == "mode":
        first = "sequential"
    if name in ("include", "exclude"):
        first = []
    if name == "samples":
        first = 4
    if name == "evaluation":
        first = "text.txt"
    if first is None:
        model[name] = other
        expected = [other]
    else:
        model[name] = [first, other]
        expected = [first, other]
    units = plan_units(parse_study({**STUDY, "model": [model]}, home))
    assert [unit.spec["settings"][name] for unit in units] == expected
    assert len({unit.unit for unit in units}) == len(expected)


def test_machines_are_chosen_in_studies_and_are_no_part_of_a_unit(home: Path, tmp_path: Path) -> None:
    model = STUDY["model"][0]
    plain = plan_units(parse_study({**STUDY, "model": [model]}, home))
    machine = {"device": "cpu", "dtype": "float32", "offload": True, "activation_limit": 0.001}
    chosen = plan_units(parse_study({**STUDY, "model": [{**model, **machine}]}, home))
    assert [unit.unit for unit in plain] == [unit.unit for unit in chosen]
    assert chosen[0].spec["machine"] == machine
    with pytest.raises(ss.InputError, match=r"key model\[0\].offload: expected true or false, found 'no'"):
        parse_study({**STUDY, "model": [{**model, "offload": "no"}]}, home)
    outcome = run_study(
        parse_study({**STUDY, "model": [{**model, **machine}]}, home),
        tmp_path / "s.sqlite",
        jobs=1,
        backend="sequential",
    )
    assert outcome.failed == 0


def test_layer_budgets_are_patterns_of_studies(home: Path, tmp_path: Path) -> None:
    values = {
        **STUDY,
        "patterns": ["layer:0.5"],
        "problem": [{"family": "correlated", "rows": 3, "cols": [8]}],
        "solver": [{"solver": "one-swap"}],
    }
    outcome = run_study(parse_study(values, home), tmp_path / "s.sqlite", jobs=1, backend="sequential")
    assert outcome.failed == 0
    with StudyDatabase(tmp_path / "s.sqlite") as database:
        rows = database.read()
    assert {unit.pattern for unit in rows.units} == {run.pattern for run in rows.models} == {"layer:0.5"}


def test_a_new_option_is_one_field(home: Path, tmp_path: Path) -> None:
    """One line in the settings of a copy of the package, and nothing else: it is everywhere."""
    copy = tmp_path / "copy" / "sparseswaps"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "published", "data"))
    source = (copy / "pruning" / "settings.py").read_text()
    line = "    min_expert_tokens: int | None = option("
    assert source.count(line) == 1
    new = '    flavour: int = option(0, "A dummy.", NUMBER)\n'
    (copy / "pruning" / "settings.py").write_text(source.replace(line, new + line))
    script = f"""
import json, pathlib, sys
import sparseswaps as ss
from sparseswaps.records.run_database import RunDatabase
from sparseswaps.study import StudyDatabase, parse_study, run_study
assert str(pathlib.Path(ss.__file__)).startswith({str(copy)!r})
home, out = pathlib.Path({str(home)!r}), pathlib.Path({str(tmp_path)!r})
options = {{"calibration": home / "text.txt", "samples": 4, "length": 16, "solver": "wanda"}}
words = [word for name, value in options.items() for word in ("--" + name, str(value))]
words += ["--flavour", "7", "--out", str(out / "run"), "--json"]
sys.argv = ["sparseswaps", "prune", str(home / "model"), *words]
from sparseswaps.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
with RunDatabase(out / "run" / "record.sqlite") as record:
    assert record.facts()["settings"]["flavour"] == 7
assert "flavour = 7" in (out / "run" / "settings.toml").read_text()
class Stop:
    def stage(self, *_): pass
    def layer_started(self, *_): pass
    def layer_finished(self, *_): raise KeyboardInterrupt
try:
    ss.prune(home / "model", **options, flavour=8, out=out / "cut", progress=Stop())
except KeyboardInterrupt:
    pass
try:
    ss.prune(home / "model", **options, flavour=9, out=out / "cut", resume=True)
except ss.InputError as error:
    assert "found another flavour (9 instead of 8)" in str(error), error
else:
    raise SystemExit("resumed with another flavour")
study = {STUDY!r}
study["model"][0]["flavour"] = [1, 2]
run_study(parse_study(study, home), out / "s.sqlite", jobs=1, backend="sequential")
with StudyDatabase(out / "s.sqlite") as database:
    runs = database.read().models
assert sorted(run.option("flavour") for run in runs) == [1, 2]
assert runs[0].apart() != runs[1].apart()
assert {{run.fitted for run in runs}} == {{"sequential, flavour 1", "sequential, flavour 2"}}
from sparseswaps.reports.sections.model_results import variant_names
assert len(set(variant_names(runs).values())) == 2
print("everywhere")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={"PYTHONPATH": str(copy.parent), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("everywhere\n")
