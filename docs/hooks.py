"""What the site computes when it is built: curves and tables from ``benchmarks/results``.

A line ``<!-- measured: NAME -->`` becomes the figure or table of that name.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- measured: ([a-z-]+) -->$", re.MULTILINE)


def scaling() -> ModuleType:
    """``benchmarks/scaling.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"benchmarks/scaling.py in {ROOT}: expected the file, found none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measured(name: str) -> str:
    """HTML or Markdown of one marker.

    Raises:
        KeyError: for a name that nothing is known of.
    """
    module = scaling()
    tables = {
        "engine": module.engine_table,
        "memory": module.memory_table,
        "end-to-end": module.end_to_end_table,
    }
    if name in tables:
        return str(tables[name]())
    figure = {"exact-seconds": module.exact_figure, "bound-gap": module.bound_figure}[name]()
    return f"<figure>\n{figure.to_svg().strip()}\n<figcaption>{figure.caption}</figcaption>\n</figure>"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what was measured where the page asks for it."""
    return MARKER.sub(lambda found: measured(found[1]), markdown)
