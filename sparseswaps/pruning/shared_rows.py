"""What the processes of a run share beside their windows: the record, and the rows of each layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..masks.packing import pack_mask, unpack_mask
from ..problems import LayerProblem
from ..problems.pattern import LayerBudget
from ..ranks import Ranks
from ..records.run import LayerRecord
from ..records.run_database import RunDatabase
from ..solvers import AdditiveSwap, DSnoT, Greedy, OneSwap, Solution, Solver, Tabu, solve
from ..solvers.given import Given
from ..solvers.row_wise import RowSolver
from ..solvers.search.one_swap import overall_status


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
    by_rows = problem.metric is None and not isinstance(problem.pattern, LayerBudget)
    return by_rows and isinstance(solver, ROW_WISE)


def solve_shared(problem: LayerProblem, solver: Solver, init: Tensor | None, ranks: Ranks) -> Solution:
    """``solve`` with each rank on its rows; the whole solution on every rank.

    Args:
        problem: the same on every rank.
        solver: one for which ``rows_alone`` holds, or a given mask.
        init: warm start (rows, cols), or None.
        ranks: who shares the rows.
    """
    if ranks.count == 1:
        return solve(problem, solver, init=init)
    rows = ranks.rows(problem.rows)

    def part() -> Solution | None:
        if rows.start == rows.stop:
            return None
        own = Given(solver.mask[rows]) if isinstance(solver, Given) else solver
        found = solve(problem.slice_rows(rows), own, init=None if init is None else init[rows])
        return replace(
            found,
            mask=pack_mask(found.mask),
            row_objectives=found.row_objectives.cpu(),
            row_bounds=found.row_bounds.cpu(),
            stats={name: values.cpu() for name, values in found.stats.items()},
            trace=(),
        )

    parts = [each for each in ranks.gather(part) if each is not None]
    device = problem.device
    statuses = [each.status for each in parts]
    return replace(
        parts[0],
        mask=torch.cat([unpack_mask(each.mask, problem.cols) for each in parts]).to(device),
        row_objectives=torch.cat([each.row_objectives for each in parts]).to(device),
        row_bounds=torch.cat([each.row_bounds for each in parts]).to(device),
        row_statuses=tuple(status for each in parts for status in each.row_statuses),
        status=statuses[0] if len(set(statuses)) == 1 else overall_status(statuses),
        stats={name: torch.cat([each.stats[name] for each in parts]) for name in parts[0].stats},
        seconds=max(each.seconds for each in parts),
    )


# Solvers whose result in a row depends on that row and the Gram matrix alone.
ROW_WISE = (OneSwap, Tabu, Greedy, AdditiveSwap, DSnoT, RowSolver)
