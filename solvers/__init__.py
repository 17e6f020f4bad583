"""How layer problems are solved: one algorithm per file, named as its paper names it."""

import warnings

from .base import Budget, Covers, Group, Outcome, Solution, Solver, Status, TracePoint, solve
from .bounds import CorrEigenvalue, Dnn, LayerBound, Naive, Qcr, RowSplit, Sdp, SharedSplit, bound
from .compose import BestOf, Chain
from .exact.branch_and_bound import BranchAndBound
from .exact.enumeration import Enumeration
from .exact.gurobi import Gurobi
from .exact.highs import HiGHS
from .exact.scip import SCIP
from .registry import SOLVERS
from .row_sweeps import RowSweeps
from .scores import RIA, Magnitude, Random, Wanda
from .search.additive_swap import AdditiveSwap
from .search.certificate import Certificate, certify
from .search.dsnot import DSnoT
from .search.greedy import Greedy
from .search.held_out_stop import HeldOutStop
from .search.iterated_local_search import IteratedLocalSearch
from .search.one_swap import OneSwap
from .search.tabu import Tabu
from .updates.admm import ADMM
from .updates.alternating_reconstruction import AlternatingReconstruction
from .updates.reconstruction import Reconstruction
from .updates.sparsegpt import SparseGPT

__all__ = [
    "ADMM",
    "RIA",
    "SCIP",
    "SOLVERS",
    "AdditiveSwap",
    "AlternatingReconstruction",
    "BestOf",
    "BranchAndBound",
    "Budget",
    "Certificate",
    "Chain",
    "CorrEigenvalue",
    "Covers",
    "DSnoT",
    "Dnn",
    "Enumeration",
    "Greedy",
    "Group",
    "Gurobi",
    "HeldOutStop",
    "HiGHS",
    "IteratedLocalSearch",
    "LayerBound",
    "Magnitude",
    "Naive",
    "OneSwap",
    "Outcome",
    "Qcr",
    "Random",
    "Reconstruction",
    "RowSplit",
    "RowSweeps",
    "Sdp",
    "SharedSplit",
    "Solution",
    "Solver",
    "SparseGPT",
    "Status",
    "Tabu",
    "TracePoint",
    "Wanda",
    "bound",
    "certify",
    "solve",
]


def __getattr__(name: str) -> object:
    if name == "Sequence":
        warnings.warn("solvers.Sequence is called Chain now", FutureWarning, stacklevel=2)
        return Chain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
