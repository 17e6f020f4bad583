"""The main job: load a model, prune it, measure it, save it, verify what was saved."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.activations import can_skip
from ..calibration.dense_outputs import DenseOutputs
from ..calibration.gathering import gradient_batch_size_for
from ..calibration.store import TensorStore
from ..calibration.windows import Windows, calibration_windows, evaluation_windows, window_length
from ..errors import InputError, InvalidTextError
from ..evaluation.measures import is_causal, mean_cosine
from ..evaluation.quality import model_embeddings, model_perplexity
from ..machine import peak_memory_mb, versions
from ..masks.saving import check_folder, dense_weights, hash_of_all, run_record, save_run
from ..models.blocks import DEFAULT_EXCLUDE, check_finite, device_of, find_blocks
from ..models.loading import LoadedModel, load_model, resolve_device
from ..progress import Progress, Silent
from ..ranks import Ranks
from ..records.run import LayerRecord, known_mean
from ..solvers import Group, OneSwap, Solver, Wanda
from .allocation import Allocation, allocate, check_allocation
from .memory import Estimate, estimate, require_memory
from .objective import SEARCH_DEFAULT, Objective
from .pipeline import check_options, prune_layers
from .refinement import check_refinement, refine_masks
from .report import PruneReport
from .settings import Mode

HELD_OUT_WINDOWS = 16


def prune(
    model: str | os.PathLike[str] | LoadedModel,
    pattern: str = "0.5",
    *,
    calibration: str | os.PathLike[str] | Windows,
    evaluation: str | os.PathLike[str] | Windows | None = None,
    solver: Solver | None = None,
    start: Solver | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    evaluation_limit: int | None = None,
    mode: Mode = Mode.SEQUENTIAL,
    objective: Objective | str | None = None,
    allocation: Allocation | str = Allocation.UNIFORM,
    refine: int = 0,
    update: Solver | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    min_expert_tokens: int | None = None,
    activation_limit: float | None = None,
    announce: Callable[[Estimate], None] | None = None,
) -> PruneReport:
    """Prune a model and measure what that did.

    Args:
        model: directory, hub name, or a loaded model, which is then pruned in place.
        pattern: ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``.
        calibration: text file, token file or dataset (see ``calibration_windows``), or windows.
        evaluation: the same, for perplexity or cosine and the held-out layer error; None for none.
        solver: chooses the masks, ``OneSwap()`` by default.
        start: its warm start, ``Wanda()`` by default.
        samples: calibration windows.
        length: tokens per window, 2048 by default, at most what the model's positions allow.
        seed: of the choice of windows.
        evaluation_limit: use only so many windows of the evaluation text; all by default.
        mode: sequential or one-shot.
        objective: what layers are fitted to (see ``Objective``), or its text such as
            ``drift=0.75,residual=0.5,metric``; ``plain`` is the paper's error. By default ``SEARCH_DEFAULT``,
            drift and residual drift, for searches in sequential mode, if the model's blocks depend on each
            other only through their outputs, and the paper's error for everything else.
        allocation: how the sparsity is spread over layers: ``uniform``, ``knapsack`` or ``owl``.
        refine: passes of refinement against the model's output after the layers are pruned (see
            ``refinement``).
        update: a solver of the group *weight update* that changes the kept weights of the final masks: in one
            more pass over the layers, or after ``refine`` passes over the masks in as many over the weights.
        include: shell patterns of layer names; empty means all.
        exclude: shell patterns of layer names that stay dense.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the computation; ``auto`` is float32 on a CPU, else the checkpoint's.
        offload: leave the weights in the checkpoint's files and bring one block at a time to memory (see
            ``offload``), for a model that does not fit; the masks are the same.
        out: directory for the pruned model, its mask file and its record.
        resume: go on with an interrupted run of the same settings in ``out``.
        progress: told how far the run is.
        ranks: the processes that share the work, from ``distributed.joined``; this one alone by default.
        min_expert_tokens: experts that fewer calibration tokens reach are pruned by a fallback (see
            ``experts``); the width of the layer by default.
        activation_limit: gigabytes (10⁹ bytes) of activations in main memory, the rest goes to files; None
            for no limit.
        announce: told what the run will need, before it begins.

    Raises:
        InputError: for anything that cannot be used; nothing is left behind then.
    """
    begin = time.perf_counter()
    ranks = ranks or Ranks()
    progress = progress if progress is not None and ranks.first else Silent()
    solver = OneSwap() if solver is None else solver
    start = Wanda() if start is None else start
    asked = objective is not None
    if isinstance(objective, str):
        objective = Objective.parse(objective)
    elif objective is None:
        objective = _default_objective(solver, mode)
    folder = None if out is None else Path(out)
    if folder is not None:
        ranks.from_first(lambda: check_folder(folder, resume))
    target = resolve_device(device)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    # shapes and texts first: what cannot work is refused before a large model is loaded
    given = isinstance(model, LoadedModel)
    shapes = model if isinstance(model, LoadedModel) else load_model(model, target, dtype, weights=False)
    length = window_length(shapes, length)
    special = not is_causal(shapes.model)
    windows = (
        calibration
        if isinstance(calibration, Windows)
        else calibration_windows(calibration, shapes.tokenizer, samples, length, seed, special)
    )
    eval_windows = (
        evaluation
        if evaluation is None or isinstance(evaluation, Windows)
        else evaluation_windows(
            evaluation, shapes.tokenizer, length, evaluation_limit, special_tokens=special
        )
    )
    _check_vocabulary(shapes, windows, eval_windows)
    blocks = find_blocks(shapes.model, include, exclude)
    check_options(blocks, pattern, mode, objective)
    allocation = check_allocation(allocation, pattern)
    check_refinement(blocks, {layer.name: pattern for block in blocks for layer in block.layers}, refine)
    offload = shapes.residence.offloaded if given else offload
    _check_numbers(min_expert_tokens, activation_limit)
    _check_together(solver, refine, update, offload)
    limit = None if activation_limit is None else int(activation_limit * 1e9)
    needs = estimate(
        shapes.model,
        blocks,
        windows.tokens,
        0 if eval_windows is None else min(len(eval_windows), HELD_OUT_WINDOWS),
        objective.needs_dense_stream,
        objective.residual > 0,
        objective.metric,
        mode is Mode.ONE_SHOT,
        ranks.count,
        limit,
        device_of(shapes.model) if given else target,
        offload,
    )
    if announce is not None and ranks.first:
        announce(needs)
    require_memory(needs, target, with_model=not given, offload=offload)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, target, dtype, offload)
    blocks = find_blocks(loaded.model, include, exclude)
    for block in blocks:
        with loaded.residence.resident(block):
            check_finite([block])
    layers = [layer for block in blocks for layer in block.layers]
    if not asked and objective.needs_dense_stream:
        drifting = ranks.from_first(lambda: can_skip(loaded.model, blocks, windows.tokens))
        objective = objective if drifting else Objective()
    dense = dense_weights(loaded, layers)
    store = TensorStore(limit)
    settings = {
        "model": loaded.source,
        "weights": hash_of_all(dense),
        "pattern": pattern,
        "solver": repr(solver),
        "start": repr(start),
        "mode": str(mode),
        "objective": str(objective),
        "allocation": str(allocation),
        "refine": refine,
        "update": None if update is None else repr(update),
        "samples": len(windows),
        "length": length,
        "seed": seed,
        "calibration": windows.hash,
        "evaluation": None if eval_windows is None else eval_windows.hash,
        "layers": [layer.name for layer in layers],
        "device": target.type,
        "dtype": str(loaded.model.dtype),
        "min_expert_tokens": min_expert_tokens,
    }
    with run_record(folder if ranks.first else None, settings, resume) as record:
        before = _quality(loaded, eval_windows, "dense", progress, store, ranks)
        rule = allocation
        patterns: dict[str, str] = ranks.from_first(
            lambda: (
                record.facts().get("patterns")
                or allocate(
                    loaded.model,
                    blocks,
                    pattern,
                    windows.tokens,
                    rule,
                    solver,
                    _stage(progress, "allocation"),
                    loaded.residence,
                    store,
                )
            )
        )
        record.set({"patterns": patterns})
        outputs = None
        if refine and ranks.first:
            size = gradient_batch_size_for(length)
            outputs = DenseOutputs(loaded.model, windows.tokens, size)
        held_out = None if eval_windows is None else _spread(eval_windows.tokens, HELD_OUT_WINDOWS)
        masks = prune_layers(
            loaded.model,
            blocks,
            patterns,
            windows.tokens,
            solver,
            start,
            mode,
            objective,
            held_out,
            record,
            progress,
            None,
            ranks,
            min_expert_tokens,
            store,
            loaded.residence,
        )
        refinement = None
        if outputs is not None:
            masks, refinement = refine_masks(
                loaded.model,
                blocks,
                patterns,
                windows.tokens,
                outputs,
                dense,
                masks,
                refine,
                record=record,
                progress=progress,
                update=update,
            )
        if update is not None and not refine:
            loaded.residence.restore(layers, dense)
            prune_layers(
                loaded.model,
                blocks,
                patterns,
                windows.tokens,
                update,
                start,
                mode,
                objective,
                held_out,
                record,
                progress,
                masks,
                ranks,
                min_expert_tokens,
                store,
                loaded.residence,
            )
        after = _Quality()
        if ranks.first or not refine:  # only the first rank has the refined model
            judges = Ranks() if refine else ranks
            after = _quality(loaded, eval_windows, "pruned", progress, store, judges)
        if not ranks.first:
            return ranks.from_first(_never)
        records = {finished.name: finished for finished in record.layers()}
        finished = tuple(records[layer.name] for layer in layers)
        if folder is not None:
            save_run(folder, loaded, layers, masks, patterns, dense, record)
        report = PruneReport(
            model=loaded.source,
            pattern=pattern,
            solver=repr(solver),
            start=repr(start),
            mode=str(mode),
            objective=str(objective),
            allocation=str(allocation),
            refine=refine,
            update=None if update is None else repr(update),
            loss_start=None if refinement is None else refinement.loss_start,
            loss=None if refinement is None else refinement.loss,
            refinement_swaps=0 if refinement is None else refinement.swaps,
            samples=len(windows),
            length=length,
            seed=seed,
            calibration=windows.source,
            calibration_hash=windows.hash,
            evaluation=None if eval_windows is None else eval_windows.source,
            evaluation_windows=0 if eval_windows is None else len(eval_windows),
            perplexity_dense=before.perplexity,
            perplexity_pruned=after.perplexity,
            cosine=after.cosine_to(before),
            layers=finished,
            error_start=sum(layer.error_start for layer in finished) / len(finished),
            error=sum(layer.error for layer in finished) / len(finished),
            held_out_error=known_mean([layer.held_out_error for layer in finished]),
            sparsity=_pruned_share(finished),
            seconds=time.perf_counter() - begin,
            seconds_layers=sum(layer.seconds for layer in finished),
            peak_memory_mb=peak_memory_mb(),
            peak_device_memory_mb=(
                torch.cuda.max_memory_allocated(target) / 1e6 if target.type == "cuda" else None
            ),
            device=_device_name(target),
            versions=versions(),
            out=None if folder is None else str(folder),
        )
        record.set({"report": {k: v for k, v in report.to_json().items() if k != "layers"}})
    return ranks.from_first(lambda: report)


def _default_objective(solver: Solver, mode: Mode) -> Objective:
    """Drift and residual drift for searches in sequential mode, the paper's error for everything else."""
    return SEARCH_DEFAULT if solver.drift_by_default and mode is Mode.SEQUENTIAL else Objective()


@dataclass(frozen=True, eq=False)
class _Quality:
    """Perplexity of a causal model, embeddings (windows, hidden) of another; nothing without windows."""

    perplexity: float | None = None
    embeddings: Tensor | None = None

    def cosine_to(self, dense: _Quality) -> float | None:
        if self.embeddings is None or dense.embeddings is None:
            return None
        return mean_cosine(self.embeddings, dense.embeddings)


def _quality(
    loaded: LoadedModel,
    windows: Windows | None,
    which: str,
    progress: Progress,
    store: TensorStore,
    ranks: Ranks,
) -> _Quality:
    if windows is None:
        return _Quality()
    if is_causal(loaded.model):
        report = _stage(progress, f"{which} perplexity")
        return _Quality(perplexity=model_perplexity(loaded, windows.tokens, report, store, ranks))
    report = _stage(progress, f"{which} embeddings")
    return _Quality(embeddings=model_embeddings(loaded, windows.tokens, report, store, ranks))


def _check_numbers(min_expert_tokens: int | None, activation_limit: float | None) -> None:
    if min_expert_tokens is not None and min_expert_tokens < 0:
        raise InputError(f"min_expert_tokens counts tokens: expected at least 0, found {min_expert_tokens}")
    if activation_limit is not None and not activation_limit >= 0:
        raise InputError(f"activation limit in GB: expected at least 0, found {activation_limit:g}")


def _check_together(solver: Solver, refine: int, update: Solver | None, offload: bool) -> None:
    if update is not None and update.group is not Group.WEIGHT_UPDATE:
        raise InputError(f"update: expected a solver that changes kept weights, found {update!r}")
    if refine and solver.group is Group.WEIGHT_UPDATE:
        raise InputError(
            f"refinement chooses among the dense weights: expected a solver of masks, found {solver!r}"
        )
    if refine and offload:
        raise InputError(
            "refinement changes layers of all blocks in turn: expected a model in memory, found offloading"
        )


def _never() -> PruneReport:
    """What the other ranks have to say of the report that the first one sends."""
    raise RuntimeError("the report comes from the first rank")


def _stage(progress: Progress, text: str) -> Any:
    return lambda done, total: progress.stage(text, done, total)


def _spread(windows: Tensor, count: int) -> Tensor:
    """At most ``count`` windows, evenly spread."""
    if len(windows) <= count:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def _pruned_share(layers: Sequence[LayerRecord]) -> float:
    weights = sum(layer.rows * layer.cols for layer in layers)
    return sum(layer.sparsity * layer.rows * layer.cols for layer in layers) / weights


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _check_vocabulary(loaded: LoadedModel, *windows: Windows | None) -> None:
    embeddings: Any = loaded.model.get_input_embeddings()
    size = int(embeddings.num_embeddings)
    for each in windows:
        if each is not None and not 0 <= int(each.tokens.min()) <= int(each.tokens.max()) < size:
            raise InvalidTextError(
                f"tokens of {each.source}: expected ids from 0 to {size - 1}, the vocabulary of "
                f"{loaded.source}, found {int(each.tokens.min())} to {int(each.tokens.max())}"
            )
