"""Choose whole experts of a model's mixtures, block by block in the order of a forward pass.

Each mixture gets its experts from sums over what the pruned network gives it (see ``problems.experts``): the
choice is proven best for the error of taking their contributions away. The router that is left chooses among
fewer: tokens of a missing expert go to others, gates that sum to one are divided anew. Later blocks see what
that gives, its error is measured beside, and the contributions of the experts that stay are multiplied by one
factor each, of least squares towards what the mixture was to return. ``models.shrinking`` takes the experts
out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibration.activations import Stream, can_skip, forward_replaced
from ..calibration.expert_groups import Call, Contributions, contributing
from ..calibration.gathering import flow_batch_size
from ..calibration.store import TensorStore
from ..errors import InputError, InvalidModelError, InvalidProblemError
from ..models.blocks import Block
from ..models.experts import ExpertGroup, mixture_output, tensor_of
from ..models.inputs import Samples
from ..models.shrinking import fill_mixture, mixture_skeletons
from ..problems import SparsityPattern
from ..problems.experts import ExpertSums
from ..problems.units import RIDGE
from ..solvers import BranchAndBound, Budget
from ..solvers.units import UnitMasks, UnitSolution, UnitSolver, solve_units
from .objective import Objective
from .pipeline import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class ChosenExperts:
    """Experts of one mixture.

    Attributes:
        group: the mixture.
        solution: experts that stay, and the error of taking the others' contributions away.
        routed_error: the error where the router chooses among those that stay, measured.
        factors: of the contributions of those that stay (kept,), as applied; all 1 without an update.
        error: with these factors, measured on the same tokens.
        output_norm: ``Σ_t ‖Σ_e c_e‖²``, what relative errors are relative to.
        tokens: that were summed.
        routed: those that came to each expert (experts,).
        seconds: of sums and search.
    """

    group: ExpertGroup
    solution: UnitSolution
    routed_error: float
    factors: Tensor
    error: float
    output_norm: float
    tokens: int
    routed: Tensor
    seconds: float


def prune_experts(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    groups: Sequence[ExpertGroup],
    keep: Sequence[SparsityPattern],
    calibration: Samples,
    *,
    solver: UnitSolver | None = None,
    budget: Budget | None = None,
    objective: Objective | None = None,
    ridge: float = RIDGE,
    update: bool = True,
    context: RunContext | None = None,
) -> list[ChosenExperts]:
    """Choose the experts of ``groups``, one mixture after the other.

    The model keeps all its experts; those that stay have their factors in their weights afterwards.

    Args:
        model: the dense model.
        blocks: from ``find_blocks``.
        groups: all its mixtures, from ``find_experts``.
        keep: of each mixture, how many experts of how many neighbours stay.
        calibration: token windows (windows, length).
        solver: of units; the proven best choice by default.
        budget: of the solver for each mixture.
        objective: the drift, none by default; no other part is used.
        ridge: of the factors towards 1, a share of the mean diagonal.
        update: whether contributions are multiplied by factors.
        context: progress, where activations are kept, and in which dtypes parameters are saved, by name.

    Raises:
        InputError: for parts of the objective that experts do not have, or numbers that cannot stay.
        InvalidModelError: if no configuration holds the smaller mixtures, or for drift in a model whose
            blocks have hidden connections.
    """
    objective = objective or Objective()
    if objective != Objective(drift=objective.drift) or len(objective.strengths()) > 1:
        raise InputError(f"objective of experts: expected drift alone, found {objective}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidModelError(
            f"{type(model).__name__}: expected all weights in memory to choose experts, found offloaded ones"
        )
    skip = can_skip(model, blocks, calibration)
    if objective.target is not None and not skip:
        raise InvalidModelError(
            f"{type(model).__name__}: expected blocks that depend on earlier ones only through their "
            "outputs, as drift needs, found other connections; choose experts without drift"
        )
    counts = [
        group.units // pattern.block * pattern.keep for group, pattern in zip(groups, keep, strict=True)
    ]
    skeletons = mixture_skeletons(model, groups, counts)
    context = context or RunContext()
    store = context.store
    size = flow_batch_size(len(calibration), calibration.shape[1])
    run = _Run(
        Stream(model, blocks, calibration, size, skip, store.sibling()),
        Stream(model, blocks, calibration, size, skip, store.sibling()) if objective.target else None,
        store.sibling(),
        context.dtypes,
        objective.drift,
        solver or UnitMasks(BranchAndBound()),
        budget,
        ridge,
        update,
    )
    patterns = {group.name: pattern for group, pattern in zip(groups, keep, strict=True)}
    chosen: list[ChosenExperts] = []
    last = max((group.block for group in groups), default=-1)
    with ExitStack() as replaced:
        for number in range(last + 1):
            own = [group for group in groups if group.block == number]
            chosen += run.block(own, patterns, skeletons, model, replaced)
            context.progress.stage("experts", number + 1, last + 1)
    for each in chosen:
        apply_factors(model, each.group, each.solution.kept, each.factors, context.dtypes)
    return chosen


def apply_factors(
    model: nn.Module,
    group: ExpertGroup,
    kept: Tensor,
    factors: Tensor,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Multiply the contributions of the experts that stay.

    Args:
        model: with all its experts.
        group: the mixture.
        kept: (experts,), bool.
        factors: of those that stay (kept,).
        dtypes: in which parameters are saved, by name; what is written is rounded to them.
    """
    with torch.no_grad():
        for name in group.scaled:
            tensor = tensor_of(model, name)
            where = kept.nonzero().flatten()
            tensor[where] = _multiplied(tensor[where], factors, (dtypes or {}).get(name))


def _multiplied(tensor: Tensor, factors: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Entries along the first axis times ``factors``, as they are when they were saved in ``dtype``."""
    found = tensor * factors.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
    return found if dtype is None else found.to(dtype).to(tensor.dtype)


@contextmanager
def fewer_experts(
    model: PreTrainedModel, groups: Sequence[ExpertGroup], kept: Sequence[Tensor]
) -> Iterator[None]:
    """While this is open, the model's mixtures compute without the experts that go.

    Args:
        model: with all its experts.
        groups: all its mixtures.
        kept: (experts,), bool, of each.
    """
    skeletons = mixture_skeletons(model, groups, [int(each.sum()) for each in kept])
    with ExitStack() as replaced:
        for group, stays in zip(groups, kept, strict=True):
            small = fill_mixture(skeletons[group.name], group.module, group, stays)
            replaced.enter_context(forward_replaced(group.module, small.forward))
        yield


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of ``prune_experts``."""

    pruned: Stream
    dense: Stream | None
    kept: TensorStore
    dtypes: Mapping[str, torch.dtype]
    drift: float
    solver: UnitSolver
    budget: Budget | None
    ridge: float
    update: bool

    def block(
        self,
        groups: Sequence[ExpertGroup],
        patterns: Mapping[str, SparsityPattern],
        skeletons: Mapping[str, nn.Module],
        model: nn.Module,
        replaced: ExitStack,
    ) -> list[ChosenExperts]:
        """The experts of the mixtures of a block, which are the smaller ones in ``replaced`` from then on."""
        if self.dense is not None:
            for batch in range(len(self.dense)):
                with ExitStack() as watching:
                    for group in groups:
                        watching.enter_context(_watched(group.module, self._keeping(batch, group)))
                    self.dense.advance(batch)
            self.dense.finish_block()
        chosen = []
        for group in groups:
            begin = time.perf_counter()
            sums = ExpertSums(group.units, self.pruned.device, self.dense is not None)
            for batch in range(len(self.pruned)):
                self._observe(batch, group, sums)
            solution = solve_units(
                sums.problem(patterns[group.name], self.ridge, group.name),
                self.solver,
                None,
                self.budget,
                False,
            )
            small = fill_mixture(skeletons[group.name], group.module, group, solution.kept)
            after = self._routed(group, small, int(solution.kept.sum()))
            factors = torch.ones(int(solution.kept.sum()), dtype=torch.float64, device=solution.kept.device)
            if self.update and group.scaled:
                found = after.factors(self.ridge)
                factors = found if after.error(found) < after.error() else factors
            self.kept.clear()
            routed = sums.problem(patterns[group.name]).routed
            each = ChosenExperts(
                group,
                solution,
                after.error(),
                factors,
                after.error(factors),
                sums.output_norm,
                sums.tokens,
                routed,
                time.perf_counter() - begin,
            )
            _scale(small, group, factors, self.dtypes)
            replaced.enter_context(forward_replaced(group.module, small.forward))
            chosen.append(each)
        for batch in range(len(self.pruned)):
            self.pruned.advance(batch)
        self.pruned.finish_block()
        return chosen

    def _keeping(self, batch: int, group: ExpertGroup) -> Callable[[Call, Any], None]:
        return lambda _call, output: self.kept.keep((batch, group.name, "dense"), mixture_output(output))

    def _observe(self, batch: int, group: ExpertGroup, sums: ExpertSums) -> None:
        """Add a batch to ``sums``, and keep what the mixture receives and what it is to return."""
        found: list[Contributions] = []
        calls: list[tuple[Call, Tensor]] = []

        def take(call: Call, output: Any) -> None:
            calls.append((call, mixture_output(output)))

        with contributing(group.experts, group.units, found.append), _watched(group.module, take):
            self.pruned.observe(batch, (), lambda _layer, _inputs: None)
        for (call, output), each in zip(calls, found, strict=True):
            target, missing = output, None
            if (batch, group.name, "dense") in self.kept:
                dense = self.kept.recall((batch, group.name, "dense"), output.device)
                missing = self.drift * (dense.float() - output.float())
                target = output.float() + missing
            _add(sums, group, each, missing)
            self.kept.keep((batch, group.name, "call"), (call.args, call.kwargs, target))

    def _routed(self, group: ExpertGroup, small: nn.Module, count: int) -> ExpertSums:
        """Sums of the smaller mixture, and what it misses."""
        sums = ExpertSums(count, self.pruned.device, drift=True)
        found: list[Contributions] = []
        inside = next(name for name, each in group.module.named_modules() if each is group.experts)
        experts = small.get_submodule(inside)
        for batch in range(len(self.pruned)):
            args, kwargs, target = self.kept.recall((batch, group.name, "call"), self.pruned.device)
            with contributing(experts, count, found.append):
                output = mixture_output(Call(args, kwargs).of(small))
            each = found.pop()
            _add(sums, group, each, target.float() - output.float())
        return sums


def _add(sums: ExpertSums, group: ExpertGroup, found: Contributions, missing: Tensor | None) -> None:
    """Add a batch to the sums of a mixture, whose name an error then says."""
    try:
        sums.update(found.values, found.experts, missing)
    except InvalidProblemError as error:
        raise InvalidModelError(f"mixture {group.name}: {error}") from error


def _scale(small: nn.Module, group: ExpertGroup, factors: Tensor, dtypes: Mapping[str, torch.dtype]) -> None:
    with torch.no_grad():
        for name in group.scaled:
            tensor = tensor_of(small, name.removeprefix(f"{group.name}."))
            tensor.copy_(_multiplied(tensor, factors, dtypes.get(name)))


@contextmanager
def _watched(module: nn.Module, take: Callable[[Call, Any], None]) -> Iterator[None]:
    """While this is open, ``take`` is told what ``module`` is called with and what it returns."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs).copied()
        output = original(*args, **kwargs)
        take(call, output)
        return output

    with forward_replaced(module, forward):
        yield
