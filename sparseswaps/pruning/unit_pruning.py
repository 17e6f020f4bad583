"""Choose whole units of a model's layers block by block: channels of MLPs, heads, groups of heads.

In the order of a forward pass each consumer (see ``problems.units``) gets its units from sums over what the
pruned network gives it, with drift and residual drift as masks do, and least squares for the columns that
stay. Pruned columns are zero then, so that what produced them is idle; ``models.shrinking`` takes both out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..calibration.activations import blocks_as_used, can_skip
from ..calibration.gathering import Flow, gather
from ..calibration.steps import Step
from ..calibration.store import TensorStore
from ..errors import InputError, InvalidModelError
from ..models.blocks import Block
from ..models.inputs import Samples
from ..models.units import UnitGroup
from ..problems import LayerProblem, SparsityPattern
from ..problems.units import RIDGE, UnitProblem
from ..progress import Progress, Silent
from ..ranks import Ranks
from ..solvers.units import DropAddSwap, UnitSolution, UnitSolver, solve_units
from .objective import SEARCH_DEFAULT, Objective


@dataclass(frozen=True, eq=False)
class ChosenUnits:
    """Units of one consumer.

    Attributes:
        group: what they are.
        solution: kept units and the consumer's weights, as they were applied.
        output_norm: ``‖W X̂‖²``, what relative errors are relative to.
        seconds: of sums and search.
    """

    group: UnitGroup
    solution: UnitSolution
    output_norm: float
    seconds: float


def prune_units(
    model: nn.Module,
    blocks: Sequence[Block],
    groups: Sequence[UnitGroup],
    keep: Sequence[SparsityPattern],
    calibration: Samples,
    *,
    solver: UnitSolver | None = None,
    objective: Objective = SEARCH_DEFAULT,
    ridge: float = RIDGE,
    update: bool = True,
    progress: Progress | None = None,
    store: TensorStore | None = None,
) -> list[ChosenUnits]:
    """Choose the units of ``groups``, one consumer after the other, and change the consumers in place.

    Args:
        model: the dense model; afterwards the one with zero columns.
        blocks: from ``find_blocks``.
        groups: what belongs together, from ``find_units``.
        keep: of each group, how many units of how many neighbours stay.
        calibration: token windows (windows, length).
        solver: of units; swaps from structured OBS by default.
        objective: drift and residual drift, by default those of searches; no other part is used.
        ridge: of the least squares towards the old weights, a share of the Gram matrix's mean diagonal.
        update: whether kept columns are updated.
        progress: told about every block.
        store: where activations are kept; in main memory by default.

    Raises:
        InputError: for parts of the objective that units do not have, or two kinds in front of one layer.
        InvalidModelError: for drift in a model whose blocks have hidden connections.
    """
    if objective.metric or objective.held_out or objective.shrinkage or len(objective.strengths()) > 1:
        raise InputError(f"objective of units: expected drift and residual drift alone, found {objective}")
    blocks = blocks_as_used(model, blocks, calibration)
    skip = can_skip(model, blocks, calibration)
    if objective.target is not None and not skip:
        raise InvalidModelError(
            f"{type(model).__name__}: expected blocks that depend on earlier ones only through their "
            "outputs, as drift needs, found other connections; choose units without drift"
        )
    progress = progress or Silent()
    flow = Flow.of(model, blocks, calibration, skip, objective.target, Ranks(), store or TensorStore())
    patterns = {group.consumer.name: pattern for group, pattern in zip(groups, keep, strict=True)}
    if len(patterns) < len(groups):
        raise InputError("units of a layer: expected one kind of them, found several")
    run = _Run(flow, patterns, solver or DropAddSwap(), objective, ridge, update)
    chosen: list[ChosenUnits] = []
    last = max((group.block for group in groups), default=-1)
    for number, block in enumerate(blocks[: last + 1]):
        own = [group for group in groups if group.block == number]
        chosen += run.block(block, own)
        progress.stage("units", number + 1, last + 1)
    return chosen


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of ``prune_units``."""

    flow: Flow
    patterns: Mapping[str, SparsityPattern]
    solver: UnitSolver
    objective: Objective
    ridge: float
    update: bool

    def block(self, block: Block, groups: Sequence[UnitGroup]) -> list[ChosenUnits]:
        """Units of the consumers of a block, in the order of its forward pass."""
        flow = self.flow
        dense = {layer.name: layer.weight.clone() for layer in block.layers}
        of_consumer = {group.consumer.name: group for group in groups}
        order = [layer for step in flow.steps() for layer in step.layers] if groups else []
        steps = [Step(((layer,),)) for layer in order if layer.name in of_consumer]
        writers = flow.writers() if groups and self.objective.residual else []
        flow.begin_block(block, steps)
        chosen = []
        for number, step in enumerate(steps):
            begin = time.perf_counter()
            layer = step.layers[0]
            sums = gather(flow, block, step, dense, False, writers, steps[number:])[layer.name]
            if not sums.tokens:
                raise InvalidModelError(f"layer {layer.name}: expected its inputs, found none")
            target, drift = self.objective.target, None
            weight = layer.weight.clone()
            if target is not None and sums.has_drift:
                drift = target.drift_of(weight, sums, self.objective.drift, covariance=False)
            group = of_consumer[layer.name]
            unused = SparsityPattern(1, layer.weight.shape[1])
            problem = UnitProblem(
                LayerProblem(weight, sums.gram(), unused, drift, name=layer.name),
                group.columns,
                self.patterns[layer.name],
                self.ridge,
            )
            solution = solve_units(problem, self.solver, update=self.update)
            layer.write(solution.weight.to(weight.dtype))
            flow.settled.settle(step.layers)
            norm = float(problem.layer.output_norms().sum())
            chosen.append(ChosenUnits(group, solution, norm, time.perf_counter() - begin))
        flow.finish_block(block, dense, advanced=False)
        return chosen
