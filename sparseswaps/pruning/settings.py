"""What determines the result of a run."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """Which activations a layer is fitted to."""

    ONE_SHOT = "one-shot"
    SEQUENTIAL = "sequential"
