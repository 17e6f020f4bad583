"""Which units of a layer's inputs to keep, by scores, by search, and by the error after least squares."""

from .base import UnitSolution, UnitSolver, solve_units
from .drop_add_swap import DropAddSwap
from .expert_scores import Reap
from .masked import UnitMasks
from .osscar import OSSCAR
from .structured_obs import StructuredOBS
from .unit_scores import FlapScore, UnitMagnitude, WandaSp

__all__ = [
    "OSSCAR",
    "DropAddSwap",
    "FlapScore",
    "Reap",
    "StructuredOBS",
    "UnitMagnitude",
    "UnitMasks",
    "UnitSolution",
    "UnitSolver",
    "WandaSp",
    "solve_units",
]
