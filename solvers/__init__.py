"""How layer problems are solved: one algorithm per file, named as its paper names it."""

from .base import Budget, Group, Outcome, Solution, Solver, Status, TracePoint, solve
from .certificate import Certificate, certify
from .compose import BestOf, Sequence
from .enumeration import Enumeration
from .greedy import Greedy
from .one_swap import OneSwap
from .registry import SOLVERS
from .scores import RIA, Magnitude, Random, Wanda
from .tabu import Tabu

__all__ = [
    "RIA",
    "SOLVERS",
    "BestOf",
    "Budget",
    "Certificate",
    "Enumeration",
    "Greedy",
    "Group",
    "Magnitude",
    "OneSwap",
    "Outcome",
    "Random",
    "Sequence",
    "Solution",
    "Solver",
    "Status",
    "Tabu",
    "TracePoint",
    "Wanda",
    "certify",
    "solve",
]
