"""Studies end with the same rows however often they are killed, and limits hold for native code."""

import csv
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sparseswaps.errors import InputError, InvalidFileError
from sparseswaps.problems import save_instance, synthetic_layer
from sparseswaps.problems.pattern import LayerBudget
from sparseswaps.records.study_database import process_id
from sparseswaps.solvers import RIA, OneSwap, solve
from sparseswaps.study import StudyDatabase, build_report, export, merge, parse_study, plan_units, run_study
from sparseswaps.study.execute import execute, failed
from sparseswaps.study.layer_bounds import BoundedLayers
from sparseswaps.study.supervisor import close_child, resident_mb, run_unit

VALUES = {
    "name": "small",
    "patterns": ["50%", "2:4"],
    "seeds": [0, 1],
    "problem": [{"family": "correlated", "rows": 2, "cols": [12, 16, 20]}],
    "solver": [
        {"solver": "wanda", "label": "Wanda"},
        {"solver": "ria", "label": "RIA", "options": {"alpha": [0.5, 1.0]}},
        {"solver": "enumeration:limit=20000", "label": "enumeration"},
    ],
}
UNITS = 3 * 2 * 2 * 4


def results(path):
    """Everything a study found, without what a clock or a memory meter says."""
    with StudyDatabase(path) as record:
        rows = record.read()
    units = [replace(unit, seconds=0.0, peak_memory_mb=0.0) for unit in rows.units]
    return units, [replace(row, seconds=0.0) for row in rows.rows], rows.models


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "study.sqlite"
    seen = []
    outcome = run_study(parse_study(VALUES), path, jobs=1, backend="sequential", progress=seen.append)
    assert (outcome.ran, outcome.done + outcome.failed) == (UNITS, UNITS)
    assert [progress.done + progress.failed for progress in seen] == list(range(1, UNITS + 1))
    assert seen[-1].seconds_left == 0
    return path


def test_a_failing_unit_is_recorded_and_the_rest_goes_on(undisturbed):
    with StudyDatabase(undisturbed) as record:
        units = record.read().units
    failures = [unit for unit in units if unit.failure]
    # C(20, 10) masks are more than the limit, at two seeds; C(16, 8) and 6⁵ are not
    assert [(unit.label, unit.cols, unit.status) for unit in failures] == [("enumeration", 20, "error")] * 2
    assert "expected at most 20000 masks per row, found 184756" in failures[0].failure
    assert all(unit.objective is None for unit in failures)
    proven = [unit for unit in units if unit.label == "enumeration" and not unit.failure]
    assert proven
    assert all(unit.bound == pytest.approx(unit.objective) for unit in proven)


def test_running_again_repeats_nothing_and_failures_only_when_asked(undisturbed):
    study = parse_study(VALUES)
    assert run_study(study, undisturbed, jobs=1, backend="sequential").ran == 0
    assert run_study(study, undisturbed, jobs=1, backend="sequential", retry_failed=True).ran == 2


COORDINATOR = """
import json, os, sys
from sparseswaps.study import parse_study, run_study
study = parse_study(json.loads(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:  # each line is a database: run the study on it in a fork, say its number
    child = os.fork()
    if not child:
        run_study(study, line.strip(), jobs=1, backend="sequential")
        os._exit(0)
    print(child, flush=True)
"""


class Coordinators:
    """Starts processes that run the study; forked, because importing torch takes seconds."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COORDINATOR, json.dumps(VALUES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, path):
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self, number, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not _runs(number):
                return True
            time.sleep(0.02)
        return False

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _runs(number):
    try:
        with open(f"/proc/{number}/stat") as file:  # noqa: PTH123  (no file of ours)
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def coordinators():
    if not os.path.exists("/proc/self/stat"):  # noqa: PTH110
        pytest.skip("needs /proc to look at processes")
    started = Coordinators()
    yield started
    started.close()


def test_a_study_killed_ten_times_ends_with_the_rows_of_an_undisturbed_one(
    tmp_path, undisturbed, coordinators
):
    path = tmp_path / "killed.sqlite"
    generator = random.Random(20)
    kills, before = 0, -1
    for _ in range(10):
        number = coordinators.start(path)
        # wait until this process has written something more, then kill it at a random moment after
        end = time.monotonic() + 60
        while time.monotonic() < end and _runs(number) and (now := _finished(path)) <= before:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        if _runs(number):
            os.kill(number, signal.SIGKILL)
            kills += 1
        before = now if now < UNITS - 6 else -1
        coordinators.wait(number, 10)
    run_study(parse_study(VALUES), path, jobs=1, backend="sequential")
    assert kills >= 1
    assert results(path) == results(undisturbed)


def _finished(path):
    if not path.exists():
        return -1
    try:
        with StudyDatabase(path) as record:
            counts = record.counts()
    except InvalidFileError:
        return -1
    return counts["done"] + counts["failed"]


def test_two_processes_on_one_database_share_the_work(tmp_path, undisturbed, coordinators):
    path = tmp_path / "shared.sqlite"
    numbers = [coordinators.start(path) for _ in range(2)]
    assert all(coordinators.wait(number, 120) for number in numbers)
    assert results(path) == results(undisturbed)
    with StudyDatabase(path) as record:
        assert record.counts() == {"done": UNITS - 2, "failed": 2}


def test_claims_are_exclusive_and_released_when_their_process_is_gone(tmp_path):
    study = parse_study(VALUES)
    units = plan_units(study)
    with StudyDatabase(tmp_path / "a.sqlite") as one, StudyDatabase(tmp_path / "a.sqlite") as two:
        one.add_plan("small", {"name": "small"}, units)
        first, second = one.claim(["small"], process_id()), two.claim(["small"], process_id())
        assert first.unit != second.unit
        assert one.release_lost() == 0
        host = process_id().rsplit(":", 2)[0]
        gone = one.claim(["small"], f"{host}:999999999:1")
        assert two.release_lost() == 1
        assert two.claim(["small"], process_id()).unit == gone.unit
        assert one.claim(["other"], process_id()) is None
        one.claim(["small"], "another-machine:1:1")
        assert one.release_lost() == 0  # its unit may still take that long


def native(tmp_path, monkeypatch, body):
    """Make a unit run ``body`` in its child instead of a solver."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import sys\n"
        "if 'sparseswaps.study.child' in ' '.join(sys.orig_argv):\n"
        "    import sparseswaps.study.execute as execute\n"
        "    def run(*_):\n" + "".join(f"        {line}\n" for line in body.splitlines()) +
        "    execute.execute = run\n"
    )  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def run_one(limit, memory_mb=0.0):
    unit = plan_units(parse_study(VALUES))[0]
    spec = {**unit.spec, "memory_mb": memory_mb}
    try:
        return run_unit(unit.unit, "small", spec, "", limit, 1).record
    finally:
        close_child()


def test_the_time_limit_holds_for_native_code(tmp_path, monkeypatch):
    # a C function that never returns and holds the interpreter lock
    native(tmp_path, monkeypatch, "import ctypes\nctypes.PyDLL(None).pause()")
    begin = time.monotonic()
    record = run_one(limit=0.5)
    assert record.status == "time_limit"
    assert record.failure == "time limit: expected at most 0.5 s, found no end"
    assert time.monotonic() - begin < 60


def test_the_memory_limit_holds_for_native_code(tmp_path, monkeypatch):
    body = (
        "import ctypes\nlibc = ctypes.PyDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
        "while True:\n    libc.memset(ctypes.c_void_p(libc.malloc(1 << 24)), 1, 1 << 24)"
    )
    native(tmp_path, monkeypatch, body)
    record = run_one(limit=60, memory_mb=1500)
    assert record.status == "memory_limit"
    assert "expected at most 1500 MB" in record.failure
    assert 1500 < record.peak_memory_mb < 6000  # what it takes in one look at it, on a busy machine


def _left_in_the_heap(count=6000, size=1 << 16):
    """Take memory in pieces too small for mappings of their own; free all but the last, which pins them."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    pieces = [ctypes.c_void_p(libc.malloc(size)) for _ in range(count)]
    for piece in pieces:
        libc.memset(piece, 1, size)
    for piece in pieces[:-1]:
        libc.free(piece)
    return count * size / 1e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_the_peak_memory_of_a_unit_leaves_out_what_an_earlier_one_freed():
    unit = plan_units(parse_study(VALUES))[0]
    freed = _left_in_the_heap()
    resident = resident_mb(os.getpid())
    record = execute(unit.unit, "small", unit.spec, Path()).record
    assert record.peak_memory_mb < resident - 0.8 * freed  # the unit itself takes a few MB


def test_a_crash_is_recorded_with_its_signal(tmp_path, monkeypatch):
    native(tmp_path, monkeypatch, "import os\nos.abort()")
    record = run_one(limit=60)
    assert record.status == "crashed"
    assert "SIGABRT" in record.failure


def test_merge_takes_what_is_missing_and_export_writes_everything(tmp_path, undisturbed):
    study = parse_study(VALUES)
    part = tmp_path / "part.sqlite"
    with StudyDatabase(part) as record:
        record.add_plan("small", {"name": "small"}, plan_units(study))
        unit = record.claim(["small"], process_id())
        record.finish(failed(unit.unit, "small", unit.spec, "crashed", "power cut", 1.0, 0.0))
    assert merge(part, [undisturbed]) == UNITS - 2
    assert merge(part, [undisturbed]) == 0
    assert results(part) == results(undisturbed)
    with pytest.raises(InvalidFileError, match="expected an existing file"):
        merge(part, [tmp_path / "none.sqlite"])
    files = export(part, tmp_path / "csv")
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["objective"]) for row in rows] == [row.objective for row in results(part)[1]]
    parquet = pytest.importorskip("pyarrow.parquet")
    files = export(part, tmp_path / "parquet", "parquet")
    assert parquet.read_table(files[0]).num_rows == UNITS
    again = tmp_path / "again.sqlite"
    assert merge(again, [tmp_path / "parquet"]) == UNITS - 2  # two fail, and are to be planned again
    assert merge(again, [tmp_path / "parquet"]) == 0
    assert results(again)[1:] == results(part)[1:]
    with StudyDatabase(again) as record:
        record.add_plan("small", {"name": "small"}, plan_units(study))
        assert record.counts() == {"done": UNITS - 2, "pending": 2}
    with pytest.raises(InputError, match="expected csv or parquet, found 'xml'"):
        export(part, tmp_path, "xml")


def test_a_report_needs_results(tmp_path, undisturbed):
    with pytest.raises(InvalidFileError, match="found none"):
        build_report(tmp_path / "none.sqlite", tmp_path)
    StudyDatabase(tmp_path / "empty.sqlite").close()
    with pytest.raises(InputError, match="expected finished units"):
        build_report(tmp_path / "empty.sqlite", tmp_path)
    (tmp_path / "text.sqlite").write_text("no database" * 100)
    with pytest.raises(InvalidFileError, match="expected an SQLite database"):
        build_report(tmp_path / "text.sqlite", tmp_path)
    page = build_report(undisturbed, tmp_path / "report")
    assert "Distance to the optimum" in page.read_text()


def test_joblib_processes_give_the_same_rows(tmp_path, undisturbed):
    values = {**VALUES, "problem": [{"family": "correlated", "rows": 2, "cols": [12]}]}
    run_study(parse_study(values), tmp_path / "loky.sqlite", jobs=2)
    units, rows, _ = results(tmp_path / "loky.sqlite")
    expected_units, expected_rows, _ = results(undisturbed)
    wanted = {unit.unit for unit in units}
    strip = [replace(unit, machine="") for unit in units]
    assert strip == [replace(unit, machine="") for unit in expected_units if unit.unit in wanted]
    assert rows == [row for row in expected_rows if row.unit in wanted]


def test_whole_models_and_their_layers_are_studied(tmp_path):
    values = {
        "name": "models",
        "patterns": ["50%"],
        "model": [
            {
                "model": "demo", "calibration": "stdlib", "evaluation": "stdlib-held-out",
                "samples": 2, "length": 64, "evaluation_limit": 2, "solvers": ["Wanda"],
            }
        ],
        "problem": [
            {
                "model": "demo", "calibration": "stdlib", "held_out": "stdlib-held-out", "samples": 2,
                "length": 64, "include": ["*.0.*down_proj", "*.0.*q_proj"], "rows": 2, "cols": [32],
            }
        ],
        "solver": VALUES["solver"][:2],
    }  # fmt: skip
    outcome = run_study(parse_study(values), tmp_path / "m.sqlite", jobs=1, backend="sequential")
    assert outcome.failed == 0
    with StudyDatabase(tmp_path / "m.sqlite") as record:
        rows = record.read()
    (run,) = rows.models
    assert run.perplexity > run.perplexity_dense > 1
    assert len(rows.layers) > 0
    assert {layer.unit for layer in rows.layers} == {run.unit}
    layer_units = rows.units
    assert len(layer_units) == 2 * 3
    assert all(unit.held_out > 0 and unit.cols == 32 and unit.rows == 2 for unit in layer_units)


def test_layers_of_whole_models_are_bounded_where_asked(tmp_path):
    base = {
        "model": "demo", "calibration": "stdlib", "evaluation": "stdlib-held-out",
        "samples": 2, "length": 64, "evaluation_limit": 2, "solvers": ["1-swap"],
    }  # fmt: skip
    solver = {"solver": "one-swap", "label": "1-swap", "start": "wanda"}
    values = {
        "name": "bounded",
        "model": [base, {**base, "mode": "one-shot", "bound": "corr-eigenvalue", "bound_seconds": 30}],
        "solver": [solver],
    }
    outcome = run_study(parse_study(values), tmp_path / "b.sqlite", jobs=1, backend="sequential")
    assert outcome.failed == 0
    with StudyDatabase(tmp_path / "b.sqlite") as record:
        rows = record.read()
    plain, bounded = sorted(rows.models, key=lambda run: run.mode, reverse=True)
    assert (plain.mode, bounded.mode) == ("sequential", "one-shot")
    layers = {layer.record.name: layer.record for layer in rows.layers if layer.unit == bounded.unit}
    assert {found.unit for found in rows.bounds} == {bounded.unit}
    assert {found.layer for found in rows.bounds} == set(layers)
    for found in rows.bounds:
        layer = layers[found.layer]
        assert found.tier == "corr-eigenvalue"
        assert 0 <= found.bound <= found.objective
        # the same mask on the same inputs, as the pipeline scored it
        assert found.objective == pytest.approx(layer.objective * layer.output_norm, rel=1e-9)
        assert layer.seconds > 0  # though layers of one group take their turns, and bounds take longest
    assert bounded.solver == plain.solver
    assert bounded.seconds_layers < bounded.seconds
    # merging and exporting keep them
    assert merge(tmp_path / "all.sqlite", [tmp_path / "b.sqlite"]) == 2
    with StudyDatabase(tmp_path / "all.sqlite") as record:
        assert record.read() == rows
    files = {path.name: path for path in export(tmp_path / "all.sqlite", tmp_path / "csv")}
    assert len(files["bounds.csv"].read_text().splitlines()) == 1 + len(rows.bounds)
    page = build_report(tmp_path / "all.sqlite", tmp_path / "report").read_text()
    assert "Certified gaps of whole models" in page


def test_what_no_tier_covers_has_no_bound():
    problem = synthetic_layer("correlated", 4, 16, "0.5")
    by_layer = replace(problem, pattern=LayerBudget(8, 16))
    for given, count in ((problem, 1), (by_layer, 0)):
        watch = BoundedLayers("unit", "naive", None)
        watch(given, solve(given, OneSwap()))
        assert len(watch.found) == count


def test_scores_see_the_whole_layer_of_which_rows_are_sampled(tmp_path):
    layer = synthetic_layer("correlated", 12, 16, seed=3)
    save_instance(layer, tmp_path / "layer.safetensors")
    values = {
        "name": "sample",
        "problem": [{"files": ["layer.safetensors"], "rows": 3}],
        "solver": [
            {"solver": "ria", "label": "RIA"},
            {"solver": "one-swap:max_swaps=0", "label": "no swap", "start": "ria"},
        ],
    }
    run_study(parse_study(values, tmp_path), tmp_path / "s.sqlite", jobs=1, backend="sequential")
    with StudyDatabase(tmp_path / "s.sqlite") as record:
        rows = record.read().rows
    expected = solve(layer, RIA()).row_objectives
    assert len(rows) == 6
    for row in rows:
        # the same mask, scored twice in double precision
        assert row.objective == pytest.approx(float(expected[row.row]), rel=1e-12)
