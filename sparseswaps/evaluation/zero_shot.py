"""Zero-shot accuracy on multiple-choice tasks, through EleutherAI's lm-evaluation-harness.

For each question the model scores every choice by its log-likelihood given the question; ``acc`` counts
the questions whose likeliest choice is right, ``acc_norm`` the same after dividing each log-likelihood by
the length of the choice in characters. The standard error is that of a mean over n questions,
``√(p (1 − p) / (n − 1))``.

The field's seven tasks (Wanda, Sun et al., ICLR 2024, section 4.1) are ``SEVEN_TASKS``; their data come from
the Hugging Face hub. Any other task of the harness works too, and own tasks from YAML files in a folder,
which need no network.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..calibration.windows import bos_token
from ..errors import InputError, InvalidModelError, SolverNotInstalledError
from ..models.loading import LoadedModel, check_dtype, load_model, resolve_device
from ..models.sources import Trust
from .beginning import AddBos
from .measures import is_causal

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
class ZeroShotReport:
    """What ``zero_shot`` found, ready to be written as JSON.

    Attributes:
        model: what was evaluated; scores: one per task.
        mean_acc: mean of ``acc`` over the tasks, the field's summary; None where a task has none.
        limit: the most questions per task, None for all.
        add_bos: whether questions begin with the beginning-of-text token, yes or no.
        device, dtype, batch_size, seconds, versions: where, how and how long.
    """

    model: str
    scores: tuple[TaskScore, ...]
    mean_acc: float | None
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
    tasks: Sequence[str] = SEVEN_TASKS,
    *,
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
        tasks: names in the harness, or of own tasks.
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
        InvalidModelError: if the model cannot be loaded or is not causal.
        InputError: for an unknown task, one whose data cannot be loaded, or a token that there is not.
    """
    _require_harness()
    if not tasks:
        raise InputError("zero-shot tasks: expected at least one, found none")
    for count in ("limit", limit), ("batch_size", batch_size):
        _check_count(*count)
    asked, _ = AddBos.read(add_bos), resolve_device(device)
    check_dtype(dtype)
    begin = time.perf_counter()
    manager = _task_manager(tasks, task_path)
    name = os.fspath(model)
    loaded = _causal_model(name, device, dtype, trust)
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
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # a hub that does not answer, a data file that is not there
        raise InputError(
            f"zero-shot tasks {', '.join(tasks)}: expected their data on the hub or in local files, "
            f"found {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    scores = tuple(_score(task, found) for task in tasks)
    weight = next(loaded.model.parameters())
    report = ZeroShotReport(
        model=name,
        scores=scores,
        mean_acc=_mean(scores),
        limit=limit,
        add_bos=str(AddBos.YES if begun else AddBos.NO),
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
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


def _mean(scores: Sequence[TaskScore]) -> float | None:
    """Mean accuracy, None if a task has none."""
    known = [score.acc for score in scores if score.acc is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise SolverNotInstalledError(
            "zero-shot tasks need lm-evaluation-harness: expected lm_eval to be installed, found none; "
            "run pip install 'sparseswaps[eval]'"
        )


def _causal_model(name: str, device: str, dtype: str, trust: Trust | None) -> LoadedModel:
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
        include_path=None if task_path is None else os.fspath(task_path), include_defaults=task_path is None
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


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile.

    Raises:
        InputError: if it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(f"file {path}: expected a place to write it, found {error}") from error
