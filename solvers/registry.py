"""The solvers by name, as texts of runs, studies and the command line have them.

A solver is here, and in ``sparseswaps`` and ``sparseswaps.solvers``, by its one line of import.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing

from ..errors import InputError
from .base import Group, Solver
from .bounds import CorrEigenvalue as CorrEigenvalue
from .bounds import Dnn as Dnn
from .bounds import FrankWolfe as FrankWolfe
from .bounds import Naive as Naive
from .bounds import Qcr as Qcr
from .bounds import RowSplit as RowSplit
from .bounds import Sdp as Sdp
from .bounds import SharedSplit as SharedSplit
from .compose import Chain
from .exact.branch_and_bound import BranchAndBound as BranchAndBound
from .exact.enumeration import Enumeration as Enumeration
from .exact.gurobi import Gurobi as Gurobi
from .exact.highs import HiGHS as HiGHS
from .exact.scip import SCIP as SCIP
from .scores import RIA as RIA
from .scores import Magnitude as Magnitude
from .scores import Random as Random
from .scores import Wanda as Wanda
from .search.additive_swap import AdditiveSwap as AdditiveSwap
from .search.dsnot import DSnoT as DSnoT
from .search.greedy import Greedy as Greedy
from .search.iterated_local_search import IteratedLocalSearch as IteratedLocalSearch
from .search.one_swap import OneSwap as OneSwap
from .search.sparsefw import SparseFW as SparseFW
from .search.tabu import Tabu as Tabu
from .updates.admm import ADMM as ADMM
from .updates.alps import ALPS as ALPS
from .updates.alternating_reconstruction import AlternatingReconstruction as AlternatingReconstruction
from .updates.reconstruction import Reconstruction as Reconstruction
from .updates.sparsegpt import SparseGPT as SparseGPT
from .updates.thanos import Thanos as Thanos

if typing.TYPE_CHECKING:
    from .units.base import UnitSolver

Named = typing.TypeVar("Named", bound="Solver | UnitSolver")

_GROUPS = (Group.SCORE, Group.LOCAL_SEARCH, Group.EXACT, Group.WEIGHT_UPDATE, Group.BOUND)


def _registered() -> dict[str, type[Solver]]:
    """Every solver that this module imports under its own name, by group, then by name."""
    kinds = [
        kind
        for name, kind in globals().items()
        if isinstance(kind, type)
        and issubclass(kind, Solver)
        and kind not in (Solver, Chain)
        and name[0] != "_"
    ]
    kinds.sort(key=lambda kind: (_GROUPS.index(kind().group), kind.name))
    return {kind.name: kind for kind in kinds}


SOLVERS = _registered()


def solver_class(name: str) -> type[Solver]:
    """The solver called ``name``.

    Raises:
        InputError: if there is none.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver: expected one of {', '.join(SOLVERS)}, found {name!r}")
    return SOLVERS[name]


def parse_solver(text: str) -> Solver:
    """A solver from ``name`` or ``name:option=value,option=value``, such as ``ria:alpha=1``.

    Names joined by ``+``, each with its options, are a chain: ``one-swap:search=best+reconstruction``.

    Raises:
        InputError: for an unknown solver or option, or a value of another type.
    """
    # the plus of a number such as 1e+3 is followed by a digit, that of a chain by a name
    members = [_parse_one(part) for part in re.split(r"\+(?!\d)", text)]
    return members[0] if len(members) == 1 else Chain(*members)


def solver_text(solver: Solver) -> str:
    """What ``parse_solver`` reads as ``solver``; the ``repr`` of one that has no such text."""
    if isinstance(solver, Chain):
        return "+".join(solver_text(member) for member in solver.solvers)
    if SOLVERS.get(solver.name) is not type(solver):
        return repr(solver)
    return named_text(solver)


def named_text(solver: Solver | UnitSolver) -> str:
    """Name and options that are not at their defaults; the ``repr`` where one of them has no text."""
    options = []
    for field in dataclasses.fields(solver):  # type: ignore[arg-type]  # all are dataclasses
        value = getattr(solver, field.name)
        factory = field.default_factory
        if value == (field.default if factory is dataclasses.MISSING else factory()):
            continue
        if not isinstance(value, str | int | float | None):
            return repr(solver)
        options.append(f"{field.name}={'none' if value is None else value}")
    return solver.name + (":" + ",".join(options) if options else "")


def _parse_one(text: str) -> Solver:
    name, _, rest = text.strip().partition(":")
    return built(solver_class(name), rest)


def built(kind: type[Named], text: str) -> Named:
    """A solver of the class ``kind`` with the options of ``option=value,option=value``.

    Raises:
        InputError: for an unknown option, or a value of another type.
    """
    name = kind.name
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # all are dataclasses
    hints = typing.get_type_hints(kind)
    options: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if key not in known or not equals:
            raise InputError(
                f"options of solver {name}: expected option=value with one of "
                f"{', '.join(sorted(known)) or 'none'}, found {part!r}"
            )
        options[key] = _value(name, key, value.strip(), hints[key])
    try:
        return kind(**options)
    except InputError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"options of solver {name}: expected usable values, found {error}") from error


def _value(solver: str, option: str, text: str, hint: object) -> object:
    """``text`` as the type that an option's annotation names."""
    union = isinstance(hint, types.UnionType)
    for member in typing.get_args(hint) if union else (hint,):
        if member is type(None) and text.lower() == "none":
            return None
        if member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if member in (int, float):
            try:
                value = member(text)
            except ValueError:
                continue
            if value != value or (member is int and abs(value) >= 2**63):  # no number, or none of 64 bits
                continue
            return value
        if member is str:
            return text
        if typing.get_origin(member) is typing.Literal and text in typing.get_args(member):
            return text
    raise InputError(f"option {option} of solver {solver}: expected {hint}, found {text!r}")
