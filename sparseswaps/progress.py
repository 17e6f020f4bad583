"""Who is told how far a run is."""

from __future__ import annotations

from typing import Protocol

from .records.run import LayerRecord


class Progress(Protocol):
    """Whoever wants to know how far a run is."""

    def stage(self, text: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of a stage such as an evaluation are over."""

    def layer_started(self, name: str) -> None:
        """The search on a layer begins."""

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """``done`` of ``total`` weights are pruned or known to be pruned."""


class Silent:
    """Tells nobody."""

    def stage(self, text: str, done: int, total: int) -> None:
        """Say nothing."""

    def layer_started(self, name: str) -> None:
        """Say nothing."""

    def layer_finished(self, record: LayerRecord, done: int, total: int) -> None:
        """Say nothing."""
