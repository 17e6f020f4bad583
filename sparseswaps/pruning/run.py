"""The main job: load a model, prune it, measure it, save it, verify what was saved."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.dense_outputs import DenseOutputs
from ..calibration.gathering import gradient_batch_size_for
from ..calibration.store import TensorStore
from ..errors import InputError
from ..evaluation.known import KnownPerplexities
from ..evaluation.measures import compared_output, is_causal, mean_cosine
from ..evaluation.quality import model_embeddings, model_perplexity
from ..machine import peak_memory_mb, versions
from ..masks.output import claimed
from ..masks.saving import (
    SETTINGS_FILE,
    dense_weights,
    hash_of_all,
    other_tensors,
    run_record,
    save_run,
)
from ..models.blocks import Block, PrunableLayer, device_of, find_blocks, passed_over
from ..models.contents import model_hash
from ..models.loading import LoadedModel, resolve_device
from ..problems.pattern import Pattern, pattern_of
from ..problems.products import TF32_OVERRIDE, tf32_is_forced
from ..progress import Progress, Silent
from ..ranks import Ranks
from ..records.run import ConsumerRecord, LayerRecord, known_mean
from ..records.run_database import RunDatabase
from .allocation import allocate
from .card import CARD_FILE, model_card
from .inputs import Announce, Inputs, gather_inputs
from .pipeline import OnLayer, RunContext, prune_layers
from .refinement import Refinement, record_refined_errors, refine_masks
from .report import PruneReport
from .settings import Machine, PruneSettings, split_options
from .smaller_model import make_smaller


def prune(
    model: str | os.PathLike[str] | LoadedModel,
    settings: PruneSettings | str | None = None,
    *,
    machine: Machine | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    announce: Announce | None = None,
    on_layer: OnLayer | None = None,
    **options: Any,
) -> PruneReport:
    """Prune a model and measure what that did.

    ``prune(model, PruneSettings("2:4", calibration="text.txt"))`` and
    ``prune(model, "2:4", calibration="text.txt")`` are the same. With ``units`` the model in ``out`` is a
    smaller one; a loaded model that was given keeps its shapes and has zeros where units went.

    Args:
        model: directory, hub name, or a loaded model, which is then pruned in place.
        settings: what determines the result, or the pattern alone.
        machine: where it runs; this machine's best device by default.
        out: directory for the pruned model, its mask file and its record.
        resume: go on with an interrupted run of the same settings in ``out``.
        progress: told how far the run is.
        announce: told what the run will need, before it begins, and how its windows begin.
        on_layer: called with each layer's ``LayerProblem`` and ``Solution`` before it is applied, for bounds,
            instances, statistics; on the first process.
        options: single options of ``PruneSettings`` and ``Machine`` by name, values or texts, in
            place of those in ``settings`` and ``machine``.

    Raises:
        InputError: for anything that cannot be used; nothing is left behind then.
    """
    begin = time.perf_counter()
    settings, machine = _settings_of(settings, machine or Machine(), options)
    ranks = machine.ranks
    progress = progress if progress is not None and ranks.first else Silent()
    folder = None if out is None else Path(out)
    target = resolve_device(machine.device)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    if ranks.first:
        _tell_of_tf32(target)
    with ExitStack() as stack:
        if folder is not None:
            ranks.from_first(lambda: stack.enter_context(claimed(folder, resume)))
        inputs = gather_inputs(model, settings, machine, announce, saved=folder is not None)
        dense = dense_weights(inputs.model, inputs.layers)
        identity = _identity(inputs, dense)
        record = stack.enter_context(run_record(folder if ranks.first else None, identity, resume))
        loaded = inputs.model
        context = RunContext(
            record,
            progress,
            ranks,
            _activation_store(inputs),
            loaded.residence,
            on_layer,
            {layer.name: loaded.dtypes[layer.parameter_name] for layer in inputs.layers},
            inputs.skip,
        )
        return _run(inputs, dense, identity, context, folder, begin)


def _activation_store(inputs: Inputs) -> TensorStore:
    """Where activations are kept: on a device what fits there."""
    device = device_of(inputs.model.model)
    if device.type == "cpu":
        return TensorStore(inputs.activation_limit)
    return TensorStore(inputs.activation_limit, device=device, room=inputs.activation_room)


def _run(
    inputs: Inputs,
    dense: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    context: RunContext,
    folder: Path | None,
    begin: float,
) -> PruneReport:
    """Measure, prune, measure again, save; the first rank's report on every rank."""
    ranks, record, settings = context.ranks, context.record, inputs.settings
    refined = bool(settings.refine)
    left_dense = passed_over(inputs.blocks, settings.include, settings.exclude)
    record.set({"left_dense": {} if settings.pattern is None else left_dense, "versions": versions()})
    before = _dense_quality(inputs, identity, context)
    size = _Size.of(inputs.model if inputs.units is None else inputs.units.dense)
    smaller = None
    if inputs.units is not None:
        record.set(
            {"units_left": dict(inputs.units.left), "unit_objective": str(inputs.units.method.objective)}
        )
        dense = {}  # which is in nobody's way from here on
        smaller = make_smaller(inputs, inputs.units, context)
        inputs = smaller.inputs
        dense = dense_weights(inputs.model, inputs.layers) if settings.pattern is not None else {}
    found = _Found({}, {}, None) if settings.pattern is None else _prune(inputs, dense, context)
    after = _Quality()
    if ranks.first or not refined:  # only the first rank has the refined model
        after = _quality(inputs, "pruned", replace(context, ranks=Ranks() if refined else ranks))
    if not ranks.first:
        return ranks.from_first(_never)

    def report_now() -> PruneReport:
        report = _report(inputs, found, before, after, record, time.perf_counter() - begin, size)
        return replace(report, out=None if folder is None else str(folder))

    if folder is not None:
        layers = [] if settings.pattern is None else _masked_layers(inputs, record)
        texts = {
            CARD_FILE: model_card(report_now(), inputs.model.origin),
            SETTINGS_FILE: str(settings),
        }
        saved = None if smaller is None else smaller.saved
        save_run(folder, inputs.model, layers, found.masks, found.patterns, dense, record, texts, saved)
    report = report_now()
    record.set(
        {
            "report": {
                key: value for key, value in report.to_json().items() if key not in ("layers", "consumers")
            }
        }
    )
    return ranks.from_first(lambda: report)


def _tell_of_tf32(device: torch.device) -> None:
    """One line where the environment degrades products of float32."""
    if tf32_is_forced(device):
        warnings.warn(
            f"{TF32_OVERRIDE} has products of float32 on {device} in tf32, which nothing else can undo: sums "
            "of activations and gradients are made in float64 instead; unset it",
            stacklevel=3,
        )


def _settings_of(
    settings: PruneSettings | str | None, machine: Machine, options: Mapping[str, Any]
) -> tuple[PruneSettings, Machine]:
    """Settings and machine with the single options in them."""
    ours, machines = split_options(options)
    if settings is not None and not isinstance(settings, PruneSettings):
        if "pattern" in ours:
            raise InputError(f"pattern: expected it once, found {settings!r} and {ours['pattern']!r}")
        ours["pattern"], settings = settings, None
    for name in ("solver", "start", "objective"):  # None says: what is usual
        if name in ours and ours[name] is None:
            del ours[name]
    settings = PruneSettings(**ours) if settings is None else replace(settings, **ours)
    return settings, replace(machine, **machines)


def _identity(inputs: Inputs, dense: Mapping[str, Tensor]) -> dict[str, Any]:
    """What has to be the same when the run is resumed."""
    model, evaluation = inputs.model, inputs.evaluation
    return {
        "model": model.source,
        "weights": hash_of_all(dense),
        "checkpoint": None if model.origin is None else model_hash(model.origin),
        "state": hash_of_all(other_tensors(model, inputs.layers)),
        **inputs.settings.compared(),
        "samples": len(inputs.calibration),
        "calibration": inputs.calibration.hash,
        "evaluation": None if evaluation is None else evaluation.hash,
        "layers": [layer.name for layer in inputs.layers],
        "device": inputs.device.type,
        "dtype": str(model.model.dtype),
    }


@dataclass(frozen=True, eq=False)
class _Found:
    """Masks and patterns by layer, and what a refinement did."""

    masks: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern]
    refinement: Refinement | None


def _prune(inputs: Inputs, dense: Mapping[str, Tensor], context: RunContext) -> _Found:
    """Allocate, prune, refine and update; the model is the pruned one afterwards."""
    settings, model, blocks = inputs.settings, inputs.model.model, inputs.blocks
    windows = inputs.calibration.tokens
    patterns = context.ranks.from_first(lambda: _patterns(inputs, context))
    outputs = None
    if settings.refine and context.ranks.first:
        outputs = DenseOutputs(model, windows, gradient_batch_size_for(windows.shape[1]))
    in_passes = partial(
        prune_layers, model, blocks, patterns=patterns, held_out=inputs.held_out, context=context
    )
    masks = in_passes(settings=settings, calibration=windows)
    refinement = None
    if outputs is not None:
        pruned = _without_dense(blocks, context.record)
        masks, refinement = refine_masks(
            model,
            pruned,
            patterns,
            windows,
            outputs,
            dense,
            masks,
            settings.refine,
            record=context.record,
            progress=context.progress,
            update=settings.update,
        )
        record_refined_errors(model, pruned, patterns, dense, windows, inputs.held_out, context.record)
    if settings.update is not None and not settings.refine:
        inputs.model.residence.restore(inputs.layers, dense)
        # nothing stops early where weights are updated: all windows count
        objective = replace(settings.objective, held_out=0.0)
        updating = replace(settings, solver=settings.update, objective=objective)
        in_passes(settings=updating, calibration=windows, masks=masks)
    return _Found(masks, patterns, refinement)


def _masked_layers(inputs: Inputs, record: RunDatabase) -> list[PrunableLayer]:
    """Layers that have masks."""
    return [layer for block in _without_dense(inputs.blocks, record) for layer in block.layers]


def _without_dense(blocks: Sequence[Block], record: RunDatabase) -> list[Block]:
    """``blocks`` without the layers that were left dense."""
    pruned = {layer.name for layer in record.layers() if not layer.left_dense}
    return [
        replace(block, layers=tuple(layer for layer in block.layers if layer.name in pruned))
        for block in blocks
    ]


def _patterns(inputs: Inputs, context: RunContext) -> dict[str, Pattern]:
    """The pattern of each layer, from the record where it has them."""
    known = context.record.facts().get("patterns")
    if known is not None:
        return {name: pattern_of(*fields) for name, fields in known.items()}
    patterns = allocate(
        inputs.model.model,
        inputs.blocks,
        inputs.settings.rule,
        inputs.calibration.tokens,
        inputs.settings.allocation,
        inputs.settings.solver,
        _stage(context.progress, "allocation"),
        inputs.model.residence,
        context.store,
    )
    fields = {name: [each.keep, each.block, each.couples.value] for name, each in patterns.items()}
    context.record.set({"patterns": fields})
    return patterns


@dataclass(frozen=True, eq=False)
class _Quality:
    """Perplexity of a causal model on text, else embeddings (windows, hidden) and what they are made of.

    Nothing without windows.
    """

    perplexity: float | None = None
    embeddings: Tensor | None = None
    compared: str | None = None

    def cosine_to(self, dense: _Quality) -> float | None:
        if self.embeddings is None or dense.embeddings is None:
            return None
        return mean_cosine(self.embeddings, dense.embeddings)


# Of what has to be the same when a run is resumed, what the dense model's perplexity depends on.
_OF_DENSE = ("weights", "checkpoint", "state", "evaluation", "layers", "device", "dtype")


def _dense_quality(inputs: Inputs, identity: Mapping[str, Any], context: RunContext) -> _Quality:
    """Of the dense model; the perplexity that an earlier run has measured is not measured again."""
    facts = {name: identity[name] for name in _OF_DENSE} | {"versions": versions()}
    known = KnownPerplexities()
    found = context.ranks.from_first(lambda: known.get(facts))
    if found is not None:
        context.progress.stage("dense perplexity, as measured before", 1, 1)
        context.record.set({"dense_measured_before": True})
        return _Quality(perplexity=found)
    quality = _quality(inputs, "dense", context)
    if quality.perplexity is not None and context.ranks.first:
        known.put(facts, quality.perplexity)
    return quality


def _quality(inputs: Inputs, which: str, context: RunContext) -> _Quality:
    loaded, windows = inputs.model, inputs.evaluation
    if windows is None:
        return _Quality()
    if is_causal(loaded.model) and isinstance(windows.tokens, Tensor):
        report = _stage(context.progress, f"{which} perplexity")
        found = model_perplexity(loaded, windows.tokens, report, context.store, context.ranks)
        return _Quality(perplexity=found)
    report = _stage(context.progress, f"{which} embeddings")
    embeddings = model_embeddings(loaded, windows.tokens, report, context.store, context.ranks)
    return _Quality(embeddings=embeddings, compared=compared_output(loaded.model, windows.tokens))


def _report(
    inputs: Inputs,
    found: _Found,
    before: _Quality,
    after: _Quality,
    record: RunDatabase,
    seconds: float,
    dense: _Size,
) -> PruneReport:
    """What the run found."""
    records = {finished.name: finished for finished in record.layers()}
    finished = tuple(records[layer.name] for layer in inputs.layers) if inputs.settings.pattern else ()
    pruned = [layer for layer in finished if not layer.left_dense]
    consumers = tuple(record.consumers())
    measured: Sequence[LayerRecord | ConsumerRecord] = pruned if inputs.settings.pattern else consumers
    refinement, device, size = found.refinement, inputs.device, _Size.of(inputs.model)
    return PruneReport(
        model=inputs.model.source,
        settings=replace(inputs.settings, samples=len(inputs.calibration)),
        loss_start=None if refinement is None else refinement.loss_start,
        loss=None if refinement is None else refinement.loss,
        refinement_swaps=0 if refinement is None else refinement.swaps,
        calibration_hash=inputs.calibration.hash,
        evaluation_hash=None if inputs.evaluation is None else inputs.evaluation.hash,
        evaluation_windows=0 if inputs.evaluation is None else len(inputs.evaluation),
        perplexity_dense=before.perplexity,
        perplexity_pruned=after.perplexity,
        cosine=after.cosine_to(before),
        compared=after.compared,
        layers=finished,
        consumers=consumers,
        parameters_dense=dense.parameters,
        parameters=size.parameters,
        megabytes_dense=dense.megabytes,
        megabytes=size.megabytes,
        left_dense=Counter(record.facts()["left_dense"].values()),
        error_start=sum(layer.error_start for layer in measured) / len(measured),
        error=sum(layer.error for layer in measured) / len(measured),
        held_out_error=known_mean([layer.held_out_error for layer in finished]),
        sparsity=_pruned_share(finished, dense.layers, size.layers, inputs.units is not None),
        seconds=seconds,
        seconds_layers=sum(each.seconds for each in consumers) + sum(each.seconds for each in finished),
        peak_memory_mb=peak_memory_mb(),
        peak_device_memory_mb=_peak_device_memory_mb(device),
        device=_device_name(device),
        versions=record.facts()["versions"],
        out=None,
    )


def _never() -> PruneReport:
    """What the other ranks have to say of the report that the first one sends."""
    raise RuntimeError("the report comes from the first rank")


def _stage(progress: Progress, text: str) -> Any:
    return lambda done, total: progress.stage(text, done, total)


def _pruned_share(layers: Sequence[LayerRecord], before: int, left: int, smaller: bool) -> float:
    """Pruned share of the weights of layers that were to have masks; of all layers where units went."""
    zeros = sum(layer.sparsity * layer.rows * layer.cols for layer in layers)
    if smaller:
        return (before - left + zeros) / before
    return zeros / sum(layer.rows * layer.cols for layer in layers)


@dataclass(frozen=True)
class _Size:
    """Of a model: parameters, 10⁶ bytes of what is saved of it, weights of the layers of its blocks."""

    parameters: int
    megabytes: float
    layers: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> _Size:
        network, saved = loaded.model, loaded.model.state_dict().keys()
        tensors = [*network.named_parameters(), *network.named_buffers()]
        size = sum(
            tensor.numel() * loaded.dtypes.get(name, tensor.dtype).itemsize
            for name, tensor in tensors
            if name in saved
        )
        layers = [layer for block in find_blocks(network) for layer in block.layers]
        return cls(
            sum(parameter.numel() for parameter in network.parameters()),
            size / 1e6,
            sum(layer.weight.numel() for layer in layers),
        )


def _peak_device_memory_mb(device: torch.device) -> float | None:
    """Most memory that was in use on a CUDA device, in 10⁶ bytes; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
