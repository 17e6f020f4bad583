"""How sparse each layer of a model is to be, under one budget for all of them.

*knapsack*: the error of every layer is measured at several sparsities on the dense model, and one level
is chosen per layer so that the sum is smallest while at least the asked share of all weights is
pruned: a multiple-choice knapsack (Kellerer, Pferschy and Pisinger, *Knapsack Problems*, 2004, chapter 11),
solved exactly by HiGHS. The error is ``½ tr(S E Eᵀ) / tokens`` with the second moment ``S`` of the loss
gradients (see ``gradients``), the quadratic model of what pruning this layer alone adds to the loss of the
windows; where a layer has none, its relative error brought to the mean of the others. Kept weights are the
dense ones also where a solver updates them: curves after updates take long.

*owl* (Yin et al., *Outlier Weighed Layerwise Sparsity*, ICML 2024, section 3): blocks with more outliers
among their Wanda scores ``|w_ij| ‖X_j‖``, larger than ``M`` times the layer's mean, are pruned less, by at
most ``λ`` from the mean. The authors' values are M = 5 and λ = 0.08.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.activations import can_skip
from ..calibration.gathering import gradient_batch_size_for
from ..calibration.gradients import Moments
from ..calibration.store import TensorStore
from ..errors import InputError
from ..models.blocks import Block
from ..models.inputs import Samples
from ..models.offload import Residence
from ..problems import LayerProblem
from ..problems.pattern import Coupling, Pattern, PatternRule, SparsityPattern
from ..solvers import Solver, Wanda, solve
from ..solvers.compose import without_weight_updates
from .layer_solving import patterns_of
from .pipeline import layer_problems
from .settings import Allocation

# Levels of the knapsack around the mean sparsity; the quadratic model says little farther away.
REACH, STEP = 0.2, 0.025
# No layer is left whole or emptied.
LEAST = 0.02
OUTLIER_FACTOR, OUTLIER_REACH = 5.0, 0.08

Report = Callable[[int, int], None]


def allocate(
    model: nn.Module,
    blocks: Sequence[Block],
    pattern: PatternRule,
    calibration: Samples,
    rule: Allocation,
    solver: Solver,
    report: Report | None = None,
    residence: Residence | None = None,
    store: TensorStore | None = None,
) -> dict[str, Pattern]:
    """The pattern of each layer by name.

    Args:
        model: the dense model; it is not changed.
        blocks: from ``find_blocks``.
        pattern: of every layer; its share is the mean sparsity of the whole model.
        calibration: token windows (windows, length).
        rule: how the budget is spread.
        solver: measures the error curves of the knapsack, without the weight updates of a chain.
        report: called with (layers done, layers in all).
        residence: where the blocks' weights are; in the model by default.
        store: keeps the moments of output gradients; main memory by default.

    Raises:
        InputError: for N:M patterns and budgets of a layer, which leave nothing to choose.
    """
    layers = [layer for block in blocks for layer in block.layers]
    if rule is Allocation.UNIFORM:
        return patterns_of(blocks, pattern)
    check_allocation(rule, pattern)
    sparsity = pattern.share or 0.0
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers}
    curves: dict[str, np.ndarray] = {}
    shares: dict[str, float] = {}
    relative: set[str] = set()
    moments = None
    levels = sparsity_levels(sparsity)
    search = without_weight_updates(solver)
    if rule is Allocation.KNAPSACK:
        batch_size = gradient_batch_size_for(calibration.shape[1])
        one_by_one = residence is not None and residence.offloaded and can_skip(model, blocks, calibration)
        place = residence if one_by_one else None
        moments = Moments(model, blocks, calibration, batch_size, store or TensorStore(), residence=place)
    problems = layer_problems(model, blocks, pattern, calibration, residence)
    for done, problem in enumerate(problems, start=1):
        if rule is Allocation.OWL:
            shares[problem.name] = outlier_share(problem)
        else:
            moment = None if moments is None else moments.take(problem.name)
            curves[problem.name] = error_curve(problem, levels, search, moment)
            if moment is None:
                relative.add(problem.name)
        if report:
            report(done, len(layers))
    if rule is Allocation.OWL:
        of_block = {layer.name: block.name for block in blocks for layer in block.layers}
        chosen = owl_sparsities(shares, of_block, shapes, sparsity)
    else:
        chosen = knapsack(shapes, _in_one_unit(curves, relative), levels, sparsity)
    # layers that no calibration token reaches keep the mean
    return {
        name: SparsityPattern.per_row(cols, chosen.get(name, sparsity)) for name, (_, cols) in shapes.items()
    }


def check_allocation(rule: Allocation, pattern: PatternRule) -> None:
    """Refuse a rule that finds nothing to choose with the pattern.

    Raises:
        InputError: for N:M patterns and budgets of a layer.
    """
    if rule is not Allocation.UNIFORM and (pattern.share is None or pattern.couples is not Coupling.BLOCK):
        raise InputError(
            f"an allocation chooses the sparsity of rows: expected a pattern such as 0.5, found {pattern}"
        )


def sparsity_levels(mean: float) -> tuple[float, ...]:
    """Levels around the mean sparsity, inside (0, 1), the mean among them."""
    steps = round(REACH / STEP)
    levels = [round(mean + k * STEP, 6) for k in range(-steps, steps + 1)]
    return tuple(level for level in levels if LEAST <= level <= 1 - LEAST)


def error_curve(
    problem: LayerProblem, levels: Sequence[float], solver: Solver, moment: Tensor | None
) -> np.ndarray:
    """Error of a layer at each sparsity (levels,): ``½ tr(S E Eᵀ) / tokens``, or without ``S`` relative."""
    errors = []
    for level in levels:
        at_level = replace(problem, pattern=SparsityPattern.per_row(problem.cols, level))
        mask = solve(at_level, solver, init=solve(at_level, Wanda())).mask
        if moment is None:
            errors.append(problem.objective(mask) / max(float(problem.output_norms().sum()), 1e-300))
        else:
            second = moment.to(problem.device, torch.float64)
            tokens = max(problem.gram.tokens, 1)
            errors.append(float((second * problem.output_error(mask)).sum()) / (2 * tokens))
    # more weights never leave a larger smallest error; a local search may say otherwise
    return np.maximum.accumulate(np.asarray(errors))


def knapsack(
    shapes: Mapping[str, tuple[int, int]],
    curves: Mapping[str, np.ndarray],
    levels: Sequence[float],
    mean: float,
) -> dict[str, float]:
    """The sparsity of each layer that minimises the summed error.

    Args:
        shapes: (rows, cols) of each layer.
        curves: error of each layer at each level (levels,).
        levels: sparsities.
        mean: at least as many weights are pruned as with this sparsity in every row.

    Raises:
        InputError: if no choice of levels prunes enough.
    """
    from scipy.optimize import LinearConstraint, milp  # HiGHS

    names = list(curves)
    count, choices = len(names), len(levels)
    cost = np.concatenate([curves[name] for name in names])
    scale = float(np.abs(cost).max()) or 1.0
    one_each = np.kron(np.eye(count), np.ones(choices))
    pruned = np.array([shapes[name][0] * int(shapes[name][1] * level) for name in names for level in levels])
    least = sum(shapes[name][0] * int(shapes[name][1] * mean) for name in names)
    found = milp(
        cost / scale,
        integrality=np.ones(count * choices),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            # half a weight of slack: HiGHS keeps constraints to a tolerance, and weights are whole
            LinearConstraint(pruned[None] / least, 1 - 0.5 / least, np.inf),
        ],
    )
    if found.x is None:
        raise InputError(
            f"allocation: expected levels that prune {mean:.1%} of all weights, found none ({found.message})"
        )
    picked = found.x.reshape(count, choices).argmax(1)
    return {name: float(levels[level]) for name, level in zip(names, picked, strict=True)}


def owl_sparsities(
    shares: Mapping[str, float],
    of_block: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
    mean: float,
) -> dict[str, float]:
    """OWL's sparsity of each layer: one per block, λ around the mean, less where outliers are more.

    Args:
        shares: share of outliers of each layer.
        of_block: block of each layer.
        shapes: (rows, cols) of each layer.
        mean: the pruned share of all weights.
    """
    members: dict[str, list[str]] = {}
    for name in shares:
        members.setdefault(of_block[name], []).append(name)
    ratio = np.array([np.mean([shares[name] for name in names]) for names in members.values()])
    span = ratio.max() - ratio.min()
    less = (ratio - ratio.min()) / span * 2 * OUTLIER_REACH if span > 0 else np.zeros_like(ratio)
    sizes = np.array([sum(math.prod(shapes[name]) for name in names) for names in members.values()])
    wanted = mean - (less - np.average(less, weights=sizes))
    least = sum(shapes[name][0] * int(shapes[name][1] * mean) for name in shares)

    def moved(by: float) -> dict[str, float]:
        return {
            name: float(np.clip(value + by, LEAST, 1 - LEAST))
            for names, value in zip(members.values(), wanted, strict=True)
            for name in names
        }

    def prunes_enough(by: float) -> bool:
        chosen = moved(by)
        return sum(shapes[name][0] * int(shapes[name][1] * chosen[name]) for name in shares) >= least

    # rows prune whole weights, rounded down: the smallest common step that makes up for it
    low, high = 0.0, 0.0 if prunes_enough(0.0) else 1.0
    for _ in range(40 if high else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if prunes_enough(middle) else (middle, high)
    return moved(high)


def outlier_share(problem: LayerProblem) -> float:
    """Share of a layer's Wanda scores that are larger than ``M`` times their mean."""
    scores = problem.scaled_weight.abs()
    return float((scores > OUTLIER_FACTOR * scores.mean()).double().mean())


def _in_one_unit(curves: Mapping[str, np.ndarray], relative: set[str]) -> dict[str, np.ndarray]:
    """Relative curves scaled so that their mean is that of the curves in units of the loss."""
    others = [curve.mean() for name, curve in curves.items() if name not in relative]
    if not others or not relative:
        return dict(curves)
    factor = np.mean(others) / max(np.mean([curves[name].mean() for name in relative]), 1e-300)
    return {name: curve * factor if name in relative else curve for name, curve in curves.items()}
