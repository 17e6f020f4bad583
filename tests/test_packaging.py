"""What a wheel holds, and that the package works without its optional libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import bare_checkout
import pytest
import tiny_models
import torch
from hidden_libraries import hiding

import sparseswaps as ss

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "pyscipopt",
    "highspy",
    "cvxpy",
    "numba",
    "triton",
    "gurobipy",
    "datasets",
    "matplotlib",
    "joblib",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"sparseswaps", "sparseswaps-0.1.0.dist-info"}
    for folder in ("problems", "solvers", "reports"):
        on_disk = {
            f"sparseswaps/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")
        }
        assert on_disk == {n for n in names if n.startswith(f"sparseswaps/{folder}/") and n.endswith(".py")}
    assert "sparseswaps/data/demo-model/model.safetensors" in names
    assert "sparseswaps/py.typed" in names
    assert not any("published" in name or "/tests/" in name for name in names)
    assert wheel.stat().st_size < 20e6


def test_wheel_works_where_only_it_is(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import sparseswaps as ss\n"
        "problem = ss.synthetic_layer('correlated', 4, 16)\n"
        "print(ss.__file__, ss.solve(problem, ss.OneSwap()).status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "sparseswaps") in done.stdout
    assert "local_optimum" in done.stdout


def test_a_checkout_that_is_not_installed_prunes_and_knows_its_version(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "model", torch.float32)
    (tmp_path / "text.txt").write_text(tiny_models.text(2_000))
    script = (
        "import sys, sparseswaps as ss\n"
        "model, text, out = sys.argv[1:]\n"
        "report = ss.prune(model, '2:4', calibration=text, samples=4, length=32, device='cpu', out=out)\n"
        "print(report.versions['sparseswaps'])\n"
    )
    folders = (str(tmp_path / name) for name in ("model", "text.txt", "out"))
    done = bare_checkout.run(["-c", script, *folders], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [ss.__version__]


def test_folders_are_not_importable_by_their_bare_names() -> None:
    for folder in ("problems", "solvers"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {folder}.{'layer' if folder == 'problems' else 'base'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "ImportError" in done.stderr


def test_everything_else_works_without_optional_libraries() -> None:
    """A hidden library looks exactly as if it were not installed."""
    script = f"""{hiding(OPTIONAL)}
import sparseswaps as ss
problem = ss.synthetic_layer("correlated", 4, 16)
best = ss.solve(problem, ss.OneSwap())
assert best.status is ss.Status.LOCAL_OPTIMUM
assert best.objective <= ss.solve(problem, ss.Wanda()).objective
assert not any(name.split(".")[0] in hidden for name in sys.modules)
refused = 0
for name, solver in ss.SOLVERS.items():
    missing = solver().missing()
    if missing:
        refused += 1
        try:
            ss.solve(problem, solver())
        except ss.SolverNotInstalledError as error:
            assert "pip install" in str(error) and all(m in str(error) for m in missing), error
        else:
            raise SystemExit(f"{{name}} ran without {{missing}}")
print("refused", refused)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused")


def test_layers_are_kept() -> None:
    """An upper layer may import lower layers only."""
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed: expected the extra dev")
    done = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
