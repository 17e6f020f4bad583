"""Refine the masks of a pruned model against the model's own output.

Layer errors are a means: what counts is how far the outputs of the pruned model are from the dense
model's. With every layer pruned, the loss

    ℓ = Σ_tokens KL(dense ‖ pruned),   or Σ_tokens ½‖z - ẑ‖² of an encoder's normalised last hidden states,

changes with the weights ``Ŵ`` of one layer, to second order in their step, by

    ⟨∇, ΔŴ⟩ + ½ μ tr(S ΔŴ G ΔŴᵀ) / tokens,

``∇`` its gradient, ``G`` the Gram matrix of the layer's present inputs and ``S`` the second moment of loss
gradients at its outputs (the Kronecker-factored Gauss-Newton matrix, see ``gradients``). That is a layer
problem with an output metric and a drift (``problems.metric``): with the lost weight ``L = W - Ŵ`` and its
present value ``L₀``,

    h = -L₀ G - (tokens / μ) S⁻¹ ∇

so the swap engine minimises it over masks, from the present one. Layers that share an input are
refined together, group after group; a step counts only if the loss on the calibration windows has
fallen, else it is tried again with a larger ``μ``, which stays nearer to the present masks
(Levenberg-Marquardt: Marquardt, SIAM J. Appl. Math. 11, 1963), and then dropped. The loss never rises.

With a weight update, as many passes follow in which masks stay and kept weights step: the same layer problem,
its ``L₀`` that of the present weights, solved over the kept weights.

Beside the model this holds the dense outputs of the calibration windows and ``S`` of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import Stream, can_skip, forward_replaced
from ..calibration.dense_outputs import DenseOutputs
from ..calibration.gathering import gradient_batch_size_for
from ..calibration.gradients import checkpointed, gradient_moments, no_weight_gradients
from ..calibration.steps import steps_of
from ..errors import InputError, InvalidModelError
from ..masks.packing import masked, pack_mask, unpack_bytes, weight_bytes, weight_from
from ..models.blocks import Block, PrunableLayer
from ..models.inputs import Samples
from ..problems import Drift, GramAccumulator, LayerProblem, output_metric
from ..problems.metric import DAMPING
from ..problems.pattern import Coupling, Pattern
from ..progress import Progress, Silent
from ..records.run import RefinementStep
from ..records.run_database import RunDatabase
from ..solvers import Group, OneSwap, RowSweeps, Solver, solve
from .pipeline import layer_problems

# The first μ, what a failed step multiplies it by, and how often it is tried.
FIRST, FACTOR, TRIES = 2.0, 3.0, 3
# Share of the Gram's mean diagonal that makes the constant of a step's problem finite.
RIDGE = 1e-6


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Attributes:
        loss_start, loss: mean over tokens before and after.
        swaps: how many weights were exchanged in all.
        steps: one record per try of a step.
    """

    loss_start: float
    loss: float
    swaps: int
    steps: tuple[RefinementStep, ...]


def check_refinement(blocks: Sequence[Block], patterns: Mapping[str, Pattern], passes: int) -> None:
    """Refuse what cannot be refined before any work is done.

    Raises:
        InputError: for a negative number of passes or budgets of a whole layer.
    """
    if passes < 0:
        raise InputError(f"refinement: expected at least 0 passes, found {passes}")
    for layer in (layer for block in blocks for layer in block.layers) if passes else ():
        if patterns[layer.name].couples is not Coupling.BLOCK:
            raise InputError(
                "refinement sees coupled rows of equal sparsity: expected a pattern of rows or blocks, found "
                f"{patterns[layer.name]}"
            )


def refine_masks(
    model: nn.Module,
    blocks: Sequence[Block],
    patterns: Mapping[str, Pattern],
    calibration: Samples,
    dense_outputs: DenseOutputs,
    dense_weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    passes: int = 1,
    solver: Solver | None = None,
    record: RunDatabase | None = None,
    progress: Progress | None = None,
    update: Solver | None = None,
) -> tuple[dict[str, Tensor], Refinement]:
    """Exchange kept and pruned weights wherever that brings the model's output nearer to the dense one's.

    Experts inside fused parameters and layers without gradients keep their masks.

    Args:
        model: the pruned model; afterwards the refined one.
        blocks: from ``find_blocks``.
        patterns: the pattern of each layer by name.
        calibration: token windows (windows, length).
        dense_outputs: of the dense model on these windows.
        dense_weights: ``W`` (rows, cols) of each layer before pruning, by name.
        masks: (rows, cols), bool, by name.
        passes: how often all layers are refined.
        solver: of single rows, ``OneSwap()`` by default.
        record: finished steps are written here, and not repeated if they are there already.
        progress: told about every step.
        update: changes the kept weights of a mask; then as many passes refine these after the masks.

    Returns:
        Masks by name, and what was done.
    """
    check_refinement(blocks, patterns, passes)
    job = _Refiner(
        model,
        blocks,
        patterns,
        calibration,
        dense_outputs,
        dense_weights,
        dict(masks),
        RowSweeps(solver or OneSwap(), alone=False),
        update,
        record or RunDatabase(None),
        progress or Silent(),
    )
    return job.run(passes)


def record_refined_errors(
    model: nn.Module,
    blocks: Sequence[Block],
    patterns: Mapping[str, Pattern],
    dense_weights: Mapping[str, Tensor],
    calibration: Samples,
    held_out: Samples | None,
    record: RunDatabase,
) -> None:
    """Write errors of the refined model's masks into the record, on the inputs that its layers receive.

    A refinement looks at the model's output, so the objective of a layer is its error. Errors of the warm
    start stay those on the inputs of the search. Layers that no token reaches keep what the record has.

    Args:
        model: the refined model.
        blocks: its blocks, without layers that were left dense.
        patterns: the pattern of each layer by name.
        dense_weights: ``W`` (rows, cols) of each layer before pruning, by name.
        calibration: token windows (windows, length), or other inputs.
        held_out: windows of the evaluation text, or None.
        record: of the finished layers.
    """
    layers = {layer.name: layer for block in blocks for layer in block.layers}

    def errors(windows: Samples) -> dict[str, tuple[float, float]]:
        """Output norm and error of each layer, by name."""
        found = {}
        for problem in layer_problems(model, blocks, patterns, windows):
            weight = layers[problem.name].weight
            dense = replace(problem, weight=dense_weights[problem.name].to(weight.device, weight.dtype))
            # the weights as they are: masked, and perhaps updated
            lost = dense.row_objectives(weight != 0, weight)
            found[problem.name] = (float(dense.output_norms().sum()), float(lost.sum()))
        return found

    on_calibration = errors(calibration)
    on_held_out = {} if held_out is None else errors(held_out)
    changed = []
    for finished in record.layers():
        norm, error = on_calibration.get(finished.name, (0.0, 0.0))
        if norm <= 0:
            continue
        held_out_norm, held_out_error = on_held_out.get(finished.name, (0.0, 0.0))
        changed.append(
            replace(
                finished,
                output_norm=norm,
                error=error / norm,
                objective_start=finished.error_start,
                objective=error / norm,
                held_out_error=held_out_error / held_out_norm if held_out_norm > 0 else None,
            )
        )
    record.set_errors(changed)


@dataclass(frozen=True, eq=False)
class _Refiner:
    """One run of ``refine_masks``."""

    model: nn.Module
    blocks: Sequence[Block]
    patterns: Mapping[str, Pattern]
    calibration: Samples
    dense: DenseOutputs
    dense_weights: Mapping[str, Tensor]
    masks: dict[str, Tensor]
    solver: RowSweeps
    update: Solver | None
    record: RunDatabase
    progress: Progress

    def run(self, passes: int) -> tuple[dict[str, Tensor], Refinement]:
        skip = can_skip(self.model, self.blocks, self.calibration)
        groups = self._groups(skip)
        finished = {step.position for step in self.record.refinement() if step.last}
        loss = self.dense.total(self.model)
        over_masks = passes
        passes = over_masks if self.update is None else 2 * over_masks
        for number in range(passes):
            solver = self.solver if self.update is None or number < over_masks else self.update
            positions = range(number * len(groups), (number + 1) * len(groups))
            if finished.issuperset(positions):
                continue
            moments = self._moments(number)
            stream = Stream(self.model, self.blocks, self.calibration, self.dense.batch_size, skip)
            done = 0
            for position, (block, group) in zip(positions, groups, strict=True):
                self.progress.stage("refinement", position, passes * len(groups))
                while done < block:
                    for batch in range(len(stream)):
                        stream.advance(batch)
                    stream.finish_block()
                    done += 1
                layers = [layer for layer in group if layer.name in moments]
                if position not in finished:
                    loss = self._step(position, layers, moments, loss, stream, solver)
        self.progress.stage("refinement", passes * len(groups), passes * len(groups))
        steps = tuple(self.record.refinement())
        count = self.dense.tokens
        swaps = sum(step.swaps for step in steps if step.accepted)
        start = steps[0].loss_before if steps else loss / count
        return self.masks, Refinement(start, loss / count, swaps, steps)

    def _moments(self, number: int) -> dict[str, Tensor]:
        """``Σ g gᵀ`` of every layer by name, of the model as it is when the pass begins."""
        layers = [layer for block in self.blocks for layer in block.layers]
        then = self.record.start_pass(number)
        now = {layer.name: (self.masks[layer.name], layer.weight.clone()) for layer in layers}
        for layer in layers:
            if layer.name in then:  # a run that was interrupted goes on with the same moments
                packed, weight = then[layer.name]
                mask = unpack_bytes(packed, layer.weight.shape)
                self._apply(layer, mask, None if weight is None else weight_from(weight, layer.weight))
        size = gradient_batch_size_for(self.calibration.shape[1])
        moments = gradient_moments(self.model, self.blocks, self.calibration, size, seed=number)
        for layer in layers:
            self._apply(layer, *now[layer.name])
        return moments

    def _groups(self, skip: bool) -> list[tuple[int, list[PrunableLayer]]]:
        """Layers that share an input with the number of their block, in the order of a forward pass."""
        stream = Stream(self.model, self.blocks, self.calibration[:1], 1, skip)
        groups: list[tuple[int, list[PrunableLayer]]] = []
        for number, block in enumerate(self.blocks):
            if block.layers:
                steps = steps_of(stream)
                inputs = [group for step in steps for group in step.inputs]
                groups += [(number, list(group)) for group in inputs if group[0].expert is None]
            stream.advance(0)
            stream.finish_block()
        return groups

    def _step(
        self,
        position: int,
        layers: Sequence[PrunableLayer],
        moments: Mapping[str, Tensor],
        loss: float,
        stream: Stream,
        solver: Solver,
    ) -> float:
        """Refine the layers of one group; returns the loss afterwards."""
        count = self.dense.tokens
        names = ", ".join(layer.name for layer in layers)
        before = {layer.name: (self.masks[layer.name], layer.weight.clone()) for layer in layers}
        gradients, sums = self._gradients(layers, stream) if layers else ({}, {})
        strength = FIRST
        for number in range(TRIES):
            swaps, changed = {}, False
            for layer in layers:
                mask, weight = before[layer.name]
                problem = self._problem(
                    layer, weight, sums[layer.name], gradients[layer.name], moments[layer.name], strength
                )
                found = solve(problem, solver, init=mask)
                swaps[layer.name] = int((found.mask != mask.to(found.mask.device)).sum()) // 2
                self._apply(layer, found.mask, found.weight)
                changed |= not torch.equal(layer.weight, weight)
            after = self.dense.total(self.model, stream) if changed else loss
            accepted = after < loss
            last = accepted or not changed or number == TRIES - 1
            if not accepted:
                for layer in layers:
                    self._apply(layer, *before[layer.name])
            step = RefinementStep(
                position,
                number,
                names,
                strength,
                sum(swaps.values()),
                loss / count,
                after / count,
                accepted,
                last,
            )
            found_masks = {x.name: pack_mask(self.masks[x.name]).numpy().tobytes() for x in layers}
            weights = {x.name: weight_bytes(x.weight) for x in layers if solver.group is Group.WEIGHT_UPDATE}
            if accepted:
                self.record.add_refinement(step, found_masks, weights, swaps)
            else:
                self.record.add_refinement(step, {}, {}, {})
            if last:
                return after if accepted else loss
            strength *= FACTOR
        return loss

    def _apply(self, layer: PrunableLayer, mask: Tensor, weight: Tensor | None) -> None:
        """The layer has this mask, and the dense kept weights where there is no ``weight``."""
        dense = self.dense_weights[layer.name]
        if weight is None:
            weight = masked(dense.to(layer.weight.device), mask)
        layer.write(weight.to(dense.dtype))  # rounded as it is saved
        self.masks[layer.name] = mask.cpu()

    def _gradients(
        self, layers: Sequence[PrunableLayer], stream: Stream
    ) -> tuple[dict[str, Tensor], dict[str, GramAccumulator]]:
        """``∇`` (rows, cols), float64, and the sums of the inputs of each layer, by name."""
        leader = layers[0]
        sums = GramAccumulator(leader.weight.shape[1], leader.weight.device)
        recording = False

        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if recording:  # not in the recomputation of the backward pass
                sums.update(args[0] if args else next(iter(kwargs.values())))

        parameters = {layer.name: getattr(layer.module, layer.parameter) for layer in layers}
        with ExitStack() as stack:
            stack.enter_context(no_weight_gradients(self.model))
            for block in self.blocks:
                stack.enter_context(forward_replaced(block.module, checkpointed(block.module.forward)))
            hook = leader.module.register_forward_pre_hook(observe, with_kwargs=True)
            stack.callback(hook.remove)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
            for batch in range(len(self.dense)):
                recording = True
                with torch.enable_grad(), stream.recalled(batch):
                    loss = self.dense.loss(self.model, batch)
                    recording = False
                    wanted = list(parameters.values())
                    for name, gradient in zip(found, torch.autograd.grad(loss, wanted), strict=True):
                        found[name] += gradient
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        gradients = {}
        for layer in layers:
            gradient = found[layer.name].T if layer.transposed else found[layer.name]
            if not bool(torch.isfinite(gradient).all()):
                raise InvalidModelError(f"gradient of layer {layer.name}: found NaN or Inf")
            gradients[layer.name] = gradient.double()
        return gradients, {layer.name: sums for layer in layers}

    def _problem(
        self,
        layer: PrunableLayer,
        present: Tensor,
        sums: GramAccumulator,
        gradient: Tensor,
        moment: Tensor,
        strength: float,
    ) -> LayerProblem:
        """The quadratic model of the loss in this layer's weights, about the present ones (rows, cols)."""
        weight = self.dense_weights[layer.name].to(layer.weight.device, layer.weight.dtype)
        gram = sums.gram()
        metric = output_metric(moment.to(weight.device), DAMPING)
        # S, damped, is this size times the metric
        size = float(moment.diagonal().double().mean()) * (1 + DAMPING)
        lost = weight.double() - present.double()
        pull = torch.linalg.solve(metric, gradient) * (sums.tokens / (strength * size))
        linear = (-(lost @ gram.matrix) - pull).masked_fill(gram.dead, 0)
        # the smallest constant with which the error is never negative: h G⁻¹ hᵀ
        ridge = gram.matrix.clone()
        ridge.diagonal().add_(RIDGE * float(ridge.diagonal().mean()) + 1e-300)
        covariance = linear @ torch.linalg.solve(ridge, linear.T)
        covariance = (covariance + covariance.T) / 2
        drift = Drift(linear, covariance.diagonal().clamp_min(0).clone(), covariance)
        return LayerProblem(weight, gram, self.patterns[layer.name], drift, metric, layer.name)
