"""Single rows as files that other solvers read: ``.lp``, ``.mps`` and ``.qplib``, with a reference file.

A row is the binary quadratic program of `row_program`, divided so that a good mask costs about 100: the
absolute tolerances of solvers would swallow the raw errors. The files say in a comment by how much to
multiply a value to get the row's error back. Numbers are written so that they read back exactly.

Formulations: ``quadratic`` as it is (`.lp` and `.mps`: CPLEX's quadratic sections; `.qplib`: QPLIB's own
format, Furini et al., Mathematical Programming Computation 11, 2019), and ``mccormick``, the linearisation
``z_ij = x_i x_j`` (McCormick, 1976) for solvers of linear programs, in `.lp` and `.mps`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from .layer import LayerProblem
from .row_program import RowProgram, row_program

FORMATS = (".lp", ".mps", ".qplib")
FORMULATIONS = ("quadratic", "mccormick")
# Terms per line of an LP file: some readers stop at 255 characters.
LP_TERMS = 6


@dataclass(frozen=True)
class _Linear:
    """A linear program over the named variables: cost, and rows (name, sense, terms, right-hand side)."""

    variables: list[str]
    cost: list[float]
    rows: list[tuple[str, str, list[tuple[str, float]], float]]


def export_row(
    problem: LayerProblem,
    row: int,
    path: str | os.PathLike[str],
    mask: Tensor | None = None,
    formulation: str = "quadratic",
) -> RowProgram:
    """Write one row of ``problem`` to ``path``; the suffix says in which format.

    Args:
        problem: the layer.
        row: which row.
        path: target, ``*.lp``, ``*.mps`` or ``*.qplib``.
        mask: a good mask (rows, cols) that sets the scale; Wanda's by default.
        formulation: ``quadratic`` or ``mccormick``.

    Returns:
        The rescaled program that was written; its ``unit`` times an objective is the row's error.

    Raises:
        InputError: for an unknown format or formulation, or a row that does not exist.
    """
    target = Path(path)
    if target.suffix not in FORMATS:
        raise InputError(f"export of a row: expected a file {' or '.join(FORMATS)}, found {target.name}")
    if formulation not in FORMULATIONS or (formulation == "mccormick" and target.suffix == ".qplib"):
        raise InputError(
            f"export of a row to {target.suffix}: expected the formulation quadratic"
            f"{'' if target.suffix == '.qplib' else ' or mccormick'}, found {formulation!r}"
        )
    if not 0 <= row < problem.rows:
        raise InputError(f"export of a row: expected a row of 0 to {problem.rows - 1}, found {row}")
    kept = problem.pattern.top_k(problem.scaled_weight.abs()) if mask is None else mask
    program = row_program(problem, row).rescaled((~kept[row]).cpu().numpy())
    name = f"{problem.name or 'layer'}-row{row}".replace(" ", "_")
    if target.suffix == ".lp":
        text = _lp(program, name, formulation)
    elif target.suffix == ".mps":
        text = _mps(program, name, formulation)
    else:
        text = _qplib(program, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="ascii", errors="replace")
    return program


def write_references(path: str | os.PathLike[str], values: Mapping[str, tuple[float, bool]]) -> None:
    """Write a ``.solu`` file: ``=opt=`` for proven values, ``=best=`` for others, ``=unkn=`` for NaN.

    Args:
        path: target.
        values: for each instance its objective value, at the scale of its file, and whether it is proven.
    """
    lines = []
    for name, (value, proven) in values.items():
        if math.isnan(value):
            lines.append(f"=unkn= {name}")
        else:
            lines.append(f"{'=opt=' if proven else '=best='} {name} {value!r}")
    Path(path).write_text("\n".join(lines) + "\n", encoding="ascii")


def read_references(path: str | os.PathLike[str]) -> dict[str, tuple[float, bool]]:
    """Read a ``.solu`` file back.

    Raises:
        InputError: for a line that is none of its three kinds.
    """
    values: dict[str, tuple[float, bool]] = {}
    for line in Path(path).read_text(encoding="ascii").splitlines():
        match line.split():
            case ["=opt=", name, value]:
                values[name] = (float(value), True)
            case ["=best=", name, value]:
                values[name] = (float(value), False)
            case ["=unkn=", name]:
                values[name] = (math.nan, False)
            case _:
                raise InputError(f"reference file {path}: expected =opt=, =best= or =unkn=, found {line!r}")
    return values


def _products(program: RowProgram) -> list[tuple[int, int, float]]:
    """The nonzero products (i, j ≤ i, coefficient of x_i x_j)."""
    Q = program.quadratic
    return [
        (i, j, float(Q[i, j]) * (1.0 if i == j else 2.0))
        for i in range(program.size)
        for j in range(i + 1)
        if Q[i, j] != 0
    ]


def _sums(program: RowProgram) -> list[tuple[str, str, list[tuple[str, float]], float]]:
    blocks = zip(program.starts[:-1], program.starts[1:], program.counts, strict=True)
    return [
        (f"block{number}", "=", [(f"x{j}", 1.0) for j in range(start, end)], float(count))
        for number, (start, end, count) in enumerate(blocks)
    ]


def _linear_program(program: RowProgram, formulation: str) -> _Linear:
    """Linear part of the objective and all rows; ``one``, fixed to 1, carries the constant."""
    variables = [f"x{j}" for j in range(program.size)]
    cost = [2 * float(value) for value in program.linear]
    rows = _sums(program)
    if formulation == "mccormick":
        for i, j, value in _products(program):
            if i == j:
                cost[i] += value
                continue
            z = f"z{i}_{j}"
            variables.append(z)
            cost.append(value)
            rows.append((f"and{i}_{j}", ">=", [(z, 1.0), (f"x{i}", -1.0), (f"x{j}", -1.0)], -1.0))
            rows.append((f"lef{i}_{j}", "<=", [(z, 1.0), (f"x{i}", -1.0)], 0.0))
            rows.append((f"rig{i}_{j}", "<=", [(z, 1.0), (f"x{j}", -1.0)], 0.0))
    variables.append("one")
    cost.append(program.constant)
    return _Linear(variables, cost, rows)


def _wrapped(terms: Iterable[str]) -> str:
    words = list(terms)
    lines = [" ".join(words[k : k + LP_TERMS]) for k in range(0, len(words), LP_TERMS)]
    return "\n  ".join(lines)


def _term(value: float, name: str) -> str:
    return f"{'-' if value < 0 else '+'} {abs(value)!r} {name}"


def _header(program: RowProgram, name: str, mark: str) -> list[str]:
    return [
        f"{mark} {name}: x_j = 1 where weight j is pruned",
        f"{mark} error of the row = objective times {program.unit!r}",
    ]


def _lp(program: RowProgram, name: str, formulation: str) -> str:
    linear = _linear_program(program, formulation)
    objective = [
        _term(value, variable)
        for variable, value in zip(linear.variables, linear.cost, strict=True)
        if value != 0 or variable == "one"
    ]
    if formulation == "quadratic":
        # the bracket is halved by the format
        products = [
            _term(2 * value, f"x{i} ^2" if i == j else f"x{i} * x{j}") for i, j, value in _products(program)
        ]
        if products:
            objective += ["+ [", *products, "] / 2"]
    lines = [*_header(program, name, "\\"), "Minimize", f" error: {_wrapped(objective)}", "Subject To"]
    for label, sense, terms, right in linear.rows:
        left = _wrapped(_term(value, variable) for variable, value in terms)
        lines.append(f" {label}: {left} {sense} {right!r}")
    lines += ["Bounds", " one = 1"]
    lines += [f" 0 <= {variable} <= 1" for variable in linear.variables if variable.startswith("z")]
    binaries = _wrapped(variable for variable in linear.variables if variable.startswith("x"))
    lines += ["Binaries", f"  {binaries}", "End", ""]
    return "\n".join(lines)


def _mps(program: RowProgram, name: str, formulation: str) -> str:
    linear = _linear_program(program, formulation)
    senses = {"=": "E", "<=": "L", ">=": "G"}
    lines = [*_header(program, name, "*"), f"NAME {name}", "ROWS", " N error"]
    lines += [f" {senses[sense]} {label}" for label, sense, _, _ in linear.rows]
    entries: dict[str, list[tuple[str, float]]] = {variable: [] for variable in linear.variables}
    for variable, value in zip(linear.variables, linear.cost, strict=True):
        entries[variable].append(("error", value))
    for label, _, terms, _ in linear.rows:
        for variable, value in terms:
            entries[variable].append((label, value))
    lines += ["COLUMNS", " MARKER 'MARKER' 'INTORG'"]
    for variable in linear.variables:
        if variable.startswith("x"):
            lines += [f" {variable} {label} {value!r}" for label, value in entries[variable]]
    lines.append(" MARKER 'MARKER' 'INTEND'")
    for variable in linear.variables:
        if not variable.startswith("x"):
            lines += [f" {variable} {label} {value!r}" for label, value in entries[variable]]
    lines.append("RHS")
    lines += [f" RHS {label} {right!r}" for label, _, _, right in linear.rows if right != 0]
    lines.append("BOUNDS")
    for variable in linear.variables:
        kind = {"x": "BV BND {}", "z": "UP BND {} 1.0", "o": "FX BND {} 1.0"}[variable[0]]
        lines.append(" " + kind.format(variable))
    if formulation == "quadratic":
        # the format halves the quadratic form and wants one triangle: entries are those of 2Q
        lines.append("QUADOBJ")
        for i, j, value in _products(program):
            lines.append(f" x{j} x{i} {2 * value if i == j else value!r}")
    lines += ["ENDATA", ""]
    return "\n".join(lines)


def _qplib(program: RowProgram, name: str) -> str:
    """½ xᵀHx + bᵀx + q0 with H = 2Q as its lower triangle, of type QBL: quadratic, binary, linear rows."""
    products = [(i, j, 2 * value if i == j else value) for i, j, value in _products(program)]
    linear = [(j, 2 * float(value)) for j, value in enumerate(program.linear) if value != 0]
    blocks = list(zip(program.starts[:-1], program.starts[1:], program.counts, strict=True))
    lines = [f"! {name}, error of the row = objective times {program.unit!r}", name, "QBL", "minimize"]
    lines += [f"{program.size} # variables", f"{len(blocks)} # constraints"]
    lines += [f"{len(products)} # nonzeros of the lower triangle of H"]
    lines += [f"{i + 1} {j + 1} {value!r}" for i, j, value in products]
    lines += ["0.0 # default linear cost", f"{len(linear)} # others"]
    lines += [f"{j + 1} {value!r}" for j, value in linear]
    lines += [f"{program.constant!r} # constant"]
    entries = [(number, j) for number, (start, end, _) in enumerate(blocks) for j in range(start, end)]
    lines += [f"{len(entries)} # nonzeros of the constraints"]
    lines += [f"{number + 1} {j + 1} 1.0" for number, j in entries]
    lines += ["1e+30 # infinity"]
    counts = [float(count) for _, _, count in blocks]
    for side in ("left", "right"):
        lines += [f"{counts[0]!r} # default {side}-hand side"]
        others = [(number, count) for number, count in enumerate(counts) if count != counts[0]]
        lines += [f"{len(others)} # others"] + [f"{number + 1} {count!r}" for number, count in others]
    for what in ("start of the variables", "start of the duals", "start of the reduced costs"):
        lines += [f"0.0 # default {what}", "0 # others"]
    lines += ["0 # variable names", "0 # constraint names", ""]
    return "\n".join(lines)
