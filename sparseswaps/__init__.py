"""Choose which weights of a large language model to keep, and prove how good the choice is.

import sparseswaps as ss

report = ss.prune("path/to/model", "2:4", calibration="text.txt", out="pruned")

problem = ss.LayerProblem(weight, gram, ss.SparsityPattern.per_row(4096, 0.5))
solution = ss.solve(problem, ss.OneSwap())
"""

from . import errors, problems, solvers
from .errors import *  # noqa: F403
from .problems import *  # noqa: F403
from .pruning.objective import Objective
from .pruning.pipeline import layer_problems, prune_layers
from .pruning.report import PruneReport
from .pruning.run import prune
from .pruning.settings import Mode
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
