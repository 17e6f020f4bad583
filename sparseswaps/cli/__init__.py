"""The command line: ``sparseswaps COMMAND --help`` teaches each command by example."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
