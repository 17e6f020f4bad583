"""What a run found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..records.run import ConsumerRecord, LayerRecord
from .settings import PruneSettings


@dataclass(frozen=True)
class PruneReport:
    """Everything that one run found out, ready to be written as JSON.

    Attributes:
        model: directory or name; settings: what was asked for, every default resolved.
        loss_start, loss: before and after the refinement (see ``refinement``), None without;
            refinement_swaps: weights that it exchanged. Layer records are from before it.
        calibration_hash, evaluation_hash: SHA-256 of the windows' tokens; None without evaluation.
        evaluation_windows: number of evaluation windows, each as long as those.
        perplexity_dense, perplexity_pruned: of causal models, on text.
        cosine: mean cosine of pooled embeddings to the dense model's, for the others; compared: name of the
            model's output that they are made of (see ``models.outputs``).
        layers: one record per layer, those left dense included, which the means leave out; where kept weights
            were updated they are from that pass.
        consumers: one record per layer that lost inputs, where units went; the layers are then those of the
            smaller model.
        parameters_dense, parameters: of the model before and after; megabytes_dense, megabytes: what is saved
            of it, in 10⁶ bytes.
        left_dense: how many other matrices of the blocks stay dense, by reason; the record names them.
        error_start, error, held_out_error: means over layers of the relative layer errors of the warm
            start and of the result, on calibration and on held-out text (see ``LayerRecord``); of a run of
            units alone, means over consumers before and after the update of their weights.
        sparsity: pruned share of the prunable weights; where units went, those that are gone are pruned too.
        seconds: wall-clock time of the whole run; seconds_layers: of the searches alone.
        peak_memory_mb: largest resident set of the process; on CUDA the device's peak beside it.
        device, versions: where and with what.
        out: directory of the pruned model, or None.
    """

    model: str
    settings: PruneSettings
    loss_start: float | None
    loss: float | None
    refinement_swaps: int
    calibration_hash: str
    evaluation_hash: str | None
    evaluation_windows: int
    perplexity_dense: float | None
    perplexity_pruned: float | None
    cosine: float | None
    compared: str | None
    layers: tuple[LayerRecord, ...]
    consumers: tuple[ConsumerRecord, ...]
    parameters_dense: int
    parameters: int
    megabytes_dense: float
    megabytes: float
    left_dense: Mapping[str, int]
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

    @property
    def smaller(self) -> bool:
        """Whether units went, so that the model is a smaller one."""
        return bool(self.consumers)

    def to_json(self) -> dict[str, Any]:
        """Plain values only; the settings stand beside the rest, by their own names."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        found["layers"] = [asdict(layer) for layer in self.layers]
        found["consumers"] = [asdict(each) for each in self.consumers]
        found["versions"] = dict(self.versions)
        found["left_dense"] = dict(self.left_dense)
        return {**self.settings.plain(), **found}
