"""Processes that run from the checkout where the package and its optional libraries are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hidden_libraries import hiding

ROOT = Path(__file__).resolve().parents[1]
# all but what the acceptance of the CUDA path says it needs
HIDDEN = (
    "cvxpy", "datasets", "distributed", "gguf", "gurobipy", "highspy", "lm_eval", "matplotlib", "pyarrow",
    "pyscipopt", "ray",
)  # fmt: skip
# runs before anything else in every Python that finds it, child processes included
SITE = f"""{hiding(HIDDEN)}
from importlib import metadata
of = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.replace("-", "_") in (*hidden, "sparseswaps"):
        raise metadata.PackageNotFoundError(name)
    return of(cls, name)

metadata.Distribution.from_name = classmethod(from_name)
"""


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with ``words`` in such a process; ``folder`` is for a file of its own."""
    (folder / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
