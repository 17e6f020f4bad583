"""What a run found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..records.run import LayerRecord


@dataclass(frozen=True)
class PruneReport:
    """Everything that one run found out, ready to be written as JSON.

    Attributes:
        model, pattern, solver, start, mode, objective, allocation: what was asked for.
        refine: passes of the refinement; loss_start, loss: before and after it (see ``refinement``), None
            without; refinement_swaps: weights that it exchanged. Layer records are from before it.
        update: what changed the kept weights of the final masks, None if nothing did; layer records are its.
        samples, length, seed: calibration windows; calibration_hash: SHA-256 of their tokens.
        evaluation, evaluation_windows: source and number of evaluation windows, each ``length`` long.
        perplexity_dense, perplexity_pruned: of causal models.
        cosine: mean cosine of pooled embeddings to the dense model's, for the others.
        layers: one record per layer.
        error_start, error, held_out_error: means over layers of the relative layer errors of the warm
            start and of the result, on calibration and on held-out text (see ``LayerRecord``).
        sparsity: pruned share of the prunable weights.
        seconds: wall-clock time of the whole run; seconds_layers: of the searches alone.
        peak_memory_mb: largest resident set of the process; on CUDA the device's peak beside it.
        device, versions: where and with what.
        out: directory of the pruned model, or None.
    """

    model: str
    pattern: str
    solver: str
    start: str
    mode: str
    objective: str
    allocation: str
    refine: int
    update: str | None
    loss_start: float | None
    loss: float | None
    refinement_swaps: int
    samples: int
    length: int
    seed: int
    calibration: str
    calibration_hash: str
    evaluation: str | None
    evaluation_windows: int
    perplexity_dense: float | None
    perplexity_pruned: float | None
    cosine: float | None
    layers: tuple[LayerRecord, ...]
    error_start: float
    error: float
    held_out_error: float | None
    sparsity: float
    seconds: float
    seconds_layers: float
    peak_memory_mb: float
    peak_device_memory_mb: float | None
    device: str
    versions: Mapping[str, str]
    out: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)
