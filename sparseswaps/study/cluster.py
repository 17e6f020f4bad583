"""Where the work units of a study run: processes of this machine, or a Dask or Ray cluster.

A backend is chosen by name. ``loky`` (processes), ``threading`` and ``sequential`` are joblib's own. ``dask``
and ``ray`` need a cluster: one that runs already, by its address, or a local one that is started here and
ends with the study. On other machines the folder of the record must be reachable under the same path,
because layers of models are read from the instance files beside it.

Results do not depend on where units run: each runs in a child process of its worker (``supervisor``), and
only the process that started the study writes the record.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import InputError, SolverNotInstalledError

Result = TypeVar("Result")

# Library behind each backend that joblib does not bring itself.
LIBRARIES = {"dask": "distributed", "ray": "ray"}
# Seconds in which a scheduler must answer.
CONNECT_SECONDS = 20.0


@dataclass(frozen=True)
class Workers:
    """Where units run.

    Attributes:
        backend: for joblib; jobs: units at a time; threads: threads that the libraries of each unit may use.
    """

    backend: str
    jobs: int
    threads: int


@contextmanager
def workers(backend: str, jobs: int | None, address: str | None) -> Iterator[Workers]:
    """Make sure that ``backend`` has somewhere to run, for as long as the context lasts.

    Args:
        backend: name of a joblib backend.
        jobs: units at a time; by default one per processor, on a cluster one per thread of its workers.
        address: of a running cluster, such as ``tcp://host:8786`` (Dask) or ``host:6379`` (Ray); None starts
            a local one, or uses the Dask client of this process.

    Raises:
        SolverNotInstalledError: if the library of the backend is missing.
        InputError: if the cluster does not answer, has no workers, or the backend has no clusters.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs counts work units at a time: expected at least 1, found {jobs}")
    library = LIBRARIES.get(backend)
    if address is not None and library is None:
        raise InputError(f"cluster {address}: expected the backend dask or ray, found {backend}")
    if library is not None and importlib.util.find_spec(library) is None:
        raise SolverNotInstalledError(
            f"backend {backend} needs {library}: expected it to be installed, found none; "
            f"run pip install 'sparseswaps[{backend}]'"
        )
    if backend == "dask":
        with _dask(jobs, address) as found:
            yield found
    elif backend == "ray":
        with _ray(jobs, address) as found:
            yield found
    else:
        _check_backend(backend)
        yield _local(backend, jobs)


def _check_backend(backend: str) -> None:
    from joblib import parallel_config

    try:
        with parallel_config(backend=backend):
            pass
    except ValueError as error:
        raise InputError(
            f"backend of joblib: expected loky, threading, sequential, dask, ray or one that was registered, "
            f"found {backend!r}"
        ) from error


def run_unordered(
    pool: Workers, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]
) -> Iterator[Result]:
    """Results of ``function`` in the order in which they come; a call is asked for when a worker is free.

    Args:
        pool: from ``workers``.
        function: importable on the workers.
        calls: positional arguments of each call.
    """
    if pool.backend == "ray":
        return _run_on_ray(pool, function, calls)
    from joblib import Parallel, delayed, parallel_config

    # joblib knows the backends of other libraries by name only here
    with parallel_config(backend=pool.backend):
        parallel = Parallel(
            n_jobs=pool.jobs,
            return_as="generator_unordered" if pool.backend != "sequential" else "generator",
            pre_dispatch=pool.jobs,
            batch_size=1,
        )
    results: Iterator[Result] = parallel(delayed(function)(*call) for call in calls)
    return results


def _run_on_ray(
    pool: Workers, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]
) -> Iterator[Result]:
    """The same on Ray, whose joblib backend gives no result before the last."""
    import ray

    remote = ray.remote(num_cpus=1)(function)
    waiting: list[Any] = []
    left = iter(calls)
    while True:
        while len(waiting) < pool.jobs and (call := next(left, None)) is not None:
            waiting.append(remote.remote(*call))
        if not waiting:
            return
        done, waiting = ray.wait(waiting)
        yield ray.get(done[0])


def _local(backend: str, jobs: int | None) -> Workers:
    processors = os.cpu_count() or 1
    count = processors if jobs is None else jobs
    return Workers(backend, count, max(1, processors // count))


@contextmanager
def _dask(jobs: int | None, address: str | None) -> Iterator[Workers]:
    from distributed import Client, LocalCluster, get_client

    if address is not None:
        try:
            client = Client(address, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cluster {address}: expected a Dask scheduler that answers, found {type(error).__name__}"
            ) from error
        with client:
            yield _slots("dask", client, jobs, address)
        return
    try:
        present = get_client()
    except ValueError:
        local = _local("dask", jobs)
        # no dashboard: nothing listens on a port that somebody else may use
        with (
            LocalCluster(
                n_workers=local.jobs, threads_per_worker=1, processes=True, dashboard_address=None
            ) as cluster,
            Client(cluster),
        ):
            yield local
    else:
        yield _slots("dask", present, jobs, "of this process")


def _slots(backend: str, client: Any, jobs: int | None, address: str) -> Workers:
    """Units at a time on a running Dask cluster; each takes one thread of a worker."""
    threads = sum(client.ncores().values())
    if not threads:
        raise InputError(f"cluster {address}: expected at least one worker, found none")
    return Workers(backend, threads if jobs is None else min(jobs, threads), 1)


@contextmanager
def _ray(jobs: int | None, address: str | None) -> Iterator[Workers]:
    # without a word from the user nothing is told to anybody
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started = not ray.is_initialized()
    local = _local("ray", jobs)
    if started and address is not None:
        try:
            ray.init(address=address, logging_level="warning")
        except (ConnectionError, ValueError) as error:
            raise InputError(
                f"cluster {address}: expected a Ray cluster that answers, found {error}"
            ) from error
    elif started:
        ray.init(num_cpus=local.jobs, include_dashboard=False, logging_level="warning")
    try:
        processors = int(ray.cluster_resources().get("CPU", 0))
        if not processors:
            raise InputError(f"cluster {address}: expected at least one worker, found none")
        yield Workers("ray", processors if jobs is None else min(jobs, processors), local.threads)
    finally:
        if started:
            ray.shutdown()
