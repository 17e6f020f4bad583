"""How good a model is on a text, in one call."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..calibration.windows import Windows, evaluation_windows, for_model, window_length
from ..errors import InputError
from ..masks.saving import SETTINGS_FILE
from ..models.loading import LoadedModel, check_dtype, load_model, resolve_device
from ..models.sources import Trust
from .beginning import AddBos, Beginning, begun_windows
from .measures import compared_output, is_causal, mean_cosine
from .quality import model_embeddings, model_perplexity

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        model: directory or name.
        windows: of the text, each ``length`` tokens long.
        beginning: whether they begin with the beginning-of-text token, and why.
        perplexity: of a causal model on text; cosine: for the others the mean cosine of pooled embeddings to
            the reference's, compared: the output that they are made of.
    """

    model: str
    windows: Windows
    length: int | None
    beginning: Beginning
    perplexity: float | None
    cosine: float | None
    compared: str | None


def evaluate(
    model: str | os.PathLike[str] | LoadedModel,
    evaluation: str | os.PathLike[str] | Windows,
    *,
    reference: str | os.PathLike[str] | LoadedModel | None = None,
    length: int | None = None,
    evaluation_limit: int | None = None,
    add_bos: AddBos | str = AddBos.AUTO,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    trust: Trust | None = None,
    stage: Stage | None = None,
) -> Evaluation:
    """Perplexity of a causal model, or cosine of an encoder's embeddings to those of a reference.

    Args:
        model: directory, hub name or a loaded model.
        evaluation: text, token file, dataset or file of inputs (see ``calibration.windows``), or windows.
        reference: dense model that an encoder, or a model that is given no text, is compared with.
        length: tokens per window, 2048 by default, at most what the model's positions allow.
        evaluation_limit: use only so many windows; all by default.
        add_bos: whether windows begin with the beginning-of-text token: ``yes``, ``no``, or ``auto``: as when
            the model was pruned, where its directory says so, else what the model's loss says (see
            ``evaluation.beginning``).
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the computation; ``auto`` is float32 on a CPU, else the checkpoint's.
        offload: leave the weights in the checkpoint's files, one block at a time in memory.
        trust: what of the checkpoint may run code; nothing by default.
        stage: told how far it is: (what, done, total).

    Raises:
        InputError: for anything that cannot be used, and for an encoder without a reference.
    """
    asked = AddBos.read(add_bos)
    target = resolve_device(device)
    check_dtype(dtype)
    for name, value, least in (("length", length, 2), ("evaluation limit", evaluation_limit, 1)):
        if value is not None and value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}")

    def loaded_from(source: str | os.PathLike[str] | LoadedModel) -> LoadedModel:
        return (
            source
            if isinstance(source, LoadedModel)
            else load_model(source, target, dtype, offload, trust=trust)
        )

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, total: None if stage is None else stage(what, done, total)

    loaded = loaded_from(model)
    tokens = window_length(loaded, length, evaluation)
    causal = is_causal(loaded.model)
    if not (causal and tokens) and reference is None:
        what = "no text is given" if causal else "is an encoder"
        raise InputError(f"model {loaded.source} {what}: expected --reference DENSE_MODEL, found none")

    def cut(bos: bool) -> Windows:
        windows = evaluation
        if not isinstance(windows, Windows):
            windows = evaluation_windows(
                windows, loaded.tokenizer, tokens, evaluation_limit, special_tokens=not causal, bos=bos
            )
        elif bos:
            windows = windows.with_bos(loaded.tokenizer)
        return for_model(windows, loaded)

    known = _recorded(loaded.source) if asked is AddBos.AUTO and causal else None
    windows, beginning = begun_windows(loaded, known or asked, cut)
    if known is not None:
        beginning = replace(beginning, reason=f"as {SETTINGS_FILE} of the model says")
    perplexity = cosine = compared = None
    if causal and isinstance(windows.tokens, Tensor):
        perplexity = model_perplexity(loaded, windows.tokens, report("perplexity"))
    elif reference is not None:
        cosine = mean_cosine(
            model_embeddings(loaded, windows.tokens, report("embeddings")),
            model_embeddings(loaded_from(reference), windows.tokens, report("reference")),
        )
        compared = compared_output(loaded.model, windows.tokens)
    return Evaluation(loaded.source, windows, tokens, beginning, perplexity, cosine, compared)


def _recorded(source: str) -> AddBos | None:
    """What was decided when the model of a directory was pruned, None if nothing there says so."""
    try:
        settings = tomllib.loads((Path(source) / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = settings.get("add_bos")
    return AddBos(found) if found in (AddBos.YES, AddBos.NO) else None
