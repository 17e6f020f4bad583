"""A model without some of its units, physically smaller, as an ordinary model of its family.

Nothing here knows a model family. Which keys of the configuration hold the sizes is found by trying: those
with the old value get the new one, and transformers builds the model without weights. A configuration fits if
every parameter and buffer has the shape that the tensors left over have, and no constant of a module, such as
the scale of its attention, is another one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, InvalidModelError, VerificationError
from .blocks import PrunableLayer, device_of
from .checkpoints import silent_transformers
from .experts import ExpertGroup
from .inputs import Samples, forward_inputs
from .loading import LoadedModel
from .offload import OffloadedBlocks, Residence
from .outputs import output_states, same_but_for_rounding
from .units import UnitGroup, bias_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys of a configuration that hold the sizes of one kind of unit, at most.
_MOST_KEYS = 4
# Of a configuration that holds the number of heads, which may be the size of a head as well.
_SIZES = ("dim", "size")

# Channels, heads, groups of heads, experts.
Units = UnitGroup | ExpertGroup


def check_shrinkable(loaded: LoadedModel, groups: Sequence[Units], kept: Sequence[int]) -> int:
    """Refuse, before any work, what ``shrunk_model`` could not make; no weight is looked at.

    Args:
        loaded: the model.
        groups: from ``find_units`` and ``find_experts``, at most one for each consumer.
        kept: how many units of each group stay.

    Returns:
        Parameters of the smaller model, each tied one once.

    Raises:
        InputError: if these numbers of units cannot be kept.
        InvalidModelError: if no configuration of the family holds the smaller model.
    """
    masks = [_first(group, count) for group, count in zip(groups, kept, strict=True)]
    skeleton = _skeleton(loaded.model, groups, masks)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def shrunk_model(loaded: LoadedModel, groups: Sequence[Units], kept: Sequence[Tensor]) -> LoadedModel:
    """The model without the units that are not kept; with their columns at zero it computes the same.

    Tensors without units are shared with the larger model.

    Args:
        loaded: the model, whose weights may be offloaded; those of the smaller one are in memory.
        groups: from ``find_units`` and ``find_experts``, at most one for each consumer.
        kept: (units,), bool, for each group.

    Raises:
        InputError: if these units cannot be kept.
        InvalidModelError: if no configuration of the family holds the smaller model.
    """
    for group, mask in zip(groups, kept, strict=True):
        counts = mask.view(-1, group.exchangeable).sum(1)
        if not counts.all() or bool((counts != counts[0]).any()):
            raise InputError(
                f"{group.kind} of block {group.block}: expected equally many kept of every "
                f"{group.exchangeable}, and one at least, found {counts.tolist()}"
            )
        flaw = group.flaw_of(int(mask.sum()))
        if flaw is not None:
            raise InputError(f"{group.kind} of block {group.block}: {flaw}")
    return filled(_skeleton(loaded.model, groups, kept), loaded, entries_that_stay(groups, kept))


def filled(
    skeleton: PreTrainedModel,
    loaded: LoadedModel,
    stay: Mapping[tuple[str, int], Tensor],
    renamed: Callable[[str], str | None] = str,
) -> LoadedModel:
    """A model without weights with those that are left of a larger one; it shares what is whole.

    Args:
        skeleton: on the meta device; it is changed in place.
        loaded: the larger model.
        stay: which entries along an axis of a tensor stay, bool, by its name and the axis; all by default.
        renamed: what a tensor is called in the smaller model, None where it is not there.
    """
    small: Any = skeleton
    made: dict[int, Tensor] = {}  # a tied parameter is one parameter
    for name, tensor in all_tensors(loaded.model).items():
        other = renamed(name)
        if other is None:
            continue
        if id(tensor) not in made:
            made[id(tensor)] = _left(loaded, name, tensor, stay)
        place, _, attribute = other.rpartition(".")
        module = small.get_submodule(place)
        of = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        of[attribute] = made[id(tensor)]
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        small.generation_config = deepcopy(generation)
    dtypes = {renamed(name): dtype for name, dtype in loaded.dtypes.items()}
    left = {name: dtype for name, dtype in dtypes.items() if name is not None}
    return replace(loaded, model=small.eval(), residence=Residence(), dtypes=left)


def mixture_skeletons(
    model: PreTrainedModel, groups: Sequence[ExpertGroup], kept: Sequence[int]
) -> dict[str, nn.Module]:
    """Mixtures with fewer experts by name, of the right shapes and without weights.

    Args:
        model: the whole one.
        groups: all its mixtures.
        kept: how many experts of each stay.

    Raises:
        InputError: if these numbers of experts cannot be kept.
        InvalidModelError: if no configuration of the family holds them.
    """
    small = _skeleton(
        model, groups, [_first(group, count) for group, count in zip(groups, kept, strict=True)]
    )
    return {group.name: small.get_submodule(group.name).eval() for group in groups}


def fill_mixture(skeleton: nn.Module, large: nn.Module, group: ExpertGroup, kept: Tensor) -> nn.Module:
    """A mixture from ``mixture_skeletons`` with the weights of the experts of ``kept`` (experts,), bool.

    What belongs to no expert is shared with the mixture ``large``.
    """
    axes = {name.removeprefix(f"{group.name}."): axis for name, axis in group.tensors}
    for name, tensor in all_tensors(large).items():
        values = tensor.detach()
        if name in axes:
            values = values.index_select(axes[name], kept.nonzero().flatten().to(values.device))
        place, _, attribute = name.rpartition(".")
        inside = skeleton.get_submodule(place)
        if isinstance(tensor, nn.Parameter):
            inside._parameters[attribute] = nn.Parameter(values, tensor.requires_grad)
        else:
            inside._buffers[attribute] = values
    return skeleton


def verify_shrunk(large: nn.Module, small: nn.Module, samples: Samples) -> None:
    """Run both models on ``samples``.

    Args:
        large: with the columns of the missing units at zero.
        small: from ``shrunk_model``.
        samples: token windows (windows, length), or other inputs.

    Raises:
        VerificationError: if they return something else, up to rounding.
    """
    with torch.no_grad():
        found = [
            output_states(model(**forward_inputs(model, samples.to(device_of(model)))))[1]
            for model in (large, small)
        ]
    if not same_but_for_rounding(*found):
        raise VerificationError(
            f"smaller {type(small).__name__}: expected the outputs of the larger one without the units, "
            f"found a difference of {float((found[0] - found[1]).abs().max()):.2g}"
        )


def _first(group: Units, count: int) -> Tensor:
    """A choice of so many units (units,), bool.

    Raises:
        InputError: if so many cannot be kept.
    """
    flaw = group.flaw_of(count)
    if flaw is not None:
        raise InputError(f"{group.kind} of block {group.block}: {flaw}")
    sets = group.units // group.exchangeable
    mask = torch.zeros(sets, group.exchangeable, dtype=torch.bool)
    mask[:, : count // sets] = True
    return mask.flatten()


def _left(loaded: LoadedModel, name: str, tensor: Tensor, stay: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """What is left of a parameter or buffer."""
    values = tensor.detach()
    if tensor.is_meta and isinstance(loaded.residence, OffloadedBlocks):
        values = loaded.residence.parameter(name, tensor.dtype)
    for axis in range(tensor.ndim):
        if (name, axis) in stay:
            values = values.index_select(axis, stay[name, axis].nonzero().flatten().to(values.device))
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names, those that are not saved too."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def entries_that_stay(groups: Sequence[Units], kept: Sequence[Tensor]) -> dict[tuple[str, int], Tensor]:
    """Which entries along an axis of a parameter stay, bool, by its name and the axis.

    Args:
        groups: from ``find_units`` and ``find_experts``, of the larger model.
        kept: (units,), bool, for each group.
    """
    found: dict[tuple[str, int], Tensor] = {}

    def drop(name: str, axis: int, size: int, entries: Tensor) -> None:
        found.setdefault((name, axis), torch.ones(size, dtype=torch.bool))[entries.flatten()] = False

    def axis_of(layer: PrunableLayer, rows: bool) -> int:
        return int(rows == layer.transposed)

    for group, mask in zip(groups, kept, strict=True):
        if isinstance(group, ExpertGroup):
            for name, axis in group.tensors:
                drop(name, axis, group.units, (~mask).nonzero())
            continue
        consumer = group.consumer
        cols = consumer.weight.shape[1]
        drop(consumer.parameter_name, axis_of(consumer, rows=False), cols, group.columns[~mask])
        for layer, rows in group.producers:
            size = layer.weight.shape[0]
            drop(layer.parameter_name, axis_of(layer, rows=True), size, rows[~mask])
            if bias_of(layer) is not None:
                drop(f"{layer.name}.bias", 0, size, rows[~mask])
    return found


@dataclass(frozen=True)
class _Change:
    """A size that becomes another one, and the word that keys of a configuration have for it."""

    old: int
    new: int
    word: str

    @property
    def heads(self) -> bool:
        """Whether it is a number of heads."""
        return self.word == "head"


def _changes(groups: Sequence[Units], counts: Sequence[int]) -> list[_Change]:
    """Sizes that become others; a configuration holds one for all blocks."""
    first: dict[tuple[str, int], tuple[int, int]] = {}
    consumers: set[str] = set()
    found: dict[_Change, None] = {}
    for group, count in zip(groups, counts, strict=True):
        if group.place in consumers:
            raise InputError(f"units of {group.place}: expected one kind of them, found several")
        consumers.add(group.place)
        before, block = first.setdefault((group.kind, group.units), (count, group.block))
        if count != before:
            raise InputError(
                f"{group.kind}: expected equally many kept in every block, since one configuration holds for "
                f"all, found {before} in block {block} and {count} in block {group.block}"
            )
        word = {"channels": "", "experts": "expert"}.get(group.kind, "head")
        sizes = {group.units: count}
        if isinstance(group, UnitGroup) and group.kind == "kv-groups":
            sizes[group.units * group.sharing] = count * group.sharing
        found |= dict.fromkeys(_Change(old, new, word) for old, new in sizes.items() if old != new)
    return list(found)


def _skeleton(model: PreTrainedModel, groups: Sequence[Units], kept: Sequence[Tensor]) -> PreTrainedModel:
    """The smaller model, with all its tensors on the meta device.

    Raises:
        InputError: for numbers of units that one configuration cannot hold.
        InvalidModelError: if no configuration fits.
    """
    changes = _changes(groups, [int(mask.sum()) for mask in kept])
    stay = entries_that_stay(groups, kept)
    shapes = {
        name: tuple(
            int(stay[name, axis].sum()) if (name, axis) in stay else size
            for axis, size in enumerate(tensor.shape)
        )
        for name, tensor in all_tensors(model).items()
    }
    heads = [group for group in groups if isinstance(group, UnitGroup) and group.kind != "channels"]
    head_dims = {group.head_dim for group in heads}
    small = _fitting(model, shapes, changes, min(head_dims) if len(head_dims) == 1 else None)
    for group, mask in zip(groups, kept, strict=True):
        if isinstance(group, ExpertGroup):
            _try_router(small, group, int(mask.sum()))
    return small


def _try_router(small: PreTrainedModel, group: ExpertGroup, kept: int) -> None:
    """Run a mixture of the smaller model without its experts, on shapes alone.

    Raises:
        InvalidModelError: if its router cannot choose among those that stay.
    """
    mixture = small.get_submodule(group.name)
    inside = next(name for name, each in group.module.named_modules() if each is group.experts)
    experts = mixture.get_submodule(inside)
    # of the same shape as what they are given: nobody reads what comes out
    experts.__dict__["forward"] = lambda states, *_, **__: states
    try:
        with torch.no_grad():
            mixture(torch.empty((1, 2, group.channels), device="meta"))
    except Exception as error:  # whatever a router says that has too few to choose from
        message = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
        raise InvalidModelError(
            f"experts of block {group.block}: expected a router that chooses among {kept} of {group.units}, "
            f"found one that cannot: {message}"
        ) from error
    finally:
        del experts.__dict__["forward"]


# A place in a configuration, keys of dictionaries inside of dictionaries, and what changes there.
_Setting = tuple[tuple[str, ...], _Change]


@dataclass(frozen=True, eq=False)
class Trial:
    """What became of a configuration.

    Attributes:
        flaw: the first thing that is wrong, None if nothing is.
        distance: entries of tensors that are too many or missing, None if no model was built.
        model: without weights, None if none was built.
    """

    flaw: str | None
    distance: int | None = None
    model: PreTrainedModel | None = None


def _fitting(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    changes: Sequence[_Change],
    head_dim: int | None,
) -> PreTrainedModel:
    """The model without weights that has these ``shapes``, by the configuration with the fewest changes."""
    values = model.config.to_dict()
    trial = _tried(model, shapes, (), head_dim)
    if trial.model is not None and trial.flaw is None:
        return trial.model
    before, nearest, best = trial.distance or 0, math.inf, "no key of it has the old size"
    for unset in (False, True):  # a width that is not set follows from another one
        useful: list[_Setting] = []
        for number in range(1, _MOST_KEYS + 1):
            among = _settings(values, changes, unset) if number == 1 else useful
            for chosen in combinations(among, number):
                if len({place for place, _ in chosen}) < number:
                    continue
                trial = _tried(model, shapes, chosen, head_dim)
                if trial.model is not None and trial.flaw is None:
                    return trial.model
                if number == 1 and (trial.distance is None or trial.distance < before):
                    useful += chosen
                keys = " and ".join(f"{place[-1]} = {change.new}" for place, change in chosen)
                distance = trial.distance
                if distance is None:  # what transformers says of a number of heads explains most
                    distance = 0 if "head" in keys else before
                if distance < nearest:
                    nearest, best = distance, f"with {keys} {trial.flaw}"
    sizes = " and ".join(f"{change.new} instead of {change.old}" for change in changes)
    raise InvalidModelError(
        f"smaller {type(model).__name__}: expected a configuration that holds {sizes}, found none: {best}"
    )


def _tried(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    settings: Sequence[_Setting],
    head_dim: int | None,
) -> Trial:
    """Build the model of a configuration with other ``settings`` and compare it."""
    values = model.config.to_dict()
    for place, change in settings:
        inner = values
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = change.new
        if change.heads and inner.get("head_dim") is None:  # it would follow from the number of heads
            inner["head_dim"] = head_dim
    return compared(model, values, shapes, constants_of(model))


def built(model: PreTrainedModel, values: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the same class, without weights, of the configuration ``values``.

    Raises:
        Exception: whatever transformers says of such a configuration.
    """
    kind: Any = type(model)
    config: Any = type(model.config)
    with torch.device("meta"), silent_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: PreTrainedModel = kind._from_config(
            config.from_dict(dict(values)), attn_implementation=model.config._attn_implementation
        )
    return found


def compared(
    model: PreTrainedModel,
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, float],
) -> Trial:
    """Build the model of a configuration with other ``values``, and see whether it has what it is to have."""
    try:
        small = built(model, values)
    except Exception as error:  # whatever transformers says of such a configuration
        message = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        return Trial(f"transformers says: {message}")
    found = {name: tuple(tensor.shape) for name, tensor in all_tensors(small).items()}
    different = [name for name in {**shapes, **found} if found.get(name) != shapes.get(name)]
    distance = sum(abs(math.prod(found.get(x, (0,))) - math.prod(shapes.get(x, (0,)))) for x in different)
    for name in different:
        flaw = f"{name} is {found.get(name, 'missing')} instead of {shapes.get(name, 'missing')}"
        return Trial(flaw, distance, small)
    others = constants_of(small)
    for name, value in constants.items():
        if others.get(name) != value:
            return Trial(f"{name} is {others.get(name)} instead of {value}", distance, small)
    return Trial(None, distance, small)


def _settings(values: Mapping[Any, Any], changes: Sequence[_Change], unset: bool) -> list[_Setting]:
    """Keys that hold an old size, the likely ones first; with ``unset`` also those with nothing."""
    found: list[_Setting] = []
    for key, value in values.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, dict):
            found += [((key, *place), change) for place, change in _settings(value, changes, unset)]
        for change in changes:
            fits = type(value) is int and value == change.old
            if change.word:
                fits = fits and not any(word in key for word in _SIZES)
            else:
                fits = "head" not in key and (fits or (unset and value is None))
            if fits:
                found.append(((key,), change))
    return sorted(found, key=lambda setting: setting[1].word not in setting[0][-1])


def constants_of(model: nn.Module) -> dict[str, float]:
    """Fractions that modules hold, such as the scale of attention, by name."""
    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is float
    }
