"""How layer problems are solved: one algorithm per file, named as its paper names it."""

import warnings

from .base import Budget, Covers, Group, Outcome, Solution, Solver, Status, TracePoint, solve
from .bounding import LayerBound, bound
from .compose import BestOf, Chain
from .registry import *  # noqa: F403  (every solver)
from .registry import SOLVERS
from .row_sweeps import RowSweeps
from .search.certificate import Certificate, certify
from .search.held_out_stop import HeldOutStop

__all__ = [
    *(kind.__name__ for kind in SOLVERS.values()),
    "SOLVERS",
    "BestOf",
    "Budget",
    "Certificate",
    "Chain",
    "Covers",
    "Group",
    "HeldOutStop",
    "LayerBound",
    "Outcome",
    "RowSweeps",
    "Solution",
    "Solver",
    "Status",
    "TracePoint",
    "bound",
    "certify",
    "solve",
]


def __getattr__(name: str) -> object:
    if name == "Sequence":
        warnings.warn("solvers.Sequence is called Chain now", FutureWarning, stacklevel=2)
        return Chain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
