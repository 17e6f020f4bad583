"""Zero-shot accuracy on multiple-choice tasks, through EleutherAI's lm-evaluation-harness.

For each question the model scores every choice by its log-likelihood given the question; ``acc`` counts
the questions whose likeliest choice is right, ``acc_norm`` the same after dividing each log-likelihood by
the length of the choice in characters. The standard error is that of a mean over n questions,
``√(p (1 − p) / (n − 1))``.

The field's seven tasks (Wanda, Sun et al., ICLR 2024, section 4.1) are ``SEVEN_TASKS``; their data come from
the Hugging Face hub. Any other task of the harness works too. Without a network there are tasks from YAML
files in a folder, and those that are made from a text (see ``text_tasks``).

Two models answer the same questions, so their difference is that of pairs: the mean of ``d = right − right of
the other``, which is -1, 0 or 1 for each question, with the standard error of that mean, ``sd(d) / √n``. It
depends, as McNemar's test does, on the questions that one of the two alone answers.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ..calibration.texts import read_documents, text_hash
from ..calibration.windows import bos_token
from ..errors import InputError, InvalidModelError, SolverNotInstalledError
from ..models.loading import LoadedModel, check_dtype, load_model, resolve_device
from ..models.sources import Trust, locate
from .beginning import AddBos
from .measures import is_causal
from .text_tasks import TEXT_TASKS, TextTasks, make_questions, passages, task_config
from .whole_files import write_atomically

SEVEN_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class TaskScore:
    """One task.

    Attributes:
        task: name; version: of its definition in the harness.
        questions: how many were asked.
        acc, acc_error: accuracy and its standard error.
        acc_norm, acc_norm_error: with length-normalised scores; None where the task defines none.
    """

    task: str
    version: str
    questions: int
    acc: float | None
    acc_error: float | None
    acc_norm: float | None
    acc_norm_error: float | None


@dataclass(frozen=True)
class TaskDifference:
    """One task, answered by two models.

    Attributes:
        task: name.
        acc, acc_error: accuracy less that of the other model, and the standard error of the pairs.
        acc_norm, acc_norm_error: with length-normalised scores; None where the task defines none.
    """

    task: str
    acc: float | None
    acc_error: float | None
    acc_norm: float | None
    acc_norm_error: float | None


@dataclass(frozen=True)
class Comparison:
    """Another model's answers to the same questions.

    Attributes:
        model: which; scores: its own; differences: from its scores, one per task.
        mean_acc: mean of the differences of ``acc``, None where a task has none; mean_acc_error: its standard
            error over the questions of these tasks.
        add_bos: whether its questions begin with its beginning-of-text token, yes or no.
    """

    model: str
    scores: tuple[TaskScore, ...]
    differences: tuple[TaskDifference, ...]
    mean_acc: float | None
    mean_acc_error: float | None
    add_bos: str


@dataclass(frozen=True)
class ZeroShotReport:
    """What ``zero_shot`` found, ready to be written as JSON.

    Attributes:
        model: what was evaluated; scores: one per task.
        mean_acc: mean of ``acc`` over the tasks, the field's summary; None where a task has none.
        against: the comparison with another model, None without one.
        text: what ``TEXT_TASKS`` are made from, None without them; text_hash: of its files, None for a
            dataset elsewhere.
        limit: the most questions per task, None for all.
        add_bos: whether questions begin with the beginning-of-text token, yes or no.
        device, dtype, batch_size, seconds, versions: where, how and how long.
    """

    model: str
    scores: tuple[TaskScore, ...]
    mean_acc: float | None
    against: Comparison | None
    text: TextTasks | None
    text_hash: str | None
    limit: int | None
    add_bos: str
    device: str
    dtype: str
    batch_size: int
    seconds: float
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def zero_shot(
    model: str | os.PathLike[str],
    tasks: Sequence[str] | None = None,
    *,
    text: TextTasks | None = None,
    against: str | os.PathLike[str] | None = None,
    task_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    add_bos: AddBos | str = AddBos.AUTO,
    device: str = "auto",
    dtype: str = "auto",
    trust: Trust | None = None,
    out: str | os.PathLike[str] | None = None,
) -> ZeroShotReport:
    """Zero-shot accuracy of a causal language model.

    Args:
        model: directory or hub name.
        tasks: names in the harness, of own tasks, or of ``TEXT_TASKS``; by default the latter with a text,
            else ``SEVEN_TASKS``.
        text: what ``TEXT_TASKS`` are made from.
        against: another model that answers the same questions, the dense one for instance.
        task_path: folder of own task files (YAML); with it only their tasks are known.
        limit: the most questions per task, for a quick look.
        batch_size: questions at a time.
        add_bos: whether questions begin with the beginning-of-text token: ``yes``, ``no``, or ``auto``: as
            the tokenizer does by itself, the harness's protocol.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: see ``models.load_model``.
        trust: what of the checkpoint may run code; nothing by default.
        out: JSON file of the report; it appears whole or not at all.

    Raises:
        SolverNotInstalledError: if the harness is missing.
        InvalidModelError: if a model cannot be loaded or is not causal.
        InvalidTextError: if the text cannot be read or is too short.
        InputError: for an unknown task, one whose data cannot be loaded, or a token that there is not.
    """
    _require_harness()
    if tasks is None:
        tasks = SEVEN_TASKS if text is None else TEXT_TASKS
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise InputError("zero-shot tasks: expected at least one, found none")
    for count in ("limit", limit), ("batch_size", batch_size):
        _check_count(*count)
    asked, _ = AddBos.read(add_bos), resolve_device(device)
    check_dtype(dtype)
    begin = time.perf_counter()
    made = _made_of_text(tasks, text, task_path)
    hashed = None if text is None else text_hash(text.text)
    manager = _task_manager([task for task in tasks if task not in made], task_path)
    for each in (model, against):
        if each is not None:
            locate(os.fspath(each), trust or Trust())  # that there is none is known before the first answers
    load = partial(_causal_model, device=device, dtype=dtype, trust=trust)
    loaded = load(os.fspath(model))
    specs = _specs(tasks, made, text, loaded.tokenizer)
    ask = partial(_answers, specs=specs, manager=manager, limit=limit, batch_size=batch_size, asked=asked)
    own = ask(loaded)
    del loaded  # one model in memory at a time
    other = None if against is None else os.fspath(against)
    scores = tuple(_score(task, own.results) for task in tasks)
    report = ZeroShotReport(
        model=os.fspath(model),
        scores=scores,
        mean_acc=_mean(scores),
        against=None if other is None else _compared(other, tasks, own, ask(load(other))),
        text=text,
        text_hash=hashed,
        limit=limit,
        add_bos=own.add_bos,
        device=own.device,
        dtype=own.dtype,
        batch_size=batch_size,
        seconds=time.perf_counter() - begin,
        versions={
            package: metadata.version(package)
            for package in ("sparseswaps", "lm_eval", "transformers", "torch")
        },
    )
    if out is not None:
        write_atomically(Path(out), json.dumps(report.to_json(), indent=2, sort_keys=True) + "\n")
    return report


def _made_of_text(
    tasks: Sequence[str], text: TextTasks | None, task_path: str | os.PathLike[str] | None
) -> list[str]:
    """Those of ``tasks`` that are made from the text.

    Raises:
        InputError: if only one of the two is there.
    """
    made = [task for task in tasks if task in TEXT_TASKS]
    if text is None:
        if made and task_path is None:
            raise InputError(f"zero-shot task {made[0]}: expected a text that it is made from, found none")
        return []
    if not made:
        raise InputError(
            f"text of zero-shot tasks: expected at least one of {', '.join(TEXT_TASKS)}, found only "
            f"{', '.join(tasks)}"
        )
    return made


def _specs(
    tasks: Sequence[str], made: Sequence[str], text: TextTasks | None, tokenizer: Any
) -> list[str | dict[str, Any]]:
    """What the harness is asked for: names, and configurations with questions that are made from a text."""
    if text is None:
        return list(tasks)
    texts = passages(read_documents(text.text, tokenizer))
    return [task_config(task, make_questions(task, texts, text)) if task in made else task for task in tasks]


@dataclass(frozen=True)
class _Answers:
    """Results of the harness, and how they came about, as a report says it."""

    add_bos: str
    results: dict[str, Any]
    device: str
    dtype: str


def _answers(
    loaded: LoadedModel,
    specs: Sequence[str | dict[str, Any]],
    manager: Any,
    limit: int | None,
    batch_size: int,
    asked: AddBos,
) -> _Answers:
    """What a model answers to every task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # what it says of a model that is passed as an object is all intended
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    begun = _begin(loaded.tokenizer, asked)
    harness = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        add_bos_token=None if asked is AddBos.AUTO else begun,
    )
    try:
        found: Any = lm_eval.simple_evaluate(
            model=harness,
            tasks=list(specs),
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            log_samples=True,
        )
    except OSError as error:  # a hub that does not answer, a data file that is not there
        names = ", ".join(spec if isinstance(spec, str) else spec["task"] for spec in specs)
        raise InputError(
            f"zero-shot tasks {names}: expected their data on the hub or in local files, "
            f"found {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    weight = next(loaded.model.parameters())
    said = str(AddBos.YES if begun else AddBos.NO)
    return _Answers(said, found, str(weight.device), str(weight.dtype).removeprefix("torch."))


def _mean(scores: Sequence[TaskScore | TaskDifference]) -> float | None:
    """Mean accuracy, None if a task has none."""
    known = [score.acc for score in scores if score.acc is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise SolverNotInstalledError(
            "zero-shot tasks need lm-evaluation-harness: expected lm_eval to be installed, found none; "
            "run pip install 'sparseswaps[eval]'"
        )


def _causal_model(name: str, *, device: str, dtype: str, trust: Trust | None) -> LoadedModel:
    """A causal model with its tokenizer."""
    loaded = load_model(name, resolve_device(device), dtype, trust=trust)
    if not is_causal(loaded.model):
        raise InvalidModelError(
            f"model {name}: expected a causal language model, found {type(loaded.model).__name__}"
        )
    if loaded.tokenizer is None:
        raise InvalidModelError(f"model {name}: expected a tokenizer beside the weights, found none")
    return loaded


def _begin(tokenizer: Any, add_bos: AddBos) -> bool:
    """Whether what the tokenizer encodes begins with the beginning-of-text token, after making it so."""
    token = bos_token(tokenizer)

    def begins() -> bool:
        return token is not None and tokenizer("a")["input_ids"][:1] == [token]

    if add_bos is AddBos.NO:
        return False
    if add_bos is AddBos.YES and not begins():
        tokenizer.add_bos_token = True
        if not begins():
            raise InputError(
                "beginning-of-text token: expected a tokenizer that has one (bos_token) and puts it in "
                "front, found one that does not"
            )
    return begins()


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"{name} of zero-shot tasks counts questions: expected at least 1, found {value}")


def _task_manager(tasks: Sequence[str], task_path: str | os.PathLike[str] | None) -> Any:
    """The harness's index of tasks, checked for every name that was asked for."""
    from lm_eval.tasks import TaskManager

    if task_path is not None and not Path(task_path).is_dir():
        raise InputError(f"task files {task_path}: expected a folder, found none")
    # the harness's own thousands of tasks take seconds to index
    manager = TaskManager(
        include_path=None if task_path is None else os.fspath(task_path),
        include_defaults=task_path is None and bool(tasks),
    )
    for task in tasks:
        if task not in manager.all_subtasks:
            near = difflib.get_close_matches(task, manager.all_subtasks, 3)
            where = "the harness" if task_path is None else f"{task_path}"
            raise InputError(
                f"zero-shot task {task!r}: expected a task of {where}"
                + (f" such as {', '.join(near)}" if near else "")
                + ", found none of that name"
            )
    return manager


def _score(task: str, found: Mapping[str, Any]) -> TaskScore:
    """A task's row from the harness's results, which are keyed by metric and filter."""
    values = found["results"][task]

    def number(key: str) -> float | None:
        value = values.get(f"{key},none")
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    return TaskScore(
        task,
        str(found["versions"].get(task, "")),
        int(found["n-samples"][task]["effective"]),
        *(number(key) for metric in METRICS for key in (metric, f"{metric}_stderr")),
    )


def _compared(model: str, tasks: Sequence[str], own: _Answers, other: _Answers) -> Comparison:
    """Another model's answers beside those of the first."""
    differences = tuple(_difference(task, own.results, other.results) for task in tasks)
    errors = [each.acc_error for each in differences if each.acc_error is not None]
    return Comparison(
        model=model,
        scores=tuple(_score(task, other.results) for task in tasks),
        differences=differences,
        mean_acc=_mean(differences),
        mean_acc_error=math.hypot(*errors) / len(errors) if len(errors) == len(differences) else None,
        add_bos=other.add_bos,
    )


def _difference(task: str, found: Mapping[str, Any], others: Mapping[str, Any]) -> TaskDifference:
    """Mean and standard error of the differences of two models' answers, question by question."""
    values = []
    for metric in METRICS:
        first, second = (_by_question(task, metric, results) for results in (found, others))
        pairs = [value - second[question] for question, value in first.items()]
        values.append(statistics.fmean(pairs) if pairs else None)
        values.append(statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None)
    return TaskDifference(task, *values)


def _by_question(task: str, metric: str, found: Mapping[str, Any]) -> dict[int, float]:
    """Whether each question was answered right, by its number; empty where the task has no such measure."""
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in found["samples"][task]
        if sample["filter"] == "none" and isinstance(sample.get(metric), int | float)
    }
