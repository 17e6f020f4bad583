"""Units of real and of odd models, chosen block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

import sparseswaps as ss
from sparseswaps.calibration.unit_groups import find_units
from sparseswaps.calibration.windows import calibration_windows, evaluation_windows
from sparseswaps.errors import InputError
from sparseswaps.evaluation.measures import perplexity
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model
from sparseswaps.models.units import UnitKind
from sparseswaps.pruning.objective import Objective
from sparseswaps.pruning.unit_pruning import ChosenUnits, UnitMethod, prune_units
from sparseswaps.pruning.unit_shares import UnitShares
from sparseswaps.solvers.units import DropAddSwap, UnitMasks, UnitSolver, WandaSp

PLAIN = ss.Objective()


def pruned(
    folder: Path,
    texts: tuple[Path, Path],
    units: str,
    solver: UnitSolver,
    objective: ss.Objective,
    update: bool = True,
    one_shot: bool = False,
) -> tuple[float, list[ChosenUnits]]:
    """Perplexity of a model without some units, and what was chosen."""
    loaded = load_model(folder, torch.device("cpu"), "float32")
    windows = calibration_windows(texts[0], loaded.tokenizer, 24, 256, 0, False, False).tokens
    test = evaluation_windows(texts[1], loaded.tokenizer, 256, 24, False, False).tokens
    assert isinstance(windows, torch.Tensor)
    assert isinstance(test, torch.Tensor)
    shares = UnitShares.parse(units)
    blocks = find_blocks(loaded.model)
    groups = find_units(loaded.model, blocks, windows, list(shares.pruned)).groups
    keep = [shares.pattern(group, multiple=1) for group in groups]
    method = UnitMethod(solver, objective, update=update, one_shot=one_shot)
    chosen = prune_units(loaded.model, blocks, groups, keep, windows, method)
    for each, pattern in zip(chosen, keep, strict=True):
        kept = each.kept
        assert pattern.allows(kept[None])
        gone = each.group.columns[~kept].flatten()
        weight = each.group.consumer.weight
        assert not bool(weight[:, gone].any())
        assert bool(weight[:, each.group.columns[kept].flatten()].any(0).all())
    return perplexity(loaded.model, test), chosen


@pytest.fixture
def stories(shared_data: Path) -> tuple[Path, tuple[Path, Path]]:
    texts = shared_data / "texts"
    return shared_data / "models" / "stories260K", (
        texts / "tinystories_calib.txt",
        texts / "tinystories_eval.txt",
    )


def test_what_pays_on_a_real_model(stories: tuple[Path, tuple[Path, Path]]) -> None:
    """Least squares pay most, then the error after them and the dense outputs as target."""
    half = "channels=0.5"
    score, _ = pruned(*stories, half, WandaSp(), PLAIN, update=False)
    updated, _ = pruned(*stories, half, WandaSp(), PLAIN)
    swapped, chosen = pruned(*stories, half, DropAddSwap(), PLAIN)
    drifted, _ = pruned(*stories, half, DropAddSwap(), Objective(drift=0.5, residual=1.0))
    dense_seen, _ = pruned(*stories, half, DropAddSwap(), PLAIN, one_shot=True)
    assert drifted < swapped < updated < score
    assert swapped < dense_seen < score
    for each in chosen:
        assert 0 < each.record.objective <= each.record.objective_start
        assert each.record.objective == pytest.approx(each.record.error, rel=1e-6)  # no drift, no difference
        assert each.record.error < 1


def test_heads_of_a_real_model(stories: tuple[Path, tuple[Path, Path]]) -> None:
    """One of two query heads that share keys and values: the exact choice beats the score."""
    exact, best = pruned(*stories, "heads=1", UnitMasks(ss.BranchAndBound()), PLAIN, update=False)
    _, scored = pruned(*stories, "heads=1", WandaSp(), PLAIN, update=False)
    assert all(int(each.kept.sum()) == each.group.units // 2 for each in best)
    assert exact < 12  # of a dense 4.8: nothing is broken
    # the first consumer has the same inputs in both runs
    assert best[0].record.error <= scored[0].record.error * (1 + 1e-9)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "bert"])
def test_families_of_other_layouts(family: str, tmp_path: Path) -> None:
    """Conv1D, biases, parallel blocks, encoders: the consumers alone change."""
    loaded = load_model(tiny_models.save(family, tmp_path / family), torch.device("cpu"), "float32")
    windows = tiny_models.tokens(8 * 32).view(8, 32)
    blocks = find_blocks(loaded.model)
    groups = find_units(loaded.model, blocks, windows, ["channels"]).groups
    assert groups
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    keep = [UnitShares.parse("channels=0.25").pattern(group, multiple=1) for group in groups]
    chosen = prune_units(loaded.model, blocks, groups, keep, windows)
    changed = {
        name for name, value in loaded.model.named_parameters() if not torch.equal(value, before[name])
    }
    assert changed == {group.consumer.parameter_name for group in groups}
    assert len(chosen) == len(groups)


def test_shares_as_they_are_written(stories: tuple[Path, tuple[Path, Path]]) -> None:
    shares = UnitShares.parse(" channels=0.25, kv-groups=1")
    assert str(shares) == "channels=0.25,kv-groups=1"
    assert UnitShares.parse(str(shares)) == shares
    for text, message in [
        ("", "found nothing"),
        (
            "rows=0.5",
            "heads=NUMBER, kv-groups=NUMBER, experts=NUMBER, found 'rows=0.5'",
        ),
        ("channels", "expected a share between 0 and 1 or a number of units, found ''"),
        ("channels=1.5", "found '1.5'"),
        ("channels=inf", "found 'inf'"),
        ("channels=0.5,channels=0.1", "found channels twice"),
        ("heads=1,kv-groups=1", "expected heads or kv-groups, found both"),
    ]:
        with pytest.raises(InputError, match=message):
            UnitShares.parse(text)
    loaded = load_model(stories[0], torch.device("cpu"), "float32")
    blocks = find_blocks(loaded.model)
    groups = find_units(loaded.model, blocks, tiny_models.tokens(64).view(2, 32)).groups
    of_kind: dict[UnitKind, int] = {}
    for group in groups:
        of_kind[group.kind] = group.exchangeable
    assert of_kind == {"channels": 172, "heads": 2, "kv-groups": 4}
    channels = next(group for group in groups if group.kind == "channels")
    assert UnitShares.parse("channels=0.25").pattern(channels) == ss.SparsityPattern(128, 172)
    assert UnitShares.parse("channels=0.25").pattern(channels, 1) == ss.SparsityPattern(129, 172)
    with pytest.raises(InputError, match="in multiples of 64 and some that go, found 192"):
        UnitShares.parse("channels=0.01").pattern(channels)


def test_objectives_that_units_do_not_have(tmp_path: Path) -> None:
    loaded = load_model(tiny_models.save("llama", tmp_path / "llama"), torch.device("cpu"), "float32")
    windows = tiny_models.tokens(64).view(2, 32)
    blocks = find_blocks(loaded.model)
    objective = replace(PLAIN, metric=True)
    with pytest.raises(InputError, match="expected drift and residual drift alone, found metric"):
        prune_units(loaded.model, blocks, (), (), windows, UnitMethod(objective=objective))
    drift = UnitMethod(objective=replace(PLAIN, drift=0.5), one_shot=True)
    with pytest.raises(InputError, match="expected sequential mode, found one-shot"):
        prune_units(loaded.model, blocks, (), (), windows, drift)
    both = find_units(loaded.model, blocks, windows, ["heads", "kv-groups"]).groups
    keep = [ss.SparsityPattern(1, group.exchangeable) for group in both]
    with pytest.raises(InputError, match="expected one kind of them, found several"):
        prune_units(loaded.model, blocks, both, keep, windows)
