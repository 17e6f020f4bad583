"""What chooses units, by name, as texts of runs, studies and the command line have it."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import InputError
from ..registry import SOLVERS, built, named_text, parse_solver, solver_text
from .base import UnitSolver
from .masked import UnitMasks

# In front of a solver of masks: a bias absorbs the mean of what is pruned.
CENTRED = "centred:"


def unit_solvers() -> dict[str, type[UnitSolver]]:
    """Every solver of units by its name; those of masks choose units too (see ``UnitMasks``)."""
    found = {kind.name: kind for kind in _below(UnitSolver) if kind is not UnitMasks}  # type: ignore[type-abstract]
    return dict(sorted(found.items()))


def _below(kind: type[UnitSolver]) -> Iterator[type[UnitSolver]]:
    for each in kind.__subclasses__():
        if "name" in vars(each):
            yield each
        yield from _below(each)


def parse_unit_solver(text: str) -> UnitSolver:
    """A solver of units from ``name`` or ``name:option=value``; or any solver of masks, for their row.

    Raises:
        InputError: for an unknown solver or option, or a value of another type.
    """
    name, _, rest = text.strip().partition(":")
    known = unit_solvers()
    if name in known:
        return built(known[name], rest)
    if text.strip().startswith(CENTRED):
        return UnitMasks(parse_solver(rest), centred=True)
    if name.partition("+")[0] not in SOLVERS:
        raise InputError(
            f"unknown solver of units: expected one of {', '.join(known)}, or a solver of masks such as "
            f"branch-and-bound, found {name!r}"
        )
    return UnitMasks(parse_solver(text))


def unit_solver_text(solver: UnitSolver) -> str:
    """What ``parse_unit_solver`` reads as ``solver``."""
    if isinstance(solver, UnitMasks):
        return (CENTRED if solver.centred else "") + solver_text(solver.solver)
    return named_text(solver)
