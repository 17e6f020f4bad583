"""Which units of a model a run prunes: found, and known to be saved, before any work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..calibration.expert_groups import find_experts
from ..calibration.unit_groups import find_units
from ..errors import InputError, InvalidModelError
from ..models.biases import with_biases
from ..models.blocks import find_blocks
from ..models.experts import ExpertGroup
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from ..models.shrinking import Units, check_shrinkable
from ..models.units import EXPERTS, UnitGroup
from ..problems import SparsityPattern
from ..problems.pattern import PatternRule
from ..solvers import BranchAndBound
from ..solvers.units import DropAddSwap, UnitMasks
from ..solvers.units.registry import unit_solver_text
from .objective import UNIT_DEFAULT, Objective
from .settings import Mode, PruneSettings, UnitUpdate
from .unit_pruning import UnitMethod
from .unit_shares import UnitShares


@dataclass(frozen=True, eq=False)
class UnitPlan:
    """Units that a run prunes.

    Attributes:
        groups: from ``find_units`` and ``find_experts``, those of layers that are excluded left out.
        keep: of each group, how many units of how many neighbours stay.
        method: how they are chosen.
        expert_method: how experts are.
        model: the dense model; with zero biases where they are to absorb means and it had none.
        dense: the model as it was given.
        left: consumers and blocks whose units stay, and why.
        parameters_before, parameters: of the dense model and of the smaller one.
        apart: parts of the run's objective that units do not have, as text; empty without.
    """

    groups: tuple[Units, ...]
    keep: tuple[SparsityPattern, ...]
    method: UnitMethod
    expert_method: UnitMethod
    model: LoadedModel
    dense: LoadedModel
    left: Mapping[str, str]
    parameters_before: int
    parameters: int
    apart: str = ""

    def __str__(self) -> str:
        lines = [f"units: {each}" for each in self.widths()]
        share = 1 - self.parameters / self.parameters_before
        lines.append(
            f"smaller model: {_millions(self.parameters)} parameters of {_millions(self.parameters_before)} "
            f"({share:.1%} fewer)"
        )
        if self.left:
            shown = [f"{name} ({reason})" for name, reason in list(self.left.items())[:2]]
            more = f" and {len(self.left) - 2} more, which the record names" if len(self.left) > 2 else ""
            lines.append(f"without units that go: {'; '.join(shown)}{more}")
        if any(group.kind == EXPERTS for group in self.groups):
            drift = self.expert_method.objective.drift
            lines.append(
                f"experts: chosen by {unit_solver_text(self.expert_method.solver)}, drift {drift:g}, without "
                "residual drift"
            )
        if self.apart:
            lines.append(f"units are chosen without {self.apart}, which masks alone have")
        return "\n".join(lines)

    def widths(self) -> list[str]:
        """What stays of each kind, in words."""
        counts: dict[tuple[str, int, int], int] = {}
        for group, pattern in zip(self.groups, self.keep, strict=True):
            key = (group.kind, group.units, kept_units(group, pattern))
            counts[key] = counts.get(key, 0) + 1
        return [
            f"{kept} of {units} {kind} stay in {blocks} block{'s' if blocks > 1 else ''}"
            for (kind, units, kept), blocks in counts.items()
        ]


def kept_units(group: Units, pattern: SparsityPattern) -> int:
    """How many units of ``group`` stay in all."""
    return group.units // pattern.block * pattern.keep


def plan_units(loaded: LoadedModel, settings: PruneSettings, windows: Samples, skip: bool) -> UnitPlan | None:
    """The units that ``settings`` ask for, None if they ask for none.

    Args:
        loaded: the model, with weights in memory.
        settings: as they were asked for; an objective that is not stated is the units' own.
        windows: calibration windows.
        skip: whether blocks depend on earlier ones only through their outputs.

    Raises:
        InputError: if there are none, or not so many can go.
        InvalidModelError: if no configuration of the family holds the smaller model.
    """
    shares = settings.units
    if shares is None:
        return None
    dense = loaded
    found, left = _found(loaded, windows, shares)
    if settings.unit_update is UnitUpdate.BIAS:
        loaded = with_biases(dense, [group.consumer for group in found if isinstance(group, UnitGroup)])
    if loaded is not dense:
        found, left = _found(loaded, windows, shares)
    groups = _included(found, settings, loaded, left)
    _require_each_kind(loaded, shares, groups, left)
    keep = [shares.pattern(group, settings.multiple_of) for group in groups]
    kept = [kept_units(group, pattern) for group, pattern in zip(groups, keep, strict=True)]
    for group, count in zip(groups, kept, strict=True):
        if settings.pattern is not None and isinstance(group, UnitGroup):
            _check_pattern(settings.pattern, group, count * group.columns.shape[1])
    try:
        parameters = check_shrinkable(loaded, groups, kept)
    except InvalidModelError as error:
        if not left:
            raise
        where, reason = next(iter(left.items()))
        raise InvalidModelError(f"{error}; units of {where} stay: {reason}") from error
    rest = replace(settings.objective, drift=0.0, residual=0.0)
    method = UnitMethod(
        settings.unit_solver,
        _objective(loaded, settings, skip),
        settings.unit_ridge,
        settings.unit_update is UnitUpdate.LEAST_SQUARES,
        settings.mode is Mode.ONE_SHOT,
        settings.unit_update is UnitUpdate.BIAS,
    )
    return UnitPlan(
        tuple(groups),
        tuple(keep),
        method,
        _of_experts(method, settings),
        loaded,
        dense,
        left,
        sum(parameter.numel() for parameter in dense.model.parameters()),
        parameters,
        "" if rest == Objective() else str(rest),
    )


def _found(loaded: LoadedModel, windows: Samples, shares: UnitShares) -> tuple[list[Units], dict[str, str]]:
    """All units of the kinds that are pruned, and where there are none, why."""
    blocks = find_blocks(loaded.model)
    found: list[Units] = []
    left: dict[str, str] = {}
    if shares.in_front_of_layers:
        of_layers = find_units(loaded.model, blocks, windows, shares.in_front_of_layers)
        found += of_layers.groups
        left |= {f"{blocks[index].name} {kind}": why for (index, kind), why in of_layers.missing.items()}
    if EXPERTS in shares.pruned:
        mixtures = find_experts(loaded.model, blocks, windows)
        found += mixtures.groups
        left |= {f"{name} {EXPERTS}": why for name, why in mixtures.missing.items()}
    return found, left


def _included(
    found: Sequence[Units], settings: PruneSettings, loaded: LoadedModel, left: dict[str, str]
) -> list[Units]:
    """Groups with a layer that ``include`` and ``exclude`` leave; the others are named in ``left``."""
    chosen = {
        layer.name
        for block in find_blocks(loaded.model, settings.include, settings.exclude)
        for layer in block.layers
    }
    groups = []
    for group in found:
        inside = group.place in chosen
        if isinstance(group, ExpertGroup):
            inside = any(name.startswith(f"{group.name}.") for name in chosen)
        if inside:
            groups.append(group)
        else:
            left[f"{group.place} {group.kind}"] = "excluded"
    return groups


def _of_experts(method: UnitMethod, settings: PruneSettings) -> UnitMethod:
    """What is proven best where no solver is asked for, and a drift where one is asked for."""
    solver = UnitMasks(BranchAndBound()) if method.solver == DropAddSwap() else method.solver
    drift = 0.0 if settings.objective.is_default else settings.objective.drift
    if method.one_shot and EXPERTS in (settings.units.pruned if settings.units else {}):
        raise InputError("experts are chosen block by block: expected sequential mode, found one-shot")
    return replace(method, solver=solver, objective=Objective(drift=drift))


def _objective(loaded: LoadedModel, settings: PruneSettings, skip: bool) -> Objective:
    """Drift and residual drift of units; without those that nobody asked for where they do not work."""
    asked = settings.objective
    by_default = settings.mode is Mode.SEQUENTIAL and settings.unit_update is UnitUpdate.LEAST_SQUARES
    stated = asked.resolved(by_default, UNIT_DEFAULT)
    if stated.needs_dense_stream and not skip and asked.is_default:
        stated = asked.resolved(search=False)
        warnings.warn(
            f"{type(loaded.model).__name__}: drift and residual drift, the default, need blocks that depend "
            "on earlier ones only through their outputs; units are chosen without them",
            stacklevel=5,
        )
    return Objective(drift=stated.drift, residual=stated.residual)


def _require_each_kind(
    loaded: LoadedModel, shares: UnitShares, groups: Sequence[Units], left: Mapping[str, str]
) -> None:
    for kind in shares.pruned:
        if not any(group.kind == kind for group in groups):
            reason = next((text for name, text in left.items() if name.endswith(f" {kind}")), "no block")
            raise InputError(
                f"units {kind} of {type(loaded.model).__name__}: expected some in its blocks, found none: "
                f"{reason}"
            )


def _check_pattern(rule: PatternRule, group: UnitGroup, cols: int) -> None:
    """Refuse a pattern that does not fit what is left of a consumer."""
    try:
        rule.at(cols)
    except InputError as error:
        raise type(error)(f"layer {group.consumer.name} of the smaller model: {error}") from error


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 10**6 else f"{count:,}"
