"""Choose which weights of a large language model to keep, and prove how good the choice is.

import sparseswaps as ss

report = ss.prune("path/to/model", "2:4", calibration="text.txt", out="pruned")

problem = ss.LayerProblem(weight, gram, ss.SparsityPattern.per_row(4096, 0.5))
solution = ss.solve(problem, ss.OneSwap())
"""

from . import errors, problems, solvers
from .errors import *  # noqa: F403
from .objective import Objective
from .pipeline import Mode, layer_problems, prune_layers
from .problems import *  # noqa: F403
from .prune_report import PruneReport
from .run import prune
from .solvers import *  # noqa: F403

__all__ = [
    *errors.__all__,
    *problems.__all__,
    *solvers.__all__,
    "Mode",
    "Objective",
    "PruneReport",
    "layer_problems",
    "prune",
    "prune_layers",
]
