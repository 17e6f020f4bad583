"""The first stage of a run with units: choose them, and go on with the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..calibration.activations import PROBE_TOKENS
from ..masks.packing import pack_mask, unpack_bytes
from ..masks.saving import Smaller
from ..masks.units_file import units_file
from ..models.blocks import find_blocks
from ..models.experts import ExpertGroup
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from ..models.shrinking import shrunk_model, verify_shrunk
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
    of_layers = [each for each in plan.groups if isinstance(each, UnitGroup)]
    mixtures = [each for each in plan.groups if isinstance(each, ExpertGroup)]
    patterns = {group.place: pattern for group, pattern in zip(plan.groups, plan.keep, strict=True)}
    dtypes = {group.consumer.name: loaded.dtypes[group.consumer.parameter_name] for group in of_layers}
    keep = [patterns[group.place] for group in of_layers]
    blocks = find_blocks(loaded.model)
    if of_layers:
        inside = replace(context, dtypes=dtypes)
        prune_units(loaded.model, blocks, of_layers, keep, windows, plan.method, inside)
    if mixtures:
        _prune_mixtures(loaded, mixtures, plan, windows, context)
    finished = {each.name: each for each in context.record.consumers()}
    records = [finished[group.place] for group in plan.groups]
    kept = [_kept(context.record, each) for each in records]
    small = shrunk_model(loaded, plan.groups, kept)
    sample = _sample(windows)
    stays = dict(zip((group.place for group in plan.groups), kept, strict=True))
    with fewer_experts(loaded.model, mixtures, [stays[group.place] for group in mixtures]):
        verify_shrunk(loaded.model, small.model, sample)
    before = plan.dense.model.state_dict().keys()  # others are biases that are new
    biases = {name for name in small.model.state_dict() if name not in before}
    if plan.method.bias:
        biases |= {f"{group.consumer.name}.bias" for group in of_layers}
    file = units_file(small, plan.groups, kept, records, biases)
    settings = inputs.settings
    blocks = find_blocks(small.model, settings.include, settings.exclude, settings.prune_routers)
    dtype = str(small.model.dtype).removeprefix("torch.")
    return SmallerModel(
        replace(inputs, model=small, blocks=blocks),
        Smaller(file, sample, dtype),
    )


def _kept(record: RunDatabase, of: ConsumerRecord) -> Tensor:
    """Units of a finished consumer that stay (units,), bool."""
    packed, _, _ = record.kept_units(of.name) or (b"", b"", None)
    return unpack_bytes(packed, (1, of.units))[0]


def _prune_mixtures(
    loaded: LoadedModel,
    mixtures: Sequence[ExpertGroup],
    plan: UnitPlan,
    windows: Samples,
    context: RunContext,
) -> None:
    """Choose the experts of all mixtures, or take them from the record if it has all of them."""
    record, method = context.record, plan.expert_method
    finished = {each.name: record.kept_units(each.name) for each in record.consumers()}
    if all(group.name in finished for group in mixtures):
        for group in mixtures:
            packed, factors, _ = finished[group.name] or (b"", b"", None)
            kept = unpack_bytes(packed, (1, group.units))[0]
            found = torch.from_numpy(np.frombuffer(factors).copy())
            apply_factors(loaded.model, group, kept, found, loaded.dtypes)
        return
    patterns = {group.place: pattern for group, pattern in zip(plan.groups, plan.keep, strict=True)}
    chosen = prune_experts(
        loaded.model,
        find_blocks(loaded.model),
        mixtures,
        [patterns[group.name] for group in mixtures],
        windows,
        solver=method.solver,
        objective=method.objective,
        ridge=method.ridge,
        update=method.update,
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
        updated=bool((chosen.factors != 1).any()),
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


def _sample(windows: Samples) -> Samples:
    """One window, or the beginning of it."""
    first = windows[:1]
    return first[:, :PROBE_TOKENS] if isinstance(first, torch.Tensor) else first
