"""Whatever the command line is given, it ends with an exit code and one sentence, without parts of files."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import command_line
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparseswaps as ss
from sparseswaps.masks.file import layer_mask, save_masks
from sparseswaps.problems import save_instance
from sparseswaps.solvers.registry import SOLVERS
from sparseswaps.study import run_study

STUDY = """
name = "small"
patterns = ["50%"]
seeds = [0]
seconds = [1.0]
[limits]
memory_mb = 0
[[problem]]
family = "correlated"
rows = 2
cols = [8]
[[solver]]
solver = "wanda"
label = "Wanda"
"""
# Command lines, each of which fails without another one's files.
EXAMPLES = 2400


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of one command, in this process."""
    return command_line.run(*arguments), capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole file of each kind."""
    place = tmp_path_factory.mktemp("any")
    problem = ss.synthetic_layer("correlated", 2, 8, "0.5")
    save_instance(problem, place / "instance")
    mask = problem.pattern.top_k(problem.weight.abs())
    facts = {"layer": layer_mask(mask, problem.pattern, problem.weight)}
    save_masks(place / "masks", {"layer": mask}, facts, "model")
    (place / "study.toml").write_text(STUDY)
    run_study(place / "study.toml", place / "record", jobs=1, backend="sequential")
    (place / "text.txt").write_text("some text")
    (place / "work").mkdir()
    return place


NASTY = st.text(alphabet="[]{}:=+,.\"'\\/|<>`*?~ \n%é-0129abeinfx", max_size=10)
NUMBERS = st.one_of(
    st.sampled_from(
        ["-1", "0", "nan", "inf", "-inf", "1e400", "1.5", "", "x", "9" * 30, "-" + "9" * 30, "1e308"]
    ),
    st.integers(-(2**70), -1).map(str),
)
WORDS = st.one_of(
    NASTY, st.sampled_from(["int32", "meta", "cuda:99", "evil", "cpu:7", "complex64", "auto:", "é"])
)


def options(numbers: str, words: str) -> st.SearchStrategy[str]:
    """One option with a value that it does not take."""
    number = st.tuples(st.sampled_from(numbers.split()), NUMBERS)
    word = st.tuples(st.sampled_from(words.split()), WORDS)
    return st.one_of(number, word).map(lambda pair: f"--{pair[0]}={pair[1]}")


@st.composite
def solver_texts(draw: st.DrawFn) -> str:
    """A solver with an option of its own, or none, and a value that fits or does not."""
    name = draw(st.sampled_from([*SOLVERS, "", "none"]))
    known = sorted(vars(SOLVERS[name]()) if name in SOLVERS else ["x"]) or ["x"]
    option = draw(st.one_of(st.sampled_from(known), NASTY))
    text = f"{name}:{option}={draw(st.one_of(NUMBERS, NASTY))}"
    return text + draw(st.sampled_from(["", "", "+", "+wanda", ",", "+one-swap"]))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, safetensors: bool) -> bytes:
    """A file cut off, overwritten in part, or with other metadata in its header."""
    kind = draw(st.sampled_from(["cut", "bytes", "header", "header", "other"]))
    if kind == "other":
        return draw(st.binary(max_size=64))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "bytes" or not safetensors:
        start = draw(st.integers(0, len(whole) - 1))
        patch = draw(st.one_of(st.binary(min_size=1, max_size=40), st.just(b"\xff" * 4096)))
        return (whole[:start] + patch + whole[start + len(patch) :])[: len(whole)]
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    metadata = header["__metadata__"]
    key = draw(st.sampled_from(sorted(metadata)))
    value = draw(
        st.one_of(
            NASTY,
            st.sampled_from(
                ["{", "[]", "null", '{"keep": "4", "block": 8, "scope": "block"}', "{}", "[" * 2000]
            ),
            st.sampled_from(
                ['{"keep": 4.5, "block": 8, "scope": "block"}', '{"keep": 4, "block": 8, "scope": []}']
            ),
            st.sampled_from(
                ['{"layer": {}}', '{"layer": 1}', '{"layer": {"rows": "2"}}', '{"other": {}}', "-1"]
            ),
        )
    )
    if draw(st.booleans()):
        metadata[key] = value
    else:
        del metadata[key]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


VALUES = st.one_of(
    st.sampled_from(
        ["-1", "0", "nan", "inf", "1e400", '""', "[]", "{}", "[[1]]", "true", "1979-05-27", "9" * 25]
    ),
    NASTY.map(json.dumps),
    NASTY,
)


GLOBS = st.sampled_from(['""', '"/"', '"[*"', '"**"', '"a/../*"', '"."', "1", "[]"])


@st.composite
def studies(draw: st.DrawFn) -> str:
    """A study file with one line changed, lost or added."""
    lines = STUDY.strip().splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    change = draw(st.sampled_from(["value", "value", "line", "lost", "files"]))
    if change == "value" and "=" in lines[number]:
        lines[number] = lines[number].partition("=")[0] + "= " + draw(VALUES)
    elif change == "lost":
        del lines[number]
    elif change == "files":
        lines = [
            *lines,
            "[[problem]]",
            f"files = [{draw(GLOBS)}]",
        ]
    else:
        lines.insert(number, draw(NASTY))
    return "\n".join(lines)


Line = tuple[list[str], dict[str, bytes]]


def command_lines(folder: Path) -> st.SearchStrategy[Line]:
    """Arguments, and the files that they speak of."""
    at = {
        name: str(folder / name)
        for name in ("instance", "masks", "record", "study.toml", "text.txt", "given")
    }
    gone, out = str(folder / "gone"), str(folder / "work" / "out")
    whole = {name: (folder / name).read_bytes() for name in ("instance", "masks", "record")}
    calibrated = ["--calibration", at["text.txt"]]
    places = st.sampled_from([at["text.txt"], at["text.txt"] + "/below", "/proc/none", "/dev/null/none"])

    def lines(*parts: Any) -> st.SearchStrategy[Line]:
        """Texts and strategies of one text, one after the other."""
        each = [part if isinstance(part, st.SearchStrategy) else st.just(part) for part in parts]
        return st.tuples(*each).map(lambda found: (list(found), {}))

    def on(kind: str, *before: str, after: tuple[str, ...] = ()) -> st.SearchStrategy[Line]:
        return damaged(whole[kind], kind != "record").map(
            lambda content: ([*before, at["given"], *after], {"given": content})
        )

    counts = st.sampled_from(["--limit=0", "--limit=-1", "--batch-size=0", "--batch-size=-7"])
    pruning = options(
        "samples length seed evaluation-limit refine min-expert-tokens activation-limit rank-timeout damping "
        "sweeps shrinkage held-out residual",
        "pattern solver start mode objective allocation update unreached add-bos dtype device drift settings",
    )
    return st.one_of(
        lines("prune", gone, *calibrated, pruning),
        lines("prune", gone, *calibrated, solver_texts().map(lambda text: f"--solver={text}")),
        lines("prune", gone, *calibrated, "--out", places),
        lines(
            "evaluate",
            gone,
            "--evaluation",
            at["text.txt"],
            options("length evaluation-limit", "dtype device add-bos"),
        ),
        lines(
            "extract",
            gone,
            *calibrated,
            "--out",
            out,
            options("samples length seed", "device pattern add-bos"),
        ),
        lines("extract", gone, *calibrated, "--out", places),
        lines("solve", at["instance"], options("time-limit budget", "device rows start solver")),
        lines("solve", at["instance"], solver_texts().map(lambda text: f"--start={text}"), "--time-limit=1"),
        lines("bound", at["instance"], options("budget", "device rows tier solver")),
        on("instance", "solve", after=("--solver", "wanda")),
        on("instance", "bound", after=("--tier", "naive", "--solver", "wanda")),
        on("masks", "verify", gone, "--masks"),
        on("masks", "apply", gone, "--out", out, "--masks"),
        lines("apply", gone, "--masks", at["masks"], "--out", places),
        studies().map(lambda text: (["study", at["given"], "--dry-run"], {"given": text.encode()})),
        st.binary(max_size=40).map(lambda text: (["study", at["given"], "--dry-run"], {"given": text})),
        lines("study", at["study.toml"], "--database", places, "--jobs=1", "--backend=sequential"),
        lines("study", at["study.toml"], "--database", str(folder / "work"), "--jobs=1"),
        lines("study", at["study.toml"], "--database", at["record"], options("jobs", "backend cluster")),
        on("record", "export", after=("--out", out)),
        on("record", "merge", out),
        lines("merge", places, at["record"]),
        lines("export", at["record"], "--out", places),
        lines("report", at["record"], "--out", places),
        st.binary(max_size=99).map(lambda text: (["report", at["given"], "--out", out], {"given": text})),
        lines("zero-shot", gone, counts, WORDS.map(lambda text: f"--device={text}")),
        lines("demo", "--out", places),
        lines("demo", "--out", out, NASTY.map(lambda text: f"--model={text}")),
        lines(
            st.sampled_from(["prune", "solve", "report", "nothing", "solvers"]),
            NASTY.map(lambda text: f"--{text}"),
        ),
    )


def test_any_input_ends_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "work")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    counted = itertools.count(1)
    failed: list[str] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines(folder))
    def check(line: Line) -> None:
        arguments, files = line
        for name, content in files.items():
            (folder / name).write_bytes(content)
        before = set(folder.rglob("*"))
        code, said = run(arguments, capsys)
        next(counted)
        assert "Traceback" not in said, (arguments, said)
        assert "something unexpected" not in said, (arguments, said)
        if code:
            told = [text for text in said.splitlines() if not text.startswith(("warning:", "note:"))]
            usage = any(text.startswith("Usage:") for text in (each.strip() for each in told))
            assert usage or (len(told) == 1 and told[0].startswith("error: ")), (arguments, said)
            failed.append(arguments[0])
        after = set(folder.rglob("*")) - before
        assert not [path for path in after if "partial" in path.name], arguments
        for path in sorted(after, reverse=True):
            assert not code or path.name.startswith(("record", "out")), (arguments, path)
            path.rmdir() if path.is_dir() else path.unlink()

    check()
    assert next(counted) > 2000
    assert len(failed) > 1500
    commands = {
        "prune",
        "evaluate",
        "extract",
        "solve",
        "bound",
        "verify",
        "apply",
        "study",
        "export",
        "merge",
    }
    assert commands | {"report", "zero-shot", "demo"} <= set(failed)
