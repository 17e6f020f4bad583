"""The acceptance of the CUDA path, run on the CPU at a small size; what its stages say of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bare_checkout
import pytest
import torch

import sparseswaps as ss

BENCHMARKS = bare_checkout.ROOT / "benchmarks"


@pytest.fixture
def bench() -> Any:
    from acceptance.bench import Bench

    return Bench(torch.device("cpu"), 64)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The script from a checkout that is not installed, where nothing optional is."""
    folder = tmp_path_factory.mktemp("acceptance")
    script = str(BENCHMARKS / "cuda_acceptance.py")
    done = bare_checkout.run(
        [script, "--device", "cpu", "--shrink", "64"], folder, OUT=str(folder / "results")
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = (folder / "results").iterdir()
    found: dict[str, Any] = json.loads(file.read_text())
    assert "0 FAIL" in done.stdout
    assert all(row["name"] in done.stdout for row in found["rows"])
    return found


def test_every_stage_passes_on_the_cpu(dry_run: dict[str, Any]) -> None:
    from cuda_acceptance import STAGES

    names = [stage.name for stage in STAGES]
    assert list(dry_run["seconds"]) == [*names, "all"]
    assert {row["stage"] for row in dry_run["rows"]} == set(names)
    assert {row["verdict"] for row in dry_run["rows"]} == {"PASS", "INFO"}
    passed = {row["stage"] for row in dry_run["rows"] if row["verdict"] == "PASS"}
    assert passed == set(names) - {"shapes"}  # seconds only, without a goal at this size
    assert sum(stage.seconds for stage in STAGES) < 9 * 60


def test_the_dry_run_names_machine_versions_and_what_was_measured(dry_run: dict[str, Any]) -> None:
    assert dry_run["versions"]["sparseswaps"] == ss.__version__
    assert dry_run["card"]
    seconds = {row["name"]: row["value"] for row in dry_run["rows"] if row["unit"] == "s"}
    for name in ("whole model, 0.5", "whole model, brute force", "whole model, 2:4, certificate"):
        assert seconds[name] > 0
    assert "default, 32 blocks, 128 windows, extrapolated, all" in seconds


def test_what_is_hidden_is_not_there(tmp_path: Path) -> None:
    """Else the dry run would show nothing."""
    script = (
        "import importlib.metadata, importlib.util\n"
        "for name in ('cvxpy', 'matplotlib', 'pyscipopt'):\n"
        "    assert importlib.util.find_spec(name) is None\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError: continue\n"
        "    raise SystemExit(name)\n"
        "try: importlib.metadata.version('sparseswaps')\n"
        "except importlib.metadata.PackageNotFoundError: print('hidden')\n"
    )
    assert bare_checkout.run(["-c", script], tmp_path).stdout == "hidden\n"


def test_a_stage_that_breaks_or_takes_too_long_ends_alone(bench: Any) -> None:
    from acceptance.bench import Stage

    def slow(bench: Any) -> None:
        bench.info("first step", 1.0)
        bench.in_time("second step", 60)
        raise AssertionError("not reached")

    bench.run(Stage("broken", 9, lambda _bench: 1 / 0))
    bench.run(Stage("slow", 9, slow))
    bench.run(Stage("good", 9, lambda bench: bench.check("well", True, 1.0, "1")))
    assert [(row.stage, row.verdict) for row in bench.rows] == [
        ("broken", "FAIL"), ("slow", "INFO"), ("slow", "FAIL"), ("good", "PASS"),
    ]  # fmt: skip
    assert "ZeroDivisionError" in bench.failed[0].measured
    assert "second step" in bench.failed[1].measured


def test_goals_count_on_a_card_at_full_size_only(bench: Any) -> None:
    from acceptance.bench import Bench

    card = Bench(torch.device("cuda"), 1)
    for each in (bench, card):
        each.goal("seconds", False, 61.0, "at most 60", "s")
    assert [row.verdict for row in (*bench.rows, *card.rows)] == ["INFO", "FAIL"]


def test_a_kernel_that_differs_from_the_specification_is_found(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acceptance import search
    from acceptance.bench import Stage

    from sparseswaps.solvers.kernels import cpu

    def one_mask_wrong(*args: Any) -> Any:
        found = cpu.descend(*args)
        found.mask[0, :2] = found.mask[0, :2].flip(0)
        return found

    wrong = SimpleNamespace(descend=one_mask_wrong, best_swaps=cpu.best_swaps)
    monkeypatch.setattr(search, "kernels_for", lambda _device: wrong)
    monkeypatch.setattr(search, "CASES", ((64, "0.5"),))
    bench.run(Stage("specification", 60, search.specification))
    assert [row.name for row in bench.failed] == ["float64 rows equal to the specification"]


def test_layers_that_the_time_does_not_allow_are_told(bench: Any) -> None:
    from acceptance import search
    from acceptance.bench import Stage

    bench.run(Stage("specification", 1, search.specification))
    assert [row.name for row in bench.failed] == ["layers left out for lack of time"]


def test_a_search_that_ignores_its_limits_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from acceptance import search
    from acceptance.bench import Stage

    one_swap = ss.OneSwap

    class Deaf:
        def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, _budget: ss.Budget) -> ss.Outcome:
            return one_swap().run(problem, init, ss.Budget())

    monkeypatch.setattr(ss, "OneSwap", Deaf, raising=False)
    bench.run(Stage("limits", 60, search.limits))
    names = [row.name for row in bench.failed]
    assert names == ["calls of progress under it", "Ctrl-C from progress ends the search after"]


def test_brute_force_makes_the_best_swaps() -> None:
    from acceptance.search import best_pairs, brute_force

    problem = ss.synthetic_layer("correlated", 6, 96, seed=3)
    start = ss.solve(problem, ss.Wanda()).mask
    ours = ss.OneSwap(2, tolerance=0.0, search="best").run(problem, start, ss.Budget())
    assert bool((ours.stats["swaps"] == 2).all())
    assert torch.equal(brute_force(problem, start, 2, best_pairs), ours.mask)


def test_stages_of_a_block_are_extrapolated_to_the_model(bench: Any) -> None:
    from acceptance import whole

    text = (
        "A model\n\n704 of 704 rows certified, error 0.5\n\n| stage | seconds | host, GB |\n|---|---:|---:|\n"
        "| load | 10.0 | 1.0 | – |\n| search | 1.5 | 1.0 | – |\n| calibrate | 0.5 | 1.0 | – |\n"
        "| save | 2.0 | 1.0 | – |\n| all | 14.0 | 1.0 | – |\n"
    )
    whole.report(bench, "default", text)
    whole.report(bench, "default,metric", text)
    found = {row.name: row.value for row in bench.rows}
    assert found["default, 32 blocks, 128 windows, extrapolated, search"] == 32 * 1.5
    files = 12 * 16.06 / 2.54
    total = 32 * 1.5 + 32 * 0.5 * 8 + files
    assert found["default, 32 blocks, 128 windows, extrapolated, all"] == pytest.approx(total)
    assert not any("extrapolated" in name for name in found if "metric" in name)
    assert not bench.failed


def test_runs_that_the_limit_cut_off_are_told(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acceptance import whole
    from acceptance.bench import Stage

    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nprint('# one\\n\\n3 of 4 rows certified\\n\\n| load | 1.0 |\\n| search | 1.0 |\\n"
        "| calibrate | 1.0 |', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(whole, "SCRIPT", script)
    bench.run(Stage("end to end", 3, whole.end_to_end))
    assert [(row.name, row.measured) for row in bench.failed] == [
        ("plain, rows certified", "3 of 4"),
        ("end to end, default", "it stopped after 3 s"),
        ("end to end, default,metric", "it stopped after 3 s"),
    ]
