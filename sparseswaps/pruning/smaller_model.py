"""The first stage of a run with units: choose them, and go on with the model without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..calibration.activations import PROBE_TOKENS
from ..masks.packing import pack_mask, unpack_bytes
from ..masks.saving import Smaller
from ..masks.units_file import units_file
from ..models.blocks import Block, find_blocks
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from ..models.shrinking import Units, shrunk_model, verify_shrunk
from ..models.units import UnitGroup
from ..records.run import ConsumerRecord
from ..records.run_database import RunDatabase
from .expert_pruning import ChosenExperts, apply_factors, fewer_experts, prune_experts
from .inputs import Inputs
from .pipeline import RunContext
from .unit_plan import UnitPlan
from .unit_pruning import prune_units


@dataclass(frozen=True, eq=False)
class SmallerModel:
    """The model without the units that went.

    Attributes:
        inputs: of the rest of the run, with this model.
        saved: what is said of it when it is saved.
    """

    inputs: Inputs
    saved: Smaller


def make_smaller(inputs: Inputs, plan: UnitPlan, context: RunContext) -> SmallerModel:
    """Choose units, leave them out, and check that the model computes the same without them.

    Args:
        inputs: of the run; its model is afterwards the one with zero columns.
        plan: which units.
        context: of the run.

    Raises:
        VerificationError: if the smaller model computes something else.
    """
    loaded, windows = inputs.model, inputs.calibration.tokens
    groups, keep = plan.of_layers()
    dtypes = {group.consumer.name: loaded.dtypes[group.consumer.parameter_name] for group in groups}
    context = replace(context, dtypes=dtypes)
    blocks, sample = find_blocks(loaded.model), _sample(windows)
    if groups:
        prune_units(loaded.model, blocks, groups, keep, windows, plan.method, context)
    mixtures, _ = plan.of_mixtures()
    if mixtures:
        _prune_experts(loaded, blocks, windows, plan, context)
    kept = [_kept(context.record, group) for group in plan.groups]
    small = shrunk_model(loaded, plan.groups, kept)
    with fewer_experts(loaded.model, mixtures, [_kept(context.record, group) for group in mixtures]):
        verify_shrunk(loaded.model, small.model, sample)
    records = {record.name: record for record in context.record.consumers()}
    of_groups = [records[group.place] for group in plan.groups]
    file = units_file(small, plan.groups, kept, of_groups, _updated(plan, small, records))
    settings = inputs.settings
    blocks = find_blocks(small.model, settings.include, settings.exclude, settings.prune_routers)
    dtype = str(small.model.dtype).removeprefix("torch.")
    return SmallerModel(
        replace(inputs, model=small, blocks=blocks),
        Smaller(file, sample, dtype),
    )


def _prune_experts(
    loaded: LoadedModel,
    blocks: Sequence[Block],
    windows: Samples,
    plan: UnitPlan,
    context: RunContext,
) -> None:
    """Choose the experts of all mixtures, or take them from the record if it has all of them."""
    record = context.record
    mixtures, keep = plan.of_mixtures()
    finished = {each.name: record.kept_units(each.name) for each in record.consumers()}
    if all(group.name in finished for group in mixtures):
        for group in mixtures:
            factors = (finished[group.name] or (b"", b""))[1]
            found = torch.from_numpy(np.frombuffer(factors).copy())
            apply_factors(loaded.model, group, _kept(record, group), found, loaded.dtypes)
        return
    chosen = prune_experts(
        loaded.model,
        blocks,
        mixtures,
        keep,
        windows,
        solver=plan.expert_solver,
        objective=plan.expert_objective,
        ridge=plan.method.ridge,
        update=plan.method.update,
        context=replace(context, dtypes=loaded.dtypes),
    )
    for each in chosen:
        packed = pack_mask(each.solution.kept[None]).numpy().tobytes()
        record.add_consumer(_mixture_record(each), packed, each.factors.double().cpu().numpy().tobytes())


def _mixture_record(chosen: ChosenExperts) -> ConsumerRecord:
    """A mixture as a consumer of its experts' contributions."""
    group, solution, norm = chosen.group, chosen.solution, chosen.output_norm
    before, after = (error / norm if norm > 0 else 0.0 for error in (chosen.routed_error, chosen.error))
    return ConsumerRecord(
        name=group.name,
        block=group.block,
        kind=group.kind,
        units=group.units,
        kept=int(solution.kept.sum()),
        width=1,
        rows=group.channels,
        cols=group.units,
        updated=bool(group.scaled) and bool((chosen.factors != 1).any()),
        tokens=chosen.tokens,
        output_norm=norm,
        error_start=before,
        error=after,
        objective_start=before,
        objective=after,
        gap=solution.gap,
        swaps=solution.stats.get("swaps", 0),
        status=str(solution.status),
        seconds=chosen.seconds,
    )


def _kept(record: RunDatabase, group: Units) -> Tensor:
    """Units of a finished group that stay (units,), bool."""
    packed = (record.kept_units(group.place) or (b"",))[0]
    return unpack_bytes(packed, (1, group.units))[0]


def _updated(plan: UnitPlan, small: LoadedModel, records: Mapping[str, ConsumerRecord]) -> list[str]:
    """Names of tensors whose values are others than the dense model's."""
    names: list[str] = []
    for group in plan.groups:
        if isinstance(group, UnitGroup):
            names += [group.consumer.parameter_name] * records[group.place].updated
            names += [f"{group.consumer.name}.bias"] * plan.method.bias
        elif records[group.place].updated:
            names += group.scaled
    before = plan.dense.model.state_dict().keys()  # others are biases that are new
    return names + [name for name in small.model.state_dict() if name not in before]


def _sample(windows: Samples) -> Samples:
    """One window, or the beginning of it."""
    first = windows[:1]
    return first[:, :PROBE_TOKENS] if isinstance(first, torch.Tensor) else first
