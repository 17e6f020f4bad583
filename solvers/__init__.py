"""How layer problems are solved: one algorithm per file, named as its paper names it."""

from .additive_swap import AdditiveSwap
from .admm import ADMM
from .alternating_reconstruction import AlternatingReconstruction
from .base import Budget, Group, Outcome, Solution, Solver, Status, TracePoint, solve
from .bounds import CorrEigenvalue, Dnn, LayerBound, Naive, Qcr, RowSplit, Sdp, SharedSplit, bound
from .branch_and_bound import BranchAndBound
from .certificate import Certificate, certify
from .compose import BestOf, Sequence
from .dsnot import DSnoT
from .enumeration import Enumeration
from .greedy import Greedy
from .gurobi import Gurobi
from .held_out_stop import HeldOutStop
from .highs import HiGHS
from .iterated_local_search import IteratedLocalSearch
from .one_swap import OneSwap
from .reconstruction import Reconstruction
from .registry import SOLVERS
from .row_sweeps import RowSweeps
from .scip import SCIP
from .scores import RIA, Magnitude, Random, Wanda
from .sparsegpt import SparseGPT
from .tabu import Tabu

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
    "CorrEigenvalue",
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
    "Sequence",
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
