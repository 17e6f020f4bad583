"""``study``, ``report``, ``merge`` and ``export``: comparisons of solvers, from one file to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ..machine import duration
from ..study import StudyProgress, build_report, plan_study, run_study
from ..study import export as export_tables
from ..study import merge as merge_records
from .options import Quiet, check_count, check_output
from .output import console, error_console, progress_bars, quiet_libraries

# More processes than any machine or cluster of the kind has.
MOST_JOBS = 100_000


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(study)
    app.command()(report)
    app.command()(merge)
    app.command()(export)


def study(
    file: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    database: Annotated[
        Path | None, typer.Option(help="Record; by default beside the working directory, named as the file.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Units at a time; by default one per processor.")] = None,
    backend: Annotated[
        str, typer.Option(help="joblib backend: loky, threading, sequential, dask, ray.")
    ] = "loky",
    cluster: Annotated[
        str | None,
        typer.Option(help="Address of a running Dask or Ray cluster; without it a local one is started."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed units again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and its cost; run nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report there when the study is done.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a study: problems × solvers × patterns × seeds. Stop it at any time; it resumes.

    [bold]Examples[/]

    sparseswaps study study.toml --dry-run

    sparseswaps study study.toml --out report

    sparseswaps study study.toml --backend dask --cluster tcp://host:8786
    """
    check_count("jobs", jobs, most=MOST_JOBS)
    if out is not None:
        check_output(out)
    quiet_libraries()
    record = database or Path(f"{file.stem}.sqlite")
    if dry_run:
        plan = plan_study(file, record, jobs or 1)
        table = Table("problems", "solver", "units")
        for source, label, units in plan.summary:
            table.add_row(source, label, str(units))
        console.print(table)
        cost = plan.cost
        most = "no limit stated" if cost.most is None else f"at most {duration(cost.most)}"
        console.print(
            f"{len(plan.units)} units, {plan.done} done; expected {duration(cost.seconds)} to go, {most} "
            f"({cost.measured} of {cost.units} from measured units)"
        )
        return
    with progress_bars(quiet) as bars:

        def show(progress: StudyProgress) -> None:
            bars.stage(f"units ({progress.failed} failed)", progress.done + progress.failed, progress.total)
            if progress.failure:
                error_console.print(
                    f"[yellow]failed:[/] {progress.label}: {progress.failure}", soft_wrap=True
                )

        outcome = run_study(
            file,
            record,
            jobs=jobs,
            backend=backend,
            cluster=cluster,
            retry_failed=retry_failed,
            progress=show,
        )
    console.print(
        f"{outcome.ran} units run, {outcome.done} done, {outcome.failed} failed, "
        f"{outcome.elsewhere} with other processes: {outcome.database}",
        soft_wrap=True,
    )
    if out is not None:
        console.print(f"report: {build_report(record, out).resolve()}", soft_wrap=True)


def report(
    database: Annotated[
        Path, typer.Argument(help="Record of a study, or a folder of its rows as Parquet files.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the page, its figures and tables.")] = Path(
        "report"
    ),
) -> None:
    """Write the report of a record: a page that needs no network, its Markdown twin, figures, CSV, LaTeX.

    [bold]Examples[/]

    sparseswaps report study.sqlite --out report

    sparseswaps report reports/published/calibration/rows --out report
    """
    check_output(out)
    console.print(f"report: {build_report(database, out).resolve()}", soft_wrap=True)


def merge(
    target: Annotated[Path, typer.Argument(help="Record that takes the units; made if it is not there.")],
    sources: Annotated[
        list[Path],
        typer.Argument(help="Records, or folders of Parquet files, whose finished units are taken."),
    ],
) -> None:
    """Take the finished units of other records, for instance of other machines.

    [bold]Example[/]

    sparseswaps merge all.sqlite monday.sqlite tuesday.sqlite

    sparseswaps merge more.sqlite reports/published/smollm2/rows    # to go on with a published study
    """
    console.print(f"{merge_records(target, sources)} new units in {target}")


def export(
    database: Annotated[
        Path, typer.Argument(help="Record of a study, or a folder of its rows as Parquet files.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the files.")],
    format: Annotated[Literal["csv", "parquet"], typer.Option(help="csv or parquet.")] = "csv",
) -> None:
    """Write every table of a record as CSV, or as Parquet files, which are a record of their own.

    [bold]Example[/]

    sparseswaps export study.sqlite --out tables --format parquet
    """
    check_output(out)
    for path in export_tables(database, out, format):
        console.print(str(path))
