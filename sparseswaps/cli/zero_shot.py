"""``zero-shot``: accuracy of a model on multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import InputError
from ..evaluation.beginning import AddBos
from ..evaluation.text_tasks import TEXT_TASKS, TextTasks
from ..evaluation.zero_shot import Comparison, ZeroShotReport
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
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, with commas, by default the field's seven; or of --text, "
            f"by default {','.join(TEXT_TASKS)}."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text that questions are made from, as --evaluation takes it; needs no network."),
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="Questions of each task that are made from the text; 300 by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of their choice; 0 by default.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another model, such as the dense one, to compare with question by question."),
    ] = None,
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

    --text FILE makes three kinds of questions from a text: the last word of a sentence (cloze), which of
    four continuations is the passage's own (continuation), which of four words stands there (word).

    [bold]Examples[/]

    sparseswaps zero-shot pruned --out zero-shot.json

    sparseswaps zero-shot pruned --tasks arc_easy,openbookqa --limit 100

    sparseswaps zero-shot pruned --tasks my_task --task-path my_tasks

    sparseswaps zero-shot pruned --text test.txt --against path/to/dense
    """
    quiet_libraries()
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    report = run_zero_shot(
        model,
        names,
        text=_made_from(text, items, seed),
        against=against,
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
    if report.against is not None:
        console.print(_difference_table(report, report.against))
    if out is not None:
        console.print(f"saved: {out}", soft_wrap=True)


def _made_from(text: str | None, items: int | None, seed: int | None) -> TextTasks | None:
    """What questions are made from, None without a text."""
    given = {name: value for name, value in (("items", items), ("seed", seed)) if value is not None}
    if text is not None:
        return TextTasks(text, **given)
    if given:
        raise InputError(f"--{min(given)}: expected --text, from which questions are made, found none")
    return None


def _table(report: ZeroShotReport) -> Table:
    """Scores of the model."""
    asked = "all questions" if report.limit is None else f"at most {report.limit} questions per task"
    caption = f"± standard error; zero-shot, {asked}{_begun(report.add_bos)}"
    table = _empty_table(report.model, caption, ("questions", "acc", "acc_norm"))
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


def _difference_table(report: ZeroShotReport, other: Comparison) -> Table:
    """Scores less those of another model."""
    caption = f"± standard error of the differences, question by question{_begun(other.add_bos)}"
    names = ("acc", "Δ acc", "acc_norm", "Δ acc_norm")
    table = _empty_table(f"{other.model}, and Δ: {report.model} less it", caption, names)
    for score, less in zip(other.scores, other.differences, strict=True):
        table.add_row(
            score.task,
            _with_error(score.acc),
            _with_error(less.acc, less.acc_error, "+"),
            _with_error(score.acc_norm),
            _with_error(less.acc_norm, less.acc_norm_error, "+"),
        )
    if other.mean_acc is not None and len(other.scores) > 1:
        table.add_section()
        table.add_row("mean", "", _with_error(other.mean_acc, other.mean_acc_error, "+"), "", "")
    return table


def _empty_table(title: str, caption: str, names: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _begun(add_bos: str) -> str:
    return "" if add_bos == AddBos.NO else ", beginning-of-text token first"


def _with_error(value: float | None, error: float | None = None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"
