"""Run by test_kernels_cuda: a Triton program compiled for sm_90 ahead of time, and what it takes, as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparseswaps.solvers.kernels import cuda
from sparseswaps.solvers.kernels.triton_loops import programs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# arguments that are not of the dtype that the rows are searched in
TYPES = {
    "flags": "*i8",
    "best_flags": "*i8",
    "level": "*i8",
    "queue": "*i32",
    "most": "*i64",
    "made_of": "*i64",
    "moves_of": "*i32",
    "none_left_of": "*i32",
    "pruned_of": "*i32",
    "restored_of": "*i32",
    "held": "*i32",
    "gained_of": "*i32",
    "cols": "i32",
    "block": "i32",
    "patience": "i32",
    "tenure": "i32",
}


def compiled(name: str, float_type: str, cols: int, block: int, search: str):
    """The program as ``cuda`` launches it for rows of ``cols`` columns in blocks of ``block``."""
    program = getattr(programs, name)
    given = {
        **cuda.tiles(cols, block),
        **cuda.launch_options(),
        "NARROW": block <= cuda.NARROW_BLOCK,
        "ONE": block == cols,
        "STEEPEST": search == "best",
        "RANKS": cuda.RANKS,
    }
    names = program.arg_names
    constants = {key: value for key, value in given.items() if key in names}
    types = {key: TYPES.get(key, f"*{float_type}") for key in names if key not in constants}
    if name == "walk_rows":
        types["limits"] = "*fp64"
    signature = {key: types.get(key, "constexpr") for key in names}
    aligned = [key for key in types if types[key].startswith("*") or (key == "cols" and cols % 16 == 0)]
    source = ASTSource(
        program,
        signature,
        {(names.index(key),): value for key, value in constants.items()},
        {(names.index(key),): [["tt.divisibility", 16]] for key in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=cuda.launch_options())


def loops(code: str) -> list[list[str]]:
    """Innermost loops of PTX: what lies between a label and a branch back to it, with no other inside."""
    lines = code.split("\n")
    label = {}
    found = []
    for number, text in enumerate(lines):
        here = re.match(r"\s*(\$L__BB\w+):", text)
        if here:
            label[here[1]] = number
        back = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", text)
        if back and back[1] in label:
            found.append((label[back[1]], number))
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [lines[first:last] for first, last in inner]


def main() -> None:
    """Compile, disassemble and count."""
    name, float_type, cols, block, search = sys.argv[1:]
    program = compiled(name, float_type, int(cols), int(block), search)
    assert ".target sm_90" in program.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (registers, stack, local), *others = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert not others
    read = [(sum("ld.global" in line for line in loop), loop) for loop in loops(program.asm["ptx"])]
    most = max(count for count, _ in read)
    sys.stdout.write(
        json.dumps(
            {
                "registers": int(registers),
                "spilled": int(stack) + int(local),
                "barriers": program.asm["ptx"].count("bar.sync"),
                # the loops over the columns of one or two lines read more than any other
                "barriers in the busiest loops": sum(
                    sum("bar.sync" in line for line in loop) for count, loop in read if count == most
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
