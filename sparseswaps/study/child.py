"""The process that runs work units one after another, and may be killed at any moment.

    python -m sparseswaps.study.child

Reads one JSON object per line from standard input, and writes one per line to what was standard
output; everything that solvers print goes to standard error. It dies with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve units until standard input ends."""
    _die_with_parent(int(sys.argv[1]))
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from .execute import execute, to_json  # imports torch, so it comes after the parent's watch

    results.write("ready\n")
    results.flush()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = to_json(execute(job["unit"], job["study"], job["spec"], Path(job["cache"])))
        except Exception as error:  # a unit may fail in any way; the reason is its result
            message = str(error).strip() or "no message"
            answer = json.dumps({"error": f"{type(error).__name__}: {message}"})
        results.write(answer + "\n")
        results.flush()


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, where it can be asked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the question
        raise SystemExit(1)


if __name__ == "__main__":
    main()
