"""The names under which the command line knows the solvers."""

from __future__ import annotations

from ..errors import InputError
from .base import Solver
from .enumeration import Enumeration
from .one_swap import OneSwap
from .scores import RIA, Magnitude, Random, Wanda

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver for solver in (Random, Magnitude, Wanda, RIA, OneSwap, Enumeration)
}


def solver_class(name: str) -> type[Solver]:
    """The solver called ``name``.

    Raises:
        InputError: if there is none.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver: expected one of {', '.join(SOLVERS)}, found {name!r}")
    return SOLVERS[name]
