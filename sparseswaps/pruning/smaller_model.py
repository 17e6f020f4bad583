"""The first stage of a run with units: choose them, and go on with the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.activations import PROBE_TOKENS
from ..masks.packing import pack_mask
from ..masks.saving import Smaller
from ..masks.units_file import units_file
from ..models.blocks import Block, find_blocks
from ..models.experts import ExpertGroup, tensor_of
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from ..models.shrinking import shrunk_model, verify_shrunk
from ..problems import SparsityPattern
from ..records.run import ConsumerRecord
from .expert_pruning import ChosenExperts, prune_experts
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
    kept: dict[str, Tensor] = {}
    updated: list[str] = []
    if groups:
        found = prune_units(loaded.model, blocks, groups, keep, windows, plan.method, context)
        kept |= {each.group.place: each.kept for each in found}
        updated += [each.group.consumer.parameter_name for each in found if each.record.updated]
        if plan.method.bias:
            updated += [f"{group.consumer.name}.bias" for group in groups]
        small = shrunk_model(loaded, groups, [kept[group.place] for group in groups])
        verify_shrunk(loaded.model, small.model, sample)
    mixtures, stay = plan.of_mixtures()
    if mixtures:
        experts = _prune_experts(loaded, blocks, mixtures, stay, windows, plan, context)
        kept |= {each.group.place: each.solution.kept for each in experts}
        updated += [name for each in experts if _has_factors(each) for name in each.group.scaled]
    masks = [kept[group.place] for group in plan.groups]
    small = shrunk_model(loaded, plan.groups, masks)
    before = plan.dense.model.state_dict().keys()  # others are biases that are new
    updated += [name for name in small.model.state_dict() if name not in before]
    records = {record.name: record for record in context.record.consumers()}
    file = units_file(small, plan.groups, masks, [records[group.place] for group in plan.groups], updated)
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
    groups: Sequence[ExpertGroup],
    keep: Sequence[SparsityPattern],
    windows: Samples,
    plan: UnitPlan,
    context: RunContext,
) -> list[ChosenExperts]:
    """Choose experts and record them; a run that was interrupted chooses them again."""
    found = prune_experts(
        loaded.model,
        blocks,
        groups,
        keep,
        windows,
        solver=plan.expert_solver,
        objective=plan.expert_objective,
        ridge=plan.method.ridge,
        update=plan.method.update,
        progress=context.progress,
        store=context.store.sibling(),
    )
    for each in found:
        for name in each.group.scaled:  # as they will be saved
            tensor = tensor_of(loaded.model, name)
            tensor.copy_(tensor.to(loaded.dtypes[name]))
        norm = each.output_norm or 1.0
        record = ConsumerRecord(
            name=each.group.place,
            block=each.group.block,
            kind=each.group.kind,
            units=each.group.units,
            kept=int(each.solution.kept.sum()),
            width=each.group.channels,
            rows=each.group.channels,
            cols=each.group.channels,
            updated=_has_factors(each),
            tokens=int(each.routed.sum()),
            output_norm=each.output_norm,
            error_start=each.routed_error / norm,
            error=each.error / norm,
            objective_start=each.routed_error / norm,
            objective=each.error / norm,
            swaps=0,
            status=str(each.solution.status),
            seconds=each.seconds,
        )
        context.record.add_consumer(record, pack_mask(each.solution.kept[None]).numpy().tobytes(), b"")
    return found


def _has_factors(chosen: ChosenExperts) -> bool:
    """Whether contributions of experts that stay are multiplied by anything."""
    return bool(chosen.group.scaled) and bool((chosen.factors != 1).any())


def _sample(windows: Samples) -> Samples:
    """One window, or the beginning of it."""
    first = windows[:1]
    return first[:, :PROBE_TOKENS] if isinstance(first, torch.Tensor) else first
