"""ALPS, Thanos and SparseFW on layers of a real model, beside what they are compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import sparseswaps as ss
from sparseswaps.calibration.windows import calibration_windows
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import load_model


@pytest.fixture(scope="module")
def layers(shared_data: Path) -> list[ss.LayerProblem]:
    """Three layers of the third block of stories260K."""
    loaded = load_model(shared_data / "models" / "stories260K")
    text = shared_data / "texts" / "tinystories_calib.txt"
    windows = calibration_windows(text, loaded.tokenizer, 16, 256).tokens
    blocks = find_blocks(loaded.model)[2:3]
    kinds = ("q_proj", "up_proj", "down_proj")
    return [p for p in ss.layer_problems(loaded.model, blocks, "0.5", windows) if p.name.endswith(kinds)]


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "layer:0.6"])
def test_errors_are_in_the_order_that_the_papers_report(layers: list[ss.LayerProblem], pattern: str) -> None:
    assert len(layers) == 3
    for layer in layers:
        problem = replace(layer, pattern=ss.parse_pattern(pattern, layer.cols))
        error = {
            solver: ss.solve(problem, solver).objective
            for solver in (
                ss.Wanda(),
                ss.SparseFW(steps=300),
                ss.SparseGPT(),
                ss.Thanos(),
                ss.ADMM(mask="gradual"),
                ss.ALPS(),
            )
        }
        wanda, sparsefw, sparsegpt, thanos, admm, alps = error.values()
        assert sparsefw < wanda, problem.name
        assert alps < admm < thanos < sparsegpt < wanda, problem.name
        if pattern != "layer:0.6":
            swapped = ss.solve(problem, ss.OneSwap())
            bound = ss.bound(problem, ss.FrankWolfe(steps=100))
            assert bool((bound.row_bounds <= swapped.row_objectives).all())
            assert bound.total > 0.3 * swapped.objective
