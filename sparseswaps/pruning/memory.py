"""What a run will need before it begins: peak memory of host and device, and time.

Pruning block by block holds, beside the model, the activations of the calibration windows at one block (twice
with drift), the sums of one step (each Gram matrix twice, see ``gathering``), and what a search needs on the
widest layer; none of these grows with the number of blocks. A model in memory also has a copy of its dense
weights, and the output metric second moments of every layer, in files beyond the limit of activations.

The estimate counts tensors, not what libraries and allocators add, and so is a little low. Time is the number
of products of matrices over a rate that is measured for a moment; it is rough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.gradients import MOMENT_BYTES, moment_bytes, moment_groups
from ..errors import InputError
from ..machine import available_memory
from ..models.blocks import Block, PrunableLayer, device_of

GB = 1e9
# Bytes per entry of the widest layer's Gram matrix and weight while it is searched: the matrix and its
# correlation in float64, the correlation in float32; weight, drift and cost in float64, weight in float32.
GRAM_BYTES, SEARCH_BYTES = 20, 36
# A forward pass to step k of n runs the block up to there; then once more, to advance.
PASSES = 3.5


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        model_bytes: parameters and buffers that are in memory all the time, where the model computes.
        host_bytes: beside the model, in main memory.
        device_bytes: beside the model, on the device; 0 where that is the CPU.
        seconds: of the layers, without evaluation, output metric, allocation and refinement.
    """

    model_bytes: int
    host_bytes: int
    device_bytes: int
    seconds: float

    def __str__(self) -> str:
        where = f", {self.device_bytes / GB:.2f} GB on the device" if self.device_bytes else ""
        return (
            f"estimate: model {self.model_bytes / GB:.2f} GB, beside it {self.host_bytes / GB:.2f} GB of "
            f"main memory{where}, about {_duration(self.seconds)} for the layers"
        )


def estimate(
    model: nn.Module,
    blocks: Sequence[Block],
    windows: Tensor,
    held_out: int,
    drift: bool,
    residual: bool,
    metric: bool,
    one_shot: bool,
    ranks: int = 1,
    activation_limit: int | None = None,
    device: torch.device | None = None,
    offload: bool = False,
) -> Estimate:
    """What pruning ``blocks`` will need.

    Args:
        model: any with its shapes, on the meta device too.
        blocks: from ``find_blocks``.
        windows: calibration windows (windows, length).
        held_out: held-out windows of the same length.
        drift: whether dense and pruned activations travel side by side.
        residual: whether sums for residual drift are gathered.
        metric: whether the output metric is gathered.
        one_shot: whether the sums of a whole block are held at a time.
        ranks: processes that share windows and rows.
        activation_limit: bytes of activations in main memory, the rest on disk; None for no limit.
        device: where it will run; where the model is by default.
        offload: whether the blocks' weights stay in files, but for one block's.
    """
    device = device or device_of(model)
    length = windows.shape[1]
    hidden = _hidden_size(model, blocks)
    layers = [layer for block in blocks for layer in block.layers]
    widest = max(layers, key=lambda layer: layer.weight.shape[1])
    rows = max(layer.weight.shape[0] for layer in layers)
    cols = widest.weight.shape[1]
    element = layers[0].weight.element_size()
    streams = len({block.stack for block in blocks}) * (2 if drift else 1)
    activations = (len(windows) + held_out) * length * hidden * element * streams // ranks
    moments = sum(moment_bytes(block) for block in blocks) if metric else 0
    stored = activations + moments
    if activation_limit is not None:
        stored = min(stored, activation_limit)
    groups = moment_groups(blocks, MOMENT_BYTES if activation_limit is None else activation_limit)
    gathered = max(sum(moment_bytes(block) for block in group) for group in groups) if metric else 0
    copies = 2 + (1 if held_out else 0)
    stream = hidden if residual else 0
    sums = max(_sum_entries(block.layers, one_shot, drift, stream) for block in blocks) * 8 * copies
    search = GRAM_BYTES * cols**2 + SEARCH_BYTES * rows * cols // ranks
    block_weights = max(sum(x.weight.numel() * element for x in block.layers) for block in blocks)
    whole = [_bytes_of(block.module) for block in blocks]
    model_bytes = _bytes_of(model) - (sum(whole) if offload else 0)
    tokens = min(8192, len(windows) * length)
    forward = tokens * (6 * hidden + 3 * max(rows, cols)) * element
    dense = 0 if offload else sum(layer.weight.numel() * element for layer in layers)
    # the moments of a group are gathered before the first layer is searched
    beside = max(gathered, sums + search + 2 * block_weights) + forward + (max(whole) if offload else 0)
    flops = _flops(layers, len(windows) * length, drift, stream, ranks)
    on_device = device.type != "cpu"
    return Estimate(
        model_bytes,
        stored + dense + (0 if on_device else beside),
        beside if on_device else 0,
        flops / _rate(device),
    )


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
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
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


def _bytes_of(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in [*module.parameters(), *module.buffers()])


def _hidden_size(model: nn.Module, blocks: Sequence[Block]) -> int:
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(size, int):
        return size
    return min(layer.weight.shape[1] for block in blocks for layer in block.layers)


def _groups(layers: Sequence[PrunableLayer]) -> dict[tuple[int, int, int | None], PrunableLayer]:
    """One layer for each parent module, width and expert: about the layers that share an input."""
    return {
        (hash(layer.name.rsplit(".", 1)[0]), layer.weight.shape[1], layer.expert): layer for layer in layers
    }


def _sum_sizes(layer: PrunableLayer, drift: bool, stream: int) -> int:
    """Entries of the sums of a layer's inputs, with residual ones if it is as high as the stream."""
    rows, cols = layer.weight.shape
    residual = (2 * cols + stream) * stream if rows == stream else 0
    return (3 if drift else 1) * cols**2 + residual


def _sum_entries(layers: Sequence[PrunableLayer], one_shot: bool, drift: bool, stream: int) -> int:
    """Entries of the sums that are held at a time."""
    if not layers:
        return 0
    groups = list(_groups(layers).values())
    if one_shot:
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
        total += PASSES * (2 if drift else 1) * 2 * rows * cols * tokens / ranks
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
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
