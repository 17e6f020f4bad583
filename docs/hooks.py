"""What the site computes when it is built: curves and tables, published reports, formulas.

A line ``<!-- measured: NAME -->`` becomes the figure or table of that name, from ``benchmarks/results`` or
a published study. The report of every study whose rows are in ``reports/published`` is made from them, and a
line ``<!-- published -->`` becomes their gallery. Formulas in TeX become MathML, which browsers show by
themselves.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import re
import sys
import tempfile
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert
from matplotlib.figure import Figure as Canvas
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sparseswaps.reports import Figure
from sparseswaps.reports.axes import numbers
from sparseswaps.reports.palette import INK, NEUTRAL, style
from sparseswaps.reports.tables import Row
from sparseswaps.study import build_report
from sparseswaps.study.export import read_rows

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "reports" / "published"
MARKER = re.compile(r"^<!-- measured: ([a-z-]+) -->$", re.MULTILINE)
LIST = "<!-- published -->"
# What arithmatex makes of $...$ and of $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Methods of the study of SmolLM2 on the front page, and what they are called there.
FRONT = {
    "Wanda": "Wanda",
    "1-swap": "1-swap, the paper's error",
    "1-swap, drift 0.75, residual 0.5": "1-swap, as by default",
}


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
    figures = {"exact-seconds": module.exact_figure, "bound-gap": module.bound_figure, "front": front_figure}
    figure = figures[name]()
    return f"<figure>\n{figure.to_svg().strip()}\n<figcaption>{figure.caption}</figcaption>\n</figure>"


def front_figure() -> Figure:
    """Perplexity of SmolLM2-135M at 50 % after each of a few methods."""
    with (PUBLISHED / "smollm2" / "figures" / "objectives-smollm2-135m.csv").open(encoding="utf-8") as file:
        found = {row["method"]: row for row in csv.DictReader(file) if row["pattern"] == "50%"}
    columns = ("quality", "quality from", "quality to", "dense")
    rows: list[Row] = [
        (name, *(float(found[method][column]) for column in columns), int(found[method]["seeds"]))
        for method, name in FRONT.items()
    ]

    def draw(canvas: Canvas, rows: tuple[Row, ...]) -> None:
        axes = canvas.add_subplot()
        for index, row in enumerate(rows):
            look = style(index)
            value, low, high, _ = (numbers([row], column)[0] for column in range(1, 5))
            axes.barh(index, value, 0.5, color=look.colour, alpha=0.75)
            axes.errorbar(value, index, xerr=[[value - low], [high - value]], color=INK, capsize=3)
            axes.annotate(
                f"{value:.1f}", (high, index), xytext=(6, 0), textcoords="offset points", va="center"
            )
        dense = numbers(rows, 4)[0]
        axes.axvline(dense, color=NEUTRAL, linestyle="--")
        axes.set_yticks(range(len(rows)), [str(row[0]) for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("perplexity, half of the weights pruned")

    return Figure(
        "front",
        "Perplexity after pruning",
        f"SmolLM2-135M with half of its weights pruned and no other changed: means over {rows[0][5]} "
        "calibration seeds with 95% intervals. The dashed line is the dense model.",
        ("method", *columns, "seeds"),
        tuple(rows),
        draw,
        2.4,
    )


@functools.cache
def reports() -> tempfile.TemporaryDirectory[str]:
    """A folder with the reports of all published studies, made once however often the site is built."""
    folder = tempfile.TemporaryDirectory()
    for rows in sorted(PUBLISHED.glob("*/rows")):
        build_report(rows, Path(folder.name) / rows.parent.name)
    return folder


def published() -> str:
    """Markdown of the gallery of published studies: first figure, title with its link, first finding."""
    cards = []
    for rows in sorted(PUBLISHED.glob("*/rows")):
        name = rows.parent.name
        folder = Path(reports().name) / name
        twin = (folder / "README.md").read_text(encoding="utf-8")
        _, _, sections = twin.partition("\n## ")
        finding = sections.split("\n\n")[1]
        picture = re.search(r"!\[.*?\]\((figures/.*?)\.svg\)", sections)
        if picture is None:
            raise ValueError(f"report of {name}: expected a figure, found none")
        cards += [
            f"<div markdown>\n\n<figure>\n{inline(folder / f'{picture[1]}.svg')}\n</figure>\n\n"
            f"**[{facts['title']}](published/{name}/index.html)**\n\n{finding}\n\n</div>"
            for facts in read_rows(rows).studies
        ]
    return '<div class="gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"


def inline(picture: Path) -> str:
    """A picture of a report for a page of either colour, without the ground that its file has."""
    text = picture.read_text(encoding="utf-8")
    return re.sub(r"<rect [^>]*?/>", "", text[text.index("<svg") :], count=1).strip()


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the reports; their Markdown twins are for readers of the repository."""
    folder = Path(reports().name)
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file() and path.suffix != ".md":
            place = f"published/{path.relative_to(folder).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what was measured, and the gallery of reports, where the page asks for it."""
    markdown = MARKER.sub(lambda found: measured(found[1]), markdown)
    return markdown.replace(LIST, published()) if LIST in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Show formulas without a script."""
    return FORMULA.sub(lambda found: mathml(unescape(found[2]), found[1] == "div"), content)


def mathml(formula: str, display: bool) -> str:
    """MathML of a formula in TeX; one that stands alone scrolls where the screen is narrow."""
    text = convert(formula, display="block" if display else "inline")
    return f'<div class="formula">{text}</div>' if display else text


def on_shutdown(**_: Any) -> None:
    """Take the folder of reports away again."""
    if reports.cache_info().currsize:
        reports().cleanup()
