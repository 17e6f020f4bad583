"""What goes into a run: model, blocks, windows; loaded and checked before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibration.activations import blocks_as_used, can_skip
from ..calibration.features import check_forward
from ..calibration.windows import (
    Windows,
    calibration_windows,
    evaluation_windows,
    for_model,
    window_length,
)
from ..errors import InputError
from ..evaluation.beginning import AddBos, Beginning, as_decided, decide_beginning
from ..evaluation.measures import is_causal
from ..models.blocks import Block, PrunableLayer, check_finite, device_of, find_blocks
from ..models.companions import unread_tensors
from ..models.inputs import Samples
from ..models.loading import LoadedModel, load_model, resolve_device
from .allocation import check_allocation
from .layer_solving import patterns_of
from .memory import Estimate, Work, estimate, require_memory
from .objective import AUTO
from .pipeline import check_options, with_drift_that_works, with_stated_drifts
from .refinement import check_refinement
from .settings import Allocation, Machine, PruneSettings
from .unit_plan import UnitPlan, plan_units

# Told what a run will need, how its windows begin, and which units go.
Announce = Callable[[Estimate | Beginning | UnitPlan], None]

# Layer errors are measured on so many tokens of the evaluation text as well, in windows of it, at least and
# at most so many.
HELD_OUT_TOKENS = 4096
LEAST_HELD_OUT, MOST_HELD_OUT = 4, 16


@dataclass(frozen=True, eq=False)
class Inputs:
    """Model and texts of a run.

    Attributes:
        settings: with stated drifts, the windows' length and how they begin.
        model: loaded.
        blocks: its prunable blocks.
        calibration, evaluation: windows; no evaluation is None.
        device: where it computes.
        activation_limit: bytes of activations in main memory, or None.
        skip: whether blocks depend on earlier ones only through what those return (``can_skip``).
        activation_room: bytes of activations that stay on the device.
        units: that go before masks are chosen, None for none.
    """

    settings: PruneSettings
    model: LoadedModel
    blocks: list[Block]
    calibration: Windows
    evaluation: Windows | None
    device: torch.device
    activation_limit: int | None
    skip: bool
    activation_room: int = 0
    units: UnitPlan | None = None

    @property
    def layers(self) -> list[PrunableLayer]:
        """All prunable layers, in forward order."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def held_out(self) -> Samples | None:
        """Evaluation windows on which layer errors are measured, evenly spread."""
        if self.evaluation is None:
            return None
        return _spread(self.evaluation.tokens, held_out_windows(self.evaluation.tokens))


def gather_inputs(
    model: str | os.PathLike[str] | LoadedModel,
    settings: PruneSettings,
    machine: Machine,
    announce: Announce | None = None,
    saved: bool = False,
) -> Inputs:
    """Load and check everything; shapes and texts first, so that a large model is not loaded for nothing.

    Args:
        model: directory, hub name, or a loaded model.
        settings: of the run.
        machine: where it runs.
        announce: told what the run will need, before the weights are loaded, and how windows begin.
        saved: whether the result will be saved.

    Raises:
        InputError: for anything that cannot be used.
    """
    settings.check_units()
    target = resolve_device(machine.device)
    given = isinstance(model, LoadedModel)

    def read(offload: bool = False, weights: bool = True) -> LoadedModel:
        if isinstance(model, LoadedModel):
            return model
        return load_model(model, target, machine.dtype, offload, weights=weights, trust=machine.trust)

    shapes = read(weights=False)
    if saved:
        unread_tensors(shapes)  # those that cannot be kept refuse the run now
    length = window_length(shapes, settings.length, settings.calibration, settings.evaluation)
    asked = replace(settings, length=length)
    settings = with_stated_drifts(asked)
    calibration, evaluation = _windows(shapes, settings, settings.add_bos is AddBos.YES)
    blocks = find_blocks(shapes.model, settings.include, settings.exclude, settings.prune_routers)
    offload = shapes.residence.offloaded if given else machine.offload
    _check_patterns(settings, blocks, offload, machine)
    limit = None if machine.activation_limit is None else int(machine.activation_limit * 1e9)
    needs = estimate(
        shapes,
        blocks,
        calibration.tokens,
        _work(settings, calibration, evaluation, saved),
        ranks=machine.ranks.count,
        activation_limit=limit,
        device=device_of(shapes.model) if given else target,
        offload=offload,
    )
    if announce is not None and machine.ranks.first:
        announce(needs)
    require_memory(needs, target, with_model=not given, offload=offload)
    loaded = read(offload)
    blocks = find_blocks(loaded.model, settings.include, settings.exclude, settings.prune_routers)
    blocks = blocks_as_used(loaded.model, blocks, calibration.tokens)
    if settings.pattern is not None:
        patterns_of(blocks, settings.rule)
    for block in blocks:
        with loaded.residence.resident(block):
            check_finite([block])
    for windows in (calibration, evaluation):
        if windows is not None:
            check_forward(loaded, windows.tokens, windows.source)
    beginning = decide_beginning(loaded, asked.add_bos, calibration, machine.ranks)
    if announce is not None and machine.ranks.first and is_causal(loaded.model) and asked.length is not None:
        announce(beginning)
    calibration, evaluation = as_decided(
        beginning, asked.add_bos, (calibration, evaluation), lambda bos: _windows(loaded, asked, bos)
    )
    asked = replace(asked, add_bos=beginning.add_bos)
    skip = machine.ranks.from_first(lambda: can_skip(loaded.model, blocks, calibration.tokens))
    units = plan_units(loaded, asked, calibration.tokens)
    if units is not None:
        loaded = units.model
        blocks = find_blocks(loaded.model, settings.include, settings.exclude, settings.prune_routers)
        blocks = blocks_as_used(loaded.model, blocks, calibration.tokens)
        if announce is not None:
            announce(units)
    if settings.pattern is None and units is not None:
        settings = replace(asked, objective=units.method.objective)
    else:
        settings = with_drift_that_works(loaded.model, asked, skip, machine.ranks)
    room = needs.activation_room
    return Inputs(settings, loaded, blocks, calibration, evaluation, target, limit, skip, room, units)


def _check_patterns(
    settings: PruneSettings, blocks: Sequence[Block], offload: bool, machine: Machine
) -> None:
    """Refuse what does not go together before any work is done."""
    patterns = {} if settings.pattern is None else patterns_of(blocks, settings.rule)
    check_options(settings, patterns.values())
    if settings.pattern is not None:
        check_allocation(settings.allocation, settings.rule)
    check_refinement(blocks, patterns, settings.refine)
    changes = "refinement changes layers of all blocks in turn" if settings.refine else ""
    changes = "units make another model" if settings.units is not None else changes
    if changes and offload:
        raise InputError(f"{changes}: expected a model in memory, found offloading")
    if settings.units is not None and machine.ranks.count > 1:
        raise InputError(f"units: expected one process that chooses them, found {machine.ranks.count}")


def _work(settings: PruneSettings, calibration: Windows, evaluation: Windows | None, saved: bool) -> Work:
    """What the run computes."""
    objective = settings.objective
    return Work(
        held_out=0 if evaluation is None else held_out_windows(evaluation.tokens),
        evaluated=0 if evaluation is None else len(evaluation),
        drift=objective.needs_dense_stream,
        residual=objective.residual > 0,
        metric=objective.metric or settings.allocation is Allocation.KNAPSACK,
        whole_blocks=settings.whole_blocks,
        compared=round(objective.held_out_share * len(calibration)) if objective.drift == AUTO else 0,
        refined=settings.refine > 0,
        saved=saved,
        units=settings.units is not None,
    )


def _windows(shapes: LoadedModel, settings: PruneSettings, bos: bool) -> tuple[Windows, Windows | None]:
    """Windows of the calibration and of the evaluation text, with a beginning-of-text token or without."""
    length, special = settings.length, not is_causal(shapes.model)
    tokenizer = shapes.tokenizer
    source = settings.calibration
    if source is None:
        raise InputError("calibration: expected a text, a token file, a dataset or inputs, found none")
    if isinstance(source, Windows):
        windows = source.with_bos(tokenizer) if bos else source
    else:
        windows = calibration_windows(
            source, tokenizer, settings.samples, length, settings.seed, special, bos
        )
    other = settings.evaluation
    if isinstance(other, Windows):
        other = other.with_bos(tokenizer) if bos else other
    elif other is not None:
        other = evaluation_windows(other, tokenizer, length, settings.evaluation_limit, special, bos)
    return for_model(windows, shapes), None if other is None else for_model(other, shapes)


def held_out_windows(windows: Samples) -> int:
    """How many evaluation windows layer errors are measured on."""
    most = MOST_HELD_OUT
    if isinstance(windows, torch.Tensor):
        most = min(max(LEAST_HELD_OUT, HELD_OUT_TOKENS // windows.shape[1]), MOST_HELD_OUT)
    return min(len(windows), most)


def _spread(windows: Samples, count: int) -> Samples:
    """At most ``count`` windows, evenly spread."""
    if len(windows) <= count:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]
