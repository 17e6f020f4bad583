"""Routers of mixtures of experts: a handful of weights on which everything after them depends.

They are found by what they are, a linear map with one output for each expert of its mixture, or with one
output that gates a shared expert; and by the names that families give them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

NAMES = ("*router*", "*.gate", "*shared_expert_gate")


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts, one matrix each, in one parameter."""
    named = "expert" in type(module).__name__.lower() or hasattr(module, "is_transposed")
    return named and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def routers_in(block: nn.Module, name: str) -> set[str]:
    """Names of the routers in a block called ``name``."""
    linear = {
        path: module for path, module in block.named_modules(prefix=name) if isinstance(module, nn.Linear)
    }
    found = {path for path in linear if any(fnmatch.fnmatchcase(path, pattern) for pattern in NAMES)}
    for mixture in mixtures_in(block, name):
        for path, module in linear.items():
            if not path.startswith(f"{mixture.name}.") or path.startswith(f"{mixture.experts}."):
                continue
            if module.out_features in (1, mixture.count) and not _is_read(path, module, linear):
                found.add(path)
    return found


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        name: of the module around the experts.
        experts: name of what holds them.
        count: how many there are.
        fused: whether that holds one parameter for all.
    """

    name: str
    experts: str
    count: int
    fused: bool


def mixtures_in(block: nn.Module, name: str) -> Iterator[Mixture]:
    """Mixtures of experts in a block called ``name``."""
    for path, module in block.named_modules(prefix=name):
        around = path.rpartition(".")[0]
        if is_fused(module):
            count = max(p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3)
            yield Mixture(around, path, count, True)
        elif isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1 and path != name:
            each = module.values() if isinstance(module, nn.ModuleDict) else module
            kinds = {type(expert) for expert in each}
            if len(kinds) == 1 and any(isinstance(inner, nn.Linear) for inner in module.modules()):
                yield Mixture(around, path, len(module), False)


def _is_read(path: str, module: nn.Linear, linear: dict[str, nn.Linear]) -> bool:
    """Whether a linear layer beside it reads what this one gives, as in an MLP that happens to be narrow."""
    place = path.rpartition(".")[0]
    return any(
        other.in_features == module.out_features
        for name, other in linear.items()
        if name != path and name.rpartition(".")[0] == place
    )
