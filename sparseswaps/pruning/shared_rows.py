"""What the processes of a run share beside their windows: the record, and the rows of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..masks.packing import pack_mask, unpack_mask
from ..problems import LayerProblem
from ..problems.pattern import Coupling, Pattern
from ..ranks import Ranks
from ..records.run import LayerRecord
from ..records.run_database import RunDatabase
from ..solvers import Chain, Group, Solution, Solver, solve
from ..solvers.given import Given
from ..solvers.row_wise import overall


def shared_record(record: RunDatabase, ranks: Ranks) -> RunDatabase:
    """The record itself on the first rank, on the others one in memory with its finished layers."""
    if ranks.count == 1:
        return record

    def finished() -> list[tuple[LayerRecord, bytes, bytes | None]]:
        return [
            (layer, record.packed_mask(layer.name) or b"", record.updated_weight(layer.name))
            for layer in record.layers()
        ]

    known = ranks.from_first(finished)
    if ranks.first:
        return record
    copy = RunDatabase(None)
    for layer, mask, weight in known:
        copy.add_layer(layer, mask, weight)
    return copy


def rows_alone(problem: LayerProblem, solver: Solver) -> bool:
    """Whether ``solver`` may be given some rows of ``problem`` and still find the same masks."""
    by_rows = problem.metric is None and problem.pattern.couples is Coupling.BLOCK
    return by_rows and solver.covers.rows_alone


def first_alone(pattern: Pattern, solver: Solver, metric: bool, held_out: bool) -> str | None:
    """Why the first process solves the layers by itself, in words; None where all share their rows."""
    if metric:
        return "an output metric couples the rows of a layer"
    if held_out:
        return "a held-out stop looks at whole layers"
    if pattern.couples is not Coupling.BLOCK:
        return f"the pattern {pattern} is one budget for all rows of a layer"
    members = solver.solvers if isinstance(solver, Chain) else (solver,)
    alone = [each for each in members if each.group is not Group.SCORE and not each.covers.rows_alone]
    return f"{', '.join(each.name for each in alone)} looks at whole layers" if alone else None


def solve_shared(problem: LayerProblem, solver: Solver, init: Tensor | None, ranks: Ranks) -> Solution:
    """``solve`` with each rank on its rows, where they stand alone; the whole solution on every rank.

    A chain is shared member by member. Scores look at all rows, which costs little: every rank scores the
    layer and keeps its rows. What looks at whole layers otherwise is solved by the first rank.

    Args:
        problem: the same on every rank.
        solver: any solver that covers it.
        init: warm start (rows, cols), or None.
        ranks: who shares the rows.
    """
    if ranks.count == 1:
        return solve(problem, solver, init=init)
    if isinstance(solver, Chain) and not rows_alone(problem, solver):
        seconds = 0.0
        for member in solver.solvers:
            found = solve_shared(problem, member, init, ranks)
            init, seconds = found.mask, seconds + found.seconds
        return replace(found, solver=repr(solver), seconds=seconds)
    if solver.group is Group.SCORE:
        if problem.pattern.couples is not Coupling.BLOCK:
            return solve(problem, solver)
        mask = solver.mask if isinstance(solver, Given) else solve(problem, solver).mask
        return _by_rows(problem, Given(mask), None, ranks, repr(solver))
    if rows_alone(problem, solver):
        return _by_rows(problem, solver, init, ranks, repr(solver))
    found = ranks.from_first(lambda: _sent(solve(problem, solver, init=init)))
    return _received([found], problem)


def _by_rows(
    problem: LayerProblem, solver: Solver, init: Tensor | None, ranks: Ranks, label: str
) -> Solution:
    """The solution of a solver whose rows stand alone, or of a given mask, each rank on its rows."""
    rows = ranks.rows(problem.rows)

    def part() -> Solution | None:
        if rows.start == rows.stop:
            return None
        own = Given(solver.mask[rows]) if isinstance(solver, Given) else solver
        return _sent(solve(problem.slice_rows(rows), own, init=None if init is None else init[rows]))

    parts = [each for each in ranks.gather(part) if each is not None]
    return replace(_received(parts, problem), solver=label)


def _sent(found: Solution) -> Solution:
    """A solution as it travels: packed bits, tensors on the CPU."""
    return replace(
        found,
        mask=pack_mask(found.mask),
        row_objectives=found.row_objectives.cpu(),
        row_bounds=found.row_bounds.cpu(),
        stats={name: values.cpu() for name, values in found.stats.items()},
        trace=(),
        weight=None if found.weight is None else found.weight.cpu(),
    )


def _received(parts: Sequence[Solution], problem: LayerProblem) -> Solution:
    """The solution of the whole layer from those of consecutive rows."""
    device = problem.device
    statuses = [each.status for each in parts]
    weights = [each.weight for each in parts if each.weight is not None]
    return replace(
        parts[0],
        mask=torch.cat([unpack_mask(each.mask, problem.cols) for each in parts]).to(device),
        row_objectives=torch.cat([each.row_objectives for each in parts]).to(device),
        row_bounds=torch.cat([each.row_bounds for each in parts]).to(device),
        row_statuses=tuple(status for each in parts for status in each.row_statuses),
        status=statuses[0] if len(set(statuses)) == 1 else overall(statuses),
        stats={name: torch.cat([each.stats[name] for each in parts]) for name in parts[0].stats},
        seconds=max(each.seconds for each in parts),
        weight=torch.cat(weights).to(device) if weights else None,
    )
