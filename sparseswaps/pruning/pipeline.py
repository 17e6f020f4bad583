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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.activations import Step, Stream, can_skip, experts_one_by_one, steps_of
from ..calibration.dense_outputs import DenseOutputs
from ..calibration.experts import entries, warn_of_starved
from ..calibration.gathering import Flow, add_inputs, batch_size_for, gather, gradient_batch_size_for
from ..calibration.gradients import Moments
from ..calibration.store import TensorStore
from ..errors import InputError, InvalidModelError
from ..masks.packing import PackedMasks, masked, unpack_bytes, weight_from
from ..models.blocks import Block, PrunableLayer
from ..models.offload import Residence
from ..problems import GramAccumulator, LayerProblem
from ..problems.pattern import LayerBudget
from ..progress import Progress, Silent
from ..ranks import Ranks
from ..records.run import LayerRecord
from ..records.run_database import RunDatabase
from ..solvers import Solver
from .layer_solving import LayerSolving, Solved, StepSums, pattern_of_layer
from .objective import Objective
from .settings import Mode
from .shared_rows import shared_record


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
    ranks: Ranks | None = None,
    min_expert_tokens: int | None = None,
    store: TensorStore | None = None,
    residence: Residence | None = None,
) -> Mapping[str, Tensor]:
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
        ranks: the processes that share the work (see ``distributed``), each with the same arguments; the
            record of the first one counts.
        min_expert_tokens: experts that fewer calibration tokens reach are pruned by a fallback (see
            ``experts``); the width of the layer by default.
        store: says where activations are kept; in main memory by default.
        residence: where the blocks' weights are; in the model by default.

    Returns:
        Mask (rows, cols), bool, of each layer by name, read from the record when asked for.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
        InvalidModelError: for NaN or Inf in activations, naming the layer.
    """
    objective = objective or Objective()
    check_options(blocks, pattern, mode, objective)
    layers = [layer for block in blocks for layer in block.layers]
    ranks = ranks or Ranks()
    database = shared_record(record or RunDatabase(None), ranks)
    with experts_one_by_one(model):
        job = _Job(
            model,
            blocks,
            LayerSolving(pattern, solver, start, objective, masks, ranks, min_expert_tokens),
            mode,
            database,
            progress or Silent(),
            sum(layer.weight.numel() for layer in layers),
            store or TensorStore(),
            residence or Residence(),
        )
        job.run(calibration, held_out)
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers}
    return PackedMasks(
        {name: cols for name, (_, cols) in shapes.items()},
        lambda name: _packed(database, name, shapes[name][0]),
    )


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
    model: nn.Module,
    blocks: Sequence[Block],
    pattern: str,
    calibration: Tensor,
    residence: Residence | None = None,
) -> Iterator[LayerProblem]:
    """Every layer of ``blocks`` as a problem on the dense model's activations, block by block.

    Layers that no calibration token reaches are left out.

    Args:
        model: the dense model; it is not changed.
        blocks: from ``find_blocks``.
        pattern: ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``.
        calibration: token windows (windows, length).
        residence: where the blocks' weights are; in the model by default.
    """
    for block in blocks:
        for layer in block.layers:
            pattern_of_layer(layer, pattern)
    residence = residence or Residence()
    with experts_one_by_one(model):
        skip = can_skip(model, blocks, calibration)
        stream = Stream(model, blocks, calibration, batch_size_for(calibration.shape[1]), skip)
        for block in blocks:
            with residence.resident(block):
                groups = [group for step in steps_of(stream) for group in step.inputs] if block.layers else []
                leaders = [group[0] for group in groups]
                sums = {x.name: GramAccumulator(x.weight.shape[1], x.weight.device) for x in leaders}

                def observe(
                    layer: PrunableLayer, inputs: Tensor, sums: dict[str, GramAccumulator] = sums
                ) -> None:
                    add_inputs(sums[layer.name], layer, inputs)

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
    solving: LayerSolving
    mode: Mode
    record: RunDatabase
    progress: Progress
    total_weights: int
    store: TensorStore
    residence: Residence

    @property
    def objective(self) -> Objective:
        """What layers are fitted to."""
        return self.solving.objective

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.solving.ranks

    def run(self, calibration: Tensor, held_out: Tensor | None) -> None:
        skip = self.ranks.from_first(lambda: can_skip(self.model, self.blocks, calibration))
        if self.objective.needs_dense_stream and not skip:
            raise InvalidModelError(
                f"{type(self.model).__name__}: expected blocks that depend on earlier ones only through "
                "their outputs, as drift needs, found other connections; run without drift"
            )
        moments = None
        if self.objective.metric and self.ranks.first:
            moments = Moments(
                self.model,
                self.blocks,
                calibration,
                gradient_batch_size_for(calibration.shape[1]),
                self.store,
                lambda done, total: self.progress.stage("output metric", done, total),
            )
        calibration, checks = _split(calibration, self.objective.held_out_share)
        outputs = None
        if len(self.objective.strengths()) > 1 and self.ranks.first:
            outputs = DenseOutputs(self.model, checks, batch_size_for(checks.shape[1]))
        flow = self._flow(calibration, skip)
        held_out_flow = None if held_out is None else self._flow(held_out, skip)
        check_flow = self._flow(checks, skip) if self.objective.held_out else None
        for block in self.blocks:
            with self.residence.resident(block):
                self._prune_block(block, flow, (flow, held_out_flow, check_flow), moments, outputs)

    def _prune_block(
        self,
        block: Block,
        flow: Flow,
        flows: Sequence[Flow | None],
        moments: Moments | None,
        outputs: DenseOutputs | None,
    ) -> None:
        """Masks of the block's layers; ``flows`` of calibration, held-out and check windows advance."""
        dense = {layer.name: layer.weight.clone() for layer in block.layers}
        steps = flow.steps() if block.layers else []
        writers = flow.writers() if self.objective.residual and block.layers else []
        reading = entries(steps)
        one_shot = self.mode is Mode.ONE_SHOT
        if one_shot:
            steps = [Step(tuple(group for step in steps for group in step.inputs))] if steps else []
        for step in steps:
            seen = None
            if one_shot or not all(self._is_known(layer) for layer in step.layers):
                sums = [
                    {} if each is None else gather(each, block, step, dense, one_shot, writers)
                    for each in flows
                ]
                if self.ranks.first:
                    warn_of_starved(block, step, sums[0], self.solving.min_expert_tokens)
                seen = StepSums(sums[0], sums[1], sums[2], reading)
            for group in step.inputs:
                self._prune_group(group, seen, moments, outputs)
        for each in flows:
            if each is not None:
                each.finish_block(block, dense, advanced=one_shot and bool(steps))

    def _flow(self, windows: Tensor, skip: bool) -> Flow:
        dense = self.objective.needs_dense_stream
        return Flow.of(self.model, self.blocks, windows, skip, dense, self.ranks, self.store)

    def _prune_group(
        self,
        group: Sequence[PrunableLayer],
        sums: StepSums | None,
        moments: Moments | None,
        outputs: DenseOutputs | None,
    ) -> None:
        """Find masks of layers with one input, apply and record them.

        Args:
            group: the layers.
            sums: of the step; None where all layers are finished.
            moments: of output gradients by layer, on the first rank; used ones are taken out.
            outputs: of the dense model on held-out windows, where the strength of the drift is chosen; on the
                first rank.
        """
        todo = []
        for layer in group:
            if not self._is_known(layer):
                todo.append(layer)
                continue
            self._apply(layer)
            for finished in self.record.layers():
                if finished.name == layer.name:
                    self._report(finished)
        if not todo or sums is None:
            return
        leader = group[0].name
        if leader not in sums.calibration:
            raise InvalidModelError(f"layer {leader}: expected its inputs, found none")
        calibration = sums.calibration[leader]
        begin = time.perf_counter()
        for layer in todo:
            self.progress.layer_started(layer.name)
        tried: list[tuple[float, list[Solved | None]]] = []
        alone = dict.fromkeys((layer.name for layer in todo), 0.0)  # seconds of its own solver
        own = {layer.name: None if moments is None else moments.take(layer.name) for layer in todo}
        strengths = self.objective.strengths() if calibration.has_drift else (0.0,)
        for strength in strengths:
            found = []
            for layer in todo:
                started = time.perf_counter()
                found.append(self.solving.solve(layer, leader, sums, own[layer.name], strength))
                alone[layer.name] += time.perf_counter() - started
            loss = 0.0
            if outputs is not None and len(strengths) > 1:
                before = [layer.weight.clone() for layer in todo]
                for layer, solved in zip(todo, found, strict=True):
                    if solved is not None:
                        mask, weight = solved.solution.mask, solved.solution.weight
                        layer.write(masked(layer.weight, mask) if weight is None else weight)
                loss = outputs.total(self.model)
                for layer, weight in zip(todo, before, strict=True):
                    layer.write(weight)
            tried.append((loss, found))
        best = self.ranks.from_first(lambda: min(range(len(tried)), key=lambda i: tried[i][0]))
        shared = (time.perf_counter() - begin - sum(alone.values())) / len(todo)
        for layer, solved in zip(todo, tried[best][1], strict=True):
            seconds = alone[layer.name] + shared
            self._finish(layer, solved, calibration.tokens, sums.held_out.get(leader), seconds)

    def _is_known(self, layer: PrunableLayer) -> bool:
        if self.solving.masks is not None:
            return self.record.updated_weight(layer.name) is not None
        return self.record.packed_mask(layer.name) is not None

    def _apply(self, layer: PrunableLayer) -> None:
        """The layer becomes what the record says of it."""
        dtype = layer.weight.dtype

        def pruned(weight: Tensor) -> Tensor:
            stored = self.record.updated_weight(layer.name)
            if stored is None:
                packed = self.record.packed_mask(layer.name)
                return weight if packed is None else masked(weight, unpack_bytes(packed, weight.shape))
            return weight_from(stored, weight.to(dtype)).to(weight.dtype)  # stored in the run's dtype

        self.residence.change(layer, pruned)

    def _finish(
        self,
        layer: PrunableLayer,
        solved: Solved | None,
        tokens: int,
        held_out_sums: GramAccumulator | None,
        seconds: float,
    ) -> None:
        """Record and apply a solution."""
        errors = None if solved is None else self.solving.errors(solved, held_out_sums)
        finished, packed, stored = self.ranks.from_first(
            lambda: self.solving.facts(layer, solved, errors, tokens, seconds)
        )
        self.record.add_layer(finished, packed, stored)
        self._apply(layer)
        self._report(finished)

    def _report(self, finished: LayerRecord) -> None:
        done = sum(layer.rows * layer.cols for layer in self.record.layers())
        self.progress.layer_finished(finished, done, self.total_weights)


def _packed(record: RunDatabase, name: str, rows: int) -> Tensor:
    """Packed bits (rows, ⌈cols/8⌉) of a finished layer's mask."""
    packed = record.packed_mask(name)
    if packed is None:
        raise InvalidModelError(f"layer {name}: expected a mask, found none")
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(rows, -1)
