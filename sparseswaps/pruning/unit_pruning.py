"""Choose whole units of a model's layers block by block: channels of MLPs, heads, groups of heads.

In the order of a forward pass each consumer (see ``problems.units``) gets its units from sums over what the
pruned network gives it, with drift and residual drift as masks do, and least squares for the columns that
stay; in one-shot mode from what the dense network gives it. Pruned columns are zero then, so that what
produced them is idle; ``models.shrinking`` takes both out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..calibration.activations import blocks_as_used, can_skip
from ..calibration.gathering import Flow, gather
from ..calibration.steps import Step
from ..errors import InputError, InvalidModelError
from ..masks.packing import pack_mask, unpack_bytes, weight_bytes, weight_from
from ..models.blocks import Block, PrunableLayer
from ..models.inputs import Samples
from ..models.units import UnitGroup, bias_of
from ..problems import GramAccumulator, LayerProblem, SparsityPattern
from ..problems.units import RIDGE, UnitProblem
from ..ranks import Ranks
from ..records.run import ConsumerRecord
from ..solvers.units import DropAddSwap, UnitSolver, solve_units
from .objective import Objective
from .pipeline import RunContext


@dataclass(frozen=True, eq=False)
class ChosenUnits:
    """Units of one consumer.

    Attributes:
        group: what they are.
        kept: those that stay (units,), bool.
        record: what was found.
    """

    group: UnitGroup
    kept: Tensor
    record: ConsumerRecord


@dataclass(frozen=True)
class UnitMethod:
    """How units are chosen.

    Attributes:
        solver: of units; swaps from structured OBS by default.
        objective: drift and residual drift; no other part is used.
        ridge: of the least squares towards the old weights, a share of the Gram matrix's mean diagonal.
        update: whether kept columns are updated.
        one_shot: whether every consumer sees what the dense network gives it.
        bias: whether a bias absorbs the means of what is missing; every consumer has one then.
    """

    solver: UnitSolver = field(default_factory=DropAddSwap)
    objective: Objective = field(default_factory=Objective)
    ridge: float = RIDGE
    update: bool = True
    one_shot: bool = False
    bias: bool = False


def prune_units(
    model: nn.Module,
    blocks: Sequence[Block],
    groups: Sequence[UnitGroup],
    keep: Sequence[SparsityPattern],
    calibration: Samples,
    method: UnitMethod | None = None,
    context: RunContext | None = None,
) -> list[ChosenUnits]:
    """Choose the units of ``groups``, one consumer after the other, and change the consumers in place.

    Args:
        model: the dense model; afterwards the one with zero columns.
        blocks: from ``find_blocks``.
        groups: what belongs together, from ``find_units``.
        keep: of each group, how many units of how many neighbours stay.
        calibration: token windows (windows, length).
        method: how they are chosen.
        context: record, progress, store; a record in memory by default. Consumers that the record has are
            taken from it.

    Raises:
        InputError: for parts of the objective that units do not have, or two kinds in front of one layer.
        InvalidModelError: for drift in a model whose blocks have hidden connections.
    """
    method, context = method or UnitMethod(), context or RunContext()
    objective = method.objective
    if replace(objective, drift=0.0, residual=0.0) != Objective() or len(objective.strengths()) > 1:
        raise InputError(f"objective of units: expected drift and residual drift alone, found {objective}")
    if objective.target is not None and method.one_shot:
        raise InputError(
            "drift needs the inputs of the pruned model: expected sequential mode, found one-shot"
        )
    consumers = {group.consumer.name for group in groups}
    # nothing else changes, and so nothing else is looked at
    blocks = [
        replace(block, layers=tuple(layer for layer in block.layers if layer.name in consumers))
        for block in blocks_as_used(model, blocks, calibration)
    ]
    skip = can_skip(model, blocks, calibration) if context.skip is None else context.skip
    if objective.target is not None and not skip:
        raise InvalidModelError(
            f"{type(model).__name__}: expected blocks that depend on earlier ones only through their "
            "outputs, as drift needs, found other connections; choose units without drift"
        )
    patterns = {group.consumer.name: pattern for group, pattern in zip(groups, keep, strict=True)}
    if len(patterns) < len(groups):
        raise InputError("units of a layer: expected one kind of them, found several")
    flow = Flow.of(model, blocks, calibration, skip, objective.target, Ranks(), context.store)
    run = _Run(flow, patterns, method, context)
    chosen: list[ChosenUnits] = []
    last = max((group.block for group in groups), default=-1)
    for number, block in enumerate(blocks[: last + 1]):
        chosen += run.block(block, [group for group in groups if group.block == number])
        context.progress.stage("units", number + 1, last + 1)
    if method.one_shot:
        for each in chosen:
            run.apply(each.group.consumer)
    return chosen


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of ``prune_units``."""

    flow: Flow
    patterns: Mapping[str, SparsityPattern]
    method: UnitMethod
    context: RunContext

    def block(self, block: Block, groups: Sequence[UnitGroup]) -> list[ChosenUnits]:
        """Units of the consumers of a block, in the order of its forward pass."""
        flow, method, record = self.flow, self.method, self.context.record
        dense = {layer.name: layer.weight.clone() for layer in block.layers}
        of_consumer = {group.consumer.name: group for group in groups}
        order = [layer for step in flow.steps() for layer in step.layers] if groups else []
        steps = [Step(((layer,),)) for layer in order if layer.name in of_consumer]
        if len(steps) < len(groups):
            reached = {step.layers[0].name for step in steps}
            lost = next(name for name in of_consumer if name not in reached)
            raise InvalidModelError(f"layer {lost}: expected its inputs, found none")
        writers = flow.writers() if groups and method.objective.residual else []
        flow.begin_block(block, steps)
        for number, step in enumerate(steps):
            layer = step.layers[0]
            if record.kept_units(layer.name) is None:
                begin = time.perf_counter()
                sums = gather(flow, block, step, dense, False, writers, steps[number:])[layer.name]
                if not sums.tokens:
                    raise InvalidModelError(f"layer {layer.name}: expected its inputs, found none")
                self.choose(of_consumer[layer.name], sums, begin)
            if not method.one_shot:
                self.apply(layer)
            flow.settled.settle(step.layers)
        flow.finish_block(block, dense, advanced=False)
        finished = {each.name: each for each in record.consumers()}
        chosen = [of_consumer[step.layers[0].name] for step in steps]
        return [ChosenUnits(each, self.kept(each), finished[each.consumer.name]) for each in chosen]

    def choose(self, group: UnitGroup, sums: GramAccumulator, begin: float) -> None:
        """Solve and record a consumer."""
        layer, method, drift = group.consumer, self.method, None
        weight = layer.weight.clone()
        target = method.objective.target
        if target is not None and sums.has_drift:
            drift = target.drift_of(weight, sums, method.objective.drift, covariance=False)
        unused = SparsityPattern(1, layer.weight.shape[1])
        problem = UnitProblem(
            LayerProblem(weight, sums.gram(), unused, drift, name=layer.name),
            group.columns,
            self.patterns[layer.name],
            method.ridge,
        )
        found = solve_units(problem, method.solver, update=method.update, bias=method.bias)
        saved = found.weight.to(self._dtype(layer))
        mask, applied = problem.mask(found.kept), saved.to(weight.dtype)
        norm = float(problem.layer.output_norms().sum())
        judged = problem.centred().layer if method.bias else problem.layer
        plain = replace(judged, drift=None)
        record = ConsumerRecord(
            name=layer.name,
            block=group.block,
            kind=group.kind,
            units=group.units,
            kept=int(found.kept.sum()),
            width=problem.width,
            rows=weight.shape[0],
            cols=weight.shape[1],
            updated=not torch.equal(applied, weight.masked_fill(~mask, 0)),
            tokens=sums.tokens,
            output_norm=norm,
            error_start=_share(plain.objective(mask), norm),
            error=_share(plain.objective(mask, applied), norm),
            objective_start=_share(found.error_masked, norm),
            objective=_share(judged.objective(mask, applied), norm),
            gap=found.gap,
            swaps=found.stats.get("swaps", 0),
            status=str(found.status),
            seconds=time.perf_counter() - begin,
        )
        packed = pack_mask(found.kept[None]).numpy().tobytes()
        bias = None if found.bias is None else weight_bytes(self._with_means(layer, found.bias))
        self.context.record.add_consumer(record, packed, weight_bytes(saved), bias)

    def _with_means(self, layer: PrunableLayer, added: Tensor) -> Tensor:
        """The layer's bias with what it is to absorb (rows,), as it will be saved."""
        bias = bias_of(layer)
        if bias is None:
            raise InvalidModelError(f"layer {layer.name}: expected a bias for the means, found none")
        return (bias.double() + added.to(bias.device)).to(self._dtype(layer))

    def kept(self, group: UnitGroup) -> Tensor:
        """Units of a finished consumer that stay (units,), bool."""
        packed, _, _ = self._finished(group.consumer)
        return unpack_bytes(packed, (1, group.units))[0]

    def apply(self, layer: PrunableLayer) -> None:
        """Write the weights of a finished consumer, and its bias, as they will be saved."""
        _, stored, added = self._finished(layer)
        like = torch.empty_like(layer.weight, dtype=self._dtype(layer), memory_format=torch.contiguous_format)
        layer.write(weight_from(stored, like).to(layer.weight.dtype))
        bias = bias_of(layer)
        if added is not None and bias is not None:
            bias.copy_(weight_from(added, torch.empty_like(bias, dtype=self._dtype(layer))))

    def _finished(self, layer: PrunableLayer) -> tuple[bytes, bytes, bytes | None]:
        found = self.context.record.kept_units(layer.name)
        if found is None:
            raise InvalidModelError(f"layer {layer.name}: expected its units, found none; no pass reached it")
        return found

    def _dtype(self, layer: PrunableLayer) -> torch.dtype:
        """In which the weight is saved."""
        return self.context.dtypes.get(layer.name, layer.weight.dtype)


def _share(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0
