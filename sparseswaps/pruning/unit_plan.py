"""Which units of a model a run prunes: found, and known to be saved, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..calibration.expert_groups import find_experts
from ..calibration.unit_groups import find_units
from ..errors import InputError, InvalidModelError
from ..models.biases import with_biases
from ..models.blocks import Block, find_blocks
from ..models.experts import ExpertGroup
from ..models.inputs import Samples
from ..models.loading import LoadedModel
from ..models.shrinking import Units, check_shrinkable
from ..models.units import KINDS, UnitGroup
from ..problems import SparsityPattern
from ..problems.pattern import PatternRule
from ..solvers.units import DropAddSwap, UnitSolver
from ..solvers.units.registry import unit_solver_text
from .objective import Objective
from .settings import Mode, PruneSettings, UnitUpdate
from .unit_pruning import UnitMethod
from .unit_shares import EXPERTS, UnitShares


@dataclass(frozen=True, eq=False)
class UnitPlan:
    """Units that a run prunes.

    Attributes:
        groups: from ``find_units`` and ``find_experts``, those that are excluded left out.
        keep: of each group, how many units of how many neighbours stay.
        method: how they are chosen.
        model: the dense model; with zero biases where they are to absorb means and it had none.
        dense: the model as it was given.
        left: consumers and blocks whose units stay, and why.
        parameters_before, parameters: of the dense model and of the smaller one.
        apart: parts of the run's objective that units do not have, as text; empty without.
        expert_solver, expert_objective: how experts are chosen: the proven best of them where no solver was
            asked for, without drift where none was.
    """

    groups: tuple[Units, ...]
    keep: tuple[SparsityPattern, ...]
    method: UnitMethod
    model: LoadedModel
    dense: LoadedModel
    left: Mapping[str, str]
    parameters_before: int
    parameters: int
    apart: str = ""
    expert_solver: UnitSolver | None = None
    expert_objective: Objective = field(default_factory=Objective)

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
        if self.of_mixtures()[0]:
            solver = "the proven best" if self.expert_solver is None else unit_solver_text(self.expert_solver)
            lines.append(f"experts: {solver}, drift {self.expert_objective.drift:g}, without residual drift")
        if self.apart:
            lines.append(f"units are chosen without {self.apart}, which masks alone have")
        return "\n".join(lines)

    def of_layers(self) -> tuple[list[UnitGroup], list[SparsityPattern]]:
        """Units in front of layers, and how many of them stay."""
        pairs = [
            (group, pattern)
            for group, pattern in zip(self.groups, self.keep, strict=True)
            if isinstance(group, UnitGroup)
        ]
        return [group for group, _ in pairs], [pattern for _, pattern in pairs]

    def of_mixtures(self) -> tuple[list[ExpertGroup], list[SparsityPattern]]:
        """Experts of mixtures, and how many of them stay."""
        pairs = [
            (group, pattern)
            for group, pattern in zip(self.groups, self.keep, strict=True)
            if isinstance(group, ExpertGroup)
        ]
        return [group for group, _ in pairs], [pattern for _, pattern in pairs]

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


def plan_units(loaded: LoadedModel, settings: PruneSettings, windows: Samples) -> UnitPlan | None:
    """The units that ``settings`` ask for, None if they ask for none.

    Args:
        loaded: the model, with weights in memory.
        settings: as they were asked for; units have no drift where none is stated.
        windows: calibration windows.

    Raises:
        InputError: if there are none, or not so many can go.
        InvalidModelError: if no configuration of the family holds the smaller model.
    """
    shares = settings.units
    if shares is None:
        return None
    dense, blocks = loaded, find_blocks(loaded.model)
    chosen = [
        layer.name
        for block in find_blocks(loaded.model, settings.include, settings.exclude)
        for layer in block.layers
    ]
    found, left = _found(loaded, blocks, windows, shares)
    if settings.unit_update is UnitUpdate.BIAS:
        loaded = with_biases(dense, [group.consumer for group in found if isinstance(group, UnitGroup)])
    if loaded is not dense:
        found, left = _found(loaded, find_blocks(loaded.model), windows, shares)
    groups: list[Units] = []
    for group in found:
        if any(name == group.place or name.startswith(f"{group.place}.") for name in chosen):
            groups.append(group)
        else:
            left[f"{group.place} {group.kind}"] = "excluded"
    _require_each_kind(loaded, shares, groups, left)
    if EXPERTS in shares.pruned and settings.mode is Mode.ONE_SHOT:
        raise InputError("experts are chosen block by block: expected sequential mode, found one-shot")
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
    return UnitPlan(
        tuple(groups),
        tuple(keep),
        UnitMethod(
            settings.unit_solver,
            _objective(settings),
            settings.unit_ridge,
            settings.unit_update is UnitUpdate.LEAST_SQUARES,
            settings.mode is Mode.ONE_SHOT,
            settings.unit_update is UnitUpdate.BIAS,
        ),
        loaded,
        dense,
        left,
        sum(parameter.numel() for parameter in dense.model.parameters()),
        parameters,
        "" if rest == Objective() else str(rest),
        None if isinstance(settings.unit_solver, DropAddSwap) else settings.unit_solver,
        Objective(drift=max(0.0, settings.objective.drift)),
    )


def _found(
    loaded: LoadedModel, blocks: Sequence[Block], windows: Samples, shares: UnitShares
) -> tuple[list[Units], dict[str, str]]:
    """All units of the kinds that are pruned, and where there are none, why."""
    groups: list[Units] = []
    left: dict[str, str] = {}
    kinds = [kind for kind in KINDS if kind in shares.pruned]
    if kinds:
        units = find_units(loaded.model, blocks, windows, kinds)
        groups += units.groups
        left |= {f"{blocks[index].name} {kind}": reason for (index, kind), reason in units.missing.items()}
    if EXPERTS in shares.pruned:
        experts = find_experts(loaded.model, blocks, windows)
        groups += experts.groups
        left |= {f"{name} {EXPERTS}": reason for name, reason in experts.missing.items()}
    return groups, left


def _objective(settings: PruneSettings) -> Objective:
    """Drift and residual drift of units, none where none is stated."""
    stated = settings.objective.resolved(search=False)
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
