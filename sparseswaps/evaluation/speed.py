"""How fast a model is and how much room it takes, beside another one, measured on the machine it will run on.

*Prefill* is one forward pass over a prompt, *decode* what follows it token by token with the cache of keys
and values (models without one have no decode). Models take turns, round after round, so that what else the
machine does meets both: a ratio is the geometric mean over rounds, with a 95 % interval of Student's t on its
logarithm. Prompts are random tokens: what they say changes nothing in the time of a dense model.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from ..errors import InputError
from ..machine import versions
from ..models.blocks import device_of, max_length, token_embeddings
from ..models.inputs import forward_inputs, takes
from ..models.loading import LoadedModel, check_dtype, load_model, resolve_device
from ..models.sources import Trust, weight_files
from .measures import is_causal

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        prompt: tokens of a prompt.
        new: tokens that are decoded behind it.
        batch: prompts at a time.
        rounds: how often each model is measured, after one that is not counted.
        threads: of the processor, 0 for as many as torch takes.
        seed: of the tokens.
    """

    prompt: int = 512
    new: int = 64
    batch: int = 1
    rounds: int = 7
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        leasts = (("prompt", 1), ("new", 1), ("batch", 1), ("rounds", 2), ("threads", 0), ("seed", 0))
        for name, least in leasts:
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} of a measurement: expected at least {least}, found {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Speed:
    """What was measured of one model.

    Attributes:
        model: directory or name.
        parameters: numbers in its weights, shared ones once.
        weights_mb: what they take in memory, in 10⁶ bytes.
        files_mb: size of its weight files; None if they are not on this machine.
        prefill: tokens per second of each round.
        decode: the same; empty for a model that does not decode.
        device_mb: most memory in use on a CUDA device; None elsewhere.
    """

    model: str
    parameters: int
    weights_mb: float
    files_mb: float | None
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    device_mb: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a model is as another, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SpeedReport:
    """What ``bench`` found: the model first, the other one behind it, if there is one."""

    workload: Workload
    device: str
    dtype: str
    threads: int
    speeds: tuple[Speed, ...]

    @property
    def prefill_ratio(self) -> Ratio | None:
        """Of the first model's tokens per second to the other's."""
        return self._ratio([speed.prefill for speed in self.speeds])

    @property
    def decode_ratio(self) -> Ratio | None:
        """The same of decoding; None if either does not."""
        return self._ratio([speed.decode for speed in self.speeds])

    def to_json(self) -> dict[str, Any]:
        """Plain values, with versions."""
        ratios = {"prefill_ratio": self.prefill_ratio, "decode_ratio": self.decode_ratio}
        found = {name: None if each is None else asdict(each) for name, each in ratios.items()}
        return {**asdict(self), **found, "versions": versions()}

    def _ratio(self, rounds: Sequence[Sequence[float]]) -> Ratio | None:
        return ratio_of(*rounds) if len(rounds) == 2 and all(rounds) else None


def ratio_of(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """Ratio of paired rates, at least two rounds."""
    logs = [math.log(a / b) for a, b in zip(ours, others, strict=True)]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((each - mean) ** 2 for each in logs) / (len(logs) - 1) / len(logs))
    reach = float(stats.t.ppf(0.975, len(logs) - 1)) * spread
    return Ratio(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach))


def bench(
    model: str | os.PathLike[str] | LoadedModel,
    against: str | os.PathLike[str] | LoadedModel | None = None,
    workload: Workload | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust: Trust | None = None,
    stage: Stage | None = None,
) -> SpeedReport:
    """Tokens per second, memory and file size of a model, and how it compares with another one.

    Args:
        model: directory, hub name or a loaded model.
        against: the other one, such as the dense model.
        workload: prompt, tokens, rounds.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the computation; ``auto`` is float32 on a CPU, else the checkpoint's.
        trust: what of a checkpoint may run code; nothing by default.
        stage: told how far it is: (what, done, total).

    Raises:
        InputError: for a model that takes no text, or a workload that its positions do not allow.
    """
    workload = workload or Workload()
    target = resolve_device(device)
    check_dtype(dtype)
    loaded = [
        each if isinstance(each, LoadedModel) else load_model(each, target, dtype, trust=trust)
        for each in (model, against)
        if each is not None
    ]
    for each in loaded:
        _check(each, workload)
    prefill: list[list[float]] = [[] for _ in loaded]
    decode: list[list[float]] = [[] for _ in loaded]
    peaks: list[float | None] = [None for _ in loaded]
    with _threads(workload.threads):
        threads = torch.get_num_threads()
        for number in range(workload.rounds + 1):
            for place, each in enumerate(loaded):
                rates, peak = _round(each, workload)
                if number:  # the first one warms up
                    prefill[place].append(rates[0])
                    decode[place] += rates[1:]
                    peaks[place] = peak
            if stage is not None:
                stage("rounds", number, workload.rounds)
    speeds = tuple(
        Speed(
            each.source,
            sum(parameter.numel() for parameter in each.model.parameters()),
            sum(parameter.nbytes for parameter in each.model.parameters()) / 1e6,
            _files_mb(each),
            tuple(prefill[place]),
            tuple(decode[place]),
            peaks[place],
        )
        for place, each in enumerate(loaded)
    )
    return SpeedReport(workload, target.type, str(loaded[0].model.dtype), threads, speeds)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(loaded: LoadedModel, workload: Workload) -> None:
    """Whether the model takes a text as long as the workload."""
    if not takes(loaded.model, "input_ids") or token_embeddings(loaded.model) is None:
        raise InputError(
            f"model {loaded.source}: expected one that takes tokens, found inputs of another kind"
        )
    most = max_length(loaded.model)
    length = workload.prompt + (workload.new if is_causal(loaded.model) else 0)
    if most is not None and length > most:
        raise InputError(
            f"model {loaded.source}: expected at most {most} tokens, as its positions allow, found {length} "
            "(prompt and new ones)"
        )


def _round(loaded: LoadedModel, workload: Workload) -> tuple[list[float], float | None]:
    """Tokens per second of prefill and, of a causal model, decoding; most memory on a CUDA device."""
    model: Any = loaded.model
    device = device_of(model)
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.batch, workload.prompt)
    prompt = torch.randint(token_embeddings(model) or 1, shape, generator=generator).to(device)
    inputs = forward_inputs(model, prompt)
    causal = is_causal(model)
    if causal:
        last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        inputs |= {"use_cache": True, **last}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        seconds, output = _timed(lambda: model(**inputs), device)
        rates = [prompt.numel() / seconds]
        if causal and _cache_of(output) is not None:
            seconds, _ = _timed(lambda: _decode(model, output, workload.new), device)
            rates.append(workload.batch * workload.new / seconds)
    return rates, torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def _decode(model: Any, output: Any, new: int) -> None:
    """Greedy tokens behind a prompt."""
    name = "cache" if takes(model, "cache") else "past_key_values"
    for _ in range(new):
        token: Tensor = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, **{name: _cache_of(output)}, use_cache=True)


def _cache_of(output: Any) -> Any:
    """Keys and values, by the name that the version of transformers has for them."""
    return output.get("cache", output.get("past_key_values"))


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, found


def _files_mb(loaded: LoadedModel) -> float | None:
    """Size of the weight files, None if nobody knows where they are."""
    folder = None if loaded.origin is None else loaded.origin.folder
    if loaded.origin is None or folder is None:
        return None
    files = weight_files(folder) if loaded.origin.file is None else [folder / loaded.origin.file]
    return sum(file.stat().st_size for file in files) / 1e6 or None
