"""What a run will need before it begins: peak memory of host and device, and time.

A run is a sequence of stages: the weights are loaded, the model is evaluated, gradients for the output metric
are gathered, layers are pruned block by block, masks are refined, the result is saved and read again. Beside
the model each holds what ``_Stages`` counts; none of it grows with the number of blocks, but for the dense
weights of a model in memory, the moments of the output metric, in files beyond the limit of activations, and
what a backward pass keeps of every block. Logits are counted as they are made, a slice of tokens at a time or
whole (see ``calibration.logits``).

The announced peak of main memory is that of the whole process, so it includes what this process holds
already, its libraries above all. Time is the number of products of matrices over a rate that is measured for
a moment; it is rough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from ..calibration.gathering import batch_size_for, flow_batch_size, gradient_batch_size_for
from ..calibration.gradients import HISTORY_BYTES, MOMENT_BYTES, moment_bytes, moment_groups
from ..calibration.logits import slice_tokens, whole_windows
from ..calibration.targets import are_of_outputs
from ..errors import InputError
from ..evaluation.measures import evaluation_batch_size, is_causal
from ..machine import available_memory, duration, resident_memory, size
from ..models.blocks import Block, PrunableLayer, device_of, output_head, vocabulary_of
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from ..problems.layer import ROW_CHUNK
from ..problems.products import device_buffers, full_precision

GB = 1e9
# Bytes per entry of the widest layer's Gram matrix while its errors are measured: the matrix in float64,
# its correlation in float32, the matrix on held-out text and a triangle of it. Per entry of its weight while
# it is searched: weight, drift and cost in float64, weight in float32.
GRAM_BYTES, SEARCH_BYTES = 28, 36
# Per entry of logits: themselves and their logarithms; their gradient and that of the logarithms as well; the
# dense model's beside them.
EVALUATION_BYTES, GRADIENT_BYTES, DIVERGENCE_BYTES = 8, 16, 32
# The same of a device beside that: the search's own state, of some rows at a time; errors in float64, of some
# rows at a time, which are the lost weight, its product with the Gram matrix and the product of both.
KERNEL_BYTES, KERNEL_ROWS, ERROR_BYTES = 22, 4096, 24
# Per token and channel of a layer with drift: inputs of both models, their difference, one of them in range.
DRIFT_BYTES = 16
# Per token and channel of the residual stream: both streams, both in float64, their product, what is lost and
# what outputs are missing, as it is and in range.
RESIDUAL_BYTES = 44
# Per token and channel of each on a device: parts in half precision, and what is left of the last of them.
PARTS_BYTES = 10
# Share of the device's free memory in which activations stay, where all else leaves it.
ACTIVATION_SHARE = 0.25
# Per entry of an output metric while it is made and used: itself, the drift's covariance, products of errors.
METRIC_BYTES = 48
# Per entry of the widest Gram matrix while units are chosen: it and the ridged one, the inverse, what a swap
# would change and what that is made of, all in float64; per entry of the weight: itself, the target, the
# weights of least squares and products of these.
UNIT_GRAM_BYTES, UNIT_WEIGHT_BYTES = 80, 48
# What comes to main memory while layers are pruned on a processor: compiled loops and their compiler.
COMPILER_BYTES = 150 * 10**6
# Freed memory between other pieces that the C library keeps: this share of what is computed, until that is in
# pieces of more than 32 MiB, which it gives back.
KEPT_SHARE, MOST_KEPT = 0.25, 1 << 28
# What a pass of the pruned network runs again, where outputs of modules that are final are not kept.
PASSES = 1.5


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        held_out: held-out windows, as long as the calibration windows; 0 for none.
        evaluated: windows of the evaluation, of the same length too; 0 for none.
        drift: whether dense and pruned activations travel side by side.
        residual: whether sums for residual drift are gathered.
        metric: whether the output metric is gathered.
        whole_blocks: whether the sums of a whole block are held at a time.
        compared: windows on which the model's output chooses the strength of the drift.
        refined: whether masks are refined against the model's output.
        saved: whether the pruned model is saved.
        units: whether whole units go first, into a model of its own.
    """

    held_out: int = 0
    evaluated: int = 0
    drift: bool = False
    residual: bool = False
    metric: bool = False
    whole_blocks: bool = False
    compared: int = 0
    refined: bool = False
    saved: bool = False
    units: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        model_bytes: parameters and buffers that are in memory all the time, where the model computes.
        held_bytes: main memory that this process holds already, without the model.
        host_bytes: beside both, in main memory.
        device_bytes: beside the model, on the device; 0 where that is the CPU.
        activation_room: on the device for activations, those that need it among ``device_bytes``.
        seconds: of the layers, without evaluation, output metric, allocation and refinement.
    """

    model_bytes: int
    held_bytes: int
    host_bytes: int
    device_bytes: int
    seconds: float
    activation_room: int = 0

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of this process, in main memory."""
        return self.held_bytes + self.host_bytes + (0 if self.device_bytes else self.model_bytes)

    def __str__(self) -> str:
        model, held = f"model {size(self.model_bytes)}", f"held already {size(self.held_bytes)}"
        parts = f"{held}, beside it {size(self.host_bytes)}"
        if not self.device_bytes:
            parts = f"{held}, {model}, beside them {size(self.host_bytes)}"
        device = f"; on the device {model}, beside it {size(self.device_bytes)}"
        return (
            f"estimate: peak of {size(self.peak_bytes)} of main memory ({parts})"
            f"{device if self.device_bytes else ''}; {_about(self.seconds)} for the layers"
        )


def estimate(
    loaded: LoadedModel,
    blocks: Sequence[Block],
    windows: Samples,
    work: Work,
    *,
    ranks: int = 1,
    activation_limit: int | None = None,
    device: torch.device | None = None,
    offload: bool = False,
) -> Estimate:
    """What pruning ``blocks`` will need.

    Args:
        loaded: a model with its shapes, on the meta device too.
        blocks: of it, from ``find_blocks``.
        windows: calibration windows (windows, length).
        work: what the run computes.
        ranks: processes that share windows and rows.
        activation_limit: bytes of activations in main memory, the rest on disk; None for no limit.
        device: where it will run; where the model is by default.
        offload: whether the blocks' weights stay in files, but for one block's.
    """
    device = device or device_of(loaded.model)
    on_device = device.type != "cpu"
    stages = _Stages(loaded, blocks, windows, work, ranks, activation_limit, offload, on_device)
    flops = _flops(stages.layers, windows.numel(), work.drift, stages.stream, ranks)
    held = resident_memory()
    with_model = all(parameter.is_meta for parameter in loaded.model.parameters())
    if not on_device and not with_model:
        held = max(0, held - stages.model)
    host, beside = stages.peaks()
    free = free_memory(device)
    if free is not None:
        room = _activation_room(free - (stages.model if with_model else 0), beside)
        stages = replace(stages, room=room)
        host, beside = stages.peaks()
    return Estimate(stages.model, held, host, beside, flops / _rate(device), stages.room)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the memory of a CUDA device, None of another one."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _activation_room(free: int, needed: int) -> int:
    """Bytes in which activations stay on a device of which so much is free and needed for all else."""
    return max(0, min(int(ACTIVATION_SHARE * free), free - needed))


def require_memory(
    found: Estimate, device: torch.device, with_model: bool = False, offload: bool = False
) -> None:
    """Refuse a run that cannot fit.

    Args:
        found: what it will need.
        device: where it will run.
        with_model: whether the model is still to be loaded.
        offload: whether it will be offloaded.

    Raises:
        InputError: saying what is needed, what there is and what would help.
    """
    on_device = device.type != "cpu"
    model = found.model_bytes if with_model else 0
    pairs = [("main memory", found.host_bytes + (0 if on_device else model), available_memory())]
    free = free_memory(device)
    if free is not None:
        pairs.append((f"memory of {device}", found.device_bytes + model, free))
    what = "the model, activations, Gram matrices and search"
    if not with_model:
        what = "activations, Gram matrices and search beside the model"
    ways = (
        "fewer or shorter windows, sequential mode, no drift (--drift 0) or a limit of activations in memory "
        "need less"
    )
    if with_model and not offload:
        ways += ", and so does offloading"
    for name, needed, there in pairs:
        if there is not None and needed > there:
            raise InputError(
                f"{name}: expected {needed / GB:.2f} GB for {what}, found {there / GB:.2f} GB free; {ways}"
            )


@dataclass(frozen=True, eq=False)
class _Stages:
    """What each stage of a run holds beside the model, in bytes; arguments as for ``estimate``.

    A stage is a pair: what is kept in main memory, and what is computed, on the device where there is one.
    ``room`` is for activations that stay there.
    """

    loaded: LoadedModel
    blocks: Sequence[Block]
    windows: Samples
    work: Work
    ranks: int
    limit: int | None
    offload: bool
    on_device: bool
    room: int = 0

    def peaks(self) -> tuple[int, int]:
        """Of main memory and of the device, the latter 0 where that is the CPU."""
        stages = [self._pruning()]
        if self.work.evaluated:
            stages.append(self._evaluating())
        if self.work.metric:
            stages.append(self._metric())
        if self.work.refined:
            stages.append(self._refining())
        if self.on_device:
            # beside the block in memory the next one is read ahead
            host = self._dense + self._own + max(kept for kept, _ in stages)
            device = self._own + self.resident + max(computed for _, computed in stages)
            device += sum(self._of_blocks) if self.work.units else 0
        else:
            most = max(kept + _with_gaps(computed) for kept, computed in stages)
            host, device = self._dense + 2 * self._own + COMPILER_BYTES + most, 0
        return max(host, self._dense + self._saving(), self._loading()), device

    @cached_property
    def layers(self) -> list[PrunableLayer]:
        """All prunable layers."""
        return [layer for block in self.blocks for layer in block.layers]

    @cached_property
    def model(self) -> int:
        """Parameters and buffers that are in memory all the time."""
        return _bytes_of(self.loaded.model) - (sum(self._of_blocks) if self.offload else 0)

    @cached_property
    def stream(self) -> int:
        """Channels of the residual stream whose loss is gathered, 0 for none."""
        return self._hidden if self.work.residual else 0

    @cached_property
    def _dense(self) -> int:
        """The copy of the dense weights in the checkpoint's dtypes; none where they stay in files."""
        sizes = [
            layer.weight.numel() * self.loaded.dtypes.get(layer.parameter_name, layer.weight.dtype).itemsize
            for layer in self.layers
        ]
        if self.work.units:  # or the smaller model beside the dense one
            return max(sum(sizes), sum(self._of_blocks))
        return 0 if self.offload else sum(sizes)

    @cached_property
    def _own(self) -> int:
        """The block that is in memory, where the others stay in files."""
        return max(self._of_blocks) if self.offload else 0

    @cached_property
    def _of_blocks(self) -> list[int]:
        return [_bytes_of(block.module) for block in self.blocks]

    @cached_property
    def _hidden(self) -> int:
        size = getattr(getattr(self.loaded.model, "config", None), "hidden_size", None)
        return size if isinstance(size, int) else min(layer.weight.shape[1] for layer in self.layers)

    @cached_property
    def _element(self) -> int:
        return self.layers[0].weight.element_size()

    @cached_property
    def _widest(self) -> int:
        return max(max(layer.weight.shape) for layer in self.layers)

    @cached_property
    def _length(self) -> int:
        return self.windows.shape[1]

    @cached_property
    def _vocabulary(self) -> int:
        return vocabulary_of(self.loaded.model)

    @cached_property
    def _checkpoint(self) -> int:
        """The model in the checkpoint's dtypes."""
        tensors = [*self.loaded.model.named_parameters(), *self.loaded.model.named_buffers()]
        dtypes = self.loaded.dtypes
        return sum(tensor.numel() * dtypes.get(name, tensor.dtype).itemsize for name, tensor in tensors)

    def _kept(self, size: int) -> int:
        """What of so many bytes is in main memory and not in files."""
        return size if self.limit is None else min(size, self.limit)

    def _states(self, windows: int) -> int:
        """Hidden states of so many windows."""
        return windows * self._length * self._hidden * self._element

    @property
    def resident(self) -> int:
        """Activations that stay on the device."""
        return min(self.room, max(self._activations(), self._history))

    @cached_property
    def _history(self) -> int:
        """Activations of all blocks, and gradients, where these come to memory one by one in between."""
        if not (self.work.metric and self.offload):
            return 0
        return min(HISTORY_BYTES, len(self.blocks) * self._states(len(self.windows))) * 3 // 2

    def _activations(self) -> int:
        stacks = len({block.stack for block in self.blocks})
        streams = len(self.windows) * (2 if self.work.drift else 1) + self.work.held_out
        return self._states(streams) * stacks // self.ranks

    def _moments(self) -> tuple[int, int]:
        """Second moments of all layers, and the largest group of them that is gathered at a time."""
        groups = moment_groups(self.blocks, MOMENT_BYTES if self.limit is None else self.limit)
        sizes = [sum(moment_bytes(block) for block in group) for group in groups]
        return sum(sizes), max(sizes)

    def _forward(self, windows: int) -> int:
        """A forward pass inside a block."""
        states = windows * self._length * (6 * self._hidden + 3 * self._widest) * self._element
        config = getattr(self.loaded.model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if getattr(config, "_attn_implementation", None) != "eager" or not isinstance(heads, int):
            return states
        # scores, in float32 for their softmax, and what comes of it
        return states + windows * heads * self._length**2 * (4 + 2 * self._element)

    def _backward(self, windows: int) -> int:
        """A backward pass: the inputs of all blocks, what one of them keeps, and gradients beside it."""
        return len(self.blocks) * self._states(windows) + 3 * self._forward(windows)

    def _batch(self, most: int) -> int:
        """Windows of a pass that makes logits, at most ``most``."""
        whole = is_causal(self.loaded.model) and output_head(self.loaded.model) is None
        most = min(most, whole_windows(self._vocabulary, self._length)) if whole else most
        return min(most, len(self.windows))

    def _logits(self, windows: int, size: int) -> int:
        """Logits of a pass over so many windows, with ``size`` bytes per entry."""
        tokens = windows * self._length
        if output_head(self.loaded.model) is not None:
            tokens = min(tokens, slice_tokens(self._vocabulary))
        elif not is_causal(self.loaded.model):
            return 0
        return tokens * self._vocabulary * size

    def _evaluating(self) -> tuple[int, int]:
        windows = self._batch(evaluation_batch_size(self._length))
        kept = self._kept(self._states(self.work.evaluated) // self.ranks) if self.offload else 0
        return kept, self._forward(windows) + self._logits(windows, EVALUATION_BYTES)

    def _metric(self) -> tuple[int, int]:
        total, group = self._moments()
        windows = self._batch(gradient_batch_size_for(self._length))
        # without a device the group that is gathered is the one that is kept
        kept = self._kept((total if self.on_device else total - group) + self._history)
        passing = self._backward(windows) + self._logits(windows, GRADIENT_BYTES)
        if self.on_device:
            rows = max(layer.weight.shape[0] for layer in self.layers)
            # then each moment is made symmetric, beside its triangle
            passing = max(passing + device_buffers(rows), 8 * rows**2)
        return kept, group + passing

    def _pruning(self) -> tuple[int, int]:
        work = self.work
        rows = max(layer.weight.shape[0] for layer in self.layers)
        cols = max(layer.weight.shape[1] for layer in self.layers)
        sums = 8 * max(
            _sum_entries(block.layers, work.whole_blocks, work.drift, self.stream) for block in self.blocks
        )
        # sums of a part beside those of all parts, and calibration sums beside those of held-out text
        windows = flow_batch_size(len(self.windows), self._length)
        gathering = 2 * sums + self._gathering(windows, cols, work.drift)
        solving = sums
        if work.held_out:
            plain = 8 * max(_sum_entries(block.layers, work.whole_blocks, False, 0) for block in self.blocks)
            windows = flow_batch_size(work.held_out, self._length)
            gathering = max(gathering, sums + 2 * plain + self._gathering(windows, cols, drift=False))
            solving += plain
        solving += GRAM_BYTES * cols**2 + SEARCH_BYTES * rows * cols // self.ranks
        if self.on_device:
            solving += cols * (KERNEL_BYTES * min(rows, KERNEL_ROWS) + ERROR_BYTES * min(rows, ROW_CHUNK))
        if work.units:
            choosing = UNIT_GRAM_BYTES * cols**2 + UNIT_WEIGHT_BYTES * rows * cols
            solving = max(solving, sums + choosing)
        solving += METRIC_BYTES * rows**2 if work.metric else 0
        if work.compared:
            windows = min(work.compared, self._batch(batch_size_for(self._length)))
            solving += self._forward(windows) + self._logits(windows, DIVERGENCE_BYTES)
        weights = max(sum(x.weight.numel() for x in block.layers) for block in self.blocks) * self._element
        moments = self._moments()[0] if work.metric else 0
        outputs = self._states(work.compared + (len(self.windows) if work.refined else 0))
        kept = self._kept(self._activations() - self.resident + moments) + outputs
        return kept, max(gathering, solving) + 2 * weights

    def _gathering(self, windows: int, cols: int, drift: bool) -> int:
        """Beside sums, a pass over so many windows that adds to those of a layer of ``cols`` channels."""
        tokens = windows * self._length
        parts = PARTS_BYTES if self.on_device else 0
        channels = cols * (DRIFT_BYTES + parts) + self.stream * (RESIDUAL_BYTES + parts)
        beside = tokens * channels if drift else 0
        if not self.on_device:
            return self._forward(windows) + beside
        ahead = self._states(windows) * (2 if drift else 1)
        return self._forward(windows) + beside + ahead + device_buffers(max(cols, self.stream))

    def _refining(self) -> tuple[int, int]:
        total = sum(moment_bytes(block) for block in self.blocks)
        windows = self._batch(gradient_batch_size_for(self._length))
        outputs, stream = self._states(len(self.windows)), self._states(len(self.windows))
        weights = sum(layer.weight.numel() for layer in self.layers) * self._element
        computed = weights + self._backward(windows) + self._logits(windows, DIVERGENCE_BYTES)
        return outputs + stream + total, computed + (total if self.on_device else 0)

    def _loading(self) -> int:
        """Main memory beside the loaded model: the checkpoint, where that is converted or moved."""
        known = not any(parameter.is_meta for parameter in self.loaded.model.parameters())
        if known or self.offload or (not self.on_device and self._checkpoint == self.model):
            return 0
        return self._checkpoint

    def _saving(self) -> int:
        """Main memory beside the model: it is written in the checkpoint's dtypes and read again."""
        if not self.work.saved:
            return 0
        if self.offload:
            return 2 * max(self._of_blocks)
        return self._checkpoint if self.on_device else max(0, 2 * self._checkpoint - self.model)


def _with_gaps(computed: int) -> int:
    """What so many bytes of tensors, made and freed, take in main memory."""
    return computed + min(int(KEPT_SHARE * computed), MOST_KEPT)


def _bytes_of(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in [*module.parameters(), *module.buffers()])


def _groups(layers: Sequence[PrunableLayer]) -> dict[tuple[int, int, int | None], PrunableLayer]:
    """One layer for each parent module, width and expert: about the layers that share an input."""
    return {
        (hash(layer.name.rsplit(".", 1)[0]), layer.weight.shape[1], layer.expert): layer for layer in layers
    }


def _sum_sizes(layer: PrunableLayer, drift: bool, stream: int) -> int:
    """Entries of the sums of a layer's inputs, those for drift with them (see ``calibration.targets``)."""
    rows, cols = layer.weight.shape
    if drift and (rows == stream or are_of_outputs(rows, cols)):
        return cols**2 + (cols + rows) * rows
    return (3 if drift else 1) * cols**2


def _sum_entries(layers: Sequence[PrunableLayer], whole_blocks: bool, drift: bool, stream: int) -> int:
    """Entries of the sums that are held at a time."""
    if not layers:
        return 0
    groups = list(_groups(layers).values())
    if whole_blocks:
        return sum(_sum_sizes(layer, drift, stream) for layer in groups)
    experts: dict[str, int] = {}
    for layer in groups:
        family = layer.name.rsplit(".", 1)[0] if layer.expert is not None else layer.name
        experts[family] = experts.get(family, 0) + _sum_sizes(layer, drift, stream)
    return max(experts.values())


def _flops(layers: Sequence[PrunableLayer], tokens: int, drift: bool, stream: int, ranks: int) -> float:
    total = 0.0
    for layer in layers:
        rows, cols = layer.weight.shape
        total += (PASSES + (1 if drift else 0)) * 2 * rows * cols * tokens / ranks
        total += 2 * 3 * 2 * rows * cols**2 / ranks  # three products in float64, each worth two in float32
    for layer in _groups(layers).values():
        total += 2 * _sum_sizes(layer, drift, stream) * tokens / ranks
    return total


def _rate(device: torch.device) -> float:
    """Operations per second of a product of matrices in float32."""
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.rand(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        with full_precision():
            float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 1 else duration(seconds)
