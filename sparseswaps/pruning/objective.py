"""What a layer of a model is fitted to: the paper's error, or one that makes better models.

All of these change the layer's problem, none the search (see ``problems.layer`` for the mathematics):

- *drift* α: the target moves from ``W X̂`` to the dense outputs ``W X``;
- *residual drift* β: layers that write into the residual stream also repair what it has lost, up to its
  scale;
- *output metric*: errors of different outputs are weighed by what they cost downstream;
- *held-out share*: that share of the calibration windows is kept out of the Gram matrices, and rows
  whose error there rises stop early (see ``solvers.held_out_stop``);
- *shrinkage* λ: the Gram matrix moves towards its diagonal, ``(1 - λ) G + λ diag(G)``, which is less
  sure of correlations that few calibration tokens show.

Drift and residual drift that nobody states are those of the solver (``default``): ``SEARCH_DEFAULT`` for
searches in sequential mode, none for everything else. ``resolved`` says which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ..calibration.targets import Target
from ..errors import InputError
from ..problems.metric import DAMPING

# A drift strength of this value is chosen for each group of layers among AUTO_DRIFT.
AUTO = -1.0
# A drift or residual drift of this value is the solver's own.
UNSTATED = -2.0
AUTO_DRIFT = (0.25, 0.5, 0.75, 1.0)
AUTO_SHARE = 0.125


@dataclass(frozen=True)
class Objective:
    """What layers are fitted to; without arguments the paper's error.

    Attributes:
        drift: α in [0, 1]; sequential mode only. ``AUTO`` means that each group of layers gets the
            strength among ``AUTO_DRIFT`` with which the model, pruned so far, comes nearest to the dense
            model's output on held-out windows (``auto`` in texts). ``UNSTATED`` is the solver's own.
        residual: β in [0, 1], residual drift; sequential mode only. ``UNSTATED`` is the solver's own.
        metric: whether outputs are weighed by the output metric.
        damping: of the output metric, a share of its mean diagonal.
        sweeps: over the rows that the output metric couples.
        shrinkage: λ in [0, 1).
        held_out: share of the calibration windows that are held out, in [0, 0.5]. An automatic drift
            strength holds out ``AUTO_SHARE`` if this is 0.
    """

    drift: float = 0.0
    residual: float = 0.0
    metric: bool = False
    damping: float = DAMPING
    sweeps: int = 2
    shrinkage: float = 0.0
    held_out: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("drift", self.drift), ("residual drift", self.residual)):
            if not 0 <= value <= 1 and value != UNSTATED and not (name == "drift" and value == AUTO):
                raise InputError(f"{name} strength is a share: expected 0 to 1, found {value:g}")
        if not 0 <= self.shrinkage < 1:
            raise InputError(f"shrinkage is a share: expected 0 ≤ shrinkage < 1, found {self.shrinkage:g}")
        if not 0 <= self.held_out <= 0.5:
            raise InputError(f"held-out share of the windows: expected 0 to 0.5, found {self.held_out:g}")
        if self.held_out and self.metric:
            raise InputError("held-out stop sees each row by itself: expected no output metric, found both")
        if self.damping < 0:
            raise InputError(f"damping of the output metric: expected at least 0, found {self.damping:g}")
        if self.sweeps < 1:
            raise InputError(f"sweeps of the output metric: expected at least 1, found {self.sweeps}")

    @property
    def is_default(self) -> bool:
        """Whether a drift is the solver's own."""
        return UNSTATED in (self.drift, self.residual)

    def resolved(self, search: bool) -> Objective:
        """The same with every drift stated.

        Args:
            search: whether the solver is run with drift by default, in this mode.
        """
        standard = SEARCH_DEFAULT if search else Objective()
        own = {
            name: getattr(standard, name) for name in ("drift", "residual") if getattr(self, name) == UNSTATED
        }
        return replace(self, **own)

    @property
    def needs_dense_stream(self) -> bool:
        """Whether activations of the dense model travel beside those of the pruned one."""
        if self.is_default:
            raise ValueError("objective: expected drifts that are stated (see resolved), found the default")
        return self.drift != 0 or self.residual > 0

    @property
    def held_out_share(self) -> float:
        """Share of the calibration windows that stays out of the Gram matrices."""
        return self.held_out or (AUTO_SHARE if self.drift == AUTO else 0.0)

    def strengths(self) -> tuple[float, ...]:
        """Strengths of the drift to choose from."""
        return AUTO_DRIFT if self.drift == AUTO else (self.drift,)

    @property
    def target(self) -> Target | None:
        """What layers are fitted to, None for their own outputs ``W X̂``."""
        if not self.needs_dense_stream:
            return None
        return Target(None if self.drift == AUTO else self.drift, self.residual)

    def __str__(self) -> str:
        parts = []
        if self.drift == self.residual == UNSTATED:
            parts.append("default")
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or (value == UNSTATED and parts[:1] == ["default"]):
                continue
            shown = {AUTO: "auto", UNSTATED: "default"}.get(value, repr(value).removesuffix(".0"))
            parts.append(field.name if value is True else f"{field.name}={shown}")
        return ",".join(parts) or "plain"

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read ``plain``, ``default`` or ``drift=0.75,residual=0.5,metric``, what ``str`` writes.

        Parts that are not named are off; after ``default`` the drifts are the solver's own:
        ``default,metric``.

        Raises:
            InputError: for an unknown part or a value of another type.
        """
        if text.strip() == "plain":
            return cls()
        known = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = part.partition("=")
            if part == "default":
                values = {"drift": UNSTATED, "residual": UNSTATED, **values}
                continue
            flag = name in known and known[name].type == "bool"
            if name not in known or (not equals) != flag:
                flags = [each for each, field in known.items() if field.type == "bool"]
                raise InputError(
                    f"objective: expected plain, default, or parts among {', '.join(flags)}, "
                    f"{', '.join(f'{each}=VALUE' for each in known if each not in flags)}, found {part!r}"
                )
            values[name] = True if flag else cls.read_part(name, value)
        return cls(**values)

    @classmethod
    def read_part(cls, name: str, text: str) -> float | int:
        """The number of the part ``name``; ``auto`` and ``default`` where it may be that.

        Raises:
            InputError: for another text.
        """
        words = {"drift": {"auto": AUTO, "default": UNSTATED}, "residual": {"default": UNSTATED}}
        if text in words.get(name, {}):
            return words[name][text]
        whole = next(field for field in fields(cls) if field.name == name).type == "int"
        try:
            value = int(text) if whole else float(text)
        except ValueError as error:
            raise InputError(f"objective: expected a number for {name}, found {text!r}") from error
        if not math.isfinite(value) or value < 0:
            raise InputError(f"objective: expected a number of at least 0 for {name}, found {text!r}")
        return value


# What searches get in sequential mode where nothing else is asked for: with it models were better than with
# the paper's error, on each model and pattern of the study of objectives (reports/studies/objectives.toml).
SEARCH_DEFAULT = Objective(drift=0.75, residual=0.5)
# What is meant where nothing is said.
DEFAULT = Objective(drift=UNSTATED, residual=UNSTATED)
