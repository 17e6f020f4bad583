"""Text of a program's beginning that makes libraries look exactly as if they were not installed."""

from __future__ import annotations

from collections.abc import Sequence


def hiding(names: Sequence[str]) -> str:
    """Python code after which nothing of ``names`` is found, for a process of its own."""
    return f"""
import importlib.abc, importlib.util, sys

hidden = {tuple(names)!r}

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in hidden else find(name, package)
)
"""
