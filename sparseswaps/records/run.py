"""What a run leaves behind: plain frozen rows in one SQLite database (standard library only).

A run writes one row of settings and one row per finished layer, mask included, each in its own
transaction, so a killed run loses nothing that was finished and can resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The pattern of a layer of which nothing was pruned.
DENSE = "dense"


@dataclass(frozen=True)
class LayerRecord:
    """One pruned layer.

    Errors are relative, divided by ``‖W X̂‖_F²`` on the same tokens. The *error* is the paper's:
    ``‖W X̂ - (M∘W) X̂‖_F²`` on the inputs that the layer receives. The *objective* is what the search
    minimised: the same without drift; with drift the error against the target that the drift sets
    (see ``problems.layer``), which may fall while the error rises. After a refinement norm, error and
    held-out error are those of the refined model, and the objective is the error.

    Attributes:
        name: layer name; block: index of its block; kind: type inside the block.
        rows, cols: shape of the weight; pattern: ``keep:block``, or ``dense`` where it was left dense;
            sparsity: achieved pruned share.
        tokens: calibration tokens that reached the layer; dead_channels: inputs that are always 0.
        output_norm: ``‖W X̂‖_F²`` on the calibration tokens, what errors are relative to.
        error_start, error: relative layer error of the warm start and of the result.
        objective_start, objective: relative objective of the warm start and of the result.
        held_out_error_start, held_out_error: the error on held-out text, None without any.
        swaps: swaps in all; certified_rows: rows with a 1-swap certificate, None if unknown.
        status: why the solver stopped; seconds: its wall-clock time.
        fallback: empty, or why another rule chose the mask, or none did.
        drift: strength of the drift in the objective.
    """

    name: str
    block: int
    kind: str
    rows: int
    cols: int
    pattern: str
    sparsity: float
    tokens: int
    dead_channels: int
    output_norm: float
    error_start: float
    error: float
    objective_start: float
    objective: float
    held_out_error_start: float | None
    held_out_error: float | None
    swaps: int
    certified_rows: int | None
    status: str
    seconds: float
    fallback: str = ""
    drift: float = 0.0

    @property
    def left_dense(self) -> bool:
        """Whether nothing of it was pruned, since calibration did not reach it."""
        return self.pattern == DENSE


@dataclass(frozen=True)
class ConsumerRecord:
    """Units in front of one layer, their consumer, some of which went.

    Attributes:
        name: of the consumer; block: index of its block; kind: what a unit is.
        units, kept: how many there were and stay; width: the consumer's columns of each.
        rows, cols: shape of the consumer's weight before.
        updated: whether the kept columns have other weights than before.
        tokens: calibration tokens that reached the consumer.
        output_norm: ``‖W X̂‖_F²`` on them, what errors are relative to.
        error_start, error: relative error of the consumer with the old weights of the kept columns, and with
            those that they have now; objective_start, objective: the same against the target that the drift
            sets (see ``LayerRecord``).
        gap: proven relative gap of the choice before any update; None where nothing was proven.
        swaps: of the search; status: why it stopped; seconds: of sums and search.

    Of a mixture of experts, which is a consumer whose inputs are their contributions, both errors are those
    that were measured with the router choosing among the experts that stay.
    """

    name: str
    block: int
    kind: str
    units: int
    kept: int
    width: int
    rows: int
    cols: int
    updated: bool
    tokens: int
    output_norm: float
    error_start: float
    error: float
    objective_start: float
    objective: float
    gap: float | None
    swaps: int
    status: str
    seconds: float


def known_mean(values: Sequence[float | None]) -> float | None:
    """Mean of the fields of some records that are known, None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class RefinementStep:
    """One try to refine a group of layers (see ``refinement``).

    Attributes:
        position: of the group, counted through all passes; number: of the try, from 0.
        layers: their names; strength: the μ of the quadratic model.
        swaps: exchanged weights; loss_before, loss_after: mean over tokens.
        accepted: whether the masks were kept; last: whether the group was left after this.
    """

    position: int
    number: int
    layers: str
    strength: float
    swaps: int
    loss_before: float
    loss_after: float
    accepted: bool
    last: bool
