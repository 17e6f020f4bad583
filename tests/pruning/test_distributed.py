"""Several processes prune a model as one does, bit for bit, and fail cleanly when one is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import processes
import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.evaluation import measures as evaluation
from sparseswaps.masks.file import load_masks
from sparseswaps.pruning.report import PruneReport
from sparseswaps.pruning.run import prune
from sparseswaps.pruning.settings import Mode
from sparseswaps.pruning.shared_rows import first_alone
from sparseswaps.ranks import Ranks
from sparseswaps.records.run import LayerRecord

ARGUMENTS = {"samples": 12, "length": 32}


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, tiny_models.tokens(2000).numpy())
    return path


def same_masks(one: Path, other: Path) -> bool:
    a, b = load_masks(one), load_masks(other)
    assert a.masks.keys() == b.masks.keys()
    return all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)


def without_seconds(report: PruneReport) -> list[LayerRecord]:
    from dataclasses import replace

    return [replace(layer, seconds=0.0) for layer in report.layers]


@final
@dataclass(frozen=True)
class RowBySize(ss.Solver):
    """A solver of somebody else: says nothing of what it covers, so its rows stand alone."""

    name: ClassVar[str] = "row-by-size"
    group: ClassVar[ss.Group] = ss.Group.LOCAL_SEARCH

    most: int = 10**9

    def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, budget: ss.Budget) -> ss.Outcome:
        if problem.rows > self.most:
            raise ss.InputError(f"expected at most {self.most} rows, found {problem.rows}")
        scores = problem.weight.abs() + (0 if init is None else init) * 0.1
        return ss.Outcome(problem.pattern.top_k(scores), ss.Status.FINISHED)


# what keeps the rows of a layer with the first process is said in one line (tested below)
@pytest.mark.filterwarnings("ignore:layers are solved by the first process alone")
@pytest.mark.parametrize(
    ("count", "family", "options"),
    [
        (2, "llama", {}),
        (3, "t5", {}),
        (4, "llama", {"mode": Mode.ONE_SHOT, "pattern": "2:4", "start": ss.RIA(), "solver": ss.Tabu()}),
        (4, "llama", {"objective": "drift=0.5,residual=0.5", "update": ss.Reconstruction()}),
        (2, "llama", {"objective": "drift=auto,metric", "refine": 1}),
        (2, "llama", {"pattern": "layer:0.5"}),
        (2, "llama", {"objective": "held_out=0.2", "allocation": "owl"}),
        (2, "mixtral", {"solver": ss.RIA()}),
        (3, "llama", {"offload": True}),
        (2, "bert", {}),
        (2, "llama", {"solver": RowBySize()}),
        (2, "llama", {"solver": ss.IteratedLocalSearch(kicks=3), "include": ("*.0.*",)}),
        (2, "llama", {"solver": ss.Enumeration(), "pattern": "1:4", "include": ("*q_proj",)}),
        (3, "llama", {"solver": ss.Chain(ss.OneSwap(), ss.Reconstruction())}),
        (2, "llama", {"solver": ss.Chain(ss.RIA(), ss.Tabu()), "objective": "plain"}),
    ],
    ids=[
        "plain",
        "two-stacks",
        "one-shot",
        "drift",
        "coupled",
        "budget",
        "held-out",
        "experts",
        "offloaded",
        "encoder",
        "new-solver",
        "iterated",
        "enumeration",
        "updated-chain",
        "chain",
    ],
)
def test_processes_choose_the_masks_of_one(
    count: int,
    family: str,
    options: dict,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 64)  # three batches, the last of one window
    options = {"evaluation": token_file, "evaluation_limit": 5, **ARGUMENTS, **options}
    dense = tiny_models.save(family, tmp_path / "dense")
    alone = prune(dense, calibration=token_file, out=tmp_path / "alone", **options)

    def work(ranks: Ranks) -> PruneReport:
        return prune(dense, calibration=token_file, out=tmp_path / "many", ranks=ranks, **options)

    children = processes.start_ranks(count, work, tmp_path / "results")
    codes = [processes.wait(child) for child in children]
    reports = processes.results(tmp_path / "results", range(count))
    assert codes == [0] * count, reports
    assert same_masks(tmp_path / "alone", tmp_path / "many")
    for report in reports:
        assert without_seconds(report) == without_seconds(reports[0])
        for one, other in zip(alone.layers, report.layers, strict=True):
            assert (one.tokens, one.swaps, one.status) == (other.tokens, other.swaps, other.status)
            # sums over rows that different processes have made: rounding of float64
            assert one.error == pytest.approx(other.error, rel=1e-12)
            assert one.held_out_error == pytest.approx(other.held_out_error, rel=1e-12)
        assert report.perplexity_pruned == alone.perplexity_pruned
        assert report.cosine == alone.cosine


# Half of the widest layer's rows: nobody who may share may see more.
HALF = RowBySize(most=12)


@pytest.mark.parametrize(
    "solver", [HALF, ss.Chain(HALF, HALF), ss.Chain(ss.Wanda(), HALF)], ids=["alone", "chain", "from-score"]
)
def test_rows_are_shared_whatever_the_solver(solver: ss.Solver, token_file: Path, tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    options = {"calibration": token_file, "solver": solver, "include": ("*q_proj", "*gate_proj"), **ARGUMENTS}

    def work(ranks: Ranks) -> PruneReport:
        return prune(dense, ranks=ranks, **options)

    children = processes.start_ranks(2, work, tmp_path / "results")
    codes = [processes.wait(child) for child in children]
    assert codes == [0, 0], processes.results(tmp_path / "results", range(2))
    with pytest.raises(ss.InputError, match="expected at most 12 rows, found 16"):
        prune(dense, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"solver": ss.SparseGPT()}, "sparsegpt looks at whole layers"),
        ({"solver": ss.Chain(ss.OneSwap(), ss.Reconstruction())}, "reconstruction looks at whole layers"),
        ({"objective": "metric"}, "an output metric couples the rows of a layer"),
        ({"objective": "held_out=0.25"}, "a held-out stop looks at whole layers"),
        ({"pattern": "layer:0.5"}, "is one budget for all rows of a layer"),
        ({}, None),
        ({"solver": ss.Chain(ss.Greedy(), ss.OneSwap())}, None),
        ({"solver": ss.RIA()}, None),
    ],
)
def test_one_line_says_who_works_alone(options: dict, reason: str | None) -> None:
    settings = ss.PruneSettings(**options)
    pattern = settings.pattern.at(16)
    found = first_alone(pattern, settings.solver, settings.objective.metric, settings.objective.held_out > 0)
    assert found is None if reason is None else reason in str(found)


class Dying:
    """Ends its process after some layers."""

    def __init__(self, layers: int) -> None:
        self.left = layers

    def stage(self, text: str, done: int, total: int) -> None: ...

    def layer_started(self, name: str) -> None: ...

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_rank_fails_the_run_and_resume_goes_on(token_file: Path, tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    prune(dense, calibration=token_file, out=tmp_path / "alone", **ARGUMENTS)

    def work(ranks: Ranks) -> PruneReport:
        progress = Dying(5) if ranks.first else None
        return prune(
            dense, calibration=token_file, out=tmp_path / "many", ranks=ranks, progress=progress, **ARGUMENTS
        )

    first, second = processes.start_ranks(2, work, tmp_path / "results")
    assert processes.wait(first) == -signal.SIGKILL
    assert processes.wait(second) == 1
    (error,) = processes.results(tmp_path / "results", [1])
    assert isinstance(error, ss.errors.RankLostError)
    assert "expected all of them to answer, found one lost" in str(error)
    report = prune(dense, calibration=token_file, out=tmp_path / "many", resume=True, **ARGUMENTS)
    assert same_masks(tmp_path / "alone", tmp_path / "many")
    assert len(report.layers) == 14


def test_an_error_of_one_rank_is_that_of_all(token_file: Path, tmp_path: Path) -> None:
    """NaN in the activations of the second process's windows only."""
    dense = tiny_models.save("llama", tmp_path / "dense")
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
    model.save_pretrained(dense)
    tokens = tiny_models.tokens(8 * 32).view(8, 32)
    tokens[2, 5] = 3
    np.save(tmp_path / "bad.npy", tokens.numpy())

    def work(ranks: Ranks) -> PruneReport:
        return prune(
            dense, calibration=tmp_path / "bad.npy", out=tmp_path / "many", ranks=ranks, samples=8, length=32
        )

    for child in processes.start_ranks(2, work, tmp_path / "results"):
        assert processes.wait(child) == 1
    errors = processes.results(tmp_path / "results", range(2))
    assert [type(error) for error in errors] == [ss.InvalidModelError] * 2
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "inputs of layer model.layers.0.self_attn.q_proj" in str(errors[0])


def test_torchrun(token_file: Path, tmp_path: Path) -> None:
    dense = tiny_models.save("llama", tmp_path / "dense")
    prune(dense, calibration=token_file, out=tmp_path / "alone", **ARGUMENTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(processes.free_port()), "-m", "sparseswaps", "prune", str(dense)]
    command += ["--calibration", str(token_file), "--samples", "12", "--length", "32", "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "many")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 14
    assert same_masks(tmp_path / "alone", tmp_path / "many")
