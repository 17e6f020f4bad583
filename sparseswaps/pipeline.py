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
from .dense_outputs import DenseOutputs
from .errors import InputError, InvalidModelError, InvalidProblemError
from .gradients import gradient_moments
from .masks import pack_mask, unpack_bytes
from .models import Block, PrunableLayer
from .objective import Objective
from .problems import Drift, Gram, GramAccumulator, LayerProblem, output_metric
from .problems.pattern import LayerBudget, Pattern, parse_pattern
from .records import LayerRecord, RunDatabase
from .solvers import (
    Budget,
    Group,
    HeldOutStop,
    OneSwap,
    Outcome,
    RowSweeps,
    Solution,
    Solver,
    Status,
    solve,
)

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
class _Solved:
    """A layer's problem and what came out, before it is applied."""

    problem: LayerProblem
    warm: Solution
    solution: Solution
    strength: float
    fallback: str


def _split(windows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Windows for the Gram matrices, and evenly spread ones that are held out."""
    count = round(share * len(windows))
    if share and not 0 < count < len(windows):
        raise InputError(
            f"held-out share {share:g} of {len(windows)} calibration windows: expected at least one on each "
            f"side, found {count} held out"
        )
    out = torch.zeros(len(windows), dtype=torch.bool)
    out[torch.linspace(0, len(windows) - 1, count).round().long()] = True
    return windows[~out], windows[out]


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
        calibration, checks = _split(calibration, self.objective.held_out_share)
        outputs = None
        if len(self.objective.strengths()) > 1:
            outputs = DenseOutputs(self.model, checks, batch_size_for(checks.shape[1]))
        flow = self._flow(calibration, skip)
        held_out_flow = None if held_out is None else self._flow(held_out, skip)
        check_flow = self._flow(checks, skip) if self.objective.held_out else None
        flows = [each for each in (flow, held_out_flow, check_flow) if each is not None]
        masks: dict[str, Tensor] = {}
        for block in self.blocks:
            dense = {layer.name: layer.weight.clone() for layer in block.layers}
            steps = steps_of(flow.pruned) if block.layers else []
            writers = residual_writers(flow.pruned) if self.objective.residual and block.layers else []
            one_shot = self.mode is Mode.ONE_SHOT
            if one_shot:
                steps = [Step(tuple(group for step in steps for group in step.inputs))] if steps else []
            for step in steps:
                sums = None
                if one_shot or not all(self._is_known(layer) for layer in step.layers):
                    sums = [
                        {} if each is None else self._gather(block, step, each, dense, one_shot, writers)
                        for each in (flow, held_out_flow, check_flow)
                    ]
                for group in step.inputs:
                    masks |= self._prune_group(group, sums, moments, outputs)
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

    def _prune_group(
        self,
        group: Sequence[PrunableLayer],
        sums: Sequence[dict[str, GramAccumulator]] | None,
        moments: dict[str, Tensor],
        outputs: DenseOutputs | None,
    ) -> dict[str, Tensor]:
        """Masks of layers with one input, applied and recorded.

        Args:
            group: the layers.
            sums: of calibration, held-out text and held-out windows, by the name of a group's first layer;
                None where all layers are finished.
            moments: of output gradients by layer; used ones are taken out.
            outputs: of the dense model on held-out windows, where the strength of the drift is chosen.
        """
        masks: dict[str, Tensor] = {}
        todo = []
        for layer in group:
            mask = self._known_mask(layer)
            if mask is None:
                todo.append(layer)
                continue
            weight = self._known_weight(layer)
            self._write(layer, mask, weight)
            masks[layer.name] = mask
        if not todo or sums is None:
            return masks
        calibration, held_out, checks = (each.get(group[0].name) for each in sums)
        if calibration is None:
            raise InvalidModelError(f"layer {group[0].name}: expected its inputs, found none")
        begin = time.perf_counter()
        for layer in todo:
            self.progress.layer_started(layer.name)
        tried: list[tuple[float, list[_Solved]]] = []
        own = {layer.name: moments.pop(layer.name, None) for layer in todo}
        strengths = self.objective.strengths() if calibration.has_drift else (0.0,)
        for strength in strengths:
            found = [
                self._solve_layer(layer, calibration, own[layer.name], strength, checks) for layer in todo
            ]
            loss = 0.0
            if outputs is not None and len(strengths) > 1:
                before = [layer.weight.clone() for layer in todo]
                for layer, solved in zip(todo, found, strict=True):
                    self._write(layer, solved.solution.mask, solved.solution.weight)
                loss = outputs.total(self.model)
                for layer, weight in zip(todo, before, strict=True):
                    layer.write(weight)
            tried.append((loss, found))
        _, best = min(tried, key=lambda each: each[0])
        seconds = (time.perf_counter() - begin) / len(todo)
        for layer, solved in zip(todo, best, strict=True):
            masks[layer.name] = self._finish(layer, solved, calibration, held_out, seconds)
        return masks

    @staticmethod
    def _write(layer: PrunableLayer, mask: Tensor, weight: Tensor | None) -> None:
        device = layer.weight.device
        if weight is None:
            layer.write(layer.weight.masked_fill(~mask.to(device), 0))
        else:
            layer.write(weight.to(device, layer.weight.dtype))

    def _is_known(self, layer: PrunableLayer) -> bool:
        if self.masks is not None:
            return self.record.updated_weight(layer.name) is not None
        return self.record.packed_mask(layer.name) is not None

    def _known_mask(self, layer: PrunableLayer) -> Tensor | None:
        packed = self.record.packed_mask(layer.name)
        if packed is None or not self._is_known(layer):
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

    def _solve_layer(
        self,
        layer: PrunableLayer,
        sums: GramAccumulator,
        moment: Tensor | None,
        strength: float,
        checks: GramAccumulator | None,
    ) -> _Solved:
        """The layer's problem at one strength of the drift, and its solution."""
        fallback = ""
        if sums.tokens == 0:
            fallback = "no token reached the layer: inputs taken as uncorrelated, which is magnitude"
        problem = self._problem(layer, sums, moment, strength)
        if self.objective.metric and problem.metric is None and not fallback:
            fallback = "no gradient reaches the layer's output: no output metric"
        solver = self.solver
        if problem.metric is not None and not solver.metric:
            solver = RowSweeps(solver, self.objective.sweeps)
        if checks is not None and checks.tokens and isinstance(solver, OneSwap):
            solver = HeldOutStop(self._problem(layer, checks, None, strength), solver)
        start = self.start if self.masks is None else Given(self.masks[layer.name])
        warm = solve(problem, start)
        if solver.group is Group.SCORE:
            solution = solve(problem, solver)
        else:
            solution = solve(problem, solver, init=warm, budget=Budget())
        return _Solved(problem, warm, solution, strength, fallback)

    def _finish(
        self,
        layer: PrunableLayer,
        solved: _Solved,
        sums: GramAccumulator,
        held_out_sums: GramAccumulator | None,
        seconds: float,
    ) -> Tensor:
        """Apply and record a solution; returns the mask, on the CPU."""
        problem, warm, solution = solved.problem, solved.warm, solved.solution
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
            seconds=seconds,
            fallback=solved.fallback,
            drift=solved.strength,
        )
        weight = None if solution.weight is None else solution.weight.to(layer.weight.dtype)
        stored = None if weight is None else weight.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        self.record.add_layer(finished, pack_mask(mask).numpy().tobytes(), stored)
        self._write(layer, mask, weight)
        self._report(finished)
        return mask

    def _problem(
        self, layer: PrunableLayer, sums: GramAccumulator, moment: Tensor | None, strength: float
    ) -> LayerProblem:
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
                strength,
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
