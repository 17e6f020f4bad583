"""Prune the layers of a model, block by block.

*one-shot*: every Gram matrix comes from the dense model. *sequential* (the field's default): each
block, and inside it each group of layers that shares an input, sees what the already pruned part of
the model produces. The objective (see ``objective``) may ask for more: with drift,
dense and pruned activations travel side by side; with the output metric, gradients of the dense
model are gathered before the first layer.

At any time the Gram matrices of one step are held: in sequential mode those of layers with one
input, in one-shot mode those of one block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from .activations import Step, Stream, can_skip, experts_one_by_one, residual_writers, steps_of
from .errors import InputError, InvalidModelError, InvalidProblemError
from .gradients import gradient_moments
from .masks import pack_mask, unpack_bytes
from .models import Block, PrunableLayer
from .objective import Objective
from .problems import Drift, Gram, GramAccumulator, LayerProblem, output_metric
from .problems.pattern import LayerBudget, Pattern, parse_pattern
from .records import LayerRecord, RunDatabase
from .solvers import Budget, Group, Outcome, RowSweeps, Solution, Solver, Status, solve

# Tokens per forward call: enough to keep a processor busy, few enough for its memory.
TOKENS_PER_BATCH = 8192


class Mode(StrEnum):
    """Which activations a layer is fitted to."""

    ONE_SHOT = "one-shot"
    SEQUENTIAL = "sequential"


class Progress(Protocol):
    """Whoever wants to know how far a run is."""

    def stage(self, text: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of a stage such as an evaluation are over."""

    def layer_started(self, name: str) -> None:
        """The search on a layer begins."""

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """``done`` of ``total`` weights are pruned or known to be pruned."""


class Silent:
    """Tells nobody."""

    def stage(self, text: str, done: int, total: int) -> None:
        """Say nothing."""

    def layer_started(self, name: str) -> None:
        """Say nothing."""

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """Say nothing."""


@dataclass(frozen=True, eq=False)
class _Flow:
    """Activations of the pruned network, and beside them of the dense one where drift needs them."""

    pruned: Stream
    dense: Stream | None


def batch_size_for(length: int) -> int:
    """Windows of ``length`` tokens per forward call."""
    return max(1, TOKENS_PER_BATCH // length)


def prune_layers(
    model: nn.Module,
    blocks: Sequence[Block],
    pattern: str | Mapping[str, str],
    calibration: Tensor,
    solver: Solver,
    start: Solver,
    mode: Mode = Mode.SEQUENTIAL,
    objective: Objective | None = None,
    held_out: Tensor | None = None,
    record: RunDatabase | None = None,
    progress: Progress | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Choose and apply a mask for every layer of ``blocks``, in place.

    Args:
        model: the dense model; afterwards the pruned one.
        blocks: from ``find_blocks``.
        pattern: ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``, for all layers or for each by name.
        calibration: token windows (windows, length).
        solver: chooses the masks.
        start: warm start of every solver that is not a score; its error is recorded for comparison.
        mode: one-shot or sequential.
        objective: what layers are fitted to; the paper's error by default.
        held_out: token windows on which the layer error is measured as well.
        record: finished layers are written here, and taken from here if they are there already.
        progress: told about every layer.
        masks: warm start of each layer by name instead of ``start``'s, for a solver that changes kept
            weights; then only layers whose weights the record has count as finished.

    Returns:
        Mask (rows, cols), bool, of each layer by name.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
        InvalidModelError: for NaN or Inf in activations, naming the layer.
    """
    objective = objective or Objective()
    check_options(blocks, pattern, mode, objective)
    layers = [layer for block in blocks for layer in block.layers]
    database = record or RunDatabase(None)
    with experts_one_by_one(model):
        job = _Job(
            model,
            blocks,
            pattern,
            solver,
            start,
            mode,
            objective,
            database,
            progress or Silent(),
            masks,
            sum(layer.weight.numel() for layer in layers),
        )
        return job.run(calibration, held_out)


def check_options(
    blocks: Sequence[Block], pattern: str | Mapping[str, str], mode: Mode, objective: Objective
) -> None:
    """Refuse options that cannot work before any work is done.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
    """
    if objective.needs_dense_stream and mode is Mode.ONE_SHOT:
        raise InputError(
            "drift needs the inputs of the pruned model: expected sequential mode, found one-shot"
        )
    for block in blocks:
        for layer in block.layers:
            found = pattern_of_layer(layer, pattern)
            if objective.metric and isinstance(found, LayerBudget):
                raise InputError(
                    "the output metric couples rows of equal sparsity: expected a pattern of rows or blocks, "
                    f"found {pattern}"
                )


def layer_problems(
    model: nn.Module, blocks: Sequence[Block], pattern: str, calibration: Tensor
) -> Iterator[LayerProblem]:
    """Every layer of ``blocks`` as a problem on the dense model's activations, block by block.

    Layers that no calibration token reaches are left out.

    Args:
        model: the dense model; it is not changed.
        blocks: from ``find_blocks``.
        pattern: ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``.
        calibration: token windows (windows, length).
    """
    for block in blocks:
        for layer in block.layers:
            pattern_of_layer(layer, pattern)
    with experts_one_by_one(model):
        skip = can_skip(model, blocks, calibration)
        stream = Stream(model, blocks, calibration, batch_size_for(calibration.shape[1]), skip)
        for block in blocks:
            groups = [group for step in steps_of(stream) for group in step.inputs] if block.layers else []
            leaders = [group[0] for group in groups]
            sums = {x.name: GramAccumulator(x.weight.shape[1], x.weight.device) for x in leaders}

            def observe(
                layer: PrunableLayer, inputs: Tensor, sums: dict[str, GramAccumulator] = sums
            ) -> None:
                _add(sums[layer.name], layer, inputs)

            for batch in range(len(stream)):
                stream.observe(batch, leaders, observe, advance=True)
            stream.finish_block()
            for group in groups:
                if sums[group[0].name].tokens:
                    gram = sums[group[0].name].gram()
                    for layer in group:
                        yield LayerProblem(
                            layer.weight.clone(), gram, pattern_of_layer(layer, pattern), name=layer.name
                        )


def pattern_of_layer(layer: PrunableLayer, pattern: str | Mapping[str, str]) -> Pattern:
    """The pattern of one layer, from one text for all or from its own by name."""
    if not isinstance(pattern, str):
        pattern = pattern[layer.name]
    try:
        return parse_pattern(pattern, layer.weight.shape[1])
    except InputError as error:
        raise type(error)(f"layer {layer.name}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Job:
    """One run of ``prune_layers``."""

    model: nn.Module
    blocks: Sequence[Block]
    pattern: str | Mapping[str, str]
    solver: Solver
    start: Solver
    mode: Mode
    objective: Objective
    record: RunDatabase
    progress: Progress
    masks: Mapping[str, Tensor] | None
    total_weights: int

    def run(self, calibration: Tensor, held_out: Tensor | None) -> dict[str, Tensor]:
        skip = can_skip(self.model, self.blocks, calibration)
        if self.objective.needs_dense_stream and not skip:
            raise InvalidModelError(
                f"{type(self.model).__name__}: expected blocks that depend on earlier ones only through "
                "their outputs, as drift needs, found other connections; run without drift"
            )
        moments: dict[str, Tensor] = {}
        if self.objective.metric:
            moments = gradient_moments(
                self.model,
                self.blocks,
                calibration,
                max(1, batch_size_for(calibration.shape[1]) // 2),
                report=lambda done, total: self.progress.stage("output metric", done, total),
            )
        flow = self._flow(calibration, skip)
        held_out_flow = None if held_out is None else self._flow(held_out, skip)
        flows = [flow] if held_out_flow is None else [flow, held_out_flow]
        masks: dict[str, Tensor] = {}
        for block in self.blocks:
            dense = {layer.name: layer.weight.clone() for layer in block.layers}
            steps = steps_of(flow.pruned) if block.layers else []
            writers = residual_writers(flow.pruned) if self.objective.residual and block.layers else []
            one_shot = self.mode is Mode.ONE_SHOT
            if one_shot:
                steps = [Step(tuple(group for step in steps for group in step.inputs))] if steps else []
            for step in steps:
                masks |= self._prune_step(block, step, flow, held_out_flow, dense, one_shot, writers, moments)
            for each in flows:
                if not (one_shot and steps):
                    for batch in range(len(each.pruned)):
                        each.pruned.advance(batch)
                each.pruned.finish_block()
                if each.dense is not None:
                    with _weights(block, dense):
                        for batch in range(len(each.dense)):
                            each.dense.advance(batch)
                    each.dense.finish_block()
        return masks

    def _flow(self, windows: Tensor, skip: bool) -> _Flow:
        size = batch_size_for(windows.shape[1])
        return _Flow(
            Stream(self.model, self.blocks, windows, size, skip),
            Stream(self.model, self.blocks, windows, size, skip)
            if self.objective.needs_dense_stream
            else None,
        )

    def _prune_step(
        self,
        block: Block,
        step: Step,
        flow: _Flow,
        held_out_flow: _Flow | None,
        dense: dict[str, Tensor],
        advance: bool,
        writers: Sequence[PrunableLayer],
        moments: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Masks of the layers of one step, applied and recorded."""
        known = {layer.name: self._known_mask(layer) for layer in step.layers}
        held_out_sums: dict[str, GramAccumulator] = {}
        if all(mask is not None for mask in known.values()) and not advance:
            sums: dict[str, GramAccumulator] = {}
        else:
            sums = self._gather(block, step, flow, dense, advance, writers)
            if held_out_flow is not None:
                held_out_sums = self._gather(block, step, held_out_flow, dense, advance, writers)
        masks: dict[str, Tensor] = {}
        for group in step.inputs:
            name = group[0].name
            for layer in group:
                mask = known[layer.name]
                if mask is None:
                    mask, weight = self._prune_layer(
                        layer, sums[name], held_out_sums.get(name), moments.pop(layer.name, None)
                    )
                else:
                    weight = self._known_weight(layer)
                layer.write(
                    layer.weight.masked_fill(~mask.to(layer.weight.device), 0) if weight is None else weight
                )
                masks[layer.name] = mask.cpu()
        return masks

    def _known_mask(self, layer: PrunableLayer) -> Tensor | None:
        packed = self.record.packed_mask(layer.name)
        if packed is None or (self.masks is not None and self.record.updated_weight(layer.name) is None):
            return None
        mask = unpack_bytes(packed, layer.weight.shape)
        for finished in self.record.layers():
            if finished.name == layer.name:
                self._report(finished)
        return mask

    def _known_weight(self, layer: PrunableLayer) -> Tensor | None:
        """Kept weights that a finished layer's solver has changed, None if it left them."""
        stored = self.record.updated_weight(layer.name)
        if stored is None:
            return None
        weight = layer.weight
        return torch.frombuffer(bytearray(stored), dtype=weight.dtype).view(weight.shape).to(weight.device)

    def _gather(
        self,
        block: Block,
        step: Step,
        flow: _Flow,
        dense: dict[str, Tensor],
        advance: bool,
        writers: Sequence[PrunableLayer],
    ) -> dict[str, GramAccumulator]:
        """Sums over all batches for the first layer of each group, by its name."""
        leaders = [group[0] for group in step.inputs]
        alone = [group[0] for group in step.inputs if len(group) == 1 and group[0] in writers]
        sums: dict[str, GramAccumulator] = {}
        for layer in leaders:
            # a router may send a token to other experts than in the dense model: no drift there
            with_drift = flow.dense is not None and layer.expert is None
            rows, cols = layer.weight.shape
            sums[layer.name] = GramAccumulator(
                cols, layer.weight.device, with_drift, rows if layer in alone else 0
            )
        for batch in range(len(flow.pruned)):
            waiting: dict[str, Tensor] = {}
            pairs: dict[str, tuple[Tensor, Tensor]] = {}
            streams: dict[str, Tensor] = {}

            def observe(layer: PrunableLayer, inputs: Tensor, waiting: dict[str, Tensor] = waiting) -> None:
                if sums[layer.name].has_drift:
                    waiting[layer.name] = inputs
                else:
                    _add(sums[layer.name], layer, inputs)

            def pair(
                layer: PrunableLayer,
                inputs: Tensor,
                waiting: dict[str, Tensor] = waiting,
                pairs: dict[str, tuple[Tensor, Tensor]] = pairs,
            ) -> None:
                if layer.name not in waiting:
                    return
                found = waiting.pop(layer.name)
                if sums[layer.name].has_residual:
                    pairs[layer.name] = found, inputs
                else:
                    _add(sums[layer.name], layer, found, inputs)

            def keep_stream(
                layer: PrunableLayer, stream: Tensor, streams: dict[str, Tensor] = streams
            ) -> None:
                streams[layer.name] = stream.clone()  # the addition may happen in place

            def pair_stream(
                layer: PrunableLayer,
                stream: Tensor,
                pairs: dict[str, tuple[Tensor, Tensor]] = pairs,
                streams: dict[str, Tensor] = streams,
            ) -> None:
                found, inputs = pairs.pop(layer.name)
                _add(sums[layer.name], layer, found, inputs, stream - streams.pop(layer.name))

            flow.pruned.observe(batch, leaders, observe, advance, alone, keep_stream)
            if flow.dense is not None:
                with _weights(block, dense):
                    flow.dense.observe(batch, leaders, pair, False, alone, pair_stream)
        return sums

    def _prune_layer(
        self,
        layer: PrunableLayer,
        sums: GramAccumulator,
        held_out_sums: GramAccumulator | None,
        moment: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mask of a layer, and its kept weights if the solver changes them."""
        self.progress.layer_started(layer.name)
        begin = time.perf_counter()
        fallback = ""
        if sums.tokens == 0:
            fallback = "no token reached the layer: inputs taken as uncorrelated, which is magnitude"
        problem = self._problem(layer, sums, moment)
        if self.objective.metric and problem.metric is None and not fallback:
            fallback = "no gradient reaches the layer's output: no output metric"
        solver = self.solver
        if problem.metric is not None and not solver.metric:
            solver = RowSweeps(solver, self.objective.sweeps)
        start = self.start if self.masks is None else Given(self.masks[layer.name])
        warm = solve(problem, start)
        if solver.group is Group.SCORE:
            solution = solve(problem, solver)
        else:
            solution = solve(problem, solver, init=warm, budget=Budget())
        norm = float(problem.output_norms().sum())
        plain = replace(problem, gram=sums.gram(), drift=None, metric=None) if sums.tokens else problem
        held_out_start = held_out_error = None
        if held_out_sums is not None and held_out_sums.tokens:
            held_out = replace(problem, gram=held_out_sums.gram(), drift=None, metric=None)
            held_out_norm = float(held_out.output_norms().sum())
            held_out_start = _share(held_out.objective(warm.mask), held_out_norm)
            held_out_error = _share(held_out.objective(solution.mask, solution.weight), held_out_norm)
        mask = solution.mask.cpu()
        certified = solution.stats.get("certified")
        finished = LayerRecord(
            name=layer.name,
            block=layer.block,
            kind=layer.kind,
            rows=problem.rows,
            cols=problem.cols,
            pattern=str(problem.pattern),
            sparsity=1 - float(mask.double().mean()),
            tokens=sums.tokens,
            dead_channels=int(problem.gram.dead.sum()),
            output_norm=norm,
            error_start=_share(plain.objective(warm.mask), norm),
            error=_share(plain.objective(solution.mask, solution.weight), norm),
            objective_start=_share(warm.objective, norm),
            objective=_share(solution.objective, norm),
            held_out_error_start=held_out_start,
            held_out_error=held_out_error,
            swaps=_swaps(solution),
            certified_rows=None if certified is None else int(certified.sum()),
            status=str(solution.status),
            seconds=time.perf_counter() - begin,
            fallback=fallback,
        )
        weight = None if solution.weight is None else solution.weight.to(layer.weight.dtype)
        stored = None if weight is None else weight.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        self.record.add_layer(finished, pack_mask(mask).numpy().tobytes(), stored)
        self._report(finished)
        return mask, weight

    def _problem(self, layer: PrunableLayer, sums: GramAccumulator, moment: Tensor | None) -> LayerProblem:
        weight = layer.weight.clone()
        pattern = pattern_of_layer(layer, self.pattern)
        if sums.tokens == 0:
            identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
            return LayerProblem(weight, Gram(identity), pattern, name=layer.name)
        metric = drift = None
        if moment is not None:
            metric = output_metric(moment.to(weight.device), self.objective.damping)
        if sums.has_drift:
            drift = Drift.from_sums(
                weight,
                sums,
                self.objective.drift,
                self.objective.residual if sums.has_residual else 0.0,
                covariance=metric is not None,
            )
        gram = sums.gram().shrunk(self.objective.shrinkage)
        return LayerProblem(weight, gram, pattern, drift, metric, layer.name)

    def _report(self, finished: LayerRecord) -> None:
        done = sum(layer.rows * layer.cols for layer in self.record.layers())
        self.progress.layer_finished(finished, done, self.total_weights)


@final
@dataclass(frozen=True, eq=False)
class Given(Solver):
    """A mask that is there already."""

    name: ClassVar[str] = "given"
    group: ClassVar[Group] = Group.SCORE
    layer_budget: ClassVar[bool] = True
    metric: ClassVar[bool] = True

    mask: Tensor

    def run(self, problem: LayerProblem, init: Tensor | None, budget: Budget) -> Outcome:
        """Return it."""
        return Outcome(self.mask.to(problem.device), Status.FINISHED)


def _share(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _swaps(solution: Solution) -> int:
    swaps = solution.stats.get("swaps")
    return 0 if swaps is None else int(swaps.sum())


def _add(
    sums: GramAccumulator,
    layer: PrunableLayer,
    inputs: Tensor,
    dense_inputs: Tensor | None = None,
    residual_loss: Tensor | None = None,
) -> None:
    try:
        sums.update(inputs, dense_inputs, residual_loss)
    except InvalidProblemError as error:
        raise InvalidModelError(f"inputs of layer {layer.name}: {error}") from error


@contextmanager
def _weights(block: Block, weights: dict[str, Tensor]) -> Iterator[None]:
    """The block's layers have other weights for a while."""
    before = {layer.name: layer.weight.clone() for layer in block.layers}
    for layer in block.layers:
        layer.write(weights[layer.name])
    try:
        yield
    finally:
        for layer in block.layers:
            layer.write(before[layer.name])
