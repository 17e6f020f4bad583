"""Choose which weights of a large language model to keep, and prove how good the choice is.

import sparseswaps as ss

report = ss.prune("path/to/model", "2:4", calibration="text.txt", out="pruned")

problem = ss.LayerProblem(weight, gram, "0.5")
solution = ss.solve(problem, ss.OneSwap())

Names are loaded when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import errors, problems, solvers
    from .calibration import Windows, calibration_windows, evaluation_windows
    from .errors import *  # noqa: F403
    from .evaluation import AddBos, Evaluation, evaluate
    from .machine import __version__ as __version__
    from .masks import apply_masks, load_masks, verify_model
    from .models import find_blocks, load_model
    from .problems import *  # noqa: F403
    from .pruning import (
        Allocation,
        Machine,
        Mode,
        Objective,
        PruneReport,
        PruneSettings,
        RunContext,
        layer_problems,
        prune,
        prune_layers,
    )
    from .ranks import Ranks
    from .solvers import *  # noqa: F403
    from .study import build_report, run_study

    __all__ = [
        *errors.__all__,
        *problems.__all__,
        *solvers.__all__,
        "AddBos",
        "Allocation",
        "Evaluation",
        "Machine",
        "Mode",
        "Objective",
        "PruneReport",
        "PruneSettings",
        "Ranks",
        "RunContext",
        "Windows",
        "apply_masks",
        "build_report",
        "calibration_windows",
        "evaluate",
        "evaluation_windows",
        "find_blocks",
        "layer_problems",
        "load_masks",
        "load_model",
        "prune",
        "prune_layers",
        "run_study",
        "verify_model",
    ]

# Folders whose whole list of names is public, and the public names of the others.
_WHOLE = ("errors", "problems", "solvers")
_NAMES = {
    "calibration": ("Windows", "calibration_windows", "evaluation_windows"),
    "evaluation": ("AddBos", "Evaluation", "evaluate"),
    "masks": ("apply_masks", "load_masks", "verify_model"),
    "models": ("find_blocks", "load_model"),
    "pruning": (
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
    ),
    "ranks": ("Ranks",),
    "study": ("build_report", "run_study"),
}


def _room(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def __getattr__(name: str) -> object:
    if name == "__all__":
        return __dir__()
    if name == "__version__":
        return _room("machine").__version__
    for room, names in _NAMES.items():
        if name in names:
            return getattr(_room(room), name)
    if not name.startswith("_"):
        if name in _WHOLE:
            return _room(name)
        for room in _WHOLE:
            if name in _room(room).__all__ or (name == "Sequence" and room == "solvers"):
                return getattr(_room(room), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    whole = [name for room in _WHOLE for name in _room(room).__all__]
    return sorted([*whole, *(name for names in _NAMES.values() for name in names)])
