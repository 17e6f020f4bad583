"""The Triton programs without a GPU: interpreted against the specification, and compiled for sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parents[1]


def run(command: list[str], **variables: str) -> str:
    """Run Python in a process of its own: Triton reads its variables when it is imported."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreted_programs_equal_the_specification() -> None:
    assert "all equal" in run([str(HERE / "triton_interpreted.py")], TRITON_INTERPRET="1")


# Rows of float32 are what LLM layers are searched in: with at most 96 registers five programs of 128 threads
# share a multiprocessor. Rows of several blocks and of float64 are few or narrow: nothing may spill.
@pytest.mark.parametrize(
    ("program", "float_type", "cols", "block", "search", "registers"),
    [
        ("descend_rows", "fp32", 4096, 4096, "lazy", 96),
        ("descend_rows", "fp32", 4096, 4096, "best", 96),
        ("descend_rows", "fp32", 4096, 4, "lazy", 96),
        ("descend_rows", "fp32", 4096, 64, "lazy", 168),
        ("descend_rows", "fp64", 4096, 4096, "lazy", 168),
        ("walk_rows", "fp32", 4096, 4096, "lazy", 96),
        ("walk_rows", "fp32", 4096, 4, "lazy", 96),
        ("best_of_rows", "fp64", 4096, 4096, "best", 168),
        ("best_of_rows", "fp64", 4096, 64, "best", 255),
    ],
)
def test_compiles_for_sm_90(
    program: str, float_type: str, cols: int, block: int, search: str, registers: int, tmp_path: Path
) -> None:
    arguments = [str(HERE / "triton_compiled.py"), program, float_type, str(cols), str(block), search]
    found = json.loads(run(arguments, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"))
    assert found["spilled"] == 0
    assert found["registers"] <= registers
    # a reduction at the end of a loop needs two or more; the loops that read lines of R have none (in float64
    # the loop over levels is as busy: it brings its columns from one layout to another)
    assert found["barriers"] <= 96
    assert found["barriers in the busiest loops"] <= (2 if float_type == "fp64" else 0)
