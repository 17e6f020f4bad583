"""OSSCAR: backward removal in rounds, then swaps of several units at once.

Backward removal takes several of the cheapest units at a time. Local search then drops the cheapest kept ones
and adds as many of those whose return gains most, all judged one by one, and goes on as long as the error
after least squares falls (Meng et al., ICML 2024, arXiv 2403.12983, section 3; rounds of ten and swaps of ten
are the authors' for MLPs of language models, rounds of two and swaps of five for heads). Costs and gains are
those of ``kept_inverse``; where equally many units of each block of the pattern are kept, which the paper
does not have, a block gets back as many units as it gives.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ...errors import InputError
from ...problems.units import UnitProblem
from ..base import Budget, Status
from .base import UnitOutcome, UnitSolver
from .kept_inverse import KeptInverse


@final
@dataclass(frozen=True)
class OSSCAR(UnitSolver):
    """Rounds of removals, then rounds of swaps, on the error after least squares.

    Args:
        drops: units that go in a round of removals.
        swaps: units that change places in a round of the local search.
        iterations: rounds of the local search at most.

    Stats: ``drops``, ``rounds`` of removals and ``swaps`` that were accepted. A warm start is not looked at.
    """

    name: ClassVar[str] = "osscar"

    drops: int = 10
    swaps: int = 10
    iterations: int = 30

    def __post_init__(self) -> None:
        for what, value, least in (
            ("drops", self.drops, 1),
            ("swaps", self.swaps, 1),
            ("iterations", self.iterations, 0),
        ):
            if value < least:
                raise InputError(f"{what} of OSSCAR: expected at least {least}, found {value}")

    def run(self, problem: UnitProblem, init: Tensor | None, budget: Budget) -> UnitOutcome:
        """Remove, then swap; at a time limit the cheapest of what is left go at once."""
        deadline = budget.deadline()
        state = KeptInverse(problem)
        block = problem.pattern.block
        left = torch.full((problem.units // block,), block - problem.pattern.keep, device=state.kept.device)
        total, rounds = int(left.sum()), 0
        # as many rounds as there are whole tens, their sizes as equal as can be
        sizes = [len(part) for part in torch.arange(total).tensor_split(max(1, total // self.drops))]
        for size in sizes:
            done = int(total - left.sum())
            if time.monotonic() > deadline:
                costs = _costs(state, state.kept)
                scores = costs.masked_fill(~state.kept, -torch.inf)
                return UnitOutcome(
                    problem.pattern.top_k(scores[None])[0],
                    Status.TIME_LIMIT,
                    {"drops": done, "rounds": rounds, "swaps": 0},
                )
            for unit in _smallest(_costs(state, state.kept), left, size, block):
                state.drop(unit)
                left[unit // block] -= 1
            rounds += 1
            budget.report(total - int(left.sum()), total)
        kept, swaps, status = self._search(problem, state.kept, deadline)
        return UnitOutcome(kept, status, {"drops": total, "rounds": rounds, "swaps": swaps})

    def _search(self, problem: UnitProblem, kept: Tensor, deadline: float) -> tuple[Tensor, int, Status]:
        """Swaps from ``kept`` (units,) as long as they lower the error."""
        block = problem.pattern.block
        best, accepted = problem.updated_error(kept), 0
        for _ in range(self.iterations):
            if time.monotonic() > deadline:
                return kept, accepted, Status.TIME_LIMIT
            state = KeptInverse(problem, kept)
            room = state.kept.view(-1, block).sum(1) - 1  # a block never loses its last unit
            spare = (~state.kept).view(-1, block).sum(1)
            limit = torch.minimum(room, spare)
            dropped = _smallest(_costs(state, state.kept), limit.clone(), self.swaps, block)
            for unit in dropped:
                state.drop(unit)
            wanted = torch.bincount(torch.tensor(dropped, dtype=torch.long) // block, minlength=len(room))
            outside = (~state.kept).nonzero()[:, 0]
            gains = torch.full((problem.units,), torch.inf, dtype=torch.float64, device=outside.device)
            gains[outside] = -state.add_gains(outside)
            other = state.kept.clone()
            for unit in _smallest(gains, wanted.to(outside.device), len(dropped), block):
                other[unit] = True
            error = problem.updated_error(other)
            if not error < best:
                return kept, accepted, Status.LOCAL_OPTIMUM
            kept, best, accepted = other, error, accepted + 1
        return kept, accepted, Status.ITERATION_LIMIT


def _costs(state: KeptInverse, kept: Tensor) -> Tensor:
    """What dropping each kept unit costs (units,), inf for the others."""
    costs = torch.full(kept.shape, torch.inf, dtype=torch.float64, device=kept.device)
    units = kept.nonzero()[:, 0]
    costs[units] = state.drop_costs(units)
    return costs


def _smallest(values: Tensor, left: Tensor, count: int, block: int) -> list[int]:
    """The ``count`` units of the smallest ``values`` (units,), of a block at most so many as are ``left``."""
    found: list[int] = []
    free = left.tolist()
    for unit in values.argsort(stable=True).tolist():
        if len(found) == count or values[unit] == torch.inf:
            break
        if free[unit // block] > 0:
            free[unit // block] -= 1
            found.append(unit)
    return found
