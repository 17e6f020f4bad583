"""One layer of a run: its problem from the sums of activations, its solution, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.experts import all_tokens, fallback_gram, least_tokens
from ..errors import InputError, InvalidModelError
from ..masks.packing import pack_mask, weight_bytes
from ..models.blocks import Block, PrunableLayer
from ..problems import Gram, GramAccumulator, LayerProblem, output_metric
from ..problems.pattern import Pattern, PatternRule
from ..ranks import Ranks
from ..records.run import DENSE, LayerRecord
from ..solvers import Group, RowSweeps, Solution
from ..solvers.given import Given
from ..solvers.search.held_out_stop import with_held_out_stop
from .objective import Objective
from .settings import PruneSettings, Unreached
from .shared_rows import solve_shared


@dataclass(frozen=True, eq=False)
class StepSums:
    """Sums of one step by the name of a group's first layer.

    Attributes:
        calibration, held_out, checks: on calibration windows, held-out text and held-out windows.
        reading: layers of experts that read the tokens as they come.
        uncalled: layers whose weights are used without a call of their modules.
        mixtures: sums over all experts of a mixture that were needed already.
        grams: Gram matrix of the group that is pruned, shared by its layers with all that is derived from it.
    """

    calibration: dict[str, GramAccumulator]
    held_out: dict[str, GramAccumulator]
    checks: dict[str, GramAccumulator]
    reading: set[str]
    uncalled: set[str] = field(default_factory=set)
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
class Solved:
    """A layer's problem and what came out, before it is applied; ``shared`` by rows over the ranks.

    ``fallback`` says why another rule chose the mask, if one did.
    """

    problem: LayerProblem
    warm: Solution
    solution: Solution
    strength: float
    fallback: str
    plain: LayerProblem
    shared: bool


@dataclass(frozen=True, eq=False)
class LayerSolving:
    """How the layers of a run are solved.

    Attributes:
        settings: of the run; its objective states every drift.
        patterns: of each layer by name.
        masks: warm start of each layer by name instead of the start's, or None.
        ranks: the processes that share the work.
        dtypes: in which each layer's weight is saved, by name; the model's own where it is not named.
    """

    settings: PruneSettings
    patterns: Mapping[str, Pattern]
    masks: Mapping[str, Tensor] | None
    ranks: Ranks
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """What layers are fitted to."""
        return self.settings.objective

    def solve(
        self, layer: PrunableLayer, leader: str, sums: StepSums, moment: Tensor | None, strength: float
    ) -> Solved | None:
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
        solver = self.settings.solver
        if problem.metric is not None and not solver.covers.metric:
            solver = RowSweeps(solver, self.objective.sweeps)
        if checks is not None and checks.tokens:
            held_out, _, _ = self._problem(layer, checks, checks.gram(), None, None, strength)
            solver = with_held_out_stop(solver, held_out)
        start = self.settings.start if self.masks is None else Given(self.masks[layer.name])
        ranks = Ranks() if coupled else self.ranks
        warm = solve_shared(problem, start, None, ranks)
        score = solver.group is Group.SCORE
        solution = solve_shared(problem, solver, None if score else warm.mask, ranks)
        solution = as_saved(problem, solution, self.dtypes.get(layer.name, layer.weight.dtype))
        return Solved(problem, warm, solution, strength, fallback, plain, ranks.count > 1)

    def stays_dense(self, sums: GramAccumulator) -> bool:
        """Whether a layer with these sums is left dense, since nothing is known of its inputs."""
        return sums.tokens == 0 and self.masks is None and self.settings.unreached is Unreached.DENSE

    def errors(self, solved: Solved, held_out_sums: GramAccumulator | None) -> Tensor:
        """Sums over rows of: output norm, plain error before and after, the same three on held-out text."""
        problem, warm, solution = solved.problem, solved.warm, solved.solution
        held_out = None
        if held_out_sums is not None and held_out_sums.tokens:
            held_out = replace(problem, gram=held_out_sums.gram(), drift=None, metric=None)
        rows = self.ranks.rows(problem.rows) if solved.shared else slice(0, problem.rows)
        weight = None if solution.weight is None else solution.weight[rows]
        # otherwise ``solve`` has found these errors already, but for the drift
        apart = problem.metric is not None or problem.gram is not solved.plain.gram

        def of_rows(whole: LayerProblem) -> list[Tensor]:
            part = whole.slice_rows(rows)
            return [
                part.output_norms(),
                part.row_objectives(warm.mask[rows]),
                part.row_objectives(solution.mask[rows], weight),
            ]

        def without_drift() -> list[Tensor]:
            part = problem.slice_rows(rows)
            return [
                part.output_norms(),
                part.without_drift(warm.row_objectives[rows], warm.mask[rows]),
                part.without_drift(solution.row_objectives[rows], solution.mask[rows], weight),
            ]

        def compute() -> Tensor:
            if rows.start == rows.stop:
                return torch.zeros((0, 6), dtype=torch.float64)
            columns = of_rows(solved.plain) if apart else without_drift()
            columns += [torch.zeros_like(columns[0])] * 3 if held_out is None else of_rows(held_out)
            return torch.stack(columns, dim=1).cpu()

        parts = self.ranks.gather(compute) if solved.shared else [compute()]
        return torch.cat(parts).sum(0)

    def facts(
        self, layer: PrunableLayer, solved: Solved | None, errors: Tensor | None, tokens: int, seconds: float
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
        stored = None if weight is None else weight_bytes(weight)
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
        pattern = self.patterns[layer.name]
        gram: Gram | None = None
        fallback = ""
        least = least_tokens(layer, self.settings.min_expert_tokens)
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
        target = self.objective.target
        if target is not None and sums.has_drift:
            drift = target.drift_of(weight, sums, strength, covariance=metric is not None)
        problem = LayerProblem(
            weight, own.shrunk(self.objective.shrinkage), pattern, drift, metric, layer.name
        )
        if metric is None and drift is None and self.objective.shrinkage == 0:
            return problem, problem, fallback
        return problem, replace(problem, gram=own, drift=None, metric=None), fallback


def as_saved(problem: LayerProblem, solution: Solution, dtype: torch.dtype) -> Solution:
    """``solution`` with updated weights rounded to the dtype in which they are saved, and their error."""
    if solution.weight is None:
        return solution
    weight = solution.weight.to(dtype).to(solution.weight.dtype)
    return replace(solution, weight=weight, row_objectives=problem.row_objectives(solution.mask, weight))


def left_dense(layer: PrunableLayer, reason: str) -> tuple[LayerRecord, bytes]:
    """The record of a layer of which nothing is pruned, and its mask as it is stored."""
    rows, cols = layer.weight.shape
    finished = LayerRecord(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        rows=rows,
        cols=cols,
        pattern=DENSE,
        sparsity=0.0,
        tokens=0,
        dead_channels=0,
        output_norm=0.0,
        error_start=0.0,
        error=0.0,
        objective_start=0.0,
        objective=0.0,
        held_out_error_start=None,
        held_out_error=None,
        swaps=0,
        certified_rows=None,
        status="left dense",
        seconds=0.0,
        fallback=reason,
    )
    return finished, pack_mask(torch.ones((rows, cols), dtype=torch.bool)).numpy().tobytes()


def patterns_of(
    blocks: Sequence[Block], pattern: str | PatternRule | Mapping[str, Pattern]
) -> dict[str, Pattern]:
    """The pattern of each layer by name, from one rule for all or as given.

    Raises:
        InvalidPatternError: if it does not fit a layer, which the message names.
    """
    if isinstance(pattern, Mapping):
        return {layer.name: pattern[layer.name] for block in blocks for layer in block.layers}
    rule = pattern if isinstance(pattern, PatternRule) else PatternRule.parse(pattern)
    found = {}
    for layer in (layer for block in blocks for layer in block.layers):
        try:
            found[layer.name] = rule.at(layer.weight.shape[1])
        except InputError as error:
            raise type(error)(f"layer {layer.name}: {error}") from error
    return found


def _share(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0


def _swaps(solution: Solution) -> int:
    swaps = solution.stats.get("swaps")
    return 0 if swaps is None else int(swaps.sum())
