"""The main job on the bundled model: four methods, one table, two plots, one page."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .calibration import calibration_windows, evaluation_windows
from .models import load_model
from .pipeline import Progress
from .reports.demo import DemoLayer, DemoMethod, write_demo_report
from .run import PruneReport, prune, versions
from .solvers import Magnitude, OneSwap, Wanda

MODEL = Path(__file__).parent / "data" / "demo-model"
SPARSITY = "0.5"
SAMPLES = 64
LENGTH = 512
# Windows of the held-out modules: enough for a perplexity that ranks the methods.
EVALUATION_WINDOWS = 64
DRIFT = 0.75
METHODS = (
    ("magnitude", Magnitude(), 0.0),
    ("Wanda", Wanda(), 0.0),
    ("Wanda + 1-swap", OneSwap(), 0.0),
    (f"1-swap, drift {DRIFT:g}", OneSwap(), DRIFT),
)
