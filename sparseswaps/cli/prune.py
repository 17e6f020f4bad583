"""``prune``, ``evaluate``, ``apply`` and ``verify``: from a model to a pruned, verified model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..evaluation.beginning import AddBos
from ..evaluation.evaluate import evaluate as run_evaluate
from ..machine import versions
from ..masks.file import MASK_FILE, apply_masks, load_masks, verify_model
from ..masks.output import claimed
from ..masks.saving import save_model
from ..masks.units_file import UNITS_FILE, load_units, verify_units
from ..models.loading import load_model, resolve_device
from ..models.sources import Trust
from ..progress import Progress
from ..pruning.report import PruneReport
from ..pruning.run import prune as run_prune
from ..ranks import PATIENCE, Ranks, joined
from .options import (
    AllowPickle,
    Quiet,
    TrustRemoteCode,
    read_options,
    tell_of_former,
    with_options,
)
from .output import (
    console,
    consumer_table,
    error_console,
    key_values,
    layer_table,
    print_json,
    progress_bars,
    quiet_libraries,
)

Text = Annotated[
    str,
    typer.Option(metavar="FILE_OR_DATASET", help="Text file, token file (.npy), stdlib, or a dataset name."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Weights stay in the checkpoint's files, one block at a time in memory."),
]
Length = Annotated[
    int | None, typer.Option(help="Tokens per window; 2048 by default, at most what the model allows.")
]


# Seconds of the longest wait that torch.distributed can count, about a year.
LONGEST = 3.0e7


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(prune)
    app.command()(evaluate)
    app.command()(apply)
    app.command()(verify)


@with_options
def prune(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a Hugging Face model.")],
    out: Annotated[Path | None, typer.Option(help="Directory for model, masks and record.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    settings: Annotated[
        Path | None, typer.Option(help="TOML with options, such as settings.toml of an earlier run.")
    ] = None,
    rank_timeout: Annotated[
        float, typer.Option(help="Seconds after which a silent process counts as lost (torchrun).")
    ] = PATIENCE,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Prune a model, layer by layer; measure, save and verify it.

    [bold]Examples[/]

    sparseswaps prune ./llama --calibration c4 --evaluation wikitext2-test --out pruned

    sparseswaps prune ./llama --pattern 2:4 --metric --calibration text.txt --out pruned --resume

    sparseswaps prune ./bert --pattern 60% --mode one-shot --calibration corpus.txt --json

    sparseswaps prune ./larger-than-memory --offload --activation-limit 4 --calibration c4 --out pruned

    torchrun --nproc-per-node 2 -m sparseswaps prune ./llama --calibration c4 --out pruned

    sparseswaps prune ./llama --units channels=0.25,kv-groups=1 --calibration c4 --out smaller

    Sparsity alone makes no model faster: the saved weights are dense tensors with zeros. With --units the
    saved model is a smaller dense one, which any runtime serves faster.
    """
    chosen, machine = read_options(options, settings)
    resolve_device(machine.device)
    if not 0 < rank_timeout <= LONGEST:
        raise InputError(f"rank timeout: expected seconds above 0, found {rank_timeout:g}")
    if chosen.calibration is None:
        raise InputError("prune: expected --calibration FILE_OR_DATASET, found none")
    quiet_libraries()
    try:
        with joined(machine.device, rank_timeout) as ranks, _bars_of(ranks, quiet) as bars:
            report = run_prune(
                model,
                chosen,
                machine=replace(machine, ranks=ranks),
                out=out,
                resume=resume,
                progress=bars,
                announce=lambda said: error_console.print(str(said), highlight=False, soft_wrap=True),
            )
    except KeyboardInterrupt:
        if out is not None and out.exists():
            error_console.print(
                f"[bold]interrupted[/]: finished layers are in {out}; add --resume to go on",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
        raise
    if not ranks.first:
        return
    if json:
        print_json(report.to_json())
    else:
        if report.consumers:
            console.print(consumer_table(report.consumers))
        if report.layers:
            console.print(layer_table(report.layers))
        console.print(_summary(report))


@contextmanager
def _bars_of(ranks: Ranks, quiet: bool) -> Iterator[Progress | None]:
    """Progress of the first rank."""
    if ranks.first:
        with progress_bars(quiet) as bars:
            yield bars
    else:
        yield None


def _summary(report: PruneReport) -> object:
    where = f"{len(report.layers)} layers, {report.settings.mode}"
    rows = [
        ("sparsity", f"{report.sparsity:.4%} of {where}"),
        ("layer error", f"{report.error_start:.5f} → {report.error:.5f} (mean over layers, start → result)"),
    ]
    if report.smaller:
        rows = [*_of_smaller(report), *rows[1:]]
    if report.left_dense:
        others = ", ".join(f"{count} {reason}" for reason, count in report.left_dense.items())
        rows.append(("left dense", f"{others}; the record names them"))
    length = report.settings.length
    windows = f"{report.evaluation_windows} " + (f"windows of {length} tokens" if length else "samples")
    if report.settings.add_bos is AddBos.YES:
        windows += ", beginning-of-text token first"
    if report.perplexity_dense is not None:
        rows.append(
            (
                "perplexity",
                f"dense {report.perplexity_dense:.4f}, pruned {report.perplexity_pruned:.4f} ({windows})",
            )
        )
    if report.cosine is not None:
        rows.append(
            (
                "cosine",
                f"{report.cosine:.4f} to the dense model's {report.compared}, mean-pooled ({windows})",
            )
        )
    memory = f"{report.peak_memory_mb:.0f} MB"
    if report.peak_device_memory_mb is not None:
        memory += f", device {report.peak_device_memory_mb:.0f} MB"
    rows += [
        ("seconds", f"{report.seconds:.1f}, of which {report.seconds_layers:.1f} on the layers"),
        ("peak memory", memory),
    ]
    if report.out is not None:
        rows.append(("saved, verified", report.out))
    return key_values(rows)


def _of_smaller(report: PruneReport) -> list[tuple[str, str]]:
    """How much smaller a model is."""
    fewer = 1 - report.parameters / report.parameters_dense
    return [
        (
            "smaller",
            f"{report.parameters:,} parameters of {report.parameters_dense:,} ({fewer:.2%} fewer), "
            f"{report.megabytes:.1f} MB of {report.megabytes_dense:.1f} MB",
        ),
        (
            "sparsity",
            f"{report.sparsity:.4%} of the blocks' weights are gone or zero, {report.settings.mode}",
        ),
    ]


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a Hugging Face model.")],
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", metavar="FILE_OR_DATASET", help="The text.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Dense model, to compare an encoder's embeddings with.")
    ] = None,
    length: Length = None,
    evaluation_limit: Annotated[
        int | None, typer.Option(help="Use only so many windows of the text; all by default, as prune does.")
    ] = None,
    add_bos: Annotated[
        str,
        typer.Option(
            help="Windows begin with the beginning-of-text token: yes, no, or auto: as when the model was "
            "pruned, else if the loss is 0.5 lower so."
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Offload = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json: Json = False,
    former_eval: Annotated[str | None, typer.Option("--eval", hidden=True)] = None,
) -> None:
    """Perplexity of a causal model, or cosine of an encoder's embeddings to a reference model's.

    [bold]Examples[/]

    sparseswaps evaluate pruned --evaluation wikitext2-test --length 2048

    sparseswaps evaluate pruned-bert --reference ./bert --evaluation text.txt
    """
    if former_eval is not None:
        tell_of_former("--eval", "--evaluation")
    text = evaluation or former_eval
    if text is None:
        raise InputError("evaluate: expected --evaluation FILE_OR_DATASET, found none")
    quiet_libraries()
    with progress_bars(quiet) as bars:
        found = run_evaluate(
            model,
            text,
            reference=reference,
            length=length,
            evaluation_limit=evaluation_limit,
            add_bos=add_bos,
            device=device,
            dtype=dtype,
            offload=offload,
            trust=Trust(allow_pickle, trust_remote_code),
            stage=bars.stage,
        )
    values: dict[str, object] = {
        "model": model,
        "evaluation": found.windows.source,
        "windows": len(found.windows),
        "length": found.length,
        "add_bos": str(found.beginning.add_bos),
    }
    if found.perplexity is None:
        values |= {"cosine": found.cosine, "compared": found.compared}
    else:
        values |= {"perplexity": found.perplexity}
        error_console.print(str(found.beginning), highlight=False, soft_wrap=True)
    if json:
        print_json({**values, "tokens_hash": found.windows.hash, "versions": versions()})
    else:
        console.print(key_values([(key, str(value)) for key, value in values.items()]))


def apply(
    model: Annotated[str, typer.Argument(help="The dense model.")],
    masks: Annotated[Path, typer.Option(help="Mask file, or a directory with masks.safetensors.")],
    out: Annotated[Path, typer.Option(help="Directory for the pruned model.")],
    other_weights: Annotated[
        bool, typer.Option("--other-weights", help="Accept weights that changed since, e.g. fine-tuned.")
    ] = False,
    offload: Offload = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Put a mask file on a model and save the result.

    [bold]Example[/]

    sparseswaps apply ./llama --masks pruned/masks.safetensors --out pruned-again
    """
    quiet_libraries()
    if masks.is_dir() and (masks / UNITS_FILE).exists() and not (masks / MASK_FILE).exists():
        raise InputError(
            f"apply {masks}: expected a mask file, found a smaller model without masks; it is complete as it "
            "is, and `prune --settings` makes it again from the dense one"
        )
    with claimed(out):
        file = load_masks(masks)
        loaded = load_model(model, "cpu", "checkpoint", offload, trust=Trust(allow_pickle, trust_remote_code))
        facts = apply_masks(loaded, file, same_weights=not other_weights)
        save_model(out, loaded, file.masks, facts)
    console.print(f"{len(facts)} layers pruned, saved and verified in {out}")


def verify(
    directory: Annotated[
        Path, typer.Argument(help="A pruned model with masks.safetensors or units.safetensors.")
    ],
    masks: Annotated[Path | None, typer.Option(help="Another mask file than the one in it.")] = None,
    original: Annotated[
        str | None, typer.Option(help="Dense model, to compare kept weights directly.")
    ] = None,
    offload: Offload = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Prove that every layer has the pattern and that kept weights equal the dense ones bit for bit.

    Of a smaller model (units.safetensors): that it has the units and the values that were saved, and with
    --original that it is what stays of the dense one, updated weights by their hashes.

    [bold]Examples[/]

    sparseswaps verify pruned

    sparseswaps verify smaller --original ./llama
    """
    quiet_libraries()
    trust = Trust(allow_pickle, trust_remote_code)
    smaller = directory.is_dir() and (directory / UNITS_FILE).exists()
    file = None
    if masks is not None or not smaller or (directory / MASK_FILE).exists():
        file = load_masks(masks or directory)
    units = load_units(directory) if smaller else None
    loaded = load_model(directory, "cpu", "checkpoint", offload, trust=trust)
    dense = None if original is None else load_model(original, "cpu", "checkpoint", offload, trust=trust)
    values: dict[str, Any] = {}
    problems: list[str] = []
    lines: list[str] = []
    if units is not None:
        kept = verify_units(loaded, units, file, dense)
        problems += kept.problems
        values["units"] = {
            "consumers": kept.consumers,
            "units": kept.units,
            "kept": kept.kept,
            "parameters": kept.parameters,
            "parameters_before": kept.parameters_before,
        }
        of = "" if kept.parameters_before is None else f" of {kept.parameters_before:,}"
        lines.append(
            f"{kept.kept} of {kept.units} units of {kept.consumers} layers stay, {kept.parameters:,} "
            f"parameters{of}: {_verdict(kept.ok, 'units')}"
        )
    if file is not None:
        found = verify_model(loaded, file, None if smaller else dense)
        problems += found.problems
        values |= {"layers": found.layers, "weights": found.weights, "pruned": found.pruned}
        lines.append(
            f"{found.layers} layers, {found.pruned} of {found.weights} weights pruned "
            f"({found.pruned / found.weights:.4%}): {_verdict(found.ok, 'mask')}"
        )
    if json:
        print_json({"ok": not problems, **values, "problems": problems})
    else:
        for problem in problems:
            error_console.print(f"[red]wrong:[/] {problem}", highlight=False, soft_wrap=True)
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _verdict(ok: bool, file: str) -> str:
    return "verified" if ok else f"NOT as the {file} file says"
