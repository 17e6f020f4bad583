"""Sublayers and blocks left out by measured losses: by enumeration on stories260K, and as smaller models."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_models
import torch
import transformers as tf
from torch import Tensor, nn

import sparseswaps as ss
from sparseswaps.calibration.windows import calibration_windows
from sparseswaps.errors import InputError, InvalidModelError, InvalidProblemError
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.depth import blocks_without, check_shallower, shallower_model
from sparseswaps.models.loading import LoadedModel, load_model
from sparseswaps.models.shrinking import verify_shrunk
from sparseswaps.models.sublayers import find_sublayers, silenced, zero_sublayer
from sparseswaps.problems.sublayers import MeasuredLosses
from sparseswaps.pruning.sublayer_pruning import (
    by_block,
    choose_sublayers,
    greedy_sublayers,
    loss_without,
    measure_losses,
    one_by_one,
)
from sparseswaps.solvers import BranchAndBound


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[LoadedModel, Tensor]:
    loaded = load_model(shared_data / "models" / "stories260K", torch.device("cpu"), "float32")
    text = shared_data / "texts" / "tinystories_calib.txt"
    windows = calibration_windows(text, loaded.tokenizer, 4, 128, 0, False, False).tokens
    assert isinstance(windows, Tensor)
    return loaded, windows


def build(family: str) -> Any:
    return tiny_families.build(family, tiny_families.families()[family])


def as_loaded(model: Any) -> LoadedModel:
    named = [*model.named_parameters(), *model.named_buffers()]
    return LoadedModel(model, None, "tiny", {name: tensor.dtype for name, tensor in named})


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(tiny_families.FIRST_WORD, tiny_families.VOCABULARY, (2, 16), generator=generator)


def own_loss(model: nn.Module, windows: Tensor, gone: set[int]) -> float:
    """The loss without some sublayers, whose last weights are zero: attention before MLP, block by block."""
    changed = []
    for number in gone:
        block: Any = model.model.layers[number // 2]  # type: ignore[union-attr, index]
        weight = (block.mlp.down_proj if number % 2 else block.self_attn.o_proj).weight.data
        changed.append((weight, weight.clone()))
        weight.zero_()
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    for weight, before in changed:
        weight.copy_(before)
    return loss


def test_the_best_subset_of_a_real_model(stories: tuple[LoadedModel, Tensor]) -> None:
    loaded, windows = stories
    model = loaded.model
    sublayers = find_sublayers(model, find_blocks(model), windows)
    kinds = ("self_attn", "mlp")
    assert [each.name for each in sublayers] == [
        f"model.layers.{block}.{kind}" for block in range(5) for kind in kinds
    ]
    removables = one_by_one(sublayers)
    measured = measure_losses(model, removables, windows)
    assert measured.dense == pytest.approx(own_loss(model, windows, set()), rel=1e-5)
    pairs = {pair: own_loss(model, windows, set(pair)) for pair in itertools.combinations(range(10), 2)}
    for (first, second), loss in pairs.items():  # losses of float32, in another order of sums
        assert float(measured.without[first, second]) == pytest.approx(loss, rel=1e-5)
    two = choose_sublayers(model, removables, windows, 2, measured=measured)
    assert set(two.gone.nonzero().flatten().tolist()) == set(min(pairs, key=lambda pair: pairs[pair]))
    assert two.loss == pytest.approx(min(pairs.values()), rel=1e-5)
    assert two.loss == pytest.approx(two.predicted, rel=1e-6)  # two together were measured
    for count in (1, 3, 5, 8):
        found = choose_sublayers(model, removables, windows, count, measured=measured)
        assert int(found.gone.sum()) == count
        predicted = {
            chosen: measured.dense
            + sum(float(measured.without[u, u]) - measured.dense for u in chosen)
            + sum(
                float(measured.without[u, v] - measured.without[u, u] - measured.without[v, v])
                + measured.dense
                for u, v in itertools.combinations(chosen, 2)
            )
            for chosen in itertools.combinations(range(10), count)
        }
        best = min(predicted.values())
        assert found.predicted is not None
        assert found.bound is not None
        assert found.predicted == pytest.approx(predicted[tuple(found.gone.nonzero().flatten().tolist())])
        assert best - 1e-9 <= found.predicted <= best + 1e-4  # a millionth of an error with its constant
        assert found.bound <= best + 1e-9
    greedy = greedy_sublayers(model, removables, windows, 3)
    assert greedy.losses == 10 + 9 + 8
    quadratic = choose_sublayers(model, removables, windows, 3, measured=measured)
    measured_best = min(
        loss_without(model, [sublayers[u] for u in chosen], windows)
        for chosen in itertools.combinations(range(10), 3)
    )
    # neither knows what three do together; both are near the best of all that were measured
    for found in (greedy, quadratic):
        assert measured_best - 1e-9 <= found.loss <= measured_best + 0.1


def test_blocks_leave_a_real_model(stories: tuple[LoadedModel, Tensor], tmp_path: Path) -> None:
    loaded, windows = stories
    blocks = find_blocks(loaded.model)
    sublayers = find_sublayers(loaded.model, blocks, windows)
    removables = by_block(sublayers)
    chosen = choose_sublayers(loaded.model, removables, windows, 2)
    every = {
        pair: loss_without(loaded.model, removables[pair[0]] + removables[pair[1]], windows)
        for pair in itertools.combinations(range(5), 2)
    }
    assert chosen.loss == pytest.approx(min(every.values()), rel=1e-6)
    assert chosen.losses == 5 * 6 // 2 + 2
    gone = [each for number in chosen.gone.nonzero().flatten().tolist() for each in removables[number]]
    numbers = blocks_without(sublayers, gone)
    assert numbers == chosen.gone.nonzero().flatten().tolist()
    announced = check_shallower(loaded, blocks, numbers)
    small = shallower_model(loaded, blocks, numbers)
    with silenced(gone):
        verify_shrunk(loaded.model, small.model, windows)
    small.restore_dtypes()
    small.model.save_pretrained(tmp_path)
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert reloaded.num_parameters() == announced
    assert reloaded.config.num_hidden_layers == 3
    own = sum(p.numel() for number in numbers for p in blocks[number].module.parameters())
    assert announced == loaded.model.num_parameters() - own
    with torch.no_grad():
        loss = float(reloaded(windows, labels=windows).loss)
    assert loss == pytest.approx(chosen.loss, rel=1e-4)
    assert loss < 20


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text", "olmo2", "mixtral"])
def test_families(family: str, tmp_path: Path) -> None:
    """Conv1D, layers beside attention, parallel blocks, norms behind sublayers, kinds of blocks in lists."""
    model = build(family)
    blocks = find_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sublayers = find_sublayers(model, blocks, tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [each.block for each in sublayers] == [0, 0, 1, 1]
    first = [each for each in sublayers if each.block == 0]
    loaded = as_loaded(model)
    small = shallower_model(loaded, blocks, [0]).model
    with silenced(first):
        verify_shrunk(model, small, tokens())
    small.save_pretrained(tmp_path)
    reloaded = type(small).from_pretrained(tmp_path).eval()
    with silenced(first):
        verify_shrunk(model, reloaded, tokens())
    if hasattr(model.config, "layer_types"):
        assert reloaded.config.layer_types == model.config.layer_types[1:]
    with torch.no_grad(), silenced(first[:1]):
        expected = model(input_ids=tokens()).logits
    name = zero_sublayer(model, blocks[0], first[0], tokens())
    assert not bool(model.get_parameter(name).any())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5)


def test_what_has_no_sublayers() -> None:
    """BERT norms the sum of its input and what it adds: nothing can be left out of it."""
    model = build("bert")
    with pytest.raises(InvalidModelError, match=r"encoder\.layer\.0: expected that it returns what it rec"):
        find_sublayers(model, find_blocks(model), tokens())
    llama = build("llama")
    blocks = find_blocks(llama)
    sublayers = find_sublayers(llama, blocks, tokens())
    with pytest.raises(InvalidModelError, match="expected a causal model"):
        choose_sublayers(model, one_by_one(sublayers), tokens(), 1)
    for count in (0, 4):
        with pytest.raises(InputError, match=f"expected from 1 to 3 of 4, found {count}"):
            greedy_sublayers(llama, one_by_one(sublayers), tokens(), count)
    with pytest.raises(InputError, match="expected two or more to choose from, found 1"):
        measure_losses(llama, one_by_one(sublayers[:1]), tokens())
    with pytest.raises(InputError, match=r"found model\.layers\.1\.mlp without model\.layers\.1\.self_attn"):
        blocks_without(sublayers, [sublayers[3]])
    loaded = as_loaded(llama)
    for gone in ([], [0, 1], [2]):
        with pytest.raises(InputError, match="blocks that go: expected some of 0 to 1 and not all"):
            check_shallower(loaded, blocks, gone)
    t5 = tiny_models.build("t5")
    with pytest.raises(InvalidModelError, match="expected one stack of blocks"):
        check_shallower(as_loaded(t5), find_blocks(t5), [0])
    # a block of its own kind: none is left without which the configuration could be written
    deepseek = build("deepseek_v3")
    with pytest.raises(InvalidModelError, match="without 1 of its 2 blocks: expected a configuration that"):
        check_shallower(as_loaded(deepseek), find_blocks(deepseek), [0])


def test_losses_that_make_no_problem() -> None:
    for losses in (torch.zeros(1, 1), torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.full((2, 2), math.nan)):
        with pytest.raises(InvalidProblemError, match="a symmetric matrix of two or more finite numbers"):
            MeasuredLosses(1.0, losses)
    # leaving something out may help, and two may cost less than the dearer of them
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        random = torch.randn((7, 7), generator=generator, dtype=torch.float64)
        measured = MeasuredLosses(0.3, random + random.T)
        problem = measured.problem(ss.SparsityPattern(4, 7))
        found = ss.solve(problem, BranchAndBound())
        every, offsets = {}, []
        for chosen in itertools.combinations(range(7), 3):
            gone = torch.zeros(7, dtype=torch.bool)
            gone[list(chosen)] = True
            every[chosen] = measured.predicted(gone)
            error = float(problem.row_objectives(~gone[None]))
            assert error >= -1e-9
            offsets.append(error - every[chosen])
        assert max(offsets) - min(offsets) < 1e-9 * max(1.0, abs(offsets[0]))
        best = min(every, key=lambda chosen: every[chosen])
        assert (~found.mask[0]).nonzero().flatten().tolist() == list(best)
