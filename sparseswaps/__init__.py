"""Choose which weights of a large language model to keep, and prove how good the choice is.

import sparseswaps as ss
"""

from .problems import *  # noqa: F403
from .solvers import *  # noqa: F403
