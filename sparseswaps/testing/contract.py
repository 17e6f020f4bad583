"""What every solver has to hold, against oracles that share no code with it."""

from __future__ import annotations

import torch

from ..problems import SparsityPattern
from ..problems.pattern import Coupling
from ..solvers import Group, Solver, Status, Wanda, solve
from .problems import CASES, all_masks, problem, raw_error, tolerance, with_raw


def check_solver(solver: Solver) -> None:
    """Everything below.

    Raises:
        AssertionError: naming the solver, the problem and what does not hold.
    """
    check_objectives(solver)
    check_claims(solver)
    check_repeats(solver)
    check_rows_alone(solver)


def check_objectives(solver: Solver) -> None:
    """Masks have the pattern, errors are those of the raw activations, exact optima those of enumeration."""
    for family, pattern, drift in CASES:
        layer, inputs, dense = with_raw(family, pattern, drift)
        solution = solve(layer, solver)
        label = f"{solver!r} on {layer.name}"
        kept = solution.mask.view(layer.rows, -1, layer.pattern.block).sum(-1)
        _hold(bool((kept == layer.pattern.keep).all()), f"{label}: expected the pattern {layer.pattern}")
        raw = raw_error(layer, solution.mask, inputs, dense, solution.weight)
        slack = tolerance(layer, dense, solution.weight)
        close = (solution.row_objectives - raw).abs() <= slack
        _hold(bool(close.all()), f"{label}: expected the errors {raw}, found {solution.row_objectives}")
        if solver.group is Group.EXACT and solution.status in (Status.FINISHED, Status.PRECISION_LIMIT):
            _hold(isinstance(layer.pattern, SparsityPattern), f"{label}: expected a pattern of rows")
            masks = all_masks(SparsityPattern(layer.pattern.keep, layer.pattern.block), layer.cols)
            for row in range(layer.rows):
                weight = layer.weight[row].double()
                best = float(((weight @ dense - (masks * weight) @ inputs) ** 2).sum(1).min())
                found = float(solution.row_objectives[row])
                near = abs(found - best) <= float(slack[row])
                _hold(near, f"{label}, row {row}: expected the optimum {best}, found {found}")


def check_claims(solver: Solver) -> None:
    """Bounds are not above errors, new weights come from weight updates alone and are zero where pruned."""
    for family, pattern, drift in CASES:
        layer = problem(family, pattern, drift)
        solution = solve(layer, solver)
        label = f"{solver!r} on {layer.name}"
        _hold(solution.solver == repr(solver), f"{label}: expected the label of the solver")
        _hold(bool((solution.row_bounds <= solution.row_objectives).all()), f"{label}: expected bounds below")
        updated = solver.group is Group.WEIGHT_UPDATE
        _hold((solution.weight is not None) == updated, f"{label}: expected new weights of updates alone")
        if solution.weight is not None:
            _hold(solution.weight.dtype == layer.weight.dtype, f"{label}: expected {layer.weight.dtype}")
            _hold(not bool(solution.weight[~solution.mask].any()), f"{label}: expected zeros where pruned")


def check_repeats(solver: Solver) -> None:
    """The same problem twice has the same result, bit for bit."""
    layer = problem("correlated", "0.5", drift=True)
    first, second = solve(layer, solver), solve(layer, solver)
    _hold(torch.equal(first.mask, second.mask), f"{solver!r}: expected the same mask twice")
    if first.weight is not None and second.weight is not None:
        _hold(torch.equal(first.weight, second.weight), f"{solver!r}: expected the same weights twice")


def check_rows_alone(solver: Solver) -> None:
    """``covers.rows_alone`` is true where it is claimed: rows in other company have the same masks."""
    if not solver.covers.rows_alone or Coupling.BLOCK not in solver.covers.couplings:
        return
    for family, pattern, drift in CASES:
        layer, _, _ = with_raw(family, pattern, drift, rows=5)
        start = solve(layer, Wanda())
        whole = solve(layer, solver, init=start)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
            part = solve(layer.slice_rows(rows), solver, init=start.mask[rows])
            same = torch.equal(part.mask, whole.mask[rows])
            if part.weight is not None and whole.weight is not None:
                same &= torch.equal(part.weight, whole.weight[rows])
            _hold(same, f"{solver!r} on {layer.name}: expected rows {rows} alone to be as in the whole layer")


def _hold(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
