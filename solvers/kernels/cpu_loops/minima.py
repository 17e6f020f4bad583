"""Minima over the columns of a row and over a line.

A *line* is the minimum of Δ(u, ·) or Δ(·, p) over one row of ``R``.
"""

from __future__ import annotations

from typing import Any

from numba.extending import intrinsic

from .compilation import Array, compiled

# Minima are taken over chunks of this many columns, then the index is looked up inside one chunk.
CHUNK = 128


def _lower(_context: Any, left: Any, right: Any) -> Any:
    """The smaller of two floats, marked as free of NaN so that LLVM vectorises minima over a loop."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered("<", *values, flags=flags), *values, flags=flags)

    return left(left, right), generate


lower: Any = intrinsic(_lower)


@compiled
def big_of(vector: Array) -> Any:
    """A value above every Δ that leaves room for updates, in the dtype of ``vector``."""
    if vector.itemsize == 4:
        return vector.dtype.type(1e30)
    return vector.dtype.type(1e290)


@compiled
def argmin(values: Array, first: int, last: int) -> int:
    """Lowest index of the minimum of ``values`` over [first, last)."""
    best = big_of(values)
    at = first
    for start in range(first, last, CHUNK):
        part = values[start : min(start + CHUNK, last)]
        low = part[0]
        for i in range(len(part)):
            low = lower(part[i], low)
        if low < best:
            best = low
            at = start
    for j in range(at, min(at + CHUNK, last)):
        if values[j] == best:
            return j
    return at


@compiled
def line_argmin(values: Array, delta: Array, correlation: Array, factor: Any, first: int, last: int) -> int:
    """Lowest index of the minimum of ``values_j + factor δ_j R_j`` over [first, last)."""
    best = big_of(values)
    at = first
    for start in range(first, last, CHUNK):
        stop = min(start + CHUNK, last)
        part, step, line = values[start:stop], delta[start:stop], correlation[start:stop]
        low = best
        for i in range(len(part)):
            low = lower(part[i] + (factor * step[i]) * line[i], low)
        if low < best:
            best = low
            at = start
    # the chunk's own minimum again, one by one: rounding may differ, the choice is repeatable
    best = big_of(values)
    index = at
    for j in range(at, min(at + CHUNK, last)):
        value = values[j] + (factor * delta[j]) * correlation[j]
        if value < best:
            best = value
            index = j
    return index


@compiled
def add_line_argmin(values: Array, delta: Array, correlation: Array, factor: Any) -> int:
    """Add ``factor δ_j R_j`` to ``values``; lowest index of the minimum of the result."""
    cols = len(values)
    best = big_of(values)
    at = 0
    for start in range(0, cols, CHUNK):
        stop = min(start + CHUNK, cols)
        part, step, line = values[start:stop], delta[start:stop], correlation[start:stop]
        low = best
        for i in range(len(part)):
            value = part[i] + (factor * step[i]) * line[i]
            part[i] = value
            low = lower(value, low)
        if low < best:
            best = low
            at = start
    for j in range(at, min(at + CHUNK, cols)):
        if values[j] == best:
            return j
    return at
