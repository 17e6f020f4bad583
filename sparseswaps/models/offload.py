"""Models larger than memory: the weights of blocks stay in files, and one block at a time is in memory.

The files are the checkpoint's own, as transformers maps them for accelerate; weights that transformers
converts while it loads (experts of mixtures) go to a temporary folder. The system's file cache keeps in main
memory what fits there. Nothing is written back: what became of a layer is a change of its dense weight (a
mask, for instance), which is made again whenever the layer comes to memory.

A block that is called outside of ``resident`` comes to memory for that call, so that any code can run the
model.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..errors import InputError, InvalidModelError
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
        self._inside: set[str] = set()
        for block in self._blocks:
            block.module.__dict__["forward"] = self._loaded_for(block, block.module.forward)

    @contextmanager
    def resident(self, block: Block) -> Iterator[None]:
        """The weights of ``block`` are in memory while this is open; it may be opened again inside."""
        if block.name in self._inside:
            yield
            return
        places = [
            (module, name, parameter, f"{block.name}.{path}.{name}" if path else f"{block.name}.{name}")
            for path, module in block.module.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        loaded: dict[int, nn.Parameter] = {}
        self._inside.add(block.name)
        try:
            for module, name, parameter, full_name in places:
                if id(parameter) not in loaded:  # two modules may share one
                    found = self.parameter(full_name, parameter.dtype).to(self._device)
                    loaded[id(parameter)] = nn.Parameter(found, requires_grad=parameter.requires_grad)
                setattr(module, name, loaded[id(parameter)])
            yield
        finally:
            for module, name, parameter, _ in places:
                setattr(module, name, parameter)
            self._inside.discard(block.name)

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of a block's parameter with its layers as they are now, on the CPU."""
        found = self._files[name].to(dtype, copy=True)
        for layer, change in self._changes.get(name, {}).values():
            weight = layer.within(found)
            weight.copy_(change(weight))
        return found

    def weight(self, layer: PrunableLayer) -> Tensor:
        """``W`` (rows, cols) as it is now, in the model's dtype."""
        return layer.within(self.parameter(layer.parameter_name, layer.weight.dtype))

    def dense(self, layer: PrunableLayer, dtype: torch.dtype) -> Tensor:
        """``W`` (rows, cols) as it came."""
        return layer.within(self._files[layer.parameter_name]).to(dtype)

    def change(self, layer: PrunableLayer, change: Change) -> None:
        """``W`` becomes ``change`` of the dense weight, instead of any change before."""
        self._changes.setdefault(layer.parameter_name, {})[layer.name] = layer, change
        if not layer.weight.is_meta:
            layer.write(change(self.dense(layer, layer.weight.dtype).to(layer.weight.device)))

    def restore(self, layers: Sequence[PrunableLayer], dense: Mapping[str, Tensor]) -> None:
        """``layers`` are dense again, from the next time on that they come to memory."""
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


def require_accelerate() -> None:
    """Raise ``InputError`` where the library that maps checkpoints is missing."""
    if find_spec("accelerate") is None:
        raise InputError(
            "offloading needs the library accelerate: expected it installed, found none; "
            "run pip install 'sparseswaps[offload]'"
        )


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
