"""Without a terminal progress is plain lines on standard error, and nothing with ``--quiet``."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from typer.testing import CliRunner

from sparseswaps.cli import output
from sparseswaps.cli.app import app
from sparseswaps.machine import duration, size
from sparseswaps.study import parse_study, plan_study


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    np.save(tmp_path / "tokens.npy", tiny_models.tokens(200).numpy())
    model = tiny_models.save("llama", tmp_path / "model")
    return [str(model), "--calibration", f"{tmp_path / 'tokens.npy'}", "--samples", "4", "--length", "16"]


def test_a_log_has_one_line_per_layer_and_stage(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "error_console", output.Console(stderr=True, emoji=False))
    command = ["prune", *arguments, "--evaluation", arguments[2], "--refine", "1"]
    app(command, standalone_mode=False)
    lines = capsys.readouterr().err.splitlines()
    layers = [line for line in lines if line.startswith("pruned model.layers.")]
    assert len(layers) == 14
    shares = [int(re.match(r"pruned \S+: (\d+)%, ", line)[1]) for line in layers]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert all(line.endswith(" left") for line in layers[:-1])
    for stage in ("dense perplexity", "refinement", "pruned perplexity"):
        assert sum(line.startswith(f"{stage}: 100%") for line in lines) == 1
    assert "\x1b" not in "".join(lines)
    app([*command, "--quiet"], standalone_mode=False)
    quiet = capsys.readouterr().err.splitlines()
    assert not [line for line in quiet if "%" in line]
    assert any(line.startswith("estimate:") for line in quiet)
    assert "0.00 GB" not in "".join(quiet)
    assert "about 0 s" not in "".join(quiet)


def test_a_long_stage_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(output, "error_console", output.Console(stderr=True, emoji=False))
    clock = iter(range(0, 1000, 8))
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    lines = output.ProgressLines()
    for done in range(11):
        now[0] = float(next(clock))
        lines.stage("perplexity", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "perplexity: 40%, 32 s, about 48 s left",
        "perplexity: 80%, 64 s, about 16 s left",
        "perplexity: 100%, 80 s",
    ]


def test_every_long_command_can_be_quiet() -> None:
    for command in ("prune", "evaluate", "study", "extract", "solve", "bound", "demo"):
        shown = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
            app, [command, "-h"]
        )
        assert "--quiet" in re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout), command


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under a second"),
        (0.9, "under a second"),
        (1, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 MB"),
        (3, "under 1 MB"),
        (1e6, "1 MB"),
        (999.4e6, "999 MB"),
        (999.6e6, "1.00 GB"),
        (2.5e9, "2.50 GB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "most"), [([], None), ([2.0], 2 * (3 * 2.0 + 60))])
def test_the_most_that_a_study_takes_is_told_where_there_are_limits(
    seconds: list[float], most: float | None
) -> None:
    values = {
        "name": "s", "problem": [{"family": "correlated", "rows": 2, "cols": [12, 16]}],
        "solver": [{"solver": "wanda"}], **({"seconds": seconds} if seconds else {}),
    }  # fmt: skip
    assert plan_study(parse_study(values)).cost.most == most
