"""Hugging Face models as a list of blocks of prunable linear layers.

Nothing here knows a model family. Blocks are the members of the outermost ``ModuleList``s that hold
linear layers (decoder or encoder stacks); prunable are ``nn.Linear``, GPT-2's ``Conv1D`` and the
fused three-dimensional expert weights of mixtures of experts. Embeddings and output heads stay dense,
because they are outside the stacks, and so do routers (see ``routers``).
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidModelError
from .routers import is_fused, routers_in

ModelKind = Literal["causal", "seq2seq", "encoder"]


# What tables of learned positions are called, among the modules beside the token embeddings.
_POSITIONS = re.compile(r"(embed_)?(position|positions|pos)(_emb\w*)?|wpe")


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """One linear map inside a block.

    Attributes:
        name: dotted name in the model, with the expert's number at the end for fused experts.
        block: index of its block in forward order.
        module: the module that holds the weight.
        parameter: name of the parameter in ``module``.
        transposed: whether the parameter is stored (cols, rows), as in ``Conv1D``.
        expert: index into a fused parameter (experts, ., .), or None.
    """

    name: str
    block: int
    module: nn.Module
    parameter: str
    transposed: bool
    expert: int | None = None

    @property
    def parameter_name(self) -> str:
        """Dotted name of the parameter in the model."""
        return f"{self.name}.{self.parameter}" if self.expert is None else self.name.rpartition(".")[0]

    @property
    def stored(self) -> Tensor:
        """The weight as it is stored, a view into the parameter."""
        parameter: Tensor = getattr(self.module, self.parameter).detach()
        return parameter if self.expert is None else parameter[self.expert]

    @property
    def weight(self) -> Tensor:
        """``W`` (rows, cols), a view: writing to it changes the model."""
        return self.within(getattr(self.module, self.parameter).detach())

    def within(self, parameter: Tensor) -> Tensor:
        """``W`` (rows, cols), a view into the parameter that holds it."""
        stored = parameter if self.expert is None else parameter[self.expert]
        return stored.T if self.transposed else stored

    def write(self, weight: Tensor) -> None:
        """Replace the weight (rows, cols) in place."""
        with torch.no_grad():
            self.weight.copy_(weight)

    @property
    def kind(self) -> str:
        """Type of the layer inside its block, such as ``q_proj``: the last word of its name."""
        return next(part for part in reversed(self.name.split(".")) if not part.isdigit())


@dataclass(frozen=True, eq=False)
class Block:
    """One repeated block of a stack.

    Attributes:
        name: dotted name, such as ``model.layers.3``.
        stack: index of the stack that it belongs to (encoder, decoder).
        module: the block itself.
        layers: its prunable layers, in module order.
    """

    name: str
    stack: int
    module: nn.Module
    layers: tuple[PrunableLayer, ...]


def find_blocks(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), routers: bool = False
) -> list[Block]:
    """Blocks of ``model`` with their prunable layers, in module order.

    Args:
        model: any decoder, encoder or encoder-decoder.
        include: shell patterns of layer names; empty means all.
        exclude: shell patterns of layer names that stay dense.
        routers: whether routers, which stay dense as well, count as layers.

    Raises:
        InvalidModelError: if nothing prunable is found.
    """
    blocks: list[Block] = []
    seen: set[tuple[int, tuple[int, ...], int]] = set()
    for stack, (stack_name, modules) in enumerate(stacks_of(model)):
        for index, module in enumerate(modules):
            name = "" if module is model else f"{stack_name}.{index}" if stack_name else str(index)
            layers = []
            dense = set() if routers else routers_in(module, name)
            for layer in _layers_of(module, name, len(blocks)):
                stored = layer.stored
                # parameters of an offloaded model have no storage: there a tied one is the same object
                place = id(getattr(layer.module, layer.parameter)) if stored.is_meta else stored.data_ptr()
                identity = (place, tuple(stored.shape), int(stored.storage_offset()))
                chosen = (not include or _matches(layer.name, include)) and not (
                    _matches(layer.name, exclude) or layer.name in dense
                )
                # a tied weight is the same storage under a second name
                if chosen and identity not in seen:
                    seen.add(identity)
                    layers.append(layer)
            blocks.append(Block(name, stack, module, tuple(layers)))
    if not any(block.layers for block in blocks):
        raise InvalidModelError(
            f"{type(model).__name__} has no layer to prune: expected linear layers in a stack of blocks "
            f"that match include {list(include) or ['*']} and not exclude {list(exclude)}, beside routers, "
            "found none"
        )
    return blocks


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def passed_over(
    blocks: Sequence[Block], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, str]:
    """Matrices in blocks that are no layers of them, by name, and why: they stay dense.

    Args:
        blocks: from ``find_blocks``.
        include: as it was given there.
        exclude: as it was given there.
    """
    pruned = {layer.name for block in blocks for layer in block.layers}
    found: dict[str, str] = {}
    for block in blocks:
        layers = list(_layers_of(block.module, block.name, 0))
        routers = routers_in(block.module, block.name)
        for layer in layers:
            if layer.name in pruned:
                continue
            if layer.name in routers:
                found[layer.name] = "router"
            elif _matches(layer.name, exclude):
                found[layer.name] = "excluded"
            elif include and not _matches(layer.name, include):
                found[layer.name] = "not included"
            else:
                found[layer.name] = "tied to another layer"
        known = {id(getattr(layer.module, layer.parameter)) for layer in layers}
        for name, parameter in block.module.named_parameters(prefix=block.name):
            if parameter.ndim > 1 and id(parameter) not in known:
                found[name] = "not a linear layer"
    return found


def stacks_of(model: nn.Module) -> list[tuple[str, Sequence[nn.Module]]]:
    """Outermost lists of blocks that hold linear layers; the whole model as one block if none.

    A list of lists is no stack, for nobody calls its members; those are stacks.
    """
    stacks: list[tuple[str, Sequence[nn.Module]]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer, _ in stacks):
            continue
        if not isinstance(module, nn.ModuleList) or any(isinstance(part, nn.ModuleList) for part in module):
            continue
        if any(True for _ in _layers_of(module, name, 0)):
            stacks.append((name, list(module)))
    return stacks or [("", [model])]


def _layers_of(module: nn.Module, prefix: str, block: int) -> Iterable[PrunableLayer]:
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear):
            yield PrunableLayer(name, block, child, "weight", transposed=False)
        elif type(child).__name__ == "Conv1D" and getattr(child, "weight", None) is not None:
            yield PrunableLayer(name, block, child, "weight", transposed=True)
        elif is_fused(child):
            for parameter, values in child.named_parameters(recurse=False):
                if values.ndim == 3:
                    transposed = bool(getattr(child, "is_transposed", False))
                    for expert in range(values.shape[0]):
                        yield PrunableLayer(
                            f"{name}.{parameter}.{expert}", block, child, parameter, transposed, expert
                        )


def model_kind(model: nn.Module) -> ModelKind:
    """What the model computes: next-token logits, a sequence from a sequence, or embeddings."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "causal"
    return "encoder"


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes a model's logits after all blocks, None where there is none."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Module):
        return None
    blocks = [block for _, stack in stacks_of(model) for block in stack]
    return None if any(head is module for block in blocks for module in block.modules()) else head


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model knows: entries of its logits of one token."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else 1 << 15


def max_length(model: nn.Module) -> int | None:
    """The longest window of tokens that the model's positions allow, or None if it says nothing.

    The smallest of what the configuration states and of what the tables of learned positions beside its token
    embeddings hold, which may begin behind an offset or behind the padding token's position.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    lengths = [value for value in stated if isinstance(value, int) and value > 0]
    return min(lengths + _table_lengths(model), default=None)


def _table_lengths(model: nn.Module) -> list[int]:
    """For each table of positions beside one of token embeddings, how many tokens it has a position for."""
    tokens = token_embeddings(model)
    found = []
    for module in model.modules() if tokens is not None else ():
        tables = {name: part for name, part in module.named_children() if "Embedding" in type(part).__name__}
        sizes = {
            name: len(w) for name, x in tables.items() if isinstance(w := getattr(x, "weight", None), Tensor)
        }
        if tokens not in sizes.values():
            continue
        for name, size in sizes.items():
            if _POSITIONS.fullmatch(name):
                padding = getattr(tables[name], "padding_idx", None)
                offset = getattr(tables[name], "offset", 0 if padding is None else padding + 1)
                found.append(size - int(offset))
    return found


def token_embeddings(model: nn.Module) -> int | None:
    """How many tokens a model that takes tokens has embeddings for, or None if it does not say so."""
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # a model of several kinds of inputs
        size = None
    config: Any = getattr(model, "config", None)
    if size is None and hasattr(config, "get_text_config"):
        size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def check_finite(blocks: Sequence[Block]) -> None:
    """Raise ``InvalidModelError`` naming the first layer whose weight holds NaN or Inf."""
    for block in blocks:
        for layer in block.layers:
            bad = int((~torch.isfinite(layer.stored)).sum())
            if bad:
                raise InvalidModelError(
                    f"weight of layer {layer.name}: expected finite values, found {bad} NaN or Inf"
                )


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: where its weights are that are not offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's bytes, (rows, cols) row by row, in its own dtype."""
    values = weight.detach().cpu().contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
