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
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from .activations import Step, Stream, can_skip, experts_one_by_one, steps_of
from .dense_outputs import DenseOutputs
from .distributed import Given, Ranks, rows_alone, solve_shared
from .errors import InputError, InvalidModelError, NoIncumbentError
from .experts import all_tokens, entries, fallback_gram, least_tokens, warn_of_starved
from .gathering import Flow, add_inputs, batch_size_for, gather, gradient_batch_size_for
from .gradients import gradient_moments
from .masks import pack_mask, unpack_bytes
from .memory import ActivationStore
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
    RowSweeps,
    Solution,
    Solver,
    solve,
)


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
    store: ActivationStore | None = None,
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
        ranks: the processes that share the work (see ``distributed``), each with the same arguments; the
            record of the first one counts.
        min_expert_tokens: experts that fewer calibration tokens reach are pruned by a fallback (see
            ``experts``); the width of the layer by default.
        store: says where activations are kept; in main memory by default.

    Returns:
        Mask (rows, cols), bool, of each layer by name.

    Raises:
        InputError: for options that do not go together or a pattern that does not fit a layer.
        InvalidModelError: for NaN or Inf in activations, naming the layer.
    """
    objective = objective or Objective()
    check_options(blocks, pattern, mode, objective)
    layers = [layer for block in blocks for layer in block.layers]
    ranks = ranks or Ranks()
    database = ranks.shared_record(record or RunDatabase(None))
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
            ranks,
            min_expert_tokens,
            store or ActivationStore(),
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


def pattern_of_layer(layer: PrunableLayer, pattern: str | Mapping[str, str]) -> Pattern:
    """The pattern of one layer, from one text for all or from its own by name."""
    if not isinstance(pattern, str):
        pattern = pattern[layer.name]
    try:
        return parse_pattern(pattern, layer.weight.shape[1])
    except InputError as error:
        raise type(error)(f"layer {layer.name}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of one step by the name of a group's first layer.

    Attributes:
        calibration, held_out, checks: on calibration windows, held-out text and held-out windows.
        reading: layers of experts that read the tokens as they come.
        mixtures: sums over all experts of a mixture that were needed already.
        grams: Gram matrix of the group that is pruned, shared by its layers with all that is derived from it.
    """

    calibration: dict[str, GramAccumulator]
    held_out: dict[str, GramAccumulator]
    checks: dict[str, GramAccumulator]
    reading: set[str]
    mixtures: dict[str, GramAccumulator] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)

    def gram(self, leader: str) -> Gram | None:
        """Of the group of ``leader`` on calibration windows, None without tokens."""
        if leader not in self.grams:
            self.grams.clear()
            if self.calibration[leader].tokens:
                self.grams[leader] = self.calibration[leader].gram()
        return self.grams.get(leader)

    def mixture(self, layer: PrunableLayer) -> GramAccumulator | None:
        """Of all tokens that reach the mixture of an expert whose layer reads them as they come."""
        if layer.name not in self.reading:
            return None
        family = layer.name.rsplit(".", 1)[0]
        if family not in self.mixtures:
            self.mixtures[family] = all_tokens(layer, self.calibration)
        return self.mixtures[family]


@dataclass(frozen=True, eq=False)
class _Solved:
    """A layer's problem and what came out, before it is applied; ``shared`` by rows over the ranks."""

    problem: LayerProblem
    warm: Solution
    solution: Solution
    strength: float
    fallback: str
    plain: LayerProblem
    shared: bool


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
    ranks: Ranks
    min_expert_tokens: int | None
    store: ActivationStore

    def run(self, calibration: Tensor, held_out: Tensor | None) -> dict[str, Tensor]:
        skip = self.ranks.from_first(lambda: can_skip(self.model, self.blocks, calibration))
        if self.objective.needs_dense_stream and not skip:
            raise InvalidModelError(
                f"{type(self.model).__name__}: expected blocks that depend on earlier ones only through "
                "their outputs, as drift needs, found other connections; run without drift"
            )
        moments: dict[str, Tensor] = {}
        if self.objective.metric and self.ranks.first:
            moments = gradient_moments(
                self.model,
                self.blocks,
                calibration,
                gradient_batch_size_for(calibration.shape[1]),
                report=lambda done, total: self.progress.stage("output metric", done, total),
            )
        calibration, checks = _split(calibration, self.objective.held_out_share)
        outputs = None
        if len(self.objective.strengths()) > 1 and self.ranks.first:
            outputs = DenseOutputs(self.model, checks, batch_size_for(checks.shape[1]))
        flow = self._flow(calibration, skip)
        held_out_flow = None if held_out is None else self._flow(held_out, skip)
        check_flow = self._flow(checks, skip) if self.objective.held_out else None
        flows = (flow, held_out_flow, check_flow)
        masks: dict[str, Tensor] = {}
        for block in self.blocks:
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
                        warn_of_starved(block, step, sums[0], self.min_expert_tokens)
                    seen = _Sums(sums[0], sums[1], sums[2], reading)
                for group in step.inputs:
                    masks |= self._prune_group(group, seen, moments, outputs)
            for each in flows:
                if each is not None:
                    each.finish_block(block, dense, advanced=one_shot and bool(steps))
        return masks

    def _flow(self, windows: Tensor, skip: bool) -> Flow:
        dense = self.objective.needs_dense_stream
        return Flow.of(self.model, self.blocks, windows, skip, dense, self.ranks, self.store)

    def _prune_group(
        self,
        group: Sequence[PrunableLayer],
        sums: _Sums | None,
        moments: dict[str, Tensor],
        outputs: DenseOutputs | None,
    ) -> dict[str, Tensor]:
        """Masks of layers with one input, applied and recorded.

        Args:
            group: the layers.
            sums: of the step; None where all layers are finished.
            moments: of output gradients by layer; used ones are taken out.
            outputs: of the dense model on held-out windows, where the strength of the drift is chosen; on the
                first rank.
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
        leader = group[0].name
        if leader not in sums.calibration:
            raise InvalidModelError(f"layer {leader}: expected its inputs, found none")
        calibration = sums.calibration[leader]
        begin = time.perf_counter()
        for layer in todo:
            self.progress.layer_started(layer.name)
        tried: list[tuple[float, list[_Solved | None]]] = []
        own = {layer.name: moments.pop(layer.name, None) for layer in todo}
        strengths = self.objective.strengths() if calibration.has_drift else (0.0,)
        for strength in strengths:
            found = [self._solve_layer(layer, leader, sums, own[layer.name], strength) for layer in todo]
            loss = 0.0
            if outputs is not None and len(strengths) > 1:
                before = [layer.weight.clone() for layer in todo]
                for layer, solved in zip(todo, found, strict=True):
                    if solved is not None:
                        self._write(layer, solved.solution.mask, solved.solution.weight)
                loss = outputs.total(self.model)
                for layer, weight in zip(todo, before, strict=True):
                    layer.write(weight)
            tried.append((loss, found))
        best = self.ranks.from_first(lambda: min(range(len(tried)), key=lambda i: tried[i][0]))
        seconds = (time.perf_counter() - begin) / len(todo)
        for layer, solved in zip(todo, tried[best][1], strict=True):
            held_out = sums.held_out.get(leader)
            masks[layer.name] = self._finish(layer, solved, calibration.tokens, held_out, seconds)
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

    def _solve_layer(
        self, layer: PrunableLayer, leader: str, sums: _Sums, moment: Tensor | None, strength: float
    ) -> _Solved | None:
        """The layer's problem at one strength of the drift, and its solution.

        Where the ranks do not share it, None on all but the first.
        """
        coupled = self.objective.metric or leader in sums.checks
        if coupled and not self.ranks.first:
            return None
        calibration, checks = sums.calibration[leader], sums.checks.get(leader)
        problem, plain, fallback = self._problem(
            layer, calibration, sums.gram(leader), sums.mixture(layer), moment, strength
        )
        solver = self.solver
        if problem.metric is not None and not solver.metric:
            solver = RowSweeps(solver, self.objective.sweeps)
        if checks is not None and checks.tokens and isinstance(solver, OneSwap):
            held_out, _, _ = self._problem(layer, checks, checks.gram(), None, None, strength)
            solver = HeldOutStop(held_out, solver)
        start = self.start if self.masks is None else Given(self.masks[layer.name])
        scores = start.group is Group.SCORE and solver.group is Group.SCORE
        shared = self.ranks.count > 1 and not coupled and (scores or rows_alone(problem, solver))
        if not shared:
            if not self.ranks.first:
                return None
            warm = solve(problem, start)
            score = solver.group is Group.SCORE
            solution = solve(problem, solver) if score else solve(problem, solver, init=warm, budget=Budget())
            return _Solved(problem, warm, solution, strength, fallback, plain, shared)
        # scores look at all rows, which costs little; each rank then scores the masks of its rows
        warm = solve_shared(problem, _given(start, problem), None, self.ranks)
        if solver.group is Group.SCORE:
            solution = solve_shared(problem, _given(solver, problem), None, self.ranks)
        else:
            solution = solve_shared(problem, solver, warm.mask, self.ranks)
        return _Solved(problem, warm, solution, strength, fallback, plain, shared)

    def _finish(
        self,
        layer: PrunableLayer,
        solved: _Solved | None,
        tokens: int,
        held_out_sums: GramAccumulator | None,
        seconds: float,
    ) -> Tensor:
        """Apply and record a solution; returns the mask, on the CPU."""
        errors = None
        if solved is not None:
            errors = self._errors(solved, held_out_sums)
        finished, packed, stored = self.ranks.from_first(
            lambda: self._facts(layer, solved, errors, tokens, seconds)
        )
        self.record.add_layer(finished, packed, stored)
        mask = unpack_bytes(packed, layer.weight.shape)
        self._write(layer, mask, self._known_weight(layer))
        self._report(finished)
        return mask

    def _errors(self, solved: _Solved, held_out_sums: GramAccumulator | None) -> Tensor:
        """Sums over rows of: output norm, plain error before and after, the same three on held-out text."""
        problem, warm, solution = solved.problem, solved.warm, solved.solution
        held_out = None
        if held_out_sums is not None and held_out_sums.tokens:
            held_out = replace(problem, gram=held_out_sums.gram(), drift=None, metric=None)
        rows = self.ranks.rows(problem.rows) if solved.shared else slice(0, problem.rows)
        weight = None if solution.weight is None else solution.weight[rows]

        def of_rows(whole: LayerProblem) -> list[Tensor]:
            part = whole.slice_rows(rows)
            return [
                part.output_norms(),
                part.row_objectives(warm.mask[rows]),
                part.row_objectives(solution.mask[rows], weight),
            ]

        def compute() -> Tensor:
            if rows.start == rows.stop:
                return torch.zeros((0, 6), dtype=torch.float64)
            known = solved.plain is problem  # then ``solve`` has found these errors already
            plain = problem.slice_rows(rows) if known else None
            columns = (
                of_rows(solved.plain)
                if plain is None
                else [plain.output_norms(), warm.row_objectives[rows], solution.row_objectives[rows]]
            )
            columns += [torch.zeros_like(columns[0])] * 3 if held_out is None else of_rows(held_out)
            return torch.stack(columns, dim=1).cpu()

        parts = self.ranks.gather(compute) if solved.shared else [compute()]
        return torch.cat(parts).sum(0)

    def _facts(
        self, layer: PrunableLayer, solved: _Solved | None, errors: Tensor | None, tokens: int, seconds: float
    ) -> tuple[LayerRecord, bytes, bytes | None]:
        """The layer's record, its mask and, where they changed, its weights, as they are stored."""
        if solved is None or errors is None:
            raise InvalidModelError(f"layer {layer.name}: expected a solution on the first rank, found none")
        problem, warm, solution = solved.problem, solved.warm, solved.solution
        norm, error_start, error, held_out_norm, held_out_start, held_out = errors.tolist()
        with_held_out = held_out_norm > 0
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
            tokens=tokens,
            dead_channels=int(problem.gram.dead.sum()),
            output_norm=norm,
            error_start=_share(error_start, norm),
            error=_share(error, norm),
            objective_start=_share(warm.objective, norm),
            objective=_share(solution.objective, norm),
            held_out_error_start=_share(held_out_start, held_out_norm) if with_held_out else None,
            held_out_error=_share(held_out, held_out_norm) if with_held_out else None,
            swaps=_swaps(solution),
            certified_rows=None if certified is None else int(certified.sum()),
            status=str(solution.status),
            seconds=seconds,
            fallback=solved.fallback,
            drift=solved.strength,
        )
        weight = None if solution.weight is None else solution.weight.to(layer.weight.dtype)
        stored = None if weight is None else weight.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return finished, pack_mask(mask).numpy().tobytes(), stored

    def _problem(
        self,
        layer: PrunableLayer,
        sums: GramAccumulator,
        own: Gram | None,
        mixture: GramAccumulator | None,
        moment: Tensor | None,
        strength: float,
    ) -> tuple[LayerProblem, LayerProblem, str]:
        """The layer's problem, the same with the paper's error, and why its inputs are not its own, if so."""
        weight = layer.weight.clone()
        pattern = pattern_of_layer(layer, self.pattern)
        gram: Gram | None = None
        fallback = ""
        least = least_tokens(layer, self.min_expert_tokens)
        if sums.tokens < least:
            gram, fallback = fallback_gram(layer, sums, mixture, least)
        if own is None and gram is None:
            gram = Gram(torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device))
            fallback = "no token reached the layer: inputs taken as uncorrelated, which is magnitude"
        if gram is not None:
            problem = LayerProblem(weight, gram, pattern, name=layer.name)
            return problem, problem, fallback
        own = own or sums.gram()
        metric = drift = None
        if moment is not None:
            metric = output_metric(moment.to(weight.device), self.objective.damping)
        elif self.objective.metric:
            fallback = "no gradient reaches the layer's output: no output metric"
        if sums.has_drift:
            drift = Drift.from_sums(
                weight,
                sums,
                strength,
                self.objective.residual if sums.has_residual else 0.0,
                covariance=metric is not None,
            )
        problem = LayerProblem(
            weight, own.shrunk(self.objective.shrinkage), pattern, drift, metric, layer.name
        )
        if metric is None and drift is None and self.objective.shrinkage == 0:
            return problem, problem, fallback
        return problem, replace(problem, gram=own, drift=None, metric=None), fallback

    def _report(self, finished: LayerRecord) -> None:
        done = sum(layer.rows * layer.cols for layer in self.record.layers())
        self.progress.layer_finished(finished, done, self.total_weights)


def _given(scores: Solver, problem: LayerProblem) -> Given:
    """The mask of a score, which may look at all rows."""
    if isinstance(scores, Given):
        return scores
    mask = scores.run(problem, None, Budget()).mask
    if mask is None:
        raise NoIncumbentError(f"score {scores.name}: expected a mask, found none")
    return Given(mask)


def _share(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _swaps(solution: Solution) -> int:
    swaps = solution.stats.get("swaps")
    return 0 if swaps is None else int(swaps.sum())
