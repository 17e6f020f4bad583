"""Which class of transformers reads a checkpoint.

The class is decided by the tensors and the model type. The name in ``architectures`` counts if such a class
exists for the model type; a class with a language-model head that reads tensors which the named one drops is
taken instead. Tensors are compared by transformers' own loading, on the meta device, which reads names and
shapes and no values.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidModelError
from .sources import Source, Trust, checkpoint_tensors, weight_options

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Transformers' tables of classes by model type: with a language-model head, with other heads, without.
_LANGUAGE_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
)
_OTHER_TABLES = (
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)
# Names of remote code's classes in a configuration, in the order in which they are looked for.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
# Buffers that old checkpoints hold although transformers computes them: nothing is lost with them.
_COMPUTED = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.(attn|attention|self_attn)\.(masked_)?bias$"
)


@dataclass(frozen=True, eq=False)
class Reading:
    """A class of transformers on a checkpoint.

    Attributes:
        architecture: the class.
        skeleton: the model on the meta device.
        missing: tensors that it needs and the checkpoint lacks.
        mismatched: tensors of another shape, with both shapes.
        unread: tensors that the checkpoint holds and the class drops.
    """

    architecture: Any
    skeleton: PreTrainedModel
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every tensor of the model is in the checkpoint."""
        return not self.missing and not self.mismatched


def choose_reading(source: Source, config: PretrainedConfig, trust: Trust) -> Reading:
    """The class that reads the checkpoint, with what it finds and drops.

    Raises:
        InvalidModelError: if no class reads it, tensors are missing or have other shapes, or several classes
            read it differently.
    """
    remote = _remote_class(config) if trust.remote_code else None
    named = remote or _named_class(config)
    if named is None:
        return require_whole(source, _guessed(source, config, trust))
    reading = require_whole(source, _read(source, named, config, trust))
    if reading.unread and remote is None:
        for other in _classes(config, _LANGUAGE_TABLES):
            better = None if other is named else _read(source, other, config, trust)
            if better is not None and better.whole and set(better.unread) < set(reading.unread):
                warnings.warn(
                    f"model {source.name}: its configuration names {named.__name__}, its tensors are those "
                    f"of {other.__name__}, which is loaded",
                    stacklevel=3,
                )
                return better
    return reading


def require_whole(source: Source, reading: Reading) -> Reading:
    """``reading``, if it lacks nothing.

    Raises:
        InvalidModelError: naming the first tensors that are missing or have another shape.
    """
    where = f"model {source.name}, {reading.architecture.__name__}"
    if reading.missing:
        raise InvalidModelError(
            f"{where}: expected all of its tensors, found none named {_some(reading.missing)}"
        )
    if reading.mismatched:
        raise InvalidModelError(
            f"{where}: expected the shapes of its configuration, found {_some(reading.mismatched)}"
        )
    return reading


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def tell_of_unread(source: Source, reading: Reading) -> None:
    """One line that names the tensors which the class drops."""
    if reading.unread:
        warnings.warn(
            f"model {source.name}: {reading.architecture.__name__} does not read {len(reading.unread)} "
            f"tensors of the checkpoint ({_some(reading.unread)}); not pruned, kept when saved",
            stacklevel=3,
        )


def _named_class(config: PretrainedConfig) -> Any | None:
    """The class that ``architectures`` names, if transformers has it for this model type."""
    import transformers

    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    return found if found.config_class is None or isinstance(config, found.config_class) else None


def _remote_class(config: PretrainedConfig) -> Any | None:
    """The automatic class behind which the checkpoint's own code is."""
    import transformers

    names = getattr(config, "auto_map", None) or {}
    found = [name for name in _AUTO_CLASSES if name in names]
    wanted = (getattr(config, "architectures", None) or [""])[0]
    found.sort(key=lambda name: str(names[name]).rpartition(".")[2] != wanted)
    return getattr(transformers, found[0]) if found else None


def _classes(config: PretrainedConfig, tables: Iterable[str]) -> Iterator[Any]:
    """Transformers' classes for a configuration, each once."""
    from transformers.models.auto import modeling_auto

    seen = set()
    for table in tables:
        mapping = getattr(modeling_auto, table, None)  # tables come and go with versions
        found = None if mapping is None else mapping.get(type(config), None)
        for each in found if isinstance(found, tuple) else (found,):
            if each is not None and each not in seen:
                seen.add(each)
                yield each


def _guessed(source: Source, config: PretrainedConfig, trust: Trust) -> Reading:
    """The class for a configuration whose ``architectures`` names none that transformers has."""
    wanted = ((getattr(config, "architectures", None) or [""])[0] or "").lower()
    candidates = list(_classes(config, (*_LANGUAGE_TABLES, *_OTHER_TABLES)))
    if source.file is not None:  # a language model, whose tensors have other names there
        candidates = candidates[:1]
    readings = [_read(source, each, config, trust) for each in candidates]
    whole = [reading for reading in readings if reading.whole]
    if not whole:
        if readings:
            return min(readings, key=lambda reading: len(reading.missing) + len(reading.mismatched))
        raise InvalidModelError(
            f"model {source.name}: expected a class of transformers for model type {config.model_type}, "
            "found none"
        )
    fewest = min(len(reading.unread) for reading in whole)
    best = [reading for reading in whole if len(reading.unread) == fewest]
    best = _preferred(source, config, best, wanted)
    shown = wanted and (getattr(config, "architectures", None) or [""])[0]
    warnings.warn(
        f"model {source.name}: its configuration names {shown or 'no class'}"
        f"{', which transformers does not have' if shown else ''}; by its tensors it is loaded as "
        f"{best[0].architecture.__name__}",
        stacklevel=4,
    )
    return best[0]


def _preferred(source: Source, config: PretrainedConfig, best: list[Reading], wanted: str) -> list[Reading]:
    """Readings that drop equally little, the likeliest first.

    A name that is spelled otherwise decides, then its ending; then names of tensors: those of a model that
    was saved with a head begin with the prefix of the model inside it.
    """

    def ending(name: str) -> str:
        found = re.search(r"(for[a-z0-9]+|lmheadmodel|model)$", name)
        return found.group(1) if found else ""

    prefix = f"{best[0].architecture.base_model_prefix}."
    inside = any(key.startswith(prefix) for each in best for key in each.skeleton.state_dict())
    headed = not inside or any(key.startswith(prefix) for key in checkpoint_tensors(source))
    masked = not getattr(config, "is_decoder", False)

    def key(reading: Reading) -> tuple[bool, bool, bool, bool]:
        name = reading.architecture.__name__.lower()
        return (
            name != wanted,
            not wanted or ending(name) != ending(wanted),
            name.endswith("model") and not name.endswith("lmheadmodel")
            if headed
            else not name.endswith("model"),
            name.endswith("formaskedlm") != masked
            and any(other.architecture.__name__.endswith("ForMaskedLM") for other in best),
        )

    return sorted(best, key=key)


def _read(source: Source, architecture: Any, config: PretrainedConfig, trust: Trust) -> Reading:
    """What ``architecture`` finds in the checkpoint, by names and shapes."""
    if source.file is not None:  # a .gguf file is read as a whole: what it lacks shows then
        with torch.device("meta"):
            return Reading(architecture, architecture._from_config(config), (), (), ())
    with silent_transformers(), _telling_all():
        skeleton, report = architecture.from_pretrained(
            source.place,
            config=config,
            dtype="auto",
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **weight_options(source, trust),
        )
    mismatched = tuple(
        f"{name} {tuple(found)} instead of {tuple(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    )
    unread = tuple(name for name in sorted(report["unexpected_keys"]) if not _COMPUTED.search(name))
    return Reading(architecture, skeleton, tuple(sorted(report["missing_keys"])), mismatched, unread)


@contextmanager
def _telling_all() -> Iterator[None]:
    """Tensors that a class says may be dropped in silence stay in transformers' report."""
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    adjust = base._adjust_missing_and_unexpected_keys

    def without_exceptions(model: Any, report: Any) -> None:
        model._keys_to_ignore_on_load_unexpected = set()
        adjust(model, report)

    base._adjust_missing_and_unexpected_keys = without_exceptions
    try:
        yield
    finally:
        base._adjust_missing_and_unexpected_keys = adjust


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No report and no progress bar of a reading that may be one of several."""
    from transformers.utils import logging

    chatter: Any = logging
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
