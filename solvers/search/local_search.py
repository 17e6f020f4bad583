"""What local searches share: rows at a common scale, the right kernels and the right float type."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.layer import LayerProblem
from ..base import Budget
from ..kernels import kernels_for
from ..kernels.interface import Descent, DescentOptions, ScaledProblem
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


def at_scale(problem: LayerProblem, scaled: ScaledRows, correlation: Tensor) -> ScaledProblem:
    """Some rows of a layer as the kernels take them, in the dtype of ``correlation`` (cols, cols)."""
    return ScaledProblem(
        correlation,
        scaled.weight.to(correlation.dtype),
        None if scaled.drift is None else scaled.drift.to(correlation.dtype),
        scaled.constant,
        problem.pattern.block,
        problem.gram.largest_correlation,
    )


def descend_layer(
    problem: LayerProblem, start: Tensor, options: DescentOptions, budget: Budget, deadline: float
) -> Descent:
    """Descend in float32, and in float64 narrow layers and those rows that float32 cannot resolve.

    Args:
        problem: the layer.
        start: warm start (rows, cols), bool.
        options: how to search.
        budget: whom to tell about finished rows.
        deadline: when to stop, on ``time.monotonic()``.
    """
    done = 0

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        budget.report(min(done, problem.rows), problem.rows)

    def descend(rows: slice | Tensor, dtype: torch.dtype) -> Descent:
        scaled = scaled_rows(problem, start, rows)
        single = dtype == torch.float32
        correlation = problem.gram.correlation if single else problem.gram.correlation64
        part = at_scale(problem, scaled, correlation)
        descent = kernels_for(problem.device).descend(part, start[rows], options, deadline, report)
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
