"""Enumeration of every allowed mask of a row: the exact oracle for tests and tiny rows."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import UnsupportedProblemError
from ...problems.layer import LayerProblem
from ..base import Budget, Group, Outcome, Solver, Status
from ..scores import warm_start

CHUNK = 1 << 14


@final
@dataclass(frozen=True)
class Enumeration(Solver):
    """Try every mask of each row, in float64.

    Args:
        limit: the most masks per row that it is willing to try.

    Raises (from ``run``):
        UnsupportedProblemError: if a row has more masks than ``limit``.
    """

    name: ClassVar[str] = "enumeration"
    group: ClassVar[Group] = Group.EXACT

    limit: int = 2_000_000

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Enumerate row by row; rows that the time limit cuts off keep the warm start and bound 0."""
        deadline = budget.deadline()
        pattern = problem.pattern
        blocks = problem.cols // pattern.block
        masks_of_block = math.comb(pattern.block, pattern.keep)
        if masks_of_block**blocks > self.limit:
            raise UnsupportedProblemError(
                f"enumeration of rows of {problem.cols} weights with pattern {pattern}: expected at most "
                f"{self.limit} masks per row, found {masks_of_block**blocks}"
            )
        pruned = torch.tensor(
            list(itertools.combinations(range(pattern.block), pattern.block - pattern.keep))
        )
        block_choices = torch.zeros((len(pruned), pattern.block), dtype=torch.float64)
        block_choices.scatter_(1, pruned, 1.0)
        mask = warm_start(problem, init).clone()
        errors = torch.full((problem.rows,), math.inf, dtype=torch.float64)
        statuses = []
        gram = problem.gram.matrix.cpu()
        for row in range(problem.rows):
            if time.monotonic() > deadline:
                statuses.append(Status.TIME_LIMIT)
                continue
            weight = problem.weight[row].double().cpu()
            quadratic = weight[:, None] * gram * weight[None, :]
            linear = torch.zeros_like(weight)
            constant = 0.0
            if problem.drift is not None:
                linear = 2 * problem.drift.linear[row].cpu() * weight
                constant = float(problem.drift.constant[row])
            digits = masks_of_block ** torch.arange(blocks)
            for start in range(0, masks_of_block**blocks, CHUNK):
                number = torch.arange(start, min(start + CHUNK, masks_of_block**blocks))
                choices = block_choices[(number[:, None] // digits) % masks_of_block].flatten(1)
                values = ((choices @ quadratic) * choices).sum(1) + choices @ linear + constant
                best = int(values.argmin())
                if float(values[best]) < float(errors[row]):
                    errors[row] = values[best]
                    mask[row] = (choices[best] == 0).to(mask.device)
            statuses.append(Status.FINISHED)
            budget.report(row + 1, problem.rows)
        proven = torch.isfinite(errors).to(mask.device)
        bounds = torch.where(proven, problem.row_objectives(mask), 0.0)
        finished = all(status is Status.FINISHED for status in statuses)
        return Outcome(
            mask,
            Status.FINISHED if finished else Status.TIME_LIMIT,
            row_bounds=bounds,
            row_statuses=statuses,
        )
