"""``extract`` and ``solvers``: instances from a model, and what can solve them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..calibration.windows import Windows, calibration_windows, for_model, window_length
from ..evaluation.beginning import AddBos, begun_windows
from ..evaluation.measures import is_causal
from ..machine import versions
from ..models.blocks import check_finite, find_blocks
from ..models.loading import load_model, resolve_device
from ..models.sources import Trust
from ..problems.files import save_instance
from ..problems.pattern import PatternRule
from ..pruning.pipeline import layer_problems
from ..solvers.registry import SOLVERS
from .options import AllowPickle, Quiet, TrustRemoteCode, check_count, check_output
from .output import console, error_console, progress_bars, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(extract)
    app.command("solvers")(list_solvers)


def extract(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a Hugging Face model.")],
    calibration: Annotated[str, typer.Option(metavar="FILE_OR_DATASET", help="Text, token file or dataset.")],
    out: Annotated[Path, typer.Option(help="Directory for the instance files.")],
    layers: Annotated[list[str] | None, typer.Option(help="Only layers that match, e.g. '*q_proj'.")] = None,
    pattern: Annotated[str, typer.Option(help="0.5, 50% or N:M.")] = "0.5",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
    add_bos: Annotated[
        str,
        typer.Option(help="Windows begin with the beginning-of-text token: auto, yes or no; see `prune`."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Write layers of a model as instance files: weights, Gram matrix of the dense model, pattern.

    [bold]Example[/]

    sparseswaps extract ./llama --layers '*layers.0.*' --calibration text.txt --out instances
    """
    begin = AddBos.read(add_bos)
    target = resolve_device(device)
    check_output(out)
    check_count("samples", samples)
    check_count("length", length, 2)
    check_count("seed", seed, 0)
    PatternRule.parse(pattern)
    quiet_libraries()
    loaded = load_model(model, target, trust=Trust(allow_pickle, trust_remote_code))
    tokens = window_length(loaded, length, calibration)
    blocks = find_blocks(loaded.model, tuple(layers or ()))
    check_finite(blocks)
    special = not is_causal(loaded.model)

    def cut(bos: bool) -> Windows:
        found = calibration_windows(calibration, loaded.tokenizer, samples, tokens, seed, special, bos)
        return for_model(found, loaded)

    windows, beginning = begun_windows(loaded, begin, cut)
    error_console.print(str(beginning), highlight=False, soft_wrap=True)
    provenance = {
        "model": model,
        "calibration": windows.source,
        "calibration_hash": windows.hash,
        "windows": len(windows),
        "length": tokens,
        "seed": seed,
        "add_bos": str(beginning.add_bos),
        "versions": versions(),
    }
    total = sum(len(block.layers) for block in blocks)
    table = Table("instance", "shape", "pattern", "tokens", "dead channels")
    with progress_bars(quiet) as bars:
        for done, problem in enumerate(layer_problems(loaded.model, blocks, pattern, windows.tokens), 1):
            path = out / f"{re.sub(r'[^A-Za-z0-9._-]', '_', problem.name)}.safetensors"
            save_instance(problem, path, provenance)
            bars.stage("instances", done, total)
            table.add_row(
                str(path),
                f"{problem.rows}×{problem.cols}",
                str(problem.pattern),
                str(problem.gram.tokens),
                str(int(problem.gram.dead.sum())),
            )
    console.print(table)


def list_solvers() -> None:
    """List the solvers: name, group, options, and what to install where something is missing."""
    table = Table("solver", "group", "options", "installed")
    for name, solver in SOLVERS.items():
        example = solver()
        missing = example.missing()
        options = repr(example).partition("(")[2].removesuffix(")")
        table.add_row(
            name, str(example.group), options, f"pip install {' '.join(missing)}" if missing else "yes"
        )
    console.print(table)
