"""Models larger than memory: the weights of blocks stay in files, and one block at a time is in memory.

The files are the checkpoint's own, as transformers maps them for accelerate; weights that transformers
converts while it loads (experts of mixtures) go to a temporary folder. The system's file cache keeps in main
memory what fits there. Nothing is written back: what became of a layer is a change of its dense weight (a
mask, for instance), which is made again whenever the layer comes to memory. While a block computes, the next
one is read in a thread, in the direction in which they have come so far.

A block that is called outside of ``resident`` comes to memory for that call, so that any code can run the
model.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..errors import InvalidModelError
from .blocks import Block, PrunableLayer, find_blocks, stacks_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Change = Callable[[Tensor], Tensor]


class Residence:
    """Where the weights of a model's blocks are: here in the model, all the time."""

    offloaded: ClassVar[bool] = False

    def resident(self, block: Block) -> AbstractContextManager[None]:
        """The weights of ``block`` are in the model while this is open."""
        return nullcontext()

    def weight(self, layer: PrunableLayer) -> Tensor:
        """``W`` (rows, cols) as it is now, to look at."""
        return layer.weight

    def change(self, layer: PrunableLayer, change: Change) -> None:
        """``W`` becomes ``change(W)``, both (rows, cols), from now on.

        Args:
            layer: a layer as its model was loaded.
            change: of a weight in any dtype; for an offloaded layer it is called again and again.
        """
        layer.write(change(layer.weight))

    def restore(self, layers: Sequence[PrunableLayer], dense: Mapping[str, Tensor]) -> None:
        """``layers`` have their ``dense`` weights (rows, cols), by name, again."""
        for layer in layers:
            layer.write(dense[layer.name])


@final
class OffloadedBlocks(Residence):
    """Blocks whose weights are in files; in the model they are on the meta device.

    Args:
        model: its blocks' parameters are on the meta device, everything else is in memory.
        files: the blocks' parameters by name, read when asked for.
        device: where blocks come to.
        folder: of the weights that are in no checkpoint file; it is removed with this object.
    """

    offloaded: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        files: Mapping[str, Tensor],
        device: torch.device,
        folder: str,
    ) -> None:
        self._files = files
        self._device = device
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._blocks = find_blocks(model, routers=True)
        # of each parameter, by the names of the layers in it
        self._changes: dict[str, dict[str, tuple[PrunableLayer, Change]]] = {}
        self._edits = 0  # of changes, so that what is in memory is known to be out of date
        self._inside: set[str] = set()
        self._last: _Loaded | None = None
        self._number, self._step = -1, 1
        self._reader = _Reader(files, device)
        for block in self._blocks:
            block.module.__dict__["forward"] = self._loaded_for(block, block.module.forward)

    @contextmanager
    def resident(self, block: Block) -> Iterator[None]:
        """The weights of ``block`` are in memory while this is open; it may be opened again inside.

        The next block is read meanwhile, and the last one is not read again where it is the next one too.
        """
        if block.name in self._inside:
            yield
            return
        places = _places(block)
        loaded = self._loaded(block.name, {name: parameter.dtype for _, _, parameter, name in places})
        self._inside.add(block.name)
        try:
            for module, attribute, parameter, name in places:
                setattr(module, attribute, loaded[name].requires_grad_(parameter.requires_grad))
            yield
        finally:
            for module, attribute, parameter, _ in places:
                setattr(module, attribute, parameter)
            self._inside.discard(block.name)

    def _loaded(self, block: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, nn.Parameter]:
        """Parameters of a block on the device; what will be asked for next begins to be read."""
        if self._last is None or not self._last.is_still(block, self._edits):
            self._last = None  # one block at a time, beside what is read of the next
            found = {
                name: nn.Parameter(self._moved(self._changed(name, dense)), requires_grad=False)
                for name, dense in self._reader.read(block, dtypes).items()
            }
            self._last = _Loaded(block, found, self._edits)
        following = self._following(block)
        if following is not None and following.name not in self._inside:
            self._reader.begin(
                following.name, {name: parameter.dtype for _, _, parameter, name in _places(following)}
            )
        return self._last.parameters

    def _following(self, block: str) -> Block | None:
        """The block that comes next in the direction in which they have come so far, None behind the last."""
        number = next(i for i, each in enumerate(self._blocks) if each.name == block)
        if number != self._number:
            self._step = -1 if number == self._number - 1 else 1
        elif number in (0, len(self._blocks) - 1):  # a pass ended here, the next one begins
            self._step = 1 if number == 0 else -1
        self._number = number
        place = number + self._step
        return self._blocks[place] if 0 <= place < len(self._blocks) else None

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=self._device.type == "cuda")

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of a block's parameter with its layers as they are now, on the CPU."""
        return self._changed(name, self._files[name].to(dtype, copy=True))

    def _changed(self, name: str, dense: Tensor) -> Tensor:
        """A parameter as it came, with its layers as they are now."""
        for layer, change in self._changes.get(name, {}).values():
            weight = layer.within(dense)
            weight.copy_(change(weight))
        return dense

    def weight(self, layer: PrunableLayer) -> Tensor:
        """``W`` (rows, cols) as it is now, in the model's dtype."""
        return layer.within(self.parameter(layer.parameter_name, layer.weight.dtype))

    def dense(self, layer: PrunableLayer, dtype: torch.dtype) -> Tensor:
        """``W`` (rows, cols) as it came."""
        return layer.within(self._files[layer.parameter_name]).to(dtype)

    def change(self, layer: PrunableLayer, change: Change) -> None:
        """``W`` becomes ``change`` of the dense weight, instead of any change before."""
        self._changes.setdefault(layer.parameter_name, {})[layer.name] = layer, change
        self._edits += 1
        if not layer.weight.is_meta:
            layer.write(change(self.dense(layer, layer.weight.dtype).to(layer.weight.device)))

    def restore(self, layers: Sequence[PrunableLayer], dense: Mapping[str, Tensor]) -> None:
        """``layers`` are dense again, from the next time on that they come to memory."""
        self._edits += 1
        for layer in layers:
            self._changes.get(layer.parameter_name, {}).pop(layer.name, None)

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        sizes = [[p.numel() * p.element_size() for p in x.module.parameters()] for x in self._blocks]
        return max(sum(each) for each in sizes)

    @contextmanager
    def readable(self) -> Iterator[None]:
        """``save_pretrained`` reads the weights as they are now, for one file of the new model at a time."""
        from accelerate.hooks import attach_align_device_hook, remove_hook_from_module

        for block in self._blocks:
            dtypes = {f"{block.name}.{name}": p.dtype for name, p in block.module.named_parameters()}
            attach_align_device_hook(
                block.module,
                execution_device="cpu",
                offload=True,
                weights_map=_Current(self, dtypes),
                module_name=block.name,
            )
        try:
            yield
        finally:
            for block in self._blocks:
                remove_hook_from_module(block.module, recurse=True)

    def _loaded_for(self, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            with self.resident(block):
                return forward(*args, **kwargs)

        return loaded


def _places(block: Block) -> list[tuple[nn.Module, str, nn.Parameter, str]]:
    """Module, attribute, parameter and its name, of each parameter of a block; modules may share one."""
    places = []
    names: dict[int, str] = {}
    for path, module in block.module.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = ".".join(part for part in (block.name, path, attribute) if part)
            places.append((module, attribute, parameter, names.setdefault(id(parameter), name)))
    return places


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A block that was in memory last.

    Attributes:
        block: its name.
        parameters: by name, as they were then.
        edits: changes of layers until then.
    """

    block: str
    parameters: dict[str, nn.Parameter]
    edits: int
    versions: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        versions = {name: parameter._version for name, parameter in self.parameters.items()}
        object.__setattr__(self, "versions", versions)

    def is_still(self, block: str, edits: int) -> bool:
        """Whether this is the block, and nobody has changed it or written into it since."""
        written = any(self.parameters[name]._version != version for name, version in self.versions.items())
        return self.block == block and self.edits == edits and not written


class _Reader:
    """Reads blocks from their files, the next one while the present one computes.

    On its way to a CUDA device a block is in page-locked memory.
    """

    def __init__(self, files: Mapping[str, Tensor], device: torch.device) -> None:
        self._files = files
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._begun: tuple[str, Future[dict[str, Tensor]]] | None = None

    def begin(self, block: str, dtypes: Mapping[str, torch.dtype]) -> None:
        """``block`` will be asked for next: read it in a thread."""
        if self._begun is not None:
            if self._begun[0] == block:
                return
            self._begun[1].cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._begun = block, self._thread.submit(self._read, dtypes)

    def read(self, block: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Copies of the parameters of ``block`` by name, on the CPU."""
        begun, self._begun = self._begun, None
        if begun is not None:
            if begun[0] == block:
                return begun[1].result()
            begun[1].cancel()
        return self._read(dtypes)

    def _read(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        return {name: self._copied(self._files[name], dtype) for name, dtype in dtypes.items()}

    def _copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(dtype, copy=True)
        with torch.cuda.device(self._device):
            return torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor)


class _Current(Mapping[str, Tensor]):
    """Parameters of a block by name as they are now."""

    def __init__(self, blocks: OffloadedBlocks, dtypes: Mapping[str, torch.dtype]) -> None:
        self._blocks = blocks
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Tensor:
        return self._blocks.parameter(name, self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def load_offloaded(
    architecture: Any,
    skeleton: PreTrainedModel,
    config: PretrainedConfig,
    name: str,
    device: torch.device,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, Mapping[str, Tensor], str]:
    """A model with its blocks on the meta device, their parameters in files, and the folder of some of these.

    The folder is the caller's to remove.

    Args:
        architecture: class of the model.
        skeleton: the model on the meta device.
        config: of the model.
        name: directory or hub name.
        device: of everything outside the blocks.
        options: for ``from_pretrained``.

    Raises:
        InvalidModelError: if the model has no stack of blocks.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import OffloadedWeightsLoader

    blocks = {
        f"{stack}.{index}" for stack, modules in stacks_of(skeleton) if stack for index in range(len(modules))
    }
    if not blocks:
        raise InvalidModelError(f"offloading {name}: expected a model with a stack of blocks, found none")
    folder = tempfile.mkdtemp(prefix="sparseswaps-")
    try:
        places = _device_map(skeleton, "", blocks, str(device))
        with warnings.catch_warnings():  # it has names of parameters outside of the blocks too
            warnings.filterwarnings(
                "ignore", message="The following device_map keys do not match any submodule"
            )
            model = architecture.from_pretrained(
                name, config=config, dtype="auto", device_map=places, offload_folder=folder, **options
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    mapped = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None))
    remove_hook_from_module(model, recurse=True)
    return model, OffloadedWeightsLoader(mapped.state_dict, folder, mapped.index), folder


def _device_map(module: nn.Module, name: str, blocks: set[str], device: str) -> dict[str, str]:
    """Blocks on the disk, the rest on ``device``, by names of modules that hold no block or are one."""
    if name in blocks:
        return {name: "disk"}
    prefix = f"{name}." if name else ""
    if not any(block.startswith(prefix) for block in blocks):
        return {name: device}
    own: Sequence[tuple[str, Tensor]] = [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]
    found = {f"{prefix}{key}": device for key, _ in own}
    for key, child in module.named_children():
        found |= _device_map(child, f"{prefix}{key}", blocks, device)
    return found
