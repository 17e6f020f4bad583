"""Prune the layers of a model, block by block.

*one-shot*: every Gram matrix comes from the dense model. *sequential* (the field's default): each
block, and inside it each group of layers that shares an input, sees what the already pruned part of
the model produces; with ``flow block``, as the published programs do it, all layers of a block see the pruned
blocks before it and the block as it was. The objective (see ``objective``) may ask for more: with drift,
dense and pruned activations travel side by side; with the output metric, gradients of the dense
model are gathered before the first layer.

At any time the Gram matrices of one step are held: in sequential mode those of layers with one
input, in one-shot mode and with ``flow block`` those of one block.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..calibration.activations import Stream, blocks_as_used, can_skip, experts_one_by_one
from ..calibration.dense_outputs import DenseOutputs
from ..calibration.experts import entries, warn_of_starved
from ..calibration.gathering import Flow, add_inputs, batch_size_for, gather, gradient_batch_size_for
from ..calibration.gradients import Moments
from ..calibration.steps import Step, steps_of, used_without_call
from ..calibration.store import TensorStore
from ..calibration.targets import Target
from ..errors import InputError, InvalidModelError
from ..masks.packing import PackedMasks, masked, unpack_bytes, weight_from
from ..models.blocks import Block, PrunableLayer
from ..models.inputs import Samples
from ..models.offload import Residence
from ..problems import GramAccumulator, LayerProblem
from ..problems.pattern import Coupling, Pattern, PatternRule
from ..progress import Progress, Silent
from ..ranks import Ranks
from ..records.run import LayerRecord
from ..records.run_database import RunDatabase
from ..solvers import Solution
from .layer_solving import LayerSolving, Solved, StepSums, left_dense, patterns_of
from .objective import Objective
from .settings import Mode, PruneSettings, Unreached
from .shared_rows import first_alone, shared_record

OnLayer = Callable[[LayerProblem, Solution], None]


@dataclass(frozen=True, eq=False)
class RunContext:
    """What a run has around it.

    Attributes:
        record: finished layers are written here, and taken from here if they are there already; that of the
            first rank counts.
        progress: told about every layer.
        ranks: the processes that share the work, each with the same arguments.
        store: says where activations are kept; in main memory by default.
        residence: where the blocks' weights are; in the model by default.
        on_layer: called on the first rank with each layer's problem and solution, before it is applied.
        dtypes: in which layers' weights are saved, by name; that of the model by default.
        skip: whether blocks depend on earlier ones only through what those return; None to find out.
    """

    record: RunDatabase = field(default_factory=lambda: RunDatabase(None))
    progress: Progress = field(default_factory=Silent)
    ranks: Ranks = field(default_factory=Ranks)
    store: TensorStore = field(default_factory=TensorStore)
    residence: Residence = field(default_factory=Residence)
    on_layer: OnLayer | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    skip: bool | None = None


def prune_layers(
    model: nn.Module,
    blocks: Sequence[Block],
    settings: PruneSettings | str,
    calibration: Samples,
    *,
    patterns: Mapping[str, Pattern] | None = None,
    held_out: Samples | None = None,
    masks: Mapping[str, Tensor] | None = None,
    context: RunContext | None = None,
) -> Mapping[str, Tensor]:
    """Choose and apply a mask for every layer of ``blocks``, in place.

    Args:
        model: the dense model; afterwards the pruned one.
        blocks: from ``find_blocks``.
        settings: pattern, solver, start, mode, objective and min_expert_tokens are used here; a text is the
            pattern.
        calibration: token windows (windows, length), or other inputs.
        patterns: of each layer by name, where layers differ from the settings' pattern.
        held_out: windows on which the layer error is measured as well.
        masks: warm start of each layer by name instead of the start's, for a solver that changes kept
            weights; then only layers whose weights the record has count as finished.
        context: record, progress, processes; a record in memory and this process alone by default.

    Returns:
        Mask (rows, cols), bool, of each layer by name, read from the record when asked for.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
        InvalidModelError: for NaN or Inf in activations, naming the layer.
    """
    context = context or RunContext()
    blocks = blocks_as_used(model, blocks, calibration)
    given = PruneSettings(PatternRule.parse(settings)) if isinstance(settings, str) else settings
    skip = context.skip
    if skip is None:
        skip = context.ranks.from_first(lambda: can_skip(model, blocks, calibration))
    settings = with_drift_that_works(model, given, skip, context.ranks)
    known = patterns_of(blocks, settings.rule if patterns is None else patterns)
    check_options(settings, known.values())
    layers = [layer for block in blocks for layer in block.layers]
    database = shared_record(context.record, context.ranks)
    if context.ranks.count > 1 and context.ranks.first:
        _tell_of_first_alone(settings, known)
    with experts_one_by_one(model):
        job = _Job(
            model,
            blocks,
            LayerSolving(settings, known, masks, context.ranks, context.dtypes),
            replace(context, record=database, skip=skip),
            sum(layer.weight.numel() for layer in layers),
        )
        job.run(calibration, held_out)
    if context.ranks.first:
        _tell_of_dense(database.layers())
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers}
    return PackedMasks(
        {name: cols for name, (_, cols) in shapes.items()},
        lambda name: _packed(database, name, shapes[name][0]),
    )


def with_stated_drifts(settings: PruneSettings) -> PruneSettings:
    """The settings with the solver's own drift and residual drift where none is stated."""
    search = settings.solver.drift_by_default and settings.mode is Mode.SEQUENTIAL
    if settings.pattern is None:  # units have none of their own
        search = False
    return replace(settings, objective=settings.objective.resolved(search))


def with_drift_that_works(
    model: nn.Module, settings: PruneSettings, skip: bool, ranks: Ranks
) -> PruneSettings:
    """``with_stated_drifts``, without those that nobody asked for where the model's blocks do not allow them.

    Says so in one line then.
    """
    stated = with_stated_drifts(settings)
    if not settings.objective.is_default or not stated.objective.needs_dense_stream:
        return stated
    if skip:
        return stated
    objective = settings.objective.resolved(search=False)
    if ranks.first:
        warnings.warn(
            f"{type(model).__name__}: drift and residual drift, the default, need blocks that depend on "
            "earlier ones only through their outputs; this run goes without them (objective "
            f"{objective})",
            stacklevel=4,
        )
    return replace(settings, objective=objective)


def check_options(settings: PruneSettings, patterns: Iterable[Pattern]) -> None:
    """Refuse options that cannot work before any work is done.

    Args:
        settings: with stated drifts.
        patterns: of the layers.

    Raises:
        InputError: for options that do not go together.
    """
    objective, solver = settings.objective, settings.solver
    if objective.needs_dense_stream and settings.mode is Mode.ONE_SHOT:
        raise InputError(
            "drift needs the inputs of the pruned model: expected sequential mode, found one-shot"
        )
    if objective.held_out and not solver.covers.held_out_stop:
        raise InputError(
            "a held-out share is for rows that stop early: expected a solver with 1-swap search, found "
            f"{solver!r}"
        )
    for pattern in set(patterns):
        if objective.metric and pattern.couples is not Coupling.BLOCK:
            raise InputError(
                "the output metric couples rows of equal sparsity: expected a pattern of rows or blocks, "
                f"found {settings.pattern}"
            )
        if pattern.couples not in solver.covers.couplings:
            raise InputError(
                f"solver {solver.name} prunes each row by itself: expected a pattern of rows or blocks, "
                f"found {settings.pattern}"
            )


# Why a layer is left dense.
UNREACHED = "no calibration token reaches it"
UNCALLED = "its weight is used without calling the module"


def _tell_of_dense(layers: Sequence[LayerRecord]) -> None:
    """One line for all layers that were left dense."""
    dense = [layer for layer in layers if layer.left_dense]
    if not dense:
        return
    if len(dense) == len(layers):
        raise InvalidModelError(
            f"calibration: expected tokens that reach the layers, found none at {dense[0].name} or any other"
        )
    parts = []
    for reason in (UNREACHED, UNCALLED):
        names = [layer.name for layer in dense if layer.fallback == reason]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            parts.append(f"{reason}: {shown}")
    warnings.warn(
        f"{len(dense)} of {len(layers)} layers are left dense ({'; '.join(parts)}); --unreached magnitude "
        "prunes them by magnitude",
        stacklevel=3,
    )


def _tell_of_first_alone(settings: PruneSettings, patterns: Mapping[str, Pattern]) -> None:
    """One line where the processes cannot share the rows."""
    objective = settings.objective
    for pattern in sorted(set(patterns.values()), key=str)[:1]:
        reason = first_alone(pattern, settings.solver, objective.metric, objective.held_out > 0)
        if reason is not None:
            warnings.warn(
                f"layers are solved by the first process alone, the others share windows only: {reason}",
                stacklevel=3,
            )


def layer_problems(
    model: nn.Module,
    blocks: Sequence[Block],
    pattern: str | PatternRule | Mapping[str, Pattern],
    calibration: Samples,
    residence: Residence | None = None,
) -> Iterator[LayerProblem]:
    """Every layer of ``blocks`` as a problem on the model's activations, block by block.

    Layers that no calibration token reaches are left out.

    Args:
        model: the dense or a pruned model; it is not changed.
        blocks: from ``find_blocks``.
        pattern: ``0.5``, ``50%``, ``2:4`` or ``layer:0.5``; or that of each layer by name.
        calibration: token windows (windows, length), or other inputs.
        residence: where the blocks' weights are; in the model by default.
    """
    blocks = blocks_as_used(model, blocks, calibration)
    patterns = patterns_of(blocks, pattern)
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
                                layer.weight.clone(), gram, patterns[layer.name], name=layer.name
                            )


def _split(windows: Samples, share: float) -> tuple[Samples, Samples]:
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
    context: RunContext
    total_weights: int

    @property
    def objective(self) -> Objective:
        """What layers are fitted to."""
        return self.solving.objective

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.context.ranks

    @property
    def record(self) -> RunDatabase:
        """Finished layers."""
        return self.context.record

    def run(self, calibration: Samples, held_out: Samples | None) -> None:
        skip = bool(self.context.skip)
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
                self.context.store,
                lambda done, total: self.context.progress.stage("output metric", done, total),
                self.context.residence if skip else None,
            )
        calibration, checks = _split(calibration, self.objective.held_out_share)
        outputs = None
        if len(self.objective.strengths()) > 1 and self.ranks.first:
            outputs = DenseOutputs(self.model, checks, batch_size_for(checks.shape[1]))
        target = self.objective.target
        flow = self._flow(calibration, skip, target)
        # of held-out text the paper's error is measured, which knows no drift
        held_out_flow = None if held_out is None else self._flow(held_out, skip, None)
        check_flow = self._flow(checks, skip, target) if self.objective.held_out else None
        wanted = [number for number, block in enumerate(self.blocks) if block.layers]
        for block in self.blocks[: max(wanted, default=-1) + 1]:
            with self.context.residence.resident(block):
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
        one_shot = self.solving.settings.mode is Mode.ONE_SHOT
        if self.solving.settings.whole_blocks:
            steps = [Step(tuple(group for step in steps for group in step.inputs))] if steps else []
        else:
            for each in flows:
                if each is not None:
                    each.begin_block(block, steps)
        for number, step in enumerate(steps):
            seen = None
            if one_shot or not all(self._is_known(layer) for layer in step.layers):
                sums = [
                    {}
                    if each is None
                    else gather(each, block, step, dense, one_shot, writers, steps[number:])
                    for each in flows
                ]
                if self.ranks.first:
                    settings = self.solving.settings
                    warn_of_starved(
                        block,
                        step,
                        sums[0],
                        settings.min_expert_tokens,
                        settings.unreached is not Unreached.DENSE,
                    )
                seen = StepSums(sums[0], sums[1], sums[2], reading, self._uncalled(flow, step, sums[0]))
            for group in step.inputs:
                self._prune_group(group, seen, moments, outputs)
            for each in flows:
                if each is not None:
                    each.settled.settle(step.layers)
        for each in flows:
            if each is not None:
                each.finish_block(block, dense, advanced=one_shot and bool(steps))

    def _uncalled(self, flow: Flow, step: Step, sums: Mapping[str, GramAccumulator]) -> set[str]:
        """Layers whose weights are used although nobody calls them."""
        leaders = [group[0] for group in step.inputs]
        silent = [layer for layer in leaders if layer.expert is None and sums[layer.name].tokens == 0]
        if not silent:
            return set()
        return self.ranks.from_first(lambda: used_without_call(flow.probe, silent))

    def _flow(self, windows: Samples, skip: bool, target: Target | None) -> Flow:
        return Flow.of(self.model, self.blocks, windows, skip, target, self.ranks, self.context.store)

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
            finished = self.record.layer(layer.name)
            if finished is not None:
                self._report(finished)
        if not todo or sums is None:
            return
        leader = group[0].name
        if leader not in sums.calibration:
            raise InvalidModelError(f"layer {leader}: expected its inputs, found none")
        calibration = sums.calibration[leader]
        if self.solving.stays_dense(calibration):
            for layer in todo:
                self._leave_dense(layer, UNCALLED if layer.name in sums.uncalled else UNREACHED)
            return
        begin = time.perf_counter()
        for layer in todo:
            self.context.progress.layer_started(layer.name)
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
            if self.context.on_layer is not None and solved is not None and self.ranks.first:
                self.context.on_layer(solved.problem, solved.solution)
            seconds = alone[layer.name] + shared
            self._finish(layer, solved, calibration.tokens, sums.held_out.get(leader), seconds)

    def _leave_dense(self, layer: PrunableLayer, reason: str) -> None:
        finished, packed = left_dense(layer, reason)
        self.record.add_layer(finished, packed)
        self._report(finished)

    def _is_known(self, layer: PrunableLayer) -> bool:
        known = self.record.layer(layer.name)
        if known is not None and known.left_dense:
            return True
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

        self.context.residence.change(layer, pruned)

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
        done = self.record.finished_weights()
        self.context.progress.layer_finished(finished, done, self.total_weights)


def _packed(record: RunDatabase, name: str, rows: int) -> Tensor:
    """Packed bits (rows, ⌈cols/8⌉) of a finished layer's mask."""
    packed = record.packed_mask(name)
    if packed is None:
        raise InvalidModelError(f"layer {name}: expected a mask, found none")
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(rows, -1)
