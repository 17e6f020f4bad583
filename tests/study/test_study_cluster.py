"""A study on a cluster of two local workers gives exactly the rows of the local run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import pytest

from sparseswaps.errors import InputError, SolverNotInstalledError
from sparseswaps.study import StudyDatabase, parse_study, run_study
from sparseswaps.study.cluster import Workers, run_unordered, workers

STUDY: dict[str, Any] = {
    "name": "cluster",
    "patterns": ["50%"],
    "seeds": [0],
    "problem": [
        {"family": "correlated", "rows": 3, "cols": [16, 20]},
        {
            "model": "demo", "calibration": "stdlib", "samples": 2, "length": 64,
            "include": ["*.0.*q_proj"], "rows": 2, "cols": [32],
        },
    ],
    "solver": [
        {"solver": "wanda", "label": "Wanda"},
        {"solver": "one-swap", "label": "1-swap", "start": ["wanda", "random"]},
        {"solver": "enumeration:limit=20000", "label": "enumeration"},
    ],
}  # fmt: skip
# 3 problems, 4 solvers; enumeration refuses rows of 20 and 32 weights
UNITS, FAILED = 3 * 4, 2


def results(path: Path) -> Any:
    """Everything a study found, without what a clock or a memory meter says."""
    with StudyDatabase(path) as record:
        rows = record.read()
    units = [replace(unit, seconds=0.0, peak_memory_mb=0.0) for unit in rows.units]
    return units, [replace(row, seconds=0.0) for row in rows.rows]


def check(path: Path, local: Path) -> None:
    units, rows = results(path)
    expected_units, expected_rows = results(local)
    assert rows == expected_rows
    # units of a cluster have one thread each
    machines = [json.loads(unit.machine) for unit in units]
    expected = [json.loads(unit.machine) for unit in expected_units]
    for machine in (*machines, *expected):
        machine.pop("threads", None)
    assert machines == expected
    assert [replace(unit, machine="") for unit in units] == [
        replace(unit, machine="") for unit in expected_units
    ]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("local") / "study.sqlite"
    outcome = run_study(parse_study(STUDY), path, jobs=1, backend="sequential")
    assert (outcome.ran, outcome.failed) == (UNITS, FAILED)
    return path


def test_the_documented_command_gives_the_rows_of_the_local_run(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``sparseswaps study mine.toml --backend dask --jobs 2`` starts a cluster of two processes."""
    pytest.importorskip("distributed", reason="Dask is not installed")
    (tmp_path / "mine.toml").write_text(_toml(STUDY))
    monkeypatch.chdir(tmp_path)
    assert command_line.run("study", "mine.toml", "--backend", "dask", "--jobs", 2) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{UNITS} units run, {UNITS - FAILED} done, {FAILED} failed, 0 with other processes" in said
    check(tmp_path / "mine.sqlite", local)


def test_a_running_dask_cluster_is_joined_and_left_alone() -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        for jobs, expected in ((None, 4), (3, 3), (9, 4)):
            with workers("dask", jobs, cluster.scheduler_address) as pool:
                assert pool == Workers("dask", expected, 1)
                assert sorted(run_unordered(pool, divmod, ((n, 7) for n in range(20)))) == sorted(
                    divmod(n, 7) for n in range(20)
                )
        with distributed.Client(cluster), workers("dask", None, None) as pool:
            assert pool == Workers("dask", 4, 1)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_workers_give_the_rows_of_the_local_run(local: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray leaves threads and sockets behind."""
    program = (
        "import json, sys\n"
        "from sparseswaps.study import parse_study, run_study\n"
        "if __name__ == '__main__':\n"
        "    outcome = run_study(parse_study(json.loads(sys.argv[1])), sys.argv[2], jobs=2, backend='ray')\n"
        "    print(outcome.ran, outcome.failed)\n"
    )
    path = tmp_path / "ray.sqlite"
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), json.dumps(STUDY), str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == [str(UNITS), str(FAILED)]
    check(path, local)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("distributed", "ray") else found(name)
    )
    for backend in ("dask", "ray"):
        with pytest.raises(SolverNotInstalledError, match=rf"pip install 'sparseswaps\[{backend}\]'"):
            run_study(parse_study(STUDY), tmp_path / "x.sqlite", backend=backend)
    assert not (tmp_path / "x.sqlite").exists()


def test_wrong_clusters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(InputError, match="expected the backend dask or ray, found loky"),
        workers("loky", 1, "tcp://127.0.0.1:1"),
    ):
        pass
    with pytest.raises(InputError, match="at least 1, found 0"), workers("loky", 0, None):
        pass
    with (
        pytest.raises(InputError, match=r"backend of joblib: expected loky, .* found 'cloud'"),
        workers("cloud", 1, None),
    ):
        pass
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("sparseswaps.study.cluster.CONNECT_SECONDS", 0.2)
    with (
        pytest.raises(InputError, match="a Dask scheduler that answers"),
        workers("dask", None, "tcp://127.0.0.1:1"),
    ):
        pass


def _toml(values: dict[str, Any]) -> str:
    """Plain values as TOML: JSON is TOML but for the tables."""
    lines = [f"{key} = {json.dumps(values[key])}" for key in ("name", "patterns", "seeds")]
    for key in ("problem", "solver"):
        for entry in values[key]:
            lines += [f"[[{key}]]", *(f"{name} = {json.dumps(value)}" for name, value in entry.items())]
    return "\n".join(lines)
