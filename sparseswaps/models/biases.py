"""A model with biases that its configuration can have and did not, all zero: it computes the same.

Which keys give them is found by trying: transformers builds the model without weights with flags of the
configuration on whose names speak of a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidModelError
from .blocks import PrunableLayer
from .loading import LoadedModel
from .shrinking import all_tensors, built
from .units import bias_of

# Flags that are on together at most, such as one for attention and one for MLPs.
_MOST_FLAGS = 2


def with_biases(loaded: LoadedModel, layers: Sequence[PrunableLayer]) -> LoadedModel:
    """The model with a bias in each of ``layers``; the same one where all have it.

    Tensors are shared; the biases that are new, those of other layers too, are zero.

    Args:
        loaded: the model, with its weights in memory.
        layers: of its blocks.

    Raises:
        InvalidModelError: if no configuration of the family holds the biases, or weights are offloaded.
    """
    missing = {f"{layer.name}.bias" for layer in layers if bias_of(layer) is None}
    if not missing:
        return loaded
    model: Any = loaded.model
    there = all_tensors(model)
    if any(tensor.is_meta for tensor in there.values()):
        raise InvalidModelError(
            f"{type(model).__name__} with biases: expected its weights in memory, found offloaded ones"
        )
    shapes = {name: tensor.shape for name, tensor in there.items()}
    values = model.config.to_dict()
    flags = [key for key, value in values.items() if value is False and "bias" in key]
    for number in range(1, _MOST_FLAGS + 1):
        for chosen in combinations(flags, number):
            try:
                larger = built(model, {**values, **dict.fromkeys(chosen, True)})
            except Exception:  # whatever transformers says of such a configuration
                continue
            found = {name: tensor.shape for name, tensor in all_tensors(larger).items()}
            new = found.keys() - shapes.keys()
            same = all(found.get(name) == shape for name, shape in shapes.items())
            if same and missing <= new and all(name.endswith(".bias") for name in new):
                return _filled(loaded, larger, there)
    tried = f"none with {', '.join(flags)}" if flags else "no flag of it that speaks of a bias"
    raise InvalidModelError(
        f"{type(model).__name__} with biases: expected a configuration that holds {min(missing)}, found "
        f"{tried}"
    )


def _filled(loaded: LoadedModel, larger: Any, there: dict[str, Tensor]) -> LoadedModel:
    """``larger`` with the tensors that are ``there``, and zeros elsewhere."""
    dtypes = dict(loaded.dtypes)
    for name, tensor in all_tensors(larger).items():
        place, _, attribute = name.rpartition(".")
        module = larger.get_submodule(place)
        old = there.get(name)
        if old is None:
            weight = module.weight
            old = nn.Parameter(torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device))
            # weights come before biases, so that this one is there already
            dtypes[name] = loaded.dtypes.get(f"{place}.weight", weight.dtype)
        of = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        of[attribute] = old
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        larger.generation_config = deepcopy(generation)
    return replace(loaded, model=larger.eval(), dtypes=dtypes)
