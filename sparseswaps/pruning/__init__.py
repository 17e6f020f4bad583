"""One run of one model: settings, blocks, layers, what came out."""

from .objective import Objective
from .pipeline import layer_problems, prune_layers
from .report import PruneReport
from .run import prune
from .settings import Mode

__all__ = ["Mode", "Objective", "PruneReport", "layer_problems", "prune", "prune_layers"]
