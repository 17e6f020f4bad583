"""The Triton kernel without a GPU: interpreted against the specification, and compiled for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parents[1]

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparseswaps.solvers.kernels import cuda

steepest, narrow, float_type = sys.argv[1] == "best", sys.argv[2] == "narrow", sys.argv[3]
signature = {
    "R": f"*{float_type}", "root": f"*{float_type}", "q": f"*{float_type}", "delta": f"*{float_type}",
    "flags": "*i8", "limits": f"*{float_type}", "most": "*i64", "made_of": "*i64", "none_left_of": "*i32",
    "cols": "i32", "block": "i32",
}
constants = {"NARROW": narrow, "STEEPEST": steepest, **cuda.kernel_options()}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(cuda.descend_rows, signature, {(cuda.descend_rows.arg_names.index(name),): value
                                                  for name, value in constants.items()})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert ".target sm_90" in compiled.asm["ptx"], "no PTX for sm_90"
assert len(compiled.asm["cubin"]) > 1000, "no cubin"
"""


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


def test_interpreted_kernel_equals_the_specification() -> None:
    assert "all equal" in run([str(HERE / "triton_interpreted.py")], TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    ("search", "blocks", "float_type"),
    [("lazy", "wide", "fp32"), ("best", "wide", "fp64"), ("lazy", "narrow", "fp32")],
)
def test_compiles_for_sm_90(search: str, blocks: str, float_type: str, tmp_path: Path) -> None:
    run(["-c", COMPILE, search, blocks, float_type], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
