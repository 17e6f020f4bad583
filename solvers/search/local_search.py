"""What local searches share: rows at a common scale, the right kernels and the right float type."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from ..base import Budget
from ..kernels import kernels_for
from ..kernels.reference import Descent
from ..kernels.scaling import ScaledRows, scale_rows

# Weights of the rows that are scaled at once: bounds the memory beside weights and Gram matrix.
BATCH_WEIGHTS = 1 << 26
# Narrower layers fit the caches in float64 too, and few terms leave little room for rounding to average out.
FLOAT32_COLS = 512


def row_batches(problem: LayerProblem) -> list[slice]:
    """Rows of the layer in batches of at most ``BATCH_WEIGHTS`` weights."""
    size = max(1, BATCH_WEIGHTS // problem.cols)
    return [slice(first, min(first + size, problem.rows)) for first in range(0, problem.rows, size)]


def scaled_rows(problem: LayerProblem, mask: Tensor, rows: slice | Tensor) -> ScaledRows:
    """Some rows of a layer at the scale of their pruned part under ``mask`` (rows, cols)."""
    drift = problem.scaled_drift
    return scale_rows(
        problem.weight[rows].double() * problem.gram.scale,
        None if drift is None else drift[rows],
        None if problem.drift is None else problem.drift.constant[rows],
        mask[rows],
    )


def descend_layer(
    problem: LayerProblem,
    start: Tensor,
    tolerance: float,
    max_swaps: int | None,
    search: str,
    budget: Budget,
    deadline: float,
    patience: int = 0,
    tenure: int = 1,
) -> Descent:
    """Descend in float32, and in float64 narrow layers and those rows that float32 cannot resolve.

    Args:
        problem: the layer.
        start: warm start (rows, cols), bool.
        tolerance: a swap must lower its row's error by this share of the starting error.
        max_swaps: the most swaps per row.
        search: ``lazy`` or ``best``.
        budget: whom to tell about finished rows.
        deadline: when to stop, on ``time.monotonic()``.
        patience: moves of a tabu walk without improvement after which it stops; 0 for no walk.
        tenure: moves for which a moved weight stays.
    """
    done = 0

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        budget.report(min(done, problem.rows), problem.rows)

    def descend(rows: slice | Tensor, dtype: torch.dtype) -> Descent:
        scaled = scaled_rows(problem, start, rows)
        single = dtype == torch.float32
        descent: Descent = kernels_for(problem.device).descend(
            problem.gram.correlation if single else problem.gram.correlation64,
            scaled.weight.to(dtype),
            None if scaled.drift is None else scaled.drift.to(dtype),
            scaled.constant,
            start[rows],
            problem.pattern.block,
            tolerance,
            max_swaps,
            search,
            patience,
            tenure,
            deadline,
            problem.gram.largest_correlation,
            report,
        )
        return descent._replace(error=descent.error * scaled.scale * scaled.scale)

    if problem.cols < FLOAT32_COLS:
        return _joined([descend(rows, torch.float64) for rows in row_batches(problem)])
    descent = _joined([descend(rows, torch.float32) for rows in row_batches(problem)])
    hard = (~descent.resolved).nonzero().squeeze(1)
    if len(hard):
        for whole, part in zip(descent, descend(hard, torch.float64), strict=True):
            whole[hard] = part
    return descent


def _joined(parts: list[Descent]) -> Descent:
    return Descent(*(torch.cat([part[i] for part in parts]) for i in range(len(Descent._fields))))
