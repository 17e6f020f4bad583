"""The main job on the bundled model: five methods, one table, two plots, one page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from .calibration.windows import calibration_windows, evaluation_windows
from .models.loading import load_model
from .progress import Progress
from .pruning.objective import SEARCH_DEFAULT, Objective
from .pruning.report import PruneReport
from .pruning.run import prune
from .records.run import LayerRecord
from .reports.demo import DemoLayer, DemoMethod, write_demo_report
from .reports.page import Fact
from .solvers import Magnitude, OneSwap, Wanda

MODEL = Path(__file__).parent / "data" / "demo-model"
SPARSITY = "0.5"
SAMPLES = 48
LENGTH = 512
# Windows of the held-out modules: enough for a perplexity that ranks the methods.
EVALUATION_WINDOWS = 48
METHODS = (
    ("magnitude", Magnitude(), Objective()),
    ("Wanda", Wanda(), Objective()),
    ("1-swap", OneSwap(), Objective()),
    ("1-swap, both drifts", OneSwap(), SEARCH_DEFAULT),
    ("1-swap, both drifts, output metric", OneSwap(), replace(SEARCH_DEFAULT, metric=True)),
)


def run_demo(out: Path, progress: Progress) -> tuple[Table, Path]:
    """Prune the bundled model with each of ``METHODS`` and write a report.

    Args:
        out: directory of the report; files of an earlier report are replaced.
        progress: told how far it is.

    Returns:
        A table of the methods, and the path of the report's page.
    """
    tokenizer = load_model(MODEL).tokenizer
    calibration = calibration_windows("stdlib", tokenizer, SAMPLES, LENGTH)
    evaluation = evaluation_windows("stdlib-held-out", tokenizer, LENGTH, EVALUATION_WINDOWS)
    reports = []
    for label, solver, objective in METHODS:
        report = prune(
            MODEL,
            SPARSITY,
            calibration=calibration,
            evaluation=evaluation,
            solver=solver,
            length=LENGTH,
            objective=objective,
            device="cpu",
            progress=progress,
        )
        reports.append((label, report))
    settings = reports[0][1].settings
    page = write_demo_report(
        out,
        [_method(label, report) for label, report in reports],
        [_layer(label, layer) for label, report in reports for layer in report.layers],
        title="Pruning the demo model",
        subtitle=f"half of every row, {settings.mode}, from the warm start {settings.start!r}",
        facts=_facts(reports[0][1]),
    )
    return _table(reports), page


def _facts(report: PruneReport) -> list[Fact]:
    """What somebody needs to know to repeat the run."""
    settings = report.settings
    return [
        Fact("calibration", f"{settings.samples} windows of {settings.length} tokens, seed {settings.seed}"),
        Fact("text", f"Python's standard library, tokens {report.calibration_hash[:12]}"),
        Fact("evaluation", f"{report.evaluation_windows} windows of held-out modules"),
        Fact("device", report.device),
        Fact("versions", ", ".join(f"{name} {number}" for name, number in report.versions.items())),
    ]


def _method(label: str, report: PruneReport) -> DemoMethod:
    return DemoMethod(
        label,
        report.error,
        report.held_out_error,
        report.perplexity_pruned,
        report.perplexity_dense,
        report.seconds,
    )


def _layer(label: str, layer: LayerRecord) -> DemoLayer:
    return DemoLayer(
        label, layer.name, layer.block, layer.kind, layer.error, layer.error_start, layer.seconds
    )


def _table(reports: list[tuple[str, PruneReport]]) -> Table:
    """One line per method, the dense model first."""
    table = Table(
        title="demo model, half of the weights pruned",
        caption=f"perplexity on {EVALUATION_WINDOWS} windows of {LENGTH} tokens of held-out modules",
    )
    for name in ("method", "layer error", "held-out error", "perplexity", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_row("dense", "0", "0", f"{reports[0][1].perplexity_dense:.3f}", "–")
    for label, report in reports:
        table.add_row(
            label,
            f"{report.error:.5f}",
            f"{report.held_out_error:.5f}",
            f"{report.perplexity_pruned:.3f}",
            f"{report.seconds:.1f}",
        )
    return table
