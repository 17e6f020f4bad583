"""Experts of six families: their quadratic, the proven choice, and the smaller model, by hand and hooks."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_mixtures
import tiny_models
import torch
import transformers as tf
from tiny_mixtures import EXPERTS, FAMILIES
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration.expert_groups import FoundExperts, find_experts
from sparseswaps.errors import InputError, InvalidModelError, InvalidProblemError
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import LoadedModel, load_model
from sparseswaps.models.shrinking import check_shrinkable, shrunk_model, verify_shrunk
from sparseswaps.problems.experts import ExpertProblem, ExpertSums
from sparseswaps.problems.units import UnitProblem
from sparseswaps.pruning.expert_pruning import ChosenExperts, prune_experts
from sparseswaps.solvers.units import Reap, UnitMasks, UnitSolver, WandaSp, solve_units
from sparseswaps.solvers.units.base import UnitOutcome

# Products of float32 with sums over a few dozen terms, against the same in float64.
ROUNDING = 1e-5
# Logits after two blocks in float32, relative to the largest.
OUTPUTS = 2e-5
HALF = ss.SparsityPattern(EXPERTS // 2, EXPERTS)


class Watched(UnitSolver):
    """Hands on to branch and bound and remembers the problems."""

    name = "watched"

    def __init__(self) -> None:
        self.problems: list[ExpertProblem] = []

    def run(self, problem: UnitProblem, init: Tensor | None, budget: ss.Budget) -> UnitOutcome:
        assert isinstance(problem, ExpertProblem)
        self.problems.append(problem)
        return UnitMasks(ss.BranchAndBound()).run(problem, init, budget)


def as_loaded(model: Any) -> LoadedModel:
    named = [*model.named_parameters(), *model.named_buffers()]
    return LoadedModel(model, None, "tiny", {name: tensor.dtype for name, tensor in named})


def found_in(model: Any) -> FoundExperts:
    before = copy.deepcopy(model.state_dict())
    found = find_experts(model, find_blocks(model), tiny_mixtures.windows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def pruned(
    model: Any, solver: UnitSolver | None = None, pattern: ss.SparsityPattern = HALF, **options: Any
) -> list[ChosenExperts]:
    groups = found_in(model).groups
    windows, blocks = tiny_mixtures.windows(), find_blocks(model)
    return prune_experts(model, blocks, groups, [pattern] * len(groups), windows, solver=solver, **options)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tiny_mixtures.windows()).logits
    return logits


def errors_of_all(contributions: Tensor, missing: Tensor) -> dict[tuple[int, ...], float]:
    """The error of every choice of half the experts, by enumeration."""
    found = {}
    for kept in itertools.combinations(range(EXPERTS), EXPERTS // 2):
        gone = [e for e in range(EXPERTS) if e not in kept]
        found[kept] = float((missing + contributions[gone].sum(0)).square().sum())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drift", [0.0, 0.75])
def test_the_problem_and_its_proven_optimum(family: str, drift: float) -> None:
    model = tiny_mixtures.build(family)
    dense = [tiny_mixtures.seen(model, mixture) for mixture in tiny_mixtures.mixtures_of(model)]
    solver = Watched()
    chosen = pruned(model, solver, objective=ss.Objective(drift=drift), update=False)
    everything = torch.ones(EXPERTS, dtype=torch.bool)
    with tiny_mixtures.excluded(model, [chosen[0].solution.kept, everything]):
        after = [tiny_mixtures.seen(model, mixture) for mixture in tiny_mixtures.mixtures_of(model)]
    # the first mixture's inputs are those of the dense model, the second's come from the smaller first
    for number, (inputs, routed, own) in enumerate((dense[0], after[1])):
        mixture = tiny_mixtures.mixtures_of(model)[number]
        adds, comes = tiny_mixtures.contributions(mixture, inputs, routed)
        missing = drift * (dense[number][2] - own)
        problem, each = solver.problems[number], chosen[number]
        expected = torch.einsum("etc,ftc->ef", adds, adds)
        scale = float(expected.diagonal().max())
        row = problem.as_row()
        torch.testing.assert_close(row.gram.matrix, expected, rtol=0, atol=ROUNDING * scale)
        assert problem.routed.tolist() == comes.sum(1).tolist() == each.routed.tolist()
        torch.testing.assert_close(problem.norms, adds.norm(dim=-1).sum(1), rtol=ROUNDING, atol=0)
        if drift:
            linear = torch.einsum("etc,tc->e", adds, missing)
            assert row.drift is not None
            # what is missing is a difference of outputs, and has the rounding of these
            size = float((adds.square().sum((1, 2)) * own.square().sum()).sqrt().max())
            torch.testing.assert_close(row.drift.linear[0], linear, rtol=0, atol=ROUNDING * size)
        errors = errors_of_all(adds, missing)
        kept = tuple(each.solution.kept.nonzero().flatten().tolist())
        assert errors[kept] == pytest.approx(min(errors.values()), rel=ROUNDING)
        assert each.solution.error_masked == pytest.approx(errors[kept], rel=10 * ROUNDING)
        assert each.solution.gap is not None
        assert each.solution.gap <= 1e-6  # what branch and bound leaves open
        means = adds.norm(dim=-1).sum(1) / comes.sum(1).clamp(min=1)
        best = means.topk(EXPERTS // 2).indices.sort().values
        assert solve_units(problem, Reap(), update=False).kept.nonzero().flatten().tolist() == best.tolist()


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smaller_model(family: str, update: bool, tmp_path: Path) -> None:
    """Saved and read back, it is the model whose routers leave the missing experts out."""
    model = tiny_mixtures.build(family)
    loaded = as_loaded(model)
    groups = found_in(model).groups
    announced = check_shrinkable(loaded, groups, [EXPERTS // 2] * 2)
    mixtures = tiny_mixtures.mixtures_of(model)
    targets = [tiny_mixtures.seen(model, mixtures[0])[2]]
    chosen = pruned(model, update=update)
    kept = [each.solution.kept for each in chosen]
    with tiny_mixtures.excluded(model, kept):
        expected = output(model)
        measured = tiny_mixtures.seen(model, mixtures[0])[2]
    size = float(expected.abs().max())
    small = shrunk_model(loaded, groups, kept).model
    torch.testing.assert_close(output(small), expected, rtol=0, atol=OUTPUTS * size)
    small.save_pretrained(tmp_path)
    reloaded = getattr(tf, type(model).__name__).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(reloaded), expected, rtol=0, atol=OUTPUTS * size)
    assert reloaded.num_parameters() == announced
    rows = sum(3 * 24 * 32 + 32 for _ in mixtures) * EXPERTS // 2  # matrices of experts, rows of routers
    assert announced == model.num_parameters() - rows
    # what was measured on the way is what the model does
    error = float((targets[0] - measured).square().sum())
    assert chosen[0].error == pytest.approx(error, rel=1e-4)
    assert all((float(each.factors.sub(1).abs().max()) > 0.01) == update for each in chosen)
    assert all(each.error < each.routed_error for each in chosen) or not update
    # with another choice it is another model
    with tiny_mixtures.excluded(model, [~kept[0], kept[1]]):
        assert float((output(model) - expected).abs().max()) > 0.1 * size


def test_a_choice_that_looks_at_pairs_is_not_worse_than_scores() -> None:
    worse = 0
    for seed in range(6):
        solver = Watched()
        best = pruned(tiny_mixtures.build("mixtral", seed), solver, update=False)
        for problem, each in zip(solver.problems[:1], best[:1], strict=True):
            for score in (Reap(), WandaSp()):
                found = solve_units(problem, score, update=False)
                assert found.bound is None
                assert found.gap is None
                assert each.solution.error_masked <= found.error_masked * (1 + 1e-6)
                worse += found.error_masked > 1.001 * each.solution.error_masked
    assert worse > 0


def test_experts_in_groups(tmp_path: Path) -> None:
    """DeepSeek chooses groups before experts: equally many of each stay."""
    model = tiny_mixtures.build("deepseek-v3", n_group=2, topk_group=1)
    groups = found_in(model).groups
    assert [(x.exchangeable, x.per_token, x.groups_per_token) for x in groups] == [(4, 2, 1)] * 2
    loaded = as_loaded(model)
    with pytest.raises(InputError, match="a multiple of 2, found 5"):
        check_shrinkable(loaded, groups, [5, 5])
    with pytest.raises(InputError, match=r"at least 4, for a token goes to 2 experts from 1 of 2 groups, "):
        check_shrinkable(loaded, groups, [2, 2])
    chosen = pruned(model, pattern=ss.SparsityPattern(2, 4), update=True)
    kept = [each.solution.kept for each in chosen]
    assert all(mask.view(2, 4).sum(1).tolist() == [2, 2] for mask in kept)
    with tiny_mixtures.excluded(model, kept):
        expected = output(model)
    small = shrunk_model(loaded, groups, kept).model
    small.save_pretrained(tmp_path)
    reloaded = tf.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(reloaded), expected, rtol=0, atol=OUTPUTS * float(expected.abs().max()))


def test_a_router_that_cannot_choose_among_so_few() -> None:
    """DeepSeek-V3 rates a group by the best two of it, so that one alone is too few."""
    model = tiny_mixtures.build("deepseek-v3", num_experts_per_tok=1)
    with pytest.raises(InvalidModelError, match=r"chooses among 1 of 8, found one that cannot: .*range"):
        check_shrinkable(as_loaded(model), found_in(model).groups, [1, 1])
    model = tiny_mixtures.build("mixtral")
    with pytest.raises(InputError, match="at least 2, for a token goes to 2 experts, found 1"):
        check_shrinkable(as_loaded(model), found_in(model).groups, [1, 1])
    with pytest.raises(InputError, match="expected equally many kept in every block"):
        check_shrinkable(as_loaded(model), found_in(model).groups, [4, 5])


def test_an_expert_that_no_token_reaches() -> None:
    model = tiny_mixtures.build("mixtral")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 3
        for mixture in tiny_mixtures.mixtures_of(model):
            tiny_mixtures.router_of(mixture).weight[3, 0] = -30
    chosen = pruned(model, pattern=ss.SparsityPattern(EXPERTS - 1, EXPERTS), update=True)
    assert chosen[0].routed[3] == 0
    assert chosen[0].routed[~chosen[0].solution.kept].tolist() == [0]
    assert chosen[0].solution.error_masked == 0
    # what the router does with the others is the same, up to the order of sums in float32
    assert chosen[0].routed_error < 1e-12 * chosen[0].output_norm
    torch.testing.assert_close(
        chosen[0].factors, torch.ones(EXPERTS - 1, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_mixtures_that_are_not_looked_into() -> None:
    found = found_in(tiny_mixtures.build("jetmoe"))
    assert not found.groups
    assert found.missing["model.layers.0.mlp"].startswith("its experts run more than once in a pass")
    model = tiny_mixtures.build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[:] = model.model.layers[1].mlp.experts.down_proj.data[0]
    model.model.layers[1].mlp.experts.gate_up_proj.data[:] = 1
    found = found_in(model)
    assert "nothing shows whether" in found.missing["model.layers.1.mlp"]
    assert [group.block for group in found.groups] in ([0], [])

    class Apart(nn.Module):
        """Experts that are modules of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4)
            self.lot = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, states: Tensor) -> Tensor:
            gates = self.router(states).softmax(-1)
            return states + sum(gates[..., i, None] * each(states) for i, each in enumerate(self.lot))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 16)
            self.layers = nn.ModuleList([Apart()])

        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            return (self.layers[0](self.embed(input_ids)),)

    plain = Model().eval()
    missing = find_experts(plain, find_blocks(plain), tiny_mixtures.windows()).missing
    assert missing == {"layers.0.lot": "its experts are modules of their own, not one fused parameter"}


def test_what_is_refused() -> None:
    model = tiny_mixtures.build("mixtral")
    with pytest.raises(InputError, match=r"objective of experts: expected drift alone, found residual=0\.5"):
        pruned(model, objective=ss.Objective(residual=0.5))
    model.model.layers[1].mlp.experts.down_proj.data[:, 0, 0] = torch.inf
    groups = [
        replace(group, module=mixture, experts=mixture.experts)
        for group, mixture in zip(
            found_in(tiny_mixtures.build("mixtral")).groups, tiny_mixtures.mixtures_of(model), strict=True
        )
    ]
    with pytest.raises(InvalidModelError, match=r"mixture model.layers.1.mlp: .* found NaN or Inf"):
        prune_experts(model, find_blocks(model), groups, [HALF] * 2, tiny_mixtures.windows())
    columns = torch.arange(4)[:, None]
    layer = ss.LayerProblem(torch.ones(1, 4), torch.eye(4), "0.5")
    with pytest.raises(
        InvalidProblemError, match="reap ranks experts: expected an ExpertProblem, found Unit"
    ):
        solve_units(UnitProblem(layer, columns, ss.SparsityPattern(2, 4)), Reap())
    with pytest.raises(InvalidProblemError, match="expected sums with a target, found none"):
        ExpertSums(4, torch.device("cpu")).factors()


def test_offloaded(tmp_path: Path) -> None:
    """The same groups and the same smaller model; choosing needs the weights in memory."""
    tiny_mixtures.build("qwen3-moe").save_pretrained(tmp_path)
    window = tiny_mixtures.windows()
    results = []
    for offload in (True, False):
        loaded = load_model(tmp_path, offload=offload)
        blocks = find_blocks(loaded.model)
        groups = find_experts(loaded.model, blocks, window, loaded.residence).groups
        assert len(groups) == 2
        kept = [torch.arange(EXPERTS) % 2 == 1] * 2
        results.append(output(shrunk_model(loaded, groups, kept).model))
        if offload:
            with pytest.raises(InvalidModelError, match="all weights in memory to choose experts"):
                prune_experts(loaded.model, blocks, groups, [HALF] * 2, window)
    assert torch.equal(*results)


def test_experts_and_heads_at_once(tmp_path: Path) -> None:
    from sparseswaps.calibration.unit_groups import find_units

    model = tiny_mixtures.build("olmoe")
    blocks, window = find_blocks(model), tiny_models.tokens(64).view(2, 32)
    heads = find_units(model, blocks, window, ["kv-groups"]).groups
    experts = found_in(model).groups
    if not heads:  # norms of all heads together
        model = tiny_mixtures.build("mixtral")
        blocks = find_blocks(model)
        heads, experts = find_units(model, blocks, window, ["kv-groups"]).groups, found_in(model).groups
    groups = [*heads, *experts]
    kept = [torch.tensor([True, False])] * 2 + [torch.arange(EXPERTS) % 2 == 0] * 2
    loaded = as_loaded(model)
    small = shrunk_model(loaded, groups, kept).model
    for group in heads:
        group.consumer.weight[:, group.columns[1]] = 0
    with tiny_mixtures.excluded(model, kept[2:]):
        verify_shrunk(model, small, window)
    small.save_pretrained(tmp_path)
    assert small.config.num_key_value_heads == 1
    assert type(small).from_pretrained(tmp_path).num_parameters() == check_shrinkable(
        loaded, groups, [1, 1, 4, 4]
    )
