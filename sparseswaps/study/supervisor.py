"""Run work units in a process that can be killed: limits hold for native code too.

A solver deep inside native code answers neither signals nor exceptions, and its memory is not
Python's. So a unit runs in a child process (``study.child``), whose resident memory and time are
watched from here; beyond a limit it is killed, and the next unit gets a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records.study import UnitResult
from .execute import failed, from_json

# Seconds between two looks at a unit's memory.
POLL = 0.02
# Seconds in which a child must have imported what it needs, on a machine that does other things too.
START_LIMIT = 600.0
# Characters of standard error that a failure quotes.
QUOTE = 300


class _Killed(Exception):  # noqa: N818  (control flow, not an error)
    """The child was killed or died: status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Child:
    """One child process.

    Args:
        threads: threads that its libraries may use.
    """

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            environment[name] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparseswaps.study.child", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._buffer = b""
        self.peak_mb = 0.0
        self._answer(START_LIMIT, 0.0)

    @property
    def alive(self) -> bool:
        """Whether it can take another unit."""
        return self._process.poll() is None

    def ask(self, job: Mapping[str, Any], seconds: float, memory_mb: float) -> str:
        """Send a unit and wait for the line that answers it.

        Raises:
            _Killed: if a limit was passed or the process died.
        """
        line = json.dumps(job) + "\n"
        try:
            self._stdin.write(line.encode())
            self._stdin.flush()
        except OSError as error:
            raise _Killed("crashed", f"the solver's process is gone: {error}") from error
        return self._answer(seconds, memory_mb)

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def _answer(self, seconds: float, memory_mb: float) -> str:
        output: Any = self._process.stdout
        deadline = time.monotonic() + seconds
        self.peak_mb = 0.0
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([output], [], [], POLL)
            if ready:
                chunk = os.read(output.fileno(), 1 << 16)
                if not chunk:
                    raise _Killed("crashed", self._obituary())
                self._buffer += chunk
            if memory_mb:
                self.peak_mb = max(self.peak_mb, resident_mb(self._process.pid))
                if self.peak_mb > memory_mb:
                    self.kill()
                    raise _Killed(
                        "memory_limit",
                        f"memory limit: expected at most {memory_mb:g} MB, found {self.peak_mb:.0f} MB",
                    )
            if time.monotonic() > deadline:
                self.kill()
                raise _Killed("time_limit", f"time limit: expected at most {seconds:g} s, found no end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _obituary(self) -> str:
        code = self._process.wait()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - QUOTE))
        last = " ".join(self._errors.read().decode(errors="replace").split())
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the solver's process ended with {how}" + (f": {last}" if last else "")

    def kill(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


_children = threading.local()


def run_unit(
    unit: str, study: str, spec: Mapping[str, Any], cache: str, limit: float, threads: int
) -> UnitResult:
    """Run one unit under its limits; never raises for anything that the unit does.

    Args:
        unit: id.
        study: name of its study.
        spec: from the plan.
        cache: folder of extracted instance files.
        limit: seconds after which it is killed.
        threads: threads of its libraries.
    """
    begin = time.perf_counter()
    child: Child | None = None
    try:
        child = _child(threads)
        begin = time.perf_counter()
        job = {"unit": unit, "study": study, "spec": dict(spec), "cache": cache}
        answer = child.ask(job, limit, spec["memory_mb"])
    except _Killed as end:
        seconds = time.perf_counter() - begin
        peak = 0.0 if child is None else child.peak_mb
        close_child()
        return failed(unit, study, spec, end.status, str(end), seconds, peak)
    if answer.startswith('{"error"'):
        seconds = time.perf_counter() - begin
        return failed(unit, study, spec, "error", json.loads(answer)["error"], seconds, child.peak_mb)
    return from_json(answer)


def _child(threads: int) -> Child:
    """The child of this thread, a new one if there is none alive."""
    child: Child | None = getattr(_children, "child", None)
    if child is None or not child.alive:
        child = Child(threads)
        _children.child = child
    return child


def close_child() -> None:
    """End this thread's child."""
    child: Child | None = getattr(_children, "child", None)
    if child is not None:
        child.kill()
        _children.child = None


def resident_mb(process: int) -> float:
    """Resident memory of a process in 10⁶ bytes, 0 if it is gone."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        pass
    found = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=False
    )
    return int(found.stdout or 0) * 1024 / 1e6
