"""One run of one model: settings, blocks, layers, what came out."""

from .objective import Objective
from .pipeline import RunContext, layer_problems, prune_layers
from .report import PruneReport
from .run import prune
from .settings import Allocation, Machine, Mode, PruneSettings

__all__ = [
    "Allocation",
    "Machine",
    "Mode",
    "Objective",
    "PruneReport",
    "PruneSettings",
    "RunContext",
    "layer_problems",
    "prune",
    "prune_layers",
]
