"""Processes for tests, forked from this one: libraries are imported and kernels compiled already."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparseswaps.ranks import Ranks


def start(work: Callable[[], Any], result: Path | None = None) -> int:
    """Fork a process that calls ``work`` and writes what it returns or raises; returns its id."""
    with warnings.catch_warnings():
        # safe here: one thread of torch, none of numba, and the child forks at once into its own work
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        found: Any
        try:
            found, code = work(), 0
        except Exception as error:
            found = error
            if result is None:
                traceback.print_exc()
        if result is not None:
            result.write_bytes(pickle.dumps(found))
    finally:
        os._exit(code)


def wait(child: int, seconds: float = 240) -> int:
    """Exit code of a child; 137 if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 137


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank(number: int, count: int, port: int, work: Callable[[Ranks], Any], seconds: float = 120) -> Any:
    """``work`` of one of ``count`` gloo processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=number,
        world_size=count,
        timeout=timedelta(seconds=seconds),
    )
    found = work(Ranks(number, count))
    dist.destroy_process_group()
    return found


def start_ranks(count: int, work: Callable[[Ranks], Any], folder: Path, seconds: float = 120) -> list[int]:
    """Ids of ``count`` gloo processes that call ``work``; what each returns is in ``folder``."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    return [
        start(lambda i=i: rank(i, count, port, work, seconds), folder / str(i))  # type: ignore[misc]
        for i in range(count)
    ]


def results(folder: Path, ranks: Iterable[int]) -> list[Any]:
    return [pickle.loads((folder / str(i)).read_bytes()) for i in ranks]
