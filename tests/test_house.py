"""The house stays in order: few files at the top, short functions, few parameters, no ignored overrides."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_PARAMETERS, MOST_LINES, MOST_FILES = 12, 90, 8
# inner loops that numba and Triton compile: what calls would cost there
COMPILED = {"compiled", "njit", "jit"}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of the package with where it is."""
    for folder in ("sparseswaps", "problems", "solvers", "reports"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            place = file.relative_to(ROOT).as_posix()
            if not place.startswith(("sparseswaps/problems", "sparseswaps/solvers", "sparseswaps/reports")):
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.FunctionDef):
                        yield place, node


def is_compiled(function: ast.FunctionDef) -> bool:
    found = [node for decorator in function.decorator_list for node in ast.walk(decorator)]
    names = {node.id for node in found if isinstance(node, ast.Name)}
    names |= {node.attr for node in found if isinstance(node, ast.Attribute)}
    return bool(names & COMPILED)


def test_functions_are_short_and_take_few_parameters() -> None:
    seen = 0
    for place, function in functions():
        seen += 1
        if is_compiled(function):
            continue
        given = function.args
        names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        names += [arg.arg for arg in (given.vararg, given.kwarg) if arg is not None]
        count = len([name for name in names if name not in ("self", "cls")])
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert count <= MOST_PARAMETERS or place.startswith("sparseswaps/cli"), (place, function.name, count)
        assert lines <= MOST_LINES, (place, function.name, lines)
    assert seen > 800


def test_the_top_of_the_package_is_a_table_of_contents() -> None:
    assert len(list((ROOT / "sparseswaps").glob("*.py"))) <= MOST_FILES


def test_wrappers_override_without_exceptions() -> None:
    for folder in ("solvers", "sparseswaps/study", "sparseswaps/pruning"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "ignore[override]" not in file.read_text(encoding="utf-8"), file


def test_levels_of_folders_are_few() -> None:
    layers = re.search(r"layers = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert layers is not None
    levels = [line for line in layers[1].splitlines() if "sparseswaps." in line]
    folders = [level for level in levels if not re.search(r"__main__|errors", level)]
    assert len(folders) <= 8


def test_no_two_modules_of_tests_have_one_name() -> None:
    # pytest imports them by their names alone, and what was imported before decides whether that fails
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
