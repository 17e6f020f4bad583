"""Which units of a layer's inputs to keep, by scores, by search, and by the error after least squares."""

from .base import UnitSolution, UnitSolver, solve_units
from .drop_add_swap import DropAddSwap
from .masked import UnitMasks
from .structured_obs import StructuredOBS
from .unit_scores import FlapScore, UnitMagnitude, WandaSp

__all__ = [
    "DropAddSwap",
    "FlapScore",
    "StructuredOBS",
    "UnitMagnitude",
    "UnitMasks",
    "UnitSolution",
    "UnitSolver",
    "WandaSp",
    "solve_units",
]
