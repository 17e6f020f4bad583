"""Objectives beyond the paper's: targets, residual drift and output metric, against raw activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import label_oracle
import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import sparseswaps as ss
from sparseswaps.calibration.activations import Stream, can_skip
from sparseswaps.calibration.gathering import stream_loss
from sparseswaps.calibration.gradients import Moments, gradient_moments, moment_bytes, moment_groups
from sparseswaps.calibration.steps import residual_writers
from sparseswaps.calibration.store import TensorStore
from sparseswaps.calibration.targets import Target
from sparseswaps.models.blocks import PrunableLayer, find_blocks
from sparseswaps.pruning.allocation import (
    Allocation,
    allocate,
    check_allocation,
    knapsack,
    outlier_share,
    owl_sparsities,
    sparsity_levels,
)
from sparseswaps.pruning.run import prune


def raw_problem(
    rows: int = 3, cols: int = 8, pattern: str = "0.5", seed: int = 0
) -> tuple[ss.LayerProblem, torch.Tensor, torch.Tensor]:
    """A layer with a target of its own and an output metric, its inputs and its target, each float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = ss.synthetic_activations("correlated", cols, 60, seed)
    weight = torch.randn((rows, cols), generator=generator)
    noise = torch.randn((60, rows), generator=generator, dtype=torch.float64)
    target = inputs @ weight.double().T + 0.3 * noise
    gradients = torch.randn((40, rows), generator=generator, dtype=torch.float64).cumsum(1)
    metric = ss.output_metric(gradients.T @ gradients)
    problem = ss.LayerProblem.from_target(
        weight, inputs, target, ss.SparsityPattern.parse(pattern, cols), metric
    )
    return problem, inputs, target


def raw_error(
    problem: ss.LayerProblem, mask: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """tr(S E Eᵀ) from activations."""
    error = target - inputs @ (problem.weight.double() * mask).T
    metric = torch.eye(problem.rows).double() if problem.metric is None else problem.metric
    return torch.einsum("ti,ij,tj->", error, metric, error)


@pytest.mark.parametrize("pattern", ["0.5", "0.25", "2:4"])
@pytest.mark.parametrize("seed", range(4))
def test_objective_is_the_error_of_the_outputs(pattern: str, seed: int) -> None:
    problem, inputs, target = raw_problem(pattern=pattern, seed=seed)
    mask = ss.solve(problem, ss.Random(seed=seed)).mask
    # the Gram is summed from float32 products
    close = {"rtol": 1e-5, "atol": 1e-6 * float((target**2).sum())}
    raw = raw_error(problem, mask, inputs, target)
    torch.testing.assert_close(torch.tensor(problem.objective(mask)).double(), raw, **close)
    torch.testing.assert_close(problem.row_objectives(mask).sum(), raw, **close)
    one = ss.coupled_row(problem)
    torch.testing.assert_close(one.row_objectives(mask.reshape(1, -1)).sum(), raw, **close)
    plain = replace(problem, metric=None)
    rows = ((target - inputs @ (problem.weight.double() * mask).T) ** 2).sum(0)
    torch.testing.assert_close(plain.row_objectives(mask), rows, **close)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_alone_sees_what_the_layer_sees(pattern: str, seed: int) -> None:
    """Changing one row changes the coupled error by S_ii times the change of the row's own problem."""
    problem, inputs, target = raw_problem(pattern=pattern, seed=seed)
    assert problem.metric is not None
    mask = ss.solve(problem, ss.Wanda()).mask
    other = ss.solve(problem, ss.Random(seed=seed)).mask
    for row in range(problem.rows):
        errors = ss.CoupledErrors(problem, problem.weight.double().masked_fill(mask, 0))
        alone = errors.rows_alone(torch.tensor([row]))
        moved = mask.clone()
        moved[row] = other[row]
        change = raw_error(problem, moved, inputs, target) - raw_error(problem, mask, inputs, target)
        found = alone.objective(other[row : row + 1]) - alone.objective(mask[row : row + 1])
        scale = float((target**2).sum())
        torch.testing.assert_close(problem.metric[row, row] * found, change, rtol=1e-4, atol=1e-6 * scale)
        lost = alone.weight.double().masked_fill(other[row : row + 1], 0)
        assert errors.try_lost(torch.tensor([row]), lost) == bool(change < -1e-9 * scale)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("batches", [1, 64])
def test_sweeps_end_between_the_optimum_and_their_start(pattern: str, batches: int) -> None:
    for seed in range(6):
        problem, inputs, target = raw_problem(pattern=pattern, seed=seed)
        one = ss.coupled_row(problem)
        optimum = ss.solve(one, ss.BranchAndBound())
        alone = ss.solve(replace(problem, metric=None), ss.OneSwap()).mask
        swept = ss.solve(problem, ss.RowSweeps(sweeps=4, batches=batches))
        assert float(raw_error(problem, swept.mask, inputs, target)) <= problem.objective(alone) * (1 + 1e-5)
        assert swept.objective >= optimum.bound
        bound = ss.solve(one, ss.Naive()).bound
        assert bound <= swept.objective
        kept = ss.solve(problem, ss.RowSweeps(alone=False), init=optimum.mask.view(problem.rows, -1))
        assert kept.objective <= optimum.objective * (1 + 1e-9)


def test_other_solvers_say_that_they_see_rows_alone() -> None:
    problem, _, _ = raw_problem()
    with pytest.raises(ss.UnsupportedProblemError, match="expected no output metric, found one"):
        ss.solve(problem, ss.OneSwap())
    with pytest.raises(ss.InvalidProblemError, match="positive definite"):
        replace(problem, metric=-torch.eye(3))
    with pytest.raises(ss.InvalidProblemError, match=r"expected \(3, 3\), found \(2, 2\)"):
        replace(problem, metric=torch.eye(2))
    with pytest.raises(ss.InvalidProblemError, match=r"\(tokens, rows\)"):
        ss.LayerProblem.from_target(problem.weight, torch.ones(5, 8), torch.ones(4, 3), problem.pattern)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_of_the_stream_forgets_its_scale(dtype: torch.dtype) -> None:
    """It is orthogonal to the pruned stream, the same for any length of it, and everything if that is 0."""
    generator = torch.Generator().manual_seed(0)
    dense, pruned = (torch.randn((2, 5, 8), generator=generator).to(dtype) for _ in range(2))
    pruned[0, 0] = 0
    loss = stream_loss(dense, pruned)
    assert loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # rounding of float32, or of float64, times the lengths of the two
    allowed = 8 * torch.finfo(loss.dtype).eps * (dense.double().norm(dim=-1) * pruned.double().norm(dim=-1))
    assert bool(((loss.double() * pruned.double()).sum(-1).abs() <= allowed).all())
    assert torch.equal(stream_loss(dense, 4 * pruned), loss)  # by a power of two, so that nothing is rounded
    assert torch.equal(loss[0, 0], dense[0, 0].to(loss.dtype))
    # r = c r̂ + s with one c for each token; where r̂ is small its rounding is largest
    rest = dense.double() - loss.double()
    ratio = rest[1] / pruned[1].double()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
def test_drift_from_missing_outputs(apart: bool) -> None:
    """h and the constant of T = W X̂ + α W (X - X̂) + β s, from batches; both parts in one sum or apart."""
    generator = torch.Generator().manual_seed(0)
    inputs = ss.synthetic_activations("correlated", 6, 80, 0)
    dense = inputs + 0.2 * ss.synthetic_activations("correlated", 6, 80, 1)
    loss = torch.randn((80, 4), generator=generator, dtype=torch.float64)
    weight = torch.randn((4, 6), generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0]] * 4, dtype=torch.bool)
    pattern = ss.SparsityPattern.per_row(6, 0.5)
    for strength, residual in ((0.0, 0.5), (0.75, 0.5), (1.0, 1.0)):
        target = Target(None if apart else strength, residual)
        sums, other = (ss.GramAccumulator(6, missing=8 if apart else 4) for _ in range(2))
        for part, rows in ((sums, slice(0, 30)), (other, slice(30, 80))):
            part.update(inputs[rows], missing=target.missing(weight, dense[rows], inputs[rows], loss[rows]))
        sums.merge(ss.GramAccumulator.from_state_dict(other.state_dict()))
        wanted = inputs @ weight.T + strength * (dense - inputs) @ weight.T + residual * loss
        raw = wanted - inputs @ (weight * mask).T
        for covariance in (False, True):
            drift = target.drift_of(weight, sums, strength, covariance)
            problem = ss.LayerProblem(weight, sums.gram(), pattern, drift)
            # sums of float32 products
            torch.testing.assert_close(problem.row_objectives(mask), (raw**2).sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(problem.output_error(mask), raw.T @ raw, rtol=1e-5, atol=1e-4)
    with pytest.raises(ss.InvalidProblemError, match="missing outputs"):
        sums.update(inputs)
    with pytest.raises(ss.InvalidProblemError, match="expected one of drift and missing"):
        ss.GramAccumulator(6, drift=True, missing=4)


def test_sums_of_outputs_are_for_layers_with_few_of_them() -> None:
    """A layer that is alone with its input gets the sums with fewer products; both lead to one drift."""
    narrow, wide = (prunable(rows, 24) for rows in (6, 20))
    target = Target(0.75, 0.5)
    assert target.sums([narrow], writes=False).missing == 6
    assert target.sums([narrow], writes=True).missing == 6
    assert target.sums([wide], writes=True).missing == 20
    for group in ([wide], [narrow, narrow]):
        sums = target.sums(group, writes=False)
        assert sums.has_drift
        assert not sums.missing
    assert Target(None, 0.5).sums([narrow], writes=True).missing == 12
    assert not Target(0.0, 0.5).sums([narrow], writes=False).has_drift
    inputs = ss.synthetic_activations("correlated", 24, 300, 0).float()
    dense = inputs + 0.2 * ss.synthetic_activations("correlated", 24, 300, 1).float()
    of_outputs, of_inputs = target.sums([narrow], writes=False), ss.GramAccumulator(24, drift=True)
    of_outputs.update(inputs, missing=target.missing(narrow.weight, dense, inputs, None))
    of_inputs.update(inputs, dense)
    found = target.drift_of(narrow.weight, of_outputs, 0.75, covariance=True)
    expected = target.drift_of(narrow.weight, of_inputs, 0.75, covariance=True)
    for one, other in (
        (found.linear, expected.linear),
        (found.constant, expected.constant),
        (found.covariance, expected.covariance),
    ):
        assert one is not None
        assert other is not None
        # float32 sums of 300 tokens
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def prunable(rows: int, cols: int) -> PrunableLayer:
    module = nn.Linear(cols, rows, bias=False)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(rows))
    return PrunableLayer("layer", 0, module, "weight", transposed=False)


def test_shrinkage_keeps_norms_and_scales_correlations() -> None:
    gram = ss.synthetic_layer("correlated", 2, 8, "0.5").gram
    shrunk = gram.shrunk(0.25)
    assert torch.equal(shrunk.scale, gram.scale)
    off = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(shrunk.matrix[off], 0.75 * gram.matrix[off])
    with pytest.raises(ss.InvalidProblemError, match="found 2"):
        gram.shrunk(2)


@pytest.mark.parametrize(
    "text", ["plain", "drift=0.75", "drift=0.75,residual=0.5,metric", "metric,sweeps=3,shrinkage=0.01"]
)
def test_objectives_have_names(text: str) -> None:
    assert str(ss.Objective.parse(text)) == text
    for wrong in ("metric=1", "drift", "drift=x", "speed=1"):
        with pytest.raises(ss.InputError, match="objective"):
            ss.Objective.parse(wrong)


WRITERS = {
    "llama": {"o_proj", "down_proj"},
    "gpt2": {"c_proj"},
    "opt": {"out_proj", "fc2"},
    "bert": {"dense"},
    "phi": {"dense", "fc2"},
    "mixtral": {"o_proj"},
}


@pytest.mark.parametrize("family", WRITERS)
def test_writers_into_the_residual_stream(family: str) -> None:
    model = tiny_models.build(family)
    blocks = find_blocks(model)
    windows = tiny_models.tokens(64).view(2, 32)
    assert can_skip(model, blocks, windows)
    stream = Stream(model, blocks, windows, 1)
    found = residual_writers(stream)
    assert {layer.kind for layer in found} == WRITERS[family]
    assert all(layer.weight.shape[0] == 16 for layer in found)
    # the stream of the attention output is what enters the block
    if family == "llama":
        seen: dict[str, torch.Tensor] = {}
        entered: list[torch.Tensor] = []
        handle = blocks[0].module.register_forward_pre_hook(lambda _m, args: entered.append(args[0].clone()))
        writer = next(layer for layer in found if layer.kind == "o_proj")
        stream.observe(
            0,
            (),
            lambda *_: None,
            writers=[writer],
            stream_observer=lambda layer, r: seen.__setitem__(layer.name, r.clone()),
        )
        handle.remove()
        assert torch.equal(seen[writer.name], entered[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_moments_are_those_of_a_plain_backward_pass(family: str) -> None:
    model = tiny_models.build(family)
    blocks = find_blocks(model)
    windows = tiny_models.tokens(96).view(3, 32)
    found = gradient_moments(model, blocks, windows, batch_size=3, seed=1)
    layers = {layer.name: layer for block in blocks for layer in block.layers}
    assert set(found) == set(layers)
    assert all(parameter.requires_grad for parameter in model.parameters())
    if family not in ("llama", "bert"):
        return
    moments: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.module.register_full_backward_hook(
            lambda _m, _i, out, name=name: moments.__setitem__(name, out[0].flatten(0, 1))
        )
    output = model(input_ids=windows)
    if family == "llama":
        labels = label_oracle.labels(output.logits, seed=1)
        torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels, reduction="sum").backward()
    else:
        hidden = output.last_hidden_state
        unit = hidden / hidden.square().sum(-1, keepdim=True).sqrt()
        (label_oracle.directions(unit, seed=1) * unit).sum().backward()
    for name, gradient in moments.items():
        torch.testing.assert_close(found[name], gradient.T @ gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert", "t5"])
def test_moments_are_the_same_block_by_block(family: str) -> None:
    model = tiny_models.build(family)
    blocks = find_blocks(model)
    windows = tiny_models.tokens(96).view(3, 32)
    whole = gradient_moments(model, blocks, windows, batch_size=3)
    most = sum(moment_bytes(block) for block in blocks)
    for limit, groups in ((None, 1), (most, 1), (0, len(blocks))):
        assert len(moment_groups(blocks, most if limit is None else limit)) == groups
        said: list[int] = []

        def report(done: int, total: int, said: list[int] = said) -> None:
            said.append(total - done)

        moments = Moments(model, blocks, windows, 3, TensorStore(limit), report)
        assert said == sorted(said, reverse=True)
        assert said[-1] == 0
        for name, moment in whole.items():
            found = moments.take(name)
            assert found is not None
            assert torch.equal(found, moment)
            assert moments.take(name) is None
    assert moments.take("nothing") is None


def test_knapsack_is_the_best_of_all_choices() -> None:
    generator = np.random.default_rng(0)
    levels = sparsity_levels(0.5)[::4]
    shapes = {"a": (4, 40), "b": (8, 40), "c": (2, 80)}
    for _ in range(20):
        curves = {name: np.sort(generator.random(len(levels))) for name in shapes}
        chosen = knapsack(shapes, curves, levels, 0.5)
        pruned = {
            name: [rows * int(cols * level) for level in levels] for name, (rows, cols) in shapes.items()
        }
        least = sum(rows * int(cols * 0.5) for rows, cols in shapes.values())
        best = min(
            (sum(curves[name][i] for name, i in zip(shapes, each, strict=True)))
            for each in np.ndindex(*[len(levels)] * 3)
            if sum(pruned[name][i] for name, i in zip(shapes, each, strict=True)) >= least
        )
        picked = {name: levels.index(level) for name, level in chosen.items()}
        assert sum(pruned[name][i] for name, i in picked.items()) >= least
        assert sum(curves[name][i] for name, i in picked.items()) == pytest.approx(best, abs=1e-9)


def test_owl_prunes_blocks_with_outliers_less() -> None:
    shares = {"a": 0.1, "b": 0.3, "c": 0.2}
    found = owl_sparsities(shares, {"a": "0", "b": "1", "c": "2"}, dict.fromkeys(shares, (4, 10**4)), 0.5)
    assert found["b"] < found["c"] < found["a"]
    assert found["a"] - found["b"] == pytest.approx(0.16)  # twice the authors' λ = 0.08
    assert np.mean(list(found.values())) == pytest.approx(0.5, abs=1e-4)  # one weight of a row
    outliers = torch.ones((4, 20))
    outliers[0, 0] = 1000.0
    problem = ss.LayerProblem(outliers, torch.eye(20).double(), ss.SparsityPattern.per_row(20, 0.5))
    assert outlier_share(problem) == pytest.approx(1 / 80)
    with pytest.raises(ss.InputError, match="expected a pattern such as 0"):
        check_allocation(Allocation.OWL, ss.PatternRule.parse("2:4"))
    with pytest.raises(ss.InputError, match="allocation: expected one of uniform, knapsack, owl"):
        ss.PruneSettings(allocation="best")


@pytest.mark.parametrize("rule", list(Allocation))
def test_allocated_models_keep_the_budget(rule: Allocation, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    report = prune(
        source,
        "0.5",
        calibration=tmp_path / "text.txt",
        samples=8,
        length=32,
        allocation=rule,
        out=tmp_path / "pruned",
    )
    assert report.sparsity >= 0.5 - 1e-12
    sparsities = {layer.sparsity for layer in report.layers}
    assert (len(sparsities) == 1) == (rule is Allocation.UNIFORM)


def test_knapsack_measures_masks_alone() -> None:
    """A solver that updates weights gets the levels of its mask search, without an update per level."""
    model = tiny_models.build("llama")
    windows = tiny_models.tokens(256).view(8, 32)
    blocks = find_blocks(model)
    half = ss.PatternRule.parse("0.5")
    updates: list[str] = []

    @dataclass(frozen=True)
    class Update(ss.Solver):
        name: ClassVar[str] = "update"
        group: ClassVar[ss.Group] = ss.Group.WEIGHT_UPDATE

        def run(self, problem: ss.LayerProblem, init: torch.Tensor | None, budget: ss.Budget) -> ss.Outcome:
            updates.append(problem.name)
            return ss.Reconstruction().run(problem, init, budget)

    chosen = [
        allocate(model, blocks, half, windows, Allocation.KNAPSACK, solver)
        for solver in (ss.OneSwap(), ss.Chain(ss.OneSwap(), Update()), ss.Chain(Update()))
    ]
    assert chosen[0] == chosen[1]
    assert len(updates) == len(chosen[0]) * len(sparsity_levels(0.5))  # of the last solver alone


def test_rows_stop_where_held_out_data_say_so() -> None:
    """Few tokens: the held-out error of no row is above its warm start's, and of some below 1-swap's."""
    problem = ss.synthetic_layer("correlated", 12, 32, "0.5", seed=1)
    inputs = ss.synthetic_activations("correlated", 32, 400, 1)
    few, many = ss.GramAccumulator(32), ss.GramAccumulator(32)
    few.update(inputs[:24])
    many.update(inputs[24:])
    scarce = replace(problem, gram=few.gram())
    held_out = replace(problem, gram=many.gram())
    start = ss.solve(scarce, ss.Wanda())
    full = ss.solve(scarce, ss.OneSwap(), init=start)
    stopped = ss.solve(scarce, ss.HeldOutStop(held_out, first=1), init=start)
    before, plain = held_out.row_objectives(start.mask), held_out.row_objectives(full.mask)
    after = held_out.row_objectives(stopped.mask)
    assert bool((after <= before).all())
    assert int(stopped.stats["stopped"].sum()) > 0
    assert float(after.sum()) < float(plain.sum())
    # the calibration error may only have fallen as well
    assert bool((stopped.row_objectives <= start.row_objectives).all())
    # with itself as held-out data nothing stops early, and the end is a 1-swap optimum
    same = ss.solve(scarce, ss.HeldOutStop(scarce), init=start)
    assert int(same.stats["stopped"].sum()) == 0
    assert same.status is ss.Status.LOCAL_OPTIMUM
    with pytest.raises(ss.InvalidProblemError, match="same weight"):
        ss.solve(scarce, ss.HeldOutStop(held_out.slice_rows(slice(0, 3))))


@pytest.mark.parametrize("objective", ["drift=auto,residual=0.5", "held_out=0.25", "drift=auto,metric"])
def test_objectives_that_hold_windows_out(objective: str, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    report = prune(
        source,
        "0.5",
        calibration=tmp_path / "text.txt",
        samples=16,
        length=32,
        objective=objective,
        out=tmp_path / "pruned",
    )
    assert str(report.settings.objective) == objective
    strengths = {layer.drift for layer in report.layers}
    assert strengths <= {0.25, 0.5, 0.75, 1.0} if "auto" in objective else strengths == {0.0}
    # the windows that are held out are in no Gram matrix
    share = 0.25 if "held_out" in objective else 0.125
    assert {layer.tokens for layer in report.layers} == {int(16 * (1 - share)) * 32}
    with pytest.raises(ss.InputError, match="expected at least one on each side"):
        prune(source, calibration=tmp_path / "text.txt", samples=2, length=32, objective="held_out=0.2")


def test_windows_are_withheld_from_those_alone_who_can_stop(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    arguments = {"calibration": tmp_path / "text.txt", "samples": 16, "length": 32, "include": ("*.0.*",)}
    for solver in (ss.Wanda(), ss.Tabu(), ss.Chain(ss.Wanda(), ss.Reconstruction())):
        with pytest.raises(ss.InputError, match="held-out share is for rows that stop early"):
            prune(source, objective="held_out=0.25", solver=solver, **arguments)
    chain = ss.Chain(ss.OneSwap(), ss.Reconstruction())
    chained = prune(source, objective="held_out=0.25", solver=chain, **arguments)
    assert {layer.tokens for layer in chained.layers} == {12 * 32}
    # weights of the final masks are fitted to all windows: nothing stops early there
    updated = prune(source, objective="held_out=0.25", update=ss.Reconstruction(), **arguments)
    assert {layer.tokens for layer in updated.layers} == {16 * 32}


def test_whoever_watches_sees_every_layer_once(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.text(2000))
    seen: list[tuple[str, float, float]] = []

    def watch(problem: ss.LayerProblem, solution: ss.Solution) -> None:
        seen.append((problem.name, solution.objective, problem.objective(solution.mask)))

    report = prune(
        source,
        calibration=tmp_path / "text.txt",
        samples=8,
        length=32,
        objective="drift=auto",
        on_layer=watch,
    )
    assert [name for name, _, _ in seen] == [layer.name for layer in report.layers]
    for (_, objective, again), layer in zip(seen, report.layers, strict=True):
        # the layer is still dense: the problem is the one that was solved
        assert again == pytest.approx(objective, rel=1e-12)
        assert layer.objective * layer.output_norm == pytest.approx(objective, rel=1e-12)
