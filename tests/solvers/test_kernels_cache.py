"""Compiled loops on disk: used again while nothing changed, never once any file of theirs has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
from numba.core import dispatcher

from sparseswaps.solvers.kernels.cpu_loops import compilation, descent, exchanges, greedy

OUTER = """
from ..scaling import FACTOR
from .compilation import compiled
from .inner import step

@compiled
def outer(x):
    return FACTOR * step(x)
"""
INNER = """
from .compilation import compiled

@compiled
def step(x):
    return x + 1.0
"""
CALL = """
from kernels.loops.outer import outer
print(outer(2.0), sum(outer.stats.cache_hits.values()))
"""


def call(folder: Path) -> tuple[float, int]:
    """What ``outer(2.0)`` returns in a process of its own, and how often it came from the cache."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    value, hits = done.stdout.split()
    return float(value), int(hits)


def test_a_change_of_any_file_is_noticed(tmp_path: Path) -> None:
    loops = tmp_path / "kernels" / "loops"
    loops.mkdir(parents=True)
    shutil.copy(Path(compilation.__file__), loops / "compilation.py")
    (loops / "outer.py").write_text(OUTER)
    inner, scaling = loops / "inner.py", loops.parent / "scaling.py"
    inner.write_text(INNER)
    scaling.write_text("FACTOR = 3.0\n")
    assert call(tmp_path) == (9.0, 0)
    assert call(tmp_path) == (9.0, 1)
    # as long as before: neither size nor the text of ``outer`` tells
    inner.write_text(INNER.replace("1.0", "2.0"))
    assert call(tmp_path) == (12.0, 0)
    scaling.write_text("FACTOR = 5.0\n")
    assert call(tmp_path) == (20.0, 0)
    assert call(tmp_path) == (20.0, 1)


def test_a_numba_with_another_stamp_caches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "FunctionCache", lambda function: dispatcher.NullCache())

    @compilation.compiled
    def double(x: float) -> float:
        return 2 * x

    assert double(2.0) == 4.0
    assert double.stats.cache_path is None


def test_every_loop_is_cached() -> None:
    entries = descent.descend_tile, descent.best_swaps_of_tile, greedy.prune_tile, exchanges.exchange_loop
    for loop in entries:
        assert loop.stats.cache_path is not None
