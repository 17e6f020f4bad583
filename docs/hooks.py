"""What the site computes when it is built: curves and tables from ``benchmarks/results``, published reports.

A line ``<!-- measured: NAME -->`` becomes the figure or table of that name. The report of every study whose
rows are in ``reports/published`` is made from them, and a line ``<!-- published -->`` becomes their list.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sparseswaps.study import build_report
from sparseswaps.study.export import read_rows

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "reports" / "published"
MARKER = re.compile(r"^<!-- measured: ([a-z-]+) -->$", re.MULTILINE)
LIST = "<!-- published -->"


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
        "kernel-counts": module.kernel_counts_table,
        "kernel-seconds": module.kernel_seconds_table,
    }
    if name in tables:
        return str(tables[name]())
    figure = {"exact-seconds": module.exact_figure, "bound-gap": module.bound_figure}[name]()
    return f"<figure>\n{figure.to_svg().strip()}\n<figcaption>{figure.caption}</figcaption>\n</figure>"


@functools.cache
def reports() -> tempfile.TemporaryDirectory[str]:
    """A folder with the reports of all published studies, made once however often the site is built."""
    folder = tempfile.TemporaryDirectory()
    for rows in sorted(PUBLISHED.glob("*/rows")):
        build_report(rows, Path(folder.name) / rows.parent.name)
    return folder


def published() -> str:
    """Markdown of the list of published studies: title with its link, and description."""
    items = []
    for rows in sorted(PUBLISHED.glob("*/rows")):
        name = rows.parent.name
        items += [
            f"- [{facts['title']}](published/{name}/index.html)\n\n    {facts['description']}"
            for facts in read_rows(rows).studies
        ]
    return "\n\n".join(items)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the reports; their Markdown twins are for readers of the repository."""
    folder = Path(reports().name)
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file() and path.suffix != ".md":
            place = f"published/{path.relative_to(folder).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what was measured, and the list of reports, where the page asks for it."""
    markdown = MARKER.sub(lambda found: measured(found[1]), markdown)
    return markdown.replace(LIST, published()) if LIST in markdown else markdown


def on_shutdown(**_: Any) -> None:
    """Take the folder of reports away again."""
    if reports.cache_info().currsize:
        reports().cleanup()
