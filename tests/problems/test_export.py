"""Exported rows read back by other programs: the same optimum, whatever the format."""

from __future__ import annotations

import itertools
import math
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import conformance
import numpy as np
import pytest
import torch

import sparseswaps as ss
from sparseswaps.errors import InputError

PATTERNS = ("0.5", "2:4")


def instance(pattern: str) -> ss.LayerProblem:
    """Two rows with drift, so that every term of the program is there."""
    return conformance.with_raw("correlated", pattern, True, seed=4, rows=2, cols=8)[0]


def optimum(problem: ss.LayerProblem, row: int) -> float:
    return float(ss.solve(problem, ss.Enumeration()).row_objectives[row])


def scip_value(path: Path) -> float:
    pyscipopt = pytest.importorskip("pyscipopt")
    model = pyscipopt.Model()
    model.hideOutput()
    model.readProblem(str(path))
    model.optimize()
    assert model.getStatus() == "optimal"
    return float(model.getObjVal())


def highs_value(path: Path) -> float:
    highspy = pytest.importorskip("highspy")
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("mip_rel_gap", 1e-9)
    assert highs.readModel(str(path)) == highspy.HighsStatus.kOk
    assert highs.run() == highspy.HighsStatus.kOk
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(highs.getInfo().objective_function_value)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("suffix", [".lp", ".mps"])
@pytest.mark.parametrize("formulation", ["quadratic", "mccormick"])
def test_scip_finds_the_same_optimum(tmp_path: Path, pattern: str, suffix: str, formulation: str) -> None:
    problem = instance(pattern)
    for row in range(problem.rows):
        path = tmp_path / f"row{row}{suffix}"
        program = ss.export_row(problem, row, path, formulation=formulation)
        assert scip_value(path) * program.unit == pytest.approx(optimum(problem, row), rel=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("suffix", [".lp", ".mps"])
def test_highs_finds_the_same_optimum(tmp_path: Path, pattern: str, suffix: str) -> None:
    problem = instance(pattern)
    for row in range(problem.rows):
        path = tmp_path / f"row{row}{suffix}"
        program = ss.export_row(problem, row, path, formulation="mccormick")
        assert highs_value(path) * program.unit == pytest.approx(optimum(problem, row), rel=1e-5)


def read_qplib(path: Path) -> tuple[Any, Any, float, Any, Any, Any]:
    """A reader of the format's description: H, b, q0, A, left and right sides."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines() if not line.startswith("!")]
    items = iter(lines[1:])
    assert next(items) == "QBL"
    assert next(items) == "minimize"
    variables, constraints = int(next(items)), int(next(items))
    H = np.zeros((variables, variables))
    for _ in range(int(next(items))):
        i, j, value = next(items).split()
        assert int(i) >= int(j)
        H[int(i) - 1, int(j) - 1] = H[int(j) - 1, int(i) - 1] = float(value)

    def vector(size: int) -> Any:
        values = np.full(size, float(next(items)))
        for _ in range(int(next(items))):
            index, value = next(items).split()
            values[int(index) - 1] = float(value)
        return values

    b = vector(variables)
    constant = float(next(items))
    A = np.zeros((constraints, variables))
    for _ in range(int(next(items))):
        i, j, value = next(items).split()
        A[int(i) - 1, int(j) - 1] = float(value)
    assert float(next(items)) >= 1e20
    left, right = vector(constraints), vector(constraints)
    for size in (variables, constraints, variables):
        assert not vector(size).any()
    assert (int(next(items)), int(next(items))) == (0, 0)
    return H, b, constant, A, left, right


@pytest.mark.parametrize("pattern", PATTERNS)
def test_qplib_says_the_same(tmp_path: Path, pattern: str) -> None:
    problem = instance(pattern)
    path = tmp_path / "row.qplib"
    program = ss.export_row(problem, 1, path)
    H, b, constant, A, left, right = read_qplib(path)
    best = math.inf
    for bits in itertools.product((0.0, 1.0), repeat=problem.cols):
        x = np.array(bits)
        if bool(((A @ x >= left) & (A @ x <= right)).all()):
            best = min(best, 0.5 * x @ H @ x + b @ x + constant)
    assert best * program.unit == pytest.approx(optimum(problem, 1), rel=1e-9)


def test_tiny_errors_are_scaled_up(tmp_path: Path) -> None:
    problem = instance("0.5")
    tiny = ss.LayerProblem(problem.weight.double() * 1e-4, problem.gram, problem.pattern, name="a layer")
    program = ss.export_row(tiny, 0, tmp_path / "row.mps", mask=ss.solve(tiny, ss.OneSwap()).mask)
    assert scip_value(tmp_path / "row.mps") == pytest.approx(100, rel=0.2)
    assert program.unit < 1e-6
    assert "a_layer-row0" in (tmp_path / "row.mps").read_text()


def test_references_read_back(tmp_path: Path) -> None:
    values = {"a": (1 / 3, True), "b": (2.5e-8, False), "c": (math.nan, False)}
    ss.write_references(tmp_path / "rows.solu", values)
    again = ss.read_references(tmp_path / "rows.solu")
    assert again["a"] == values["a"]
    assert again["b"] == values["b"]
    assert math.isnan(again["c"][0])
    (tmp_path / "bad.solu").write_text("=maybe= a 1\n")
    with pytest.raises(InputError, match="=maybe="):
        ss.read_references(tmp_path / "bad.solu")


@pytest.mark.parametrize(
    ("name", "row", "formulation"),
    [
        ("row.txt", 0, "quadratic"),
        ("row.lp", 2, "quadratic"),
        ("row.qplib", 0, "mccormick"),
        ("row.lp", 0, "sos"),
    ],
)
def test_impossible_exports_are_refused(tmp_path: Path, name: str, row: int, formulation: str) -> None:
    with pytest.raises(InputError, match="expected"):
        ss.export_row(instance("0.5"), row, tmp_path / name, formulation=formulation)
    assert not (tmp_path / name).exists()


class _Expression:
    """A quadratic expression (matrix, vector, constant) of a stand-in variable."""

    def __init__(self, quadratic: Any, linear: Any, constant: float) -> None:
        self.terms = (quadratic, linear, constant)

    def __add__(self, other: Any) -> _Expression:
        other = other if isinstance(other, _Expression) else _Expression(0.0, 0.0, float(other))
        return _Expression(*(a + b for a, b in zip(self.terms, other.terms, strict=True)))


class _Variable:
    """The few operations of a gurobipy MVar that the back end uses."""

    __array_ufunc__ = None

    def __init__(self, size: int) -> None:
        self.size = size
        self.X = np.zeros(size)

    def __getitem__(self, part: slice) -> Any:
        indices = range(self.size)[part]
        return types.SimpleNamespace(sum=lambda: _Sum(indices))

    def __matmul__(self, other: Any) -> Any:
        return _Half(other)

    def __rmatmul__(self, left: Any) -> _Expression:
        return _Expression(0.0, np.asarray(left), 0.0)


class _Half:
    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix

    def __matmul__(self, _: Any) -> _Expression:
        return _Expression(self.matrix, 0.0, 0.0)


class _Sum:
    def __init__(self, indices: range) -> None:
        self.indices = indices

    def __eq__(self, count: object) -> Any:
        return list(self.indices), count

    __hash__ = None  # type: ignore[assignment]


class _Model:
    """Solves what was built by enumeration, and claims it as Gurobi would."""

    made: ClassVar[list[_Model]] = []

    def __init__(self, env: Any) -> None:
        self.parameters: dict[str, Any] = {}
        self.sums: list[Any] = []
        _Model.made.append(self)

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def setParam(self, name: str, value: Any) -> None:  # noqa: N802  # gurobipy's name
        self.parameters[name] = value

    def addMVar(self, size: int, vtype: str) -> _Variable:  # noqa: N802
        assert vtype == "B"
        self.x = _Variable(size)
        return self.x

    def addConstr(self, constraint: Any) -> None:  # noqa: N802
        self.sums.append(constraint)

    def setObjective(self, expression: _Expression) -> None:  # noqa: N802
        self.expression = expression

    def optimize(self) -> None:
        matrix, vector, constant = self.expression.terms
        assert float(np.linalg.eigvalsh(matrix)[0]) >= -1e-9 * np.abs(matrix).max()
        best = math.inf
        for bits in itertools.product((0.0, 1.0), repeat=self.x.size):
            x = np.array(bits)
            if all(x[indices].sum() == count for indices, count in self.sums):
                value = x @ matrix @ x + vector @ x + constant
                if value < best:
                    best, self.x.X = value, x
        self.Status, self.SolCount, self.NodeCount, self.ObjBound = 2, 1, 7.0, best


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("drift", [False, True])
def test_gurobi_gets_the_row(monkeypatch: pytest.MonkeyPatch, pattern: str, drift: bool) -> None:
    stand_in = types.ModuleType("gurobipy")
    stand_in.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # find_spec asks for one
    environment = types.SimpleNamespace(__enter__=None)
    stand_in.GRB = types.SimpleNamespace(BINARY="B")  # type: ignore[attr-defined]
    stand_in.Model = _Model  # type: ignore[attr-defined]

    class Env:
        def __init__(self, params: dict[str, int]) -> None:
            assert params == {"OutputFlag": 0}

        def __enter__(self) -> Any:
            return environment

        def __exit__(self, *_: object) -> None:
            return None

    stand_in.Env = Env  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gurobipy", stand_in)
    problem = conformance.with_raw("correlated", pattern, drift, seed=4, rows=2, cols=8)[0]
    solution = ss.solve(problem, ss.Gurobi(time_limit=5, node_limit=100))
    best = ss.solve(problem, ss.Enumeration())
    assert torch.allclose(solution.row_objectives, best.row_objectives, rtol=1e-9)
    assert bool((solution.row_bounds <= best.row_objectives).all())
    assert bool((solution.row_gaps < 1e-3).all())
    assert solution.stats["nodes"].tolist() == [7, 7]
    assert _Model.made[-1].parameters["NodeLimit"] == 100
    assert 0 < _Model.made[-1].parameters["TimeLimit"] <= 5
