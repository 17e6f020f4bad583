"""Options of ``prune``: made from the settings, added without taking away, former flags and all."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import sparseswaps as ss
from sparseswaps.cli.app import COMMANDS, load
from sparseswaps.cli.options import FORMER_PARTS, PARTS, flag_of, option_parameters, read_options
from sparseswaps.pruning.pipeline import with_stated_drifts


def settings_of(*words: str) -> ss.PruneSettings:
    """Settings that a command line with these options asks for, every drift stated."""
    command = load("prune")
    context = command.make_context("prune", ["MODEL", "--calibration", "text.txt", *words])
    options = {parameter.name for parameter in option_parameters()}
    given = {name: value for name, value in context.params.items() if name in options}
    settings, _ = read_options(given, context.params["settings"])
    return with_stated_drifts(settings)


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        ("", "drift=0.75,residual=0.5"),
        ("--drift auto", "drift=auto"),
        ("--drift 0", "plain"),
        ("--drift 0.25", "drift=0.25"),
        ("--drift 0.25 --residual 0.75", "drift=0.25,residual=0.75"),
        # what adds takes nothing away
        ("--shrinkage 0.1", "drift=0.75,residual=0.5,shrinkage=0.1"),
        ("--metric", "drift=0.75,residual=0.5,metric"),
        ("--output-metric", "drift=0.75,residual=0.5,metric"),
        ("--residual 0.25", "drift=0.75,residual=0.25"),
        ("--residual-drift 0.25", "drift=0.75,residual=0.25"),
        ("--metric --damping 0.2 --sweeps 3", "drift=0.75,residual=0.5,metric,damping=0.2,sweeps=3"),
        ("--held-out 0.25", "drift=0.75,residual=0.5,held_out=0.25"),
        ("--mode one-shot --metric", "metric"),
        ("--one-shot", "plain"),
        ("--solver wanda --metric", "metric"),
        # the whole in one text, the same as in Python and studies, and parts in addition
        ("--objective plain", "plain"),
        ("--objective drift=0.5,metric", "drift=0.5,metric"),
        ("--objective default,metric --shrinkage 0.1", "drift=0.75,residual=0.5,metric,shrinkage=0.1"),
        ("--objective plain --shrinkage 0.1", "shrinkage=0.1"),
    ],
)
def test_objectives(words: str, objective: str) -> None:
    assert str(settings_of(*words.split()).objective) == objective


def test_zero_is_a_value_that_was_given(tmp_path: Path) -> None:
    assert settings_of("--min-expert-tokens", "0").min_expert_tokens == 0
    (tmp_path / "settings.toml").write_text("seed = 5\nrefine = 2\n")
    found = settings_of("--settings", str(tmp_path / "settings.toml"), "--seed", "0", "--refine", "0")
    assert (found.seed, found.refine) == (0, 0)


def test_every_field_is_a_flag_of_its_own_name() -> None:
    flags = {opt for parameter in load("prune").params for opt in parameter.opts}
    for kind in (ss.PruneSettings, ss.Objective, ss.Machine):
        for field in fields(kind):
            if kind is not ss.Machine or "kind" in field.metadata:
                assert flag_of(field.name) in flags, field.name
    assert set(PARTS) == {field.name for field in fields(ss.Objective)}
    assert set(FORMER_PARTS) < set(PARTS)


@pytest.mark.parametrize(
    ("words", "now", "name", "value"),
    [
        ("--eval other.txt", "--evaluation", "evaluation", "other.txt"),
        ("--eval-windows 7", "--evaluation-limit", "evaluation_limit", 7),
        ("--one-shot", "--mode one-shot", "mode", ss.Mode.ONE_SHOT),
        ("--residual-drift 0.5", "--residual", None, None),
        ("--output-metric", "--metric", None, None),
    ],
)
def test_former_flags_work_and_say_what_they_are_called(
    words: str, now: str, name: str | None, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    found = settings_of(*words.split())
    assert capsys.readouterr().err == f"note: {words.split()[0]} is called {now} now\n"
    if name is not None:
        assert getattr(found, name) == value


def test_settings_come_from_a_file_and_options_replace_them(tmp_path: Path) -> None:
    asked = ss.PruneSettings("2:4", solver="tabu:effort=0.5", objective="drift=0.5,metric", samples=7)
    (tmp_path / "settings.toml").write_text(str(asked))
    found = settings_of("--settings", str(tmp_path / "settings.toml"), "--samples", "9", "--shrinkage", "0.1")
    assert found.pattern == asked.pattern
    assert found.solver == asked.solver
    assert found.samples == 9
    assert str(found.objective) == "drift=0.5,metric,shrinkage=0.1"
    (tmp_path / "settings.toml").write_text("colour = 1")
    with pytest.raises(ss.InputError, match=r"settings file .*: expected options among pattern"):
        settings_of("--settings", str(tmp_path / "settings.toml"))
    with pytest.raises(ss.InputError, match=r"settings file .*absent: expected a readable file"):
        settings_of("--settings", str(tmp_path / "absent"))


def test_the_overview_says_what_the_commands_say_of_themselves() -> None:
    for name, (_, sentence) in COMMANDS.items():
        command = load(name)
        assert command.name == name
        assert inspect.cleandoc(command.help).split("\n\n")[0].replace("\n", " ") == sentence


def test_help_and_mistakes_answer_without_heavy_libraries() -> None:
    script = (
        "import sys\n"
        "from sparseswaps.cli import main\n"
        "sys.argv = ['sparseswaps', *sys.argv[1:]]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'cvxpy', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for word in ("--help", "purne"):
        done = subprocess.run(
            [sys.executable, "-c", script, word], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert ("prune" if word == "--help" else "No such command") in done.stdout + done.stderr
