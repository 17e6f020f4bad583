"""Prune the layers of a model, block by block.

*one-shot*: every Gram matrix comes from the dense model. *sequential* (the field's default): each
block, and inside it each group of layers that shares an input, sees what the already pruned part of
the model produces. *drift*: dense and pruned activations travel side by side, and the target of a
layer moves from ``W X̂`` towards the dense ``W X`` (see ``problems.layer``).

At any time the Gram matrices of one step are held: in sequential mode those of layers with one
input, in one-shot mode those of one block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from .activations import Step, Stream, can_skip, experts_one_by_one, steps_of
from .errors import InputError, InvalidModelError, InvalidProblemError
from .masks import pack_mask, unpack_mask
from .models import Block, PrunableLayer
from .problems import Drift, Gram, GramAccumulator, LayerProblem
from .problems.pattern import Pattern, parse_pattern
from .records import LayerRecord, RunDatabase
from .solvers import Budget, Group, Solution, Solver, solve

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
    pattern: str,
    calibration: Tensor,
    solver: Solver,
    start: Solver,
    mode: Mode = Mode.SEQUENTIAL,
    drift: float = 0.0,
    held_out: Tensor | None = None,
    record: RunDatabase | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Choose and apply a mask for every layer of ``blocks``, in place.

    Args:
        model: the dense model; afterwards the pruned one.
        blocks: from ``find_blocks``.
        pattern: ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``.
        calibration: token windows (windows, length).
        solver: chooses the masks.
        start: warm start of every solver that is not a score; its error is recorded for comparison.
        mode: one-shot or sequential.
        drift: strength α in [0, 1]; 0 is without drift. Sequential mode only.
        held_out: token windows on which the layer error is measured as well.
        record: finished layers are written here, and taken from here if they are there already.
        progress: told about every layer.

    Returns:
        Mask (rows, cols), bool, of each layer by name.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
        InvalidModelError: for NaN or Inf in activations, naming the layer.
    """
    check_options(blocks, pattern, mode, drift)
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
            drift,
            database,
            progress or Silent(),
            sum(layer.weight.numel() for layer in layers),
        )
        return job.run(calibration, held_out)


def check_options(blocks: Sequence[Block], pattern: str, mode: Mode, drift: float) -> None:
    """Refuse options that cannot work before any work is done.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
    """
    if not 0 <= drift <= 1:
        raise InputError(f"drift strength is a share: expected 0 ≤ drift ≤ 1, found {drift:g}")
    if drift and mode is Mode.ONE_SHOT:
        raise InputError(
            "drift needs the inputs of the pruned model: expected sequential mode, found one-shot"
        )
    for block in blocks:
        for layer in block.layers:
            _pattern_of(layer, pattern)


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
            _pattern_of(layer, pattern)
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
                            layer.weight.clone(), gram, _pattern_of(layer, pattern), name=layer.name
                        )


def _pattern_of(layer: PrunableLayer, pattern: str) -> Pattern:
    try:
        return parse_pattern(pattern, layer.weight.shape[1])
    except InputError as error:
        raise type(error)(f"layer {layer.name}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Job:
    """One run of ``prune_layers``."""

    model: nn.Module
    blocks: Sequence[Block]
    pattern: str
    solver: Solver
    start: Solver
    mode: Mode
    drift: float
    record: RunDatabase
    progress: Progress
    total_weights: int

    def run(self, calibration: Tensor, held_out: Tensor | None) -> dict[str, Tensor]:
        skip = can_skip(self.model, self.blocks, calibration)
        if self.drift and not skip:
            raise InvalidModelError(
                f"{type(self.model).__name__}: expected blocks that depend on earlier ones only through "
                "their outputs, as drift needs, found other connections; run without drift"
            )
        flow = self._flow(calibration, skip)
        held_out_flow = None if held_out is None else self._flow(held_out, skip)
        flows = [flow] if held_out_flow is None else [flow, held_out_flow]
        masks: dict[str, Tensor] = {}
        for block in self.blocks:
            dense = {layer.name: layer.weight.clone() for layer in block.layers}
            steps = steps_of(flow.pruned) if block.layers else []
            one_shot = self.mode is Mode.ONE_SHOT
            if one_shot:
                steps = [Step(tuple(group for step in steps for group in step.inputs))] if steps else []
            for step in steps:
                masks |= self._prune_step(block, step, flow, held_out_flow, dense, advance=one_shot)
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
            Stream(self.model, self.blocks, windows, size, skip) if self.drift else None,
        )

    def _prune_step(
        self,
        block: Block,
        step: Step,
        flow: _Flow,
        held_out_flow: _Flow | None,
        dense: dict[str, Tensor],
        advance: bool,
    ) -> dict[str, Tensor]:
        """Masks of the layers of one step, applied and recorded."""
        known = {layer.name: self._known_mask(layer) for layer in step.layers}
        held_out_sums: dict[str, GramAccumulator] = {}
        if all(mask is not None for mask in known.values()) and not advance:
            sums: dict[str, GramAccumulator] = {}
        else:
            sums = self._gather(block, step, flow, dense, advance)
            if held_out_flow is not None:
                held_out_sums = self._gather(block, step, held_out_flow, dense, advance)
        masks: dict[str, Tensor] = {}
        for group in step.inputs:
            name = group[0].name
            for layer in group:
                mask = known[layer.name]
                if mask is None:
                    mask = self._prune_layer(layer, sums[name], held_out_sums.get(name))
                layer.write(layer.weight.masked_fill(~mask.to(layer.weight.device), 0))
                masks[layer.name] = mask.cpu()
        return masks

    def _known_mask(self, layer: PrunableLayer) -> Tensor | None:
        packed = self.record.packed_mask(layer.name)
        if packed is None:
            return None
        rows, cols = layer.weight.shape
        packed_rows = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(rows, -1)
        mask = unpack_mask(packed_rows, cols)
        for finished in self.record.layers():
            if finished.name == layer.name:
                self._report(finished)
        return mask

    def _gather(
        self, block: Block, step: Step, flow: _Flow, dense: dict[str, Tensor], advance: bool
    ) -> dict[str, GramAccumulator]:
        """Sums over all batches for the first layer of each group, by its name."""
        leaders = [group[0] for group in step.inputs]
        sums: dict[str, GramAccumulator] = {}
        for layer in leaders:
            # a router may send a token to other experts than in the dense model: no drift there
            with_drift = flow.dense is not None and layer.expert is None
            weight = layer.weight
            sums[layer.name] = GramAccumulator(weight.shape[1], weight.device, with_drift)
        for batch in range(len(flow.pruned)):
            waiting: dict[str, Tensor] = {}

            def observe(layer: PrunableLayer, inputs: Tensor, waiting: dict[str, Tensor] = waiting) -> None:
                if sums[layer.name].has_drift:
                    waiting[layer.name] = inputs
                else:
                    _add(sums[layer.name], layer, inputs)

            def pair(layer: PrunableLayer, inputs: Tensor, waiting: dict[str, Tensor] = waiting) -> None:
                if layer.name in waiting:
                    _add(sums[layer.name], layer, waiting.pop(layer.name), inputs)

            flow.pruned.observe(batch, leaders, observe, advance)
            if flow.dense is not None:
                with _weights(block, dense):
                    flow.dense.observe(batch, leaders, pair)
        return sums

    def _prune_layer(
        self, layer: PrunableLayer, sums: GramAccumulator, held_out_sums: GramAccumulator | None
    ) -> Tensor:
        self.progress.layer_started(layer.name)
        begin = time.perf_counter()
        fallback = ""
        if sums.tokens == 0:
            fallback = "no token reached the layer: inputs taken as uncorrelated, which is magnitude"
        problem = self._problem(layer, sums)
        warm = solve(problem, self.start)
        if self.solver.group is Group.SCORE:
            solution = solve(problem, self.solver)
        else:
            solution = solve(problem, self.solver, init=warm, budget=Budget())
        norm = float(problem.output_norms().sum())
        plain = replace(problem, drift=None)
        held_out_start = held_out_error = None
        if held_out_sums is not None and held_out_sums.tokens:
            held_out = replace(problem, gram=held_out_sums.gram(), drift=None)
            held_out_norm = float(held_out.output_norms().sum())
            held_out_start = _share(held_out.objective(warm.mask), held_out_norm)
            held_out_error = _share(held_out.objective(solution.mask), held_out_norm)
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
            error=_share(plain.objective(solution.mask), norm),
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
        self.record.add_layer(finished, pack_mask(mask).numpy().tobytes())
        self._report(finished)
        return mask

    def _problem(self, layer: PrunableLayer, sums: GramAccumulator) -> LayerProblem:
        weight = layer.weight.clone()
        pattern = _pattern_of(layer, self.pattern)
        if sums.tokens == 0:
            identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
            return LayerProblem(weight, Gram(identity), pattern, name=layer.name)
        drift = Drift.from_sums(weight, sums, self.drift) if sums.has_drift else None
        return LayerProblem(weight, sums.gram(), pattern, drift, name=layer.name)

    def _report(self, finished: LayerRecord) -> None:
        done = sum(layer.rows * layer.cols for layer in self.record.layers())
        self.progress.layer_finished(finished, done, self.total_weights)


def _share(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _swaps(solution: Solution) -> int:
    swaps = solution.stats.get("swaps")
    return 0 if swaps is None else int(swaps.sum())


def _add(
    sums: GramAccumulator, layer: PrunableLayer, inputs: Tensor, dense_inputs: Tensor | None = None
) -> None:
    try:
        sums.update(inputs, dense_inputs)
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
