"""Run a study: claim units, run them in parallel, write each result, go on after any interruption."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..records.study import PlannedUnit, UnitResult
from ..records.study_database import StudyDatabase, process_id
from .cluster import Workers, run_unordered, workers
from .plan import CostEstimate, estimate_cost, plan_summary, plan_units
from .problems import extract
from .schema import Study, load_study
from .supervisor import close_child, run_unit

CACHE_SUFFIX = ".instances"


@dataclass(frozen=True)
class StudyPlan:
    """What a study would do.

    Attributes:
        units: work units in order; summary: (source, solver label, units).
        done: units that the record already holds, failed ones included.
        cost: of the rest.
    """

    units: tuple[PlannedUnit, ...]
    summary: tuple[tuple[str, str, int], ...]
    done: int
    cost: CostEstimate


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is.

    Attributes:
        done, failed, total: units; failed ones are not among the done.
        seconds: since the start; seconds_left: expected.
        label: solver of the unit that was just finished; failure: its reason if it failed.
    """

    done: int
    failed: int
    total: int
    seconds: float
    seconds_left: float
    label: str
    failure: str


@dataclass(frozen=True)
class StudyOutcome:
    """What a call of ``run_study`` did.

    Attributes:
        database: the record; ran: units that this call ran; done, failed: of the study, in all.
        elsewhere: units that another process has claimed.
    """

    database: Path
    ran: int
    done: int
    failed: int
    elsewhere: int


def plan_study(
    study: Study | str | os.PathLike[str], database: str | os.PathLike[str] | None = None, jobs: int = 1
) -> StudyPlan:
    """The work units of a study and what they will cost; computes and writes nothing.

    Args:
        study: a study or its file.
        database: record whose finished units are left out, if it exists.
        jobs: processes.

    Raises:
        InputError: for a study that cannot be run.
    """
    study = study if isinstance(study, Study) else load_study(study)
    units = plan_units(study)
    finished: set[str] = set()
    means: dict[str, float] = {}
    if database is not None and Path(database).is_file():
        with StudyDatabase(database) as record:
            finished, means = record.finished(), record.mean_seconds()
    left = [unit for unit in units if unit.unit not in finished]
    return StudyPlan(
        tuple(units), tuple(plan_summary(units)), len(units) - len(left), estimate_cost(left, means, jobs)
    )


def run_study(
    study: Study | str | os.PathLike[str],
    database: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    backend: str = "loky",
    cluster: str | None = None,
    retry_failed: bool = False,
    progress: Callable[[StudyProgress], None] | None = None,
) -> StudyOutcome:
    """Run what is left of a study; units that the record holds are not repeated.

    Several processes may run the same study on the same record at the same time.

    Args:
        study: a study or its file.
        database: the record; extracted layers are kept beside it.
        jobs: units at a time, by default one per processor, on a cluster one per thread of its workers.
        backend: of joblib: ``loky`` (processes), ``threading``, ``sequential``, ``dask``, ``ray``, or one
            that was registered with ``joblib.register_parallel_backend`` (see ``study.cluster``).
        cluster: address of a running Dask or Ray cluster; without one a local cluster is started. On other
            machines the record's folder must be reachable under the same path.
        retry_failed: run failed units again.
        progress: called after every unit.

    Raises:
        InputError: for a study that cannot be run, or a cluster that does not answer.
        SolverNotInstalledError: if the library of the backend is missing.
    """
    study = study if isinstance(study, Study) else load_study(study)
    units = plan_units(study)
    path = Path(database)
    # workers elsewhere do not share this process's current folder
    cache = path.resolve().with_name(path.name + CACHE_SUFFIX)
    if cache.exists() and not cache.is_dir():
        raise InputError(f"extracted layers {cache}: expected a directory, found a file")
    with workers(backend, jobs, cluster) as pool, StudyDatabase(path) as record:
        facts = {
            "name": study.name, "title": study.title, "description": study.description,
            "units": len(units), "memory_mb": study.memory_mb,
        }  # fmt: skip
        record.release_lost()
        if retry_failed:
            record.retry_failed([study.name])
        record.add_plan(study.name, facts, units)
        former = record.finished_beside(study.name, [unit.unit for unit in units])
        if former:
            warnings.warn(
                f"record {path}: {former} finished units are those of the study before its file, models or "
                "texts were changed; reports show them too, a new record would not",
                stacklevel=2,
            )
        job = _Run(study, units, record, cache, pool, progress)
        ran = job.run()
        counts = record.counts([study.name])
    return StudyOutcome(path, ran, counts["done"], counts["failed"], counts["claimed"])


@dataclass(eq=False)
class _Run:
    """One call of ``run_study``."""

    study: Study
    units: list[PlannedUnit]
    record: StudyDatabase
    cache: Path
    workers: Workers
    progress: Callable[[StudyProgress], None] | None

    def run(self) -> int:
        """Run until nothing is left to claim; returns how many units."""
        self._extract()
        owner = process_id()
        clock = _Clock(self.record, self.study.name)
        ran = 0
        calls = (
            (unit.unit, unit.study, unit.spec, str(self.cache), unit.limit, self.workers.threads)
            for unit in self._claims(owner)
        )
        try:
            results = run_unordered(self.workers, run_unit, calls)
            for result in results:
                self.record.finish(result)
                ran += 1
                self._report(result, clock)
        finally:
            self.record.release(owner)
            close_child()
        return ran

    def _extract(self) -> None:
        """Extract the layers that the units still need."""
        finished = self.record.finished()
        for unit in self.units:
            problem = unit.spec.get("problem", {})
            if unit.unit not in finished and problem.get("kind") == "model":
                extract(problem, unit.spec["seed"], self.study.folder, self.cache)

    def _claims(self, owner: str) -> Iterator[PlannedUnit]:
        """Units in order, each claimed when the pool asks for it."""
        while (unit := self.record.claim([self.study.name], owner)) is not None:
            # where this process stands, not where the plan was written
            yield replace(unit, spec={**unit.spec, "folder": str(self.study.folder.resolve())})

    def _report(self, result: UnitResult, clock: _Clock) -> None:
        if self.progress is None:
            return
        clock.add(result)
        self.progress(
            StudyProgress(
                clock.done,
                clock.failed,
                clock.total,
                time.perf_counter() - clock.begin,
                clock.seconds_left() / self.workers.jobs,
                result.record.label,
                result.record.failure,
            )
        )


class _Clock:
    """How far a study is and what is left, kept up to date unit by unit.

    Args:
        record: where the counts start from; other processes' units are noticed at the next start.
        study: name of the study.
    """

    def __init__(self, record: StudyDatabase, study: str) -> None:
        self.begin = time.perf_counter()
        counts = record.counts([study])
        self.done, self.failed, self.total = counts["done"], counts["failed"], sum(counts.values())
        self._left = record.unfinished_labels([study])
        self._means = {label: (mean, 1) for label, mean in record.mean_seconds().items()}

    def add(self, result: UnitResult) -> None:
        """One more unit is finished."""
        unit = result.record
        self.done += not unit.failure
        self.failed += bool(unit.failure)
        self._left[unit.label] -= 1
        mean, count = self._means.get(unit.label, (0.0, 0))
        self._means[unit.label] = ((mean * count + unit.seconds) / (count + 1), count + 1)

    def seconds_left(self) -> float:
        """Expected seconds of what is left, one unit at a time."""
        means = {label: mean for label, (mean, _) in self._means.items()}
        overall = sum(means.values()) / len(means) if means else 0.0
        return sum(max(count, 0) * means.get(label, overall) for label, count in self._left.items())
