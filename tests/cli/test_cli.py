"""The command line as its users call it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import pytest
import tiny_models
import torch

from sparseswaps.masks.file import MASK_FILE, load_masks
from sparseswaps.masks.output import RECORD_FILE
from sparseswaps.records.run_database import RunDatabase

STUDY = """
name = "small"
patterns = ["50%"]
[[problem]]
family = "correlated"
rows = 2
cols = [8, 16]
[[solver]]
solver = "wanda"
label = "Wanda"
[[solver]]
solver = "one-swap"
label = "1-swap"
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("dense"), torch.float16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_models.text(4000))
    return path


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, in this process."""
    code = command_line.run(*arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sparseswaps", *map(str, arguments)]


def prune_arguments(dense: Path, text: Path, out: Path) -> list[object]:
    return [
        "prune",
        dense,
        "--calibration",
        text,
        "--evaluation",
        text,
        "--samples",
        8,
        "--length",
        32,
        "--out",
        out,
    ]


def test_prune_verify_evaluate_apply(dense: Path, text: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    code, shown, _ = run(*prune_arguments(dense, text, out), "--drift", 0.5, capsys=capsys)
    assert code == 0
    for word in ("self_attn.q_proj", "16×16", "8:16", "objective", "perplexity", "dense", "saved, verified"):
        assert word in shown, word
    code, shown, _ = run("verify", out, "--original", dense, "--json", capsys=capsys)
    assert (code, json.loads(shown)["ok"], json.loads(shown)["layers"]) == (0, True, 14)
    code, shown, _ = run("evaluate", out, "--evaluation", text, "--length", 32, "--json", capsys=capsys)
    assert code == 0
    evaluated = json.loads(shown)
    with RunDatabase(out / RECORD_FILE) as record:
        assert evaluated["perplexity"] == pytest.approx(
            record.facts()["report"]["perplexity_pruned"], rel=1e-6
        )
    code, shown, _ = run("apply", dense, "--masks", out, "--out", tmp_path / "again", capsys=capsys)
    assert (code, "14 layers pruned, saved and verified" in shown) == (0, True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_json_is_one_object_and_nothing_else(dense: Path, text: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    arguments = prune_arguments(dense, text, Path())[:-2]
    code, shown, _ = run(*arguments, "--one-shot", "--pattern", "2:4", "--json", capsys=capsys)
    values = json.loads(shown)
    assert code == 0
    assert {"perplexity_dense", "perplexity_pruned", "layers", "seconds", "peak_memory_mb"} <= values.keys()
    assert values["mode"] == "one-shot"
    assert len(values["layers"]) == 14
    assert all(layer["pattern"] == "2:4" and layer["sparsity"] == 0.5 for layer in values["layers"])


def test_extract_solve_and_list(dense: Path, text: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    code, _, _ = run(
        "extract", dense, "--calibration", text, "--samples", 8, "--length", 32,
        "--layers", "*layers.0.mlp*", "--out", tmp_path / "i", capsys=capsys,
    )  # fmt: skip
    files = sorted((tmp_path / "i").iterdir())
    assert (code, len(files)) == (0, 3)
    code, shown, _ = run("solve", files[0], "--solver", "one-swap", "--rows", "0:4", "--json", capsys=capsys)
    one_swap = json.loads(shown)
    assert (code, len(one_swap["rows"]), one_swap["status"]) == (0, 4, "local_optimum")
    code, shown, _ = run("solve", files[0], "--solver", "wanda", "--rows", "0:4", "--json", capsys=capsys)
    assert json.loads(shown)["objective"] >= one_swap["objective"]
    code, shown, _ = run("solve", files[0], "--solver", "ria:alpha=1", capsys=capsys)
    assert (code, "RIA(alpha=1.0)" in shown) == (0, True)
    code, shown, _ = run(
        "bound", files[0], "--rows", "0:4", "--tier", "shared-split", "--json", capsys=capsys
    )
    bound = json.loads(shown)
    assert code == 0
    assert 0 < bound["bound"] <= one_swap["objective"] * (1 + 1e-9)
    limits = ["--rows", "0:4", "--time-limit", 120]  # kernels are compiled within it
    code, shown, _ = run("solve", files[0], "--solver", "branch-and-bound", *limits, "--json", capsys=capsys)
    exact = json.loads(shown)
    assert code == 0
    assert exact["gap"] <= 1e-6
    assert bound["bound"] <= exact["objective"] <= one_swap["objective"] * (1 + 1e-9)
    code, shown, _ = run("bound", files[0], "--rows", "0:4", capsys=capsys)
    assert (code, "gap" in shown) == (0, True)
    code, shown, _ = run("solvers", capsys=capsys)
    assert code == 0
    for word in ("one-swap", "wanda", "local search", "enumeration", "exact"):
        assert word in shown


def test_study_report_merge_export(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "small.toml"
    file.write_text(STUDY)
    code, shown, _ = run("study", file, "--database", tmp_path / "a.sqlite", "--dry-run", capsys=capsys)
    assert (code, "units" in shown, (tmp_path / "a.sqlite").exists()) == (0, True, False)
    arguments = ["study", file, "--database", tmp_path / "a.sqlite", "--jobs", 1, "--backend", "sequential"]
    code, shown, _ = run(*arguments, "--out", tmp_path / "report", capsys=capsys)
    assert code == 0
    assert "4 done, 0 failed" in shown
    assert (tmp_path / "report" / "index.html").exists()
    code, shown, _ = run(*arguments, capsys=capsys)
    assert (code, "0 units run, 4 done" in shown) == (0, True)
    code, shown, _ = run("merge", tmp_path / "b.sqlite", tmp_path / "a.sqlite", capsys=capsys)
    assert (code, "4 new units" in shown) == (0, True)
    code, shown, _ = run("export", tmp_path / "b.sqlite", "--out", tmp_path / "tables", capsys=capsys)
    assert (code, (tmp_path / "tables" / "units.csv").exists()) == (0, True)
    code, _, errors = run("report", tmp_path / "absent.sqlite", "--out", tmp_path / "r2", capsys=capsys)
    assert (code, "expected an existing file" in errors) == (2, True)


def test_bad_input_is_one_sentence_and_exit_code_2(dense: Path, text: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    for changes, message in [
        (["--pattern", "1.5"], "expected 0 < sparsity < 1, found 1.5"),
        (["--pattern", "2:5"], "expected a multiple of 5 columns"),
        (["--solver", "magic"], "unknown solver: expected one of"),
        (["--solver", "ria:alpha=[x]"], "found '[x]'"),
        (["--mode", "one-shot", "--drift", 0.5], "expected sequential mode, found one-shot"),
        (["--calibration", tmp_path / "absent.txt"], "found no such file"),
        # no emoji between colons
        (["--calibration", "absent.jsonl:x"], "text absent.jsonl:x: expected"),
        (["--add-bos", "maybe"], "add_bos: expected one of auto, yes, no, found 'maybe'"),
    ]:
        code, shown, errors = run(*prune_arguments(dense, text, out), *changes, capsys=capsys)
        assert (code, shown) == (2, "")
        assert errors.startswith("error: "), errors
        assert message in errors
        assert errors.count("\n") == 1, errors
        assert not out.exists()
    code, _, errors = run("verify", tmp_path, capsys=capsys)
    assert (code, "expected an existing file" in errors) == (2, True)
    code, _, errors = run("solve", tmp_path / "absent", capsys=capsys)
    assert (code, "expected an existing file" in errors) == (2, True)


def test_a_damaged_model_fails_verification(dense: Path, text: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    run(*prune_arguments(dense, text, out), capsys=capsys)
    state = load_file(out / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] += 1e-3
    save_file(state, out / "model.safetensors", {"format": "pt"})
    code, shown, errors = run("verify", out, capsys=capsys)
    assert code == 1
    assert "layer model.layers.0.mlp.up_proj: expected zeros where the mask prunes" in errors
    assert "NOT as the mask file says" in shown


def test_ctrl_c_keeps_the_record_and_resume_finishes(dense: Path, text: Path, tmp_path: Path) -> None:
    arguments = prune_arguments(dense, text, tmp_path / "cut")
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    record = tmp_path / "cut" / RECORD_FILE
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if record.exists():
            with RunDatabase(record) as database:
                if database.layers():
                    break
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    if process.returncode == 130:  # a very fast run may have finished first
        assert "add --resume to go on" in errors
        assert not (tmp_path / "cut" / MASK_FILE).exists()
        subprocess.run(command(*arguments, "--resume"), check=True, capture_output=True, timeout=300)
    subprocess.run(
        command(*prune_arguments(dense, text, tmp_path / "whole")), check=True, capture_output=True
    )
    a, b = load_masks(tmp_path / "cut"), load_masks(tmp_path / "whole")
    assert all(torch.equal(a.masks[name], b.masks[name]) for name in b.masks)


def test_files_that_may_not_grow_are_one_sentence(dense: Path, text: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit; SQLite does not call that a full disk (see ``test_endings``)."""
    out = tmp_path / "out"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    # numba must not write its cache under this limit
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    arguments = [*prune_arguments(dense, text, out), "--solver", "wanda"]
    done = subprocess.run(
        command(*arguments), preexec_fn=limit, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "record.sqlite: expected to be able to write there, found disk I/O error" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] in ([], [RECORD_FILE]) if out.exists() else True
