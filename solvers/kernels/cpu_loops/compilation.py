"""How the loops are compiled, and a cache on disk that notices a change in any of their files.

numba compares the cache of a function with the file of that function only, but compiled code contains
every function that it calls and every constant that it reads: once an imported file has changed, numba runs
stale code without a word. Here the cache of every loop belongs to all files of this folder and to the
constants of ``scaling``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit

# Without NaNs and signed zeros LLVM vectorises minima; sums keep their order, so results are repeatable.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz", "contract"},
}
HERE = Path(__file__).parent
SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in (*sorted(HERE.glob("*.py")), *HERE.parent.glob("scaling.py")))
).hexdigest()

Array = np.ndarray[Any, Any]
Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """``loop`` compiled at its first call, or loaded if ``SOURCES`` are those it was compiled from."""
    cached: Loop = njit(**OPTIONS, cache=True)(loop)
    index: Any = getattr(getattr(cached, "_cache", None), "_cache_file", None)
    if hasattr(index, "_source_stamp"):
        index._source_stamp = SOURCES
        return cached
    # a numba that keeps its stamp elsewhere: no cache rather than a stale one
    uncached: Loop = njit(**OPTIONS)(loop)
    return uncached
