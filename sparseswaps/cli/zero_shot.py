"""``zero-shot``: accuracy of a model on multiple-choice tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..evaluation.beginning import AddBos
from ..evaluation.zero_shot import SEVEN_TASKS, ZeroShotReport
from ..evaluation.zero_shot import zero_shot as run_zero_shot
from ..models.sources import Trust
from .options import AllowPickle, TrustRemoteCode
from .output import console, print_json, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("zero-shot")(zero_shot)


def zero_shot(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a causal Hugging Face model.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, with commas; by default the field's seven.")
    ] = ",".join(SEVEN_TASKS),
    task_path: Annotated[
        Path | None, typer.Option(help="Folder of own task files (YAML); only their tasks are known then.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions per task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    add_bos: Annotated[
        str,
        typer.Option(
            help="Questions begin with the beginning-of-text token: yes, no, or auto, as the tokenizer does."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")
    ] = False,
) -> None:
    """Zero-shot accuracy on BoolQ, RTE, HellaSwag, WinoGrande, ARC and OpenBookQA, or on other tasks.

    [bold]Examples[/]

    sparseswaps zero-shot pruned --out zero-shot.json

    sparseswaps zero-shot pruned --tasks arc_easy,openbookqa --limit 100

    sparseswaps zero-shot pruned --tasks my_task --task-path my_tasks
    """
    quiet_libraries()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    report = run_zero_shot(
        model,
        names,
        task_path=task_path,
        limit=limit,
        batch_size=batch_size,
        add_bos=add_bos,
        device=device,
        dtype=dtype,
        trust=Trust(allow_pickle, trust_remote_code),
        out=out,
    )
    if json:
        print_json(report.to_json())
        return
    console.print(_table(report))
    if out is not None:
        console.print(f"saved: {out}", soft_wrap=True)


def _table(report: ZeroShotReport) -> Table:
    asked = "all questions" if report.limit is None else f"at most {report.limit} questions per task"
    begun = "" if report.add_bos == AddBos.NO else ", beginning-of-text token first"
    table = Table(
        title=report.model,
        caption=f"± standard error; zero-shot, {asked}{begun}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("task")
    for name in ("questions", "acc", "acc_norm"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in report.scores:
        table.add_row(
            score.task,
            str(score.questions),
            _with_error(score.acc, score.acc_error),
            _with_error(score.acc_norm, score.acc_norm_error),
        )
    if report.mean_acc is not None and len(report.scores) > 1:
        table.add_section()
        table.add_row("mean", "", f"{report.mean_acc:.4f}", "")
    return table


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
