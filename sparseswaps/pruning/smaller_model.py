"""The first stage of a run with units: choose them, and go on with the model without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.activations import PROBE_TOKENS
from ..masks.saving import Smaller
from ..masks.units_file import units_file
from ..models.blocks import find_blocks
from ..models.inputs import Samples
from ..models.shrinking import shrunk_model, verify_shrunk
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
    dtypes = {group.consumer.name: loaded.dtypes[group.consumer.parameter_name] for group in plan.groups}
    context = replace(context, dtypes=dtypes)
    found = prune_units(
        loaded.model, find_blocks(loaded.model), plan.groups, plan.keep, windows, plan.method, context
    )
    chosen = {each.group.consumer.name: each for each in found}
    kept: list[Tensor] = [chosen[group.consumer.name].kept for group in plan.groups]
    small = shrunk_model(loaded, plan.groups, kept)
    sample = _sample(windows)
    verify_shrunk(loaded.model, small.model, sample)
    records = [chosen[group.consumer.name].record for group in plan.groups]
    file = units_file(small, plan.groups, kept, records)
    settings = inputs.settings
    blocks = find_blocks(small.model, settings.include, settings.exclude, settings.prune_routers)
    dtype = str(small.model.dtype).removeprefix("torch.")
    return SmallerModel(
        replace(inputs, model=small, blocks=blocks),
        Smaller(file, sample, dtype),
    )


def _sample(windows: Samples) -> Samples:
    """One window, or the beginning of it."""
    first = windows[:1]
    return first[:, :PROBE_TOKENS] if isinstance(first, torch.Tensor) else first
