"""The replayed steps of the CUDA kernel, and what is made of their counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparseswaps as ss


def row_of(cols: int, seed: int) -> tuple[np.ndarray, Any]:
    """``R`` and the state of one row in float32."""
    import kernel_steps

    problem = ss.synthetic_layer("correlated", 1, cols, "0.5", seed)
    R = problem.gram.correlation
    y = problem.scaled_weight[0]
    y = (y / y.norm()).float()
    kept = ss.solve(problem, ss.Wanda()).mask[0]
    delta = torch.where(kept, y, -y)
    q = delta**2 + 2 * delta * (y.masked_fill(kept, 0) @ R)
    spread = y.abs() * (problem.gram.largest_correlation.double().sqrt() * (1 + 1e-5)).float()
    return R.numpy(), kernel_steps.Row(q.numpy(), delta.numpy(), kept.numpy(), spread.numpy())


def changes(R: np.ndarray, row: Any) -> np.ndarray:
    """Every Δ(u, p) in float64 (cols, cols), infinite where u is not kept or p not pruned."""
    q, delta = row.q.astype(float), row.delta.astype(float)
    found = q[:, None] + q + 2 * delta[:, None] * delta * R
    return np.where(row.kept[:, None] & ~row.kept, found, np.inf)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_lines_hold_and_chords_are_near_them(seed: int) -> None:
    from kernel_steps import line_bounds

    R, row = row_of(160, seed)
    exact, chords = line_bounds(row, False), line_bounds(row, True)
    lowest = changes(R, row).min(1)[row.kept]
    assert (exact[row.kept] <= lowest).all()
    assert (chords[row.kept] <= exact[row.kept] + 1e-7).all()
    reach = np.abs(lowest).max()
    assert np.abs(chords - exact)[row.kept].max() < 0.02 * reach


@pytest.mark.parametrize("by_bound", [False, True])
def test_the_lowest_of_all_lines_is_that_of_all_pairs(by_bound: bool) -> None:
    from kernel_steps import Count, best_swap

    for seed in range(5):
        R, row = row_of(96, seed)
        counts = np.zeros(len(Count), np.int64)
        change, u, p = best_swap(R, row, by_bound, counts)
        every = changes(R, row)
        assert (u, p) == np.unravel_index(every.argmin(), every.shape)
        assert change == pytest.approx(every.min(), abs=1e-6)
        assert 0 < counts[Count.sectors] <= counts[Count.pairs]
        assert 0 < counts[Count.lines] <= row.kept.sum()


def test_the_first_improving_line_follows_the_order_of_bounds() -> None:
    from kernel_steps import GROUP, Count, first_of_lines, line_bounds

    R, row = row_of(160, 1)
    every = changes(R, row)
    order = np.argsort(line_bounds(row, True), kind="stable")
    for limit in np.quantile(every.min(1)[row.kept], [0.02, 0.2, 0.6]):
        counts = np.zeros(len(Count), np.int64)
        change, u, p = first_of_lines(R, row, np.float32(limit), counts)
        first = next(line for line in order if every[line].min() < limit)
        assert (u, p) == (first, every[first].argmin())
        assert change < limit
        place = list(order).index(first)
        assert counts[Count.lines] <= (place // GROUP + 1) * GROUP
    nothing = np.float32(every.min() - 1e-3)
    assert first_of_lines(R, row, nothing, np.zeros(len(Count), np.int64))[1] == -1


def test_masks_of_every_rule_are_certified_and_steepest_descent_is_that_of_the_package() -> None:
    from kernel_counts import RULES, replay
    from kernel_steps import Count

    problem = ss.synthetic_layer("correlated", 6, 640, "0.5", seed=2)
    wanda = ss.solve(problem, ss.Wanda())
    steepest = ss.solve(problem, ss.OneSwap(search="best")).mask
    for label, rule in RULES.items():
        done = replay(problem, wanda.mask, rule)
        assert ss.certify(problem, done.mask, reference=wanda.row_objectives).holds, label
        mean = done.counts.double().mean(0)
        assert mean[Count.swaps] > 10
        assert mean[Count.ranks] >= mean[Count.swaps], label
        assert mean[Count.last_searches] >= 2, label  # after the descent and from fresh costs
        if rule.steepest:
            assert torch.equal(done.mask, steepest), label


def test_work_of_a_row_by_hand() -> None:
    from kernel_counts import AFTER_ALL, BEFORE, Card, work
    from kernel_steps import Count

    counts = [0.0] * len(Count)
    values = {"swaps": 3, "ranks": 4, "rank_sectors": 9, "lines": 5, "last_lines": 6, "sectors": 7,
              "searches": 1, "last_searches": 2, "last_sectors": 8}  # fmt: skip
    for name, value in values.items():
        counts[Count[name]] = value
    before, after = work(BEFORE, 100, counts), work(AFTER_ALL, 100, counts)
    assert before.correlation == 4 * 100 * (2 * 3 + 2 * 4 + 5 + 6)
    assert before.state == 100 * (28 * 4 + 2 * 5 + 12 * 3 + 9 * 11)
    assert after.correlation == 4 * (2 * 100 * 3 + 8 * (9 + 7 + 8))
    assert (before.lines, after.lines) == (4 * 100 * 11, 4 * 8 * 15)
    assert after.state == 0
    # per column: passes of ranks, of looks and swaps; bounds of three searches; lines
    assert before.instructions == pytest.approx(100 * (8 * (4 * 4 + 5 + 3) + 15.6 * 100 * 3 + 8 * 11))
    assert after.instructions == pytest.approx(100 * (8 * (4 + 3) + 2.7 * 33 * 3 + 4.7 * 11))
    card = Card.parse("X:2:4")
    expected = 10 * ((before.correlation + before.state) / 2e12 + before.instructions / 2e12)
    assert before.seconds(10, card) == pytest.approx(expected)


def test_counts_of_a_width_between_and_beyond_follow_a_power_law() -> None:
    from kernel_counts import AS_IT_WAS, Counted, at_width

    layers = [Counted("x", cols, {AS_IT_WAS: [cols**1.5, 2.0, 0.0]}, []) for cols in (1024, 2048, 4096)]
    assert at_width(layers, AS_IT_WAS, 2048)[0] == 2048**1.5
    assert at_width(layers, AS_IT_WAS, 14336) == pytest.approx([14336**1.5, 2.0, 0.0])


def test_the_command_writes_both_tables_and_the_page_shows_what_cards_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_counts
    import scaling

    monkeypatch.setattr(kernel_counts, "SHAPES", (("small", 64, 96, 2),))
    out = tmp_path / "kernel_counts.md"
    words = ["kernel_counts.py", "--layers", "llm_scale:64", "llm_scale:96", "correlated:48", "--rows", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(out)])
    kernel_counts.main()
    assert capsys.readouterr().out.endswith(out.read_text() + "\n")
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    assert len(scaling.kernel_counts_table().splitlines()) == 2 + 3 * len(kernel_counts.RULES)
    lines = scaling.kernel_seconds_table().splitlines()
    assert len(lines) == 2 + len(kernel_counts.CHANGES)
    assert all(line.count("not measured") == 2 for line in lines[2:])
    (tmp_path / "cuda").mkdir()
    found = {"card": "NVIDIA H100 80GB HBM3", "rows": [
        {"stage": "shapes", "name": "whole model, 2:4, certificate", "value": 3.0},
        {"stage": "shapes", "name": "whole model, 0.5", "value": 41.7},
    ]}  # fmt: skip
    (tmp_path / "cuda" / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(found))
    lines = scaling.kernel_seconds_table().splitlines()
    assert "| 42 | " in lines[-1]
    assert lines[-1].endswith("| not measured |")
    assert all("| – | " in line for line in lines[2:-1])
