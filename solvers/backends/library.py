"""What the exact solvers of other libraries share: thinning before, checking and rescaling after.

A row loses the variables that one eigenvalue fixes and is rescaled so that a good mask costs about 100
(`bounds.presolve.thinned`), because every library has absolute tolerances. What a library claims is never
used as it is: its point counts if it is allowed and better in float64, its bound less its tolerances and
never above the cost of what thinning excluded.
"""

from __future__ import annotations

import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ...problems.row_program import BoolArray, RowProgram
from ..base import Status
from ..bounds.convex_split import EPSILON, ROUNDING_FACTOR
from ..bounds.presolve import descended, thinned
from ..row_wise import RowResult, RowSolver, better
from .factored import settled


class Claim(NamedTuple):
    """What a library says about a rescaled program.

    Attributes:
        point: best allowed selection (n,).
        lower: its dual bound less its tolerances, -inf for none.
        status: why it stopped.
        nodes: nodes of its tree.
    """

    point: BoolArray
    lower: float
    status: Status
    nodes: float


@dataclass(frozen=True)
class LibrarySolver(RowSolver):
    """An exact solver of another library. Concrete solvers are final frozen dataclasses.

    Args:
        seed: of the library.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**31:  # what the libraries' own options hold
            raise InputError(f"seed of {self.name}: expected 0 to {2**31 - 1}, found {self.seed}")

    @abstractmethod
    def claim(self, program: RowProgram, start: BoolArray, deadline: float) -> Claim:
        """Solve one rescaled program (n > 0) from the allowed selection ``start`` (n,)."""

    def solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        """Thin out the row, ask the library, and check what it says."""
        point = descended(program, start)
        if program.objective(point) <= ROUNDING_FACTOR * EPSILON * program.size * program.magnitude:
            # 0 up to rounding, which no tolerance of a library resolves
            return RowResult(better(program, point, start), 0.0, Status.FINISHED, {"nodes": 0.0})
        reduced, inner, threshold = thinned(program, start)
        scaled = reduced.program
        if scaled.size == 0:
            return settled(program, reduced, start, threshold)
        with off_standard_output():
            claim = self.claim(scaled, inner, deadline)
        return RowResult(
            better(program, reduced.expand(claim.point), start),
            float(np.nextafter(max(0.0, min(claim.lower, threshold)) * scaled.unit, 0.0)),
            claim.status,
            {"nodes": claim.nodes},
        )


class _StandardOutput:
    """Standard output of the process, turned to standard error while anybody wants that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._kept = -1

    def turn(self) -> None:
        """Turn it, if nobody has."""
        with self._lock:
            if self._wanted == 0:
                sys.stdout.flush()
                self._kept = os.dup(1)
                os.dup2(2, 1)
            self._wanted += 1

    def turn_back(self) -> None:
        """Turn it back, if nobody else wants it turned."""
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                os.dup2(self._kept, 1)
                os.close(self._kept)


_STANDARD_OUTPUT = _StandardOutput()


@contextmanager
def off_standard_output() -> Iterator[None]:
    """What a library writes to standard output past Python, as HiGHS its licence, goes to standard error."""
    try:
        _STANDARD_OUTPUT.turn()
    except OSError:  # a process without standard output or error
        yield
        return
    try:
        yield
    finally:
        _STANDARD_OUTPUT.turn_back()
