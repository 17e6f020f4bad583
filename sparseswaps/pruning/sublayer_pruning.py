"""Choose whole sublayers or blocks of a causal model, from losses that were measured.

The errors of single layers say little about what a model loses without all of an attention or an MLP. What it
loses without one or two of them is measured on calibration windows, and the best choice of the quadratic that
these losses make is proven (``problems.sublayers``). Greedy choice measures every next removal instead: fewer
losses for few removals, with nothing proven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.logits import SlicedModel
from ..errors import InputError, InvalidModelError
from ..evaluation.measures import batch_losses, is_causal
from ..models.sublayers import Sublayer, silenced
from ..problems import SparsityPattern
from ..problems.sublayers import MeasuredLosses
from ..progress import Progress, Silent
from ..solvers import BranchAndBound, Budget, Solver, solve

# What can be left out: sublayers, one or several at a time.
Removable = tuple[Sublayer, ...]


@dataclass(frozen=True, eq=False)
class ChosenSublayers:
    """What is left out of a model.

    Attributes:
        gone: which of the removables (removables,), bool.
        loss: of the model without them, measured, in nats per token.
        predicted: what the quadratic says of it, None for greedy choice.
        bound: proven: the quadratic of no choice is below; None for greedy choice.
        losses: how many losses were measured.
    """

    gone: Tensor
    loss: float
    predicted: float | None
    bound: float | None
    losses: int


def one_by_one(sublayers: Sequence[Sublayer]) -> list[Removable]:
    """Every sublayer by itself."""
    return [(each,) for each in sublayers]


def by_block(sublayers: Sequence[Sublayer]) -> list[Removable]:
    """All sublayers of a block together: what a configuration with fewer blocks can leave out."""
    blocks = sorted({each.block for each in sublayers})
    return [tuple(each for each in sublayers if each.block == block) for block in blocks]


def measure_losses(
    model: nn.Module, removables: Sequence[Removable], windows: Tensor, progress: Progress | None = None
) -> MeasuredLosses:
    """Losses without one and two of ``removables``: n (n + 1) / 2 + 1 passes over the windows.

    Args:
        model: a causal model, in evaluation mode.
        removables: two or more.
        windows: (windows, length) token ids.
        progress: told about every loss.

    Raises:
        InputError: for fewer than two removables.
        InvalidModelError: for a model without a loss of next tokens.
    """
    _check(model, removables)
    progress = progress or Silent()
    count = len(removables)
    total = count * (count + 1) // 2 + 1
    dense = loss_without(model, (), windows)
    without = torch.zeros((count, count), dtype=torch.float64)
    done = 1
    for first in range(count):
        for second in range(first, count):
            gone = removables[first] if second == first else removables[first] + removables[second]
            without[first, second] = without[second, first] = loss_without(model, gone, windows)
            done += 1
            progress.stage("losses", done, total)
    return MeasuredLosses(dense, without)


def choose_sublayers(
    model: nn.Module,
    removables: Sequence[Removable],
    windows: Tensor,
    count: int,
    *,
    measured: MeasuredLosses | None = None,
    solver: Solver | None = None,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> ChosenSublayers:
    """Which ``count`` of ``removables`` to leave out, the proven best by losses without one and two.

    Args:
        model: a causal model, in evaluation mode; it stays as it is.
        removables: from ``one_by_one`` or ``by_block``.
        windows: (windows, length) token ids of calibration.
        count: how many go.
        measured: from ``measure_losses`` on the same windows, if it is there already.
        solver: of masks; branch and bound by default.
        budget: of the solver.
        progress: told about every loss.

    Raises:
        InputError: if none or all would go.
        InvalidModelError: for a model without a loss of next tokens.
    """
    _check(model, removables)
    _check_count(count, removables)
    measured = measured or measure_losses(model, removables, windows, progress)
    problem = measured.problem(SparsityPattern(len(removables) - count, len(removables)), "sublayers")
    found = solve(problem, solver or BranchAndBound(), budget=budget)
    gone = ~found.mask[0]
    predicted = measured.predicted(gone)
    bound = predicted - (found.objective - found.bound) if found.bound > 0 else None
    loss = loss_without(model, _together(removables, gone), windows)
    return ChosenSublayers(gone, loss, predicted, bound, len(removables) * (len(removables) + 1) // 2 + 2)


def greedy_sublayers(
    model: nn.Module,
    removables: Sequence[Removable],
    windows: Tensor,
    count: int,
    progress: Progress | None = None,
) -> ChosenSublayers:
    """Leave out one of ``removables`` after the other, each time the one that costs least, measured.

    Arguments and errors as for ``choose_sublayers``.
    """
    _check(model, removables)
    _check_count(count, removables)
    progress = progress or Silent()
    gone = torch.zeros(len(removables), dtype=torch.bool)
    best, losses = math.inf, 0
    for done in range(count):
        costs = {}
        for each in (~gone).nonzero().flatten().tolist():
            other = gone.clone()
            other[each] = True
            costs[each] = loss_without(model, _together(removables, other), windows)
        losses += len(costs)
        chosen = min(costs, key=lambda each: costs[each])
        gone[chosen], best = True, costs[chosen]
        progress.stage("removals", done + 1, count)
    return ChosenSublayers(gone, best, None, None, losses)


def loss_without(model: nn.Module, gone: Sequence[Sublayer], windows: Tensor) -> float:
    """Mean loss of a model whose sublayers ``gone`` add nothing, in nats per token, on (windows, length)."""
    with silenced(gone):
        return sum(batch_losses(SlicedModel(model, windows), windows)) / len(windows)


def _together(removables: Sequence[Removable], gone: Tensor) -> list[Sublayer]:
    return [each for number in gone.nonzero().flatten().tolist() for each in removables[number]]


def _check(model: nn.Module, removables: Sequence[Removable]) -> None:
    if not is_causal(model):
        raise InvalidModelError(
            f"{type(model).__name__}: expected a causal model, whose loss can be measured, found none"
        )
    if len(removables) < 2:
        raise InputError(f"sublayers: expected two or more to choose from, found {len(removables)}")


def _check_count(count: int, removables: Sequence[Removable]) -> None:
    if not 0 < count < len(removables):
        raise InputError(
            f"sublayers that go: expected from 1 to {len(removables) - 1} of {len(removables)}, found {count}"
        )
