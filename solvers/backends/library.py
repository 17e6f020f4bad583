"""What the exact solvers of other libraries share: thinning before, checking and rescaling after.

A row loses the variables that one eigenvalue fixes and is rescaled so that a good mask costs about 100
(`bounds.presolve.thinned`), because every library has absolute tolerances. What a library claims is never
used as it is: its point counts if it is allowed and better in float64, its bound less its tolerances and
never above the cost of what thinning excluded.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...problems.row_program import BoolArray, RowProgram
from ..base import Status
from ..bounds.presolve import thinned
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

    @abstractmethod
    def claim(self, program: RowProgram, start: BoolArray, deadline: float) -> Claim:
        """Solve one rescaled program (n > 0) from the allowed selection ``start`` (n,)."""

    def solve_row(self, program: RowProgram, start: BoolArray, deadline: float) -> RowResult:
        """Thin out the row, ask the library, and check what it says."""
        reduced, inner, threshold = thinned(program, start)
        scaled = reduced.program
        if scaled.size == 0:
            return settled(program, reduced, start, threshold)
        claim = self.claim(scaled, inner, deadline)
        return RowResult(
            better(program, reduced.expand(claim.point), start),
            float(np.nextafter(max(0.0, min(claim.lower, threshold)) * scaled.unit, 0.0)),
            claim.status,
            {"nodes": claim.nodes},
        )
